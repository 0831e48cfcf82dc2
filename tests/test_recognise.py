"""What a checkpoint is, from names, shapes and `config.json`: and what is said where it is nothing known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.recognise import MemoryReader, candidates, meta_build, recognise
from diffsynth.registry import FAMILIES, family_named
from diffsynth.runtime.errors import (
    CorruptFileError,
    DiffSynthError,
    InvalidInputError,
    KeyMismatchError,
    UnknownModelError,
)
from diffsynth.spec import ComponentSpec, Family
from diffsynth.tiny.checkpoint import write_tiny_checkpoint
from diffsynth.weights.reader import CheckpointReader

Folders = Callable[[str], Path]
COMPONENTS = [(family, component) for family in FAMILIES for component in family.spec.components]
every_component = pytest.mark.parametrize(
    ("family", "component"),
    COMPONENTS,
    ids=[f"{family.spec.name}-{component.name}" for family, component in COMPONENTS],
)
QWEN, ERNIE = family_named("qwen-image"), family_named("ernie-image")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny_checkpoint(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def rewritten(
    target: Path, tensors: dict[str, Tensor], config: dict[str, Any] | str | bytes | None = None
) -> CheckpointReader:
    """A reader of `tensors` saved in `target`, with `config` beside them."""
    target.mkdir(exist_ok=True)
    if config is not None:
        data = config if isinstance(config, (str, bytes)) else json.dumps(config)
        (target / "config.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return CheckpointReader([target / "model.safetensors"])


def refusal(reader: Any, error: type[DiffSynthError]) -> str:
    with pytest.raises(error) as caught:
        recognise(reader)
    text = str(caught.value)
    assert "NoneType" not in text
    assert reader.describe() in text or str(reader.folder) in text
    assert len(text) < 3000
    return text


# --- With config.json ---------------------------------------------------------------------------------------------


@every_component
def test_tiny_component_is_recognised_by_its_config(folders: Folders, family: Family, component: ComponentSpec) -> None:
    paths = sorted((folders(family.spec.name) / component.folder).glob("*.safetensors"))
    (found,) = recognise(CheckpointReader(paths))
    assert (found.family.spec.name, found.component.name) == (family.spec.name, component.name)
    assert found.complete
    assert found.claimed == set(found.reader)
    assert all(parameter.is_meta for parameter in found.module.parameters())


@every_component
@pytest.mark.parametrize("fault", ["missing", "marker missing", "extra", "mis-shaped", "all three", "integers"])
def test_wrong_tensors_are_listed(
    folders: Folders, tmp_path: Path, family: Family, component: ComponentSpec, fault: str
) -> None:
    folder = folders(family.spec.name) / component.folder
    tensors, config = weights(folder), json.loads((folder / "config.json").read_text())
    (found,) = recognise(CheckpointReader(sorted(folder.glob("*.safetensors"))))
    names = sorted(found.names.values())
    marker = found.names[component.marker]
    first, second = (name for name in names[len(names) // 2 :] if tensors[name].ndim and name != marker), marker
    gone = second if fault == "marker missing" else next(first)
    bent = next(name for name in names if name not in (gone, marker) and tensors[name].ndim)
    expected = []
    if "missing" in fault or fault == "all three":
        del tensors[gone]
        expected.append(f"lacks 1 tensor ({gone})")
    if fault in ("mis-shaped", "all three"):
        old, tensors[bent] = tensors[bent].shape, torch.zeros(7, 7, 7)
        expected.append(f"1 mis-shaped tensor ({bent}: [7, 7, 7] instead of {list(old)})")
    if fault in ("extra", "all three"):
        tensors["intruder.weight"] = torch.zeros(1)
        expected.append("holds 1 tensor (intruder.weight) that do not belong there")
    if fault == "integers":
        bent = next(name for name in names if name in {found.names[n] for n, _ in found.module.named_parameters()})
        tensors[bent] = tensors[bent].to(torch.int8)
        expected.append(f"{bent}: I8 instead of a floating-point dtype")
    text = refusal(rewritten(tmp_path, tensors, config), KeyMismatchError)
    assert f"{component.title} of {family.spec.title}" in text
    for part in expected:
        assert part in text


BROKEN_CONFIGS: list[tuple[Any, type[DiffSynthError], str]] = [
    ("", CorruptFileError, "is no valid JSON"),
    ('{"_class_name": ', CorruptFileError, "is no valid JSON"),
    (b"\xff\xfe", CorruptFileError, "is no valid JSON"),
    ("[" * 100_000, CorruptFileError, "is no valid JSON"),
    ("[]", CorruptFileError, "is no JSON object"),
    ("null", CorruptFileError, "is no JSON object"),
    ("{}", UnknownModelError, "config.json beside it is for no class at all"),
    ({"architectures": 5}, UnknownModelError, "for no class at all"),
    ({"architectures": [None], "_class_name": None}, UnknownModelError, "for None|for no class at all"),
    ({"_class_name": "FluxTransformer2DModel"}, UnknownModelError, "config.json beside it is for FluxTransformer2D"),
    ({"_class_name": "AutoencoderKLQwenImage"}, UnknownModelError, "config.json beside it is for AutoencoderKLQwenIm"),
]


@pytest.mark.parametrize(("config", "error", "message"), BROKEN_CONFIGS)
def test_damaged_or_foreign_config_is_named(
    folders: Folders, tmp_path: Path, config: Any, error: type[DiffSynthError], message: str
) -> None:
    tensors = weights(folders("qwen-image") / "transformer")
    text = refusal(rewritten(tmp_path, tensors, config), error)
    assert any(part in text for part in message.split("|"))
    if error is UnknownModelError:
        assert "Closest is the transformer of Qwen-Image, with 100% of the names in common" in text


@pytest.mark.parametrize(
    ("family", "component", "changes", "message"),
    [
        (QWEN, "dit", {"guidance_embeds": True}, "guidance_embeds = True; only False is supported"),
        (QWEN, "dit", {"use_additional_t_cond": True}, "use_additional_t_cond = True; only False is supported"),
        (QWEN, "dit", {"use_layer3d_rope": True}, "use_layer3d_rope = True; only False is supported"),
        (QWEN, "dit", {"num_layers": "two"}, "num_layers = 'two'; expected int"),
        (QWEN, "dit", {"num_layers": None}, "num_layers = None; expected int"),
        (QWEN, "dit", {"attention_head_dim": -16}, "cannot be understood"),
        (QWEN, "vae", {"is_residual": True}, "is_residual = True; only False is supported"),
        (QWEN, "vae", {"attn_scales": [0.5]}, "attn_scales = [0.5]; only [] is supported"),
        (QWEN, "text_encoder", {"text_config": None}, ""),
        (QWEN, "text_encoder", {"text_config": 5}, ""),
        (ERNIE, "dit", {"patch_size": 2}, "patch_size = 2; only 1 is supported"),
        (ERNIE, "dit", {"num_attention_heads": 0}, "cannot be understood"),
        (ERNIE, "vae", {"norm_num_groups": 3}, "cannot be understood"),
        (ERNIE, "vae", {"patch_size": [1, 1]}, "patch_size = [1, 1]; only [2, 2] is supported"),
        (ERNIE, "text_encoder", {"text_config": None}, "no text_config"),
        (ERNIE, "text_encoder", {"text_config": {"hidden_size": None}}, ""),
        (ERNIE, "text_encoder", {"text_config": {"hidden_size": "wide"}}, ""),
    ],
    ids=lambda value: value.spec.name if hasattr(value, "spec") else str(value),
)
def test_settings_that_are_not_supported_are_named_with_the_file(
    folders: Folders, tmp_path: Path, family: Family, component: str, changes: dict[str, Any], message: str
) -> None:
    folder = folders(family.spec.name) / family.spec.component(component).folder
    config = json.loads((folder / "config.json").read_text()) | changes
    reader = rewritten(tmp_path, weights(folder), config)
    with pytest.raises((InvalidInputError, KeyMismatchError)) as caught:
        recognise(reader)
    text = str(caught.value)
    assert "NoneType" not in text
    assert message in text
    assert "config.json" in text


def test_config_for_another_size_lists_what_does_not_fit(folders: Folders, tmp_path: Path) -> None:
    folder = folders("qwen-image") / "transformer"
    config = json.loads((folder / "config.json").read_text()) | {"num_layers": 3}
    text = refusal(rewritten(tmp_path, weights(folder), config), KeyMismatchError)
    assert "lacks 32 tensors (transformer_blocks.2." in text
    assert "and 24 more" in text
    config["num_layers"] = 1
    text = refusal(rewritten(tmp_path, weights(folder), config), KeyMismatchError)
    assert "holds 32 tensors (transformer_blocks.1." in text


# --- Without config.json ------------------------------------------------------------------------------------------


@every_component
def test_tiny_weights_without_config_ask_for_it(
    folders: Folders, tmp_path: Path, family: Family, component: ComponentSpec
) -> None:
    reader = rewritten(tmp_path, weights(folders(family.spec.name) / component.folder))
    if (family.spec.name, component.name) == ("qwen-image", "vae"):  # its shapes tell everything
        assert recognise(reader)[0].config == component.parse_config(component.tiny)
        return
    text = refusal(reader, UnknownModelError)
    assert f"Closest is the {component.title} of {family.spec.title}, with 100% of the names in common" in text
    assert "put its config.json beside it" in text
    assert "Only in" not in text


def published(family: Family, name: str) -> dict[str, Tensor]:
    component = family.spec.component(name)
    return dict(meta_build(component, component.parse_config({})).state_dict())


@pytest.mark.parametrize(
    ("family", "name"),
    [(QWEN, "dit"), (QWEN, "vae"), (ERNIE, "dit"), (ERNIE, "vae")],
    ids=lambda value: value if isinstance(value, str) else value.spec.name,
)
def test_published_size_is_recognised_by_shapes_alone(family: Family, name: str) -> None:
    (found,) = candidates(MemoryReader(published(family, name)))
    assert (found.family.spec.name, found.component.name) == (family.spec.name, name)
    assert found.complete
    assert found.config == family.spec.component(name).parse_config({})


def test_published_size_with_a_fault_is_refused_by_shapes_alone() -> None:
    tensors = published(ERNIE, "vae")
    faulty = {name: tensor for name, tensor in tensors.items() if name != "decoder.conv_out.bias"}
    assert "lacks 1 tensor (decoder.conv_out.bias)" in str(refusal_in_memory(faulty, KeyMismatchError))
    faulty = tensors | {"decoder.conv_out.bias": torch.empty(4, device="meta")}
    assert "decoder.conv_out.bias: [4] instead of [3]" in refusal_in_memory(faulty, KeyMismatchError)


def refusal_in_memory(tensors: dict[str, Tensor], error: type[DiffSynthError]) -> str:
    with pytest.raises(error) as caught:
        recognise(MemoryReader(tensors))
    return str(caught.value)


# --- Nothing known ------------------------------------------------------------------------------------------------


def test_unknown_file_names_the_closest_model_and_what_differs_both_ways(folders: Folders) -> None:
    tensors = weights(folders("qwen-image") / "transformer")
    other = {name.replace("img_mod", "image_modulation"): tensor for name, tensor in tensors.items()}
    text = refusal_in_memory(other, UnknownModelError)
    assert "the given state_dict is no model this package knows (77 tensors)" in text
    assert "Closest is the transformer of Qwen-Image, with 9" in text
    assert "Only in the file: transformer_blocks.0.image_modulation.1.bias" in text
    assert "Only in that model: transformer_blocks.0.img_mod.1.bias" in text
    assert "transformer_blocks.1" not in text, "one layer stands for all"


def test_unknown_layout_is_measured_against_each_layout(folders: Folders) -> None:
    tensors = weights(folders("ernie-image") / "transformer")
    other = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items() if "to_q" not in name}
    text = refusal_in_memory(other, UnknownModelError)
    assert "Closest is the transformer of ERNIE-Image" in text
    assert "Only in that model: model.diffusion_model.layers.0.self_attention.to_q.weight." in text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "No known model has names like these: it is empty."),
        ({"a.b": torch.zeros(1)}, "No known model has names like these: a.b."),
        ({f"x{index}": torch.zeros(1) for index in range(99)}, "and 91 more"),
        ({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1)}, "looks like a LoRA adapter"),
    ],
)
def test_file_like_nothing_known_says_what_is_in_it(tensors: dict[str, Tensor], message: str) -> None:
    assert message in refusal_in_memory(tensors, UnknownModelError)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "got a list"),
        ({"w": None}, "'w' is a null"),
        ({"w": 5}, "'w' is a int"),
        ({"state_dict": {}}, "'state_dict' is a dict"),
        ({3: torch.zeros(1)}, "3 is a Tensor"),
    ],
)
def test_state_dict_of_something_else_is_refused(state: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        MemoryReader(state)
