"""Say what a file or folder is, from headers alone: a picture, a checkpoint, or a whole model repository.

Nothing raises for a file that is wrong: what is wrong with it is the answer. torch is imported for checkpoints only.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runtime.errors import CorruptFileError, DiffSynthError, UnknownModelError
from .runtime.image import FORMATS, load_image, read_header
from .weights.reader import CheckpointReader, TensorInfo

if TYPE_CHECKING:
    from .recognise import Recognised
    from .spec import Family

FIRST_NAMES = 8
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


@dataclass
class TensorSummary:
    """Some tensors of a checkpoint, counted."""

    tensors: int
    parameters: int
    """Numbers in all tensors together."""
    bytes: int
    dtypes: dict[str, int]
    """Name in the file to number of tensors, the most frequent first."""

    @classmethod
    def of(cls, infos: Sequence[TensorInfo]) -> "TensorSummary":
        """Count `infos`."""
        return cls(
            tensors=len(infos),
            parameters=sum(math.prod(info.shape) for info in infos),
            bytes=sum(info.nbytes for info in infos),
            dtypes=dict(Counter(info.dtype for info in infos).most_common()),
        )


@dataclass
class ComponentReport:
    """One component of a family found in a checkpoint."""

    family: str
    """Name on the command line."""
    component: str
    """Attribute of the pipeline: "dit", "text_encoder", "vae"."""
    title: str
    """For people: "transformer of Qwen-Image"."""
    layout: str
    """How the file names the tensors."""
    contents: TensorSummary
    missing: list[str]
    """Names of tensors the file lacks."""
    misshaped: list[str]
    """`name: [shape in the file] instead of [shape]`."""

    @property
    def complete(self) -> bool:
        """Whether all tensors are there in their shapes."""
        return not self.missing and not self.misshaped


@dataclass
class CheckpointReport:
    """One checkpoint: a safetensors file, or the shards of one."""

    files: list[str]
    contents: TensorSummary | None = None
    """None where the files cannot be read."""
    components: list[ComponentReport] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    """Names of tensors that belong to none of the components."""
    first_names: list[str] = field(default_factory=list)
    """A few names, where no component was recognised."""
    problem: str | None = None

    @property
    def complete(self) -> bool:
        """Whether known components, and nothing else, are in it whole."""
        whole = all(component.complete for component in self.components)
        return bool(self.components) and whole and not self.extra and self.problem is None


@dataclass
class RepositoryReport:
    """A folder in the published layout, one subfolder for each component."""

    folder: str
    family: str | None
    """None where its checkpoints do not agree."""
    checkpoints: list[CheckpointReport]
    problem: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every component of the family is there whole."""
        return self.problem is None and all(checkpoint.complete for checkpoint in self.checkpoints)


@dataclass
class ImageReport:
    """One picture."""

    path: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    parameters: dict[str, Any] | None = None
    """What it was made with, if that is written in it."""
    problem: str | None = None

    @property
    def complete(self) -> bool:
        """Whether it can be read."""
        return self.problem is None


Report = ImageReport | CheckpointReport | RepositoryReport


