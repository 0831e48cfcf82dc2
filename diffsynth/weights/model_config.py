"""Where the files of one model are, and how its weights are to be kept in memory."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import InvalidInputError, MissingFileError
from . import hub
from .local import escapes

if TYPE_CHECKING:  # importing this module must not cost an import of torch
    import torch

logger = logging.getLogger(__name__)

_MODEL_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass
class ModelConfig:
    """Names the files of one model: local ones by `path`, or those of a hub by `model_id` and `origin_file_pattern`.

    Args:
        path: a file, several files (the shards of one model), or a folder.
        model_id: `namespace/name` on the hub.
        origin_file_pattern: which files of the repository: an exact name, a glob such as
            `transformer/diffusion_pytorch_model*.safetensors`, `folder/`, a `*.safetensors.index.json` (meaning the
            files it lists), or several of these. None or "": the whole repository.
        download_source: "modelscope" or "huggingface". Default: DIFFSYNTH_DOWNLOAD_SOURCE, else "modelscope".
        local_model_path: folder of all downloaded models; the files of one are in `<local_model_path>/<model_id>/`.
            Default: DIFFSYNTH_MODEL_BASE_PATH, else "./models".
        skip_download: never ask the hub. Default: DIFFSYNTH_SKIP_DOWNLOAD, else False.
        offload_device: where weights rest that no one needs ("disk", "cpu" or a device), in `offload_dtype`.
        offload_dtype: a torch.dtype, or "disk".
        onload_device: where weights wait once their model is in use, in `onload_dtype`.
        onload_dtype: a torch.dtype, or "disk".
        preparing_device: where weights are put shortly before use, as memory allows, in `preparing_dtype`.
        preparing_dtype: a torch.dtype, or "disk".
        computation_device: where the computation happens, in `computation_dtype`.
        computation_dtype: a torch.dtype.
        clear_parameters: drop the weights after use instead of offloading them.
        state_dict: tensors already in memory, by name, to use instead of files.

    Raises:
        InvalidInputError: from the constructor, if the fields contradict each other or cannot be meant.
    """

    path: str | Path | Sequence[str | Path] | None = None
    model_id: str | None = None
    origin_file_pattern: str | Sequence[str] | None = None
    download_source: str | None = None
    local_model_path: str | Path | None = None
    skip_download: bool | None = None  # None: not said, so that the environment may speak
    offload_device: str | torch.device | None = None
    offload_dtype: torch.dtype | str | None = None
    onload_device: str | torch.device | None = None
    onload_dtype: torch.dtype | str | None = None
    preparing_device: str | torch.device | None = None
    preparing_dtype: torch.dtype | str | None = None
    computation_device: str | torch.device | None = None
    computation_dtype: torch.dtype | str | None = None
    clear_parameters: bool = False
    state_dict: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.path is not None and self.model_id is not None:
            raise InvalidInputError(
                f"path={self.path!r} and model_id={self.model_id!r} are both given: "
                "give path for local files, or model_id (with origin_file_pattern) for files of a hub."
            )
        if self.path is None and self.model_id is None and self.state_dict is None:
            raise InvalidInputError(
                'Neither path nor model_id is given. Use ModelConfig(path="models/x.safetensors") or '
                'ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="transformer/*.safetensors").'
            )
        if self.path is not None:
            _check_paths(self._paths())
        if self.model_id is not None and not (isinstance(self.model_id, str) and _MODEL_ID.fullmatch(self.model_id)):
            raise InvalidInputError(
                f"model_id={self.model_id!r} is not of the form namespace/name, as Qwen/Qwen-Image."
            )
        if self.skip_download is not None and not isinstance(self.skip_download, bool):
            raise InvalidInputError(f"skip_download={self.skip_download!r} must be True, False, or None.")
        if self.download_source is not None:
            hub.download_source(self.download_source)
        for pattern in self._patterns():
            _check_pattern(pattern)
        self._warn_without_effect()

    def resolve(self) -> list[Path]:
        """Give the model's files as existing local paths, downloading first what is missing.

        Returns:
            The files: those of `path` in the order given, those of a pattern sorted by name; or the one folder, if
            `path` is a folder, or the pattern ends in `/` or is empty. Nothing if only `state_dict` is given.

        Raises:
            MissingFileError: a local file is missing, or a download would be needed and is switched off.
            DownloadError: the hub could not be reached, does not have the files, or sent something broken.
            InvalidInputError: an environment variable has no valid value.
        """
        if self.model_id is not None:
            return hub.fetch(
                self.model_id,
                self._patterns(),
                source=self.download_source,
                root=self.local_model_path,
                skip=self.skip_download,
            )
        paths = [Path(path).expanduser() for path in self._paths()]
        for path in paths:
            _require(path)
        return paths

    def _paths(self) -> list[str | Path]:
        if self.path is None:
            return []
        return [self.path] if isinstance(self.path, str | Path) else _items(self.path, "path")

    def _patterns(self) -> list[str]:
        given = self.origin_file_pattern
        return [given or ""] if given is None or isinstance(given, str) else _items(given, "origin_file_pattern")

    def _warn_without_effect(self) -> None:
        if self.model_id is not None:
            return
        for name in ("origin_file_pattern", "download_source", "local_model_path"):
            if getattr(self, name) is not None:
                logger.warning("ModelConfig: %s has no effect without model_id.", name)


def _items(value: object, name: str) -> list:
    if not isinstance(value, list | tuple) or not value:
        raise InvalidInputError(f"{name}={value!r} must be a string, or a list of strings that is not empty.")
    return list(value)


def _check_paths(paths: list[str | Path]) -> None:
    for path in paths:
        if not isinstance(path, str | Path) or not str(path):
            raise InvalidInputError(f"path holds {path!r}, which is not the path of a file or folder.")


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str):
        raise InvalidInputError(f"origin_file_pattern={pattern!r} must be a string or a list of strings.")
    if escapes(pattern) or "\\" in pattern or "//" in pattern or pattern.startswith("./"):
        raise InvalidInputError(
            f"origin_file_pattern={pattern!r} must be relative to the repository, with / between folders and without .."
        )
    if pattern.endswith("/") and any(letter in pattern for letter in "*?["):
        raise InvalidInputError(
            f"origin_file_pattern={pattern!r} must name one folder; for files in several folders use {pattern}*"
        )


def _require(path: Path) -> None:
    """Raise MissingFileError unless `path` is a file, or a folder with something in it."""
    if path.is_file():
        return
    if path.is_dir():
        if any(path.iterdir()):
            return
        raise MissingFileError(f"{path.absolute()} is an empty folder.")
    message = f"{path.absolute()} does not exist."
    if path.parent.is_dir():
        near = difflib.get_close_matches(
            path.name, sorted(entry.name for entry in path.parent.iterdir()), n=5, cutoff=0.4
        )
        message += (
            f" The folder holds names like it: {', '.join(near)}." if near else " The folder holds no name like it."
        )
    else:
        message += f" Nor does the folder {path.parent.absolute()}."
    raise MissingFileError(message)
