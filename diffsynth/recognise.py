"""Tell what a checkpoint is, from headers alone: which component of which family, in which layout, and is it whole.

`config.json` beside the files decides where there is one; key names and shapes decide where there is none. No weight is
read here.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .registry import FAMILIES
from .runtime.errors import CorruptFileError, InvalidInputError, KeyMismatchError, UnknownModelError
from .spec import ComponentSpec, Family
from .weights.keymap import KeyLayout
from .weights.reader import CheckpointReader, TensorInfo

logger = logging.getLogger(__name__)

_SHOWN = 8  # names listed of each kind in a message
_ALIKE = 0.9  # share of names from which on a file is taken for a known model of another size
_FLOATING = ("F", "BF", "torch.float", "torch.bfloat")  # beginnings of dtypes, in files and in memory


class MemoryReader(Mapping[str, TensorInfo]):
    """A state dict that is already in memory, behind the interface of `CheckpointReader`.

    Args:
        state_dict: tensors by name.
        folder: where its `config.json` is, if there is one.

    Raises:
        InvalidInputError: something in it is no tensor.
    """

    def __init__(self, state_dict: Mapping[str, torch.Tensor], folder: Path | None = None) -> None:
        if not isinstance(state_dict, Mapping):
            raise InvalidInputError(f"state_dict must map names to tensors; got a {type(state_dict).__name__}.")
        for name, value in state_dict.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                kind = "null" if value is None else type(value).__name__
                raise InvalidInputError(f"state_dict must map names to tensors; {name!r} is a {kind}.")
        self._tensors = dict(state_dict)
        self.paths: tuple[Path, ...] = ()
        self.folder = folder
        self.metadata: dict[str, str] = {}

    def __getitem__(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(Path("state_dict"), str(tensor.dtype), tuple(tensor.shape), tensor.nbytes)

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def describe(self) -> str:
        """Where it comes from, for messages."""
        return "the given state_dict"

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it was given."""
        return self._tensors[name]

    def release(self) -> None:
        """Nothing to let go of: the caller owns the tensors."""


Reader = CheckpointReader | MemoryReader


@dataclass
class Recognised:
    """A component found in a checkpoint, with its module built on the meta device."""

    family: Family
    component: ComponentSpec
    layout: KeyLayout
    config: Any
    module: nn.Module
    reader: Reader
    names: dict[str, str] = field(default_factory=dict)
    """Our name of every tensor to read, to its name in the file."""
    claimed: set[str] = field(default_factory=set)
    """Names in the file that belong to the component, read or not."""
    missing: list[str] = field(default_factory=list)
    """File names of tensors the component needs and the file lacks."""
    misshaped: list[str] = field(default_factory=list)
    """`name: [shape in the file] instead of [shape]`, or the same for dtypes."""

    @property
    def complete(self) -> bool:
        """Whether every tensor the component needs is there in its shape."""
        return not self.missing and not self.misshaped

    @property
    def title(self) -> str:
        """For messages: "transformer of Qwen-Image"."""
        return f"{self.component.title} of {self.family.spec.title}"


