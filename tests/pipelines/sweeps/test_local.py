"""`blemish run`: cell beside cell, and what one failure leaves of the others."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params
from rich.console import Console
from tiny_models import SETTINGS
from waiting import until

from anomaly_models import MODELS as METHODS
from pipelines import refusals
from pipelines.errors import DatasetError
from pipelines.paths import Project
from pipelines.settings.params import Params
from pipelines.sweeps.local import make, outdated, units
from pipelines.sweeps.processes import Processes

SHELL = environment(Path(sys.executable).parent)
CODE = ("anomaly_models", "pipelines", "pretrained", ".dvc", "cli.py", "dvc.yaml", ".dvcignore", ".gitignore")
OTHER = "two words"


def params_of(values: dict[str, Any]) -> Params:
    """With the models' settings checked, as `load_checked` has them."""
    params = Params.model_validate(values)
    configs = {
        name: METHODS[params.method_of(name)].Config.model_validate(
            {key: value for key, value in section.items() if key != "method"}
        )
        for name, section in values["models"].items()
    }
    return params.model_copy(update={"models": configs})


def both_models() -> dict[str, Any]:
    values = tiny_params()
    values["data"]["categories"] = [CATEGORY, OTHER]
    values["models"] = {"efficient_ad": SETTINGS["efficient_ad"], "fapm": values["models"]["fapm"]}
    values["distill"] = {"efficient_ad": {}, "bgad": {}}  # the second is of no model of the file
    return values


def test_a_unit_waits_for_what_it_needs_and_no_core_for_long(tmp_path: Path) -> None:
    found = units(params_of(both_models()), Project(tmp_path))
    assert [unit.name for unit in found] == [
        "download demo_textures",
        f"prepare {CATEGORY}",
        f"prepare {OTHER}",
        "distill efficient_ad",
        f"efficient_ad on {CATEGORY}",
        f"efficient_ad on {OTHER}",
        f"fapm on {CATEGORY}",
        f"fapm on {OTHER}",
    ]
    needed = {unit.name: [other.name for other in unit.after] for unit in found}
    assert needed["distill efficient_ad"] == ["download demo_textures"]  # whose folder its photos are
    assert needed[f"prepare {OTHER}"] == []  # of a folder that nobody downloads
    assert needed[f"efficient_ad on {OTHER}"] == [f"prepare {OTHER}", "distill efficient_ad"]
    places = [unit.name for unit in found]
    assert all(places.index(name) < places.index(unit) for unit, names in needed.items() for name in names)
    name = f"fapm-{OTHER}"
    assert found[-1].stages == (f"train@{name}-0", f"evaluate@{name}-0", f"export@{name}")


