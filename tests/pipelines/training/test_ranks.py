"""One cell by `torchrun`: what it leaves, what it says, and what is left of it when one of its processes is killed."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CATEGORY, FAPM, MEAN_COLOUR, draw_category, tiny_params, write_params
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import SETTINGS

from anomaly_models.common.shards import Shard
from pipelines.errors import ParamsError, StageError
from pipelines.paths import Project
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.training import ranks
from pipelines.training.train import train

ROOT = Path(__file__).parents[3]
TORCHRUN = Path(sysconfig.get_path("scripts")) / "torchrun"
MODEL = SETTINGS["bgad"] | {"backbone": FAPM["backbone"]}
OF_ONE = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MLFLOW_TRACKING_URI", "DVC_STAGE", "KILL"}


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in OF_ONE}
    return own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200"} | more


def torchrun(project: Path, *command: str, processes: int = 2, **more: str) -> subprocess.CompletedProcess[str]:
    """`--standalone` finds a free port."""
    started = [TORCHRUN, "--standalone", f"--nproc-per-node={processes}", "--local-addr=127.0.0.1", *command]
    return subprocess.run(
        started, cwd=project, env=environment(**more), capture_output=True, text=True, check=False, timeout=240
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the processes say, before torchrun's report of those that failed."""
    lines = done.stderr.splitlines()
    own = re.compile(r"^[WE]\d{4} |^Traceback ")
    for number, line in enumerate(lines):
        if own.match(line):
            return lines[:number]
    return lines


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    draw_category(root / "images" / CATEGORY)
    write_params(root, tiny_params() | {"models": {"bgad": MODEL, "fapm": FAPM}})
    params = load_checked(root / "params.yaml")
    source, target = root / "images" / CATEGORY, Project(root).prepared(CATEGORY)
    prepare(source, CATEGORY, params.prepare, params.views().frames, target, lambda done, total: None)
    return root


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(prepared, root)
    done = torchrun(root, "-m", "blemish", "train", "bgad", CATEGORY)
    assert done.returncode == 0, done.stderr
    assert [line for line in said(done) if "warning: bgad" not in line and "warning: squares" not in line] == []
    return root


@pytest.fixture
def fresh(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "project"


def weights(root: Path, model: str = "bgad") -> dict[str, torch.Tensor]:
    return load_file(Project(root).cell(model, CATEGORY, 0).weights)


def runs(root: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "tests"]
    return list(client.search_runs([experiment.experiment_id]))


def left_over(root: Path) -> list[Path]:
    return [path for path in (root / "work").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_two_processes_leave_what_one_does(trained: Path, fresh: Path, blemish: Any) -> None:
    assert blemish("train", "bgad", CATEGORY).code == 0
    expected = weights(fresh)
    for name, value in weights(trained).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)
    (run,) = runs(trained)
    assert (run.info.status, run.data.tags["processes"], run.data.tags["threads"]) == ("FINISHED", "2", "1")
    (own,) = runs(fresh)
    assert own.data.tags["processes"] == "1"
    assert own.data.params == run.data.params
    assert own.data.metrics.keys() - run.data.metrics.keys() <= {"system/process_cpu_percentage"}
    assert run.data.metrics["loss.likelihood"] == pytest.approx(own.data.metrics["loss.likelihood"], rel=1e-4)
    assert left_over(trained) == []


def test_the_verbs_that_follow_take_it(trained: Path, monkeypatch: pytest.MonkeyPatch, blemish: Any) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    evaluated = blemish("evaluate", "bgad", CATEGORY)
    assert evaluated.code == 0, evaluated.err
    assert len(runs(trained)) == 1


def test_a_model_without_steps_is_trained_too(fresh: Path) -> None:
    done = torchrun(fresh, "-m", "blemish", "train", "fapm", CATEGORY)
    assert done.returncode == 0, done.stderr
    assert said(done) == []
    assert weights(fresh, "fapm")
    (run,) = runs(fresh)
    assert run.info.status == "FINISHED"


def misspelt(root: Path) -> None:
    values = tiny_params() | {"models": {"bgad": MODEL | {"epoch": 3}}}
    write_params(root, values)


def diverging(root: Path) -> None:
    values = tiny_params() | {"models": {"bgad": MODEL | {"learning_rate": 1e30}}}
    write_params(root, values)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (misspelt, r"error: params\.yaml: 1 problem\n  models\.bgad\.epoch = 3: unknown key.*"),
        (diverging, r"error: step \d+: a loss is not finite \(.*\); lower the learning rate or check the data"),
    ],
)
def test_a_refusal_is_one_line(spoil: Callable[[Path], None], line: str, fresh: Path) -> None:
    spoil(fresh)
    done = torchrun(fresh, "-m", "blemish", "train", "bgad", CATEGORY)
    assert done.returncode != 0
    found = "\n".join(each for each in said(done) if "warning: squares" not in each)
    assert re.fullmatch(line, found), found
    assert "blemish FAILED" in done.stderr  # torchrun's own report follows
    if spoil is diverging:
        assert [run.info.status for run in runs(fresh)] == ["FAILED"]


