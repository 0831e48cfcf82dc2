"""What every benchmark shares: timing in turns, comparisons, the machine's facts, tables and dated result files."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Libraries read these when they are imported: nothing here may depend on a network."""
for _name, _value in OFFLINE.items():
    os.environ.setdefault(_name, _value)

T = TypeVar("T")


# Numbers


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def min(self) -> float:
        """The measurement that was disturbed least: what a machine can do."""
        return min(self.values)

    @property
    def median(self) -> float:
        """What one typically sees."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Comparison:
    """One case measured on both sides, or on ours alone."""

    case: str
    ours: Samples
    theirs: Samples | None = None
    unit: str = "s"
    """Below one, "s" is printed as ms."""
    at_least: float | None = None
    """Target: `theirs / ours` of the best runs."""
    at_most: float | None = None
    """Target: our median, in the unit."""
    difference: float | None = None
    """Of the outputs of the two sides, already checked against its bound."""
    note: str = ""

    @property
    def ratio_min(self) -> float | None:
        """`theirs / ours` of the best runs; above 1 ours is better."""
        return None if self.theirs is None else self.theirs.min / self.ours.min

    @property
    def ratio_median(self) -> float | None:
        """`theirs / ours` of the medians."""
        return None if self.theirs is None else self.theirs.median / self.ours.median

    @property
    def target(self) -> str:
        """In words."""
        wanted = [f">= {self.at_least:g}x"] if self.at_least is not None else []
        wanted += [f"<= {self._show(self.at_most)}"] if self.at_most is not None else []
        return ", ".join(wanted)

    @property
    def met(self) -> bool | None:
        """Whether every target is reached; None where there is none."""
        checks = []
        if self.at_least is not None:
            checks.append(self.ratio_min is not None and self.ratio_min >= self.at_least)
        if self.at_most is not None:
            checks.append(self.ours.median <= self.at_most)
        return all(checks) if checks else None

    def _show(self, value: float) -> str:
        if self.unit == "s" and value < 1:
            return f"{value * 1000:.4g} ms"
        return f"{value:.4g} {self.unit}"

    def row(self) -> list[str]:
        """Cells for `COMPARISON_HEADER`."""
        ratio = "" if self.theirs is None else f"{self.ratio_min:.2f}x / {self.ratio_median:.2f}x"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return [
            self.case,
            f"{self._show(self.ours.min)} / {self._show(self.ours.median)}",
            "" if self.theirs is None else f"{self._show(self.theirs.min)} / {self._show(self.theirs.median)}",
            ratio,
            self.target,
            met,
            "" if self.difference is None else f"{self.difference:.1e}",
            self.note,
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return asdict(self) | {"ratio_min": self.ratio_min, "ratio_median": self.ratio_median, "met": self.met}


COMPARISON_HEADER = (
    "case", "ours min / median", "diffusers min / median", "ratio min / median", "target", "met", "difference", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A group of comparisons that answer one question."""

    name: str
    title: str
    comparisons: Sequence[Comparison] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """Measured, with no peer to compare with."""

    def markdown(self) -> str:
        """A heading and its tables."""
        parts = [f"## {self.name}: {self.title}"]
        if self.comparisons:
            parts.append(table(COMPARISON_HEADER, [comparison.row() for comparison in self.comparisons]))
        if self.facts:
            parts.append(table(("measured", "value"), [list(item) for item in self.facts.items()]))
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        comparisons = [comparison.as_json() for comparison in self.comparisons]
        return {"name": self.name, "title": self.title, "comparisons": comparisons, "facts": dict(self.facts)}


# Measuring


def in_turns(runs: Mapping[str, Callable[[], T]], repeats: int, warmup: int = 0) -> dict[str, list[T]]:
    """Call the runs A B A B ..., so that whatever else the machine does meets all of them alike.

    Args:
        runs: by name.
        repeats: rounds that count.
        warmup: rounds before them that do not.

    Returns:
        The results of every run, in order.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    for index in range(warmup + repeats):
        for name, run in runs.items():
            result = run()
            if index >= warmup:
                results[name].append(result)
    return results


Clock = Callable[[Callable[[], Any]], float]
"""Runs something and says how many seconds that took."""


def wall_clock(run: Callable[[], Any]) -> float:
    """Seconds on the wall."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Callable[[], Any]) -> float:
    """Seconds on the device, between two events around what `run` enqueues."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock that a device needs."""
    return cuda_clock if device.type == "cuda" else wall_clock