def meta_build(component: ComponentSpec, config: Any) -> nn.Module:
    """The component's module with parameters on the meta device and real non-parameter buffers."""
    from accelerate import init_empty_weights

    with _without_initialisation(), init_empty_weights(include_buffers=False):
        return component.build(config).eval().requires_grad_(False)


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Leave the parameters of common layers as they are created: they are about to be replaced.

    Each exists on the CPU for a moment before it moves to meta, where drawing random numbers for it costs most of the
    time of a build; and deterministic mode would fill it with NaN.
    """
    deterministic: Any = torch.utils.deterministic
    filling, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    layers: list[Any] = [nn.Linear, nn.Embedding, nn.modules.conv._ConvNd]
    methods = [layer.reset_parameters for layer in layers]
    for layer in layers:
        layer.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for layer, method in zip(layers, methods, strict=True):
            layer.reset_parameters = method
        deterministic.fill_uninitialized_memory = filling


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor a checkpoint of `module` holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, owner in module.named_modules():
        persistent = {name: b for name, b in owner._buffers.items() if name not in owner._non_persistent_buffers_set}
        for leaf, tensor in (*owner._parameters.items(), *persistent.items()):
            if tensor is not None:
                shapes[f"{path}.{leaf}" if path else leaf] = tuple(tensor.shape)
    return shapes


def recognise(reader: Reader) -> list[Recognised]:
    """Every component that `reader` holds completely.

    Raises:
        UnknownModelError: nothing known is in it; names the closest known model and the first names that differ.
        KeyMismatchError: a known component is in it, but tensors are missing, extra or mis-shaped.
    """
    found = candidates(reader)
    if not found:
        raise UnknownModelError(_unknown(reader))
    for candidate in found:
        if not candidate.complete:
            raise KeyMismatchError(_mismatch(candidate, _extra(reader, found)))
    if extra := _extra(reader, found):
        names = ", ".join(candidate.title for candidate in found)
        raise KeyMismatchError(
            f"{reader.describe()} ({names}) holds {_counted(extra, 'tensor')} that do not belong there."
        )
    return found


def _extra(reader: Reader, found: Sequence[Recognised]) -> set[str]:
    """Names in the file that belong to none of its components."""
    return set(reader) - set().union(*(candidate.claimed for candidate in found))


def candidates(reader: Reader) -> list[Recognised]:
    """The best reading of every component whose marker is in `reader`, complete or not."""
    config = _config_beside(reader)
    found = []
    for family in FAMILIES:
        for component in family.spec.components:
            named = config is not None and _class_of(config) in component.class_names
            marked = [layout for layout in component.layouts if layout.to_file(component.marker) in reader]
            readings: list[Recognised] = []
            for layout in marked or component.layouts if named else marked:
                reading = _read_as(reader, family, component, layout, config if named else None)
                if reading is not None and reading.names:
                    readings.append(reading)
                    if reading.complete and len(reading.claimed) == len(reader):
                        break  # nothing can fit better, and building a module of every layout takes time
            if readings:
                found.append(min(readings, key=lambda r: (len(r.missing) + len(r.misshaped), -len(r.claimed))))
    # Two families may share a marker in some layout; a complete reading leaves no doubt, and so does a named class.
    named_here = [c for c in found if config is not None and _class_of(config) in c.component.class_names]
    return [candidate for candidate in found if candidate.complete] or named_here or found


def _read_as(
    reader: Reader, family: Family, component: ComponentSpec, layout: KeyLayout, config: Mapping[str, Any] | None
) -> Recognised | None:
    ours = {our_name: name for name in reader if (our_name := layout.to_ours(name)) is not None}
    if config is None:
        shapes = reader.shapes
        try:
            parsed = component.infer_config({our_name: shapes[name] for our_name, name in ours.items()})
        except (KeyError, IndexError, ValueError, TypeError):
            return None  # the marker was there, but the tensors around it were not: some other model
        if parsed is None:
            return None
        module = meta_build(component, parsed)
    else:
        parsed, module = _build_from(config, component, reader)
    reading = Recognised(family, component, layout, parsed, module, reader)
    _compare(reading, ours)
    return reading


def _build_from(config: Mapping[str, Any], component: ComponentSpec, reader: Reader) -> tuple[Any, nn.Module]:
    """Typed config and module from a `config.json`, of which other libraries read a part."""
    _check_depth(config, reader)
    try:
        parsed = component.parse_config(config)
        return parsed, meta_build(component, parsed)
    except (InvalidInputError, ImportError):
        raise
    except Exception as error:  # whatever those libraries raise for values they never expected
        reason = str(error).replace("NoneType", "null")
        raise InvalidInputError(
            f"config.json beside {reader.describe()} cannot be understood ({type(error).__name__}: {reason}). "
            "Download it again."
        ) from error


def _check_depth(config: Mapping[str, Any], reader: Reader) -> None:
    """Refuse more layers than the file has tensors before building them, which would take for ever."""
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("num_layers", "num_hidden_layers", "num_res_blocks", "layers_per_block"):
            value = section.get(key)
            if isinstance(value, int) and value > len(reader):
                raise InvalidInputError(
                    f"config.json beside {reader.describe()} sets {key} = {value}, more than the {len(reader)} tensors "
                    "of the file. Download config.json again."
                )


def _compare(reading: Recognised, ours: Mapping[str, str]) -> None:
    parameters = {name for name, _ in reading.module.named_parameters()}
    unread = reading.component.unread(reading.config)
    reading.claimed = {name for name in reading.reader if reading.layout.is_ignored(name)}
    reading.claimed |= {name for our_name, name in ours.items() if our_name.startswith(unread)}
    for our_name, wanted in module_shapes(reading.module).items():
        name = ours.get(our_name)
        if name is None:
            reading.missing.append(reading.layout.to_file(our_name))
            continue
        reading.claimed.add(name)
        reading.names[our_name] = name
        shape, dtype = reading.reader[name].shape, reading.reader[name].dtype
        if our_name in parameters and not dtype.startswith(_FLOATING):
            reading.misshaped.append(f"{name}: {dtype} instead of a floating-point dtype")
        elif shape != wanted and not (reading.layout.squeezed and without_ones(shape) == wanted):
            reading.misshaped.append(f"{name}: {list(shape)} instead of {list(wanted)}")


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without trailing ones: a 1x1 convolution as a matrix."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _config_beside(reader: Reader) -> dict[str, Any] | None:
    """The parsed `config.json` in the folder of the files, if there is one."""
    if reader.folder is None or not (path := reader.folder / "config.json").is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no valid JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path} is no JSON object. Download it again.")
    return config


def _class_of(config: Mapping[str, Any]) -> str:
    """The class that a `config.json` names, or an empty string."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return str(config.get("_class_name") or first)


