"""Names in the wild: every layout is a two-way map, loads the very same weights, and agrees with independent maps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.families.ernie_image import keys as ernie_keys
from diffsynth.families.qwen_image import keys as qwen_keys
from diffsynth.load import load_components
from diffsynth.recognise import meta_build, module_shapes
from diffsynth.registry import FAMILIES, family_named
from diffsynth.spec import ComponentSpec, Family
from diffsynth.weights.keymap import KeyLayout
from diffsynth.weights.model_config import ModelConfig
from diffsynth.weights.reader import CheckpointReader

OracleFolders = Callable[[str], tuple[Any, Path]]
CPU = torch.device("cpu")
LAYOUTS = [
    (family, component, layout)
    for family in FAMILIES
    for component in family.spec.components
    for layout in component.layouts
]
every_layout = pytest.mark.parametrize(
    ("family", "component", "layout"),
    LAYOUTS,
    ids=[f"{f.spec.name}-{c.name}-{c.layouts.index(layout)} {layout.name}" for f, c, layout in LAYOUTS],
)


def tiny_names(component: ComponentSpec) -> list[str]:
    return list(module_shapes(meta_build(component, component.parse_config(component.tiny))))


def load_one(family: Family, component: ComponentSpec, folder: Path) -> dict[str, Tensor]:
    found = load_components(
        family, [ModelConfig(path=folder)], dtype=torch.float32, device=CPU, wanted=[component.name]
    )
    return found[component.name].state_dict()


def in_layout(ours: dict[str, Tensor], layout: KeyLayout, unsqueeze: bool) -> dict[str, Tensor]:
    """Our tensors under the layout's names, with the matrices that it stores as 1x1 convolutions in that shape."""
    state = {}
    for name, tensor in ours.items():
        convolution = unsqueeze and ".attentions." in name and tensor.dim() == 2
        state[layout.to_file(name)] = (tensor[..., None, None] if convolution else tensor).contiguous()
    return state


def fits(component: ComponentSpec, layout: KeyLayout) -> bool:
    """Whether the layout is for this depth: where blocks are one flat list, names tell the depth."""
    return all(layout.to_ours(layout.to_file(name)) == name for name in tiny_names(component))


@every_layout
def test_names_survive_the_round_trip_and_stay_distinct(
    family: Family, component: ComponentSpec, layout: KeyLayout
) -> None:
    names = tiny_names(component)
    there = [layout.to_file(name) for name in names]
    assert [layout.to_ours(name) for name in there] == names
    assert len(set(there)) == len(names)
    assert not any(layout.is_ignored(name) for name in there)


@every_layout
def test_weights_load_bit_for_bit_from_every_layout(
    oracle_folders: OracleFolders, family: Family, component: ComponentSpec, layout: KeyLayout, tmp_path: Path
) -> None:
    source = oracle_folders(family.spec.name.replace("-", "_"))[1] / component.folder
    expected = load_one(family, component, source)
    state = in_layout(expected, layout, unsqueeze=layout.squeezed)
    # What files of this layout also carry, and what nothing here reads.
    state |= {f"{prefix}weight": torch.full((1,), torch.nan) for prefix in layout.ignored}
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    loaded = load_one(family, component, tmp_path)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("family", "component"),
    [(family, component) for family in FAMILIES for component in family.spec.components],
    ids=lambda value: value.spec.name if hasattr(value, "spec") else value.name,
)
def test_published_files_give_the_weights_of_the_independent_model(
    oracle_folders: OracleFolders, family: Family, component: ComponentSpec
) -> None:
    pipe, folder = oracle_folders(family.spec.name.replace("-", "_"))
    loaded = load_one(family, component, folder / component.folder)
    model = getattr(pipe, component.folder)
    theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefixes = ("", "model.language_model.", "language_model.")
    for name, tensor in loaded.items():
        found = next(theirs[prefix + name] for prefix in prefixes if prefix + name in theirs)
        assert torch.equal(tensor, found), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec.name)
