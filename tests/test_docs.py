"""Every snippet of the documentation runs as written, on tiny checkpoints.

Only what a machine without a graphics card cannot do is replaced: CUDA words by CPU ones, and sizes and step counts by
small ones. DIFFSYNTH_DOCS may name a folder with further documents to run.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from diffsynth.cli import main
from diffsynth.tiny.checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
if extra := os.environ.get("DIFFSYNTH_DOCS"):
    DOCUMENTS += sorted(Path(extra).glob("*.md"))

SHORTENED = [
    (r'torch\.cuda\.mem_get_info\("cuda"\)\[1\]', "(8 * 1024 ** 3)"),
    (r"""(["'])cuda\1""", r"\1cpu\1"),
    (r"num_inference_steps=\d+", "num_inference_steps=2"),
    (r"(height|width)=\d+", r"\1=64"),
]


def snippets(text: str, language: str) -> list[str]:
    """Fenced blocks of `language`; in a text without any fence, the stretches of bare Python that save an image."""
    if "```" in text:
        return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    if language != "python":
        return []
    return re.findall(r'^from diffsynth.*?\.save\("[^"]+"\)$', text, flags=re.DOTALL | re.MULTILINE)


def cases(language: str) -> list:
    return [
        pytest.param(code, id=f"{path.stem}-{index}")
        for path in DOCUMENTS
        for index, code in enumerate(snippets(path.read_text(encoding="utf-8"), language))
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with `models/` as a user would have it after the downloads."""
    folder = tmp_path_factory.mktemp("workplace")
    qwen = write_tiny_checkpoint("qwen-image", folder / "models/Qwen/Qwen-Image")
    reshard(qwen / "transformer", "diffusion_pytorch_model", 9)
    reshard(qwen / "text_encoder", "model", 4)
    for name in ("ERNIE-Image", "ERNIE-Image-Turbo"):
        write_tiny_checkpoint("ernie-image", folder / "models/baidu" / name)
    shutil.copy(qwen / "vae/diffusion_pytorch_model.safetensors", folder / "models/xxx.safetensors")
    shutil.copy(qwen / "vae/diffusion_pytorch_model.safetensors", folder / "some_file.safetensors")
    shutil.copy(qwen / "vae/config.json", folder / "config.json")
    (folder / "prompts.jsonl").write_text('{"prompt": "a red fox"}\n', encoding="utf-8")
    return folder


def reshard(folder: Path, stem: str, count: int) -> None:
    """Cut the one file in `folder` into `count` shards named as the published ones."""
    whole = folder / f"{stem}.safetensors"
    with safe_open(whole, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    whole.unlink()
    names = sorted(tensors)
    for index in range(count):
        part = {name: tensors[name] for name in names[index::count]}
        save_file(part, folder / f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors")


def run_python(code: str) -> dict:
    scope: dict = {}
    if "import" not in code:  # a fragment: what its neighbours import
        scope_code = "import torch\nfrom diffsynth.pipelines.qwen_image import QwenImagePipeline, ModelConfig\n"
        exec(scope_code, scope)
    for pattern, replacement in SHORTENED:
        code = re.sub(pattern, replacement, code)
    exec(compile(code, "snippet", "exec"), scope)
    return scope


@pytest.fixture
def small_by_default(monkeypatch):
    """Calls that name no size make small images."""
    from diffsynth.pipelines.ernie_image import ErnieImagePipeline
    from diffsynth.pipelines.qwen_image import QwenImagePipeline

    for pipeline in (QwenImagePipeline, ErnieImagePipeline):
        original = pipeline.__call__

        def call(self, *args, _original=original, **kwargs):
            return _original(self, *args, **{"height": 64, "width": 64, **kwargs})

        monkeypatch.setattr(pipeline, "__call__", call)


@pytest.mark.parametrize("code", cases("python"))
def test_python_runs_as_written(code, workplace, monkeypatch, small_by_default):
    monkeypatch.chdir(workplace)
    run_python(code)
    for name in re.findall(r'\.save\("([^"]+)"\)', code):
        assert (workplace / name).stat().st_size > 100


@pytest.mark.parametrize("code", cases("shell"))
def test_commands_run_as_written(code, workplace, monkeypatch):
    """`diffsynth` commands; installing and cloning are run by whoever tests a fresh clone."""
    monkeypatch.chdir(workplace)
    lines = code.replace("\\\n", " ").splitlines()
    for words in [shlex.split(line, comments=True) for line in lines if line.startswith("diffsynth ")]:
        if words[1] == "inspect" and words[2] == "image.png":
            made = CliRunner().invoke(
                main, ["generate", "a fox", *_small("models/Qwen/Qwen-Image"), "--out", "image.png"]
            )
            assert made.exit_code == 0, made.output
        if words[1] == "generate":
            model = words[words.index("--model") + 1]
            words = [*words, *_small(f"models/{model}" if not model.startswith("models") else model)]
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, (words, result.output)


def _small(model: str) -> list[str]:
    return ["--model", model, "--size", "64x64", "--steps", "2", "--device", "cpu", "--dtype", "float32"]


def test_there_are_snippets_to_run():
    assert len(cases("python")) >= 8
    assert len(cases("shell")) >= 3
