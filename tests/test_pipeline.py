"""`dvc repro` from nothing to the report, in a project of its own: what is rebuilt, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params
from mlflow import MlflowClient
from safetensors.torch import load_file
from tiny_models import SETTINGS

CATEGORIES = [CATEGORY, "two words"]
SHELL = environment(Path(sys.executable).parent)


def dvc(root, *arguments):
    done = subprocess.run(["dvc", *arguments], cwd=root, env=SHELL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(output):
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def runs(root):
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("tests").experiment_id])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project as a clone has it: the code, its own params and images, under git."""
    code = ("anomaly_models", "pipelines", "pretrained", ".dvc", "cli.py", "dvc.yaml", ".dvcignore", ".gitignore")
    root = copy_project(tmp_path_factory.mktemp("project"), *code)
    values = tiny_params()
    values["data"]["categories"] = CATEGORIES
    values["prepare"]["anomalous_train"]["count"] = 1  # of three; no model learns from it
    write_params(root, values)
    for category in CATEGORIES:
        draw_category(root / "images" / category, train=8, good=3, defect=3)
    commit(root)
    return root


@pytest.fixture(scope="module")
def reproduced(root):
    return ran(dvc(root, "repro"))


def test_every_stage_runs_once(root, reproduced):
    cells = [f"fapm-{category}" for category in CATEGORIES]
    stages = {f"{verb}@{cell}" for verb in ("train", "evaluate", "export", "latency") for cell in cells}
    stages |= {f"prepare@{category}" for category in CATEGORIES} | {"check", "download@demo_textures", "report"}
    assert set(reproduced) == stages
    summary = json.loads((root / "reports" / "summary.json").read_text(encoding="utf-8"))
    assert [cell["category"] for cell in summary["cells"]] == CATEGORIES
    assert all(cell["metrics"]["image_auroc"] == 1.0 for cell in summary["cells"])
    assert len(list(root.glob("exported/fapm/*/model.onnx"))) == 2
    assert all(cell["latency"]["milliseconds"]["total"]["p50"] > 0 for cell in summary["cells"])
    assert all(f"/runs/{cell['run_id']}?" in cell["run_url"] for cell in summary["cells"])
    assert {path.name for path in (root / "reports").iterdir()} >= {"report.html", "report.md", "tables.md"}


def test_one_run_per_cell_and_a_summary(root, reproduced):
    found = {run.info.run_name: run for run in runs(root)}
    assert set(found) == {"fapm-squares", "fapm-two words", "summary"}
    assert all(run.info.status == "FINISHED" for run in found.values())
    cell = found["fapm-squares"]
    assert cell.data.metrics["image_auroc"] == 1.0
    assert cell.data.tags["git_dirty"] == "false"
    assert cell.data.tags["parity.decisions_changed"] == "0"
    assert found["summary"].data.metrics == {}  # each would be a chart beside those of the cells
    assert "| fapm | 100.0 |" in found["summary"].data.tags["mlflow.note.content"]
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    logged = {item.path for item in client.list_artifacts(cell.info.run_id, "figures")}
    assert logged == {"figures/curves.png", "figures/examples.png"}
    (model,) = client.search_logged_models(
        experiment_ids=[cell.info.experiment_id], filter_string=f"source_run_id = '{cell.info.run_id}'"
    )
    assert model.name == "model"
    names = [registered.name for registered in client.search_registered_models()]
    champions = {client.get_model_version_by_alias(name, "champion").run_id for name in names}
    assert champions == {found["fapm-squares"].info.run_id, found["fapm-two words"].info.run_id}


def test_nothing_to_do(root, reproduced):
    assert ran(dvc(root, "repro")) == []


def test_metrics_and_plots_are_shown(root, reproduced):
    shown = json.loads(dvc(root, "metrics", "show", "--json"))
    files = shown[""]["data"]
    assert files["metrics/fapm/squares.json"]["data"]["image_auroc"] == 1.0
    page = dvc(root, "plots", "show", "--out", "plots").strip()
    assert "Image AUROC" in Path(page.removeprefix("file://")).read_text(encoding="utf-8")


def test_a_changed_parameter_rebuilds_what_depends_on_it_even_when_killed(root, reproduced):
    """SIGKILL to dvc and `train` alike; then the same bits as without the kill, and no run left RUNNING."""
    whole = load_file(root / "models" / "fapm" / f"{CATEGORY}.trained" / "model.safetensors")
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["fapm"]["neighbours"] = 3  # of the image score: the memory stays what it was
    write_params(root, values)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(["dvc", "repro"], cwd=root, env=SHELL, **quiet)
    deadline = time.monotonic() + 120
    while not list(root.glob(f"work/fapm/{CATEGORY}/*/run.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "RUNNING" in {run.info.status for run in runs(root)}
    verbs = ("train", "evaluate", "export", "latency")
    rebuilt = {f"{verb}@fapm-{category}" for verb in verbs for category in CATEGORIES}
    assert set(ran(dvc(root, "repro"))) == rebuilt | {"report"}  # `check` was through before the kill
    again = load_file(root / "models" / "fapm" / f"{CATEGORY}.trained" / "model.safetensors")
    assert all(again[name].equal(whole[name]) for name in whole)
    assert {run.info.status for run in runs(root)} == {"FINISHED"}
    values["evaluate"]["false_alarm_rate"] = 0.3
    write_params(root, values)
    assert not [stage for stage in ran(dvc(root, "repro")) if stage.startswith(("train", "prepare", "download"))]


@pytest.mark.usefixtures("reproduced")
def test_a_model_that_learns_from_defects_makes_others_be_tested_again_and_nobody_train(root):
    """And not even that where the others are tested on what it learns from."""
    dvc(root, "repro")  # all is done, whatever the tests before this one left
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["bgad"] = SETTINGS["bgad"] | {"backbone": values["models"]["fapm"]["backbone"]}
    for learnt_defects, expected in (("tested_by_others", set()), ("tested_by_nobody", {"evaluate", "export"})):
        values["evaluate"]["learnt_defects"] = learnt_defects
        write_params(root, values)
        assert ran(dvc(root, "repro", "check")) == ["check"]
        changed = json.loads(dvc(root, "status", "--json"))
        assert {name.split("@")[0] for name in changed if "@fapm-" in name} == expected
        assert f"train@bgad-{CATEGORY}" in changed


@pytest.mark.usefixtures("reproduced")
def test_a_new_models_size_makes_no_other_model_train(root):
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"].pop("bgad", None)
    write_params(root, values)
    dvc(root, "repro")
    values["models"]["bgad"] = SETTINGS["bgad"] | {"backbone": values["models"]["fapm"]["backbone"], "image_size": 96}
    values["evaluate"]["learnt_defects"] = "tested_by_others"
    write_params(root, values)
    prepare = [f"prepare@{category}" for category in CATEGORIES]
    first, *others = ran(dvc(root, "repro", *prepare))
    assert (first, set(others)) == ("check", set(prepare))  # DVC takes stages that do not need each other in any order
    assert {path.name for path in (root / "data/prepared" / CATEGORY).glob("images_*")} == {
        "images_64_bilinear.npy",
        "images_96_bilinear.npy",
    }
    changed = json.loads(dvc(root, "status", "--json"))
    assert not [name for name in changed if "@fapm-" in name]
    assert f"train@bgad-{CATEGORY}" in changed
