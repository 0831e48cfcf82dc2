"""Seconds to decode and encode one image with the autoencoders at their full published size."""

import torch
from torch import Tensor, nn

from benchmarks.common import Comparison, Figure, checked_difference, time_in_turns
from benchmarks.figures import Options
from benchmarks.peers import ERNIE_IMAGE, QWEN_IMAGE, Peer, pair

SIDE = 256
TARGETS = {("qwen-image", "decode"): 2.0}
PIXEL_DIFFERENCE = {"qwen-image": 1e-5, "ernie-image": 5e-5}
"""Absolute, of pixels in -1..1. The FLUX.2 decoder with random weights magnifies the rounding of fp32 more."""
LATENT_DIFFERENCE = 1e-5
"""Relative to the largest latent."""


@torch.no_grad()
def compare(peer: Peer, ours: nn.Module, theirs: nn.Module, side: int, rounds: int) -> list[Comparison]:
    """Decoding, then encoding."""
    family = peer.family
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, *family.latent_shape(side, side), generator=generator)
    pixels = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    title = f"{family.spec.title}, {side}x{side}"

    def clamped(image: Tensor) -> Tensor:
        return image.float().clamp(-1, 1)

    runs = {
        "decode": (lambda: clamped(family.decode(ours, latents)), lambda: clamped(peer.decode(theirs, latents))),
        "encode": (lambda: family.encode_image(ours, pixels), lambda: peer.encode(theirs, pixels)),
    }
    comparisons = []
    for name, (our_run, their_run) in runs.items():
        case = f"{title}: {name}"
        relative = name == "encode"
        limit = LATENT_DIFFERENCE if relative else PIXEL_DIFFERENCE[family.spec.name]
        difference = checked_difference(case, our_run(), their_run(), limit, relative=relative)
        times = time_in_turns({"theirs": their_run, "ours": our_run}, rounds, warmup=0)
        target = TARGETS.get((family.spec.name, name))
        comparisons.append(Comparison(case, times["ours"], times["theirs"], at_least=target, difference=difference))
    return comparisons


def measure(options: Options) -> list[Figure]:
    """Both autoencoders."""
    comparisons: list[Comparison] = []
    for peer in (QWEN_IMAGE, ERNIE_IMAGE):
        spec = peer.family.spec.component("vae")
        config = spec.parse_config(spec.tiny if options.tiny else {})
        ours, theirs = pair(peer, "vae", config)
        comparisons += compare(peer, ours, theirs, 64 if options.tiny else SIDE, options.rounds(5))
        del ours, theirs
    return [Figure("vae", "autoencoders at published size, fp32", comparisons)]
