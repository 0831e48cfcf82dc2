"""What the families do alike: one pass over the packed sequences of all images and guidance branches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import compute_placement

PIXELS_PER_TOKEN = 16
"""Side of the square of pixels behind an image token: 8 of the autoencoder times 2x2 latents."""


@dataclass(frozen=True)
class PackedSampler:
    """One prepared run: see `spec.Sampler`."""

    model: nn.Module
    txt: Tensor
    layout: Any
    table: Any
    branches: int

    @classmethod
    def prepare(cls, model: Any, layout: Any, branches: Sequence[Sequence[Tensor]], sigmas: Tensor) -> "PackedSampler":
        """Project the text and evaluate the timestep-only layers, once for all steps.

        Args:
            model: a transformer with `project_text`, `modulation` and `forward` over packed tokens.
            layout: the transformer's own layout of the sequences.
            branches: conditions per guidance branch and image.
            sigmas: `[steps + 1]`.
        """
        device, dtype = compute_placement(model)
        txt = torch.cat([condition.to(device, dtype) for branch in branches for condition in branch])
        table = model.modulation(sigmas[:-1].to(device) * 1000)
        return cls(model, model.project_text(txt), layout, table, len(branches))

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """All guidance branches of all images in one pass: each weight is read once."""
        tokens = x.to(self.txt).flatten(0, 1).repeat(self.branches, 1)
        velocity = self.model(tokens, self.txt, self.table.step(step), self.layout)
        return velocity.reshape(self.branches, *x.shape)


class PackedFamily:
    """The verbs of `spec.Family` that are the same for every transformer over packed 16-pixel tokens.

    The transformer offers `layout`, `project_text`, `modulation` and a forward over packed tokens, the autoencoder
    `encode` and `decode`.
    """

    def prepare(
        self, model: Any, branches: Sequence[Sequence[Tensor]], sigmas: Tensor, height: int, width: int
    ) -> PackedSampler:
        """Positions, text projections and the modulation of every step."""
        device, _ = compute_placement(model)
        lengths = [len(condition) for branch in branches for condition in branch]
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        return PackedSampler.prepare(model, model.layout([grid] * len(lengths), lengths, device), branches, sigmas)

    def encode_image(self, vae: Any, pixels: Tensor) -> Tensor:
        """Mean of the posterior, normalised."""
        device, dtype = compute_placement(vae)
        return vae.encode(pixels.to(device, dtype))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels, about -1..1."""
        device, dtype = compute_placement(vae)
        return vae.decode(latents.to(device), dtype)
