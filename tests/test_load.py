"""From files to components: every mistake surfaces before a weight is read, and names the file and the fix."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffsynth.load import load_components, weight_files
from diffsynth.memory.attach import attachment_of
from diffsynth.pipelines.ernie_image import ErnieImagePipeline
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.registry import FAMILIES, family_named
from diffsynth.runtime.errors import (
    CorruptFileError,
    DiffSynthError,
    InvalidInputError,
    KeyMismatchError,
    MissingFileError,
    UnknownModelError,
    UnsafeFileError,
    WrongModelError,
)
from diffsynth.spec import ComponentSpec, Family
from diffsynth.tiny.checkpoint import write_tiny_checkpoint
from diffsynth.weights.model_config import ModelConfig
from diffsynth.weights.reader import CheckpointReader

QWEN, ERNIE = family_named("qwen-image"), family_named("ernie-image")
Folders = Callable[[str], Path]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec.name)
COMPONENTS = [(family, component) for family in FAMILIES for component in family.spec.components]
every_component = pytest.mark.parametrize(
    ("family", "component"),
    COMPONENTS,
    ids=[f"{family.spec.name}-{component.name}" for family, component in COMPONENTS],
)
SHARD_BYTES = 100_000
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cpu": {"offload_device": "cpu"},
    "disk": {"offload_device": "disk"},
    "fp8": {"offload_dtype": torch.float8_e4m3fn},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Tiny repositories, the transformer in shards; shared: copy before changing."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            target = tmp_path_factory.mktemp(name) / "model"
            made[name] = write_tiny_checkpoint(name, target, max_shard_bytes=SHARD_BYTES)
        return made[name]

    return get


@pytest.fixture
def qwen(folders: Folders, tmp_path: Path) -> Path:
    """A copy of the Qwen-Image repository that a test may change."""
    return Path(shutil.copytree(folders("qwen-image"), tmp_path / "qwen"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of all tensors that were read from files."""
    names: list[str] = []
    original = CheckpointReader.read

    def read(self: CheckpointReader, name: str) -> torch.Tensor:
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(CheckpointReader, "read", read)
    return names


def load(family: Family, configs: list[ModelConfig], **kwargs: Any) -> dict[str, nn.Module]:
    return load_components(family, configs, **{"dtype": torch.float32, "device": torch.device("cpu")} | kwargs)


