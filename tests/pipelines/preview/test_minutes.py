"""Minutes of a training, counted up from some of it by a clock that the test turns."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.data.arrays import stream_rows
from pipelines.preview import minutes

NORMALS = 40


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(minutes, "time", clock)
    return clock


class Rows:
    device = torch.device("cpu")

    def rows(self, _split: str) -> list[int]:
        return list(range(NORMALS))

    def batch(self, rows: Sequence[int]) -> list[int]:
        return list(rows)

    def training_batch(self, seed: int, step: int, batch_size: int) -> list[int]:
        return stream_rows(NORMALS, (seed,), step, batch_size)


class Steps(nn.Module):
    """A step takes 10 ms, 30 ms in the second half, and 50 ms more for each image that it has not met."""

    def __init__(self, clock: Clock, total: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.clock, self.total, self.met = clock, total, set[int]()

    def total_steps(self, normals: int) -> int:
        assert normals == NORMALS
        return self.total

    def optimizer(self, _total: int) -> tuple[torch.optim.Optimizer, None]:
        return torch.optim.SGD(self.parameters()), None

    def losses(self, batch: list[int], progress: Any) -> Iterator[dict[str, Tensor]]:
        self.clock.now += 0.05 * len(set(batch) - self.met) + (0.01 if progress.step < self.total / 2 else 0.03)
        self.met |= set(batch)
        yield {"loss": self.weight**2, "seen": torch.zeros(())}


@pytest.mark.parametrize("total", [10, 30, 2_000])
def test_steps_are_counted_up_over_both_phases_and_what_new_images_cost(clock: Clock, total: int) -> None:
    model: Any = Steps(clock, total)
    data: Any = Rows()
    found = minutes._stepped(model, data, 4, NORMALS, seed=0)
    assert found == pytest.approx(0.05 * NORMALS + 0.02 * total, rel=0.1)
    assert clock.now < 2 * minutes._PATIENCE


@pytest.mark.parametrize(("each", "square"), [(0.1, 0.0), (0.02, 0.001), (2.0, 0.05)])
def test_passes_are_counted_up_as_they_grow(clock: Clock, each: float, square: float) -> None:
    data: Any = Rows()

    def pass_over(batches: Any) -> None:
        number = sum(len(batch) for batch in batches)
        clock.now += each * number + square * number**2

    found = minutes._passed(pass_over, data, "train", 4)
    whole = each * NORMALS + square * NORMALS**2
    # After one pass of 16 s, the slowest of them is not told how it grows.
    assert found == pytest.approx(whole if each < 1 else (each + square * 8) * NORMALS)


def test_a_model_without_steps_takes_none(clock: Clock) -> None:
    model: Any = type("Fixed", (), {"total_steps": lambda *_: 0, "optimizer": lambda *_: None})()
    data: Any = Rows()
    assert minutes._stepped(model, data, 4, NORMALS, seed=0) == 0.0
    assert clock.now == 0.0