def test_towers_heads_and_unused_layers_are_never_read(
    oracle_folders: OracleFolders, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    right = CheckpointReader.read

    def recording(self: CheckpointReader, name: str) -> Tensor:
        read.append(name)
        return right(self, name)

    monkeypatch.setattr(CheckpointReader, "read", recording)
    component = family.spec.component("text_encoder")
    folder = oracle_folders(family.spec.name.replace("-", "_"))[1] / component.folder
    load_one(family, component, folder)
    stored = set(load_file(folder / "model.safetensors"))
    config = component.parse_config(json.loads((folder / "config.json").read_text()))
    layout = component.layouts[0]
    needless = {
        name
        for name in stored
        if layout.is_ignored(name) or (layout.to_ours(name) or "").startswith(component.unread(config) or "\0")
    }
    assert needless, "the checkpoint holds nothing that could be read needlessly"
    assert len(read) == len(set(read))
    assert set(read) == stored - needless
    last = config.num_hidden_layers - 1
    skipped = {
        "qwen-image": ("visual.", "lm_head."),
        "ernie-image": ("vision_tower.", f"language_model.model.layers.{last}."),
    }
    for prefix in skipped.get(family.spec.name, ()):
        assert any(name.startswith(prefix) for name in needless)


# Independent maps of the same layouts.


def wan_names() -> list[str]:
    """The published autoencoder in the names of the Wan repository, from the structure of that network."""
    names: list[str] = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]

    def layer(path: str, *parts: str) -> None:
        names.extend(f"{path}.{part}" for part in parts or ("weight", "bias"))

    def residual(path: str, shortcut: bool) -> None:
        for index, parts in ((0, ("gamma",)), (2, ()), (3, ("gamma",)), (6, ())):
            layer(f"{path}.residual.{index}", *parts)
        if shortcut:
            layer(f"{path}.shortcut")

    for half in ("encoder", "decoder"):
        layer(f"{half}.conv1")
        residual(f"{half}.middle.0", shortcut=False)
        layer(f"{half}.middle.1.norm", "gamma")
        layer(f"{half}.middle.1.to_qkv")
        layer(f"{half}.middle.1.proj")
        residual(f"{half}.middle.2", shortcut=False)
        layer(f"{half}.head.0", "gamma")
        layer(f"{half}.head.2")
    for index in range(11):  # residual blocks, and a downsampler at the end of all levels but the last
        if index in (2, 5, 8):
            layer(f"encoder.downsamples.{index}.resample.1")
            if index > 2:
                layer(f"encoder.downsamples.{index}.time_conv")
        else:
            residual(f"encoder.downsamples.{index}", shortcut=index in (3, 6))
    for index in range(15):
        if index in (3, 7, 11):
            layer(f"decoder.upsamples.{index}.resample.1")
            if index < 11:
                layer(f"decoder.upsamples.{index}.time_conv")
        else:
            residual(f"decoder.upsamples.{index}", shortcut=index == 4)
    return names


@pytest.mark.parametrize("layout", [qwen_keys.VAE[1], qwen_keys.VAE[3]], ids=lambda layout: layout.name)
def test_wan_names_are_mapped_as_diffusers_maps_them(layout: KeyLayout) -> None:
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
    prefix = "vae." if layout.name == "ComfyUI all-in-one" else ""
    names = wan_names()
    assert len(names) == len(set(names)) == 194
    # The converter moves tensors from name to name: a number in each tells which went where.
    theirs = convert({name: torch.tensor(index) for index, name in enumerate(names)})
    assert {layout.to_ours(prefix + name): index for index, name in enumerate(names)} == {
        name: int(tensor) for name, tensor in theirs.items()
    }
    vae = family_named("qwen-image").spec.component("vae")
    ours = set(module_shapes(meta_build(vae, vae.parse_config({}))))
    assert {layout.to_ours(prefix + name) for name in names} == ours
    assert {layout.to_file(name).removeprefix(prefix) for name in ours} == set(names)


@pytest.mark.parametrize("layout", ernie_keys.VAE[1:], ids=lambda layout: layout.name)
def test_ldm_names_are_mapped_as_diffusers_maps_them(layout: KeyLayout) -> None:
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
    vae = family_named("ernie-image").spec.component("vae")
    ours = list(module_shapes(meta_build(vae, vae.parse_config({}))))
    prefix = "vae." if layout.name == "ComfyUI all-in-one" else ""
    files = {layout.to_file(name).removeprefix(prefix): index for index, name in enumerate(ours)}
    # `quant_conv` moved into the halves for FLUX.2 and the statistics are new: that converter knows neither.
    for name in [name for name in files if "quant_conv" in name or name.startswith("bn.")]:
        assert layout.to_ours(prefix + name) == name.replace("encoder.quant", "quant").replace("decoder.post", "post")
        del files[name]
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    theirs = convert({name: torch.full((2, 2), index) for name, index in files.items()}, blocks)
    expected = {ours[index]: index for index in files.values()}
    assert {name: int(tensor.flatten()[0]) for name, tensor in theirs.items()} == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec.name)
def test_components_of_an_all_in_one_file_do_not_claim_each_others_names(family: Family) -> None:
    chosen = {
        component.name: next(layout for layout in component.layouts if layout.name.startswith("ComfyUI"))
        for component in family.spec.components
    }
    for component in family.spec.components:
        layout = chosen[component.name]
        names = {layout.to_file(name) for name in tiny_names(component) if layout.to_ours(layout.to_file(name))}
        assert names
        for other, foreign in chosen.items():
            if other != component.name:
                assert not {name for name in names if foreign.to_ours(name) or foreign.is_ignored(name)}
