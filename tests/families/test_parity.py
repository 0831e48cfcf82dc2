"""Every component and the final image against an independent implementation, and errors that the comparison must see.

A parity test is worth what it would catch: beside each stands a negative control, the same comparison with one subtle
mistake put into our side, which has to miss the tolerance by far.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle_images
from torch import Tensor, nn

from diffsynth.families.ernie_image import transformer as ernie_transformer
from diffsynth.families.ernie_image import vae as ernie_vae
from diffsynth.families.qwen_image import transformer as qwen_transformer
from diffsynth.families.qwen_image import vae as qwen_vae
from diffsynth.registry import FAMILIES
from diffsynth.spec import Family

TOLERANCE = 1e-5  # of a component, relative to the largest value
IMAGE_TOLERANCE = 1e-3  # of an image in 0..1, absolute
CLEARLY = 10  # how far beyond the tolerance a mistake must land

PROMPTS = ["A cat", "一只猫坐在雪地里，远处有山。", "夕焼けの海と灯台、そして空を渡る長い長い鳥の列。"]
NEGATIVES = [" ", "blurry, low quality", "模糊"]
SIZES = [(64, 64), (48, 80)]
GRIDS = [(4, 4), (3, 5), (6, 2)]
TIMESTEPS = [500.0, 250.0, 31.25]
"""Exact as fractions of 1000, and not so large that the rounding of `timestep * frequency` in fp32 is what is compared:
it moves the sinusoids by 6e-5 near 1000, in either implementation."""
CPU = torch.device("cpu")

OracleFolders = Callable[[str], tuple[Any, Path]]
Patch = Callable[[pytest.MonkeyPatch, Any], None]
"""Puts one mistake into our side, given our pipeline."""


# What a third family adds: how its oracle is asked, and the mistakes that its parity must notice.


@dataclass(frozen=True)
class Oracle:
    """How to ask the independent pipeline of one family."""

    velocity: Callable[[Any, Tensor, Tensor, tuple[int, int], float], Tensor]
    """`(pipe, tokens [N, C], condition [M, W], grid, timestep) -> [N, C]`."""
    encode: Callable[[Any, Tensor], Tensor]
    """Pixels to normalised latents, posterior mean."""
    decode: Callable[[Any, Tensor], Tensor]
    """Normalised latents to pixels."""
    condition: Callable[[Any, str], Tensor]
    """`[M, W]` of one prompt."""
    layout: Callable[[Any, list[tuple[int, int]], list[int]], Any]
    """Our transformer's layout of samples with grids of their own."""


def qwen_velocity(pipe: Any, tokens: Tensor, condition: Tensor, grid: tuple[int, int], timestep: float) -> Tensor:
    return pipe.transformer(
        hidden_states=tokens[None],
        timestep=torch.tensor([timestep / 1000]),
        encoder_hidden_states=condition[None],
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, *grid)]],
        return_dict=False,
    )[0][0]


def qwen_statistics(pipe: Any) -> tuple[Tensor, Tensor]:
    config = pipe.vae.config
    return torch.tensor(config.latents_mean).view(1, -1, 1, 1), torch.tensor(config.latents_std).view(1, -1, 1, 1)


def qwen_encode(pipe: Any, pixels: Tensor) -> Tensor:
    mean, std = qwen_statistics(pipe)
    return (pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0] - mean) / std


def qwen_decode(pipe: Any, latents: Tensor) -> Tensor:
    mean, std = qwen_statistics(pipe)
    return pipe.vae.decode((latents * std + mean).unsqueeze(2)).sample[:, :, 0]


def qwen_condition(pipe: Any, prompt: str) -> Tensor:
    embeds, mask = pipe.encode_prompt(prompt)
    return embeds[0] if mask is None else embeds[0][mask[0].bool()]


def ernie_velocity(pipe: Any, tokens: Tensor, condition: Tensor, grid: tuple[int, int], timestep: float) -> Tensor:
    velocity = pipe.transformer(
        hidden_states=tokens.T.reshape(1, -1, *grid),
        timestep=torch.tensor([timestep]),
        text_bth=condition[None],
        text_lens=torch.tensor([len(condition)]),
        return_dict=False,
    )[0]
    return velocity[0].flatten(1).T


