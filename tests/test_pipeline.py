"""`dvc repro` from nothing to the report, in a project of its own: what is rebuilt, and what a kill leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params
from mlflow import MlflowClient
from safetensors.torch import load_file
from tiny_models import SETTINGS
from waiting import until

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
    stages = {f"{verb}@{cell}-0" for verb in ("train", "evaluate") for cell in cells}
    stages |= {f"{verb}@{cell}" for verb in ("export", "latency") for cell in cells}
    stages |= {f"prepare@{category}" for category in CATEGORIES} | {"check", "download@demo_textures", "report"}
    assert set(reproduced) == stages
    summary = json.loads((root / "reports" / "tests" / "summary.json").read_text(encoding="utf-8"))
    assert [cell["category"] for cell in summary["cells"]] == CATEGORIES
    assert all(cell["metrics"]["image_auroc"] == 1.0 for cell in summary["cells"])
    assert len(list(root.glob("exported/fapm/*/model.onnx"))) == 2
    assert all(cell["latency"]["milliseconds"]["total"]["p50"] > 0 for cell in summary["cells"])
    assert all(f"/runs/{cell['run_id']}?" in cell["run_url"] for cell in summary["cells"])
    assert {path.name for path in (root / "reports" / "tests").iterdir()} >= {"report.html", "report.md", "tables.md"}


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
    for run, folder, names, made in (
        (cell, "figures", ("curves.png", "examples.png"), "evaluations/fapm/squares/seed0"),
        (found["summary"], "report", ("report.html", "report.md"), "reports/tests"),
    ):
        for name in names:  # on the disk once: here, in MLflow's folder and in DVC's cache
            path = root / "mlartifacts" / run.info.run_id / "artifacts" / folder / name
            assert path.samefile(root / made / name)
            assert path.stat().st_nlink >= 3  # more where another cell has drawn the same
    (model,) = client.search_logged_models(
        experiment_ids=[cell.info.experiment_id], filter_string=f"source_run_id = '{cell.info.run_id}'"
    )
    assert model.name == "model"
    names = [registered.name for registered in client.search_registered_models()]
    champions = {client.get_model_version_by_alias(name, "champion").run_id for name in names}
    assert champions == {found["fapm-squares"].info.run_id, found["fapm-two words"].info.run_id}


def test_nothing_to_do(root, reproduced):
    assert ran(dvc(root, "repro")) == []


def test_metrics_are_those_of_the_averages(root, reproduced):
    """So that `dvc exp show` fits a screen; those of a cell are shown if one asks for them."""
    shown = json.loads(dvc(root, "metrics", "show", "--json"))[""]["data"]
    assert list(shown) == ["metrics/summary.json"]
    averages = shown["metrics/summary.json"]["data"]
    assert list(averages) == ["image_auroc", "recall", "false_alarms"]
    assert averages["image_auroc"] == {"fapm": 1.0}
    summary = json.loads((root / "reports" / "tests" / "summary.json").read_text(encoding="utf-8"))
    assert averages["false_alarms"] == {"fapm": summary["averages"][0]["metrics"]["false_alarms"]}
    cell = "metrics/fapm/squares/seed0.json"
    asked = json.loads(dvc(root, "metrics", "show", "--json", cell))[""]["data"]
    assert asked[cell]["data"]["image_auroc"] == 1.0


def test_the_report_comes_back_from_the_cache(root, reproduced):
    page = root / "reports" / "tests" / "report.html"
    content = page.read_bytes()
    shutil.rmtree(page.parent)
    dvc(root, "checkout", "reports/tests")
    assert page.read_bytes() == content


def test_a_changed_parameter_rebuilds_what_depends_on_it_even_when_killed(root, reproduced):
    """SIGKILL to dvc and `train` alike; then the same bits as without the kill, and no run left RUNNING."""
    whole = load_file(root / "models" / "fapm" / CATEGORY / "seed0.trained" / "model.safetensors")
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["fapm"]["neighbours"] = 3  # of the image score: the memory stays what it was
    write_params(root, values)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(["dvc", "repro"], cwd=root, env=SHELL, **quiet)
    until(lambda: list(root.glob(f"work/fapm/{CATEGORY}/seed0/*/run.json")), running=process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "RUNNING" in {run.info.status for run in runs(root)}
    rebuilt = {f"{verb}@fapm-{category}-0" for verb in ("train", "evaluate") for category in CATEGORIES}
    rebuilt |= {f"{verb}@fapm-{category}" for verb in ("export", "latency") for category in CATEGORIES}
    assert set(ran(dvc(root, "repro"))) == rebuilt | {"report"}  # `check` was through before the kill
    again = load_file(root / "models" / "fapm" / CATEGORY / "seed0.trained" / "model.safetensors")
    assert all(again[name].equal(whole[name]) for name in whole)
    assert {run.info.status for run in runs(root)} == {"FINISHED"}
    values["evaluate"]["false_alarm_rate"] = 0.3
    write_params(root, values)
    assert ran(dvc(root, "repro", "check")) == ["check"]
    changed = {stage.split("@")[0] for stage in json.loads(dvc(root, "status", "--json"))}
    assert "evaluate" in changed
    assert changed.isdisjoint({"train", "prepare", "download"})
    values["evaluate"]["false_alarm_rate"] = 0.2
    write_params(root, values)


@pytest.mark.usefixtures("reproduced")
def test_a_model_that_learns_from_defects_makes_others_be_tested_again_and_nobody_train(root):
    """And not even that where the others are tested on what it learns from."""
    dvc(root, "repro")  # all is done, whatever the tests before this one left
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["bgad"] = SETTINGS["bgad"] | {"backbone": values["models"]["fapm"]["backbone"]}
    for learnt_defects, expected in (("tested_by_others", set()), ("tested_by_nobody", {"evaluate"})):
        values["evaluate"]["learnt_defects"] = learnt_defects
        write_params(root, values)
        assert ran(dvc(root, "repro", "check")) == ["check"]
        changed = json.loads(dvc(root, "status", "--json"))
        assert {name.split("@")[0] for name in changed if "@fapm-" in name} == expected
        assert f"train@bgad-{CATEGORY}-0" in changed


@pytest.mark.usefixtures("reproduced")
def test_a_new_models_size_makes_no_other_model_train(root):
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"].pop("bgad", None)
    values["evaluate"]["learnt_defects"] = "tested_by_nobody"
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
    assert f"train@bgad-{CATEGORY}-0" in changed


@pytest.mark.slow
@pytest.mark.usefixtures("reproduced")
def test_a_variant_and_seeds_are_trained_beside_what_is_there(root):
    """In one `dvc repro`, which leaves the first seed of the first model as it was; each is named and told apart."""
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    fapm = values["models"]["fapm"]
    values["models"] = {"fapm": fapm}
    values["data"]["categories"] = [CATEGORY]
    values["evaluate"]["learnt_defects"] = "tested_by_nobody"
    write_params(root, values)
    dvc(root, "repro")
    values["models"]["wide"] = fapm | {"method": "fapm", "neighbours": 4}
    values["train"]["seeds"] = [0, 1]
    write_params(root, values)
    made = {stage for stage in ran(dvc(root, "repro")) if "@" in stage}
    expected = {f"prepare@{CATEGORY}"}  # which notes what the new one sees
    expected |= {f"{verb}@fapm-{CATEGORY}-1" for verb in ("train", "evaluate")}
    expected |= {f"{verb}@wide-{CATEGORY}-{seed}" for verb in ("train", "evaluate") for seed in (0, 1)}
    expected |= {f"{verb}@wide-{CATEGORY}" for verb in ("export", "latency")}
    assert made == expected
    summary = json.loads((root / "reports" / "tests" / "summary.json").read_text(encoding="utf-8"))
    assert {row["model"]: row["seeds"]["seeds"] for row in summary["averages"]} == {"fapm": [0, 1], "wide": [0, 1]}
    told = f"wide is fapm with neighbours 4 ({fapm['neighbours']})"
    assert told in (root / "reports" / "tests" / "report.html").read_text(encoding="utf-8")
    assert ran(dvc(root, "repro")) == []
    with (root / "anomaly_models" / "adfa.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert ran(dvc(root, "repro")) == ["check"]
    with (root / "anomaly_models" / "fapm.py").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert ran(dvc(root, "repro", "check")) == ["check"]
    changed = json.loads(dvc(root, "status", "--json"))
    names = {f"{model}-{CATEGORY}-{seed}" for model in ("fapm", "wide") for seed in (0, 1)}
    assert {name for name in changed if name.startswith("train")} == {f"train@{name}" for name in names}
