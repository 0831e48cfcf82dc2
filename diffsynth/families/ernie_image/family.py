"""ERNIE-Image behind the verbs of `spec.Family`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...ops.patchify import from_tokens, to_tokens
from ...spec import FamilySpec, compute_placement
from ..packed import PackedSampler
from . import text
from .spec import PIXELS_PER_TOKEN, SPEC
from .transformer import ErnieImageTransformer
from .vae import Flux2VAE


class ErnieImageFamily:
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

    def prepare(
        self, model: nn.Module, branches: Sequence[Sequence[Tensor]], sigmas: Tensor, height: int, width: int
    ) -> PackedSampler:
        """Positions, text projections and the modulation of every step."""
        assert isinstance(model, ErnieImageTransformer)
        device, _ = compute_placement(model)
        conditions = [condition for branch in branches for condition in branch]
        grid = (height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)
        layout = model.layout([grid] * len(conditions), [len(condition) for condition in conditions], device)
        return PackedSampler.prepare(model, layout, branches, sigmas)

    def encode_image(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """Posterior mean, folded and normalised."""
        assert isinstance(vae, Flux2VAE)
        device, dtype = compute_placement(vae)
        return vae.encode(pixels.to(device, dtype))

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels, about -1..1."""
        assert isinstance(vae, Flux2VAE)
        device, dtype = compute_placement(vae)
        return vae.decode(latents.to(device), dtype)
