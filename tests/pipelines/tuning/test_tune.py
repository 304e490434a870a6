"""Verb tune from end to end: on tiny projects, in this process and in one that is killed."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CATEGORY, MEAN_COLOUR, tiny_params, write_params
from mlflow import MlflowClient
from tiny_projects import MODELS

import cli
from pipelines.data.index import PreparedIndex
from pipelines.paths import Project
from pipelines.preview.check import load_checked, write_checked
from pipelines.tracking.cells import cell_runs
from pipelines.tracking.store import tracking_uri
from pipelines.tuning.judge import Verdict

CLI = Path(cli.__file__)


def runs(root):
    client = MlflowClient(tracking_uri(root))
    experiment = client.get_experiment_by_name("tests")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def trials(root):
    """What each ended with, in order, as Optuna's database has it."""
    database = sqlite3.connect(root / "tune.db")
    try:
        names = [name for (name,) in database.execute("SELECT study_name FROM studies ORDER BY study_id")]
        query = "SELECT state, value FROM trials LEFT JOIN trial_values USING (trial_id) ORDER BY trial_id"
        return names, [(state, value) for state, value in database.execute(query) if state != "FAIL"]
    finally:
        database.close()


@pytest.fixture
def prepared(root, blemish):
    assert blemish("prepare", CATEGORY).code == 0
    return root


@pytest.fixture
def briefly(monkeypatch):
    """A trial is judged by fewer synthetic defects."""
    monkeypatch.setattr("pipelines.tuning.development.MOST", 20)


# With which something better than the model's own settings is found soon.
SEARCH = ("--search", "blur_sigma=0.5:8:log", "--search", "grid=1,2,4")


def with_model(root, name, **changes):
    values = tiny_params()
    values["models"] = {name: MODELS[name] | changes}
    write_params(root, values)


def test_a_search_and_what_it_leaves(prepared, blemish):
    before = (prepared / "params.yaml").read_text(encoding="utf-8")
    search = ("tune", "fapm", CATEGORY, *SEARCH)
    found = blemish(*search, "--trials", "4")
    assert found.code == 0
    first, *lines = found.err.splitlines()
    assert (
        first
        == f"fapm on {CATEGORY}: learns from 6 good parts, is to tell 3 others from 60 synthetic defects; test images "
        "and held-out parts are not seen"
    )
    assert [line.split(":")[0] for line in lines] == [f"trial {number}" for number in range(4)]
    assert lines[0].endswith(": as it is")
    own, best, changes, last = found.out.splitlines()
    assert own.startswith("as it is    ")
    assert best.startswith("the best    ")
    assert "(95 %: " in best
    assert "blur_sigma" in changes
    assert "(2.0)" in changes
    assert last == (
        f"params.yaml: fapm_tuned, tuned on {CATEGORY}: 4 trials against synthetic defects on good parts; test images "
        "and held-out parts unseen; `blemish run` trains and tests it"
    )
    # The variant: only lines more, and as good as `check` wants it.
    after = (prepared / "params.yaml").read_text(encoding="utf-8")
    assert after.startswith(before[: before.index("train:\n")])
    params = load_checked(prepared / "params.yaml")
    tuned = params.tuned_of("fapm_tuned")
    assert (tuned.model, tuned.category, tuned.trials, tuned.defects) == ("fapm", CATEGORY, 4, "synthetic")
    assert tuned.objective > tuned.before
    write_checked(params, Project(prepared))
    assert "tuned" not in (prepared / "checked" / "models" / "fapm_tuned.txt").read_text()
    # One run for the search, one within it for each trial, and no cell.
    search_run, *trial_runs = runs(prepared)
    assert search_run.info.run_name == f"tune fapm-{CATEGORY}"
    assert [run.info.run_name for run in trial_runs] == [f"trial {number}" for number in range(4)]
    assert {run.data.tags["mlflow.parentRunId"] for run in trial_runs} == {search_run.info.run_id}
    assert {run.info.status for run in (search_run, *trial_runs)} == {"FINISHED"}
    assert {run.data.tags["state"] for run in trial_runs} == {"complete"}
    assert max(run.data.metrics["objective"] for run in trial_runs) == search_run.data.metrics["best"]
    assert trial_runs[0].data.params == {"blur_sigma": "2.0", "grid": "2"}
    assert cell_runs(prepared, "tests") == []
    # Called again, it has nothing to do, and changes nothing; with more trials it goes on in the same run.
    again = blemish(*search, "--trials", "4")
    assert (again.code, again.out) == (0, found.out)
    assert f"goes on after 4 of 4 trials, which are in sqlite:///{prepared}/tune.db" in again.err
    assert (prepared / "params.yaml").read_text(encoding="utf-8") == after
    more = blemish(*search, "--trials", "5")
    assert [line.split(":")[0] for line in more.err.splitlines()[2:]] == ["trial 4"]
    assert len(runs(prepared)) == 1 + 5
    # Its earlier result gives way.
    params = load_checked(prepared / "params.yaml")
    assert list(params.models) == ["fapm", "fapm_tuned"]
    assert params.tuned_of("fapm_tuned").trials == 5
    # Other settings, such as another seed, are another study.
    assert "goes on" not in blemish(*search, "--trials", "2", "--seed", "1").err
    assert len(trials(prepared)[0]) == 2


