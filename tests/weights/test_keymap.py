"""Names go to a file's layout and back without loss, and never into another component."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.registry import FAMILIES
from diffsynth.spec import ComponentSpec, Family
from diffsynth.weights.keymap import KeyLayout

PART = st.text("abc0123_", min_size=1, max_size=4)
NAME = st.lists(PART, min_size=1, max_size=4).map(".".join)


@given(name=NAME)
def test_layout_without_rules_keeps_every_name(name: str) -> None:
    layout = KeyLayout("ours")
    assert layout.to_ours(name) == layout.to_file(name) == name


@given(prefix=NAME, name=NAME)
def test_outer_prefix_is_taken_off_and_put_on(prefix: str, name: str) -> None:
    layout = KeyLayout("wrapped", prefixes={f"{prefix}.": ""})
    assert layout.to_file(name) == f"{prefix}.{name}"
    assert layout.to_ours(f"{prefix}.{name}") == name
    assert layout.to_ours(f"_{prefix}.{name}") is None


# Prefixes of either side are prefix-free among themselves, so that a name has one reading.
PAIRS = st.lists(st.tuples(PART, PART), max_size=5, unique_by=(lambda pair: pair[0], lambda pair: pair[1]))


@given(outer=PAIRS.filter(len), inner=PAIRS, middle=PART, rest=NAME, choice=st.integers(0, 4))
def test_two_way_map_is_its_own_inverse(
    outer: list[tuple[str, str]], inner: list[tuple[str, str]], middle: str, rest: str, choice: int
) -> None:
    layout = KeyLayout(
        "both",
        prefixes={f"f/{theirs}.": f"o/{ours}." for theirs, ours in outer},
        inner={f"g/{theirs}.": f"p/{ours}." for theirs, ours in inner},
    )
    theirs, ours = outer[choice % len(outer)]
    tails = [(f"{middle}.{rest}", f"{middle}.{rest}"), *((f"g/{a}.{rest}", f"p/{b}.{rest}") for a, b in inner)]
    for their_tail, our_tail in tails:
        assert layout.to_ours(f"f/{theirs}.{their_tail}") == f"o/{ours}.{our_tail}"
        assert layout.to_file(f"o/{ours}.{our_tail}") == f"f/{theirs}.{their_tail}"


def test_longest_prefix_wins_whatever_the_order() -> None:
    pairs = {"a.": "x.", "a.b.": "y.", "a.b.c.": "z."}
    for prefixes in (pairs, dict(reversed(pairs.items()))):
        layout = KeyLayout("nested", prefixes=prefixes)
        assert [layout.to_ours(name) for name in ("a.w", "a.b.w", "a.b.c.w")] == ["x.w", "y.w", "z.w"]
        assert [layout.to_file(name) for name in ("x.w", "y.w", "z.w")] == ["a.w", "a.b.w", "a.b.c.w"]


def test_inner_pair_is_tried_once_and_only_after_the_outer_one() -> None:
    layout = KeyLayout("inner", prefixes={"up.": "down."}, inner={"q.": "k.", "k.": "v."})
    assert layout.to_ours("up.q.q.w") == "down.k.q.w"
    assert layout.to_ours("up.q.w") == "down.k.w", "not again to down.v.w"
    assert layout.to_ours("q.w") is None


@given(name=NAME)
def test_ignored_tensors_have_no_name_of_ours(name: str) -> None:
    layout = KeyLayout("towers", prefixes={"": ""}, ignored=("visual.", "lm_head."))
    assert layout.is_ignored(f"visual.{name}")
    assert layout.to_ours(f"visual.{name}") is None
    assert layout.to_ours(f"my.visual.{name}") == f"my.visual.{name}"


@pytest.mark.parametrize(
    ("family", "component"),
    [(family, component) for family in FAMILIES for component in family.spec.components],
    ids=lambda value: value.spec.name if hasattr(value, "spec") else value.name,
)
def test_every_known_layout_is_a_two_way_map(family: Family, component: ComponentSpec) -> None:
    names = set(component.build(component.parse_config(component.tiny)).state_dict())
    for layout in component.layouts:
        in_file = {layout.to_file(name) for name in names}
        assert len(in_file) == len(names), layout.name
        assert {layout.to_ours(name) for name in in_file} == names, layout.name
        assert not any(layout.is_ignored(name) for name in in_file)
