"""Noise levels of a flow-matching run (https://arxiv.org/abs/2210.02747).

A sigma is the share of noise in `x = (1 - sigma) * clean + sigma * noise`. The functions take and return fp64 tensors
`[steps]`, falling; `FlowMatchScheduler` composes them into the fp32 list a sampler walks down, ending in 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def even_sigmas(steps: int, strength: float = 1.0) -> Tensor:
    """`steps` sigmas evenly spaced from `strength` down to just above 0.

    Args:
        steps: number of steps, at least 1.
        strength: sigma of the first step, in 0..1; less than 1 keeps part of an input image.
    """
    return torch.linspace(strength, 0.0, steps + 1, dtype=torch.float64)[:-1]


def shift_linear(sigmas: Tensor, shift: float) -> Tensor:
    """`shift * s / (1 + (shift - 1) * s)` (Eq. 23 of https://arxiv.org/abs/2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def interpolate_mu(tokens: int, base: tuple[int, float], top: tuple[int, float]) -> float:
    """Exponent `mu` (shift = exp(mu)) on the line through `base` and `top`, each `(image tokens, mu)`."""
    (x0, y0), (x1, y1) = base, top
    return y0 + (tokens - x0) * (y1 - y0) / (x1 - x0)


def stretch_to_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretch the sigmas away from 1 so that the last one is `terminal`.

    A single step has nothing to stretch: its first sigma is its last, and is kept.
    """
    if len(sigmas) < 2 or float(sigmas[-1]) >= 1.0:
        return sigmas
    rest = 1 - sigmas
    return 1 - rest * (1 - terminal) / rest[-1]


@dataclass(frozen=True)
class FlowMatchScheduler:
    """Which sigmas a model is sampled at; `dataclasses.replace` makes variants.

    Attributes:
        shift: one shift for every size, as in `shift_linear`; used where `mu_line` is None.
        mu_line: `((tokens, mu), (tokens, mu))`, a shift that grows with the image as in `interpolate_mu`.
        terminal: where the last step starts, as in `stretch_to_terminal`; None to leave it.
    """

    shift: float = 1.0
    mu_line: tuple[tuple[int, float], tuple[int, float]] | None = None
    terminal: float | None = None

    def sigmas(self, steps: int, tokens: int, strength: float = 1.0) -> Tensor:
        """Noise levels of a run, fp32 `[steps + 1]`, ending in 0.

        Args:
            steps: at least 1.
            tokens: image tokens.
            strength: first noise level before the shift, in 0..1; at 0 there is nothing to do, and the result is `[0]`.
        """
        if strength == 0:
            return torch.zeros(1)
        shift = self.shift if self.mu_line is None else math.exp(interpolate_mu(tokens, *self.mu_line))
        sigmas = shift_linear(even_sigmas(steps, strength), shift)
        if self.terminal is not None:
            sigmas = stretch_to_terminal(sigmas, self.terminal)
        return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