class Recorded:
    """Stands for DVC: says what runs, and lets one of them wait for another that needs nothing."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._other = threading.Event()

    def dvc(self, _: list[str], name: str) -> int:
        self.begun.append(name)
        if name == "download demo":
            assert self._other.wait(10)
        if name == "distill efficient_ad":
            self._other.set()
        return 0

    def stop(self) -> None: ...


def test_no_core_waits_for_what_another_is_at(tmp_path: Path) -> None:
    """A teacher is made while the pictures are drawn, though the file has what these are prepared by before it."""
    values = both_models()
    drawn = {"categories": ["gear"], "image_size": 64, "train": 8, "test_good": 1, "test_defect": 1, "seed": 0}
    values["download"] = {"demo": drawn, **values["download"]}
    values["data"] = {"root": "data/demo", "categories": ["gear"]}
    processes = Recorded()
    found = [unit for unit in units(params_of(values), Project(tmp_path)) if unit.cell is None]
    assert make(found, cast(Processes, processes), Console(file=io.StringIO()), 2) == {}
    assert sorted(processes.begun[:2]) == ["download demo", "download demo_textures"]
    assert processes.begun[2:] == ["distill efficient_ad", "prepare gear"]


def test_each_seed_is_a_unit_and_the_first_is_exported(tmp_path: Path) -> None:
    found = units(params_of(both_models() | {"train": {"seeds": [3, 0]}}), Project(tmp_path))
    stages = {unit.name: unit.stages for unit in found if unit.cell is not None and unit.cell.category == CATEGORY}
    assert stages == {
        f"fapm on {CATEGORY}, seed 3": (
            f"train@fapm-{CATEGORY}-3",
            f"evaluate@fapm-{CATEGORY}-3",
            f"export@fapm-{CATEGORY}",
        ),
        f"fapm on {CATEGORY}": (f"train@fapm-{CATEGORY}-0", f"evaluate@fapm-{CATEGORY}-0"),
        f"efficient_ad on {CATEGORY}, seed 3": (
            f"train@efficient_ad-{CATEGORY}-3",
            f"evaluate@efficient_ad-{CATEGORY}-3",
            f"export@efficient_ad-{CATEGORY}",
        ),
        f"efficient_ad on {CATEGORY}": (f"train@efficient_ad-{CATEGORY}-0", f"evaluate@efficient_ad-{CATEGORY}-0"),
    }


def test_a_teacher_of_the_same_settings_is_waited_for(tmp_path: Path) -> None:
    """Since it is taken over then, and two at once would be made twice."""
    values = both_models()
    values["models"]["efficient_ad_wide"] = values["models"]["efficient_ad"] | {"method": "efficient_ad"}
    values["distill"] = {name: {"width": "tiny"} for name in ("efficient_ad", "efficient_ad_wide")}
    after = {unit.name: [other.name for other in unit.after] for unit in units(params_of(values), Project(tmp_path))}
    assert after["distill efficient_ad"] == ["download demo_textures"]
    assert after["distill efficient_ad_wide"] == ["download demo_textures", "distill efficient_ad"]
    values["distill"]["efficient_ad_wide"] = {"width": "small"}
    after = {unit.name: [other.name for other in unit.after] for unit in units(params_of(values), Project(tmp_path))}
    assert after["distill efficient_ad_wide"] == ["download demo_textures"]


def test_what_is_out_of_date_stands_below_the_warnings() -> None:
    assert outdated("WARNING: 'pretrained/fapm' is empty.\n{}\n") == set()
    assert outdated('{"check": ["always changed"], "train@fapm-nut": [{"changed deps": {}}]}') == {
        "check",
        "train@fapm-nut",
    }


def test_why_a_verb_refused_is_kept_until_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "refused" / "fapm" / "nut" / "seed0.json"
    with pytest.raises(DatasetError), refusals.kept(path, "train"):
        raise DatasetError("read by whoever typed it")
    assert refusals.read(path) is None
    monkeypatch.setenv("DVC_STAGE", "train@fapm-nut")
    with pytest.raises(DatasetError), refusals.kept(path, "train"):
        raise DatasetError("no images")
    assert refusals.read(path) == refusals.Refusal(verb="train", reason="no images")
    with refusals.kept(path, "latency"):
        pass
    assert path.exists()  # another verb's
    with refusals.kept(path, "train"):
        pass
    assert refusals.read(path) is None
    with pytest.raises(ZeroDivisionError), refusals.kept(path, "train"):
        raise ZeroDivisionError("by zero")
    assert refusals.read(path) == refusals.Refusal(verb="train", reason="ZeroDivisionError: by zero")
    with pytest.raises(KeyboardInterrupt), refusals.kept(path, "evaluate"):
        raise KeyboardInterrupt
    assert refusals.read(path) == refusals.Refusal(verb="train", reason="ZeroDivisionError: by zero")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_project(tmp_path_factory.mktemp("run"), *CODE)
    values = tiny_params()
    values["data"]["categories"] = [CATEGORY, OTHER]
    write_params(root, values)
    for category in (CATEGORY, OTHER):
        draw_category(root / "images" / category, train=8, good=3, defect=3)
    commit(root)
    return root


def ran(root: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "cli.py", *arguments]
    done = subprocess.run(command, cwd=root, env=SHELL, capture_output=True, text=True, check=False)
    return done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_one_failure_costs_nothing_else(root: Path) -> None:
    damaged = root / "images" / OTHER / "train" / "good" / "000.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"nonsense")
    code, shown, told = ran(root, "run", "--jobs", "1")
    assert code == 1
    reason = f"refused by prepare: category '{OTHER}': images/{OTHER}/train/good/000.png: not a PNG"
    assert f"prepare {OTHER} failed: {reason}" in told
    assert f"fapm on {OTHER} failed: not made, for want of prepare {OTHER}" in told
    assert f"fapm on {CATEGORY}: Image AUROC 100.0" in told
    assert f"Not in this report: fapm on {OTHER}: {reason}" in shown
    project = Project(root)
    assert project.cell("fapm", CATEGORY, 0).latency.exists()
    assert OTHER not in (project.report("tests") / "leaderboard.csv").read_text()
    assert reason in (project.report("tests") / "report.md").read_text()
    assert ran(root, "results")[0] == 1

    damaged.write_bytes(whole)
    code, shown, told = ran(root, "run", "--jobs", "2")
    assert code == 0, told
    assert "Not in this report" not in shown
    assert OTHER in (project.report("tests") / "leaderboard.csv").read_text()
    assert not list((root / "refused").rglob("*.json"))
    code, shown, told = ran(root, "run")
    assert (code, told) == (0, "")

    values = tiny_params()
    values["data"]["categories"] = [CATEGORY, "third"]
    write_params(root, values)
    code, shown, _ = ran(root, "results")
    assert code == 1
    assert "Not in this report, which is of other cells: fapm on third" in shown
    assert f"No longer in params.yaml: fapm on {OTHER}" in shown


def test_what_runs_ends_with_it(root: Path) -> None:
    """SIGTERM to `run` alone."""
    values = tiny_params()
    values["models"]["fapm"]["neighbours"] = 3
    write_params(root, values)
    log = Project(root).log(f"fapm on {CATEGORY}")
    log.unlink(missing_ok=True)  # of the tests before this one
    command = [sys.executable, "cli.py", "run"]
    process = subprocess.Popen(command, cwd=root, env=SHELL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: log.exists() and "> python cli.py train" in log.read_text(encoding="utf-8"), running=process)
    assert children_of(process.pid, root) != []
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    until(lambda: not children_of(process.pid, root), 10)  # Python's tracker of resources, which hears that it is alone


def children_of(own: int, root: Path) -> list[str]:
    """The commands that run in the project's folder, but for the process itself."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and int(folder.name) not in (own, os.getpid())
                and (folder / "cwd").readlink() == root
            ):
                found.append((folder / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue  # ended, or another user's
    return found