def ernie_statistics(pipe: Any) -> tuple[Tensor, Tensor]:
    bn = pipe.vae.bn  # with the epsilon that the ERNIE-Image pipeline uses
    return bn.running_mean.view(1, -1, 1, 1), (bn.running_var.view(1, -1, 1, 1) + 1e-5).sqrt()


def ernie_encode(pipe: Any, pixels: Tensor) -> Tensor:
    mean, std = ernie_statistics(pipe)
    return (F.pixel_unshuffle(pipe.vae.encode(pixels).latent_dist.mode(), 2) - mean) / std


def ernie_decode(pipe: Any, latents: Tensor) -> Tensor:
    mean, std = ernie_statistics(pipe)
    return pipe.vae.decode(F.pixel_shuffle(latents * std + mean, 2)).sample


ORACLES = {
    "qwen-image": Oracle(
        qwen_velocity,
        qwen_encode,
        qwen_decode,
        qwen_condition,
        lambda model, grids, lengths: model.layout(grids, lengths, CPU),
    ),
    "ernie-image": Oracle(
        ernie_velocity,
        ernie_encode,
        ernie_decode,
        lambda pipe, prompt: pipe.encode_prompt(prompt, CPU)[0],
        lambda model, grids, lengths: model.layout(grids, lengths, CPU),
    ),
}


