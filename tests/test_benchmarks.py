"""The benchmark scripts run and compare like with like; nothing here looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # benchmarks are not part of what is installed

from benchmarks import cpu, cuda  # noqa: E402
from benchmarks.common import Comparison, Figure, Report, Samples, checked_difference, in_turns  # noqa: E402
from benchmarks.figures import Options, step  # noqa: E402
from benchmarks.peers import PEERS, pair, random_weights  # noqa: E402

TINY = Options(repeats=1, threads=1, tiny=True)
SLOW = {"load"}
"""Starts processes that import diffusers."""


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in cpu.FIGURES]
)
def test_every_cpu_figure_measures_something_on_both_sides(name):
    figures = cpu.FIGURES[name](TINY)
    comparisons = [comparison for figure in figures for comparison in figure.comparisons]
    assert {figure.name for figure in figures} == {name}
    assert all(comparison.ours.min > 0 for comparison in comparisons)
    assert any(comparison.theirs is not None for comparison in comparisons)
    for figure in figures:
        assert all(comparison.case in figure.markdown() for comparison in figure.comparisons)


def test_the_cpu_script_ends_with_json_of_everything(capsys):
    cpu.main(["memory", "vae", "--tiny", "--threads", "1", "--repeats", "1"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [figure["name"] for figure in document["figures"]] == ["memory", "vae"]
    assert document["command"] == "python benchmarks/cpu.py memory vae --tiny --threads 1 --repeats 1"
    assert document["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("arguments", [["speed"], ["step", "--threads", "0"], ["step", "--repeats", "-1"]])
def test_the_cpu_script_refuses_what_it_cannot_mean(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu.main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_the_cuda_script_runs_its_whole_path_without_a_device(capsys):
    assert cuda.main(["--dry-run"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [figure["name"] for figure in document["figures"]]
    assert names == ["ceilings", *["transformer", "text encoder", "vae"] * 2]
    comparisons = [comparison for figure in document["figures"] for comparison in figure["comparisons"]]
    assert len([c for c in comparisons if c["difference"] is not None]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes")
def test_the_cuda_script_says_in_one_line_why_it_measures_nothing(capsys):
    assert cuda.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("script", ["cpu.py", "cuda.py"])
def test_the_scripts_start_from_any_folder(script, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--save" in done.stdout


@pytest.mark.parametrize(("family", "tera"), [("qwen-image", 70.0), ("ernie-image", 76.3)])
def test_operations_of_a_forward_at_published_size(family, tera):
    config = PEERS[family].family.spec.component("dit").parse_config({})
    assert cuda.forward_flops(config, 4096, 100) / 1e12 == pytest.approx(tera, abs=0.05)


@pytest.mark.parametrize("family", PEERS)
def test_every_component_has_a_published_size_to_build(family):
    settings = cuda.Settings(torch.device("cpu"), 1024, 20, (100, 100), 1, tiny=False, diffusers=False)
    for component in PEERS[family].family.spec.components:
        assert settings.config(component) is not None


@pytest.mark.parametrize("family", PEERS)
def test_a_step_with_other_weights_is_no_comparison(family):
    peer = PEERS[family]
    component = peer.family.spec.component("dit")
    config = component.parse_config(component.tiny)
    ours, theirs = pair(peer, "dit", config)
    run = step.Run.random(peer, (4, 4), 32)
    step.compare(run, ours, theirs, rounds=1, target=None)
    random_weights(ours, seed=5)
    with pytest.raises(AssertionError, match="outputs differ"):
        step.compare(run, ours, theirs, rounds=1, target=None)


def test_a_difference_that_is_no_number_is_refused():
    with pytest.raises(AssertionError, match="differ"):
        checked_difference("x", torch.tensor([float("nan")]), torch.ones(1), 1.0, relative=False)
    with pytest.raises(AssertionError, match="ours is"):
        checked_difference("x", torch.ones(2), torch.ones(1), 1.0, relative=False)


def test_runs_take_turns():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert in_turns(runs, 2, warmup=1) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(order) == "ababab"


def test_ratios_and_targets():
    faster = Comparison("x", Samples((1.0, 2.0)), Samples((2.0, 5.0)), at_least=2.0)
    assert (faster.ratio_min, faster.ratio_median, faster.met) == (2.0, 3.5 / 1.5, True)
    assert Comparison("x", Samples((1.0,)), Samples((1.9,)), at_least=2.0).met is False
    assert Comparison("x", Samples((0.4, 0.6, 0.7)), at_most=0.5).met is False
    assert Comparison("x", Samples((0.4,))).met is None


def test_a_result_file_ends_with_the_ratios_and_is_never_overwritten(tmp_path):
    comparison = Comparison("a case", Samples((1.0,)), Samples((2.0,)), at_least=3.0)
    report = Report("Title", "python benchmarks/cpu.py", [Figure("step", "of x", [comparison])], {}, {"CPU": "one"})
    first, second = report.save("cpu", tmp_path), report.save("cpu", tmp_path)
    assert first.name == f"{report.date}-cpu.md"
    assert second.name == f"{report.date}-cpu-2.md"
    text = first.read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## step: of x", "## Notes", "## Ratios"]
    assert text.splitlines()[-1].split("|")[1:-1] == [
        " step   ",
        " a case ",
        f" {'2.00x / 2.00x':30} ",
        " >= 3x  ",
        " NO  ",
    ]
