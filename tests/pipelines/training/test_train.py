import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CATEGORY, MEAN_COLOUR, MeanColour, tiny_params, write_params
from filelock import FileLock
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import SETTINGS

from anomaly_models.adfa import ADFA
from anomaly_models.base import Prediction
from anomaly_models.common.sizes import Size
from anomaly_models.fapm import FAPM
from pipelines.errors import ParamsError, StageError, TrainingDiverged
from pipelines.pictures.frames import Frame
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.tracking import store
from pipelines.training import loop, train
from pipelines.training.trained import RunRecord, load_trained

CPU = torch.device("cpu")
CLI = Path(train.__file__).resolve().parents[2] / "cli.py"


@pytest.fixture
def prepared(project, params):
    source, folder = project.root / "images" / CATEGORY, project.prepared(CATEGORY)
    prepare(source, CATEGORY, params.prepare, params.views().frames, folder, lambda *_: None)


def run(project, model, console):
    params = load_checked(project.params)
    train.train(model, CATEGORY, params, project, CPU, console)
    return load_file(project.cell(model, CATEGORY, 0).weights)


def runs(project):
    client = MlflowClient(store.tracking_uri(project.root))
    return client.search_runs([client.get_experiment_by_name("tests").experiment_id])


def statuses(project):
    return [run.info.status for run in runs(project)]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("prepared")
def test_a_cell_leaves_weights_settings_and_a_finished_run(project, console):
    run(project, "fapm", console)
    record = RunRecord.load(project.cell("fapm", CATEGORY, 0).run_record, "train again")
    assert record.model_settings["grid"] == 2
    assert record.train_images == 9
    (only,) = runs(project)
    assert only.info.run_id == record.run_id
    assert only.info.status == "FINISHED"
    assert only.data.params["models.fapm.backbone.weights"] == "package"
    assert only.data.tags["data_sha256"] == record.settings.data.sha256
    assert not project.cell("fapm", CATEGORY, 0).work.exists()


@pytest.mark.usefixtures("prepared")
def test_a_variant_is_of_its_method_and_says_how_it_differs(project, console):
    values = tiny_params()
    values["models"]["wide"] = values["models"]["fapm"] | {"method": "fapm", "neighbours": 3}
    values["train"]["seeds"] = [0, 3]
    write_params(project.root, values)
    params = load_checked(project.params)
    prepare(
        project.root / "images" / CATEGORY,
        CATEGORY,
        params.prepare,
        params.views().frames,
        project.prepared(CATEGORY),
        lambda *_: None,
    )
    train.train("wide", CATEGORY, params, project, CPU, console, seed=3)
    cell = project.cell("wide", CATEGORY, 3)
    record = RunRecord.load(cell.run_record, "train again")
    assert (record.settings.method, record.settings.train.seed) == ("fapm", 3)
    assert isinstance(load_trained(cell, CPU).model, FAPM)
    (only,) = runs(project)
    assert only.info.run_name == f"wide-{CATEGORY}-seed3"
    before = values["models"]["fapm"]["neighbours"]
    assert only.data.tags["variant"] == f"wide is fapm with neighbours 3 ({before})"
    assert (only.data.tags["method"], only.data.tags["model"]) == ("fapm", "wide")
    with pytest.raises(ParamsError, match=r"^seed 1 is not in params.yaml, whose train.seeds lists: 0, 3$"):
        train.train("wide", CATEGORY, params, project, CPU, console, seed=1)


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("killed_at", [0, 5, 11])
def test_an_interrupted_run_ends_with_the_same_bits(project, sixth_model, console, monkeypatch, killed_at):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole = run(project, sixth_model, console)
    training_batch, seen = train.PreparedData.training_batch, []

    def watched(self, seed, step, batch_size):
        seen.append(step)
        if seen == list(range(killed_at + 1)):
            raise KeyboardInterrupt
        return training_batch(self, seed, step, batch_size)

    monkeypatch.setattr(train.PreparedData, "training_batch", watched)
    with pytest.raises(KeyboardInterrupt):
        run(project, sixth_model, console)
    told = io.StringIO()
    assert same(run(project, sixth_model, Console(file=told, width=100)), whole)
    assert told.getvalue().splitlines()[0] == f"goes on at step {killed_at} of 12, where it was killed"
    assert seen == [*range(killed_at + 1), *range(killed_at, 12)]  # resumed, not repeated
    assert statuses(project) == ["FINISHED", "FINISHED"]  # the same run went on


@pytest.mark.usefixtures("prepared")
def test_a_run_goes_on_with_the_threads_that_it_began_with(project, sixth_model, console, monkeypatch):
    """By which the last digits depend; a machine with less to spare is slower, and the bits stay."""
    training_batch, seen, here = train.PreparedData.training_batch, [], torch.get_num_threads()

    def watched(self, seed, step, batch_size):
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return training_batch(self, seed, step, batch_size)

    monkeypatch.setattr(train.PreparedData, "training_batch", watched)
    try:
        torch.set_num_threads(here + 1)
        with pytest.raises(KeyboardInterrupt):
            run(project, sixth_model, console)
        assert torch.get_num_threads() == here + 1
    finally:
        torch.set_num_threads(here)
    run(project, sixth_model, console)
    assert set(seen) == {here + 1}
    assert torch.get_num_threads() == here
    (only,) = runs(project)
    assert only.data.tags["threads"] == str(here + 1)


