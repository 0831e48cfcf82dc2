"""One load of a transformer in this fresh process, measured from inside: `python -m benchmarks.load_worker`.

    python -m benchmarks.load_worker {ours,diffusers} FOLDER {file,bfloat16} THREADS

Everything is imported before the clock starts. Prints one JSON object: seconds until the model stands, seconds until
every weight has also been read once, the growth of the resident set at its peak after either, and the sum of all
weights, which proves that both sides hold the same.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Load = Callable[[str, torch.dtype], Any]


def our_loader() -> Load:
    """`load_components`, with everything it imports late imported already."""
    import accelerate
    import safetensors.torch

    from diffsynth.load import load_components
    from diffsynth.registry import family_named
    from diffsynth.weights.model_config import ModelConfig

    del accelerate, safetensors  # only imported
    family, device = family_named("qwen-image"), torch.device("cpu")

    def load(folder: str, dtype: torch.dtype) -> Any:
        return load_components(family, [ModelConfig(folder)], dtype=dtype, device=device, wanted=["dit"])["dit"]

    return load


def their_loader() -> Load:
    """`from_pretrained`, as its pipelines call it."""
    from diffusers import QwenImageTransformer2DModel

    def load(folder: str, dtype: torch.dtype) -> Any:
        return QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)

    return load


def resident_bytes(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest so far) of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # no /proc: the highest of the whole process stands in for both
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    """Let `VmHWM` begin at the present size: importing may have needed more for a moment."""
    with suppress(OSError):  # not Linux, or not allowed: the peak then includes the imports, which is only stricter
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@torch.no_grad()
def main(side: str, folder: str, dtype_name: str, threads: str) -> None:
    """Load, touch, report."""
    torch.set_num_threads(int(threads))
    load = our_loader() if side == "ours" else their_loader()
    dtype = torch.float32 if dtype_name == "file" else getattr(torch, dtype_name)
    torch.ones(8, 8).matmul(torch.ones(8, 8)).sum()  # starts the thread pools
    reset_peak()
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    model = load(folder, dtype)
    loaded = time.perf_counter()
    peak_loaded = resident_bytes("VmHWM")
    sums = torch.stack([parameter.sum(dtype=torch.float32) for parameter in model.parameters()])
    touched = time.perf_counter()
    result = {
        "seconds_loaded": loaded - start,
        "seconds_touched": touched - start,
        "peak_loaded": peak_loaded - before,
        "peak_touched": resident_bytes("VmHWM") - before,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "sum": float(sums.double().sum()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