def _some(names: Sequence[str] | set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _counted(names: Sequence[str] | set[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({_some(names)})"


def _mismatch(reading: Recognised, extra: set[str]) -> str:
    parts = []
    if reading.missing:
        parts.append(f"lacks {_counted(reading.missing, 'tensor')}")
    if reading.misshaped:
        parts.append(f"has {_counted(reading.misshaped, 'mis-shaped tensor')}")
    if extra:
        parts.append(f"holds {_counted(extra, 'tensor')} that do not belong there")
    return (
        f"{reading.reader.describe()} looks like the {reading.title} but {' and '.join(parts)}. "
        "Check that all shards are given, and that config.json belongs to them."
    )


@dataclass(frozen=True)
class _Likeness:
    """How alike the names of a file and of a component in one layout are, whatever the number of layers."""

    title: str
    share: float
    """Names in common, of all names of both."""
    only_here: list[str]
    """In the file but not in the component."""
    only_there: list[str]


def _likeness(reader: Reader, family: Family, component: ComponentSpec, layout: KeyLayout) -> _Likeness:
    config = component.parse_config(component.tiny)  # has every kind of layer
    unread = component.unread(config)
    here: dict[str, str] = {}
    for name in sorted(reader):
        if not layout.is_ignored(name) and not (unread and (layout.to_ours(name) or "").startswith(unread)):
            here.setdefault(_unnumbered(name), name)
    there: dict[str, str] = {}
    for name in sorted(map(layout.to_file, meta_build(component, config).state_dict())):
        there.setdefault(_unnumbered(name), name)
    return _Likeness(
        f"{component.title} of {family.spec.title}",
        len(here.keys() & there.keys()) / max(len(here.keys() | there.keys()), 1),
        [name for key, name in here.items() if key not in there],
        [name for key, name in there.items() if key not in here],
    )


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _unknown(reader: Reader) -> str:
    """Name the closest known component, and what keeps the file from being it."""
    closest = max(
        (
            _likeness(reader, family, component, layout)
            for family in FAMILIES
            for component in family.spec.components
            for layout in component.layouts
        ),
        key=lambda likeness: likeness.share,
    )
    parts = [f"{reader.describe()} is no model this package knows ({len(reader)} tensors)."]
    if closest.share:
        parts.append(f"Closest is the {closest.title}, with {closest.share:.0%} of the names in common.")
        if closest.only_here:
            parts.append(f"Only in the file: {_some(closest.only_here)}.")
        if closest.only_there:
            parts.append(f"Only in that model: {_some(closest.only_there)}.")
    else:
        parts.append(f"No known model has names like these: {_some(set(reader)) or 'it is empty'}.")
    if any("lora_" in name for name in reader):
        parts.append("It looks like a LoRA adapter, which is no model of its own.")
    config = _config_beside(reader)
    if config is not None:
        parts.append(f"The config.json beside it is for {_class_of(config) or 'no class at all'}.")
    elif closest.share > _ALIKE:
        parts.append("Shapes do not tell all numbers of a model of another size: put its config.json beside it.")
    return " ".join(parts)