def test_what_one_process_alone_lacks_is_said_by_it(fresh: Path, tmp_path: Path) -> None:
    """As on a second machine, without the data."""
    program = tmp_path / "elsewhere.py"
    program.write_text(
        "import os, cli\nif os.environ['RANK'] == '1':\n    os.chdir(os.environ['ELSEWHERE'])\ncli.main()\n",
        encoding="utf-8",
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(fresh / "params.yaml", elsewhere)
    done = torchrun(fresh, str(program), "train", "bgad", CATEGORY, ELSEWHERE=str(elsewhere))
    assert done.returncode != 0
    assert [line for line in said(done) if line.startswith("error: process 1 of 2, from 0: ")], done.stderr
    assert "Traceback" not in "\n".join(said(done))


def test_a_killed_process_ends_all_and_the_same_command_goes_on(trained: Path, fresh: Path) -> None:
    """With as many processes to the same bits."""
    program = str(ROOT / "tests" / "kept_often.py")
    killed = torchrun(fresh, program, "train", "bgad", CATEGORY, KILL="1:4")
    assert killed.returncode != 0
    assert not Project(fresh).cell("bgad", CATEGORY, 0).trained.exists()
    own = [line for line in said(killed) if line.startswith("error: ")]
    assert [line for line in own if "another of the 2 processes has ended" not in line] == []
    again = torchrun(fresh, program, "train", "bgad", CATEGORY)
    assert again.returncode == 0, again.stderr
    assert re.search(r"goes on at step [34] of \d+, where it was killed", again.stderr)
    expected = weights(trained)
    assert all(torch.equal(value, expected[name]) for name, value in weights(fresh).items())
    (run,) = runs(fresh)
    assert run.info.status == "FINISHED"
    assert left_over(fresh) == []


def test_one_process_goes_on_with_what_two_began(trained: Path, fresh: Path, blemish: Any) -> None:
    killed = torchrun(fresh, str(ROOT / "tests" / "kept_often.py"), "train", "bgad", CATEGORY, KILL="0:4")
    assert killed.returncode != 0
    again = blemish("train", "bgad", CATEGORY)
    assert again.code == 0, again.err
    assert "goes on at step" in again.err
    for name, value in weights(trained).items():
        torch.testing.assert_close(value, weights(fresh)[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "changes", "processes", "told"),
    [
        ("bgad", {"batch_size": 2}, 3, "bgad.batch_size 2 is smaller than 3 processes, which share each batch; raise"),
        ("fapm", {}, 10, "fapm on squares: 9 good images to learn from are fewer than 10 processes; start 9 or fewer"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    model: str, changes: dict[str, Any], processes: int, told: str, fresh: Path, console: Console
) -> None:
    write_params(fresh, tiny_params() | {"models": {model: {"bgad": MODEL, "fapm": FAPM}[model] | changes}})
    params, together = load_checked(fresh / "params.yaml"), ranks.Ranks(Shard(0, processes))
    with pytest.raises(StageError, match=told):
        train(model, CATEGORY, params, Project(fresh), torch.device("cpu"), console, ranks=together)


def test_a_model_that_knows_of_no_shares_is_refused(sixth_model: str, fresh: Path, console: Console) -> None:
    write_params(fresh, tiny_params() | {"models": {sixth_model: MEAN_COLOUR}})
    params, together = load_checked(fresh / "params.yaml"), ranks.Ranks(Shard(0, 2))
    with pytest.raises(StageError, match=r"^mean_colour: mean_colour cannot be trained by several processes; start"):
        train(sixth_model, CATEGORY, params, Project(fresh), torch.device("cpu"), console, ranks=together)


def test_processes_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.device_of_rank("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert ranks.device_of_rank("auto") == torch.device("cuda", 1)
    assert chosen == [1]
    with pytest.raises(ParamsError, match=r"^device 'cuda:0': of 2 processes each takes its own; use auto"):
        ranks.device_of_rank("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ParamsError, match=r"^device 'cuda': this machine has 1 GPUs for 2 processes; start as many"):
        ranks.device_of_rank("cuda")
