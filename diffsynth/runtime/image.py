"""Pictures: files to PIL images, PIL images to pixels and back, and the parameters a picture was made with.

Reads and writes PNG, JPEG and WebP. Parameters are JSON text: in a PNG the iTXt chunk "parameters", in a JPEG or WebP
the EXIF field UserComment.
"""

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .errors import CorruptFileError, InvalidInputError, MissingFileError, NonFiniteError, OutputError

if TYPE_CHECKING:  # the command line reads images without waiting for torch
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File suffix to the format written."""
MAX_SIDE = 16384
MAX_PIXELS = 178_956_970
"""Where Pillow itself calls a picture a decompression bomb."""
PARAMETERS = "parameters"

_WRITABLE_MODES = {
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"},
    "JPEG": {"L", "RGB"},
    "WEBP": {"L", "LA", "P", "RGB", "RGBA"},
}
"""Others are converted rather than left to Pillow, which clips 16-bit values."""
_READABLE = ("PNG", "JPEG", "WEBP")
_OTHER_KINDS = (
    (b"GIF8", "a GIF image"), (b"BM", "a BMP image"), (b"II*\x00", "a TIFF image"), (b"MM\x00*", "a TIFF image"),
    (b"%PDF", "a PDF document"), (b"8BPS", "a Photoshop document"), (b"PK\x03\x04", "a zip archive"),
)  # fmt: skip
_ORIENTATION_TAG = 0x0112
_EXIF_FOLDER_TAG = 0x8769
_USER_COMMENT_TAG = 0x9286
_UNICODE = b"UNICODE\x00"  # EXIF 2.3, 4.6.5: the first 8 bytes of a UserComment name its character code
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what turns the picture upright."""


@dataclass(frozen=True)
class ImageHeader:
    """What a picture file says of itself."""

    format: str
    """"PNG", "JPEG" or "WEBP"."""
    width: int
    """In pixels, before the EXIF orientation is applied."""
    height: int
    parameters: dict[str, Any] | None
    """See `read_parameters`."""