def time_in_turns(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, clock: Clock = wall_clock
) -> dict[str, Samples]:
    """Seconds of every run, measured in turns: see `in_turns`."""
    timed = {name: lambda run=run: clock(run) for name, run in runs.items()}
    return {name: Samples(tuple(values)) for name, values in in_turns(timed, repeats, warmup).items()}


def largest_difference(ours: Tensor, theirs: Tensor, *, relative: bool) -> float:
    """Largest absolute difference; `relative` divides it by the largest absolute value of `theirs`."""
    ours, theirs = ours.float(), theirs.float()
    difference = float((ours - theirs).abs().max())
    return difference / float(theirs.abs().max()) if relative else difference


def checked_difference(what: str, ours: Tensor, theirs: Tensor, limit: float, *, relative: bool) -> float:
    """`largest_difference`, bounded: a benchmark of something that computes something else is worth nothing.

    Raises:
        AssertionError: the shapes differ, or the values by more than `limit`, or one is not a number.
    """
    assert ours.shape == theirs.shape, f"{what}: ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    difference = largest_difference(ours, theirs, relative=relative)
    assert difference <= limit, f"{what}: the outputs differ by {difference:.2e}, more than {limit:.0e}"
    return difference


def run_python(arguments: Sequence[str]) -> str:
    """Standard output of this interpreter in a fresh process, started from the root of the repository.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"python {' '.join(arguments)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


# The machine, and what ran


def hardware() -> dict[str, str]:
    """What the numbers depend on."""
    facts = {
        "CPU": _first_line("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "getloadavg"):
        facts["load average at the start"] = f"{os.getloadavg()[0]:.2f} (1 min); above 0.5 others used the machine"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
        facts["CUDA of torch"] = str(torch.version.cuda)
    return facts


def _first_line(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _memory() -> str:
    line = _first_line("/proc/meminfo", "MemTotal")
    return f"{int(line.split()[0]) / 2**20:.1f} GiB" if line else "unknown"


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "accelerate", "safetensors", "diffsynth"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["git commit"] = _commit()
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = " with uncommitted changes" if git("status", "--porcelain", "--", "diffsynth") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Reports


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table that also reads well as plain text; columns without content are left out."""
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    cells = [[line[column] for column in used] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(used))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


@dataclass(frozen=True)
class Report:
    """Everything one call of a benchmark script found out."""

    title: str
    command: str
    figures: Sequence[Figure]
    settings: Mapping[str, str]
    machine: Mapping[str, str]
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())

    def markdown(self) -> str:
        """The result file: the machine first, the ratios last."""
        ran = {"command": f"`{self.command}`", "date": self.date, **self.settings}
        facts = {**ran, **self.machine, **versions()}
        parts = [
            f"# {self.title}, {self.date}",
            table(("what", "value"), [list(item) for item in facts.items()]),
            *(figure.markdown() for figure in self.figures),
            "## Notes\n\nWhat surprised, what did not work, what these numbers do not show:\n\n- (nothing noted)",
            "## Ratios\n\n" + self.ratios(),
        ]
        return "\n\n".join(parts) + "\n"

    def ratios(self) -> str:
        """The one table to look at: every comparison as a ratio."""
        rows = []
        for figure in self.figures:
            for comparison in figure.comparisons:
                cells = dict(zip(COMPARISON_HEADER, comparison.row(), strict=True))
                value = cells["ratio min / median"] or cells["ours min / median"]
                rows.append([figure.name, comparison.case, value, cells["target"], cells["met"]])
        return table(("figure", "case", "diffusers / ours, min / median", "target", "met"), rows)

    def as_json(self) -> str:
        """One line for machines."""
        document = {
            "title": self.title,
            "date": self.date,
            "command": self.command,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "versions": versions(),
            "figures": [figure.as_json() for figure in self.figures],
        }
        return json.dumps(document, ensure_ascii=False)

    def save(self, kind: str, folder: Path = RESULTS) -> Path:
        """Write `<date>-<kind>.md`; an earlier file of the day may carry notes and is never overwritten."""
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"{self.date}-{kind}{suffix}.md" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        path = next(folder / name for name in names if not (folder / name).exists())
        path.write_text(self.markdown(), encoding="utf-8")
        return path


def finish(report: Report, kind: str, *, save: bool) -> None:
    """Print the ratios, write the file if asked, and end with one line of JSON."""
    print(f"\n## Ratios\n\n{report.ratios()}\n")
    if save:
        path = report.save(kind).relative_to(ROOT)
        print(f"Saved {path}: add what surprised to its notes, and the file to the list in benchmarks/README.md.\n")
    print(report.as_json())


def command_line(script: str, arguments: Sequence[str]) -> str:
    """The command as anyone would type it."""
    return " ".join(["python", f"benchmarks/{script}", *arguments])
