"""Write a tiny checkpoint of each family, make pictures from it, look into the files: the whole way in a minute.

The weights are random, so the pictures are coloured noise; a published checkpoint gives real ones.
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPTS = {
    "qwen-image": "a red fox in the snow",
    "ernie-image": "一只黑白相间的中华田园犬",
}


def run(*words: str) -> None:
    """Run a command of ours, showing it first."""
    print("\n$ diffsynth " + " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)
    subprocess.run([sys.executable, "-m", "diffsynth.cli", *words], check=True)


def main(folder: Path) -> None:
    """Make everything below `folder`."""
    from diffsynth.tiny.checkpoint import write_tiny_checkpoint

    for family, prompt in PROMPTS.items():
        model = folder / f"tiny-{family}"
        if not model.exists():
            write_tiny_checkpoint(family, model, max_shard_bytes=200_000)
        run("inspect", str(model))
        out = str(folder / f"{family}.png")
        run("generate", prompt, "--model", str(model), "--out", out, "--size", "256x192", "--steps", "8",
            "--cfg-scale", "4", "--seed", "0", "--rand-device", "cpu")  # fmt: skip
        run("inspect", out)
    print(f"\nThe pictures are in {folder.absolute()}.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo"))
