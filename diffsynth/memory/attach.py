"""Let a module's weights rest in one place and compute in another, from outside, unit by unit.

A unit is a piece of the module that runs as one call: a child, an element of a list of blocks, or a part of a block
that runs on its own schedule. Before a unit runs its weights are brought to the computation device and dtype; afterwards
they are dropped again. The resting weights are never written back: nothing changes them. What is attached leaves the
module's arithmetic as it is, so the result is the same wherever the weights rest (fp8 storage rounds them once, when
they are stored).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import InvalidInputError
from ..weights.model_config import ModelConfig
from .quantized import FP8_DTYPES, QuantizedWeight

logger = logging.getLogger(__name__)

DISK = "disk"
Stored = Tensor | QuantizedWeight
Place = tuple[torch.device | str, torch.dtype]
"""Device (or "disk") and dtype."""


@dataclass(frozen=True)
class Residence:
    """Places of a component's weights, from rest to computation."""

    offload: Place
    """While the component is not in use."""
    onload: Place
    """While it is in use."""
    preparing: Place
    """Where units stay once they have run, as far as the limit allows."""
    computation: tuple[torch.device, torch.dtype]

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> "Residence | None":
        """The places that `config` asks for; None if it names none and the weights simply stay on `device`.

        A field left out follows its neighbour: `offload` the computation, `onload` the offload place, `preparing` the
        computation device in the onload dtype.

        Raises:
            InvalidInputError: fields that contradict each other.
        """
        said = {
            f"{stage}_{what}": getattr(config, f"{stage}_{what}")
            for stage in ("offload", "onload", "preparing", "computation")
            for what in ("device", "dtype")
        }
        if all(value is None for value in said.values()):
            return None
        computation = (
            torch.device(said["computation_device"] or device),
            _dtype(said["computation_dtype"] or dtype, "computation_dtype"),
        )
        if computation[1] in FP8_DTYPES:
            raise InvalidInputError(f"computation_dtype={computation[1]} is a storage type; use torch.bfloat16.")
        offload = _place("offload", said, computation, computation[1])
        onload = _place("onload", said, offload, computation[1])
        preparing = _place("preparing", said, (computation[0], onload[1]), computation[1])
        return cls(offload, onload, preparing, computation)


def _dtype(value: Any, name: str) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise InvalidInputError(f"{name}={value!r} is no torch.dtype.")
    return value


def _place(stage: str, said: dict[str, Any], default: Place, compute_dtype: torch.dtype) -> Place:
    device, dtype = said[f"{stage}_device"], said[f"{stage}_dtype"]
    if DISK in (device, dtype):
        if {device, dtype} - {DISK, None}:
            raise InvalidInputError(
                f"{stage}_device={device!r} and {stage}_dtype={dtype!r} disagree: weights on disk have the dtype of "
                f"their file. Set both to 'disk', or neither."
            )
        return DISK, compute_dtype
    if device is None:
        device = default[0] if dtype is None or default[0] != DISK else "cpu"
    if dtype is None:
        dtype = default[1]
    return (DISK if device == DISK else torch.device(device)), _dtype(dtype, f"{stage}_dtype")


@dataclass
class _Unit:
    module: nn.Module
    owners: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    """Full name of every parameter to the submodule and attribute that hold it."""
    kept: dict[str, Stored] | None = None


