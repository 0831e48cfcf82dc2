"""Measure this package against diffusers on the CPU: the same process, the same weights, in turns.

    python benchmarks/cpu.py [figure ...] [--threads 2] [--repeats N] [--save]

Prints a table per figure, then the ratios, and as the last line one JSON document. See README.md beside this file.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a script: `cuda.py` in this folder would hide NVIDIA's package of that name from torch
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import Figure, Report, command_line, finish, hardware
from benchmarks.figures import Options, imports, load, memory, step, vae

FIGURES: dict[str, Callable[[Options], list[Figure]]] = {
    "step": step.measure,
    "vae": vae.measure,
    "load": load.measure,
    "imports": imports.measure,
    "memory": memory.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="figure", help=f"of {', '.join(FIGURES)}; all by default")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--repeats", type=int, help="rounds per case; by default what each figure needs")
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs; the numbers mean nothing")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu.md")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    if options.threads < 1 or (options.repeats is not None and options.repeats < 1):
        parser.error("--threads and --repeats must be at least 1")

    machine = hardware()
    torch.set_num_threads(options.threads)
    figures: list[Figure] = []
    for name in options.names or FIGURES:
        for figure in FIGURES[name](Options(options.repeats, options.threads, options.tiny)):
            print(f"{figure.markdown()}\n", flush=True)
            figures.append(figure)
    settings = {"threads": str(options.threads), "repeats": str(options.repeats or "by figure")}
    if options.tiny:
        settings["tiny"] = "yes: the numbers mean nothing"
    report = Report("CPU benchmarks", command_line("cpu.py", arguments), figures, settings, machine)
    finish(report, "cpu", save=options.save)


if __name__ == "__main__":
    main()
