"""The figures of `cpu.py`, one question each: every module has a `measure(options) -> list[Figure]`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How the figures are to be measured."""

    repeats: int | None = None
    """Rounds; None for as many as a figure needs to be steady."""
    threads: int = 2
    tiny: bool = False
    """Sizes that run in a second and prove that the code works: the numbers mean nothing."""

    def rounds(self, steady: int) -> int:
        """Rounds to measure, where `steady` are enough on a quiet machine."""
        return self.repeats if self.repeats is not None else (1 if self.tiny else steady)
