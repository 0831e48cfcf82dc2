"""Pictures in and out: nothing clipped, nothing half written, nothing lost from the metadata."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffsynth.runtime import image as image_module
from diffsynth.runtime.errors import (
    CorruptFileError,
    InvalidInputError,
    MissingFileError,
    NonFiniteError,
    OutputError,
)
from diffsynth.runtime.image import (
    check_writable,
    fit,
    from_pixels,
    load_image,
    read_header,
    read_parameters,
    save_image,
    to_pixels,
    to_rgb,
    with_parameters,
)

SUFFIXES = ("png", "jpg", "jpeg", "webp")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    red = np.linspace(0, 255, width, dtype=np.uint8)[None].repeat(height, 0)
    green = np.linspace(255, 0, height, dtype=np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], -1))


def written(tmp_path: Path, image: Image.Image, name: str, **options: Any) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


class TestMetadata:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    @given(parameters=st.dictionaries(st.text(max_size=12), json_values, max_size=4))
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_parameters_come_back(self, tmp_path: Path, suffix: str, parameters: dict[str, Any]) -> None:
        path = tmp_path / f"x.{suffix}"
        save_image(gradient(8, 8), path, parameters=parameters)
        assert read_parameters(path) == parameters

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_awkward_texts_come_back(self, tmp_path: Path, suffix: str) -> None:
        parameters = {"prompt": '一只猫 "quoted" \\ 猫🐈\n\x00\x1b[31m', "half a pair": "\udc80", "seed": 2**64 - 1}
        path = tmp_path / f"x.{suffix}"
        save_image(with_parameters(gradient(), parameters), path)
        assert read_parameters(path) == parameters

    def test_png_keeps_a_very_long_prompt(self, tmp_path: Path) -> None:
        save_image(gradient(), tmp_path / "x.png", parameters={"prompt": "猫" * 500_000})
        assert len((read_parameters(tmp_path / "x.png") or {})["prompt"]) == 500_000
        load_image(tmp_path / "x.png")

    def test_jpeg_says_when_the_parameters_do_not_fit(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        save_image(gradient(), tmp_path / "x.jpg", parameters={"prompt": "x" * 40_000})
        assert "too long for a JPEG" in caplog.text
        assert read_parameters(tmp_path / "x.jpg") is None

    def test_other_tools_find_it_where_the_formats_say(self, tmp_path: Path) -> None:
        parameters = {"prompt": "a cat"}
        save_image(gradient(), tmp_path / "x.png", parameters=parameters)
        with Image.open(tmp_path / "x.png") as image:
            assert json.loads(image.text["parameters"]) == parameters  # type: ignore[attr-defined]
        save_image(gradient(), tmp_path / "x.jpg", parameters=parameters)
        with Image.open(tmp_path / "x.jpg") as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\x00"
        assert json.loads(comment[8:].decode("utf-16-be")) == parameters

    def test_none_and_foreign_parameters(self, tmp_path: Path) -> None:
        save_image(gradient(), tmp_path / "none.png")
        assert read_parameters(tmp_path / "none.png") is None
        image = gradient()
        image.info["parameters"] = "a cat\nSteps: 20"
        save_image(image, tmp_path / "foreign.webp")
        assert read_parameters(tmp_path / "foreign.webp") == {"parameters": "a cat\nSteps: 20"}

    def test_users_may_still_save_by_themselves(self, tmp_path: Path) -> None:
        with_parameters(gradient(), {"prompt": "a cat"}).save(tmp_path / "x.png")
        assert load_image(tmp_path / "x.png").size == (40, 24)

    def test_header(self, tmp_path: Path) -> None:
        save_image(gradient(), tmp_path / "x.jpeg", parameters={"seed": 1})
        header = read_header(tmp_path / "x.jpeg")
        assert (header.format, header.width, header.height, header.parameters) == ("JPEG", 40, 24, {"seed": 1})


class TestReading:
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path: Path) -> None:
        values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
        loaded = load_image(written(tmp_path, Image.fromarray(values), "x.png"))
        assert loaded.mode == "RGB"
        assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]

    def test_mode_i_is_16_bit_grey(self) -> None:
        image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255]
        with pytest.raises(InvalidInputError, match=r"0\.\.65535"):
            to_rgb(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)))

    def test_float_images_have_no_range(self) -> None:
        with pytest.raises(InvalidInputError, match='"RGB"'):
            to_rgb(Image.new("F", (4, 4)))

    def test_cmyk_becomes_rgb(self, tmp_path: Path) -> None:
        image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        pixel = load_image(written(tmp_path, image, "x.jpg", quality=95)).getpixel((4, 4))
        assert pixel[0] > 240  # type: ignore[index]
        assert max(pixel[1:]) < 15  # type: ignore[index]

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, tmp_path: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = written(tmp_path, gradient(), "x.png", exif=exif)
        with Image.open(path) as image:
            from PIL import ImageOps

            expected = ImageOps.exif_transpose(image)
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(expected))

    def test_transparency_becomes_white(self, tmp_path: Path) -> None:
        image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
        image.putpixel((1, 0), (255, 0, 0, 0))
        image.putpixel((2, 0), (0, 0, 0, 128))
        pixels = [load_image(written(tmp_path, image, "x.png")).getpixel((x, 0)) for x in range(3)]
        assert pixels[:2] == [(255, 0, 0), (255, 255, 255)]
        assert abs(pixels[2][0] - 127) <= 1  # type: ignore[index]

    def test_palette_with_a_transparent_colour(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        loaded = load_image(written(tmp_path, image, "x.png", transparency=0))
        assert [loaded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]

    def test_first_frame_of_an_animation(self, tmp_path: Path) -> None:
        red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        path = written(tmp_path, red, "x.png", save_all=True, append_images=[blue])
        assert load_image(path).getpixel((0, 0)) == (255, 0, 0)

    def test_a_copy_without_metadata(self) -> None:
        original = with_parameters(gradient(), {"seed": 1})
        copy = to_rgb(original)
        assert copy is not original
        assert copy.info == {}
        assert "parameters" in original.info

    @pytest.mark.parametrize(
        "content", [None, b"", b"<html>no</html>", b"hello", b"version https://git-lfs.github.com"]
    )
    def test_what_is_no_image(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "x.png"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(MissingFileError if content is None else CorruptFileError, match=r"x\.png"):
            load_image(path)

    def test_other_formats_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="GIF"):
            load_image(written(tmp_path, gradient(), "x.png", format="GIF"))
        with pytest.raises(InvalidInputError, match="folder"):
            load_image(tmp_path)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_truncated(self, tmp_path: Path, suffix: str) -> None:
        path = written(tmp_path, Image.effect_noise((64, 64), 90), f"x.{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CorruptFileError, match=rf"x\.{suffix}"):
            load_image(path)

    def test_truncated_and_handed_in_open(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 90).save(buffer, "PNG")
        with pytest.raises(CorruptFileError, match="truncated"):
            to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:1000])))

    @given(position=st.integers(0, 500), value=st.integers(0, 255))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_damaged_byte_never_raises_untyped(self, tmp_path: Path, position: int, value: int) -> None:
        buffer = io.BytesIO()
        save_format = ("PNG", "JPEG", "WEBP")[position % 3]
        gradient().save(buffer, save_format)
        data = bytearray(buffer.getvalue())
        data[position % len(data)] = value
        path = tmp_path / "x.png"
        path.write_bytes(data)
        with contextlib.suppress(CorruptFileError, InvalidInputError):
            load_image(path)
        with contextlib.suppress(CorruptFileError, InvalidInputError):
            read_parameters(path)

    def test_too_large(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="16384x16384"):
            load_image(written(tmp_path, Image.new("1", (16_385, 1)), "x.png"))
        with pytest.raises(InvalidInputError, match="too large"):
            load_image(written(tmp_path, Image.new("1", (14_000, 14_000)), "y.png"))

    def test_no_image_at_all(self) -> None:
        with pytest.raises(InvalidInputError, match="ndarray"):
            to_rgb(np.zeros((4, 4, 3)))  # type: ignore[arg-type]


class TestPixels:
    def test_every_value_survives_the_round_trip(self) -> None:
        values = np.arange(256, dtype=np.uint8).reshape(16, 16)
        image = Image.fromarray(np.stack([values, values[::-1], values.T], -1))
        pixels = to_pixels(image)
        assert pixels.shape == (1, 3, 16, 16)
        assert pixels.dtype == torch.float32
        assert (pixels.min(), pixels.max()) == (-1, 1)
        assert np.array_equal(np.asarray(from_pixels(pixels[0])), np.asarray(image))

    def test_rounds_and_clamps(self) -> None:
        steps = torch.tensor([0.4, 0.6, 254.6, -30.0, 300.0]) / 255 * 2 - 1
        image = from_pixels(steps.expand(3, 1, 5))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 255, 0, 255]

    def test_no_black_image_from_nan(self) -> None:
        with pytest.raises(NonFiniteError):
            from_pixels(torch.full((3, 4, 4), torch.nan))

    @given(width=st.integers(1, 90), height=st.integers(1, 90))
    @settings(max_examples=20, deadline=None)
    def test_fit_gives_exactly_the_size(self, width: int, height: int) -> None:
        assert fit(Image.new("RGB", (width, height)), 32, 48).size == (48, 32)

    def test_fit_cuts_around_the_centre(self, caplog: pytest.LogCaptureFixture) -> None:
        image = Image.new("RGB", (90, 30), "red")
        image.paste("blue", (30, 0, 60, 30))
        with caplog.at_level("INFO"):
            fitted = np.asarray(fit(image, 30, 30))
        assert (fitted == (0, 0, 255)).all()
        assert "90x30" in caplog.text
        caplog.clear()
        same = fit(image, 30, 90)
        assert np.array_equal(np.asarray(same), np.asarray(image))
        assert not caplog.text


class TestWriting:
    def test_makes_folders_and_replaces(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "x.png"
        save_image(gradient(), path)
        save_image(gradient(8, 8), path)
        assert load_image(path).size == (8, 8)
        assert os.listdir(path.parent) == ["x.png"]

    def test_permissions_are_the_ordinary_ones(self, tmp_path: Path) -> None:
        save_image(gradient(), tmp_path / "x.png")
        (tmp_path / "other").touch()
        assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "other").stat().st_mode

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("no")])
    def test_a_failure_in_the_middle_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        path = tmp_path / "x.png"
        path.write_bytes(b"before")

        def fail(self: Image.Image, file: Any, *_: Any, **__: Any) -> None:
            file.write(b"half")
            raise error

        monkeypatch.setattr(Image.Image, "save", fail)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
        with pytest.raises(expected):
            save_image(gradient(), path)
        assert os.listdir(tmp_path) == ["x.png"]
        assert path.read_bytes() == b"before"

    def test_a_failed_replacement_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "x.png").mkdir()
        with pytest.raises(OutputError, match=r"x\.png"):
            save_image(gradient(), tmp_path / "x.png")
        assert os.listdir(tmp_path) == ["x.png"]

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
        save_image(gradient(), tmp_path / "link.png")
        assert (tmp_path / "link.png").is_symlink()
        assert (tmp_path / "real.png").is_file()

    @pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
    def test_any_mode_can_be_written(self, tmp_path: Path, mode: str, suffix: str) -> None:
        save_image(Image.new(mode, (8, 8)), tmp_path / f"x.{suffix}")
        load_image(tmp_path / f"x.{suffix}")

    @pytest.mark.parametrize("quality", [0, 101, 90.0, "high", True])
    def test_bad_quality(self, tmp_path: Path, quality: Any) -> None:
        with pytest.raises(InvalidInputError, match="quality"):
            save_image(gradient(), tmp_path / "x.jpg", quality=quality)

    def test_quality_matters(self, tmp_path: Path) -> None:
        image = Image.effect_noise((64, 64), 90).convert("RGB")
        sizes = []
        for quality in (20, 95):
            save_image(image, tmp_path / "x.webp", quality=quality)
            sizes.append((tmp_path / "x.webp").stat().st_size)
        assert sizes[0] < sizes[1]


class TestCheckWritable:
    def test_good_paths_leave_nothing_behind(self, tmp_path: Path) -> None:
        for name in ("x.png", "new/folder/x.JPG"):
            check_writable(tmp_path / name)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("name", ["x", "x.gif", "x.png.txt", "", "folder/.png"])
    def test_bad_suffix(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InvalidInputError, match=r"\.webp"):
            check_writable(tmp_path / name if name else name)

    def test_bad_places(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "folder.png").mkdir()
        before = sorted(tmp_path.rglob("*"))
        for name in ("file/x.png", "file/deeper/x.png", "folder.png", "x" * 300 + ".png", "nul\0.png"):
            with pytest.raises(OutputError, match="cannot be written"):
                check_writable(tmp_path / name)
            with pytest.raises(OutputError, match="cannot be written"):
                save_image(gradient(), tmp_path / name)
        with pytest.raises(OutputError, match=f"{tmp_path / 'file'} is a file"):
            check_writable(tmp_path / "file/deeper/x.png")
        assert sorted(tmp_path.rglob("*")) == before

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Path, **_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(image_module.Path, "touch", refuse)  # the tests may run as root, whom nothing stops
        with pytest.raises(OutputError, match="Permission denied"):
            check_writable(tmp_path / "x.png")
