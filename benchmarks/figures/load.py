"""Seconds and memory to load a transformer of 2 GB, each load in a fresh process with the files in the page cache.

A model whose weights are views of a mapped file stands at once and is read when it is used, so the number that counts
is the one after every weight has been touched.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Comparison, Figure, Samples, in_turns, run_python
from benchmarks.figures import Options
from benchmarks.peers import QWEN_IMAGE, random_weights
from diffsynth.families.qwen_image.transformer import TransformerConfig

TWO_GIGABYTES = TransformerConfig(num_layers=6, num_attention_heads=12)
"""0.52 B parameters: half the published width, a tenth of its depth."""
SPEED_TARGET = 2.0
MEMORY_TARGET = 1.05
SIDES = ("diffusers", "ours")
CONVERSIONS = {"file": "fp32 file as it is", "bfloat16": "fp32 file to bf16"}


def write_checkpoint(folder: Path, config: TransformerConfig, max_shard_size: str) -> int:
    """Write a sharded checkpoint in the published layout and return the bytes of its weights."""
    model: Any = QWEN_IMAGE.build("dit", config)
    random_weights(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure(options: Options) -> list[Figure]:
    """As stored and converted, both sides in turns."""
    spec = QWEN_IMAGE.family.spec.component("dit")
    config = spec.parse_config(spec.tiny) if options.tiny else TWO_GIGABYTES
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "transformer"
        nbytes = write_checkpoint(folder, config, "100KB" if options.tiny else "800MB")
        files = sum(1 for _ in folder.glob("*.safetensors"))
        for conversion, words in CONVERSIONS.items():
            runs = {side: _run(side, folder, conversion, options.threads) for side in SIDES}
            measured = in_turns(runs, options.rounds(5), warmup=0 if options.tiny else 1)
            _check_same(measured)
            comparisons += _comparisons(words, measured, nbytes, small=options.tiny)
    title = f"a Qwen-Image transformer of {nbytes / 1e9:.2f} GB in {files} shards, warm page cache, fresh processes"
    return [Figure("load", title, comparisons)]


def _run(side: str, folder: Path, conversion: str, threads: int) -> Callable[[], dict[str, Any]]:
    arguments = ["-m", "benchmarks.load_worker", side, str(folder), conversion, str(threads)]

    def run() -> dict[str, Any]:
        result: dict[str, Any] = json.loads(run_python(arguments).splitlines()[-1])
        return result

    return run


def _check_same(measured: Mapping[str, list[dict[str, Any]]]) -> None:
    """Both sides must have loaded the same numbers in the same dtype."""
    first = measured["ours"][0]
    for result in (result for results in measured.values() for result in results):
        assert result["parameters"] == first["parameters"], "the sides loaded different models"
        assert result["dtypes"] == first["dtypes"], f"dtypes differ: {result['dtypes']} and {first['dtypes']}"
        assert math.isclose(result["sum"], first["sum"], rel_tol=1e-4, abs_tol=1e-2), "the weights differ"


def _comparisons(
    words: str, measured: Mapping[str, list[dict[str, Any]]], nbytes: int, *, small: bool
) -> list[Comparison]:
    def samples(side: str, key: str, scale: float = 1.0) -> Samples:
        return Samples(tuple(result[key] / scale for result in measured[side]))

    def compare(case: str, key: str, scale: float = 1.0, **more: Any) -> Comparison:
        unit = "s" if scale == 1.0 else "x the file"
        return Comparison(
            f"{words}: {case}", samples("ours", key, scale), samples("diffusers", key, scale), unit, **more
        )

    speed = None if small else SPEED_TARGET
    memory = MEMORY_TARGET if words == CONVERSIONS["file"] and not small else None
    return [
        compare("time until every weight was read once", "seconds_touched", at_least=speed),
        compare("time until the model stands", "seconds_loaded", at_least=speed),
        compare("peak resident memory, every weight read", "peak_touched", nbytes, at_most=memory),
        compare("peak resident memory, model standing", "peak_loaded", nbytes),
    ]
