"""From a model id to complete files on disk.

Files live at `<root>/<model_id>/<name as in the repository>`. What is complete there is used without a single request;
only what is missing or broken is fetched, through the hubs' own client libraries (imported when first needed, because
importing them takes seconds).

How completeness is known without asking a hub:

- a safetensors file announces its exact size in its header;
- `...-00001-of-00009...` announces its siblings, and `*.safetensors.index.json` the files of its weight map;
- everything else by `.diffsynth/record.json`, which names the files and sizes of every pattern fetched so far. It is
  written when a download is planned, not only when it has ended, so that a download that was cut is recognised;
- files without a record were put there by hand and count as complete.

A pattern is an exact name, a glob (`*`, `?` and `[...]` stay within one folder, `**` crosses folders), `folder/`, or
an empty string for the whole repository.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import hashlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, Protocol

from diffsynth.runtime.errors import CorruptFileError, DownloadError, InvalidInputError, MissingFileError

logger = logging.getLogger(__name__)

ENV_ROOT = "DIFFSYNTH_MODEL_BASE_PATH"
ENV_SKIP = "DIFFSYNTH_SKIP_DOWNLOAD"
ENV_SOURCE = "DIFFSYNTH_DOWNLOAD_SOURCE"
DEFAULT_ROOT = "./models"
DEFAULT_SOURCE = "modelscope"
INDEX_SUFFIX = ".safetensors.index.json"

# The same weights under another owner on each hub.
_PUBLISHED_AS = tuple(
    {"modelscope": f"PaddlePaddle/{name}", "huggingface": f"baidu/{name}"}
    for name in ("ERNIE-Image", "ERNIE-Image-Turbo")
)

_BOOKKEEPING = ".diffsynth"
# Folders and endings that the clients and we ourselves use while working: never part of a model.
_NOT_OURS = frozenset({_BOOKKEEPING, ".cache", ".git", "._____temp"})
_PARTIAL = (".incomplete", ".parallel_tmp")
_SHARD = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\..*)", re.DOTALL)
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of the format
_MAX_NAME_BYTES = 255  # of one path component, on every common file system


# --- Settings: an explicit argument beats the environment, which beats the default --------------------------------


def model_root(explicit: str | Path | None = None) -> Path:
    """Folder that holds all downloaded models."""
    return Path(explicit or os.environ.get(ENV_ROOT) or DEFAULT_ROOT).expanduser()


def download_source(explicit: str | None = None) -> str:
    """Name of the hub to download from: "modelscope" or "huggingface"."""
    value, origin = (explicit, "download_source") if explicit is not None else (os.environ.get(ENV_SOURCE), ENV_SOURCE)
    name = (value or DEFAULT_SOURCE).strip().lower()
    if name not in _HUBS:
        raise InvalidInputError(f"{origin} is {value!r}, but must be one of {', '.join(map(repr, _HUBS))}.")
    return name


def skip_reason(explicit: bool | None, source: str) -> str | None:
    """The setting that forbids downloading, written as the user would, or None when downloading is allowed.

    `HF_HUB_OFFLINE` cannot be overruled by an argument: the Hugging Face client itself obeys it.
    """
    if source == "huggingface" and _huggingface_is_offline():
        return "HF_HUB_OFFLINE=1"
    if explicit is not None:
        return "skip_download=True" if explicit else None
    value = os.environ.get(ENV_SKIP, "").strip()
    if value.lower() in ("", "false", "0", "no", "off"):
        return None
    if value.lower() in ("true", "1", "yes", "on"):
        return f"{ENV_SKIP}={value}"
    raise InvalidInputError(f"{ENV_SKIP} is {value!r}, but must be one of true, 1, yes, on, false, 0, no, off.")


def _huggingface_is_offline() -> bool:
    client = sys.modules.get("huggingface_hub.constants")
    if client is not None:  # the client read the environment when it was imported, and that is what it will obey
        return bool(client.HF_HUB_OFFLINE)
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


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


def _refuse_unsafe(names: Iterable[str], where: str) -> None:
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
class _Record:
    """What was fetched into one repository folder: `files` maps a name to its size in bytes (None: not announced)."""

    files: dict[str, int | None] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> _Record:
        path = folder / _BOOKKEEPING / "record.json"
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
        path = folder / _BOOKKEEPING / "record.json"
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
class _State:
    """One pattern in one folder: the files it needs, what is wrong with some, and whether the list may be short."""

    names: list[str]
    problems: dict[str, str]
    unproven: bool = False

    @property
    def usable(self) -> bool:
        return bool(self.names) and not self.problems

    @property
    def complete(self) -> bool:
        return self.usable and not self.unproven


def _inspect(folder: Path, pattern: str) -> _State:
    """Judge a pattern by the disk alone. Reads file sizes, safetensors headers and index files, no tensors."""
    record = _Record.read(folder)
    present = _local_names(folder)
    recorded = record.names_of(pattern)
    names = set(recorded or (name for name in present if matches(pattern, name)))
    names |= {name for name in _announced(folder, names, present) if matches(pattern, name)}
    problems = {name: why for name in sorted(names) if (why := _problem(folder / name, record.files.get(name)))}
    # Files that are here only because another pattern needed them say nothing about what else this one needs.
    known = bool(names) and all(name in record.files for name in names)
    unproven = known and recorded is None and pattern not in names
    return _State(sorted(names), problems, unproven)


def _local_names(folder: Path) -> list[str]:
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
                result.update(_weight_files(folder, index))
            except CorruptFileError as error:
                logger.warning("Ignoring an index file: %s", error)
    return result


def _weight_files(folder: Path, index: str) -> list[str]:
    """Files of a weight map, as names relative to `folder`, sorted. Raises CorruptFileError if it cannot be used."""
    try:
        entries = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{folder / index} is not a readable safetensors index ({error!r}).") from error
    if not entries or not all(isinstance(name, str) and name and not escapes(name) for name in entries):
        raise CorruptFileError(f"{folder / index} names no files, or files outside its own folder: {entries[:5]}.")
    return [(PurePosixPath(index).parent / name).as_posix() for name in entries]


def _problem(path: Path, expected: int | None) -> str | None:
    """What is wrong with a file, or None. `expected`: its size in bytes if a record or a hub has told."""
    try:
        actual = path.stat().st_size
    except OSError:
        return "is missing"
    if expected is not None and actual != expected:
        return f"has {actual} bytes, expected {expected}"
    if path.suffix == ".safetensors":
        return _safetensors_problem(path, actual)
    if path.name.endswith(INDEX_SUFFIX):
        try:
            _weight_files(path.parent, path.name)
        except CorruptFileError as error:
            return str(error)
    return None


def _safetensors_problem(path: Path, actual: int) -> str | None:
    """Compare the size of a safetensors file with the one its header announces: 8 + header + end of the last tensor."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_SAFETENSORS_HEADER, actual - 8):
                file.seek(0)
                if file.read(40).startswith(b"version https://git-lfs"):
                    return f"has {actual} bytes: it is a Git LFS pointer, not the file itself"
                return f"has {actual} bytes, which do not hold a whole safetensors header"
            header = json.loads(file.read(length))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        return f"has {actual} bytes, but its safetensors header cannot be read ({type(error).__name__})"
    expected = 8 + length + max(ends, default=0)
    return None if actual == expected else f"has {actual} bytes, expected {expected} by its header"


# --- The hubs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RemoteFile:
    """A file in a repository; size in bytes and SHA-256 where the hub tells them."""

    name: str
    size: int | None = None
    sha256: str | None = None


class _Hub(Protocol):
    """The little that is needed of a hub; each method is a thin cover of the hub's own client."""

    title: ClassVar[str]
    attempts: ClassVar[tuple[bool, ...]]  # values of `force` to try in turn when what arrived is wrong

    def list_files(self, repo: str) -> tuple[str | None, list[_RemoteFile]]: ...
    def download(self, repo: str, revision: str | None, names: list[str], folder: Path, force: bool) -> None: ...
    def refused(self, error: Exception) -> bool: ...
    def command(self, repo: str, pattern: str, folder: Path) -> str: ...


class _ModelScope:
    title: ClassVar[str] = "ModelScope"
    # The client compares each file with the SHA-256 of the listing and repeats on its own.
    attempts: ClassVar[tuple[bool, ...]] = (False,)

    def list_files(self, repo: str) -> tuple[str | None, list[_RemoteFile]]:
        from modelscope_hub import HubApi

        api = HubApi()
        api = HubApi(endpoint=api.resolve_endpoint_for_read(repo))  # the Chinese or the international site
        files = [file for file in api.list_repo_files(repo, "model") if str(file.type) != "tree"]
        # The client reports 0 for an unknown size as well as for an empty file.
        return None, [_RemoteFile(file.path, file.size or None, file.sha256) for file in files]

    def download(self, repo: str, revision: str | None, names: list[str], folder: Path, force: bool) -> None:
        from modelscope.hub.snapshot_download import snapshot_download

        patterns = [glob.escape(name) for name in names]
        snapshot_download(repo, revision=revision, local_dir=str(folder), allow_patterns=patterns)

    def refused(self, error: Exception) -> bool:
        from modelscope_hub.errors import AuthenticationError, NotExistError, PermissionDeniedError

        return isinstance(error, NotExistError | AuthenticationError | PermissionDeniedError)

    def command(self, repo: str, pattern: str, folder: Path) -> str:
        return _command_line(["modelscope", "download", repo], pattern, folder)


