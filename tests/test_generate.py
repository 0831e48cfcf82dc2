"""What a caller of a pipeline is promised, for every family: seeds, batches, callbacks, image-to-image, refusals."""

import importlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffsynth.generate import Step, finite_float, image_side, one_per_image, positive_int, seeds_per_image
from diffsynth.ops.tiling import tile_starts
from diffsynth.registry import FAMILIES, family_named
from diffsynth.runtime.errors import GenerationCancelled, InvalidInputError, NonFiniteError
from diffsynth.spec import Family

OracleFolders = Callable[[str], tuple[Any, Path]]
Make = Callable[..., Tensor]

PROMPTS = ["A cat", "一只猫坐在雪地里，远处有山。", "夕焼けの海"]


def pipeline_class(family: Family) -> Any:
    module, name = family.spec.pipeline.split(":")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def loaded(oracle_folders: OracleFolders) -> Callable[[Family], Any]:
    made: dict[str, Any] = {}

    def get(family: Family) -> Any:
        if family.spec.name not in made:
            folder = oracle_folders(family.spec.name.replace("-", "_"))[1]
            made[family.spec.name] = pipeline_class(family).from_folder(folder, torch_dtype=torch.float32, device="cpu")
        return made[family.spec.name]

    return get


@pytest.fixture(params=FAMILIES, ids=lambda family: family.spec.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def pipe(loaded: Callable[[Family], Any], family: Family) -> Any:
    return loaded(family)


@pytest.fixture
def make(pipe: Any) -> Make:
    """Pixels of a small run, `[images, 3, H, W]` in -1..1."""
    defaults = {"height": 48, "width": 80, "num_inference_steps": 2, "cfg_scale": 4.0, "seed": 0, "rand_device": "cpu"}

    def run(prompt: Any = "A cat", negative_prompt: Any = "blurry", **arguments: Any) -> Tensor:
        settings = {"output_type": "pt", "progress_bar_cmd": lambda steps: steps} | defaults | arguments
        return pipe(prompt, negative_prompt, **settings)

    return run


@pytest.fixture
def picture() -> Image.Image:
    """Smooth, with edges, in every colour, and not square."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 80), indexing="ij")
    pixels = torch.stack([x, y, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()], dim=-1)
    return Image.fromarray((pixels * 255).round().byte().numpy())


def pixels_of(picture: Image.Image) -> Tensor:
    width, height = picture.size
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return data.permute(2, 0, 1)[None].float() / 127.5 - 1


# Seeds and batches


def test_an_image_of_a_list_is_the_image_made_alone(make: Make) -> None:
    together = make(PROMPTS, ["", "blurry", "模糊"], seed=[5, 6, 7])
    for index, negative in enumerate(["", "blurry", "模糊"]):
        alone = make(PROMPTS[index], negative, seed=5 + index)
        assert torch.equal(together[index], alone[0])


def test_images_of_one_pass_are_the_images_made_alone(make: Make) -> None:
    together = make(PROMPTS, seed=[5, 6, 7], batch_size=3)
    alone = make(PROMPTS, seed=[5, 6, 7], batch_size=1)
    assert (together - alone).abs().max() <= 1e-5
    uneven = make(PROMPTS, seed=[5, 6, 7], batch_size=2)
    assert (uneven - alone).abs().max() <= 1e-5


def test_the_same_request_twice_is_the_same_image(make: Make) -> None:
    assert torch.equal(make(PROMPTS, batch_size=3), make(PROMPTS, batch_size=3))


def test_a_request_does_not_depend_on_earlier_ones(make: Make) -> None:
    first = make()
    make(PROMPTS[1], seed=9, height=64, width=64, num_inference_steps=3)
    torch.rand(3)  # nor on the global generator
    assert torch.equal(make(), first)


def test_a_single_seed_counts_up_from_image_to_image(make: Make) -> None:
    counted = make(PROMPTS[:2], seed=3, num_images_per_prompt=2)
    listed = make([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, seed=[3, 4, 5, 6])
    assert counted.shape[0] == 4
    assert torch.equal(counted, listed)


def test_no_seed_is_another_image_each_time(make: Make) -> None:
    assert not torch.equal(make(seed=None), make(seed=None))


def test_images_come_in_the_number_asked_for(make: Make) -> None:
    assert isinstance(make(output_type="pil"), Image.Image)
    several = make(output_type="pil", num_images_per_prompt=2)
    assert [image.size for image in several] == [(80, 48)] * 2
    assert [image.size for image in make(["one"], output_type="pil")] == [(80, 48)]


def test_embeddings_made_before_give_the_same_image(pipe: Any, make: Make) -> None:
    positive, negative = pipe.encode_prompt("A cat"), pipe.encode_prompt("blurry")
    again = make("", "", prompt_embeds=positive[0], negative_prompt_embeds=negative[0])
    assert torch.equal(again, make("A cat", "blurry"))


# Progress


def test_the_callback_sees_every_step_of_every_image(make: Make, family: Family) -> None:
    seen: list[Step] = []
    make(PROMPTS, num_inference_steps=3, batch_size=2, callback=seen.append)
    assert [(step.first_image, step.index) for step in seen] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    assert {step.total for step in seen} == {3}
    assert seen[2].sigma == seen[5].sigma == 0
    assert seen[0].sigma > seen[1].sigma > 0
    assert [step.latents.shape[0] for step in seen] == [2, 2, 2, 1, 1, 1]
    assert seen[0].latents.shape[1:] == family.latent_shape(48, 80)


def test_the_callback_can_stop_the_run(make: Make) -> None:
    seen: list[int] = []

    def stop(step: Step) -> bool:
        seen.append(step.index)
        return step.index < 1

    with pytest.raises(GenerationCancelled, match="step 2 of 5"):
        make(num_inference_steps=5, callback=stop)
    assert seen == [0, 1]


def test_the_callback_does_not_change_the_image(make: Make) -> None:
    assert torch.equal(make(callback=lambda step: None), make())


def test_the_progress_bar_wraps_the_steps(make: Make) -> None:
    lengths: list[int] = []

    def bar(steps: Any) -> Any:
        lengths.append(len(steps))
        return steps

    make(num_inference_steps=3, progress_bar_cmd=bar)
    assert lengths == [3]


def test_one_step_is_enough(make: Make) -> None:
    image = make(num_inference_steps=1)
    assert image.isfinite().all()
    assert image.std() > 0


# Guidance


@pytest.mark.parametrize(("scale", "sequences"), [(1.0, 2), (0.0, 2), (4.0, 4)])
def test_without_guidance_only_one_branch_runs(
    pipe: Any, make: Make, monkeypatch: pytest.MonkeyPatch, scale: float, sequences: int
) -> None:
    seen: list[int] = []
    texts: list[str] = []
    right, encode = pipe.dit.forward, pipe.family.encode_prompt

    def counting(img: Tensor, txt: Tensor, modulation: Any, layout: Any) -> Tensor:
        seen.append(len(layout.packing.lengths))
        return right(img, txt, modulation, layout)

    def recording(encoder: Any, tokenizer: Any, prompt: str) -> Tensor:
        texts.append(prompt)
        return encode(encoder, tokenizer, prompt)

    monkeypatch.setattr(pipe.dit, "forward", counting)
    monkeypatch.setattr(pipe.family, "encode_prompt", recording)
    make(["a", "b"], "bad", cfg_scale=scale, batch_size=2)
    assert seen == [sequences] * 2  # one pass a step, whatever the guidance
    assert texts == (["a", "b", "bad"] if scale > 1 else ["a", "b"])


def test_without_guidance_the_negative_prompt_has_no_effect_and_says_so(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        image = make("A cat", "blurry", cfg_scale=1.0)
    assert "negative_prompt has no effect" in caplog.text
    assert torch.equal(image, make("A cat", "", cfg_scale=1.0))


# Image-to-image


def test_strength_0_is_the_round_trip_through_the_autoencoder(
    pipe: Any, make: Make, family: Family, picture: Image.Image
) -> None:
    image = make(input_image=picture, denoising_strength=0.0)
    with torch.no_grad():
        expected = family.decode(pipe.vae, family.encode_image(pipe.vae, pixels_of(picture)))
    torch.testing.assert_close(image, expected.clamp(-1, 1), atol=1e-6, rtol=0)


def test_strength_1_ignores_the_image(make: Make, picture: Image.Image) -> None:
    assert torch.equal(make(input_image=picture, denoising_strength=1.0), make())


def test_more_strength_leads_further_away(make: Make, picture: Image.Image) -> None:
    latents = [
        make(input_image=picture, denoising_strength=strength, num_inference_steps=4, output_type="latent")
        for strength in (0.0, 0.1, 0.4, 0.9)
    ]
    away = [(latent - latents[0]).abs().mean().item() for latent in latents]
    assert away == sorted(away)
    assert away[1] > 0


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_image_to_image_starts_from_the_mix_and_makes_every_step(
    pipe: Any, make: Make, family: Family, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    inputs: list[Tensor] = []
    right = pipe.dit.forward

    def recording(img: Tensor, *rest: Any) -> Tensor:
        inputs.append(img.clone())
        return right(img, *rest)

    monkeypatch.setattr(pipe.dit, "forward", recording)
    make(input_image=picture, denoising_strength=strength, num_inference_steps=5, cfg_scale=1.0)
    assert len(inputs) == 5
    sigma = pipe.scheduler.sigmas(5, 3 * 5, strength)[0]
    drawn = torch.randn(1, *family.latent_shape(48, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = family.encode_image(pipe.vae, pixels_of(picture))
    expected = family.pack((1 - sigma) * clean + sigma * drawn)[0]
    torch.testing.assert_close(inputs[0], expected, atol=1e-6, rtol=0)


def test_image_to_image_of_qwen_image_at_1024_pixels_has_the_known_schedule() -> None:
    sigmas = family_named("qwen-image").spec.scheduler.sigmas(10, 4096, 0.6)
    assert len(sigmas) == 11
    assert sigmas[0].item() == pytest.approx(0.7238, abs=1e-4)
    assert sigmas[1].item() == pytest.approx(0.67, abs=5e-3)
    assert sigmas[9].item() == pytest.approx(0.02, abs=1e-6)
    assert sigmas[10] == 0


def test_an_image_of_another_size_is_fitted(make: Make, picture: Image.Image) -> None:
    image = make(input_image=picture.resize((300, 200)), denoising_strength=0.3)
    assert image.shape == (1, 3, 48, 80)


# Tiles


@pytest.mark.parametrize(("size", "stride"), [(10, 5), (16, 16), (1000, 1)])
def test_a_tile_larger_than_the_image_changes_nothing(make: Make, picture: Image.Image, size: int, stride: int) -> None:
    arguments = {"input_image": picture, "denoising_strength": 0.5}
    tiled = make(tiled=True, tile_size=size, tile_stride=stride, **arguments)
    assert torch.equal(tiled, make(**arguments))


def tiled_and_whole(family: Family, pipe: Any, way: str, size: int, stride: int) -> tuple[Tensor, Tensor]:
    from diffsynth.generate import Components, Request, Tiling, decode, encode_image
    from diffsynth.spec import Guidance

    components = Components(pipe.dit, pipe.text_encoder, pipe.vae, pipe.tokenizer)
    height, width = 160, 224
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    pixels = torch.stack([x, y, torch.sin(3 * x * y)])[None]

    def request(tiling: Tiling | None) -> Request:
        return Request([], [], [0], height, width, 1, Guidance(), pipe.scheduler, image=pixels, tiling=tiling)

    tiling = Tiling(size, stride)
    with torch.no_grad():
        whole = encode_image(family, components, request(None))
        if way == "encode":
            return encode_image(family, components, request(tiling)), whole
        return decode(family, pipe.vae, whole, tiling), decode(family, pipe.vae, whole)


@pytest.fixture
def local_autoencoder(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention and group statistics, which look at the whole tile, the network sees a neighbourhood only.

    With random weights those two make any cut visible everywhere; trained ones are far less sensitive.
    """

    def without_statistics(self: nn.GroupNorm, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    monkeypatch.setattr(nn.GroupNorm, "forward", without_statistics)
    for module in pipe.vae.modules():
        if type(module).__name__ == "AttentionBlock":
            monkeypatch.setattr(type(module), "forward", lambda self, x: x)


@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize(("size", "stride"), [(16, 8), (12, 6), (14, 10), (9, 9), (8, 3), (1, 1)])
def test_any_tiling_gives_a_whole_image(pipe: Any, family: Family, way: str, size: int, stride: int) -> None:
    tiled, whole = tiled_and_whole(family, pipe, way, size, stride)
    assert tiled.shape == whole.shape
    assert tiled.isfinite().all()


@pytest.mark.usefixtures("local_autoencoder")
@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize(("size", "stride"), [(20, 4), (18, 9), (18, 16)])
def test_tiles_are_close_to_the_whole(pipe: Any, family: Family, way: str, size: int, stride: int) -> None:
    tiled, whole = tiled_and_whole(family, pipe, way, size, stride)
    error = (tiled - whole).square().mean().sqrt() / whole.std()
    print(f"relative error {error:.3f}")
    assert error < 0.3  # a tile in the wrong place would make it 1.4


@pytest.mark.usefixtures("local_autoencoder")
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_tiles_are_the_whole_where_no_seam_is_near(pipe: Any, family: Family, way: str) -> None:
    tiled, whole = tiled_and_whole(family, pipe, way, 24, 22)
    assert tile_starts(160, 24 * 8, 22 * 8) == [0]
    assert tile_starts(224, 24 * 8, 22 * 8) == [0, 32]
    corner = (..., slice(None), slice(0, tiled.shape[-1] * 16 // 224))
    scale = whole.abs().max()
    torch.testing.assert_close(tiled[corner] / scale, whole[corner] / scale, atol=1e-5, rtol=0)
    assert (tiled - whole).abs().max() / scale > 1e-4  # it was cut somewhere


# Sizes and refusals


def test_sizes_are_rounded_up_with_a_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        image = make(height=33, width=65)
    assert image.shape == (1, 3, 48, 80)
    assert "height=33" in caplog.text
    assert "48" in caplog.text
    assert "width=65" in caplog.text
    assert torch.equal(image, make(height=48, width=80))


def test_weights_that_are_nan_give_an_error_and_no_image(pipe: Any, make: Make) -> None:
    for component in (pipe.dit, pipe.text_encoder, pipe.vae):
        weight = max(component.parameters(), key=lambda parameter: parameter.numel())
        if component is pipe.vae:
            weight = component.post_quant_conv.weight
        kept = weight.detach().clone()
        weight.fill_(math.nan)
        try:
            with pytest.raises(NonFiniteError, match="NaN or infinity"):
                make()
        finally:
            weight.copy_(kept)
    make()


class Untouchable:
    """Stands for weights: whoever looks at them fails."""

    def __getattr__(self, name: str) -> Any:
        pytest.fail(f"{name} of a component was asked for before the arguments were checked")

    __call__ = __getattr__


INVALID: list[tuple[str, Any, str]] = [
    ("height", 0, "height=0"),
    ("height", -16, "height=-16"),
    ("width", "512", "width='512'"),
    ("width", 512.0, "width=512.0"),
    ("width", None, "width=None"),
    ("height", True, "height=True"),
    ("num_inference_steps", 0, "num_inference_steps=0"),
    ("num_inference_steps", -3, "num_inference_steps=-3"),
    ("num_inference_steps", 2.5, "num_inference_steps=2.5"),
    ("cfg_scale", math.nan, "cfg_scale=nan"),
    ("cfg_scale", math.inf, "cfg_scale=inf"),
    ("cfg_scale", -1, "cfg_scale=-1"),
    ("cfg_scale", "4", "cfg_scale='4'"),
    ("denoising_strength", 1.5, "denoising_strength=1.5"),
    ("denoising_strength", -0.1, "denoising_strength=-0.1"),
    ("denoising_strength", math.nan, "denoising_strength=nan"),
    ("seed", "0", "seed='0'"),
    ("seed", 1.5, "seed=1.5"),
    ("seed", [1, 2, 3], "seed has 3 entries"),
    ("seed", [1, None], "seed=None|seed has 2"),
    ("num_images_per_prompt", 0, "num_images_per_prompt=0"),
    ("batch_size", 0, "batch_size=0"),
    ("negative_prompt", ["a", "b", "c"], "negative_prompt has 3 entries"),
    ("negative_prompt", 5, "negative_prompt=5"),
    ("prompt", [], "prompt="),
    ("prompt", 5, "prompt=5"),
    ("prompt", ["a", 5], "prompt="),
    ("prompt", None, "prompt=None"),
    ("prompt_embeds", torch.zeros(2, 3), "prompt and prompt_embeds are both given"),
    ("output_type", "png", "output_type='png'"),
    ("callback", 5, "callback=5"),
    ("progress_bar_cmd", 5, "progress_bar_cmd=5"),
    ("rand_device", "gpu", "rand_device='gpu'"),
    ("tile_size", 0, "tile_size=0"),
    ("tile_stride", 0, "tile_stride=0"),
    ("tile_stride", 200, "tile_stride=200 must be at most tile_size=128"),
    ("tile_size", "big", "tile_size='big'"),
    ("input_image", 5, "input_image=5"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), INVALID, ids=[f"{name}={str(value)[:20]}" for name, value, _ in INVALID]
)
def test_a_value_that_cannot_be_meant_is_named_before_any_weight_is_touched(
    family: Family, name: str, value: Any, message: str
) -> None:
    pipe = pipeline_class(family)(device="cpu", torch_dtype=torch.float32)
    pipe.dit = pipe.text_encoder = pipe.vae = pipe.tokenizer = Untouchable()
    arguments = {"prompt": ["a", "b"], "num_inference_steps": 1, "cfg_scale": 4.0, "rand_device": "cpu", "tiled": True}
    with pytest.raises(InvalidInputError, match=message):
        pipe(**arguments | {name: value})


@pytest.mark.parametrize("component", ["dit", "text_encoder", "vae", "tokenizer"])
def test_a_component_that_was_not_loaded_is_named(loaded: Any, family: Family, component: str) -> None:
    pipe = pipeline_class(family)(device="cpu", torch_dtype=torch.float32)
    whole = loaded(family)
    for name in {"dit", "text_encoder", "vae", "tokenizer"} - {component}:
        setattr(pipe, name, getattr(whole, name))
    with pytest.raises(InvalidInputError, match=component):
        pipe("a", height=16, width=16, num_inference_steps=1, rand_device="cpu", progress_bar_cmd=iter)


def test_the_checks_themselves() -> None:
    assert positive_int("n", 1) == 1
    assert finite_float("x", 1) == 1.0
    assert isinstance(finite_float("x", 1), float)
    assert image_side("height", 1) == 16
    assert image_side("height", 1024) == 1024
    assert one_per_image("n", "x", 4, 2) == ["x"] * 4
    assert one_per_image("n", ["x", "y"], 4, 2) == ["x", "x", "y", "y"]
    assert one_per_image("n", list("abcd"), 4, 2) == list("abcd")
    assert seeds_per_image(7, 3) == [7, 8, 9]
    first, second = seeds_per_image(None, 2)
    assert second == first + 1
    assert seeds_per_image(None, 1) != [first]
    assert seeds_per_image([1, 1], 2) == [1, 1]