def refusal(error: type[DiffSynthError], family: Family, configs: list[ModelConfig], **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        load(family, configs, **kwargs)
    assert "NoneType" not in str(caught.value)
    return str(caught.value)


def file_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def place(root: Path, component: ComponentSpec) -> Path:
    return root / component.folder


# --- Where components come from -----------------------------------------------------------------------------------


@every_family
def test_folder_of_a_whole_repository_gives_all_components(folders: Folders, family: Family) -> None:
    root = folders(family.spec.name)
    modules = load(family, [ModelConfig(root)])
    assert set(modules) == {component.name for component in family.spec.components}
    for component in family.spec.components:
        module, tensors = modules[component.name], file_tensors(place(root, component))
        layout = next(layout for layout in component.layouts if layout.to_file(component.marker) in tensors)
        for name, value in module.state_dict().items():
            assert value.equal(tensors[layout.to_file(name)]), name
        assert not any(parameter.is_meta or parameter.requires_grad for parameter in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
        assert not module.training


def ways(root: Path, component: ComponentSpec) -> dict[str, Any]:
    folder = place(root, component)
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Any] = {"folder": folder, "files": files, "files in another order": files[::-1]}
    if index := next(folder.glob("*.index.json"), None):
        found["index"] = index
    return found


@every_component
def test_every_way_to_name_a_component_gives_the_same(
    folders: Folders, family: Family, component: ComponentSpec
) -> None:
    expected = None
    for how, path in ways(folders(family.spec.name), component).items():
        loaded = load(family, [ModelConfig(path)], wanted=[component.name])[component.name].state_dict()
        expected = expected or loaded
        assert loaded.keys() == expected.keys(), how
        assert all(loaded[name].equal(expected[name]) for name in expected), how


def test_shards_are_really_several(folders: Folders) -> None:
    assert len(list((folders("qwen-image") / "transformer").glob("*.safetensors"))) > 1
    assert len(weight_files(folders("qwen-image"), QWEN.spec.components)) == 3


@every_family
def test_one_config_may_list_files_and_folders_of_several_components(folders: Folders, family: Family) -> None:
    places = [place(folders(family.spec.name), component) for component in family.spec.components]
    paths = [path for folder in places[:2] for path in folder.glob("*.safetensors")]
    assert len(load(family, [ModelConfig([*paths, places[2]])])) == 3
    assert len(load(family, [ModelConfig(places)])) == 3


@every_component
def test_state_dict_in_memory_takes_the_place_of_the_files(
    folders: Folders, family: Family, component: ComponentSpec, reads: list[str]
) -> None:
    folder = place(folders(family.spec.name), component)
    tensors = {name: tensor + 1 for name, tensor in file_tensors(folder).items()}
    modules = load(family, [ModelConfig(folder, state_dict=tensors)], wanted=[component.name])
    layout = next(layout for layout in component.layouts if layout.to_file(component.marker) in tensors)
    assert not reads
    for name, value in modules[component.name].state_dict().items():
        assert value.equal(tensors[layout.to_file(name)])


def test_state_dict_without_a_path_has_no_config(folders: Folders) -> None:
    tensors = file_tensors(folders("qwen-image") / "transformer")
    text = refusal(UnknownModelError, QWEN, [ModelConfig(state_dict=tensors)])
    assert "the given state_dict is no model" in text
    assert "put its config.json beside it" in text


@every_family
def test_components_that_are_not_wanted_may_be_missing_and_are_not_read(
    folders: Folders, family: Family, reads: list[str]
) -> None:
    root = folders(family.spec.name)
    assert set(load(family, [ModelConfig(root / "vae")], wanted=["vae"])) == {"vae"}
    reads.clear()
    assert set(load(family, [ModelConfig(root)], wanted=["vae"])) == {"vae"}
    assert set(reads) <= set(file_tensors(root / "vae"))
    assert load(family, [ModelConfig(root)], wanted=[]) == {}


def test_unknown_component_is_refused_by_name(folders: Folders) -> None:
    text = refusal(InvalidInputError, QWEN, [ModelConfig(folders("qwen-image"))], wanted=["unet"])
    assert "has no component 'unet'; it has dit, text_encoder, vae" in text


# --- What is wrong is said at load, in every mode -----------------------------------------------------------------


@every_component
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["missing", "extra", "mis-shaped"])
def test_wrong_tensors_are_refused_at_load_in_every_mode(
    folders: Folders, tmp_path: Path, reads: list[str], family: Family, component: ComponentSpec, mode: str, fault: str
) -> None:
    source = place(folders(family.spec.name), component)
    tensors = file_tensors(source)
    layout = next(layout for layout in component.layouts if layout.to_file(component.marker) in tensors)
    name = layout.to_file(component.marker)
    other = next(key for key in sorted(tensors) if key != name and layout.to_ours(key) and tensors[key].ndim > 1)
    changed = {
        "missing": {key: value for key, value in tensors.items() if key != other},
        "extra": tensors | {"stray.weight": torch.zeros(1)},
        "mis-shaped": tensors | {other: torch.zeros(3, 1, 4)},
    }[fault]
    save_file(changed, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    config = ModelConfig(tmp_path, **MODES[mode])
    text = refusal(KeyMismatchError, family, [config], wanted=[component.name])
    assert ("stray.weight" if fault == "extra" else other) in text
    assert str(tmp_path) in text
    assert component.title in text
    assert not reads


@every_component
@pytest.mark.parametrize("mode", MODES)
def test_truncated_shard_is_refused_with_its_sizes_in_every_mode(
    folders: Folders, tmp_path: Path, reads: list[str], family: Family, component: ComponentSpec, mode: str
) -> None:
    folder = Path(shutil.copytree(place(folders(family.spec.name), component), tmp_path / "copy"))
    last = sorted(folder.glob("*.safetensors"))[-1]
    size = last.stat().st_size
    os.truncate(last, size - 10)
    text = refusal(CorruptFileError, family, [ModelConfig(folder, **MODES[mode])], wanted=[component.name])
    assert f"{last} has {size - 10} bytes, expected {size} by its header" in text
    assert not reads


def test_nothing_is_read_before_the_last_component_is_checked(qwen: Path, reads: list[str]) -> None:
    (path,) = (qwen / "vae").glob("*.safetensors")
    tensors = load_file(path)
    tensors.pop("decoder.conv_out.bias")
    save_file(tensors, path)
    assert "decoder.conv_out.bias" in refusal(KeyMismatchError, QWEN, [ModelConfig(qwen)])
    assert not reads


def test_contradicting_memory_fields_are_found_before_anything_is_read(qwen: Path, reads: list[str]) -> None:
    configs = [
        ModelConfig(qwen / "transformer"),
        ModelConfig(qwen / "text_encoder"),
        ModelConfig(qwen / "vae", offload_device="cpu", onload_device="disk"),
    ]
    assert "Set offload_device='disk' too" in refusal(InvalidInputError, QWEN, configs)
    assert not reads


# --- The wrong model ----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("name", ["dit", "text_encoder", "vae"])
def test_component_of_the_other_family_is_refused_with_both_names(
    folders: Folders, reads: list[str], family: Family, name: str
) -> None:
    other = ERNIE if family is QWEN else QWEN
    root = folders(family.spec.name)
    configs = [
        ModelConfig(place(folders(other.spec.name) if c.name == name else root, c)) for c in family.spec.components
    ]
    text = refusal(WrongModelError, family, configs)
    assert f"is the {other.spec.component(name).title} of {other.spec.title}" in text
    assert f"a component of {family.spec.title} is needed" in text
    assert family.spec.model_ids[0] in text
    assert other.spec.pipeline.split(":")[1] in text
    assert not reads


@every_family
def test_same_component_twice_names_both_files(folders: Folders, family: Family) -> None:
    root = folders(family.spec.name)
    text = refusal(WrongModelError, family, [ModelConfig(root / "vae"), ModelConfig(root / "vae")])
    assert "is the autoencoder (VAE)" in text
    assert "and so is" in text
    assert "Give one of them" in text


@every_family
@pytest.mark.parametrize("name", ["dit", "text_encoder", "vae"])
def test_missing_component_says_what_was_found_and_what_to_add(folders: Folders, family: Family, name: str) -> None:
    root, absent = folders(family.spec.name), family.spec.component(name)
    configs = [ModelConfig(place(root, c)) for c in family.spec.components if c.name != name]
    text = refusal(MissingFileError, family, configs)
    assert f"No {absent.title} of {family.spec.title} among the given models" in text
    assert f'ModelConfig(model_id="{family.spec.model_ids[0]}", origin_file_pattern="{absent.pattern}")' in text
    for present in family.spec.components:
        assert (f"{present.title} (" in text) == (present.name != name)


def test_nothing_given_names_the_first_component() -> None:
    assert "No transformer of Qwen-Image among the given models (found: nothing)" in refusal(MissingFileError, QWEN, [])


# --- Files and folders that are not what they should be -----------------------------------------------------------


def test_index_that_names_a_missing_shard(qwen: Path) -> None:
    folder = qwen / "transformer"
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    for path in (folder, next(folder.glob("*.index.json"))):
        text = refusal(MissingFileError, QWEN, [ModelConfig(path)], wanted=["dit"])
        assert f"lists the shard {lost.name!r}, which is not in {folder}" in text


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 5}}', '{"weight_map": {"w": "../x"}}', "\0"]
)
def test_index_that_is_damaged_or_points_outside(qwen: Path, content: str) -> None:
    index = next((qwen / "transformer").glob("*.index.json"))
    index.write_text(content)
    assert str(index) in refusal(CorruptFileError, QWEN, [ModelConfig(qwen / "transformer")], wanted=["dit"])


