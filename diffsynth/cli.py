"""The command line: parse, call, print.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .jobs import RUN_SETTINGS, SETTINGS, Job, option_name, plan_jobs, read_prompts
from .runtime.errors import DiffSynthError, InvalidInputError, MissingFileError
from .runtime.log import setup_logging
from .version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from .inspection import CheckpointReport, ImageReport, RepositoryReport, TensorSummary
    from .spec import Family

logger = logging.getLogger(__name__)

EXIT_PROBLEM, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
_SHOWN = 8  # names listed of each kind
_VERBOSE = "diffsynth.verbose"


class _Group(click.Group):
    """Turns errors and Ctrl-C into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except (DiffSynthError, RuntimeError, OSError, UnicodeEncodeError) as error:
            # torch raises RuntimeErrors; of these only a lack of memory is something that a user can mend
            full = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
            if isinstance(error, BrokenPipeError) or (isinstance(error, RuntimeError) and not full):
                raise
            if ctx.meta.get(_VERBOSE, 0) >= 2:
                traceback.print_exc()
            hint = _OUT_OF_MEMORY if full else ""
            click.echo(f"Error: {error}{hint}", err=True)
            ctx.exit(EXIT_ERROR)


_OUT_OF_MEMORY = "\nTry --vram-limit, --offload-device cpu, --offload-dtype float8_e4m3fn, --tiled, or a smaller size."


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="diffsynth")
def main() -> None:
    """Run large image diffusion transformers on the hardware you have."""


def _verbosity(ctx: click.Context, verbose: int, quiet: bool = False) -> None:
    ctx.meta[_VERBOSE] = verbose
    setup_logging(-1 if quiet and not verbose else verbose)


# generate


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, listed in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_DTYPES = ("bfloat16", "float32", "float16")
_STORAGE_DTYPES = (*_DTYPES, "float8_e4m3fn", "float8_e5m2")
_WORK = _options(
    click.option("--model", required=True, metavar="ID|FOLDER", help="Model id on the hub, or folder of a repository."),
    click.option("--family", default="auto", show_default=True, help="auto, qwen-image or ernie-image."),
    click.option("--prompts", metavar="FILE", type=click.Path(path_type=Path),
                 help='Prompts: .txt, one a line; or .jsonl, one object a line with "prompt" and any of: '
                 + ", ".join(list(SETTINGS)[1:]) + "."),
    click.option("--out", default="image.png", show_default=True, type=click.Path(path_type=Path),
                 help="Image file (.png, .jpg, .webp); several images are numbered, image-0.png and so on."),
    click.option("--quality", type=int, default=95, show_default=True, help="Of JPEG and WebP, 1 to 100."),
)  # fmt: skip
_IMAGE = _options(
    click.option("--negative-prompt", help="What the image should not show."),
    click.option("--num-images", type=int, help="Images for each prompt.  [default: 1]"),
    click.option("--seed", type=int, help="Of the first image, counting up.  [default: random, kept in the metadata]"),
    click.option("--steps", type=int, help="Denoising steps."),
    click.option("--cfg-scale", type=float, help="Classifier-free guidance; takes effect above 1."),
    click.option("--height", type=int, help="In pixels, a multiple of 16."),
    click.option("--width", type=int, help="In pixels, a multiple of 16."),
    click.option("--size", metavar="WxH", help="Width and height in one."),
    click.option("--input-image", metavar="FILE", help="Start of image-to-image."),
    click.option("--denoising-strength", type=float, help="0 keeps the input image, 1 ignores it."),
    click.option("--sigma-shift", type=float, help="Shift of the schedule (ERNIE-Image)."),
    click.option("--shift-mu", type=float, help="Exponent of the schedule's shift (Qwen-Image)."),
    click.option("--no-cfg-normalize", is_flag=True, help="Leave the norm of guided tokens alone (Qwen-Image)."),
    click.option("--rand-device", help="Where noise is drawn; cpu and cuda give different images."),
    click.option("--tiled", is_flag=True, help="Encode and decode in tiles, which needs less memory."),
    click.option("--tile-size", type=int, help="Side of a tile in latents of 8 pixels."),
    click.option("--tile-stride", type=int, help="Distance of tiles in latents of 8 pixels."),
    click.option("--batch-size", type=int, help="Images denoised in one pass."),
)
_MACHINE = _options(
    click.option("--device", help="Where to compute: cuda, cpu, ...  [default: the best there is]"),
    click.option("--dtype", type=click.Choice(_DTYPES), default="bfloat16", show_default=True, help="To compute in."),
    click.option("--vram-limit", type=float, metavar="GIB",
                 help="Weights to keep on the device at most; the rest waits in --offload-device, else host memory."),
    click.option("--offload-device", help="Where weights rest that are not in use: cpu, disk, ..."),
    click.option("--offload-dtype", type=click.Choice(_STORAGE_DTYPES), help="What weights rest in."),
    click.option("--download-source", type=click.Choice(("modelscope", "huggingface")), help="Hub of a model id."),
    click.option("--local-model-path", metavar="FOLDER", help="Where downloaded models are kept.  [default: ./models]"),
    click.option("--skip-download", is_flag=True, help="Use only what is already there."),
    click.option("--quiet", is_flag=True, help="No progress bar and no warnings."),
    click.option("-v", "--verbose", count=True, help="Say more; -vv also shows where an error comes from."),
)  # fmt: skip


