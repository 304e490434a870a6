"""What the loop logs, and when it stops, on a learner of two numbers."""

import time
from collections.abc import Iterator

import pytest
import torch
from mlflow.exceptions import MlflowException
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_models.base import Progress
from anomaly_models.diffusion_ad import clip_gradients
from pipelines.errors import TrainingDiverged
from pipelines.training import loop
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.loop import Learner, Schedule, run_steps

STEPS = 12


class Steps:
    """The number of the step, as a batch."""

    device = torch.device("cpu")

    def training_batch(self, seed: int, step: int, batch_size: int) -> Tensor:
        return torch.tensor(float(step))


class Points(list):
    """What an open run is to the loop; a server that is `away` takes nothing."""

    away = False

    def are_taken(self, points) -> bool:
        if not self.away:
            self.timed_points(points)
        return not self.away

    def timed_points(self, points) -> None:
        if self.away:
            raise MlflowException("away")
        self.extend(points)

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for found, value, step, _ in self if found == name]


class Pair(nn.Module):
    """Its loss draws `a` to 0, and `b` too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(4.0))
        self.seen: list[tuple[float, float]] = []

    def losses(self, batch: Tensor, progress: Progress) -> Iterator[dict[str, Tensor]]:
        self.seen.append((self.a.item(), self.b.item()))
        yield {"first": self.a.square() / 2, "second": self.b.square() / 2, "monitor": batch.detach()}


def run(
    tmp_path, pair: Pair, rates=(0.1, 0.1), total: int = STEPS, clip: float | None = None, points: Points | None = None
) -> Points:
    groups = [{"params": [pair.a], "lr": rates[0]}, {"params": [pair.b], "lr": rates[1]}]
    optimizer = torch.optim.SGD(groups)
    if clip is not None:
        optimizer.register_step_pre_hook(clip_gradients(clip))
    training = optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))
    points = Points() if points is None else points
    checkpoint = Checkpoint(tmp_path, "0")
    first = checkpoint.load(pair, training, torch.device("cpu")) or 0
    schedule = Schedule(seed=0, batch_size=1, first=first, total=total)
    run_steps(Learner(pair, pair.losses, training), Steps(), schedule, checkpoint, points, Console(quiet=True))
    return points


def test_losses_are_logged_by_step(tmp_path) -> None:
    pair = Pair()
    points = run(tmp_path, pair)
    history = points.of("loss.first")
    assert [step for step, _ in history] == list(range(1, 13))
    assert history[-1][1] < history[0][1]
    assert history == [(step, torch.tensor(a).square().item() / 2) for step, (a, _) in enumerate(pair.seen, start=1)]
    # an axis on which runs of different length lie over one another
    assert points.of("progress_percent")[5::6] == [(6, 50.0), (12, 100.0)]


class Clock:
    """Another hour passes with each look at it."""

    time = staticmethod(time.time)
    now = 0.0

    def monotonic(self) -> float:
        self.now += 3600
        return self.now


class BackAfter(Points):
    """A server that is back when it has been asked so often."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.asked, self.left = 0, asked

    def are_taken(self, points) -> bool:
        self.asked, self.left = self.asked + 1, self.left - 1
        self.away = self.left >= 0
        return super().are_taken(points)


@pytest.mark.parametrize("outage", [1, 5, STEPS - 1])
def test_an_outage_stops_no_training_and_costs_no_point(tmp_path, monkeypatch, outage: int) -> None:
    undisturbed = run(tmp_path / "undisturbed", Pair())
    monkeypatch.setattr(loop, "time", Clock())
    points = run(tmp_path / "disturbed", Pair(), points=BackAfter(outage))
    assert points.asked == STEPS  # with every checkpoint
    assert [point[:3] for point in points] == [point[:3] for point in undisturbed]


def test_a_server_that_is_away_is_asked_rarely(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    points, asked = Points(), []
    monkeypatch.setattr(Points, "are_taken", lambda _, found: bool(asked.append(len(found))))
    run(tmp_path, Pair(), points=points)
    assert len(asked) == 1
    assert len(points.of("loss.first")) == STEPS  # sent in the end


def test_what_a_server_has_not_taken_in_the_end_is_kept_and_sent_by_the_next_call(tmp_path) -> None:
    pair, points = Pair(), Points()
    points.away = True
    with pytest.raises(MlflowException):
        run(tmp_path, pair, points=points)
    assert not points
    kept = Checkpoint(tmp_path, "0")
    again = Pair()
    points.away = False
    run(tmp_path, again, points=points)
    assert not again.seen  # no step is taken twice
    assert again.a.item() == pair.a.item()
    assert [point[:3] for point in points] == [point[:3] for point in run(tmp_path / "undisturbed", Pair())]
    assert kept.load(Pair(), None, torch.device("cpu")) == STEPS
    assert kept.points == list(points)  # with their own times, by which a store knows them again


def test_losses_are_averaged_between_points(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "LOG_POINTS", 3)
    pair = Pair()
    points = run(tmp_path, pair)
    assert points.of("loss.monitor") == [(4, 1.5), (8, 5.5), (12, 9.5)]
    means = [sum(b * b / 2 for _, b in pair.seen[start : start + 4]) / 4 for start in (0, 4, 8)]
    assert [value for _, value in points.of("loss.second")] == pytest.approx(means, rel=1e-6)


def test_rate_and_gradient_are_those_of_the_step_at_the_point(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "LOG_POINTS", 3)
    pair = Pair()
    points = run(tmp_path, pair)
    assert [step for step, _ in points.of("learning_rate")] == [4, 8, 12]
    assert [rate for _, rate in points.of("learning_rate")] == pytest.approx([0.1 / 4, 0.1 / 8, 0.1 / 12])
    norms = [(a * a + b * b) ** 0.5 for a, b in pair.seen]  # the gradient of x² / 2 is x
    assert [norm for _, norm in points.of("gradient_norm")] == pytest.approx(norms[3::4], rel=1e-6)


def test_groups_of_different_rates_have_a_curve_each(tmp_path) -> None:
    points = run(tmp_path, Pair(), rates=(0.1, 0.2), total=2)
    assert points.of("learning_rate.0") == [(1, 0.1), (2, 0.05)]
    assert points.of("learning_rate.1") == [(1, 0.2), (2, 0.1)]
    assert points.of("learning_rate") == []


def test_the_gradient_is_measured_before_it_is_clipped(tmp_path) -> None:
    pair = Pair()
    points = run(tmp_path, pair, total=1, clip=0.5)
    assert points.of("gradient_norm") == [(1, 5.0)]
    assert pair.a.item() == pytest.approx(3 - 0.1 * 0.5)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path) -> None:
    class Diverging(Pair):
        def losses(self, batch: Tensor, progress: Progress) -> Iterator[dict[str, Tensor]]:
            for terms in super().losses(batch, progress):
                yield terms | ({"second": terms["second"] * float("inf")} if progress.step == 3 else {})

    pair = Diverging()
    with pytest.raises(TrainingDiverged) as stopped:
        run(tmp_path, pair)
    a, b = pair.seen[-1]
    assert (pair.a.item(), pair.b.item()) == (a, b)
    assert str(stopped.value) == (
        f"step 3: a loss is not finite (first = {a * a / 2:g}, second = inf, monitor = 3); "
        "lower the learning rate or check the data"
    )
