"""Run and train large image diffusion transformers on the hardware you have.

The public faces are `diffsynth.pipelines.qwen_image` and `diffsynth.pipelines.ernie_image`; importing this package
alone loads nothing else.
"""

from .version import __version__

__all__ = ["__version__"]
