"""Tell what a checkpoint is, from headers alone: which component of which family, in which layout, and is it whole.

`config.json` beside the files decides where there is one; key names and shapes decide where there is none. No weight is
read here.
"""

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .registry import FAMILIES
from .runtime.errors import CorruptFileError, InvalidInputError, KeyMismatchError, UnknownModelError
from .spec import ComponentSpec, Family, Shapes
from .weights.keymap import KeyLayout
from .weights.reader import CheckpointReader, TensorInfo

logger = logging.getLogger(__name__)

_SHOWN = 8  # names listed of each kind in a message


class MemoryReader(Mapping[str, TensorInfo]):
    """A state dict that is already in memory, behind the interface of `CheckpointReader`."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(state_dict)
        self.paths: tuple[Path, ...] = ()
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
    """`name: [shape in the file] instead of [shape]`."""

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

    with init_empty_weights(include_buffers=False):
        return component.build(config).eval().requires_grad_(False)


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor a checkpoint of `module` holds."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


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
            raise KeyMismatchError(_mismatch(candidate))
    extra = set(reader) - set().union(*(candidate.claimed for candidate in found))
    if extra:
        names = ", ".join(candidate.title for candidate in found)
        raise KeyMismatchError(
            f"{reader.describe()} ({names}) holds {_some(extra, 'tensor')} that do not belong there."
        )
    return found


def candidates(reader: Reader) -> list[Recognised]:
    """The best reading of every component whose marker is in `reader`, complete or not."""
    config = _config_beside(reader.paths)
    found = []
    for family in FAMILIES:
        for component in family.spec.components:
            named = config is not None and _class_of(config) in component.class_names
            readings = [
                reading
                for layout in component.layouts
                if layout.to_file(component.marker) in reader
                and (reading := _read_as(reader, family, component, layout, config if named else None)) is not None
            ]
            if readings:
                found.append(min(readings, key=lambda r: (len(r.missing) + len(r.misshaped), -len(r.claimed))))
    # Two families may share a marker in some layout; a complete reading leaves no doubt, and so does a named class.
    named_here = [c for c in found if config is not None and _class_of(config) in c.component.class_names]
    return [candidate for candidate in found if candidate.complete] or named_here or found


def _read_as(
    reader: Reader, family: Family, component: ComponentSpec, layout: KeyLayout, config: Mapping[str, Any] | None
) -> Recognised | None:
    ours = {our_name: name for name in reader if (our_name := layout.to_ours(name)) is not None}
    shapes = reader.shapes
    try:
        parsed = (
            component.parse_config(config)
            if config is not None
            else component.infer_config({our_name: shapes[name] for our_name, name in ours.items()})
        )
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        if config is None:
            return None  # the marker was there, but the tensors around it were not: some other model
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"config.json beside {reader.describe()} cannot be understood: {error}") from error
    if parsed is None:
        return None
    reading = Recognised(family, component, layout, parsed, meta_build(component, parsed), reader)
    _compare(reading, ours, shapes)
    return reading


def _compare(reading: Recognised, ours: Mapping[str, str], shapes: Shapes) -> None:
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
        shape = shapes[name]
        if shape != wanted and not (reading.layout.squeezed and without_ones(shape) == wanted):
            reading.misshaped.append(f"{name}: {list(shape)} instead of {list(wanted)}")


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without trailing ones: a 1x1 convolution as a matrix."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _config_beside(paths: Sequence[Path]) -> dict[str, Any] | None:
    """The parsed `config.json` in the folder of the files, if it is the config of some known component."""
    if not paths or not (path := paths[0].parent / "config.json").is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is no valid JSON: {error}. Download it again.") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path} is no JSON object. Download it again.")
    known = {name for family in FAMILIES for c in family.spec.components for name in c.class_names}
    return config if _class_of(config) in known else None


def _class_of(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or [""]
    return str(config.get("_class_name") or architectures[0])


def _some(names: Sequence[str] | set[str], noun: str) -> str:
    shown = sorted(names)[:_SHOWN]
    more = f", and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({', '.join(shown)}{more})"


def _mismatch(reading: Recognised) -> str:
    parts = []
    if reading.missing:
        parts.append(f"lacks {_some(reading.missing, 'tensor')}")
    if reading.misshaped:
        parts.append(f"has {_some(reading.misshaped, 'mis-shaped tensor')}")
    return (
        f"{reading.reader.describe()} looks like the {reading.title} but {' and '.join(parts)}. "
        "Check that all shards are given, and that config.json belongs to them."
    )


def _unknown(reader: Reader) -> str:
    """Name the closest published component by the share of its names that the file has."""
    best: tuple[float, str, list[str]] = (-1.0, "", [])
    for family in FAMILIES:
        for component in family.spec.components:
            published = component.parse_config(_published_config(component))
            ours = {component.layouts[0].to_file(name) for name in module_shapes(meta_build(component, published))}
            share = len(ours & set(reader)) / len(ours)
            if share > best[0]:
                best = (share, f"{component.title} of {family.spec.title}", sorted(set(reader) - ours))
    share, title, different = best
    near = f"{share:.0%} of the names of the {title}, the closest known model, are in it" if share else "none is close"
    hint = ""
    if share == 1 or not different:
        hint = (
            " The names fit, but the shapes do not tell all numbers of the model: put its config.json beside the file."
        )
    elif different:
        known = difflib.get_close_matches(different[0], ["transformer_blocks.0", "layers.0"], n=1)
        hint = f" First names that differ: {', '.join(different[:_SHOWN])}.{'' if not known else ''}"
    return f"{reader.describe()} is no model this package knows ({len(reader)} tensors; {near}).{hint}"


def _published_config(component: ComponentSpec) -> Mapping[str, Any]:
    """A `config.json` of the published numbers: empty for our own classes, whose defaults they are."""
    tiny = dict(component.tiny)
    return {"text_config": tiny["text_config"]} if "text_config" in tiny else {}