class Attachment:
    """The weights of one attached module; `in_use` brackets a phase, `detach` ends the arrangement."""

    def __init__(
        self,
        module: nn.Module,
        read: Callable[[str], Tensor],
        residence: Residence,
        *,
        separate: Sequence[str] = (),
        quantizable: str | None = None,
        limit: float | None = None,
    ) -> None:
        self.module = module
        self.residence = residence
        self.limit = limit
        self._read = read
        self._separate = tuple(separate)
        self._quantizable = quantizable
        self._onloaded: dict[str, Stored] = {}
        self._kept_bytes = 0
        self._units = [_Unit(unit, owners) for unit, owners in _units(module, self._separate)]
        names = [name for unit in self._units for name in unit.owners]
        self._rest = (
            {} if residence.offload[0] == DISK else {n: self._convert(n, read(n), residence.offload) for n in names}
        )
        self._load_buffers()
        self._clear()
        self._hooks = [hook for unit in self._units for hook in self._hook(unit)]
        module.compute_placement = residence.computation  # type: ignore[assignment]

    def _load_buffers(self) -> None:
        """Buffers are small: they live where the computation is, in the dtype of the file."""
        device = self.residence.computation[0]
        parameters = {name for name, _ in self.module.named_parameters()}
        for name in self.module.state_dict().keys() - parameters:
            owner_path, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(owner_path), leaf, self._read(name).to(device))
        for owner in self.module.modules():
            for leaf, buffer in owner._buffers.items():
                owner._buffers[leaf] = None if buffer is None else buffer.to(device)

    def _quantizes(self, name: str, tensor: Tensor) -> bool:
        inside = self._quantizable is None or name.startswith(self._quantizable)
        return tensor.ndim >= 2 and inside and not any(fnmatch(name, pattern) for pattern in self._separate)

    def _convert(self, name: str, stored: Stored, place: Place) -> Stored:
        device, dtype = place
        assert isinstance(device, torch.device)
        if isinstance(stored, QuantizedWeight):
            return stored.to(device, dtype)
        if dtype not in FP8_DTYPES:
            return stored.to(device, dtype)
        if self._quantizes(name, stored):
            return QuantizedWeight.of(stored.to(device), dtype)
        return stored.to(device, self.residence.computation[1])

    def _stored(self, name: str) -> Stored:
        if name in self._onloaded:
            return self._onloaded[name]
        return self._rest[name] if name in self._rest else self._read(name)

    def _hook(self, unit: _Unit) -> list[Any]:
        def before(*_: Any) -> None:
            for name, tensor in self._computable(unit).items():
                owner, leaf = unit.owners[name]
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

        def after(*_: Any) -> None:
            self._clear_unit(unit)

        return [
            unit.module.register_forward_pre_hook(before),
            unit.module.register_forward_hook(after, always_call=True),
        ]

    def _computable(self, unit: _Unit) -> dict[str, Tensor]:
        stored = unit.kept or {name: self._stored(name) for name in unit.owners}
        if unit.kept is None and self.residence.preparing[0] != DISK:
            prepared = {name: self._convert(name, value, self.residence.preparing) for name, value in stored.items()}
            nbytes = sum(value.nbytes for value in prepared.values())
            if self.limit is None or self._kept_bytes + nbytes <= self.limit * 2**30:
                self._kept_bytes += nbytes
                unit.kept = stored = prepared
        computed = {name: self._convert(name, value, self.residence.computation) for name, value in stored.items()}
        return {name: value for name, value in computed.items() if isinstance(value, Tensor)}

    def _clear_unit(self, unit: _Unit) -> None:
        for owner, leaf in unit.owners.values():
            shape = owner._parameters[leaf].shape  # type: ignore[union-attr]
            owner._parameters[leaf] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

    def _clear(self) -> None:
        for unit in self._units:
            self._clear_unit(unit)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Bracket a phase: weights go to the onload place for its length, and kept units are dropped after it."""
        onload, offload = self.residence.onload, self.residence.offload
        if onload != offload and onload[0] != DISK:
            for unit in self._units:
                for name in unit.owners:
                    self._onloaded[name] = self._convert(name, self._stored(name), onload)
        try:
            yield
        finally:
            self._onloaded.clear()
            self._kept_bytes = 0
            for unit in self._units:
                unit.kept = None

    def detach(self) -> None:
        """Put all weights in the computation place, for good, and take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        for unit in self._units:
            for name, (owner, leaf) in unit.owners.items():
                tensor = self._convert(name, self._stored(name), self.residence.computation)
                assert isinstance(tensor, Tensor)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        del self.module.compute_placement, self.module.attachment


def attach(
    module: nn.Module,
    read: Callable[[str], Tensor],
    residence: Residence,
    *,
    separate: Sequence[str] = (),
    quantizable: str | None = None,
    limit: float | None = None,
) -> Attachment:
    """Attach `module`, whose parameters may still be on the meta device.

    Args:
        module: gets an attribute `attachment`.
        read: parameter or buffer by name, on the CPU.
        residence: where weights rest and compute.
        separate: glob patterns of parameters that run apart from their block (timestep-only layers); never quantized.
        quantizable: only parameters whose name begins so are stored in fp8, the others keep the compute dtype; None
            for all matrices and kernels.
        limit: GiB of weights that may stay in the preparing place during a phase; None for no limit.
    """
    attachment = Attachment(module, read, residence, separate=separate, quantizable=quantizable, limit=limit)
    module.attachment = attachment  # type: ignore[assignment]
    return attachment


def attachment_of(module: nn.Module) -> Attachment | None:
    """The module's attachment, if it has one."""
    found: Attachment | None = getattr(module, "attachment", None)
    return found


@contextmanager
def in_use(module: nn.Module) -> Iterator[None]:
    """Bracket a phase in which `module` is used, attached or not."""
    attachment = attachment_of(module)
    if attachment is None:
        yield
        return
    with attachment.in_use():
        yield


def _units(module: nn.Module, separate: Sequence[str]) -> list[tuple[nn.Module, dict[str, tuple[nn.Module, str]]]]:
    """Cut `module` into units: every parameter belongs to exactly one."""
    roots: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            roots += [(f"{name}.{index}", element) for index, element in enumerate(child)]
        else:
            roots.append((name, child))
    units = []
    for path, root in roots:
        apart = [
            (f"{path}.{name}", child)
            for name, child in root.named_children()
            if not _matches(f"{path}.", separate) and _matches(f"{path}.{name}.", separate)
        ]
        owned = dict(_owners(root, path))
        for apart_path, child in apart:
            mine = dict(_owners(child, apart_path))
            owned = {name: owner for name, owner in owned.items() if name not in mine}
            units.append((child, mine))
        if owned:
            units.append((root, owned))
    return units


def _matches(prefix: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(prefix, pattern) for pattern in patterns)


def _owners(module: nn.Module, path: str) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for owner_path, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                yield ".".join(filter(None, (path, owner_path, leaf))), (owner, leaf)