@main.command()
@click.argument("prompt", required=False)
@_WORK
@_IMAGE
@_MACHINE
@click.pass_context
def generate(ctx: click.Context, prompt: str | None, prompts: Path | None, **given: Any) -> None:
    """Make images from PROMPT, or from each prompt in a file.

    Prints the path of every image written. What is not set keeps the default of the model's pipeline. Prompt, seed,
    size and the rest are written into the images; `diffsynth inspect image.png` shows them.
    """
    _verbosity(ctx, given["verbose"], given["quiet"])
    if (prompt is None) == (prompts is None):
        raise click.UsageError("Give either PROMPT or --prompts FILE.", ctx)
    _split_size(ctx, given)
    common = {
        key: SETTINGS[key].check(option_name(key), given[key])
        for key in SETTINGS
        if key not in {"prompt", "out"} and given[key] is not None
    }
    lines = [{"prompt": prompt}] if prompts is None else read_prompts(prompts)
    jobs = plan_jobs(lines, common, given["out"])
    _check_files(jobs, given["quality"])
    family, folder = _find_family(given["model"], given["family"])
    pipeline_class = _pipeline_class(family)
    whole_run = _whole_run(given)
    _check_belongs(family, pipeline_class, {key for job in jobs for key in job.settings}, whole_run)
    pipe = _load(pipeline_class, family, folder, given)
    for number, job in enumerate(jobs, 1):
        title = "" if len(jobs) == 1 else f"prompt {number}/{len(jobs)}"
        _run(pipe, job, {**whole_run, "progress_bar_cmd": _progress(title, given["quiet"])}, given["quality"])


def _split_size(ctx: click.Context, given: dict[str, Any]) -> None:
    if given["size"] is None:
        return
    if given["width"] is not None or given["height"] is not None:
        raise click.UsageError("Give either --size or --width and --height.", ctx)
    match = re.fullmatch(r"(\d{1,6})[xX×*](\d{1,6})", given["size"])
    if match is None:
        raise InvalidInputError(f"--size is {given['size']!r}; it must be width x height in pixels, such as 1328x1024.")
    given["width"], given["height"] = int(match[1]), int(match[2])


def _check_files(jobs: list[Job], quality: int) -> None:
    """Find what is wrong with files now, not after minutes of loading."""
    from .runtime.image import check_quality, check_writable, load_image

    check_quality(quality)
    for path in (path for job in jobs for path in job.outputs):
        check_writable(path)
    for name in dict.fromkeys(job.settings["input_image"] for job in jobs if "input_image" in job.settings):
        load_image(name)


def _find_family(model: str, name: str) -> "tuple[Family, Path | None]":
    """The family of `model`, and its folder if it is one rather than an id."""
    path = Path(model).expanduser()
    is_folder = path.is_dir()
    if path.is_file():
        raise InvalidInputError(f"--model {model} is a file; give the folder of a whole model repository, or an id.")
    if not is_folder and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise MissingFileError(f"There is no folder {path.absolute()}, and {model!r} is no id such as Qwen/Qwen-Image.")
    from .inspection import family_of_folder
    from .registry import FAMILIES, family_named

    if name != "auto":
        return family_named(name), path if is_folder else None
    if is_folder:
        return family_of_folder(path), path
    for family in FAMILIES:
        if model in family.spec.model_ids:
            return family, None
    known = ", ".join(model_id for family in FAMILIES for model_id in family.spec.model_ids)
    raise InvalidInputError(
        f"{model!r} is no folder here, and no id whose family is known ({known}). If it is an id, pass "
        f"--family ({', '.join(family.spec.name for family in FAMILIES)})."
    )