def test_shards_given_in_part_list_what_is_lacking(qwen: Path) -> None:
    files = sorted((qwen / "transformer").glob("*.safetensors"))
    text = refusal(KeyMismatchError, QWEN, [ModelConfig(files[:-1])], wanted=["dit"])
    assert "lacks" in text
    assert sorted(load_file(files[-1]))[0] in text
    assert "Check that all shards are given" in text


def test_index_without_variant_is_preferred(qwen: Path) -> None:
    folder = qwen / "transformer"
    index = next(folder.glob("*.index.json"))
    half = {"weight_map": {"w": "gone.fp16.safetensors"}}
    (folder / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text(json.dumps(half))
    assert weight_files(folder, ()) == [sorted(folder.glob(f"{index.name.split('.')[0]}-0*.safetensors"))]


def test_empty_folder(tmp_path: Path) -> None:
    assert "is an empty folder" in refusal(MissingFileError, QWEN, [ModelConfig(tmp_path)])


def test_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    text = refusal(MissingFileError, QWEN, [ModelConfig(tmp_path)])
    assert f"No *.safetensors in {tmp_path} (it holds README.md)" in text


@pytest.mark.parametrize("inner", ["", "vae"])
def test_folder_of_pickles_is_refused_and_none_is_run(tmp_path: Path, inner: str) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "canary"),)

    (tmp_path / inner).mkdir(exist_ok=True)
    (tmp_path / inner / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    text = refusal(UnsafeFileError, QWEN, [ModelConfig(tmp_path)])
    assert "only as pickles (diffusion_pytorch_model.bin)" in text
    assert "safetensors" in text
    assert not (tmp_path / "canary").exists()


def test_config_of_another_class_beside_the_weights(qwen: Path) -> None:
    shutil.copy(qwen / "vae" / "config.json", qwen / "transformer" / "config.json")
    text = refusal(UnknownModelError, QWEN, [ModelConfig(qwen)])
    assert "Closest is the transformer of Qwen-Image" in text
    assert "The config.json beside it is for AutoencoderKLQwenImage" in text


def test_unsupported_setting_is_found_before_anything_is_read(qwen: Path, reads: list[str]) -> None:
    path = qwen / "transformer" / "config.json"
    for key in ("guidance_embeds", "use_additional_t_cond"):
        path.write_text(json.dumps(dict(QWEN.spec.component("dit").tiny) | {key: True}))
        assert f"config.json sets {key} = True" in refusal(InvalidInputError, QWEN, [ModelConfig(qwen)])
    assert not reads


@pytest.mark.parametrize("pipeline", [QwenImagePipeline, ErnieImagePipeline])
def test_missing_tokenizer_names_the_folder(folders: Folders, tmp_path: Path, pipeline: Any) -> None:
    root = Path(shutil.copytree(folders(pipeline.family.spec.name), tmp_path / "model"))
    shutil.rmtree(root / "tokenizer")
    for exists in (False, True):
        if exists:
            (root / "tokenizer").mkdir()
        with pytest.raises(MissingFileError) as caught:
            pipeline.from_folder(root, device="cpu")
        assert str(root / "tokenizer") in str(caught.value)
        assert "NoneType" not in str(caught.value)


@pytest.mark.parametrize("pipeline", [QwenImagePipeline, ErnieImagePipeline])
def test_from_folder_names_the_missing_folder(folders: Folders, tmp_path: Path, pipeline: Any) -> None:
    root = Path(shutil.copytree(folders(pipeline.family.spec.name), tmp_path / "model"))
    shutil.rmtree(root / "vae")
    with pytest.raises(MissingFileError, match="has no folder 'vae' for the autoencoder"):
        pipeline.from_folder(root, device="cpu")
    with pytest.raises(MissingFileError, match="has no folder"):
        pipeline.from_folder(tmp_path / "nothing", device="cpu")


# --- What the tensors become --------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("mode", ["plain", "cpu", "disk"])
def test_weights_take_the_dtype_and_buffers_keep_that_of_the_file(folders: Folders, family: Family, mode: str) -> None:
    configs = [ModelConfig(folders(family.spec.name), **MODES[mode])]
    for name, module in load(family, configs, dtype=torch.bfloat16).items():
        component, attachment = family.spec.component(name), attachment_of(module)
        if attachment is not None:
            attachment.detach()
        tensors = file_tensors(place(folders(family.spec.name), component))
        layout = next(layout for layout in component.layouts if layout.to_file(component.marker) in tensors)
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        parameters = dict(module.named_parameters())
        for key, value in module.state_dict().items():
            original = tensors[layout.to_file(key)]
            assert value.equal(original.to(torch.bfloat16) if key in parameters else original)
            assert key in parameters or value.dtype == original.dtype
    if family is ERNIE:
        assert module.get_buffer("bn.num_batches_tracked").dtype == torch.int64
        assert module.get_buffer("bn.running_var").dtype == torch.float32


def test_constants_that_no_file_holds_are_computed(folders: Folders) -> None:
    encoder = load(QWEN, [ModelConfig(folders("qwen-image"))], dtype=torch.bfloat16)["text_encoder"]
    frequencies = encoder.get_buffer("rotary_emb.inv_freq")
    assert frequencies.dtype == torch.float32
    assert frequencies[0] == 1
    assert torch.all(frequencies[1:] < frequencies[:-1])


def test_clear_parameters_says_that_it_has_no_effect(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    load(QWEN, [ModelConfig(folders("qwen-image"), clear_parameters=True)])
    assert "clear_parameters has no effect" in caplog.text


def test_loaded_weights_do_not_change_their_file(qwen: Path) -> None:
    before = {path: path.read_bytes() for path in qwen.rglob("*.safetensors")}
    for module in load(QWEN, [ModelConfig(qwen)]).values():
        for parameter in module.parameters():
            parameter.data.zero_()
    assert {path: path.read_bytes() for path in qwen.rglob("*.safetensors")} == before