class _HuggingFace:
    title: ClassVar[str] = "Hugging Face"
    # The first attempt may copy from the client's own cache, which is not verified; the second always downloads.
    attempts: ClassVar[tuple[bool, ...]] = (False, True)

    def list_files(self, repo: str) -> tuple[str | None, list[_RemoteFile]]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        revision = api.repo_info(repo).sha  # pinned, so that listing and files belong to one commit
        tree = api.list_repo_tree(repo, recursive=True, revision=revision)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return revision, [_RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in files]

    def download(self, repo: str, revision: str | None, names: list[str], folder: Path, force: bool) -> None:
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(name) for name in names]
        snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=patterns, force_download=force)

    def refused(self, error: Exception) -> bool:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)

    def command(self, repo: str, pattern: str, folder: Path) -> str:
        return _command_line(["hf", "download", repo], pattern, folder)


_HUBS: dict[str, _Hub] = {"modelscope": _ModelScope(), "huggingface": _HuggingFace()}


def _command_line(words: list[str], pattern: str, folder: Path) -> str:
    if pattern:
        words = [*words, "--include", f"{pattern}*" if pattern.endswith("/") else pattern]
    return shlex.join([*words, "--local-dir", str(folder)])


# --- Putting both together ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Repository:
    """A model id with everything known about where it is: on the hub, and in which local folders (first: the id's)."""

    model_id: str
    hub: _Hub
    hub_id: str
    folders: tuple[Path, ...]

    @classmethod
    def locate(cls, model_id: str, source: str, root: Path) -> _Repository:
        names = next((entry for entry in _PUBLISHED_AS if model_id in entry.values()), {source: model_id})
        ids = [model_id, *(name for name in names.values() if name != model_id)]
        return cls(model_id, _HUBS[source], names[source], tuple(root / name for name in ids))

    @property
    def folder(self) -> Path:
        return self.folders[0]

    @property
    def where(self) -> str:
        return f"{self.hub_id} on {self.hub.title}"

    def absent(self, patterns: list[str]) -> str:
        """What is wrong with the patterns in the local folders: the common first part of all error messages."""
        state = {pattern: _inspect(self.folder, pattern) for pattern in patterns}
        parts = [f"{name} {why}" for entry in state.values() for name, why in entry.problems.items()]
        parts += [f"nothing matches {pattern!r}" for pattern, entry in state.items() if not entry.names]
        parts += [f"{pattern!r} may stand for more files" for pattern, entry in state.items() if entry.unproven]
        looked = " and ".join(str(folder.absolute()) for folder in self.folders)
        near = closest(patterns[0], _local_names(self.folder))
        hint = f" Close names there: {', '.join(near)}." if near and not state[patterns[0]].names else ""
        return f"{self.model_id} is not complete on disk: {'; '.join(parts[:8])}. Looked in {looked}.{hint}"

    def commands(self, patterns: list[str]) -> str:
        return "\n".join(f"  {self.hub.command(self.hub_id, pattern, self.folder)}" for pattern in patterns)


