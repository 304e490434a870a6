"""Steps from a record: on a CPU, with a stand-in that is as strict as a CUDA graph; and what a GPU would wait for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from simulated_gpu import GPU, Generator, Tape, Waits, simulated_gpu, to_gpu
from tiny_models import build, normals, pretrain, random_images, training_batch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_models import MODELS
from anomaly_models.base import Batch, Progress
from pipelines.data.arrays import sent, to_image
from pipelines.errors import TrainingDiverged
from pipelines.teachers.distill import Described, Distillation
from pipelines.training import loop
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.loop import Learner, Schedule, run_steps
from pipelines.training.recorded import WARM_UP, settle

STEPS = 8
RATE = 2.0**-10  # which float32 holds exactly


@dataclass(frozen=True)
class Numbers:
    number: Tensor


@dataclass
class Stream:
    """A number for each step; as many of them as `sizes` says."""

    sizes: dict[int, int]
    device = torch.device("cpu")

    def training_batch(self, seed: int, step: int, batch_size: int) -> Numbers:
        return Numbers(torch.arange(self.sizes.get(step, 1), dtype=torch.float32) + step)


class Line(nn.Module):
    """Its loss depends on the batch and on chance; that of a `counting` one on the step's number, too."""

    def __init__(self, counting: bool = False) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))
        self.counting = counting
        self.kept = nn.Buffer(torch.zeros(()))

    def losses(self, batch: Numbers, progress: Progress) -> Iterator[dict[str, Tensor]]:
        noise = torch.rand(batch.number.shape, generator=progress.generator)
        error = (self.slope * batch.number - noise).square().mean()
        yield {"error": error * (1 + progress.step) if self.counting else error, "noise": noise.mean()}
        self.kept += noise.mean()


class Points(list):
    def are_taken(self, points: Any) -> bool:
        self.timed_points(points)
        return True

    def timed_points(self, points: Any) -> None:
        self.extend((name, value, step) for name, value, step, _ in points)


@dataclass
class Done:
    points: Points
    line: Line
    tape: Tape | None


def train(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: bool,
    line: Line | None = None,
    until: int = STEPS,
    **sizes: int,
) -> Done:
    """Up to a step; goes on where the checkpoint in the folder says."""
    line = line or Line()
    tape = Tape() if recorded else None
    monkeypatch.setattr(loop, "recorder_on", lambda device, generator: tape)
    optimizer = torch.optim.Adam(line.parameters(), lr=RATE, fused=True)
    training = optimizer, LambdaLR(optimizer, lambda step: 0.5**step)
    checkpoint, points = Checkpoint(folder, "0"), Points()
    first = checkpoint.load(line, training, torch.device("cpu")) or 0
    schedule = Schedule(seed=0, batch_size=1, first=first, total=until)
    stream = Stream({int(step.removeprefix("step")): size for step, size in sizes.items()})
    run_steps(Learner(line, line.losses, training, True), stream, schedule, checkpoint, points, Console(quiet=True))
    return Done(points, line, tape)


def test_steps_from_a_record_are_those_taken_one_by_one(tmp_path, monkeypatch) -> None:
    one_by_one = train(tmp_path / "one by one", monkeypatch, recorded=False)
    recorded = train(tmp_path / "recorded", monkeypatch, recorded=True)
    assert recorded.tape.replayed == STEPS - WARM_UP
    assert recorded.points == one_by_one.points
    assert len({value for name, value, _ in recorded.points if name == "loss.noise"}) == STEPS
    assert len({value for name, value, _ in recorded.points if name == "learning_rate"}) == STEPS
    for name, value in one_by_one.line.state_dict().items():
        assert torch.equal(value, recorded.line.state_dict()[name])


def test_what_python_held_is_what_is_done_again(tmp_path, monkeypatch) -> None:
    """Which is why a model has to say that it holds nothing, and that the stand-in would show if it did."""
    one_by_one = train(tmp_path / "one by one", monkeypatch, recorded=False, line=Line(counting=True))
    recorded = train(tmp_path / "recorded", monkeypatch, recorded=True, line=Line(counting=True))
    assert recorded.points != one_by_one.points


def test_a_batch_of_another_form_is_taken_by_itself(tmp_path, monkeypatch) -> None:
    sizes = {"step0": 2, "step5": 3}
    one_by_one = train(tmp_path / "one by one", monkeypatch, recorded=False, **sizes)
    recorded = train(tmp_path / "recorded", monkeypatch, recorded=True, **sizes)
    assert recorded.tape.replayed == STEPS - WARM_UP - 1
    assert recorded.points == one_by_one.points


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_it_goes_on_where_another_machine_left_off(tmp_path, monkeypatch, before: bool, after: bool) -> None:
    whole = train(tmp_path / "whole", monkeypatch, recorded=False)
    train(tmp_path / "halves", monkeypatch, recorded=before, until=4)
    halves = train(tmp_path / "halves", monkeypatch, recorded=after)
    assert torch.equal(halves.line.slope, whole.line.slope)
    losses = [[point for point in done.points if point[0].startswith("loss")] for done in (halves, whole)]
    assert losses[0] == losses[1]  # the checkpoint has those before it


