"""Translate tensor names between a file's layout and ours, both ways, on names alone.

A layout is a list of prefix pairs, longest match first, and of inner pairs for what follows the prefix. Because names
are all it needs, the same map serves lazy reads, adapters, export and messages.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


def _swap(name: str, pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Replace the longest matching prefix; return `(replacement, rest)`, or `("", name)` where none matches."""
    best: tuple[str, str] | None = None
    for source, target in pairs:
        if name.startswith(source) and (best is None or len(source) > len(best[0])):
            best = (source, target)
    return ("", name) if best is None else (best[1], name[len(best[0]) :])


@dataclass(frozen=True)
class KeyLayout:
    """One way in which a component's tensors are named in files."""

    name: str
    """What people call it, for messages: "diffusers", "ComfyUI", "original Wan"."""
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    """File prefix to our prefix. A name that no prefix matches does not belong to the component."""
    inner: Mapping[str, str] = field(default_factory=dict)
    """Prefix pairs for what follows, tried once after the outer prefix."""
    ignored: tuple[str, ...] = ()
    """File prefixes of tensors that the component holds but no task here reads."""
    squeezed: bool = False
    """Whether 1x1 convolutions of the file may be linear layers here: trailing ones of a shape are then dropped."""

    def is_ignored(self, file_name: str) -> bool:
        """Whether the tensor is deliberately never read."""
        return any(file_name.startswith(prefix) for prefix in self.ignored)

    def to_ours(self, file_name: str) -> str | None:
        """Our name of a file's tensor; None where it is ignored or belongs to another component."""
        if self.is_ignored(file_name) or not any(file_name.startswith(prefix) for prefix in self.prefixes):
            return None
        return _translate(file_name, self.prefixes.items(), self.inner.items())

    def to_file(self, our_name: str) -> str:
        """The file's name of one of our tensors: the inverse of `to_ours`."""
        outer = [(ours, theirs) for theirs, ours in self.prefixes.items()]
        inner = [(ours, theirs) for theirs, ours in self.inner.items()]
        return _translate(our_name, outer, inner)


def _translate(name: str, outer: Iterable[tuple[str, str]], inner: Iterable[tuple[str, str]]) -> str:
    head, rest = _swap(name, outer)
    middle, tail = _swap(rest, inner)
    return head + middle + tail