@pytest.mark.usefixtures("briefly")
def test_a_model_that_learns_step_by_step(prepared, blemish):
    with_model(prepared, "adfa")
    found = blemish(
        "tune", "adfa", CATEGORY, "--trials", "3", "--search", "learning_rate=x0.1:x100:log", "--name", "mine"
    )
    assert found.code == 0, found.err
    _, *trial_runs = runs(prepared)
    client = MlflowClient(tracking_uri(prepared))
    history = client.get_metric_history(trial_runs[0].info.run_id, "objective")
    assert sorted(point.step for point in history) == [1, 2, 4, 5]
    assert trial_runs[0].data.metrics["objective"] == history[-1].value
    assert any(name.startswith("loss.") for name in trial_runs[0].data.metrics)


@pytest.mark.usefixtures("briefly")
def test_no_test_image_is_looked_at(prepared, blemish, tmp_path_factory):
    search = ("tune", "fapm", CATEGORY, "--trials", "3", *SEARCH)
    untouched = blemish(*search)
    place = tmp_path_factory.mktemp("without") / "project"
    shutil.copytree(prepared, place, ignore=shutil.ignore_patterns("tune.db*", "mlflow.db*", "mlartifacts"))
    write_params(place, tiny_params())
    project = Project(place)
    shutil.rmtree(place / "images")
    index = PreparedIndex.load(project.prepared(CATEGORY))
    for path in project.prepared(CATEGORY).glob("*.npy"):
        array = np.load(path, mmap_mode="r+")
        rows = [
            index.images[row].mask_row if path.name.startswith("masks") else row
            for row in index.rows("test", "holdout")
        ]
        for row in rows:
            if row is not None:
                array[row] = np.random.default_rng(row).integers(0, 2, array[row].shape)
        array.flush()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        garbled = blemish(*search)
    assert garbled.code == 0
    assert garbled.out == untouched.out
    assert trials(place) == trials(prepared)
    assert (place / "params.yaml").read_bytes() == (prepared / "params.yaml").read_bytes()


def test_killed_in_the_middle_of_a_trial(prepared, blemish, tmp_path_factory):
    with_model(prepared, "adfa", epochs=6)
    place = tmp_path_factory.mktemp("killed") / "project"
    shutil.copytree(prepared, place)
    search = ("tune", "adfa", CATEGORY, "--trials", "3", "--device", "cpu")
    whole = blemish(*search)
    assert whole.code == 0, whole.err
    command = [sys.executable, str(CLI), *search]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not (place / "tune.db").exists() or trials(place)[1][2:] != [("RUNNING", None)]:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = (place / "params.yaml").read_bytes()
    assert b"adfa_tuned" not in before
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        gone_on = blemish(*search)
    assert gone_on.code == 0, gone_on.err
    assert "goes on after 2 of 3 trials" in gone_on.err
    assert trials(place) == trials(prepared)
    assert (place / "params.yaml").read_bytes() == (prepared / "params.yaml").read_bytes()
    statuses = [run.info.status for run in runs(place)]
    assert statuses.count("FINISHED") == 4
    assert set(statuses) <= {"FINISHED", "KILLED"}  # the run of the trial may not have begun
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_nothing_is_written_where_nothing_is_better(prepared, blemish, monkeypatch):
    monkeypatch.setattr("pipelines.tuning.trial.judge", lambda *_: Verdict(0.75, 0.25, (0.5, 1.0)))
    before = (prepared / "params.yaml").read_bytes()
    found = blemish("tune", "fapm", CATEGORY, "--trials", "3")
    assert found.code == 0
    assert found.out.splitlines() == [
        "as it is    50.0: image AUROC 75.0 (95 %: 50.0 to 100.0), AUPRO 0.3 25.0",
        "nothing is written: none of 3 trials is better",
    ]
    assert (prepared / "params.yaml").read_bytes() == before


