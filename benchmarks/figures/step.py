"""Seconds of one guided denoising step: the part of a run that is repeated.

Ours is a turn of the loop in `diffsynth.generate.denoise`. What ours does once per run (positions, text projections,
the modulation of all steps) diffusers does anew in every step; the compared number carries a share of it as in a run
of `STEPS` steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Comparison, Figure, Samples, checked_difference, time_in_turns
from benchmarks.figures import Options
from benchmarks.peers import ERNIE_IMAGE, GUIDANCE, QWEN_IMAGE, Peer, pair
from diffsynth.families.ernie_image.transformer import TransformerConfig as ErnieConfig
from diffsynth.families.qwen_image.transformer import TransformerConfig as QwenConfig
from diffsynth.sampling.guidance import classifier_free
from diffsynth.sampling.solvers import euler_step
from diffsynth.spec import Sampler

STEPS = 20
MEASURED_STEP = 7
"""Any step is as long as any other; this one has sigmas that are neither 0 nor 1."""
PIXELS_PER_TOKEN = 16
POSITIVE_TOKENS, NEGATIVE_TOKENS = 20, 5
"""A short prompt and an empty negative one, as they come in practice: of unequal length."""
TARGETS = {8: 1.6, 16: 1.35, 32: 1.15}
ROUNDS = {8: 40, 16: 20, 32: 10}
DIFFERENCE = 1e-4
"""Of the step's update, relative, in fp32; guidance magnifies the rounding of the two forwards."""

SMALL: dict[str, Any] = {
    "qwen-image": QwenConfig(
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        axes_dims_rope=(8, 28, 28),
    ),
    "ernie-image": ErnieConfig(
        hidden_size=512,
        num_attention_heads=8,
        num_layers=8,
        ffn_hidden_size=1536,
        text_in_dim=384,
        rope_axes_dim=(16, 24, 24),
    ),
}
"""8 layers of width 512, otherwise as published."""


@dataclass(frozen=True)
class Run:
    """One image and two prompts, the same for both sides."""

    peer: Peer
    grid: tuple[int, int]
    positive: Tensor
    negative: Tensor
    latents: Tensor
    sigmas: Tensor

    @classmethod
    def random(
        cls,
        peer: Peer,
        grid: tuple[int, int],
        text_width: int,
        lengths: Sequence[int] = (POSITIVE_TOKENS, NEGATIVE_TOKENS),
        steps: int = STEPS,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Run":
        """Random conditions of the given lengths and pure noise, with the sigmas of the published schedule."""
        generator = torch.Generator().manual_seed(1)
        positive, negative = (torch.randn(n, text_width, generator=generator).to(device, dtype) for n in lengths)
        height, width = (side * PIXELS_PER_TOKEN for side in grid)
        latents = torch.randn(1, *peer.family.latent_shape(height, width), generator=generator).to(device)
        sigmas = peer.family.spec.scheduler.sigmas(steps, grid[0] * grid[1])
        return cls(peer, grid, positive, negative, latents, sigmas)

    @property
    def size(self) -> tuple[int, int]:
        """Pixels."""
        return self.grid[0] * PIXELS_PER_TOKEN, self.grid[1] * PIXELS_PER_TOKEN

    def prepare(self, model: nn.Module) -> Sampler:
        """What ours does once per run."""
        return self.peer.family.prepare(model, [[self.positive], [self.negative]], self.sigmas, *self.size)

    def our_step(self, sampler: Sampler, x: Tensor, step: int) -> Tensor:
        """One turn of the loop in `diffsynth.generate.denoise`, over tokens `[1, N, C]`."""
        velocity = sampler.velocity(x, step)
        guided = classifier_free(velocity[0], velocity[1], GUIDANCE, normalize=self.peer.normalize)
        x = euler_step(x, guided, self.sigmas[step], self.sigmas[step + 1])
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError("NaN or infinity in the latents")
        return x

    def tokens(self, state: Tensor) -> Tensor:
        """A state of the peer as tokens `[1, N, C]`."""
        return state if self.peer.keeps_tokens else self.peer.family.pack(state)


@torch.no_grad()
def compare(run: Run, ours: nn.Module, theirs: nn.Module, rounds: int, target: float | None) -> list[Comparison]:
    """The step with its share of the preparation, then the two parts alone."""
    sampler = run.prepare(ours)
    tokens = run.peer.family.pack(run.latents)
    state = tokens if run.peer.keeps_tokens else run.latents
    their_step = run.peer.step(theirs, run.positive, run.negative, run.grid)
    sigmas = run.sigmas[MEASURED_STEP], run.sigmas[MEASURED_STEP + 1]

    case = f"{run.peer.family.spec.title}, {run.grid[0] * run.grid[1]} image tokens"
    our_update = run.our_step(sampler, tokens, MEASURED_STEP) - tokens
    their_update = run.tokens(their_step(state, *sigmas)) - tokens
    difference = checked_difference(case, our_update, their_update, DIFFERENCE, relative=True)

    times = time_in_turns(
        {
            "theirs": lambda: their_step(state, *sigmas),
            "ours": lambda: run.our_step(sampler, tokens, MEASURED_STEP),
            "prepare": lambda: run.prepare(ours),
        },
        rounds,
    )
    step, prepare, theirs_step = times["ours"], times["prepare"], times["theirs"]
    whole = Samples(tuple(s + p / STEPS for s, p in zip(step.values, prepare.values, strict=True)))
    return [
        Comparison(f"{case}: step + 1/{STEPS} of the preparation", whole, theirs_step, at_least=target,
                   difference=difference),
        Comparison(f"{case}: step alone", step, theirs_step),
        Comparison(f"{case}: preparation, once per run", prepare),
    ]  # fmt: skip


def measure(options: Options) -> list[Figure]:
    """Both families at 64, 256 and 1024 image tokens."""
    figures = []
    for peer in (QWEN_IMAGE, ERNIE_IMAGE):
        spec = peer.family.spec
        dit = spec.component("dit")
        config = dit.parse_config(dit.tiny) if options.tiny else SMALL[spec.name]
        text_width = config.joint_attention_dim if isinstance(config, QwenConfig) else config.text_in_dim
        ours, theirs = pair(peer, "dit", config)
        comparisons: list[Comparison] = []
        for side in (4,) if options.tiny else tuple(TARGETS):
            run = Run.random(peer, (side, side), text_width)
            rounds = options.rounds(ROUNDS.get(side, 1))
            comparisons += compare(run, ours, theirs, rounds, TARGETS.get(side))
        layers = f"{config.num_layers} layers, fp32, texts of {POSITIVE_TOKENS} and {NEGATIVE_TOKENS} tokens"
        figures.append(Figure("step", f"guided step of the {spec.title} transformer, {layers}", comparisons))
    return figures