@pytest.mark.usefixtures("prepared")
def test_changed_settings_do_not_resume(project, sixth_model, console, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def interrupted(self, batch, progress):
        if progress.step == 6:
            raise KeyboardInterrupt
        yield {"distance": (batch.image.mean() - self.centre).square().mean()}

    with monkeypatch.context() as patch:
        patch.setattr(MeanColour, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(project, sixth_model, console)
    values = tiny_params()
    values["models"] = {sixth_model: MEAN_COLOUR | {"learning_rate": 0.01}}
    write_params(project.root, values)
    resumed = run(project, sixth_model, console)
    assert same(run(project, sixth_model, console), resumed)
    assert sorted(statuses(project)) == ["FINISHED", "FINISHED", "KILLED"]


@pytest.mark.usefixtures("prepared")
def test_a_loss_that_is_not_finite_stops_before_the_update(project, sixth_model, console, monkeypatch):
    centres = []

    def diverging(self, batch, progress):
        centres.append(self.centre.detach().clone())
        factor = float("nan") if progress.step == 3 else 1.0
        yield {"distance": (batch.image.mean() - self.centre).square().mean() * factor}

    monkeypatch.setattr(MeanColour, "losses", diverging)
    with pytest.raises(TrainingDiverged, match=r"^step 3: a loss is not finite \(distance = nan\)"):
        run(project, sixth_model, console)
    assert centres[-1].isfinite().all()
    assert not project.cell(sixth_model, CATEGORY, 0).trained.exists()
    assert statuses(project) == ["FAILED"]


@pytest.mark.usefixtures("prepared")
def test_weights_that_are_not_finite_after_the_last_step_are_no_model(project, sixth_model, console, monkeypatch):
    """No loss sees what the last step has made."""
    step = torch.optim.AdamW.step

    def stepped(self, *arguments, **named):
        step(self, *arguments, **named)
        self.param_groups[0]["params"][0].data[1] = float("inf")

    monkeypatch.setattr(MeanColour, "losses", lambda self, *_: iter([{"distance": self.centre[0].square()}]))
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    expected = r"^after step \d+: 1 of 3 weights are not finite; lower the learning rate or check the data$"
    with pytest.raises(TrainingDiverged, match=expected):
        run(project, sixth_model, console)
    assert not project.cell(sixth_model, CATEGORY, 0).trained.exists()
    assert statuses(project) == ["FAILED"]


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_model(project, sixth_model, console, monkeypatch, value):
    distances(monkeypatch, [1.0, value, 2.0])
    expected = (
        "^mean_colour on squares: what the trained model says of 1 of 3 held-out good images is not finite; lower"
    )
    with pytest.raises(TrainingDiverged, match=expected):
        run(project, sixth_model, console)
    assert not project.cell(sixth_model, CATEGORY, 0).trained.exists()
    assert statuses(project) == ["FAILED"]


def distances(monkeypatch, values):
    """Let the sixth model's map be one of these numbers after the other, over the whole image."""
    drawn = itertools.cycle(values)

    def forward(self, image, region=None):
        anomaly_map = torch.full_like(image[:, :1], next(drawn))
        return Prediction(anomaly_map, anomaly_map.amax((1, 2, 3)))

    monkeypatch.setattr(MeanColour, "forward", forward)


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("values", [[0.0], [98.0, 98.0 + 2**-17], [-5.0], [1e-30]], ids=str)
def test_equal_scores_of_all_held_out_images_are_told(project, sixth_model, monkeypatch, values):
    distances(monkeypatch, values)
    console = Console(record=True, width=400)
    run(project, sixth_model, console)
    expected = f"mean_colour on squares: all 3 held-out good images score {values[0]:g}, so that the threshold means"
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: {expected}")
    (only,) = runs(project)
    assert only.data.tags["warning"] == line.removeprefix("warning: ").rstrip()


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("values", [[0.0, 1e-30], [98.0, 98.001], [-1.0, 1.0]], ids=str)
def test_scores_that_differ_are_no_matter(project, sixth_model, monkeypatch, values):
    distances(monkeypatch, values)
    run(project, sixth_model, Console(quiet=True))
    assert "warning" not in runs(project)[0].data.tags


@pytest.mark.usefixtures("prepared")
def test_a_second_warning_joins_the_first(project, sixth_model, console, monkeypatch):
    distances(monkeypatch, [1.0])
    monkeypatch.setattr(train.Inputs, "warning", lambda *_: "no real anomalies")
    run(project, sixth_model, console)
    assert runs(project)[0].data.tags["warning"].startswith("no real anomalies; mean_colour on squares: all 3")


@pytest.mark.usefixtures("prepared")
def test_what_a_model_doubts_of_its_training_is_told(project, sixth_model, monkeypatch):
    monkeypatch.setattr(MeanColour, "warnings", lambda _: iter(["it saw little", "[red] and less"]))
    console = Console(record=True, width=400)
    run(project, sixth_model, console)
    told = ["mean_colour on squares: it saw little", "mean_colour on squares: [red] and less"]
    lines = [line.rstrip() for line in console.export_text().splitlines() if line.startswith("warning: ")]
    assert lines == [f"warning: {text}" for text in told]
    assert runs(project)[0].data.tags["warning"] == "; ".join(told)


@pytest.mark.usefixtures("prepared")
def test_fitting_sees_normals_and_never_a_test_image(project, sixth_model, params, console, monkeypatch):
    given = {"prepare": [], "losses": [], "calibrate": []}
    for phase in ("prepare", "calibrate"):
        original = getattr(MeanColour, phase)

        def spy(self, batches, phase=phase, original=original):
            given[phase] += [batch.image for batch in batches]
            assert not any(batch.label.any() for batch in batches)
            original(self, batches)

        monkeypatch.setattr(MeanColour, phase, spy)
    losses = MeanColour.losses

    def spied_losses(self, batch, progress):
        given["losses"].append(batch.image)
        assert not batch.label.any()
        yield from losses(self, batch, progress)

    monkeypatch.setattr(MeanColour, "losses", spied_losses)
    run(project, sixth_model, console)
    data = train.PreparedData(project.prepared(CATEGORY), Frame(Size.square(64), "bilinear", "stretch"), CPU)
    keys = {phase: {image.numpy().tobytes() for image in torch.cat(images)} for phase, images in given.items()}
    test = {image.numpy().tobytes() for image in data.batch(data.rows("test")).image}
    assert keys["prepare"] == keys["losses"]
    assert not keys["prepare"] & keys["calibrate"]
    assert not (keys["prepare"] | keys["calibrate"]) & test


@pytest.mark.usefixtures("prepared")
def test_two_processes_do_not_train_one_cell(project, params, console):
    project.cell("fapm", CATEGORY, 0).work.parent.mkdir(parents=True)
    lock = FileLock(project.cell("fapm", CATEGORY, 0).work.parent / ".seed0.lock")
    with lock, pytest.raises(StageError, match=r"^fapm on squares: another process is training this"):
        train.train("fapm", CATEGORY, params, project, CPU, console)


def test_what_is_not_there_is_named(project, params, console):
    with pytest.raises(ParamsError, match=r"^model 'padim' is not in params.yaml, which lists: fapm$"):
        train.train("padim", CATEGORY, params, project, CPU, console)
    message = "^category 'nut' is not in params.yaml, whose data.categories lists: squares"
    with pytest.raises(ParamsError, match=message):
        train.train("fapm", "nut", params, project, CPU, console)
    with pytest.raises(StageError, match="blemish prepare squares"):
        train.train("fapm", CATEGORY, params, project, CPU, console)


@pytest.mark.usefixtures("prepared")
def test_a_model_that_may_train_need_not(project, console, monkeypatch):
    """Of 0 epochs, and interrupted after it has learnt without a gradient: that is not done again."""
    values = tiny_params()
    coreset = {"centres": {"name": "coreset", "number": 32, "per_image": 64}, "start": "whitened", "gamma_d": 1}
    untrained = {"epochs": 0, "kl_weight": False, "backbone": values["models"]["fapm"]["backbone"]}
    values["models"] = {"adfa": SETTINGS["adfa"] | coreset | untrained}
    write_params(project.root, values)
    whole = run(project, "adfa", console)
    record = RunRecord.load(project.cell("adfa", CATEGORY, 0).run_record, "train again")
    assert record.train_steps == 0
    with monkeypatch.context() as interrupted:
        interrupted.setattr(ADFA, "calibrate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(project, "adfa", console)
    monkeypatch.setattr(ADFA, "prepare", lambda *_: pytest.fail("prepared twice"))
    assert same(run(project, "adfa", console), whole)


@pytest.mark.usefixtures("prepared")
def test_kill_9_leaves_nothing_running_and_the_same_model(project, console):
    """A real process, killed while it learns; the next one completes the same run."""
    whole = run(project, "fapm", console)
    command = [sys.executable, CLI, "train", "fapm", CATEGORY]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=project.root, env=environment, stderr=subprocess.PIPE, text=True)
    work, deadline = project.cell("fapm", CATEGORY, 0).work, time.monotonic() + 60
    while process.poll() is None and not list(work.glob("*/run.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[1] == ""
    assert process.returncode == -signal.SIGKILL
    assert statuses(project).count("RUNNING") == 1
    assert same(run(project, "fapm", console), whole)
    assert statuses(project) == ["FINISHED", "FINISHED"]
