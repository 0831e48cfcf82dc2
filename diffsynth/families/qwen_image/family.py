"""Qwen-Image behind the verbs of `spec.Family`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...ops.patchify import from_tokens, patchify, to_tokens, unpatchify
from ...spec import FamilySpec, compute_placement
from ..packed import PackedSampler
from . import text
from .spec import PIXELS_PER_TOKEN, SPEC
from .transformer import QwenImageTransformer
from .vae import QwenImageVAE


class QwenImageFamily:
    """See `spec.Family` for what each verb takes and returns."""

    spec: ClassVar[FamilySpec] = SPEC

    def load_tokenizer(self, folder: str) -> Any:
        """Tokenizer from a local folder."""
        return text.load_tokenizer(folder)

    def encode_prompt(self, text_encoder: nn.Module, tokenizer: Any, prompt: str) -> Tensor:
        """Condition `[M, 3584]`."""
        return text.encode_prompt(text_encoder, tokenizer, prompt, compute_placement(text_encoder)[0])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`(16, H/8, W/8)`."""
        return 16, height // 8, width // 8

    def pack(self, latents: Tensor) -> Tensor:
        """2x2 patches as tokens: `[B, 16, h, w]` to `[B, h/2 * w/2, 64]`."""
        return to_tokens(patchify(latents))

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Inverse of `pack`."""
        return unpatchify(from_tokens(tokens, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN))

    def prepare(
        self, model: nn.Module, branches: Sequence[Sequence[Tensor]], sigmas: Tensor, height: int, width: int
    ) -> PackedSampler:
        """Positions, text projections and the modulation of every step."""
        assert isinstance(model, QwenImageTransformer)
        device, _ = compute_placement(model)
        conditions = [condition for branch in branches for condition in branch]
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        layout = model.layout([grid] * len(conditions), [len(condition) for condition in conditions], device)
        return PackedSampler.prepare(model, layout, branches, sigmas)

    def encode_image(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """Posterior mean, normalised."""
        assert isinstance(vae, QwenImageVAE)
        device, dtype = compute_placement(vae)
        return vae.encode(pixels.to(device, dtype))

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels, about -1..1."""
        assert isinstance(vae, QwenImageVAE)
        device, dtype = compute_placement(vae)
        return vae.decode(latents.to(device), dtype)
