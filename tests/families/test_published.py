"""Built at published size on the meta device, our components have exactly the published names, shapes and counts.

The proof is a fingerprint that a framework which read the real files ships to recognise them: the MD5 of all names and
shapes. Equal fingerprints mean that every one of the thousands of tensors is named and shaped as published.
"""

import hashlib
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from diffsynth.recognise import MemoryReader, meta_build, module_shapes, recognise
from diffsynth.registry import FAMILIES, family_named
from diffsynth.spec import ComponentSpec, Family

Shapes = dict[str, tuple[int, ...]]

FINGERPRINTS = {
    ("qwen-image", "dit"): "0319a1cb19835fb510907dd3367c95ff",
    ("qwen-image", "text_encoder"): "8004730443f55db63092006dd9f7110e",
    ("qwen-image", "vae"): "ed4ea5824d55ec3107b09815e318123a",
    ("ernie-image", "dit"): "584c13713849f1af4e03d5f1858b8b7b",
    ("ernie-image", "text_encoder"): "404ed9f40796a38dd34c1620f1920207",
    ("ernie-image", "vae"): "c54288e3ee12ca215898840682337b95",
}
TENSORS_IN_FILES = {
    ("qwen-image", "dit"): 1933,
    ("qwen-image", "text_encoder"): 729,
    ("qwen-image", "vae"): 194,
    ("ernie-image", "dit"): 409,
    ("ernie-image", "text_encoder"): 458,
    ("ernie-image", "vae"): 251,
}
ERNIE_DECODER_LAYER = 4096 * 3072 * 2 + 1024 * 3072 * 2 + 9216 * 3072 * 3 + 3072 * 2  # q and o, k and v, MLP, norms
PARAMETERS = {
    ("qwen-image", "dit"): 20_430_401_088,
    ("qwen-image", "text_encoder"): 7_070_619_136,
    ("qwen-image", "vae"): 126_892_531,
    ("ernie-image", "dit"): 8_033_490_048,
    # The whole decoder without its last layer and final norm, which nothing here depends on.
    ("ernie-image", "text_encoder"): 3_429_006_336 - ERNIE_DECODER_LAYER - 3072,
    ("ernie-image", "vae"): 84_046_115,
}
BUFFER_VALUES = {("ernie-image", "vae"): 257}
PARAMETERS_IN_FILES = {
    ("qwen-image", "text_encoder"): 8_292_166_656,
    ("ernie-image", "text_encoder"): 3_849_090_048,
}

QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
}
ERNIE_VISION = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "head_dim": 64,
    "image_size": 1540,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "silu",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


