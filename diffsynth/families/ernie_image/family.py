"""ERNIE-Image behind the verbs of `spec.Family`."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ...ops.patchify import from_tokens, to_tokens
from ...spec import FamilySpec, compute_placement
from ..packed import PIXELS_PER_TOKEN, PackedFamily
from . import text
from .spec import SPEC


class ErnieImageFamily(PackedFamily):
    """See `spec.Family` for what each verb takes and returns."""

    spec: ClassVar[FamilySpec] = SPEC

    def load_tokenizer(self, folder: str) -> Any:
        """Tokenizer from a local folder."""
        return text.load_tokenizer(folder)

    def encode_prompt(self, text_encoder: nn.Module, tokenizer: Any, prompt: str) -> Tensor:
        """Condition `[M, 3072]`."""
        return text.encode_prompt(text_encoder, tokenizer, prompt, compute_placement(text_encoder)[0])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`(128, H/16, W/16)`."""
        return 128, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN

    def pack(self, latents: Tensor) -> Tensor:
        """`[B, 128, h, w]` to `[B, h * w, 128]`."""
        return to_tokens(latents)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Inverse of `pack`."""
        return from_tokens(tokens, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