def test_settling_leaves_an_optimiser_as_it_was_on_a_cpu() -> None:
    parameter = nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.Adam([parameter], lr=RATE)
    settle(optimizer, torch.device("cpu"), recorded=True)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    settle(optimizer, torch.device("cpu"), recorded=False)
    assert optimizer.param_groups[0]["lr"] == RATE
    assert not isinstance(optimizer.param_groups[0]["lr"], Tensor)


# ---- models ---------------------------------------------------------------------------------------------------------


RECORDED = [name for name, kind in MODELS.items() if kind.same_every_step]


@dataclass(frozen=True)
class Drawn:
    model: str
    device = torch.device("cpu")

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        return training_batch(self.model, step)


@pytest.mark.parametrize("name", RECORDED)
def test_a_model_that_says_so_has_one_step(name: str, tmp_path, monkeypatch) -> None:
    states, points = [], []
    for recorder in (None, Tape()):
        model = build(name, learning_rate=RATE, steps=2 * STEPS)
        pretrain(model)
        model.prepare(normals(name, seed=0))
        training: Any = model.optimizer(2 * STEPS)
        monkeypatch.setattr(loop, "recorder_on", lambda device, generator, given=recorder: given)
        learner = Learner(model, model.losses, training, model.same_every_step)
        checkpoint, found = Checkpoint(tmp_path / str(recorder is None), "0"), Points()
        run_steps(learner, Drawn(name), Schedule(0, 4, 0, STEPS), checkpoint, found, Console(quiet=True))
        states.append(model.state_dict())
        points.append(found)
    assert recorder.replayed == STEPS - WARM_UP
    assert points[0] == points[1]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def assert_it_waits_for_nothing(module: Any, batch: Any) -> None:
    """And nothing of it is on another device."""
    moved = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved = {name: value.to(GPU) if isinstance(value, Tensor) else value for name, value in moved.items()}
    with Waits() as waits:
        (terms,) = module.losses(replace(batch, **moved), Progress(0, STEPS, Generator()))
        assert loop._values(terms).device == GPU
    assert waits.found == {}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_recorded_step_waits_for_no_gpu(name: str, precision: str, monkeypatch) -> None:
    model = build(name, precision=precision)
    pretrain(model)
    with simulated_gpu(monkeypatch):
        to_gpu(model)
        assert_it_waits_for_nothing(model, training_batch(name, 0))


# FAPM's backbone is folded when it is first asked, which needs its numbers.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "fapm"])
def test_a_picture_waits_for_no_gpu(name: str, monkeypatch) -> None:
    model = build(name)
    pretrain(model)
    with simulated_gpu(monkeypatch), torch.no_grad():
        to_gpu(model.eval())
        image = random_images(name, 2, seed=0).to(GPU)
        with Waits() as waits:
            anomaly_map, score = model(image)
    assert (anomaly_map.device, score.device) == (GPU, GPU)
    assert waits.found == {}


def test_a_step_of_distillation_waits_for_no_gpu(monkeypatch) -> None:
    module = Distillation("tiny", "bf16")
    with simulated_gpu(monkeypatch):
        to_gpu(module)
        image = torch.empty(2, 3, 64, 64)
        described = torch.empty_like(module.network(image.to(GPU)), device="cpu")
        assert_it_waits_for_nothing(module, Described(image, described))


def test_pictures_are_sent_without_waiting(monkeypatch) -> None:
    with simulated_gpu(monkeypatch), Waits() as waits:
        image = to_image(sent(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), GPU))
        assert image.device == GPU
        assert waits.found == {}
        image.sum().cpu()
        torch.tensor(255.0, device=GPU)
    assert waits.found == {"cuda to cpu": 1, "cpu to cuda": 1}  # the stand-in sees what waits


# ---- terms ----------------------------------------------------------------------------------------------------------


def test_terms_that_are_looked_at_together_stop_at_the_first_bad_step() -> None:
    terms = loop._Terms(None, together=3)
    for step, value in enumerate([1.0, math.inf]):
        terms.add(step, ("first", "second"), torch.tensor([2.0, value]))
    with pytest.raises(TrainingDiverged, match=r"^step 1: a loss is not finite \(first = 2, second = inf\);"):
        terms.add(2, ("first",), torch.tensor([math.nan]))
