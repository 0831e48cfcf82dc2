"""The command line: what it refuses before it loads anything, what it writes, what it prints."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from oracle import make_oracle, save_oracle
from PIL import Image
from safetensors.torch import load_file, save_file

import diffsynth.cli as cli_module
from diffsynth import __version__
from diffsynth.cli import main
from diffsynth.inspection import inspect_paths
from diffsynth.jobs import SETTINGS, numbered, plan_jobs, read_prompts
from diffsynth.registry import FAMILIES
from diffsynth.runtime.errors import CorruptFileError, InvalidInputError, MissingFileError
from diffsynth.runtime.image import load_image, read_parameters, save_image
from diffsynth.runtime.log import ProgressSafeHandler
from diffsynth.tiny.tokenizers import write_qwen_tokenizer, write_tekken_tokenizer

FAST = ("--steps", "2", "--size", "32x32", "--cfg-scale", "1", "--dtype", "float32", "--device", "cpu")
Run = Callable[..., Result]


@pytest.fixture(scope="session")
def repositories(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny published repositories, by the family's name on the command line: read only."""
    writers = {"qwen_image": write_qwen_tokenizer, "ernie_image": write_tekken_tokenizer}
    made = {}
    for family, write in writers.items():
        root = tmp_path_factory.mktemp(f"cli_{family}")
        write(root / "source")
        pipe = make_oracle(family, root / "source", tiny_vocab=True)
        made[family.replace("_", "-")] = save_oracle(pipe, root / "repository")
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`run(*arguments)` calls the command line in an empty folder, and leaves logging as it was."""
    logger = logging.getLogger("diffsynth")
    level = logger.level
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
    logger.setLevel(level)
    for handler in list(logger.handlers):
        if isinstance(handler, ProgressSafeHandler):
            logger.removeHandler(handler)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""
    monkeypatch.setattr(cli_module, "_load", lambda *_: pytest.fail("a model was loaded"))


def left_over() -> list[str]:
    return sorted(os.listdir())


class TestStart:
    def test_help_is_quick_and_imports_nothing_heavy(self) -> None:
        code = (
            "import sys, time; start = time.perf_counter(); from diffsynth.cli import main\n"
            "try: main(['generate', '--help'])\n"
            "except SystemExit: pass\n"
            "print(*sorted(sys.modules.keys() & {'torch', 'numpy', 'transformers', 'PIL', 'tqdm'}), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "--denoising-strength" in done.stdout
        assert done.stderr.strip() == ""

    def test_version(self, run: Run) -> None:
        assert __version__ in run("--version").stdout


class TestPromptFiles:
    def write(self, tmp_path: Path, name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def test_txt(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "p.txt", "\ufeffa cat\r\n\n  \n 一只狗\u2028same line \n")
        assert read_prompts(path) == [{"prompt": "a cat"}, {"prompt": "一只狗\u2028same line"}]

    def test_jsonl(self, tmp_path: Path) -> None:
        line = {"prompt": "x", "negative_prompt": "", "seed": -1, "height": 64, "cfg_scale": 2, "out": "a.png"}
        path = self.write(tmp_path, "p.jsonl", f'{json.dumps(line)}\n\n{{"prompt": ""}}')
        assert read_prompts(path) == [line, {"prompt": ""}]

    @pytest.mark.parametrize(
        ("line", "error", "message"),
        [
            ("{", CorruptFileError, "line 2 is no valid JSON"),
            ("[]", CorruptFileError, "line 2 is no JSON object"),
            ("{}", InvalidInputError, 'line 2 has no "prompt"'),
            ('{"prompt": "x", "size": 3}', InvalidInputError, "line 2 has the unknown key 'size'; valid are prompt"),
            ('{"prompt": 3}', InvalidInputError, 'line 2: "prompt" is 3; it must be a text'),
            ('{"prompt": "x", "steps": 0}', InvalidInputError, '"steps" is 0; it must be a whole number from 1'),
            ('{"prompt": "x", "steps": 2.5}', InvalidInputError, '"steps" is 2.5'),
            ('{"prompt": "x", "height": "64"}', InvalidInputError, "\"height\" is '64'"),
            ('{"prompt": "x", "seed": true}', InvalidInputError, '"seed" is True'),
            ('{"prompt": "x", "cfg_scale": NaN}', InvalidInputError, '"cfg_scale" is nan'),
            ('{"prompt": "x", "denoising_strength": 1.1}', InvalidInputError, "a number from 0 to 1"),
        ],
    )
    def test_bad_lines(self, tmp_path: Path, line: str, error: type[Exception], message: str) -> None:
        path = self.write(tmp_path, "p.jsonl", '{"prompt": "fine"}\n' + line)
        with pytest.raises(error, match=re.escape(message)):
            read_prompts(path)

    def test_bad_files(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFileError, match=r"absent\.txt"):
            read_prompts(tmp_path / "absent.txt")
        with pytest.raises(InvalidInputError, match=r"\.jsonl"):
            read_prompts(self.write(tmp_path, "p.csv", "x"))
        with pytest.raises(InvalidInputError, match="holds no prompt"):
            read_prompts(self.write(tmp_path, "p.txt", "\n \n"))
        with pytest.raises(CorruptFileError, match="UTF-8"):
            read_prompts(self.write(tmp_path, "p.txt", b"\xff\xfe\x00"))
        (tmp_path / "folder.txt").mkdir()
        with pytest.raises(InvalidInputError, match="cannot be read"):
            read_prompts(tmp_path / "folder.txt")


class TestPlan:
    def test_names(self) -> None:
        assert numbered(Path("a/x.png"), 1) == [Path("a/x.png")]
        assert [path.name for path in numbered(Path("x.png"), 2)] == ["x-0.png", "x-1.png"]
        assert numbered(Path("x.png"), 11)[-2:] == [Path("x-09.png"), Path("x-10.png")]

    def test_seeds_count_up_over_all_images(self) -> None:
        jobs = plan_jobs(
            [{"prompt": "a"}, {"prompt": "b", "seed": 7}, {"prompt": "c"}],
            {"seed": 100, "num_images": 2},
            Path("x.png"),
        )
        assert [job.settings["seed"] for job in jobs] == [100, 7, 104]
        assert [path.name for job in jobs for path in job.outputs] == [f"x-{index}.png" for index in range(6)]

    def test_a_line_wins_and_may_name_its_file(self) -> None:
        jobs = plan_jobs([{"prompt": "a", "steps": 3, "out": "a.png"}, {"prompt": "b"}], {"steps": 9}, Path("x.png"))
        assert [job.settings["steps"] for job in jobs] == [3, 9]
        assert [job.outputs for job in jobs] == [[Path("a.png")], [Path("x.png")]]

    def test_a_random_seed_is_known(self) -> None:
        (job,) = plan_jobs([{"prompt": "a"}], {}, Path("x.png"))
        assert 0 <= job.settings["seed"] < 2**32

    def test_collisions_and_overflow(self) -> None:
        with pytest.raises(InvalidInputError, match="Two images"):
            plan_jobs([{"prompt": "a", "out": "x.png"}, {"prompt": "b"}], {}, Path("x.png"))
        with pytest.raises(InvalidInputError, match="seed"):
            plan_jobs([{"prompt": "a"}, {"prompt": "b"}], {"seed": 2**64 - 1}, Path("x.png"))


@pytest.mark.usefixtures("no_loading")
class TestRefusedBeforeLoading:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "either PROMPT or --prompts"),
            (("x", "--prompts", "p.txt"), "either PROMPT or --prompts"),
            (("x", "--size", "64"), "1328x1024"),
            (("x", "--size", "0x64"), "--width is 0"),
            (("x", "--size", "64x64", "--width", 64), "either --size or"),
            (("x", "--height", -16), "--height is -16"),
            (("x", "--height", "tall"), "not a valid integer"),
            (("x", "--steps", 0), "--steps is 0; it must be a whole number from 1"),
            (("x", "--cfg-scale", "nan"), "--cfg-scale is nan"),
            (("x", "--denoising-strength", 2), "--denoising-strength is 2.0; it must be a number from 0 to 1"),
            (("x", "--num-images", 0), "--num-images is 0"),
            (("x", "--quality", 0), "quality=0"),
            (("x", "--out", "x.gif"), ".webp"),
            (("x", "--out", "file/x.png"), "is a file, not a folder"),
            (("x", "--input-image", "absent.png"), "absent.png"),
            (("x", "--input-image", "file"), "text file"),
            (("--prompts", "absent.txt"), "absent.txt"),
            (("x", "--batch-size", 0), "--batch-size is 0"),
            (("x", "--tiled", "--tile-size", 8), "--tile-stride 64 must be at most --tile-size 8"),
            (("x", "--rand-device", "gpu"), "rand_device='gpu'"),
            (("x", "--sigma-shift", 3), "--sigma-shift does not belong to Qwen-Image"),
            (("x", "--family", "nothing"), "known are qwen-image, ernie-image"),
        ],
    )
    def test_options(self, run: Run, repositories: dict[str, Path], arguments: tuple[Any, ...], message: str) -> None:
        Path("file").write_text("hello")
        result = run("generate", "--model", repositories["qwen-image"], *arguments)
        assert message in result.stderr
        assert "Traceback" not in result.output
        assert result.exit_code == 2
        assert left_over() == ["file"]

    @pytest.mark.parametrize(
        ("option", "name"), [(("--shift-mu", 1), "--shift-mu"), (("--no-cfg-normalize",), "--no-cfg-normalize")]
    )
    def test_options_of_the_other_family(
        self, run: Run, repositories: dict[str, Path], option: tuple[Any, ...], name: str
    ) -> None:
        result = run("generate", "x", "--model", repositories["ernie-image"], *option)
        assert f"Error: {name} does not belong to ERNIE-Image" in result.stderr
        assert result.exit_code == 2

    def test_models(self, run: Run) -> None:
        Path("empty").mkdir()
        Path("file").touch()
        for model, message in {
            "./absent": "no folder",
            "absent": "no folder",
            "someone/Else": "--family (qwen-image, ernie-image)",
            "empty": "Pass --family",
            "file": "is a file",
        }.items():
            result = run("generate", "x", "--model", model)
            assert result.exit_code == 2
            assert message in result.stderr

    def test_a_traceback_only_on_request(self, run: Run) -> None:
        assert "Traceback" not in run("generate", "x", "--model", "./absent", "-v").output
        assert "Traceback" in run("generate", "x", "--model", "./absent", "-vv").stderr


class TestGenerate:
    @pytest.mark.parametrize("family", ["qwen-image", "ernie-image"])
    def test_text_to_image(self, run: Run, repositories: dict[str, Path], family: str) -> None:
        result = run(
            "generate", "一只猫", "--model", repositories[family], *FAST, "--seed", 5, "--out", "new/x.png",
            "--rand-device", "cpu",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{Path('new/x.png')}\n"
        assert "2/2" in result.stderr  # the progress bar
        assert load_image("new/x.png").size == (32, 32)
        found = read_parameters("new/x.png") or {}
        assert {key: found[key] for key in ("prompt", "seed", "steps", "height", "width", "family")} == {
            "prompt": "一只猫", "seed": 5, "steps": 2, "height": 32, "width": 32, "family": family,
        }  # fmt: skip
        assert __version__ in found["version"]
        assert left_over() == ["new"]
        shown = run("inspect", "new/x.png")
        assert shown.exit_code == 0
        assert re.search(r"prompt +一只猫", shown.stdout)

    def test_prompts_images_and_the_same_image_alone(self, run: Run, repositories: dict[str, Path]) -> None:
        Path("p.txt").write_text("a cat\n\na dog\n")
        model = repositories["qwen-image"]
        result = run("generate", "--prompts", "p.txt", "--model", model, *FAST, "--num-images", 2, "--seed", 3)
        assert result.exit_code == 0, result.output
        assert result.stdout.split() == [f"image-{index}.png" for index in range(4)]
        assert "prompt 2/2" in result.stderr
        seen = [read_parameters(f"image-{index}.png") or {} for index in range(4)]
        assert [(item["prompt"], item["seed"]) for item in seen] == [
            ("a cat", 3),
            ("a cat", 4),
            ("a dog", 5),
            ("a dog", 6),
        ]
        assert run("generate", "a dog", "--model", model, *FAST, "--seed", 6, "--quiet").exit_code == 0
        assert load_image("image.png").tobytes() == load_image("image-3.png").tobytes()

    def test_jsonl_and_input_image(self, run: Run, repositories: dict[str, Path]) -> None:
        save_image(Image.effect_noise((50, 40), 80), "start.jpg")
        line = {
            "prompt": "b",
            "seed": 9,
            "width": 48,
            "input_image": "start.jpg",
            "denoising_strength": 0.5,
            "out": "b.webp",
        }
        Path("p.jsonl").write_text(f'{{"prompt": "a", "sigma_shift": 4}}\n{json.dumps(line)}\n')
        result = run(
            "generate", "--prompts", "p.jsonl", "--model", repositories["ernie-image"], *FAST,
            "--out", "a.jpg", "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert result.stdout.split() == ["a.jpg", "b.webp"]
        assert result.stderr == ""
        assert (load_image("a.jpg").size, load_image("b.webp").size) == ((32, 32), (48, 32))
        found = read_parameters("b.webp") or {}
        assert (found["seed"], found["denoising_strength"]) == (9, 0.5)

    def test_every_option_reaches_the_pipeline(
        self, run: Run, repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[str, Any] = {}

        def record(**keywords: Any) -> Image.Image:
            seen.update(keywords)
            return Image.new("RGB", (8, 8))

        monkeypatch.setattr(cli_module, "_load", lambda *_: record)
        model = repositories["qwen-image"]
        assert run("generate", "x", "--model", model).exit_code == 0
        assert seen.keys() == {"prompt", "seed", "num_images_per_prompt", "progress_bar_cmd"}
        seen.clear()
        result = run(
            "generate", "x", "--model", model, "--negative-prompt", "y", "--seed", 1, "--steps", 2, "--cfg-scale", 3,
            "--size", "64x32", "--denoising-strength", 0.5, "--shift-mu", 0.7, "--no-cfg-normalize",
            "--rand-device", "cuda", "--tiled", "--tile-size", 32, "--tile-stride", 16, "--batch-size", 2,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        seen.pop("progress_bar_cmd")
        assert seen == {
            "prompt": "x", "negative_prompt": "y", "seed": 1, "num_inference_steps": 2, "cfg_scale": 3.0, "width": 64,
            "height": 32, "denoising_strength": 0.5, "exponential_shift_mu": 0.7, "cfg_normalize": False,
            "rand_device": "cuda", "tiled": True, "tile_size": 32, "tile_stride": 16, "batch_size": 2,
            "num_images_per_prompt": 1,
        }  # fmt: skip

    def test_memory_options_change_no_bit(self, run: Run, repositories: dict[str, Path]) -> None:
        common = ("generate", "x", "--model", repositories["qwen-image"], *FAST, "--seed", 1)
        assert run(*common, "--out", "a.png").exit_code == 0
        result = run(*common, "--out", "b.png", "--vram-limit", 0, "--offload-device", "disk")
        assert result.exit_code == 0, result.output
        assert load_image("a.png").tobytes() == load_image("b.png").tobytes()

    def test_an_id_is_found_in_the_local_models(self, run: Run, repositories: dict[str, Path]) -> None:
        shutil.copytree(repositories["qwen-image"], Path("models/Qwen/Qwen-Image"))
        result = run("generate", "x", "--model", "Qwen/Qwen-Image", "--skip-download", *FAST)
        assert result.exit_code == 0, result.output
        assert (read_parameters("image.png") or {})["model"] == "Qwen/Qwen-Image"
        result = run("generate", "x", "--model", "Qwen/Qwen-Image-2512", "--skip-download", *FAST)
        assert result.exit_code == 2
        assert "Error: " in result.stderr

    def test_the_wrong_family(self, run: Run, repositories: dict[str, Path]) -> None:
        result = run("generate", "x", "--model", repositories["qwen-image"], "--family", "ernie-image")
        assert result.exit_code == 2
        assert "Error: " in result.stderr
        assert "Qwen-Image" in result.stderr
        assert left_over() == []

    def test_interrupted_runs_keep_what_is_done(
        self, run: Run, repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("p.txt").write_text("a\nb\nc")

        def interrupt(prompt: str, **_: Any) -> Image.Image:
            if prompt == "c":
                raise KeyboardInterrupt
            return Image.new("RGB", (8, 8))

        monkeypatch.setattr(cli_module, "_load", lambda *_: interrupt)
        result = run("generate", "--prompts", "p.txt", "--model", repositories["qwen-image"])
        assert result.exit_code == 130
        assert result.stderr.strip() == "Interrupted"
        assert left_over() == ["image-0.png", "image-1.png", "p.txt"]

    def test_a_full_device_gets_a_hint(
        self, run: Run, repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(**_: Any) -> Image.Image:
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(cli_module, "_load", lambda *_: full)
        result = run("generate", "x", "--model", repositories["qwen-image"])
        assert result.exit_code == 2
        assert "--offload-device" in result.stderr

    @pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="needs POSIX signals")
    def test_ctrl_c(self, tmp_path: Path, repositories: dict[str, Path]) -> None:
        command = [
            sys.executable, "-m", "diffsynth.cli", "generate", "x", "--model", str(repositories["qwen-image"]),
            "--steps", "10000", "--size", "64x64", "--device", "cpu",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(Path(cli_module.__file__).parents[1])}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        seen = b""
        while b"step/s" not in seen and (read := process.stderr.read(16)):
            seen += read
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, (seen + err).decode()[-2000:]
        assert err.decode().strip().endswith("Interrupted")
        assert out == b""
        assert os.listdir(tmp_path) == []


class TestInspect:
    @pytest.mark.parametrize("family", ["qwen-image", "ernie-image"])
    def test_repository(self, run: Run, repositories: dict[str, Path], family: str) -> None:
        result = run("inspect", repositories[family])
        assert result.exit_code == 0, result.output
        for word in ("transformer", "text encoder", "autoencoder", family, "F32", "complete"):
            assert word in result.stdout

    def test_component_folder_file_and_shards(self, run: Run, repositories: dict[str, Path]) -> None:
        vae = repositories["ernie-image"] / "vae"
        (report,) = inspect_paths([vae])
        assert report.complete
        (same,) = inspect_paths([vae / "diffusion_pytorch_model.safetensors"])
        assert same == report
        tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
        names = sorted(tensors)
        for number, chosen in ((1, names[:50]), (2, names[50:])):
            save_file({name: tensors[name] for name in chosen}, f"m-0000{number}-of-00002.safetensors")
        shutil.copy(vae / "config.json", "config.json")
        result = run("inspect", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "--json")
        assert result.exit_code == 0, result.output
        (document,) = json.loads(result.stdout)
        assert len(document["files"]) == 2
        (component,) = document["components"]
        assert (component["family"], component["component"]) == ("ernie-image", "vae")
        assert component["contents"]["tensors"] == len(tensors)
        assert component["contents"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        result = run("inspect", "m-00002-of-00002.safetensors")
        assert result.exit_code == 1
        assert "Shards 1 of 2 were not given" in result.stdout or "missing" in result.stdout

    def test_missing_misshaped_and_extra(self, run: Run, repositories: dict[str, Path]) -> None:
        place = repositories["qwen-image"] / "transformer"
        shutil.copy(place / "config.json", "config.json")
        tensors = load_file(place / "diffusion_pytorch_model.safetensors")
        gone, bent = "norm_out.linear.bias", "txt_norm.weight"
        del tensors[gone]
        tensors[bent] = torch.zeros(3)
        tensors["stranger"] = torch.zeros(2)
        save_file(tensors, "x.safetensors")
        result = run("inspect", "x.safetensors")
        assert result.exit_code == 1
        assert re.search(rf"missing +1: {gone}\n", result.stdout)
        assert re.search(rf"mis-shaped +1: {bent}: \[3\] instead of \[32\]", result.stdout)
        assert re.search(r"extra +1: stranger", result.stdout)

    def test_unknown(self, run: Run) -> None:
        save_file({"some.weight": torch.zeros(2, 3)}, "x.safetensors")
        result = run("inspect", "x.safetensors")
        assert result.exit_code == 1
        for word in ("some.weight", "F32", "24 bytes", "no model this package knows"):
            assert word in result.stdout

    def test_incomplete_repository(self, run: Run, repositories: dict[str, Path]) -> None:
        root = repositories["qwen-image"]
        for name in ("transformer", "text_encoder"):
            shutil.copytree(root / name, Path("repository") / name)
        result = run("inspect", "repository")
        assert result.exit_code == 1
        assert "Qwen-Image also needs: autoencoder (VAE), tokenizer" in result.stdout
        broken = Path("repository/transformer/diffusion_pytorch_model.safetensors")
        broken.write_bytes(broken.read_bytes()[:-10])
        result = run("inspect", "repository")
        assert result.exit_code == 1
        assert "truncated" in result.stdout
        shutil.rmtree("repository")
        shutil.copytree(root / "vae", "repository/vae")
        shutil.copytree(repositories["ernie-image"] / "transformer", "repository/transformer")
        assert "mixes components of ernie-image and qwen-image" in run("inspect", "repository").stdout

    def test_several_at_once_and_what_is_no_model(self, run: Run) -> None:
        save_image(Image.new("RGB", (8, 8)), "fine.png", parameters={"prompt": "two\nlines", "mask": None})
        Path("page.safetensors").write_text("<html>")
        save_image(Image.effect_noise((64, 64), 90), "cut.png")
        os.truncate("cut.png", 2000)
        Path("empty").mkdir()
        result = run("inspect", "fine.png", "page.safetensors", "cut.png", "absent.safetensors", "empty")
        assert result.exit_code == 1
        assert '"two\\nlines"' in result.stdout
        assert "mask" not in result.stdout
        assert "HTML page" in result.stdout
        assert result.stdout.count("problem") == 4
        assert run("inspect", "fine.png").exit_code == 0

    def test_images_need_no_torch(self, run: Run) -> None:
        save_image(Image.new("RGB", (8, 8)), "x.webp", parameters={"seed": 3})
        code = (
            "import sys; from diffsynth.cli import main\n"
            "try: main(['inspect', 'x.webp', '--json'])\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(cli_module.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        (document,) = json.loads(done.stdout)
        assert document["complete"]
        assert document["parameters"] == {"seed": 3}


def test_the_help_names_every_family_and_setting(run: Run) -> None:
    shown = run("generate", "--help").stdout
    assert all(family.spec.name in shown for family in FAMILIES)
    for key in SETTINGS.keys() - {"prompt"}:
        assert f"--{key.replace('_', '-')}" in shown
