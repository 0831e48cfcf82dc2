"""Steps along the probability-flow ODE."""

from torch import Tensor


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """`x + (sigma_next - sigma) * velocity`, in fp32 whatever the velocity's dtype.

    Args:
        x: fp32 state, any shape.
        velocity: `noise - clean`, same shape.
        sigma, sigma_next: scalars, current and next noise level.
    """
    return x + (sigma_next - sigma) * velocity.float()


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The state at noise level `sigma`: `(1 - sigma) * clean + sigma * noise`, in fp32."""
    return (1 - sigma) * clean.float() + sigma * noise.float()
