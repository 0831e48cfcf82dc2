"""Measure how much memory activations need, without having that memory.

Under `torch._subclasses.FakeTensorMode` operations compute shapes and strides only; `PeakMemory` adds up the storages
that are alive. So the peak of a 20 B model at full size is known in a second on any machine. What kernels allocate for
themselves (convolution and matrix-product workspaces) is not seen.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Adds up the storages of all tensors that operations return while it is active.

    Args:
        ignored: tensors that do not count, such as weights.

    Attributes:
        peak: most bytes alive at one time.
    """

    def __init__(self, ignored: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._alive: dict[int, int] = {}
        self._now = 0
        self.peak = 0

    def count(self, tensor: Tensor) -> None:
        """Count `tensor` from now until its storage is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._ignored:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result


@contextmanager
def fake_weights(module: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """In this context all tensors are fake, and `module`, built on the meta device, has fake CPU weights."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for owner in module.modules():
            for tensors in (owner._parameters, owner._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        kept = dtype if tensor.is_floating_point() else tensor.dtype
                        tensors[name] = torch.empty(tensor.shape, dtype=kept)  # type: ignore[assignment]
        yield module


def activation_peak(module: nn.Module, run: Callable[..., Any], *inputs: Tensor) -> int:
    """Bytes at the peak of `run(*inputs)`, the inputs included and the weights of `module` not.

    Call it inside `fake_weights`.
    """
    counter = PeakMemory([*module.parameters(), *module.buffers()])
    for tensor in inputs:
        counter.count(tensor)
    with counter:
        result = run(*inputs)
    del result
    return counter.peak