def _pipeline_class(family: "Family") -> Any:
    import importlib

    module, name = family.spec.pipeline.split(":")
    return getattr(importlib.import_module(module), name)


def _whole_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the pipeline's call that are the same for every prompt, checked; only those that were given."""
    from .runtime.device import resolve_device

    keywords: dict[str, Any] = {
        name: setting.check(option_name(name), given[name])
        for name, setting in RUN_SETTINGS.items()
        if given[name] is not None
    }
    if given["rand_device"] is not None:
        keywords["rand_device"] = str(resolve_device(given["rand_device"], "rand_device"))
    if given["no_cfg_normalize"]:
        keywords["cfg_normalize"] = False
    if given["tiled"]:
        keywords["tiled"] = True
    elif keywords.keys() & {"tile_size", "tile_stride"}:
        logger.warning("--tile-size and --tile-stride have no effect without --tiled.")
    return keywords


def _check_belongs(family: "Family", pipeline_class: Any, keys: set[str], whole_run: Mapping[str, Any]) -> None:
    """Refuse settings that this family's pipeline does not have, and tiles that leave gaps."""
    import inspect

    accepted = inspect.signature(pipeline_class.__call__).parameters
    options = {keyword: option_name(key) for key in keys if (keyword := SETTINGS[key].keyword) is not None}
    options |= {keyword: option_name(keyword) for keyword in whole_run} | {"cfg_normalize": "--no-cfg-normalize"}
    for keyword in [*options.keys() - {"cfg_normalize"}, *whole_run]:
        if keyword not in accepted:
            raise InvalidInputError(f"{options[keyword]} does not belong to {family.spec.title}. Leave it out.")
    size, stride = (whole_run.get(name, accepted[name].default) for name in ("tile_size", "tile_stride"))
    if whole_run.get("tiled") and stride > size:
        raise InvalidInputError(f"--tile-stride {stride} must be at most --tile-size {size}, or the tiles leave gaps.")


def _load(pipeline_class: Any, family: "Family", folder: Path | None, given: Mapping[str, Any]) -> Any:
    import torch

    from .weights.model_config import ModelConfig

    memory: dict[str, Any] = {}
    if given["offload_device"] is not None:
        memory["offload_device"] = given["offload_device"]
    if given["offload_dtype"] is not None:
        memory["offload_dtype"] = getattr(torch, given["offload_dtype"])
    if given["vram_limit"] is not None:  # a limit means something only where weights may rest elsewhere
        memory.setdefault("offload_device", "cpu")
    placement = {
        "torch_dtype": getattr(torch, given["dtype"]), "device": given["device"], "vram_limit": given["vram_limit"]
    }  # fmt: skip
    hub = {key: given[key] for key in ("download_source", "local_model_path") if given[key] is not None}
    hub |= {"skip_download": True} if given["skip_download"] else {}
    if folder is not None:
        if hub:
            logger.warning("%s has no effect: --model is a folder.", ", ".join(map(option_name, hub)))
        return pipeline_class.from_folder(folder, **placement, **memory)
    model, spec = given["model"], family.spec
    return pipeline_class.from_pretrained(
        model_configs=[
            ModelConfig(model_id=model, origin_file_pattern=component.pattern, **hub, **memory)
            for component in spec.components
        ],
        tokenizer_config=ModelConfig(model_id=model, origin_file_pattern=f"{spec.tokenizer_folder}/", **hub),
        **placement,
    )


def _progress(title: str, quiet: bool) -> Callable[[Iterable[int]], Iterable[int]]:
    from functools import partial

    from tqdm import tqdm

    return partial(tqdm, desc=title or None, disable=quiet, unit="step", dynamic_ncols=True, file=sys.stderr)


def _run(pipe: Any, job: Job, keywords: Mapping[str, Any], quality: int) -> None:
    from .runtime.image import load_image, save_image

    own: dict[str, Any] = {
        keyword: value for key, value in job.settings.items() if (keyword := SETTINGS[key].keyword) is not None
    }
    if "input_image" in job.settings:
        own["input_image"] = load_image(job.settings["input_image"])
    made = pipe(**own, **keywords)
    images: list[Image] = made if isinstance(made, list) else [made]
    for image, path in zip(images, job.outputs, strict=True):
        if path.exists():
            logger.info("Replacing %s.", path)
        save_image(image, path, quality=quality)
        click.echo(path)