def permuted_modulation(order: list[int]) -> Patch:
    """The six parts (shift, scale, gate, of attention and of the MLP) of every modulation in another order."""

    def patch(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
        right = ours.dit.modulation

        def wrong(timesteps: Tensor) -> Any:
            table = right(timesteps)
            width = table.out.shape[-1] // 2
            fields = {item.name: getattr(table, item.name) for item in dataclasses.fields(table)}
            return dataclasses.replace(table, **{
                name: torch.cat([rows.chunk(6, -1)[part] for part in order], -1)
                for name, rows in fields.items()
                if rows.shape[-1] == 6 * width
            })  # fmt: skip

        monkeypatch.setattr(ours.dit, "modulation", wrong)

    return patch


def wrong_output_norm(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    """Scale and shift of the last norm exchanged."""
    right = ours.dit.modulation

    def wrong(timesteps: Tensor) -> Any:
        table = right(timesteps)
        return dataclasses.replace(table, out=torch.cat(table.out.chunk(2, -1)[::-1], -1))

    monkeypatch.setattr(ours.dit, "modulation", wrong)


def qwen_erf_gelu(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    monkeypatch.setattr(qwen_transformer, "linear_gelu_tanh", lambda linear, x: F.gelu(linear(x)))


def ernie_tanh_gelu(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    def wrong(self: nn.Module, x: Tensor) -> Tensor:
        return self.linear_fc2(self.up_proj(x) * F.gelu(self.gate_proj(x), approximate="tanh"))

    monkeypatch.setattr(ernie_transformer.MLP, "forward", wrong)


def qwen_corner_rotary(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    """The image counted from its corner instead of its centre."""
    right = qwen_transformer._positions

    def wrong(rows: int, columns: int, txt_length: int) -> Tensor:
        positions = right(rows, columns, txt_length)
        positions[txt_length:, 1:] += torch.tensor([rows - rows // 2, columns - columns // 2])
        return positions

    monkeypatch.setattr(qwen_transformer, "_positions", wrong)


def ernie_transposed_rotary(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    """Rows and columns exchanged."""
    right = ernie_transformer._positions
    monkeypatch.setattr(ernie_transformer, "_positions", lambda *shape: right(*shape)[:, [0, 2, 1]])


GELU_AND_ROTARY: dict[str, dict[str, Patch]] = {
    "qwen-image": {"erf GELU": qwen_erf_gelu, "image counted from its corner": qwen_corner_rotary},
    "ernie-image": {"tanh GELU": ernie_tanh_gelu, "rows and columns swapped": ernie_transposed_rotary},
}
TRANSFORMER_MISTAKES = [
    (family, name, patch)
    for family in FAMILIES
    for name, patch in {
        "gates swapped": permuted_modulation([0, 1, 5, 3, 4, 2]),
        "shift and scale swapped": permuted_modulation([1, 0, 2, 4, 3, 5]),
        "last scale and shift swapped": wrong_output_norm,
        **GELU_AND_ROTARY[family.spec.name],
    }.items()
]


def pad_before(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Downsampling that pads at the top and left instead of at the bottom and right."""

    def forward(self: Any, x: Tensor) -> Tensor:
        conv = self.resample[1] if hasattr(self, "resample") else self.conv
        return conv(F.pad(x, (1, 0, 1, 0)))

    monkeypatch.setattr(module.Resample, "forward", forward)


def without_attention(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module.AttentionBlock, "forward", lambda self, x: x)


def qwen_first_tap(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    """The first temporal tap of the causal convolutions instead of the last."""
    monkeypatch.setattr(
        qwen_vae.FrameConv,
        "forward",
        lambda self, x: F.conv2d(x, self.weight[:, :, 0], self.bias, padding=self.kernel_size[-1] // 2),
    )


def batch_norm_epsilon_of_the_hub_config(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    monkeypatch.setattr(ernie_vae, "BATCH_NORM_EPS", 1e-4)


VAE_MISTAKES: list[tuple[str, str, str, Patch]] = [
    ("qwen-image", "encode", "padded before", lambda patch, ours: pad_before(patch, qwen_vae)),
    ("qwen-image", "encode", "no attention", lambda patch, ours: without_attention(patch, qwen_vae)),
    ("qwen-image", "encode", "first temporal tap", qwen_first_tap),
    ("qwen-image", "decode", "no attention", lambda patch, ours: without_attention(patch, qwen_vae)),
    ("qwen-image", "decode", "first temporal tap", qwen_first_tap),
    ("ernie-image", "encode", "padded before", lambda patch, ours: pad_before(patch, ernie_vae)),
    ("ernie-image", "encode", "no attention", lambda patch, ours: without_attention(patch, ernie_vae)),
    ("ernie-image", "encode", "epsilon 1e-4", batch_norm_epsilon_of_the_hub_config),
    ("ernie-image", "decode", "no attention", lambda patch, ours: without_attention(patch, ernie_vae)),
    ("ernie-image", "decode", "epsilon 1e-4", batch_norm_epsilon_of_the_hub_config),
]


def one_layer_fewer(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    monkeypatch.setitem(ours.text_encoder._modules, "layers", ours.text_encoder.layers[:-1])


def last_norm_switched(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    """No final norm where there is one, and one where there is none."""
    norm = nn.Identity() if hasattr(ours.text_encoder.norm, "weight") else ernie_transformer.RMSNorm(32)
    monkeypatch.setitem(ours.text_encoder._modules, "norm", norm)


def other_sigma_for_images(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    monkeypatch.setattr(ours, "scheduler", dataclasses.replace(ours.scheduler, shift=2.9, mu_line=None))


# The comparison itself.


@pytest.fixture(scope="module")
def pipelines(oracle_folders: OracleFolders) -> Callable[[Family], tuple[Any, Any, Oracle]]:
    """`pipelines(family)` -> (our pipeline, the independent one, how to ask it), made once per family."""
    made: dict[str, Any] = {}

    def get(family: Family) -> tuple[Any, Any, Oracle]:
        name = family.spec.name
        independent, folder = oracle_folders(name.replace("-", "_"))
        if name not in made:
            module, cls = family.spec.pipeline.split(":")
            pipeline = getattr(importlib.import_module(module), cls)
            made[name] = pipeline.from_folder(folder, torch_dtype=torch.float32, device="cpu")
        return made[name], independent, ORACLES[name]

    return get


Pipelines = Callable[[Family], tuple[Any, Any, Oracle]]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.spec.name)
autograd = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "autograd"])


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    found = (ours - theirs).abs().max().item()
    print(f"largest difference {found:.1e} of {theirs.abs().max().item():.2g}")  # `pytest -rP` shows it
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    return difference(ours.detach().float(), theirs) / theirs.abs().max().item()


@dataclass
class Samples:
    """Noisy tokens, conditions and grids of some images; no two have the same shape."""

    tokens: list[Tensor]
    conditions: list[Tensor]
    grids: list[tuple[int, int]]

    @classmethod
    def draw(cls, family: Family, ours: Any, chosen: slice = slice(None)) -> "Samples":
        generator = torch.Generator().manual_seed(7)
        shapes = [family.latent_shape(rows * 16, columns * 16) for rows, columns in GRIDS]
        tokens = [family.pack(torch.randn(1, *shape, generator=generator))[0] for shape in shapes]
        conditions = ours.encode_prompt(PROMPTS)
        assert len({len(condition) for condition in conditions}) == len(PROMPTS)
        return cls(tokens[chosen], conditions[chosen], GRIDS[chosen])

    def ours(self, pipe: Any, oracle: Oracle, timesteps: list[float]) -> Tensor:
        """Velocity of all samples from one pass, with a row of the modulation for each or one for all."""
        layout = oracle.layout(pipe.dit, self.grids, [len(condition) for condition in self.conditions])
        table = pipe.dit.modulation(torch.tensor(timesteps))
        return pipe.dit(torch.cat(self.tokens), pipe.dit.project_text(torch.cat(self.conditions)), table, layout)

    def theirs(self, pipe: Any, oracle: Oracle, timesteps: list[float]) -> Tensor:
        """The same, sample by sample."""
        timesteps = timesteps * (len(self.tokens) // len(timesteps))
        samples = zip(self.tokens, self.conditions, self.grids, timesteps, strict=True)
        return torch.cat([oracle.velocity(pipe, *sample) for sample in samples])


@every_family
@autograd
@pytest.mark.parametrize("timesteps", [TIMESTEPS[:1], TIMESTEPS], ids=["one timestep", "a timestep each"])
def test_transformer_on_packed_samples_of_unequal_shape(
    pipelines: Pipelines, family: Family, gradients: bool, timesteps: list[float]
) -> None:
    ours, theirs, oracle = pipelines(family)
    samples = Samples.draw(family, ours)
    with torch.set_grad_enabled(gradients):
        error = relative(samples.ours(ours, oracle, timesteps), samples.theirs(theirs, oracle, timesteps).detach())
    assert error <= TOLERANCE


@every_family
@pytest.mark.parametrize("index", range(3), ids=lambda index: "{}x{}".format(*GRIDS[index]))
def test_transformer_on_a_single_sample(pipelines: Pipelines, family: Family, index: int) -> None:
    ours, theirs, oracle = pipelines(family)
    samples = Samples.draw(family, ours, slice(index, index + 1))
    with torch.no_grad():
        error = relative(samples.ours(ours, oracle, [500.0]), samples.theirs(theirs, oracle, [500.0]))
    assert error <= TOLERANCE


@every_family
def test_transformer_in_chunks(pipelines: Pipelines, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long inputs pass the MLP and the rotary embedding in pieces; here even short ones do."""
    ours, theirs, oracle = pipelines(family)
    monkeypatch.setattr(importlib.import_module(type(ours.dit).__module__), "_MLP_CHUNK", 5)
    monkeypatch.setattr("diffsynth.ops.rope._CHUNK", 7)
    samples = Samples.draw(family, ours)
    with torch.no_grad():
        error = relative(samples.ours(ours, oracle, TIMESTEPS), samples.theirs(theirs, oracle, TIMESTEPS))
    assert error <= TOLERANCE


@every_family
def test_gradients_of_the_transformer(pipelines: Pipelines, family: Family) -> None:
    """What training needs: the derivative of a loss with respect to tokens and conditions."""
    ours, theirs, oracle = pipelines(family)
    found = []
    for pipe, velocity in ((ours, Samples.ours), (theirs, Samples.theirs)):
        samples = Samples.draw(family, ours)
        inputs = [*samples.tokens, *samples.conditions]
        for tensor in inputs:
            tensor.requires_grad_()
        velocity(samples, pipe, oracle, TIMESTEPS).square().sum().backward()
        found.append([tensor.grad for tensor in inputs])
    errors = [relative(mine, other) for mine, other in zip(*found, strict=True)]
    assert max(errors) <= 10 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "patch"),
    [pytest.param(family, patch, id=f"{family.spec.name}-{name}") for family, name, patch in TRANSFORMER_MISTAKES],
)
@autograd
def test_a_mistake_in_the_transformer_is_noticed(
    pipelines: Pipelines,
    family: Family,
    patch: Patch,
    gradients: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs, oracle = pipelines(family)
    samples = Samples.draw(family, ours)
    patch(monkeypatch, ours)
    with torch.set_grad_enabled(gradients):
        error = relative(samples.ours(ours, oracle, TIMESTEPS), samples.theirs(theirs, oracle, TIMESTEPS).detach())
    assert error > CLEARLY * TOLERANCE


@every_family
@pytest.mark.parametrize("mistake", ["texts of two samples exchanged", "words backwards"])
def test_the_order_of_texts_counts(
    pipelines: Pipelines, family: Family, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, oracle = pipelines(family)
    samples = Samples.draw(family, ours)
    first, second, third = samples.conditions
    wrong = [second, first, third] if "exchanged" in mistake else [first.flip(0), second.flip(0), third.flip(0)]
    with torch.no_grad():
        velocity = dataclasses.replace(samples, conditions=wrong).ours(ours, oracle, TIMESTEPS)
        error = relative(velocity, samples.theirs(theirs, oracle, TIMESTEPS))
    assert error > CLEARLY * TOLERANCE


def vae_errors(family: Family, pipes: tuple[Any, Any, Oracle], height: int, width: int, way: str) -> float:
    """Relative difference of encoding or decoding two images of one size."""
    ours, theirs, oracle = pipes
    generator = torch.Generator().manual_seed(11)
    if way == "encode":
        pixels = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
        return relative(family.encode_image(ours.vae, pixels), oracle.encode(theirs, pixels).detach())
    latents = torch.randn(2, *family.latent_shape(height, width), generator=generator)
    # Compared inside the range of a picture: what lies beyond it, one side clamps and the other does not yet.
    return relative(family.decode(ours.vae, latents).clamp(-1, 1), oracle.decode(theirs, latents).detach().clamp(-1, 1))


@every_family
@autograd
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_autoencoder(pipelines: Pipelines, family: Family, way: str, height: int, width: int, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        error = vae_errors(family, pipelines(family), height, width, way)
    assert error <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "way", "patch"),
    [
        pytest.param(family, way, patch, id=f"{name}-{way}-{mistake}")
        for family in FAMILIES
        for name, way, mistake, patch in VAE_MISTAKES
        if name == family.spec.name
    ],
)
def test_a_mistake_in_the_autoencoder_is_noticed(
    pipelines: Pipelines, family: Family, way: str, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch, pipelines(family)[0])
    with torch.no_grad():
        error = vae_errors(family, pipelines(family), 48, 80, way)
    assert error > CLEARLY * TOLERANCE


@every_family
@pytest.mark.parametrize("prompt", [*PROMPTS, "", " ", "{curly} <|im_start|> </s>\n\tend"], ids=ascii)
def test_text_encoder(pipelines: Pipelines, family: Family, prompt: str) -> None:
    ours, theirs, oracle = pipelines(family)
    with torch.no_grad():
        error = relative(ours.encode_prompt(prompt)[0], oracle.condition(theirs, prompt))
    assert error <= TOLERANCE


@every_family
@pytest.mark.parametrize("patch", [one_layer_fewer, last_norm_switched])
def test_a_mistake_in_the_text_encoder_is_noticed(
    pipelines: Pipelines, family: Family, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, oracle = pipelines(family)
    patch(monkeypatch, ours)
    with torch.no_grad():
        error = relative(ours.encode_prompt(PROMPTS[1])[0], oracle.condition(theirs, PROMPTS[1]))
    assert error > CLEARLY * TOLERANCE


RUN: dict[str, Any] = {"height": 48, "width": 80, "num_inference_steps": 6, "cfg_scale": 4.0}


def our_images(ours: Any, prompts: list[str], negatives: list[str], **arguments: Any) -> Tensor:
    settings = RUN | {"seed": list(range(len(prompts))), "batch_size": 3} | arguments
    pixels = ours(
        prompts, negatives, rand_device="cpu", output_type="pt", progress_bar_cmd=lambda steps: steps, **settings
    )
    return (pixels + 1) / 2


def their_images(theirs: Any, prompts: list[str], negatives: list[str], height: int, width: int) -> Tensor:
    seeds = range(len(prompts))
    return oracle_images(theirs, prompts, negatives, height=height, width=width, steps=6, cfg=4.0, seeds=seeds)


@every_family
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("negatives", [NEGATIVES, [""] * 3, [" "] * 3], ids=["negatives", "empty", "space"])
def test_final_images_of_a_guided_run(
    pipelines: Pipelines,
    family: Family,
    negatives: list[str],
    height: int,
    width: int,
    batch_size: int,
) -> None:
    ours, theirs, _ = pipelines(family)
    images = our_images(ours, PROMPTS, negatives, height=height, width=width, batch_size=batch_size)
    error = difference(images, their_images(theirs, PROMPTS, negatives, height, width))
    assert error <= IMAGE_TOLERANCE


@pytest.mark.parametrize(
    ("family", "patch"),
    [
        # Not the wrong GELU: the two differ by 5e-4 at most, which takes the transformer's tighter tolerance to see.
        *(
            pytest.param(family, patch, id=f"{family.spec.name}-{name}")
            for family, name, patch in TRANSFORMER_MISTAKES
            if "GELU" not in name
        ),
        *(pytest.param(family, other_sigma_for_images, id=f"{family.spec.name}-other shift") for family in FAMILIES),
    ],
)
def test_a_mistake_shows_in_the_final_images(
    pipelines: Pipelines, family: Family, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, _ = pipelines(family)
    patch(monkeypatch, ours)
    error = difference(our_images(ours, PROMPTS, NEGATIVES), their_images(theirs, PROMPTS, NEGATIVES, 48, 80))
    assert error > CLEARLY * IMAGE_TOLERANCE


@every_family
@pytest.mark.parametrize("mistake", ["prompts exchanged", "negatives exchanged", "other guidance", "other seeds"])
def test_a_request_taken_wrongly_shows_in_the_final_images(pipelines: Pipelines, family: Family, mistake: str) -> None:
    ours, theirs, _ = pipelines(family)
    images = {
        "prompts exchanged": lambda: our_images(ours, PROMPTS[::-1], NEGATIVES),
        "negatives exchanged": lambda: our_images(ours, PROMPTS, NEGATIVES[::-1]),
        "other guidance": lambda: our_images(ours, PROMPTS, NEGATIVES, cfg_scale=3.9),
        "other seeds": lambda: our_images(ours, PROMPTS, NEGATIVES, seed=[3, 4, 5]),
    }[mistake]()
    error = difference(images, their_images(theirs, PROMPTS, NEGATIVES, 48, 80))
    assert error > CLEARLY * IMAGE_TOLERANCE


def test_guidance_without_normalisation_shows_in_the_images_of_qwen_image(pipelines: Pipelines) -> None:
    family = next(family for family in FAMILIES if family.spec.name == "qwen-image")
    ours, theirs, _ = pipelines(family)
    images = our_images(ours, PROMPTS, NEGATIVES, cfg_normalize=False)
    error = difference(images, their_images(theirs, PROMPTS, NEGATIVES, 48, 80))
    assert error > CLEARLY * IMAGE_TOLERANCE
