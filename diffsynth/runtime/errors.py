"""Every error this package raises on purpose.

Each class also derives from the built-in exception a caller would expect, so `except ValueError` keeps working.
A message names the value that is wrong, the values that would be right, and what to do about it.
"""


class DiffSynthError(Exception):
    """Base of all errors raised on purpose by this package."""


class InvalidInputError(DiffSynthError, ValueError):
    """A parameter has a value that cannot be used."""


class MissingFileError(DiffSynthError, FileNotFoundError):
    """A file, folder, shard or component that is needed is not where it was looked for."""


class CorruptFileError(DiffSynthError, ValueError):
    """A file is truncated, empty, or not what its name says."""


class UnsafeFileError(DiffSynthError, ValueError):
    """A file could run code when opened (pickle) and is refused."""


class UnknownModelError(DiffSynthError, ValueError):
    """The tensors of a file belong to no model this package knows."""


class WrongModelError(DiffSynthError, ValueError):
    """The tensors of a file belong to a known model, but not to the one that is wanted here."""


class KeyMismatchError(DiffSynthError, ValueError):
    """A checkpoint has missing, extra or mis-shaped tensors for the model it should fill."""


class DownloadError(DiffSynthError, OSError):
    """A hub could not be reached, refused the request, or sent something incomplete."""


class NonFiniteError(DiffSynthError, ArithmeticError):
    """NaN or infinity appeared where a picture should have been."""


class OutputError(DiffSynthError, OSError):
    """A result could not be written."""


class GenerationCancelled(DiffSynthError):
    """The caller stopped the run through its step callback."""