# inspect


@main.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")
@click.option("-v", "--verbose", count=True, help="Say more.")
@click.pass_context
def inspect(ctx: click.Context, paths: tuple[Path, ...], as_json: bool, verbose: int) -> None:
    """Say what an image, a safetensors file or a model folder is, and what is wrong with it.

    Weights are not read. Exit code 0 if everything is whole and known, 1 if not.
    """
    from .inspection import ImageReport, RepositoryReport, inspect_paths

    _verbosity(ctx, verbose)
    reports = inspect_paths(paths)
    if as_json:
        click.echo(json.dumps([{"complete": report.complete, **asdict(report)} for report in reports], indent=2))
    else:
        for report in reports:
            if isinstance(report, ImageReport):
                _print_image(report)
            elif isinstance(report, RepositoryReport):
                _print_repository(report)
            else:
                _print_checkpoint(report)
    if not all(report.complete for report in reports):
        ctx.exit(EXIT_PROBLEM)


def _print_image(report: "ImageReport") -> None:
    click.echo(_printable(str(report.path)))
    if report.format is not None:
        _print_row("image", f"{report.format}, {report.width}x{report.height} pixels")
    for key, value in (report.parameters or {}).items():
        if value is not None:  # did not apply
            _print_row(key, value)
    if report.format is not None and report.parameters is None:
        _print_row("parameters", "none in it")
    if report.problem:
        _print_row("problem", report.problem)


def _print_repository(report: "RepositoryReport") -> None:
    click.echo(_printable(str(report.folder)))
    _print_row("family", report.family or "unclear")
    _print_row("complete", "yes" if report.complete else "no")
    if report.problem:
        _print_row("problem", report.problem)
    for checkpoint in report.checkpoints:
        _print_checkpoint(checkpoint)


def _print_checkpoint(report: "CheckpointReport") -> None:
    more = f" (and {len(report.files) - 1} more)" if len(report.files) > 1 else ""
    click.echo(_printable(f"{report.files[0]}{more}"))
    for component in report.components:
        _print_row("is", f"{component.title}")
        _print_row("family", component.family)
        _print_row("component", component.component)
        _print_row("layout", component.layout)
        _print_contents(component.contents)
        _print_row("complete", "yes" if component.complete else "no")
        _print_names("missing", component.missing)
        _print_names("mis-shaped", component.misshaped)
    if not report.components and report.contents is not None:
        _print_contents(report.contents)
        _print_row("first names", ", ".join(report.first_names))
    _print_names("extra", report.extra)
    if report.problem:
        _print_row("problem", report.problem)


def _print_contents(contents: "TensorSummary") -> None:
    dtypes = contents.dtypes.items()
    listed = ", ".join(f"{name} ({count})" for name, count in dtypes) if len(dtypes) > 1 else "".join(contents.dtypes)
    _print_row("dtype", listed)
    _print_row("tensors", f"{contents.tensors:,}")
    _print_row("parameters", _human(contents.parameters, 1000, ("", " thousand", " million", " billion")))
    _print_row("size", _human(contents.bytes, 1024, (" bytes", " KiB", " MiB", " GiB", " TiB"), " bytes"))


def _print_names(label: str, names: list[str]) -> None:
    if names:
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        _print_row(label, f"{len(names)}: {', '.join(names[:_SHOWN])}{more}")


def _print_row(label: str, value: object) -> None:
    """One line of a report."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    click.echo(f"  {_printable(label)} ".ljust(22) + _printable(text))


def _printable(text: str) -> str:
    """`text`, quoted where it could move the cursor: line breaks and escapes of a foreign file or its name."""
    return text if text.isprintable() else json.dumps(text)


def _human(number: int, base: int, units: tuple[str, ...], exact_unit: str = "") -> str:
    """Three figures or so, and the exact number behind it."""
    power = 0
    while power < len(units) - 1 and number >= base ** (power + 1):
        power += 1
    if power == 0:
        return f"{number:,}{units[0]}"
    return f"{number / base**power:.2f}{units[power]} ({number:,}{exact_unit})"


if __name__ == "__main__":
    main()
