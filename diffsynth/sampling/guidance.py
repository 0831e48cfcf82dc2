"""Classifier-free guidance (https://arxiv.org/abs/2207.12598)."""

from torch import Tensor


def classifier_free(positive: Tensor, negative: Tensor, scale: float, *, normalize: bool = False) -> Tensor:
    """`negative + scale * (positive - negative)`, in fp32.

    Args:
        positive, negative: velocities `[..., C]`, with and without the wanted condition.
        scale: 1 returns `positive`.
        normalize: give every token the norm that `positive` has over its `C` channels, which keeps a large scale from
            oversaturating (as the Qwen-Image pipelines do).
    """
    positive, negative = positive.float(), negative.float()
    guided = negative + scale * (positive - negative)
    if normalize:
        length = guided.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        guided = guided * (positive.norm(dim=-1, keepdim=True) / length)
    return guided