def fetch(
    model_id: str,
    patterns: Sequence[str],
    *,
    source: str | None = None,
    root: str | Path | None = None,
    skip: bool | None = None,
) -> list[Path]:
    """Make the files of the patterns exist locally and return them, pattern by pattern, each sorted by name.

    A folder pattern gives the folder itself. A `*.safetensors.index.json` gives the weight files it lists, not itself.

    Args:
        model_id: `namespace/name`, of either hub where a model is known under two names.
        patterns: see the head of this module.
        source: "modelscope" or "huggingface"; None: as the environment says.
        root: folder of all models; None: as the environment says.
        skip: True forbids every request; None: as the environment says.

    Raises:
        MissingFileError: something is not there and downloading is forbidden.
        DownloadError: the hub could not be reached, does not have it, or sent something broken.
        InvalidInputError: a setting has no valid value.
    """
    hub = download_source(source)
    repository = _Repository.locate(model_id, hub, model_root(root))
    reason = skip_reason(skip, hub)
    found = _ensure(repository, list(patterns), reason)
    paths: list[Path] = []
    for pattern in patterns:
        folder, names = found[pattern]
        if is_folder_pattern(pattern):
            paths.append(folder / pattern)
        elif pattern.endswith(INDEX_SUFFIX):
            exact = [glob.escape(name) for index in names for name in _weight_files(folder, index)]
            files = _ensure(repository, exact, reason)
            paths += [place / name for place, listed in files.values() for name in listed]
        else:
            paths += [folder / name for name in names]
    return list(dict.fromkeys(paths))


