"""What of a model repository is complete on disk, judged without asking anyone, and which names a pattern selects.

How completeness is known:

- a safetensors file announces its exact size in its header;
- `...-00001-of-00009...` announces its siblings, and `*.safetensors.index.json` the files of its weight map;
- everything else by `.diffsynth/record.json`, which names the files and sizes of every pattern fetched so far. It is
  written when a download is planned, not only when it has ended, so that a download that was cut is recognised;
- files without a record were put there by hand and count as complete.

A pattern is an exact name, a glob (`*`, `?` and `[...]` stay within one folder, `**` crosses folders), `folder/`, or
an empty string for the whole repository.
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..runtime.errors import CorruptFileError, DiffSynthError, DownloadError
from .reader import read_header

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".safetensors.index.json"
BOOKKEEPING = ".diffsynth"
# Folders and endings that the clients and we ourselves use while working: never part of a model.
_NOT_OURS = frozenset({BOOKKEEPING, ".cache", ".git", "._____temp"})
_PARTIAL = (".incomplete", ".parallel_tmp")
_SHARD = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\..*)", re.DOTALL)
_MAX_NAME_BYTES = 255  # of one path component, on every common file system


# --- Names and patterns -------------------------------------------------------------------------------------------


def is_folder_pattern(pattern: str) -> bool:
    """Whether the pattern stands for one folder (the empty pattern for the folder of the whole repository)."""
    return pattern == "" or pattern.endswith("/")


def matches(pattern: str, name: str) -> bool:
    """Whether a file name, relative to the repository and with `/` between folders, is selected by the pattern."""
    if is_folder_pattern(pattern):
        return name.startswith(pattern)
    return _segments_match(pattern.split("/"), name.split("/"))


def _segments_match(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_segments_match(pattern[1:], name[start:]) for start in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _segments_match(pattern[1:], name[1:])


def escapes(name: str) -> bool:
    """Whether a relative file name or pattern could reach outside its folder, on any operating system."""
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry but no file system
        return True
    parts = name.replace("\\", "/").split("/")
    anchored = PurePosixPath(name).root or any(PureWindowsPath(part).anchor for part in [name, *parts])
    return bool(anchored) or ".." in parts or "\0" in name


def refuse_unsafe(names: Iterable[str], where: str) -> None:
    """A repository decides its file names: one that leaves the folder, or hits our bookkeeping, is never fetched."""
    for name in names:
        parts = name.split("/")
        if escapes(name) or "\\" in name or "" in parts or "." in parts or parts[0] in _NOT_OURS:
            raise DownloadError(f"{where} holds a file named {name!r}, which is not a safe name. Nothing was fetched.")
        if any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
            raise DownloadError(f"{where} holds a file whose name is too long to be stored: {name[:80]!r}...")


def closest(wanted: str, names: Iterable[str]) -> list[str]:
    """Up to five of `names` most like `wanted`; folders of the names (`folder/`) take part."""
    files = set(names)
    folders = {f"{parent}/" for name in files for parent in PurePosixPath(name).parents if str(parent) != "."}
    return difflib.get_close_matches(wanted, sorted(files | folders), n=5, cutoff=0.4)


# --- What is on disk ----------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What was fetched into one repository folder: `files` maps a name to its size in bytes (None: not announced)."""

    files: dict[str, int | None] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record of a repository folder, empty where there is none."""
        path = folder / BOOKKEEPING / "record.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            files = {str(name): None if size is None else int(size) for name, size in data["files"].items()}
            return cls(files, {str(key): [str(name) for name in names] for key, names in data["patterns"].items()})
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
            logger.warning("Ignoring the download record %s, which cannot be read: %s", path, error)
            return cls()

    def write(self, folder: Path) -> None:
        """Replace the record in one step: a reader sees the old one or the new one, never half of one."""
        path = folder / BOOKKEEPING / "record.json"
        temporary = path.with_name(f"record.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"files": self.files, "patterns": self.patterns}, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    def names_of(self, pattern: str) -> list[str] | None:
        """Files the pattern stood for when it, or a folder around it, was fetched; None if that never happened."""
        if pattern in self.patterns:
            return self.patterns[pattern]
        for fetched, names in self.patterns.items():
            if is_folder_pattern(fetched) and pattern.startswith(fetched):
                return [name for name in names if matches(pattern, name)] or None
        return None


@dataclass
class State:
    """One pattern in one folder: the files it needs, what is wrong with some, and whether the list may be short."""

    names: list[str]
    problems: dict[str, str]
    unproven: bool = False

    @property
    def usable(self) -> bool:
        """Whether something is there, and nothing wrong with it."""
        return bool(self.names) and not self.problems

    @property
    def complete(self) -> bool:
        """Whether a hub could add nothing."""
        return self.usable and not self.unproven


def inspect(folder: Path, pattern: str) -> State:
    """Judge a pattern by the disk alone. Reads file sizes, safetensors headers and index files, no tensors."""
    record = Record.read(folder)
    present = local_names(folder)
    recorded = record.names_of(pattern)
    names = set(recorded or (name for name in present if matches(pattern, name)))
    names |= {name for name in _announced(folder, names, present) if matches(pattern, name)}
    problems = {name: why for name in sorted(names) if (why := problem(folder / name, record.files.get(name)))}
    # Files that are here only because another pattern needed them say nothing about what else this one needs.
    known = bool(names) and all(name in record.files for name in names)
    unproven = known and recorded is None and pattern not in names
    return State(sorted(names), problems, unproven)


def local_names(folder: Path) -> list[str]:
    """All files below the folder, sorted, links to other folders followed, without the traces of running downloads."""
    found: list[str] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name not in _NOT_OURS]
        base = Path(here).relative_to(folder)
        found += [(base / name).as_posix() for name in files if not name.endswith(_PARTIAL)]
    return sorted(found)


def _announced(folder: Path, names: Iterable[str], present: Iterable[str]) -> set[str]:
    """Names that the given files say must exist too: shards by their numbers, and weight maps in the same folders."""
    result: set[str] = set()
    for name in names:
        if shard := _SHARD.fullmatch(name):
            stem, _, of, count, ending = shard.groups()
            result |= {f"{stem}{number:05d}{of}{count}{ending}" for number in range(1, int(count) + 1)}
    parents = {PurePosixPath(name).parent for name in names}
    for index in present:
        if index.endswith(INDEX_SUFFIX) and PurePosixPath(index).parent in parents:
            try:
                result.update(indexed_files(folder, index))
            except CorruptFileError as error:
                logger.warning("Ignoring an index file: %s", error)
    return result


def indexed_files(folder: Path, index: str) -> list[str]:
    """Files of a weight map, as names relative to `folder`, sorted. Raises CorruptFileError if it cannot be used."""
    try:
        entries = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{folder / index} is not a readable safetensors index ({error!r}).") from error
    if not entries or not all(isinstance(name, str) and name and not escapes(name) for name in entries):
        raise CorruptFileError(f"{folder / index} names no files, or files outside its own folder: {entries[:5]}.")
    return [(PurePosixPath(index).parent / name).as_posix() for name in entries]


def problem(path: Path, expected: int | None) -> str | None:
    """What is wrong with a file, or None. `expected`: its size in bytes if a record or a hub has told."""
    try:
        actual = path.stat().st_size
    except OSError:
        return "is missing"
    if expected is not None and actual != expected:
        return f"has {actual} bytes, expected {expected}"
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.name.endswith(INDEX_SUFFIX):
            indexed_files(path.parent, path.name)
    except DiffSynthError as error:
        return str(error).removeprefix(f"{path} ").removesuffix(" Download it again.").rstrip(".")
    return None
