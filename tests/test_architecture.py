"""The house keeps its shape: imports run one way, every module imports, every file is on the map."""

import ast
import importlib
from pathlib import Path

import pytest

import diffsynth

ROOT = Path(diffsynth.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))

GROUND = {"runtime", "version"}
ALLOWED = {
    "version": set(),
    "runtime": {"version"},
    "ops": set(),
    "sampling": set(),
    "weights": {"runtime"},
    "memory": {"weights", "runtime"},
    "spec": {"ops", "sampling", "weights", "runtime"},
    "families": {"spec", "ops", "sampling", "weights", "runtime"},
    "registry": {"families", "spec", "runtime"},
    "recognise": {"registry", "spec", "weights", "runtime"},
    "load": {"recognise", "registry", "spec", "memory", "weights", "runtime"},
    "generate": {"memory", "spec", "ops", "sampling", "runtime"},
    "pipelines": {"generate", "load", "families", "spec", "memory", "sampling", "weights", *GROUND},
    "inspection": {"load", "recognise", "registry", "spec", "weights", "runtime"},
    "tiny": {"registry", "spec", "runtime"},
    "jobs": {"runtime"},
    "cli": {"jobs", "inspection", "registry", "spec", "weights", *GROUND},
}
"""Rooms and the rooms they may import from; a new room is added here, and its arrows argued for."""


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Absolute names of our modules that a file imports, also inside functions."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "diffsynth" or name.startswith("diffsynth.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room == "__init__":
        assert imports_of(path) <= {"diffsynth.version", "diffsynth.version.__version__"}
        return
    assert room in ALLOWED, f"{room} is a new room: add it to ALLOWED"
    rooms = {name.split(".")[1] for name in imports_of(path) if "." in name}
    assert rooms - {room} <= ALLOWED[room], f"{path.name} must not import from {sorted(rooms - {room} - ALLOWED[room])}"


def test_the_allowed_arrows_make_no_circle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {room for room, below in ALLOWED.items() if below <= done} - done
        assert ready, f"a circle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_no_circle_among_files():
    names = {module_of(path) for path in FILES}
    graph = {module_of(path): imports_of(path) & names - {module_of(path)} for path in FILES}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, below in graph.items() if below <= done} - done
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_imports(path):
    importlib.import_module(module_of(path))


def test_a_wrong_arrow_would_be_seen(tmp_path):
    """Negative control: the reader of imports sees relative, absolute and hidden ones."""
    path = ROOT / "ops" / "rope.py"
    source = "from ..memory.attach import attach\ndef f():\n    import diffsynth.load\n    from . import norm\n"
    parsed = tmp_path / "rope.py"
    parsed.write_text(source, encoding="utf-8")
    fake = type("P", (), {"read_text": parsed.read_text, "name": "rope.py", "relative_to": path.relative_to})()
    assert {"diffsynth.memory.attach", "diffsynth.load", "diffsynth.ops.norm"} <= imports_of(fake)


def test_the_map_names_every_file_and_only_those():
    document = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = document.split("```text")[1].split("```")[0]
    listed, folders = set(), []
    for line in tree.strip("\n").splitlines():
        depth, entry = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], entry.rstrip("/")]
        if entry.endswith(".py"):
            listed.add("/".join(folders))
    # Packages' own __init__ files hold a docstring and need no line.
    there = {str(path.relative_to(ROOT.parent)) for path in FILES if path.name != "__init__.py"} | {
        "diffsynth/__init__.py"
    }
    assert listed == there
