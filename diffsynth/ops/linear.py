"""A linear layer that picks the faster CPU kernel, and the tanh GELU that can be fused into it.

PyTorch sends fp32 `F.linear` on the CPU to MKL. For the shapes of a diffusion transformer oneDNN is 1.1 to 2 times as
fast on processors MKL does not favour, and applies GELU while the tile is still in cache. The oneDNN entry point has no
backward, so it serves inference only; everywhere else this is `torch.nn.Linear` to the letter (same parameters, same
keys, recognised by tools that look for `nn.Linear`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _onednn_fits(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class Linear(nn.Linear):
    """`nn.Linear`, with the oneDNN kernel for fp32 inference on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [..., in_features]` to `[..., out_features]`."""
        if _onednn_fits(x, self.weight):
            return _ONEDNN(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def linear_gelu_tanh(linear: nn.Module, x: Tensor) -> Tensor:
    """Return `gelu(linear(x))` with the tanh approximation of GELU (https://arxiv.org/abs/1606.08415).

    Fused into the matrix product where `linear` is a plain `Linear` that the oneDNN kernel serves; a wrapped layer (an
    adapter around it) is called as it is.
    """
    if type(linear) is Linear and _onednn_fits(x, linear.weight):
        return _ONEDNN(x, linear.weight, linear.bias, "gelu", [], "tanh")
    y = linear(x)
    # In place where nobody needs the input again: the widest activation of the model need not exist twice.
    return F.gelu(y, approximate="tanh") if torch.is_grad_enabled() else torch.ops.aten.gelu_(y, approximate="tanh")
