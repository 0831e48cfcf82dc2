"""Qwen-Image behind the verbs of `spec.Family`."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ...ops.patchify import from_tokens, patchify, to_tokens, unpatchify
from ...spec import FamilySpec, compute_placement
from ..packed import PIXELS_PER_TOKEN, PackedFamily
from . import text
from .spec import SPEC


class QwenImageFamily(PackedFamily):
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
