"""Headers that lie, files that are something else, and agreement with the safetensors library on honest ones."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffsynth.runtime.errors import CorruptFileError, InvalidInputError, MissingFileError, UnsafeFileError
from diffsynth.weights.reader import MAX_HEADER_BYTES, CheckpointReader, read_header

TYPED = (CorruptFileError, UnsafeFileError, MissingFileError, InvalidInputError)
FUZZ = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `header` is a JSON value, or the raw bytes of one."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


GOOD_HEADER = {"__metadata__": {"format": "pt"}, "a": entry(0, 8, [2, 1], "F32"), "b": entry(8, 11), "c": entry(11, 11)}
GOOD = packed(GOOD_HEADER, bytes(11))


def write(tmp_path: Path, data: bytes, name: str = "x.safetensors") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def verdict(path: Path) -> str:
    """ "fine", or the text of the typed error; any other exception passes through and fails the test."""
    try:
        CheckpointReader([path])
    except TYPED as error:
        text = str(error)
        assert path.name in text
        assert "NoneType" not in text
        assert len(text) < 1000 + len(str(path))
        text.encode()
        return text
    return "fine"


# --- Headers that lie ---------------------------------------------------------------------------------------------


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_a_typed_error_or_a_sound_header(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for place, value in edits:
        data[place] = value
    path = write(tmp_path, bytes(data))
    if verdict(path) == "fine":
        reader = CheckpointReader([path])
        for name in reader:
            assert tuple(reader.read(name).shape) == reader[name].shape


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_typed_error(tmp_path: Path, data: bytes) -> None:
    verdict(write(tmp_path, data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": JSON | st.sampled_from(["F32", "U8", "F4", "f32"]),
        "shape": JSON | st.lists(st.integers(-2, 2**70), max_size=4),
        "data_offsets": JSON | st.lists(st.integers(-2, 40), min_size=2, max_size=2),
    },
)


@FUZZ
@given(header=JSON | st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), FIELDS | JSON, max_size=4))
def test_any_json_gives_a_typed_error(tmp_path: Path, header: Any) -> None:
    verdict(write(tmp_path, packed(header, bytes(16))))


@pytest.mark.parametrize("cut", range(0, len(GOOD), 3))
def test_truncation_at_any_place_is_found_and_sized(tmp_path: Path, cut: int) -> None:
    text = verdict(write(tmp_path, GOOD[:cut]))
    assert f"has {cut} bytes" in text
    if cut > len(GOOD) - 11:
        assert f"expected {len(GOOD)} by its header" in text


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    assert f"has {len(GOOD) + 1} bytes, expected {len(GOOD)}" in verdict(write(tmp_path, GOOD + b"!"))


DEEP = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
LIES: dict[str, Any] = {
    "overlap": {"a": entry(0, 8), "b": entry(4, 16)},
    "the same place twice": {"a": entry(0, 16), "b": entry(0, 16)},
    "hole": {"a": entry(0, 8), "b": entry(9, 16)},
    "hole at the start": {"a": entry(1, 16)},
    "too short": {"a": entry(0, 15)},
    "beyond the end": {"a": entry(0, 17)},
    "empty tensor inside another": {"a": entry(0, 16), "b": entry(8, 8)},
    "backwards": {"a": entry(16, 0, [16])},
    "negative shape": {"a": entry(0, 16, [-4, -4])},
    "negative place": {"a": entry(-16, 0, [16])},
    "bool as size": {"a": {"dtype": "U8", "shape": [True, 16], "data_offsets": [False, 16]}},
    "float as size": {"a": entry(0, 16, [16.0])},
    "shape of the wrong size": {"a": entry(0, 16, [15])},
    "shape is a text": {"a": entry(0, 16, "16")},
    "shape is an empty object": {"a": entry(0, 1, {}), "b": entry(1, 16)},
    "shape overflows 64 bits": {"a": entry(0, 16, [2**32, 2**32, 16])},
    "empty shape overflows 64 bits": {"a": entry(0, 0, [2**63, 0]), "b": entry(0, 16)},
    "a million huge sizes": {"a": entry(0, 16, [2**62] * 1_000_000)},
    "number of 5000 digits": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
    "infinity": b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,16]}}',
    "three offsets": {"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16, 16]}},
    "no offsets": {"a": {"dtype": "U8", "shape": [16]}},
    "unknown dtype": {"a": entry(0, 16, dtype="F31")},
    "dtype in small letters": {"a": entry(0, 16, dtype="u8")},
    "dtype is a list": {"a": entry(0, 16, dtype=["U8"])},
    "half a byte left": {"a": entry(0, 16, [31], "F4")},
    "tensor is null": {"a": None},
    "tensor is a list": {"a": ["U8", [16], [0, 16]]},
    "duplicate tensor": b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 16)).encode(),) * 2),
    "duplicate field": b'{"a":{"dtype":"U8","dtype":"U8","shape":[16],"data_offsets":[0,16]}}',
    "metadata is a list": {"__metadata__": [], "a": entry(0, 16)},
    "metadata is a text": {"__metadata__": "", "a": entry(0, 16)},
    "metadata holds a number": {"__metadata__": {"a": 1}, "a": entry(0, 16)},
    "list": [],
    "null": None,
    "text": "a",
    "bad UTF-8": b'{"\xff\xfe":1}',
    "half a surrogate pair": b'{"\\ud800":' + json.dumps(entry(0, 16)).encode() + b"}",
    "deep nesting": DEEP,
    "cut JSON": b'{"a":',
    "no JSON": b"{}{}",
    "zero byte at the end": b"{}\0",
    "blank at the start": b" {}",
    "no header": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    with pytest.raises(CorruptFileError, match=r"x\.safetensors .*Download it again\.$"):
        read_header(write(tmp_path, packed(LIES[lie], bytes(16))))
    verdict(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**40, 2**63, 2**64 - 1])
def test_announced_length_of_the_header_is_not_believed(tmp_path: Path, length: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "header of" in verdict(write(tmp_path, packed(GOOD_HEADER, bytes(11), length)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_header_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path, packed(b"{", length=MAX_HEADER_BYTES + 1))
    os.truncate(path, MAX_HEADER_BYTES + 100)  # a hole: takes no room on disk
    assert f"{MAX_HEADER_BYTES} are the most allowed" in verdict(path)


# --- Honest files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {
        "matrix": (torch.rand(3, 5) * 10).to(dtype),
        "scalar": torch.tensor(1.0).to(dtype),
        "nothing": torch.empty(0, 4, dtype=dtype),
        "日本語": torch.ones(2, 1, 3, 1).to(dtype),
    }
    path = tmp_path / "x.safetensors"
    save_file(saved, path, metadata={"a": "b"})
    reader, wanted = CheckpointReader([path]), load_file(path)
    assert reader.metadata == {"a": "b"}
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    assert reader.nbytes == sum(tensor.nbytes for tensor in wanted.values())
    for name, tensor in wanted.items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype == dtype
        assert read.shape == tensor.shape
        assert read.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


@settings(FUZZ, max_examples=40)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.lists(st.integers(0, 5), max_size=4),
        max_size=6,
    )
)
def test_any_names_and_shapes_read_as_the_library_reads_them(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, path)
    reader = CheckpointReader([path])
    assert set(reader) == set(shapes)
    for name, tensor in load_file(path).items():
        assert reader.read(name).equal(tensor)
        assert reader[name].shape == tuple(tensor.shape)


def test_null_metadata_and_spaces_after_the_header_are_allowed(tmp_path: Path) -> None:
    tensors, metadata = read_header(write(tmp_path, packed(b'{"__metadata__":null}   \n')))
    assert (tensors, metadata) == ({}, {})


def header_of_length(length: int) -> bytes:
    """One empty tensor behind a header padded with spaces, as the library pads it."""
    return packed(json.dumps({"a": entry(0, 0)}).encode().ljust(length))


IMPOSTORS = [
    b"<!",
    b"<h",
    b" <",
    b"\n<",
    b"\x80\x02",
    b"\x80\x03",
    b"\x80\x04",
    b"\x80\x05",
    b"PK",
    b"GG",
    b"ve",
    b"\x1f\x8b",
]


@pytest.mark.parametrize("start", IMPOSTORS)
@pytest.mark.parametrize("upper", [0, 1, 2])
def test_length_that_begins_like_another_format_still_loads(tmp_path: Path, start: bytes, upper: int) -> None:
    length = int.from_bytes(start, "little") + upper * 65536
    tensors, _ = read_header(write(tmp_path, header_of_length(length)))
    assert list(tensors) == ["a"]


def test_every_length_of_two_bytes_loads(tmp_path: Path) -> None:
    """Every value of the first byte, and of the second behind those that begin a pickle or a page."""
    lengths = {*range(64, 64 + 256), *(low + 256 * high for low in (0x80, 0x3C, 0x20) for high in range(1, 256))}
    for length in lengths:
        assert verdict(write(tmp_path, header_of_length(length))) == "fine", hex(length)


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x04", b"<\x01"])
def test_truncated_header_is_not_taken_for_another_format(tmp_path: Path, start: bytes) -> None:
    whole = header_of_length(int.from_bytes(start, "little"))
    for cut in (8, 9, 60):
        with pytest.raises(CorruptFileError, match=f"has {cut} bytes, which do not hold a whole safetensors header"):
            read_header(write(tmp_path, whole[:cut]))


# --- Files that are something else --------------------------------------------------------------------------------


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".CKPT", ""])
@pytest.mark.parametrize("form", ["torch", "torch legacy", "2", "3", "4", "5", "5 large"])
def test_pickle_in_every_disguise_is_refused_and_never_run(tmp_path: Path, form: str, suffix: str) -> None:
    canary, buffer = tmp_path / "canary", io.BytesIO()
    payload = {"weight": torch.zeros(4), "evil": Canary(canary)}
    if form.startswith("torch"):
        torch.save(payload, buffer, _use_new_zipfile_serialization=form == "torch")
    elif form == "5 large":
        pickle.dump([bytes(100_000), Canary(canary)], buffer, protocol=5)
    else:
        pickle.dump(Canary(canary), buffer, protocol=int(form))
    with pytest.raises(UnsafeFileError, match=r"is a pickle file.*refused.*safetensors"):
        CheckpointReader([write(tmp_path, buffer.getvalue(), f"model{suffix}")])
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_hidden_in_a_header_never_runs(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    raw = pickle.dumps(Canary(canary), protocol=protocol)
    for data in (packed(raw), packed(b"{" + raw), packed({"a": entry(0, len(raw))}, raw), raw.ljust(9, b"{")):
        path = write(tmp_path, data)
        if verdict(path) == "fine":
            assert bytes(CheckpointReader([path]).read("a").tolist()) == raw
    assert not canary.exists()


def test_weights_under_a_pickle_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError):
        read_header(write(tmp_path, GOOD, "x.bin"))


def test_zip_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"")
    with pytest.raises(UnsafeFileError):
        read_header(tmp_path / "x.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
FOREIGN: list[tuple[bytes, type[Exception], str]] = [
    (LFS, CorruptFileError, "Git LFS pointer.*git lfs pull"),
    (b"<!DOCTYPE html><html></html>", CorruptFileError, "HTML page"),
    (b"\r\n  <html>Not found</html>", CorruptFileError, "HTML page"),
    (b"GGUF\x03\0\0\0" + bytes(100), InvalidInputError, "GGUF file, which is not supported"),
    (b"", CorruptFileError, "has 0 bytes"),
    (b"\0" * 7, CorruptFileError, "has 7 bytes"),
    (b"\0" * 5000, CorruptFileError, "does not begin with"),
    (b'{"error": "Repository not found"}', CorruptFileError, "header of"),
]


@pytest.mark.parametrize(("data", "error", "message"), FOREIGN, ids=[message for *_, message in FOREIGN])
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, data: bytes, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_header(write(tmp_path, data))


def test_missing_file_names_the_whole_path(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=str(tmp_path / "nothing.safetensors")):
        read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(MissingFileError, match="There is no file"):
        read_header(write(tmp_path, GOOD) / "below-a-file.safetensors")


def test_folder_and_pipe_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is a folder where"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InvalidInputError, match="is a device or pipe where"):
        read_header(tmp_path / "pipe.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    path.chmod(0)
    with pytest.raises(MissingFileError, match="cannot be read: Permission denied"):
        read_header(path)


# --- Several files, and laziness ----------------------------------------------------------------------------------


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    for index in range(3):
        save_file({f"w{index}": torch.full((4,), float(index))}, tmp_path / f"{index}.safetensors")
    reader = CheckpointReader(sorted(tmp_path.glob("*")))
    assert {name: reader.read(name)[0].item() for name in reader} == {"w0": 0.0, "w1": 1.0, "w2": 2.0}
    assert reader.describe() == f"{tmp_path / '0.safetensors'} (and 2 more)"


def test_same_tensor_in_two_shards_names_both_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"w": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CorruptFileError, match=r"'w' stands both in .*one\.safetensors and in .*two\.safetensors"):
        CheckpointReader([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    CheckpointReader([tmp_path / "x.safetensors"]).read("w").zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert CheckpointReader([tmp_path / "x.safetensors"]).read("w").sum() == 4


def test_file_that_vanishes_after_its_header_was_read_gives_a_typed_error(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "x.safetensors")
    reader = CheckpointReader([tmp_path / "x.safetensors"])
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="can no longer be read"):
        reader.read("w")


def test_reading_is_lazy(tmp_path: Path) -> None:
    """Header and tensor of a 400 MB file cost no memory; only the touched part does."""
    path, size = write(tmp_path, packed({"w": entry(0, 400_000_000)})), 400_000_000
    os.truncate(path, path.stat().st_size + size)  # a hole: takes no room on disk
    script = f"""
import sys, resource, torch
from pathlib import Path
import safetensors
from diffsynth.weights.reader import CheckpointReader
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
before = resident()
reader = CheckpointReader([Path({str(path)!r})])
assert reader.shapes == {{"w": ({size},)}}
tensor = reader.read("w")
assert tensor[::100_000_000].sum() == 0
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB
