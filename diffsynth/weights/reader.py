"""Read safetensors lazily: headers are checked completely before the first byte of a weight is touched.

Format: https://github.com/huggingface/safetensors#format (8-byte little-endian header size, JSON header, tensors).
"""

import json
import logging
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CorruptFileError, InvalidInputError, MissingFileError, UnsafeFileError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "U16": ("uint16", 2), "I16": ("int16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4), "I32": ("int32", 4), "F32": ("float32", 4),
    "U64": ("uint64", 8), "I64": ("int64", 8), "F64": ("float64", 8), "C64": ("complex64", 8),
}  # fmt: skip
"""PyTorch's name and the bytes of every dtype that it can hold; the format has a few more, of less than a byte."""
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_MAX_ELEMENTS = 2**63 - 1
_LONGEST_REASON = 300  # characters of a header's own text that may get into a message


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0
    """Of its first byte in the file."""


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, from its header alone.

    Raises:
        MissingFileError: there is no such file.
        UnsafeFileError: the file is a pickle.
        CorruptFileError: the file is empty, truncated, a Git LFS pointer, or no safetensors file.
        InvalidInputError: it is a folder, or a GGUF file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "device or pipe"
            raise InvalidInputError(f"{path} is a {kind} where a safetensors file was expected.")
        with path.open("rb") as file:
            length = _header_length(path, file.read(9), status.st_size)
            file.seek(8)
            raw = file.read(length)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"There is no file {path.absolute()}.") from None
    except OSError as error:
        raise MissingFileError(f"{path.absolute()} cannot be read: {error.strerror}.") from error
    return _parse_header(path, raw, status.st_size)


def _header_length(path: Path, start: bytes, size: int) -> int:
    """Bytes of the header, from the first nine bytes of the file.

    Impostors are named only once the file cannot be what it should be: a header's length may begin with any byte, also
    with those that pickles and HTML pages begin with.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeFileError(_PICKLE.format(path))
    length = int.from_bytes(start[:8], "little")
    if len(start) == 9 and start[8:] == b"{" and length <= min(MAX_HEADER_BYTES, size - 8):
        return length
    _refuse_foreign(path, start, size)
    if size < 8:
        raise CorruptFileError(f"{path} has {size} bytes, too few for a safetensors file. Download it again.")
    if length > MAX_HEADER_BYTES:
        problem = f"would begin with a header of {length} bytes, where {MAX_HEADER_BYTES} are the most allowed"
    elif length > size - 8:
        problem = f"has {size} bytes, which do not hold a whole safetensors header of {length} bytes"
    else:
        problem = "has a damaged safetensors header, which does not begin with '{'"
    raise CorruptFileError(f"{path} {problem}. Download it again.")


_PICKLE = (
    "{} is a pickle file: opening it can run code that its author put there, so it is refused. Use the safetensors "
    "version of this model, or convert the file on a machine you can afford to lose."
)


def _refuse_foreign(path: Path, start: bytes, size: int) -> None:
    """Name the usual impostors, so that nobody has to guess from a parser's message."""
    if start.startswith(b"version "):
        raise CorruptFileError(
            f"{path} is a Git LFS pointer ({size} bytes), not the weights themselves. Run `git lfs pull` in that "
            "repository, or download the file from its hub."
        )
    # A length below 64 KiB, all of whose upper bytes are zero, is a truncated safetensors file and no pickle.
    pickled = start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"} and start[2:8] != bytes(6)
    if pickled or start.startswith(b"PK\x03\x04"):
        raise UnsafeFileError(_PICKLE.format(path))
    if start.startswith(b"GGUF"):
        raise InvalidInputError(f"{path} is a GGUF file, which is not supported. Use the safetensors version.")
    if start.lstrip().startswith(b"<") and b"\0" not in start:
        raise CorruptFileError(f"{path} is an HTML page, probably a hub's error message. Download it again.")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands in it twice")
    return result


def _parse_header(path: Path, raw: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no JSON object of strings")
        spans, tensors = [], {}
        for name, entry in header.items():
            name.encode()  # refuses half of a surrogate pair, which nothing could print
            if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
                raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
            dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise ValueError(f"tensor {name!r} has dtype {dtype!r}, which cannot be read")
            if not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
                raise ValueError(f"tensor {name!r} has an impossible shape or place")
            begin, end = place
            if _elements(shape) * DTYPES[dtype][1] != end - begin:
                raise ValueError(f"tensor {name!r} of dtype {dtype} has a shape that cannot take {end - begin} bytes")
            spans.append((begin, end))
            tensors[name] = TensorInfo(path, dtype, tuple(shape), end - begin, 8 + len(raw) + begin)
    except (ValueError, RecursionError) as error:
        reason = str(error) if len(str(error)) <= _LONGEST_REASON else f"{str(error)[:_LONGEST_REASON]}..."
        raise CorruptFileError(f"{path} has a damaged safetensors header: {reason}. Download it again.") from error
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CorruptFileError(
                f"{path} has a damaged safetensors header: tensors overlap or leave a hole. Download it again."
            )
        position = end
    expected = 8 + len(raw) + position
    if size != expected:
        raise CorruptFileError(
            f"{path} has {size} bytes, expected {expected} by its header: it is truncated or damaged. "
            "Download it again."
        )
    return tensors, metadata


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _elements(shape: list[int]) -> int:
    """Product of the shape; stops at what no file can hold, so that a hostile shape costs nothing."""
    count = 1
    for n in shape:
        if n > _MAX_ELEMENTS or (count := count * n) > _MAX_ELEMENTS:
            raise ValueError("a tensor is larger than any file")
    return count


class CheckpointReader(Mapping[str, TensorInfo]):
    """One model in one or several safetensors files, as a mapping from tensor names to what their headers say."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._sizes: dict[Path, int] = {}
        self._open: dict[Path, Any] = {}
        for path in self.paths:
            tensors, metadata = read_header(path)
            self._sizes[path] = path.stat().st_size
            for name in tensors.keys() & self._tensors.keys():
                raise CorruptFileError(
                    f"Tensor {name!r} stands both in {self._tensors[name].file} and in {path}: these are no shards of "
                    "one model. Give only the files that belong together."
                )
            self._tensors.update(tensors)
            self.metadata.update(metadata)

    @property
    def folder(self) -> Path | None:
        """Where the files are, and a `config.json` may be."""
        return self.paths[0].parent if self.paths else None

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
        import torch

        info = self._tensors[name]
        dtype: torch.dtype = getattr(torch, DTYPES[info.dtype][0])
        storage = self._mapped(info.file)
        if info.offset % dtype.itemsize == 0:
            return torch.empty(0, dtype=dtype).set_(storage, info.offset // dtype.itemsize, info.shape)  # type: ignore[call-overload]
        # A writer that does not align its tensors: these bytes cannot be viewed in place.
        raw = torch.empty(0, dtype=torch.uint8).set_(storage, info.offset, (info.nbytes,))  # type: ignore[call-overload]
        return raw.clone().view(dtype).reshape(info.shape)

    def _mapped(self, path: Path) -> "torch.UntypedStorage":
        import torch

        if path not in self._open:
            try:
                size = path.stat().st_size
                if size != self._sizes[path]:
                    raise OSError(f"it had {self._sizes[path]} bytes and now has {size}")
                self._open[path] = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
            except (OSError, RuntimeError) as error:
                raise CorruptFileError(f"{path} can no longer be read: {error}. Was it changed meanwhile?") from error
        return self._open[path]

    def release(self) -> None:
        """Let go of the mapped files; pages that no tensor refers to leave this process, later reads map anew."""
        self._open.clear()
