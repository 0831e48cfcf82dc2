"""Read safetensors lazily: headers are checked completely before the first byte of a weight is touched.

Format: https://github.com/huggingface/safetensors#format (8-byte little-endian header size, JSON header, tensors).
"""

import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CorruptFileError, InvalidInputError, MissingFileError, UnsafeFileError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, from its header alone.

    Raises:
        MissingFileError: there is no such file.
        UnsafeFileError: the file is a pickle.
        CorruptFileError: the file is empty, truncated, a git-LFS pointer, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_foreign(path, start, size)
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES or length + 8 > size:
                expected = f"a header of {length:,} bytes" if length <= MAX_HEADER_BYTES else "a sane header size"
                raise CorruptFileError(
                    f"{path} is no complete safetensors file: it should begin with {expected}, but the whole file has "
                    f"{size:,} bytes. Download it again."
                )
            raw = file.read(length)
    except FileNotFoundError:
        raise MissingFileError(f"There is no file {path.absolute()}.") from None
    except IsADirectoryError:
        raise InvalidInputError(f"{path} is a folder where a safetensors file was expected.") from None
    return _parse_header(path, raw, size - 8 - length)


def _refuse_foreign(path: Path, start: bytes, size: int) -> None:
    """Name the usual impostors, so that nobody has to guess from a parser's message."""
    if start.startswith(b"version "):
        raise CorruptFileError(
            f"{path} is a git-LFS pointer ({size} bytes), not the weights themselves. Run `git lfs pull` in that "
            "repository, or download the file from its hub."
        )
    zipped = start.startswith(b"PK\x03\x04")
    pickled = start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"} and start[2:] != bytes(6)
    if path.suffix.lower() in PICKLE_SUFFIXES or zipped or pickled:
        raise UnsafeFileError(
            f"{path} is a pickle file: opening it can run code that its author put there, so it is refused. Use the "
            "safetensors version of this model, or convert the file on a machine you can afford to lose."
        )
    if start.startswith(b"GGUF"):
        raise InvalidInputError(f"{path} is a GGUF file, which is not supported. Use the safetensors version.")
    if start.lstrip()[:1] == b"<":
        raise CorruptFileError(f"{path} is an HTML page, probably a hub's error message. Download the file again.")
    if size < 8:
        raise CorruptFileError(f"{path} has {size} bytes, too few for a safetensors file. Download it again.")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands in it twice")
    return result


def _parse_header(path: Path, raw: bytes, data_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
        spans, tensors = [], {}
        for name, entry in header.items():
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or dtype not in DTYPE_BITS:
                raise ValueError(f"tensor {name!r} has an impossible dtype, shape or place")
            if (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8 != end - begin:
                raise ValueError(f"tensor {name!r} of shape {list(shape)} {dtype} cannot take {end - begin} bytes")
            spans.append((begin, end))
            tensors[name] = TensorInfo(path, dtype, shape, end - begin)
    except (ValueError, TypeError, KeyError, RecursionError, UnicodeDecodeError, AttributeError) as error:
        raise CorruptFileError(f"{path} has a damaged safetensors header: {error}. Download it again.") from error
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CorruptFileError(f"{path} has a damaged safetensors header: tensors overlap or leave a hole.")
        position = end
    if position != data_bytes:
        raise CorruptFileError(
            f"{path} is truncated or damaged: its header announces {position:,} bytes of weights, the file holds "
            f"{data_bytes:,}. Download it again."
        )
    return tensors, metadata


class CheckpointReader(Mapping[str, TensorInfo]):
    """One model in one or several safetensors files, as a mapping from tensor names to what their headers say."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        for path in self.paths:
            tensors, metadata = read_header(path)
            for name in tensors.keys() & self._tensors.keys():
                raise CorruptFileError(
                    f"Tensor {name!r} stands both in {self._tensors[name].file} and in {path}: these are no shards of "
                    "one model. Give only the files that belong together."
                )
            self._tensors.update(tensors)
            self.metadata.update(metadata)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: info.shape for name, info in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._tensors.values())

    def describe(self) -> str:
        """The files, short enough for a message."""
        first = str(self.paths[0])
        return first if len(self.paths) == 1 else f"{first} (and {len(self.paths) - 1} more)"

    def read(self, name: str) -> "torch.Tensor":
        """One tensor on the CPU, in the dtype of the file.

        The tensor is a view of the memory-mapped file: its pages are read when they are first touched, and shared with
        the system's file cache. Writing to it copies the page (the mapping is private); the file never changes.
        """
        from safetensors import safe_open

        path = self._tensors[name].file
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path].get_tensor(name)