def inspect_paths(paths: Sequence[Path]) -> list[Report]:
    """A report on each of `paths`; shards of one checkpoint (`name-00001-of-00003.safetensors`) share theirs."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        shard = _SHARD.fullmatch(path.name)
        key = (path.parent, f"{shard['stem']} of {shard['total']}") if shard else (path, "")
        if path not in groups.setdefault(key, []):
            groups[key].append(path)
    return [_inspect(group) for group in groups.values()]


def _inspect(paths: list[Path]) -> Report:
    if len(paths) == 1 and paths[0].is_dir():
        return _inspect_folder(paths[0])
    if len(paths) == 1 and is_image(paths[0]):
        return inspect_image(paths[0])
    return inspect_checkpoint(paths)


def is_image(path: Path) -> bool:
    """Whether `path` is a picture, or would be by its name."""
    if path.suffix.lower() in FORMATS:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def inspect_image(path: Path) -> ImageReport:
    """Format, size and parameters of the picture in `path`; it is decoded once, to see whether it is whole."""
    try:
        header = read_header(path)
        report = ImageReport(str(path), header.format, header.width, header.height, header.parameters)
    except DiffSynthError as error:
        return ImageReport(str(path), problem=str(error))
    try:
        load_image(path)
    except DiffSynthError as error:
        report.problem = str(error)
    return report


def inspect_checkpoint(paths: Sequence[Path]) -> CheckpointReport:
    """What is in the safetensors files `paths` of one checkpoint."""
    from .recognise import candidates, recognise

    report = CheckpointReport([str(path) for path in paths])
    try:
        reader = CheckpointReader(paths)
        report.contents = TensorSummary.of(list(reader.values()))
        report.first_names = sorted(reader)[:FIRST_NAMES]
        found = candidates(reader)
        if not found:
            recognise(reader)  # raises, saying what is closest
    except DiffSynthError as error:
        report.problem = str(error)
        return report
    claimed = set().union(*(candidate.claimed for candidate in found))
    report.components = [_component(candidate) for candidate in found]
    report.extra = sorted(set(reader) - claimed)
    report.first_names = []
    report.problem = _absent_shards(paths)
    return report


def _component(found: "Recognised") -> ComponentReport:
    return ComponentReport(
        family=found.family.spec.name,
        component=found.component.name,
        title=found.title,
        layout=found.layout.name,
        contents=TensorSummary.of([found.reader[name] for name in sorted(found.claimed)]),
        missing=sorted(found.missing),
        misshaped=sorted(found.misshaped),
    )


def _absent_shards(paths: Sequence[Path]) -> str | None:
    shards = [shard for path in paths if (shard := _SHARD.fullmatch(path.name))]
    if not shards:
        return None
    given, total = {int(shard["number"]) for shard in shards}, int(shards[0]["total"])
    absent = [str(number) for number in range(1, total + 1) if number not in given]
    return f"Shards {', '.join(absent)} of {total} were not given." if absent else None


def _inspect_folder(folder: Path) -> Report:
    from .load import weight_files
    from .registry import FAMILIES

    places = {component.folder: component for family in FAMILIES for component in family.spec.components}
    inner = [folder / name for name in places if (folder / name).is_dir()]
    if inner:
        return _inspect_repository(folder, [_inspect_place(place) for place in inner], FAMILIES)
    try:
        groups = weight_files(folder, ())
    except DiffSynthError as error:
        return CheckpointReport([str(folder)], problem=str(error))
    return inspect_checkpoint(groups[0])


def _inspect_place(folder: Path) -> CheckpointReport:
    from .load import weight_files

    try:
        return inspect_checkpoint(weight_files(folder, ())[0])
    except DiffSynthError as error:
        return CheckpointReport([str(folder)], problem=str(error))


def _inspect_repository(
    folder: Path, checkpoints: list[CheckpointReport], families: "Sequence[Family]"
) -> RepositoryReport:
    """Join the reports on the components, and name those that the family needs and the folder lacks."""
    found = [component for checkpoint in checkpoints for component in checkpoint.components]
    names = sorted({component.family for component in found})
    report = RepositoryReport(str(folder), names[0] if len(names) == 1 else None, checkpoints)
    if len(names) > 1:
        report.problem = f"It mixes components of {' and '.join(names)}."
    for family in families:
        if family.spec.name == report.family:
            files = [Path(name) for checkpoint in checkpoints if not checkpoint.components for name in checkpoint.files]
            unread = {name for file in files for name in (file.name, file.parent.name)}
            absent = [
                component.title
                for component in family.spec.components
                if component.name not in {item.component for item in found}
                and component.folder not in unread  # a folder that is there speaks of its own problem
            ]
            if not (folder / family.spec.tokenizer_folder).is_dir():
                absent.append("tokenizer")
            if absent:
                report.problem = f"{family.spec.title} also needs: {', '.join(absent)}."
    return report


def family_of_folder(folder: Path) -> "Family":
    """The family of the model repository in `folder`, from `model_index.json` or the transformer's `config.json`.

    Raises:
        UnknownModelError: neither names a known class.
        CorruptFileError: one of them is no JSON object.
    """
    from .registry import FAMILIES

    named = {_class_name(folder / "model_index.json")}
    for family in FAMILIES:
        transformer = family.spec.component("dit")
        config = folder / transformer.folder / "config.json"
        if named & {*family.spec.model_index_classes} or _class_name(config) in transformer.class_names:
            return family
    known = ", ".join(family.spec.name for family in FAMILIES)
    raise UnknownModelError(
        f"{folder.absolute()} does not say which model it is: neither model_index.json nor transformer/config.json "
        f"names a known class. Pass --family ({known})."
    )


def _class_name(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise CorruptFileError(f"{path} is no valid JSON: {error}. Download it again.") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None
