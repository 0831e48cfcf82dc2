"""diffusers' side of every comparison: the same weights, called as its pipelines call them.

The functions repeat what one turn of the loop in `QwenImagePipeline.__call__` and `ErnieImagePipeline.__call__` does,
without their progress bar, callbacks and bookkeeping of the scheduler: what is measured is the models.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.families.ernie_image.family import ErnieImageFamily
from diffsynth.families.qwen_image.family import QwenImageFamily
from diffsynth.spec import Family

GUIDANCE = 4.0

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(state, sigma, next sigma) -> next state`, the state in the form that the peer's pipeline keeps it in."""


@dataclass(frozen=True)
class Peer:
    """How diffusers does what one of our families does."""

    family: Family
    transformer_class: str
    vae_class: str
    step: Callable[[Any, Tensor, Tensor, tuple[int, int]], Step]
    """Guided step from `(transformer, positive [M, W], negative [M', W], grid)`."""
    keeps_tokens: bool
    """Whether its pipeline's state is tokens `[B, N, C]`, as ours; else latents `[B, C, h, w]`."""
    encode: Callable[[Any, Tensor], Tensor]
    """Pixels to normalised latents, posterior mean."""
    decode: Callable[[Any, Tensor], Tensor]
    """Normalised latents to pixels."""
    normalize: bool
    """Whether its guidance gives every token the norm it has without guidance."""

    def build(self, component: str, config: Any) -> nn.Module:
        """Its class of "dit" or "vae", with the numbers of our typed config."""
        import diffusers

        numbers = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
        name = self.transformer_class if component == "dit" else self.vae_class
        return getattr(diffusers, name)(**numbers).eval().requires_grad_(False)


def random_weights(module: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Draw every weight so that signals keep their size through any depth and nothing is trivially zero or one.

    Fresh models would not do: some layers begin at zero and the scales of all norms at one, which hides mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf == "gamma" or (leaf == "weight" and parameter.dim() == 1):
                parameter.normal_(1.0, 0.2, generator=generator)
            elif parameter.dim() < 2:
                parameter.normal_(0.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, gain / math.sqrt(parameter[0].numel()), generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)


def pair(peer: Peer, component: str, config: Any, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Our component and theirs on the CPU in fp32, with the same random weights."""
    theirs = peer.build(component, config)
    random_weights(theirs, seed)
    ours = peer.family.spec.component(component).build(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def _qwen_step(model: Any, positive: Tensor, negative: Tensor, grid: tuple[int, int]) -> Step:
    """Two forwards, one after the other, then the guidance that keeps the norm."""
    img_shapes = [[(1, *grid)]]

    def forward(latents: Tensor, timestep: Tensor, condition: Tensor, branch: str) -> Tensor:
        with model.cache_context(branch):
            return model(
                hidden_states=latents,
                timestep=timestep / 1000,
                guidance=None,
                encoder_hidden_states_mask=None,
                encoder_hidden_states=condition[None],
                img_shapes=img_shapes,
                attention_kwargs={},
                return_dict=False,
            )[0]

    def step(state: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        latents = state.to(model.dtype)
        timestep = (sigma * 1000).expand(len(latents)).to(latents)
        predicted = forward(latents, timestep, positive, "cond")
        unguided = forward(latents, timestep, negative, "uncond")
        combined = unguided + GUIDANCE * (predicted - unguided)
        norm = torch.norm(predicted, dim=-1, keepdim=True)
        guided = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
        return state + (sigma_next - sigma) * guided

    return step


def _ernie_step(model: Any, positive: Tensor, negative: Tensor, grid: tuple[int, int]) -> Step:
    """One forward over `[negative; positive]`, padded to the longer text."""
    longest = max(len(positive), len(negative))
    text = torch.stack([F.pad(t, (0, 0, 0, longest - len(t))) for t in (negative, positive)])
    lengths = torch.tensor([len(negative), len(positive)], device=text.device)

    def step(state: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        latents = state.to(model.dtype)
        timestep = torch.full((2 * len(latents),), float(sigma) * 1000, device=latents.device, dtype=latents.dtype)
        predicted = model(
            hidden_states=torch.cat([latents, latents]),
            timestep=timestep,
            text_bth=text,
            text_lens=lengths,
            return_dict=False,
        )[0]
        unguided, wanted = predicted.chunk(2)
        return state + (sigma_next - sigma) * (unguided + GUIDANCE * (wanted - unguided))

    return step


def _qwen_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, device=like.device) for v in (vae.config.latents_mean, vae.config.latents_std))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def _qwen_encode(vae: Any, pixels: Tensor) -> Tensor:
    latents = vae.encode(pixels.to(vae.dtype).unsqueeze(2)).latent_dist.mode().float()
    mean, std = _qwen_statistics(vae, latents)
    return ((latents - mean) / std)[:, :, 0]


def _qwen_decode(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _qwen_statistics(vae, latents)
    return vae.decode((latents.unsqueeze(2) * std + mean).to(vae.dtype), return_dict=False)[0][:, :, 0]


def _ernie_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """With the epsilon that the pipeline of ERNIE-Image writes out, not that of the config."""
    mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
    return mean.float(), torch.sqrt(variance.float() + 1e-5)


def _ernie_encode(vae: Any, pixels: Tensor) -> Tensor:
    mean, std = _ernie_statistics(vae)
    moments = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return (F.pixel_unshuffle(moments.float(), 2) - mean) / std


def _ernie_decode(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _ernie_statistics(vae)
    return vae.decode(F.pixel_shuffle(latents * std + mean, 2).to(vae.dtype), return_dict=False)[0]


QWEN_IMAGE = Peer(
    family=QwenImageFamily(),
    transformer_class="QwenImageTransformer2DModel",
    vae_class="AutoencoderKLQwenImage",
    step=_qwen_step,
    keeps_tokens=True,
    encode=_qwen_encode,
    decode=_qwen_decode,
    normalize=True,
)
ERNIE_IMAGE = Peer(
    family=ErnieImageFamily(),
    transformer_class="ErnieImageTransformer2DModel",
    vae_class="AutoencoderKLFlux2",
    step=_ernie_step,
    keeps_tokens=False,
    encode=_ernie_encode,
    decode=_ernie_decode,
    normalize=False,
)
PEERS = {peer.family.spec.name: peer for peer in (QWEN_IMAGE, ERNIE_IMAGE)}
