"""What to make: the settings of an image, files of prompts, and which image goes to which file.

For the command line; everything here is checked before any model is loaded, and imports nothing heavy.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runtime.errors import CorruptFileError, InvalidInputError, MissingFileError


@dataclass(frozen=True)
class Setting:
    """One parameter of an image: how it is called, and what it may be."""

    keyword: str | None
    """Of the pipeline's call; None for what only the command line knows."""
    kind: type
    low: float = float("-inf")
    high: float = float("inf")

    def check(self, name: str, value: Any) -> Any:
        """`value`, if it can be meant; `name` says in messages where it comes from."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = isinstance(value, self.kind) if self.kind is str else number and self.low <= value <= self.high
        if self.kind is str and fits:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InvalidInputError(
                    f"{name} is {value!r}, which is no valid text (half of a surrogate pair)."
                ) from error
        if not fits or (self.kind is int and not isinstance(value, int)):
            raise InvalidInputError(f"{name} is {value!r}; it must be {self._allowed()}.")
        return value if self.kind is str else self.kind(value)

    def _allowed(self) -> str:
        if self.kind is str:
            return "a text"
        noun = "a whole number" if self.kind is int else "a number"
        if self.low == float("-inf"):
            return noun
        low, high = (f"{bound}" if isinstance(bound, int) else f"{bound:g}" for bound in (self.low, self.high))
        return f"{noun} from {low} to {high}" if self.high < float("inf") else f"{noun} from {low}"


SETTINGS: Mapping[str, Setting] = {
    "prompt": Setting("prompt", str),
    "negative_prompt": Setting("negative_prompt", str),
    "num_images": Setting("num_images_per_prompt", int, 1, 10_000),
    "seed": Setting("seed", int, -(2**63), 2**64 - 1),
    "steps": Setting("num_inference_steps", int, 1, 10_000),
    "cfg_scale": Setting("cfg_scale", float, 0, 1e6),
    "height": Setting("height", int, 1, 16_384),
    "width": Setting("width", int, 1, 16_384),
    "input_image": Setting(None, str),
    "denoising_strength": Setting("denoising_strength", float, 0, 1),
    "sigma_shift": Setting("sigma_shift", float, 1e-6, 1e6),
    "shift_mu": Setting("exponential_shift_mu", float, -20, 20),
    "out": Setting(None, str),
}
"""By the key in a .jsonl file, which is the name of the option."""
RUN_SETTINGS: Mapping[str, Setting] = {
    name: Setting(name, int, 1, 65_536) for name in ("tile_size", "tile_stride", "batch_size")
}
"""By the name of the option: the same for all images of a run."""


def option_name(key: str) -> str:
    """The option of the command line that sets `key`."""
    return "--" + key.replace("_", "-")


@dataclass
class Job:
    """One prompt with its settings, and the files its images go to."""

    settings: dict[str, Any]
    """By the keys of `SETTINGS`."""
    outputs: list[Path]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Settings of every prompt in a .txt file (one prompt a line) or a .jsonl file (one object a line).

    Raises:
        MissingFileError: there is no such file.
        InvalidInputError: another suffix, no prompt in it, or a line with an unknown key or an impossible value.
        CorruptFileError: no UTF-8 text, or a line that is no JSON object.
    """
    if path.suffix.lower() not in {".txt", ".jsonl"}:
        raise InvalidInputError(f"The prompts file {path} must end in .txt (one prompt a line) or .jsonl.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"There is no prompts file {path.absolute()}.") from None
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"The prompts file {path} is no UTF-8 text: {error}.") from error
    except OSError as error:
        raise InvalidInputError(f"The prompts file {path} cannot be read: {error.strerror}.") from error
    # Only "\n": a prompt may hold what else `splitlines` takes for the end of a line.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidInputError(f"The prompts file {path} holds no prompt.")
    if path.suffix.lower() == ".txt":
        return [{"prompt": line} for _, line in lines]
    return [_parse_line(f"{path}, line {number}", line) for number, line in lines]


def _parse_line(where: str, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where} is no valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f'{where} is no JSON object such as {{"prompt": "a cat"}}.')
    if unknown := [key for key in found if key not in SETTINGS]:
        names = ", ".join(repr(key) for key in unknown)
        raise InvalidInputError(f"{where} has the unknown key {names}; valid are {', '.join(SETTINGS)}.")
    if "prompt" not in found:
        raise InvalidInputError(f'{where} has no "prompt".')
    return {key: SETTINGS[key].check(f'{where}: "{key}"', value) for key, value in found.items()}


def plan_jobs(prompts: Iterable[Mapping[str, Any]], common: Mapping[str, Any], out: Path) -> list[Job]:
    """Settings and output files of every prompt; a prompt's own settings win over the common ones.

    Without a seed of its own an image has the common seed (a random one if there is none) plus its place among all
    images, so no two of a run are alike, and each can be made again from its metadata.

    Raises:
        InvalidInputError: two images would be written to the same file, or a seed is too large.
    """
    first_seed = common.get("seed", secrets.randbelow(2**32))
    jobs, made = [], 0
    for own in prompts:
        settings = {**common, **own}
        settings.setdefault("num_images", 1)
        if "seed" not in own:
            settings["seed"] = first_seed + made
        SETTINGS["seed"].check("The seed of the last image", settings["seed"] + settings["num_images"] - 1)
        made += settings["num_images"]
        jobs.append(Job(settings, numbered(Path(own["out"]), settings["num_images"]) if "out" in own else []))
    unnamed = [job for job in jobs if not job.outputs]
    free = iter(numbered(out, sum(job.settings["num_images"] for job in unnamed)))
    for job in unnamed:
        job.outputs = [next(free) for _ in range(job.settings["num_images"])]
    seen: set[Path] = set()
    for path in (path for job in jobs for path in job.outputs):
        real = path.resolve()  # one file may have several names
        if real in seen:
            raise InvalidInputError(f'Two images would be written to {path}. Give each line its own "out".')
        seen.add(real)
    return jobs


def numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one image; `image-0.png`, `image-1.png`, ... for several, zero-padded to sort."""
    if count <= 1:
        return [path] * count
    return [path.with_name(f"{path.stem}-{index:0{len(str(count - 1))}}{path.suffix}") for index in range(count)]
