"""How text and image tokens of several samples share one long sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Lengths of the text and image parts of each sample, in order."""

    img_lengths: tuple[int, ...]
    txt_lengths: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample, text and image together."""
        return tuple(i + t for i, t in zip(self.img_lengths, self.txt_lengths, strict=True))

    def join(
        self, first: Tensor, second: Tensor, first_lengths: Sequence[int], second_lengths: Sequence[int]
    ) -> Tensor:
        """Interleave two streams sample by sample: `[first_0, second_0, first_1, second_1, ...]`."""
        pairs = zip(first.split(first_lengths), second.split(second_lengths), strict=True)
        return torch.cat([part for pair in pairs for part in pair])

    def join_txt_img(self, txt: Tensor, img: Tensor) -> Tensor:
        """Joint sequence with the text of each sample before its image, `[sum(M+N), ...]`."""
        return self.join(txt, img, self.txt_lengths, self.img_lengths)

    def join_img_txt(self, img: Tensor, txt: Tensor) -> Tensor:
        """Joint sequence with the image of each sample before its text, `[sum(N+M), ...]`."""
        return self.join(img, txt, self.img_lengths, self.txt_lengths)

    def split_txt_img(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `join_txt_img`: `(txt [sum M, ...], img [sum N, ...])`."""
        return _deinterleave(joint, self.txt_lengths, self.img_lengths)

    def split_img_txt(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `join_img_txt`: `(img [sum N, ...], txt [sum M, ...])`."""
        return _deinterleave(joint, self.img_lengths, self.txt_lengths)


def _deinterleave(joint: Tensor, first: Sequence[int], second: Sequence[int]) -> tuple[Tensor, Tensor]:
    parts = joint.split([n for pair in zip(first, second, strict=True) for n in pair])
    if len(parts) == 2:
        return parts[0], parts[1]
    return torch.cat(parts[::2]), torch.cat(parts[1::2])