# Reading


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as upright RGB, the first frame where it has several; transparency becomes white.

    Args:
        path: a PNG, JPEG or WebP file, told by content rather than by name.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: the file is empty, truncated, or no picture at all.
        InvalidInputError: another format, or more than `MAX_SIDE` pixels a side or `MAX_PIXELS` in all.
    """
    with _opened(path) as image:
        return _decoded(image, f"The image {path}")


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB copy of `image`, over white where it is transparent, without its metadata.

    16-bit grey is scaled rather than clipped (mode "I" is taken for it, as Pillow once opened such files).

    Raises:
        InvalidInputError: not a PIL image, or a mode whose range is not known ("F").
        CorruptFileError: the file behind a lazily opened image cannot be decoded.
    """
    if not isinstance(image, Image.Image):
        raise InvalidInputError(
            f"Expected a PIL image, got {type(image).__name__}. Open the file with PIL.Image.open, or turn an array "
            "into an image with PIL.Image.fromarray."
        )
    path = getattr(image, "filename", "")
    return _decoded(image, f"The image {path}" if path else "The image")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    _check_size(name, image.size)
    try:
        image.load()
        converted = _upright(_to_8_bit_rgb(image), _orientation(image))
    except (InvalidInputError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise CorruptFileError(f"{name} cannot be decoded, it is truncated or damaged: {error}.") from error
    converted.info = {}
    return converted


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """`image` as RGB of exactly `height` x `width` pixels: scaled until it covers that, then cut around the centre.

    Raises:
        InvalidInputError, CorruptFileError: see `to_rgb`.
    """
    image = to_rgb(image)
    if image.size == (width, height):
        return image
    logger.info("The input image of %dx%d is scaled and cut to %dx%d.", *image.size, width, height)
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The parameters in the metadata of a picture, or None where it has none.

    Text that is not ours (no JSON object) comes back under the single key "parameters".

    Raises:
        MissingFileError, CorruptFileError, InvalidInputError: see `load_image`.
    """
    return read_header(path).parameters


def read_header(path: str | os.PathLike[str]) -> ImageHeader:
    """What a picture is, without decoding it.

    Raises:
        MissingFileError, CorruptFileError, InvalidInputError: see `load_image`.
    """
    with _opened(path) as image:
        text = image.info.get(PARAMETERS) or _user_comment(image)
        kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with further pictures behind it
        width, height = image.size
    return ImageHeader(kind, width, height, _from_text(text))


def _from_text(text: object) -> dict[str, Any] | None:
    if not isinstance(text, str) or not text:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {PARAMETERS: str(text)}


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The picture in `path`, its header read and its size checked, its pixels not decoded yet."""
    if "\0" in os.fspath(path):
        raise InvalidInputError(f"{os.fspath(path)!r} is no file name: it holds a NUL character.")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            file.seek(0)
            with _identified(path, file, start) as image:
                _check_size(f"The image {path}", image.size)
                yield image
    except FileNotFoundError:
        raise MissingFileError(f"There is no image {Path(path).absolute()}.") from None
    except IsADirectoryError:
        raise InvalidInputError(f"{path} is a folder where an image file was expected.") from None
    except PermissionError as error:
        raise InvalidInputError(f"The image {path} may not be read: {error.strerror}.") from error


def _identified(path: str | os.PathLike[str], file: Any, start: bytes) -> Image.Image:
    try:
        return Image.open(file, formats=_READABLE)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(f"The image {path}", str(error)) from error
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise _not_an_image(path, start) from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise CorruptFileError(f"The image {path} is damaged: {error}.") from error


def _not_an_image(path: str | os.PathLike[str], start: bytes) -> CorruptFileError | InvalidInputError:
    """Say what the file is instead, so that nobody has to guess."""
    if not start:
        return CorruptFileError(f"The image {path} is an empty file.")
    for beginning, kind in _OTHER_KINDS:
        if start.startswith(beginning):
            return InvalidInputError(f"{path} is {kind}; only PNG, JPEG and WebP images can be read. Convert it first.")
    if start.startswith(b"version https://git-lfs"):
        return CorruptFileError(f"{path} is a git-LFS pointer, not the image itself. Run `git lfs pull` there.")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return CorruptFileError(f"{path} is an HTML or XML page, no image. Download the image itself.")
    if b"\x00" not in start and start.isascii():
        return CorruptFileError(f"{path} is a text file, no image. Give a PNG, JPEG or WebP image.")
    return CorruptFileError(f"{path} is no PNG, JPEG or WebP image, or its beginning is damaged.")


def _check_size(name: str, size: tuple[int, int]) -> None:
    if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
        raise _too_large(name, f"it has {size[0]}x{size[1]} pixels")
    if min(size) < 1:
        raise InvalidInputError(f"{name} has {size[0]}x{size[1]} pixels; at least 1x1 is needed.")


def _too_large(name: str, found: str) -> InvalidInputError:
    return InvalidInputError(
        f"{name} is too large: {found.rstrip('.')}. At most {MAX_SIDE}x{MAX_SIDE} and {MAX_PIXELS:,} pixels in all are "
        "read. Scale it down first."
    )


def _to_8_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InvalidInputError('A PIL image of mode "F" has no known range. Convert it to mode "RGB" first.')
    if image.mode.startswith("I"):
        image = _grey_16_to_8(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _grey_16_to_8(image: Image.Image) -> Image.Image:
    import numpy as np

    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise InvalidInputError(
            f'A PIL image of mode "{image.mode}" must have values in 0..65535, not {grey.min()}..{grey.max()}. '
            'Convert it to mode "RGB" first.'
        )
    transparent = image.info.get("transparency")
    scaled = (grey + 128) // 257  # 65535 / 255 = 257, rounded to nearest
    if isinstance(transparent, int):
        scaled[grey == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception as error:  # damaged metadata is no reason to refuse a picture that can be seen
        logger.warning("The EXIF data of the image is damaged and ignored: %s", error)
        return 1
    return found if isinstance(found, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _user_comment(image: Image.Image) -> str | None:
    try:
        comment = image.getexif().get_ifd(_EXIF_FOLDER_TAG).get(_USER_COMMENT_TAG)
    except Exception:  # damaged metadata holds nothing to read
        return None
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return None
    return comment[len(_UNICODE) :].decode("utf-16-be", errors="replace")


# Pixels


def to_pixels(image: Image.Image) -> "Tensor":
    """`image` as fp32 `[1, 3, H, W]` in -1..1."""
    import numpy as np
    import torch

    array = np.array(image if image.mode == "RGB" else to_rgb(image))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1


def from_pixels(pixels: "Tensor") -> Image.Image:
    """fp32 `[3, H, W]` in -1..1 as an RGB image, by rounding to the nearest of 256 values.

    Raises:
        NonFiniteError: there is NaN or infinity among them.
    """
    import torch

    if not bool(torch.isfinite(pixels).all()):
        raise NonFiniteError("NaN or infinity among the pixels of an image.")
    array = ((pixels.float() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().cpu().numpy())


# Writing


def with_parameters(image: Image.Image, parameters: Mapping[str, Any]) -> Image.Image:
    """`image` itself, with `parameters` as JSON text in `image.info["parameters"]`, where `save_image` finds them."""
    image.info[PARAMETERS] = _to_text(parameters)
    return image


def save_image(
    image: Image.Image,
    path: str | os.PathLike[str],
    *,
    parameters: Mapping[str, Any] | None = None,
    quality: int = 95,
) -> None:
    """Write `image` with its parameters, whole or not at all; folders are made, a file that is there is replaced.

    Args:
        image: a PIL image.
        path: ends in one of `FORMATS`, which decides the format.
        parameters: for the metadata; None for those in `image.info`.
        quality: 1..100, of JPEG and WebP.

    Raises:
        InvalidInputError: another suffix, or a quality out of range.
        OutputError: the file cannot be written; nothing of it is left.
    """
    kind = image_format(path)
    check_quality(quality)
    text = _to_text(parameters) if parameters is not None else image.info.get(PARAMETERS)
    partial: Path | None = None
    try:
        target = Path(os.path.realpath(path))  # through a link, which would be replaced otherwise
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".diffsynth-{secrets.token_hex(6)}.tmp"
        with open(partial, "xb") as file:
            _encode(image, file, kind, text, quality, path)
        os.replace(partial, target)
    except (OSError, ValueError) as error:
        raise OutputError(f"The image {path} cannot be written: {_reason(error)}.") from error
    finally:  # also after Ctrl-C; after the replacement there is nothing left to remove
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()


def image_format(path: str | os.PathLike[str]) -> str:
    """The format that the suffix of `path` stands for: "PNG", "JPEG" or "WEBP".

    Raises:
        InvalidInputError: it is none of `FORMATS`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        shown = f"ends in {suffix!r}" if suffix else "has no suffix"
        raise InvalidInputError(f"The image path {str(path)!r} {shown}; use one of {', '.join(FORMATS)}.")
    return FORMATS[suffix]


def check_quality(quality: object) -> None:
    """Raise InvalidInputError unless `quality` is one of JPEG and WebP: a whole number from 1 to 100."""
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise InvalidInputError(f"quality={quality!r} must be a whole number from 1 to 100.")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out now, rather than after a long run, whether an image can be written to `path`. Leaves nothing behind.

    Raises:
        InvalidInputError: the suffix stands for no format.
        OutputError: `path` is a folder, or its folder cannot be made or written to.
    """
    image_format(path)
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise OutputError(f"The image {path} cannot be written: there is a folder of that name.")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(target)  # a name that is too long shows here
        place = next(folder for folder in target.parents if os.path.lexists(folder))
        if not place.is_dir():
            raise OutputError(f"The image {path} cannot be written: {place} is a file, not a folder.")
        probe = place / f".diffsynth-{secrets.token_hex(6)}.tmp"
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(f"The image {path} cannot be written: {_reason(error)}.") from error


def _encode(
    image: Image.Image, file: Any, kind: str, text: str | None, quality: int, path: str | os.PathLike[str]
) -> None:
    image = image if image.mode in _WRITABLE_MODES[kind] else to_rgb(image)
    if kind == "PNG":
        info = PngInfo()
        if text:
            info.add_itxt(PARAMETERS, text)
        image.save(file, "PNG", pnginfo=info)
        return
    if kind == "JPEG":
        options: dict[str, Any] = {"subsampling": "4:4:4" if quality >= 90 else "4:2:0"}
    else:
        options = {"method": 4}
    exif = _exif(text) if text else b""
    if kind == "JPEG" and len(exif) > 65533:  # one JPEG segment holds no more
        logger.warning(
            "The parameters (%d bytes) are too long for a JPEG file; %s is written without.", len(exif), path
        )
        exif = b""
    image.save(file, kind, quality=quality, exif=exif, **options)


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    exif[_EXIF_FOLDER_TAG] = {_USER_COMMENT_TAG: _UNICODE + text.encode("utf-16-be")}
    return exif.tobytes()


def _to_text(parameters: Mapping[str, Any]) -> str:
    text = json.dumps(dict(parameters), ensure_ascii=False)
    try:
        text.encode()
    except (
        UnicodeEncodeError
    ):  # half a surrogate pair, as from a command line in another encoding: only escapes hold it
        text = json.dumps(dict(parameters))
    return text


def _reason(error: Exception) -> str:
    return ((error.strerror if isinstance(error, OSError) else None) or str(error)).rstrip(".")