def test_a_trial_that_others_outdo_is_given_up(sixth_model, root, blemish, monkeypatch):
    """The objective falls with the rate, so that what is far above the median is seen to be worse on the way."""
    assert blemish("prepare", CATEGORY).code == 0
    judged = []

    def judge(model, config, exam, device):
        judged.append(config.learning_rate)
        return Verdict(1 / (1 + config.learning_rate), None, (0.0, 1.0))

    monkeypatch.setattr("pipelines.tuning.trial.judge", judge)
    found = blemish("tune", sixth_model, CATEGORY, "--trials", "12", "--search", "learning_rate=0.0001:1.0:log")
    assert found.code == 0, found.err
    lines = found.err.splitlines()[1:]
    given_up = [line for line in lines if ": given up at step 3: " in line]
    assert given_up
    assert len(judged) == 4 * (12 - len(given_up)) + len(given_up)
    states = [run.data.tags["state"] for run in runs(root) if "trial" in run.data.tags]
    assert states.count("pruned") == len(given_up)
    best = load_checked(root / "params.yaml").model_config_of(f"{sixth_model}_tuned").learning_rate
    assert best == min(judged) < MEAN_COLOUR["learning_rate"]


def test_settings_that_a_trial_cannot_work_with_are_told(sixth_model, root, blemish):
    assert blemish("prepare", CATEGORY).code == 0
    found = blemish("tune", sixth_model, CATEGORY, "--trials", "3", "--search", "learning_rate=1e36,2e36")
    assert found.code == 0, found.err
    refused = [line for line in found.err.splitlines() if ": refused: " in line]
    assert len(refused) == 2
    assert all("not finite" in line for line in refused)
    assert "nothing is written: none of 3 trials is better" in found.out
    assert sorted(run.info.status for run in runs(root)) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]


@pytest.mark.usefixtures("briefly")
def test_the_report_says_that_it_was_tuned_and_on_what(prepared, blemish):
    assert blemish("tune", "fapm", CATEGORY, "--trials", "4", *SEARCH).code == 0
    assert blemish("prepare", CATEGORY).code == 0
    for model in ("fapm", "fapm_tuned"):
        for verb in ("train", "evaluate"):
            assert blemish(verb, model, CATEGORY).code == 0
    assert blemish("report").code == 0
    said = (
        f"tuned on {CATEGORY}: 4 trials against synthetic defects on good parts; test images and held-out parts unseen"
    )
    for name in ("report.md", "report.html"):
        text = (prepared / "reports" / "tests" / name).read_text(encoding="utf-8")
        assert "fapm_tuned is fapm with " in text
        assert said in text
    assert said in " ".join(blemish("results").out.split())
    assert said in " ".join(blemish("compare").out.split())
    (tuned,) = [run for run in cell_runs(prepared, "tests") if run.model == "fapm_tuned"]
    assert tuned.tags["tuned"] == said
    assert tuned.tags["variant"].endswith(f", {said}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nothing", CATEGORY), "model 'nothing' is not in params.yaml, which lists: fapm"),
        (("fapm", "nut"), "category 'nut' is not in params.yaml, whose data.categories lists: squares"),
        (("fapm", CATEGORY), "no prepared images; run `blemish prepare squares`"),
        (("fapm", CATEGORY, "--name", "fapm"), "--name fapm: models.fapm is in params.yaml"),
        (("fapm", CATEGORY, "--search", "grid=3,4"), "--search grid=3,4: FAPM's grid must divide the sides"),
        (("fapm", CATEGORY, "--search", "grid=two"), "--search grid=two: models.fapm.grid = 'two': Input"),
        (("fapm", CATEGORY, "--device", "tpu"), "device 'tpu': unknown; use auto, cpu, cuda or cuda:N"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(root, blemish, arguments, told):
    before = sorted(path.name for path in root.iterdir())
    found = blemish("tune", *arguments)
    assert found.code == 1
    assert found.err.count("\n") == 1
    assert found.err.startswith("error: ")
    assert told in found.err
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_database_that_is_away_is_one_line(prepared, blemish):
    address = "postgresql+psycopg://team:hunter22@127.0.0.1:9/tune"
    for arguments, variables in ((("--storage", address), {}), ((), {"BLEMISH_TUNE_STORAGE": address})):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            found = blemish("tune", "fapm", CATEGORY, *arguments)
        assert found.code == 1
        assert found.err.startswith("error: storage postgresql+psycopg://127.0.0.1:9/tune: ")
        assert found.err.count("\n") == 1
        assert "hunter22" not in found.err + found.out
    assert not (prepared / "mlflow.db").exists()


def test_optuna_is_not_installed(root, blemish, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("tune", "study"):
        monkeypatch.delitem(sys.modules, f"pipelines.tuning.{name}", raising=False)
    found = blemish("tune", "fapm", CATEGORY)
    assert (found.code, found.err) == (
        1,
        "error: the package 'optuna' is not installed; `pip install 'blemish[tune]'`\n",
    )


def test_the_time_is_up(prepared, blemish):
    found = blemish("tune", "fapm", CATEGORY, "--minutes", "0")
    assert found.code == 0
    assert found.out == "nothing is written: no trial has been judged yet\n"
