"""Seconds until a program can begin: imports and the first answer of the command line, each in a fresh process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import ROOT, Comparison, Figure, Samples, in_turns, run_python, time_in_turns
from benchmarks.figures import Options

PIPELINE = "from diffsynth.pipelines.qwen_image import QwenImagePipeline"
THEIRS = "from diffusers import QwenImagePipeline"
STATEMENTS = {
    "import diffsynth": "import diffsynth",
    "the pipeline": PIPELINE,
    "the pipeline, and what a run imports later": f"""{PIPELINE}
import accelerate, safetensors.torch
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer""",
}
"""The last one shows what is only put off: diffusers' import contains it."""
TARGETS = {"import diffsynth": 3.0, "the pipeline": 3.0}
HELP_TARGET = 0.5


def seconds_inside(statement: str) -> Callable[[], float]:
    """Time `statement` in a fresh process, without the start of the interpreter."""
    program = f"import time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    return lambda: float(run_python(["-c", program]).splitlines()[-1])


def help_command() -> list[str]:
    """The installed console script, or the module where it is not installed."""
    script = Path(sys.executable).parent / "diffsynth"
    return [str(script), "--help"] if script.exists() else [sys.executable, "-m", "diffsynth.cli", "--help"]


def measure(options: Options) -> list[Figure]:
    """Imports in turns with diffusers' import of the same pipeline, and `diffsynth --help`."""
    statements = {"import diffsynth": STATEMENTS["import diffsynth"]} if options.tiny else STATEMENTS
    theirs = "import json" if options.tiny else THEIRS
    runs = {case: seconds_inside(statement) for case, statement in statements.items()}
    runs |= {
        "torch": seconds_inside("import json" if options.tiny else "import torch"),
        "theirs": seconds_inside(theirs),
    }
    measured = {
        case: Samples(tuple(values))
        for case, values in in_turns(runs, options.rounds(7), warmup=0 if options.tiny else 1).items()
    }
    command = help_command()

    def run_help() -> None:
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    answer = time_in_turns({"help": run_help}, options.rounds(7), warmup=0 if options.tiny else 1)["help"]
    comparisons = [
        Comparison(case, measured[case], measured["theirs"], at_least=None if options.tiny else TARGETS.get(case))
        for case in statements
    ]
    comparisons += [
        Comparison("import torch alone, which both need", measured["torch"]),
        Comparison("diffsynth --help, the whole process", answer, at_most=None if options.tiny else HELP_TARGET),
    ]
    return [Figure("imports", f"fresh processes; theirs is `{theirs}`", comparisons)]
