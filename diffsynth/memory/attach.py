"""Let a module's weights rest in one place and compute in another, from outside, unit by unit.

A unit is a piece of the module that runs as one call: a child, an element of a list of blocks, or a part of a block
that runs on its own schedule. Before a unit runs its weights are brought to the computation device and dtype;
afterwards they are dropped again. The resting weights are never written back: nothing changes them. What is attached
leaves the module's arithmetic as it is, so the result is the same wherever the weights rest (fp8 storage rounds them
once, when they are stored).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.device import resolve_device
from ..runtime.errors import InvalidInputError
from ..weights.model_config import ModelConfig
from .quantized import FP8_DTYPES, QuantizedWeight

logger = logging.getLogger(__name__)

DISK = "disk"
ALL = ("",)
"""Prefix of every name."""
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
            resolve_device(said["computation_device"] or device, "computation_device"),
            _dtype(said["computation_dtype"] or dtype, "computation_dtype"),
        )
        if computation[1] in FP8_DTYPES:
            raise InvalidInputError(f"computation_dtype={computation[1]} is a storage type; use torch.bfloat16.")
        offload = _place("offload", said, computation, computation[1])
        onload = _place("onload", said, offload, computation[1])
        preparing = _place("preparing", said, (computation[0], onload[1]), computation[1])
        _check_order(offload, onload, preparing)
        return cls(offload, onload, preparing, computation)


def _check_order(offload: Place, onload: Place, preparing: Place) -> None:
    """Weights may come nearer from stage to stage, and are stored in one kind of fp8."""
    for (earlier, (from_device, _)), (later, (to_device, _)) in (
        (("offload", offload), ("onload", onload)),
        (("onload", onload), ("preparing", preparing)),
    ):
        if to_device == DISK and from_device != DISK:
            raise InvalidInputError(
                f"{later}_device='disk' but {earlier}_device={str(from_device)!r}: weights that rest in memory do not "
                f"go to disk when they are needed. Set {earlier}_device='disk' too, or another {later}_device."
            )
    kinds = {dtype for _, dtype in (offload, onload, preparing) if dtype in FP8_DTYPES}
    if len(kinds) > 1:
        raise InvalidInputError(f"Two kinds of fp8 storage ({', '.join(sorted(map(str, kinds)))}): use one of them.")


def _dtype(value: Any, name: str) -> torch.dtype:
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise InvalidInputError(f"{name}={value!r} is no floating-point torch.dtype such as torch.bfloat16.")
    return value


def _place(stage: str, said: dict[str, Any], default: Place, compute_dtype: torch.dtype) -> Place:
    device, dtype = said[f"{stage}_device"], said[f"{stage}_dtype"]
    if DISK in (device, dtype):
        if {device, dtype} - {DISK, None}:
            raise InvalidInputError(
                f"{stage}_device={str(device)!r} and {stage}_dtype={str(dtype)!r} disagree: weights on disk have the "
                f"dtype of their file. Set both to 'disk', or neither."
            )
        return DISK, compute_dtype
    if device is None:
        device = default[0] if dtype is None or default[0] != DISK else "cpu"
    if dtype is None:
        dtype = default[1]
    place = DISK if device == DISK else resolve_device(device, f"{stage}_device")
    return place, _dtype(dtype, f"{stage}_dtype")


@dataclass
class _Unit:
    module: nn.Module
    owners: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    """Full name of every parameter to the submodule and attribute that hold it."""
    kept: dict[str, Stored] | None = None


class Attachment:
    """The weights of one attached module; `in_use` brackets a phase, `detach` ends the arrangement.

    Attributes:
        module: what is attached.
        residence: where its weights rest and compute.
        limit: GiB of weights that may stay in the preparing place during a phase; None for no limit. A change counts
            from the next unit on that runs.
    """

    def __init__(
        self,
        module: nn.Module,
        read: Callable[[str], Tensor],
        residence: Residence,
        *,
        separate: Sequence[str] = (),
        quantizable: Sequence[str] = ALL,
        limit: float | None = None,
    ) -> None:
        self.module = module
        self.residence = residence
        self.limit = limit
        self._read = read
        self._separate = tuple(separate)
        self._quantizable = tuple(quantizable)
        self._phases = 0
        self._onloaded: dict[str, Stored] = {}
        self._kept_bytes = 0
        self._units = [_Unit(unit, owners) for unit, owners in _units(module, self._separate)]
        names = [name for unit in self._units for name in unit.owners]
        self._rest = (
            {} if residence.offload[0] == DISK else {n: self._convert(n, read(n), residence.offload) for n in names}
        )
        self._load_permanent()
        self._clear()
        self._hooks = [hook for unit in self._units for hook in self._hook(unit)]
        module.compute_placement = residence.computation  # type: ignore[assignment]
        module.load_state_dict = self._load_state_dict  # type: ignore[method-assign]

    def _load_permanent(self) -> None:
        """What is small or belongs to no unit lives where the computation is; buffers in the dtype of the file."""
        device, dtype = self.residence.computation
        for leaf, parameter in self.module._parameters.items():
            if parameter is not None:
                self.module._parameters[leaf] = _frozen(self._read(leaf).to(device, dtype))
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        for name in self.module.state_dict().keys() - parameters:
            owner_path, _, leaf = name.rpartition(".")
            self.module.get_submodule(owner_path)._buffers[leaf] = self._read(name)
        for owner in self.module.modules():
            for leaf, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[leaf] = buffer.to(device)

    def _quantizes(self, name: str, tensor: Tensor) -> bool:
        return (
            tensor.ndim >= 2
            and name.startswith(self._quantizable)
            and not any(fnmatch(name, pattern) for pattern in self._separate)
        )

    def _convert(self, name: str, stored: Stored, place: Place) -> Stored:
        """`stored` as it is kept at `place`: quantized if that is fp8 and the tensor can bear it."""
        device, dtype = place
        assert isinstance(device, torch.device)
        if isinstance(stored, QuantizedWeight):
            return stored.to(device, dtype)
        if dtype not in FP8_DTYPES:
            return stored.to(device, dtype)
        if self._quantizes(name, stored):
            return QuantizedWeight.of(stored.to(device), dtype)
        return stored.to(device, self.residence.computation[1])

    def _nbytes(self, name: str, stored: Stored, dtype: torch.dtype) -> int:
        """Bytes of `stored` once it is kept in `dtype`."""
        if isinstance(stored, QuantizedWeight):
            return stored.nbytes if dtype in FP8_DTYPES else stored.data.numel() * dtype.itemsize
        if dtype not in FP8_DTYPES:
            return stored.numel() * dtype.itemsize
        if self._quantizes(name, stored):
            return QuantizedWeight.nbytes_of(stored)
        return stored.numel() * self.residence.computation[1].itemsize

    def _waiting(self, name: str) -> Stored:
        """The weight where it waits for its unit to run; rounded to the onload dtype even outside of a phase."""
        if name in self._onloaded:
            return self._onloaded[name]
        stored = self._rest[name] if name in self._rest else self._read(name)
        if self.residence.onload[0] == DISK:
            return stored
        return self._convert(name, stored, (stored.device, self.residence.onload[1]))

    def _prepared(self, name: str, waiting: Stored, device: torch.device | str) -> Stored:
        """The weight on `device` in the preparing dtype: every way to the computation leads through it.

        So the result does not depend on which units are kept.
        """
        return self._convert(name, waiting, (device, self.residence.preparing[1]))

    def _hook(self, unit: _Unit) -> list[Any]:
        def before(*_: Any) -> None:
            for name, tensor in self._computable(unit).items():
                owner, leaf = unit.owners[name]
                owner._parameters[leaf] = _frozen(tensor)

        def after(*_: Any) -> None:
            self._clear_unit(unit)

        return [
            unit.module.register_forward_pre_hook(before),
            unit.module.register_forward_hook(after, always_call=True),
        ]

    def _computable(self, unit: _Unit) -> dict[str, Tensor]:
        return {name: self._computed(name, value) for name, value in (unit.kept or self._fetched(unit)).items()}

    def _fetched(self, unit: _Unit) -> dict[str, Stored]:
        """Weights of a unit on the way to its computation, kept for the rest of the phase if the limit allows."""
        waiting = {name: self._waiting(name) for name in unit.owners}
        place, dtype = self.residence.preparing
        if self._phases and place != DISK:
            nbytes = sum(self._nbytes(name, value, dtype) for name, value in waiting.items())
            if self.limit is None or self._kept_bytes + nbytes <= self.limit * 2**30:
                unit.kept = {name: self._prepared(name, value, place) for name, value in waiting.items()}
                self._kept_bytes += nbytes
                return unit.kept
        device = self.residence.computation[0]
        return {name: self._prepared(name, value, device) for name, value in waiting.items()}

    def _computed(self, name: str, value: Stored) -> Tensor:
        tensor = self._convert(name, value, self.residence.computation)
        assert isinstance(tensor, Tensor)
        return tensor

    def _clear_unit(self, unit: _Unit) -> None:
        for owner, leaf in unit.owners.values():
            shape = owner._parameters[leaf].shape  # type: ignore[union-attr]
            dtype = self.residence.computation[1]  # what a module asks its weights for before they are there
            owner._parameters[leaf] = _frozen(torch.empty(shape, dtype=dtype, device="meta"))

    def _clear(self) -> None:
        for unit in self._units:
            self._clear_unit(unit)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Bracket a phase: weights go to the onload place for its length, and kept units are dropped after it.

        Phases may be nested: the outermost counts.
        """
        self._phases += 1
        try:
            if self._phases == 1:
                self._go_onload()
            yield
        finally:
            self._phases -= 1
            if not self._phases:
                self._drop()
                self._clear()  # also what an interrupt in the middle of a unit has left

    def _go_onload(self) -> None:
        onload, offload = self.residence.onload, self.residence.offload
        if onload == offload or onload[0] == DISK:
            return
        for unit in self._units:
            for name in unit.owners:
                self._onloaded[name] = self._convert(name, self._waiting(name), onload)

    def _drop(self) -> None:
        self._onloaded.clear()
        self._kept_bytes = 0
        for unit in self._units:
            unit.kept = None

    def _load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """In place of the module's own method: new weights go where the weights rest, or to host memory for disk."""
        place = self.residence.offload
        if place[0] == DISK:
            place = torch.device("cpu"), place[1]
        permanent = {name: buffer.dtype for name, buffer in self.module.named_buffers()}
        permanent |= {name: self.residence.computation[1] for name, _ in self.module.named_parameters(recurse=False)}
        try:
            return type(self.module).load_state_dict(self.module, state_dict, strict=strict, assign=True)
        finally:
            self._drop()
            for unit in self._units:
                for name, (owner, leaf) in unit.owners.items():
                    given = owner._parameters[leaf]
                    if given is not None and not given.is_meta:
                        self._rest[name] = self._convert(name, given.detach().clone(), place)
            self._clear()
            for name, dtype in permanent.items():
                owner_path, _, leaf = name.rpartition(".")
                tensor = getattr(self.module.get_submodule(owner_path), leaf)
                tensor.data = tensor.data.to(self.residence.computation[0], dtype, copy=True)

    def detach(self) -> None:
        """Put all weights in the computation place, for good, and take the hooks away."""
        device = self.residence.computation[0]
        for unit in self._units:
            for name, (owner, leaf) in unit.owners.items():
                value = self._computed(name, self._prepared(name, self._waiting(name), device))
                owner._parameters[leaf] = _frozen(value)
        for hook in self._hooks:
            hook.remove()
        self._drop()
        self._units.clear()
        self._rest.clear()
        for name in ("compute_placement", "load_state_dict", "attachment"):
            self.module.__dict__.pop(name, None)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def attach(
    module: nn.Module,
    read: Callable[[str], Tensor],
    residence: Residence,
    *,
    separate: Sequence[str] = (),
    quantizable: Sequence[str] = ALL,
    limit: float | None = None,
) -> Attachment:
    """Attach `module`, whose parameters may still be on the meta device.

    Args:
        module: gets an attribute `attachment`.
        read: parameter or buffer by name, on the CPU.
        residence: where weights rest and compute.
        separate: glob patterns of parameters that run apart from their block (timestep-only layers); never quantized.
        quantizable: prefixes of the parameters that may be stored in fp8, if they are matrices or kernels; the others
            keep the compute dtype.
        limit: GiB of weights that may stay in the preparing place during a phase; None for no limit.

    Raises:
        InvalidInputError: the module is attached already.
    """
    if attachment_of(module) is not None:
        raise InvalidInputError("The module is attached already; call its `attachment.detach()` first.")
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
    roots = list(_callable_children(module, ""))
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


def _callable_children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Children by path; the elements of a container in its place, because nobody calls a container itself."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_children(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _matches(prefix: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(prefix, pattern) for pattern in patterns)


def _owners(module: nn.Module, path: str) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for owner_path, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                yield ".".join(filter(None, (path, owner_path, leaf))), (owner, leaf)
