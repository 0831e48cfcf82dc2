"""From a model id to complete files on disk.

Files live at `<root>/<model_id>/<name as in the repository>`. What is complete there is used without a single request;
only what is missing or broken is fetched, through the hubs' own client libraries (imported when first needed, because
importing them takes seconds).

`local` says what is complete there, and what a pattern is.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..runtime.errors import DownloadError, InvalidInputError, MissingFileError
from .local import (
    BOOKKEEPING,
    INDEX_SUFFIX,
    Record,
    closest,
    indexed_files,
    inspect,
    is_folder_pattern,
    local_names,
    matches,
    problem,
    refuse_unsafe,
)

logger = logging.getLogger(__name__)

ENV_ROOT = "DIFFSYNTH_MODEL_BASE_PATH"
ENV_SKIP = "DIFFSYNTH_SKIP_DOWNLOAD"
ENV_SOURCE = "DIFFSYNTH_DOWNLOAD_SOURCE"
DEFAULT_ROOT = "./models"
DEFAULT_SOURCE = "modelscope"

# The same weights under another owner on each hub.
_PUBLISHED_AS = tuple(
    {"modelscope": f"PaddlePaddle/{name}", "huggingface": f"baidu/{name}"}
    for name in ("ERNIE-Image", "ERNIE-Image-Turbo")
)


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
        state = {pattern: inspect(self.folder, pattern) for pattern in patterns}
        parts = [f"{name} {why}" for entry in state.values() for name, why in entry.problems.items()]
        parts += [f"nothing matches {pattern!r}" for pattern, entry in state.items() if not entry.names]
        parts += [f"{pattern!r} may stand for more files" for pattern, entry in state.items() if entry.unproven]
        looked = " and ".join(str(folder.absolute()) for folder in self.folders)
        near = closest(patterns[0], local_names(self.folder))
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
            exact = [glob.escape(name) for index in names for name in indexed_files(folder, index)]
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
            state = inspect(folder, pattern)
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
            lacking = [pattern for pattern in lacking if not inspect(repository.folder, pattern).complete]
            if lacking:
                _download(repository, lacking)
    for pattern in patterns:
        if pattern not in found:
            found[pattern] = repository.folder, inspect(repository.folder, pattern).names
    return {pattern: found[pattern] for pattern in patterns}  # in the order asked for


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change a repository folder; the others wait.

    The clients lock single files, but deleting a broken file and writing the record happen around their work.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    path = folder / BOOKKEEPING / "lock"
    created = [place for place in path.parents if not place.exists()]
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
        with contextlib.suppress(OSError):
            if os.listdir(path.parent) == [path.name]:  # nothing was fetched: leave no trace of the attempt
                path.unlink()
                for place in created:  # from the inside out, up to the first that holds something else
                    place.rmdir()
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
    refuse_unsafe(names, repository.where)

    wrong = {name: why for name in names if (why := problem(folder / name, remote[name].size))}
    try:
        record = Record.read(folder)
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
        why = problem(folder / file.name, file.size)
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