def qwen_whole_text_encoder() -> nn.Module:
    """The class that the published checkpoint was saved from: language model, vision tower and head."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from diffsynth.families.qwen_image.text import PUBLISHED

    config = Qwen2_5_VLConfig(text_config=PUBLISHED, vision_config=QWEN_VISION, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config)


def ernie_whole_text_encoder() -> nn.Module:
    from transformers import Mistral3Config, Mistral3Model

    from diffsynth.families.ernie_image.text import PUBLISHED

    config = Mistral3Config(
        text_config=PUBLISHED, vision_config=ERNIE_VISION, multimodal_projector_bias=False, spatial_merge_size=2
    )
    return Mistral3Model(config)


WHOLE_TEXT_ENCODERS = {"qwen-image": qwen_whole_text_encoder, "ernie-image": ernie_whole_text_encoder}


def published_config(family: Family, component: ComponentSpec) -> Any:
    if component.name != "text_encoder":
        return component.parse_config({})
    return meta_text_config(family.spec.name)


def meta_text_config(name: str) -> Any:
    from diffsynth.families.ernie_image import text as ernie
    from diffsynth.families.qwen_image import text as qwen

    text = {"qwen-image": qwen, "ernie-image": ernie}[name]
    return text.parse_config({"text_config": text.PUBLISHED})


def built(family: Family, component: ComponentSpec) -> nn.Module:
    return _built(family.spec.name, component.name)


@cache
def _built(family_name: str, component_name: str) -> nn.Module:
    family = family_named(family_name)
    component = family.spec.component(component_name)
    return meta_build(component, published_config(family, component))


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """MD5 over the sorted list of `name:d0_d1_...` and `name` of every tensor."""
    entries = [*shapes, *(f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items())]
    return hashlib.md5(",".join(sorted(entries)).encode()).hexdigest()


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def published_name(component: ComponentSpec, name: str) -> str:
    """The name in the published files of a tensor of the class that `transformers` builds today.

    Goes through our layouts: read by the second, written by the first; prefixes that both ignore correspond in order.
    """
    published, current = component.layouts[:2]
    if (ours := current.to_ours(name)) is not None:
        return published.to_file(ours)
    pairs = zip(current.ignored, published.ignored, strict=False)
    return next(old + name.removeprefix(new) for new, old in pairs if name.startswith(new))


def shapes_in_files(family: Family, component: ComponentSpec) -> Shapes:
    """Names and shapes of the published files as our code understands them."""
    if component.name == "text_encoder":
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            whole = WHOLE_TEXT_ENCODERS[family.spec.name]()
        return {published_name(component, name): shape for name, shape in module_shapes(whole).items()}
    module = built(family, component)
    return {component.layouts[0].to_file(name): shape for name, shape in module_shapes(module).items()}


@pytest.fixture(autouse=True)
def empty_tensors_stay_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic mode fills every new tensor with NaN: 80 GB of them for modules that pass the CPU on their way."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


every_component = pytest.mark.parametrize(
    ("family", "component"),
    [(family, component) for family in FAMILIES for component in family.spec.components],
    ids=lambda value: value.spec.name if hasattr(value, "spec") else value.name,
)


@pytest.fixture(scope="module")
def in_files() -> Any:
    made: dict[tuple[str, str], Shapes] = {}

    def get(family: Family, component: ComponentSpec) -> Shapes:
        key = family.spec.name, component.name
        if key not in made:
            made[key] = shapes_in_files(family, component)
        return dict(made[key])

    return get


@every_component
def test_names_and_shapes_are_the_published_ones(in_files: Any, family: Family, component: ComponentSpec) -> None:
    key = family.spec.name, component.name
    shapes = in_files(family, component)
    assert len(shapes) == TENSORS_IN_FILES[key]
    assert fingerprint(shapes) == FINGERPRINTS[key]


@every_component
def test_one_wrong_name_or_dimension_changes_the_fingerprint(
    in_files: Any, family: Family, component: ComponentSpec
) -> None:
    shapes = in_files(family, component)
    name = sorted(shapes)[len(shapes) // 2]
    renamed = {f"{key}_" if key == name else key: shape for key, shape in shapes.items()}
    reshaped = shapes | {name: (shapes[name][0] + 1, *shapes[name][1:])}
    missing = {key: shape for key, shape in shapes.items() if key != name}
    for wrong in (renamed, reshaped, missing):
        assert fingerprint(wrong) != FINGERPRINTS[family.spec.name, component.name]


@every_component
def test_parameter_counts(family: Family, component: ComponentSpec) -> None:
    module = built(family, component)
    parameters = dict(module.named_parameters())
    assert {parameter.device.type for parameter in parameters.values()} == {"meta"}
    key = family.spec.name, component.name
    assert sum(parameter.numel() for parameter in parameters.values()) == PARAMETERS[key]
    buffers = {name: shape for name, shape in module_shapes(module).items() if name not in parameters}
    assert count(buffers) == BUFFER_VALUES.get(key, 0)


@every_component
def test_what_is_built_and_what_is_left_out_make_up_the_files(
    in_files: Any, family: Family, component: ComponentSpec
) -> None:
    """Every tensor of the files is either a parameter of ours in the same shape, or deliberately never read."""
    shapes, layout = in_files(family, component), component.layouts[0]
    config = published_config(family, component)
    ours = {layout.to_file(name): shape for name, shape in module_shapes(built(family, component)).items()}
    assert ours == {name: shape for name, shape in shapes.items() if name in ours}
    left_out = shapes.keys() - ours.keys()
    unread = {name for name in left_out if (layout.to_ours(name) or "").startswith(component.unread(config) or "\0")}
    ignored = {name for name in left_out if layout.is_ignored(name)}
    assert left_out == unread | ignored
    if component.name != "text_encoder":
        assert not left_out
    assert count(shapes) == PARAMETERS_IN_FILES.get((family.spec.name, component.name), count(ours))


@every_component
def test_every_layout_is_recognised_without_a_config(in_files: Any, family: Family, component: ComponentSpec) -> None:
    """From names and shapes alone, in each layout, and with the published numbers."""
    config, module = published_config(family, component), built(family, component)
    # Where a layout exists for several depths (flat lists of blocks), one of them is the published one.
    fitting = [
        layout
        for layout in component.layouts
        if all(layout.to_ours(layout.to_file(name)) == name for name in module.state_dict())
    ]
    assert {layout.name for layout in fitting} == {layout.name for layout in component.layouts}
    for layout in fitting:
        state = {layout.to_file(name): tensor for name, tensor in module.state_dict().items()}
        if layout.squeezed:
            state = {
                name: tensor[..., None, None] if ".attn_1." in name and tensor.dim() == 2 else tensor
                for name, tensor in state.items()
            }
        (found,) = recognise(MemoryReader(state))
        assert found.family.spec.name == family.spec.name
        assert found.component.name == component.name
        assert found.names == {our_name: layout.to_file(our_name) for our_name in module.state_dict()}
        assert module_shapes(found.module) == module_shapes(module)
        if component.name != "text_encoder":
            assert found.config == config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec.name)
def test_all_components_in_one_file_are_recognised(family: Family) -> None:
    """The all-in-one files of ComfyUI, with the towers and heads that nothing here reads."""
    state, expected = {}, {}
    for component in family.spec.components:
        (layout,) = [layout for layout in component.layouts if layout.name.startswith("ComfyUI")][:1]
        module = built(family, component)
        expected[component.name] = set(module.state_dict())
        state |= {layout.to_file(name): tensor for name, tensor in module.state_dict().items()}
        state |= {f"{prefix}weight": next(iter(module.parameters())) for prefix in layout.ignored}
    found = recognise(MemoryReader(state))
    assert {item.component.name: set(item.names) for item in found} == expected
    assert {item.family.spec.name for item in found} == {family.spec.name}
