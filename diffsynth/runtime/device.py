"""Which device to compute on."""

import torch

from .errors import InvalidInputError


def default_device() -> torch.device:
    """The accelerator this machine has, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def resolve_device(device: str | torch.device, name: str = "device") -> torch.device:
    """`device` as a `torch.device`.

    Raises:
        InvalidInputError: there is no such kind of device, or this machine has none. A noise device ("rand_device") may
            be missing: the caller falls back.
    """
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(
            f"{name}={device!r} is no device; use for example 'cuda', 'cuda:0' or 'cpu'."
        ) from error
    if name == "device" and resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            f"{name}={str(device)!r}: this machine has no CUDA device, or PyTorch was installed without CUDA. "
            "Use device='cpu', or install the CUDA build of PyTorch."
        )
    return resolved
