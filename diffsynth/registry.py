"""The list of families: one import line each."""

from .families.ernie_image.family import ErnieImageFamily
from .families.qwen_image.family import QwenImageFamily
from .runtime.errors import InvalidInputError
from .spec import Family

FAMILIES: tuple[Family, ...] = (QwenImageFamily(), ErnieImageFamily())


def family_named(name: str) -> Family:
    """The family called `name` on the command line."""
    for family in FAMILIES:
        if family.spec.name == name:
            return family
    raise InvalidInputError(f"Unknown family {name!r}; known are {', '.join(f.spec.name for f in FAMILIES)}.")
