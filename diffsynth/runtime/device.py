"""Which device to compute on."""

import logging
import os
from functools import cache

import torch

from .errors import InvalidInputError

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = {
    "DIFFSYNTH_ATTENTION_IMPLEMENTATION": "attention always goes through PyTorch, which picks the kernel",
    "DIFFSYNTH_DISK_MAP_BUFFER_SIZE": "files are memory-mapped, and the system bounds what stays in memory",
}
"""Environment variables that users of this interface may have set, and why nothing here reads them."""


@cache
def warn_about_environment() -> None:
    """Say once which variables of the environment have no effect."""
    for name, reason in _WITHOUT_EFFECT.items():
        if os.environ.get(name) not in (None, "", "torch"):
            logger.warning("%s=%s has no effect: %s.", name, os.environ[name], reason)


def default_device() -> torch.device:
    """The accelerator this machine has, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def is_available(device: torch.device) -> bool:
    """Whether tensors can live on `device` on this machine."""
    if device.type == "meta":
        return False
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # whatever the backend of that kind raises
        return False
    return True


def resolve_device(device: str | torch.device, name: str = "device") -> torch.device:
    """`device` as a `torch.device`.

    Args:
        device: for example "cuda", "cuda:0" or "cpu".
        name: of the parameter, for messages. "rand_device" may be missing on this machine: the caller falls back.

    Raises:
        InvalidInputError: there is no such kind of device, or this machine has none.
    """
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(
            f"{name}={device!r} is no device; use for example 'cuda', 'cuda:0' or 'cpu'."
        ) from error
    if name == "rand_device" or is_available(resolved):
        return resolved
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            f"{name}={str(device)!r}: this machine has no CUDA device, or PyTorch was installed without CUDA. "
            "Use 'cpu', or install the CUDA build of PyTorch."
        )
    raise InvalidInputError(f"{name}={str(device)!r} holds no tensors on this machine. Use {str(default_device())!r}.")