def _ensure(repository: _Repository, patterns: list[str], reason: str | None) -> dict[str, tuple[Path, list[str]]]:
    """For each pattern the folder that has it complete and its names, after downloading what no folder has."""
    found: dict[str, tuple[Path, list[str]]] = {}
    for pattern in patterns:
        for folder in repository.folders:
            state = _inspect(folder, pattern)
            if state.complete or (reason and state.usable):
                found[pattern] = folder, state.names
                break
    lacking = [pattern for pattern in patterns if pattern not in found]
    if lacking and reason:
        raise MissingFileError(
            f"{repository.absent(lacking)} Downloading is switched off by {reason}: switch it on, or fetch the files "
            f"by hand, for example with\n{repository.commands(lacking)}"
        )
    if lacking:
        with _locked(repository.folder):
            # Another process may have brought everything while this one waited for the lock.
            lacking = [pattern for pattern in lacking if not _inspect(repository.folder, pattern).complete]
            if lacking:
                _download(repository, lacking)
    for pattern in patterns:
        if pattern not in found:
            found[pattern] = repository.folder, _inspect(repository.folder, pattern).names
    return {pattern: found[pattern] for pattern in patterns}  # in the order asked for


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change a repository folder; the others wait.

    The clients lock single files, but deleting a broken file and writing the record happen around their work.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    path = folder / _BOOKKEEPING / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock: Any = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("Waiting for another download into %s to end.", folder)
            lock.acquire()
        except NotImplementedError:  # a file system without locks: the mere existence of the file has to do
            lock = SoftFileLock(path)
            lock.acquire()
    except OSError as error:
        raise DownloadError(f"Cannot write to {folder.absolute()}, where the files belong: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _download(repository: _Repository, patterns: list[str]) -> None:
    """Fetch what is missing or wrong of the patterns into the repository's folder, and note it in the record."""
    hub, folder = repository.hub, repository.folder
    try:
        revision, listing = hub.list_files(repository.hub_id)
    except Exception as error:
        raise _failure(repository, patterns, error) from error
    remote = {file.name: file for file in listing}
    plan = {pattern: _select(repository, pattern, list(remote)) for pattern in patterns}
    names = sorted({name for chosen in plan.values() for name in chosen})
    _refuse_unsafe(names, repository.where)

    wrong = {name: why for name in names if (why := _problem(folder / name, remote[name].size))}
    try:
        record = _Record.read(folder)
        record.patterns.update(plan)
        record.files.update({name: remote[name].size for name in names})
        record.write(folder)
        for force in hub.attempts:
            if not wrong:
                break
            _remove(folder, wrong)
            size = sum(remote[name].size or 0 for name in wrong) / 1e9
            logger.info("Downloading %d files (%.2f GB) of %s to %s.", len(wrong), size, repository.where, folder)
            hub.download(repository.hub_id, revision, list(wrong), folder, force)
            wrong = _still_wrong(folder, [remote[name] for name in wrong], check_content=len(hub.attempts) > 1)
        if not wrong:
            record.files.update({name: (folder / name).stat().st_size for name in names})
            record.write(folder)
    except Exception as error:
        raise _failure(repository, patterns, error) from error
    if wrong:
        _remove(folder, {name: why for name, why in wrong.items() if why != "is missing"})
        details = "; ".join(f"{name} {why}" for name, why in wrong.items())
        raise DownloadError(f"What came from {repository.where} is not what was announced: {details}. Try again later.")


def _select(repository: _Repository, pattern: str, names: list[str]) -> list[str]:
    chosen = sorted(name for name in names if matches(pattern, name))
    if chosen:
        return chosen
    near = closest(pattern, names) or sorted(names)[:5]
    hint = f" Close names there: {', '.join(near)}." if near else " It is empty."
    raise DownloadError(f"No file of {repository.where} matches {pattern!r}.{hint}")


def _remove(folder: Path, wrong: dict[str, str]) -> None:
    """Delete broken files. The clients keep notes on what they wrote, but all of them fetch a file that is gone."""
    for name, why in wrong.items():
        if why != "is missing":
            logger.warning("Removing %s, which %s.", folder / name, why)
            (folder / name).unlink(missing_ok=True)


def _still_wrong(folder: Path, files: list[_RemoteFile], *, check_content: bool) -> dict[str, str]:
    """Verify fetched files by size and header, and by SHA-256 where the client has not done so and the hub told it."""
    wrong: dict[str, str] = {}
    for file in files:
        why = _problem(folder / file.name, file.size)
        if why is None and check_content and file.sha256:
            with (folder / file.name).open("rb") as opened:
                actual = hashlib.file_digest(opened, "sha256").hexdigest()
            why = None if actual == file.sha256 else f"has SHA-256 {actual}, expected {file.sha256}"
        if why:
            wrong[file.name] = why
    return wrong


def _failure(repository: _Repository, patterns: list[str], error: Exception) -> DownloadError:
    """The error to raise for one that a client, or the disk, has raised."""
    if repository.hub.refused(error):
        return DownloadError(
            f"{repository.where} does not exist, or is private or gated and needs a login (wanted: {patterns}). "
            f"The hub says: {error}"
        )
    return DownloadError(
        f"{repository.absent(patterns)} Downloading {repository.where} failed: {type(error).__name__}: {error}\n"
        f"What has arrived is kept; try again later. Without a network, put the files there by hand, for example from "
        f"another machine with\n{repository.commands(patterns)}\nand set skip_download=True (or {ENV_SKIP}=true)."
    )
