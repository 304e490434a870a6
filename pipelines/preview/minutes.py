"""How long training a cell would take on this machine: some of it is done, timed and thrown away."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from statistics import fmean

import torch

from anomaly_models.base import AnomalyModel, Batch, ModelError, Progress
from pipelines.data.arrays import BatchSource
from pipelines.data.batches import Images, PreparedData, SplitBatches, frame_of
from pipelines.data.index import Split
from pipelines.data.tiled import learnt_from
from pipelines.errors import BlemishError
from pipelines.paths import Project
from pipelines.settings.params import Params
from pipelines.training.inputs import find_inputs
from pipelines.training.loop import step_seed
from pipelines.training.trained import build

_FIRST = 8  # images of the first pass; those after it are each of twice as many
_MINUTES_FROM = 100  # s; below it, they are told
_PATIENCE = 4.0  # s, after which no more is begun
_STEPS = 16  # timed at the most
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, lie evenly in [0, 1] however many there are


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    passes: float  # over the normal images before the first step, and over those held out after the last
    steps: float

    @property
    def words(self) -> str:
        return (
            f"about {_clock(self.passes + self.steps)} on this machine, were nothing else running: "
            f"{_clock(self.passes)} for passes over the images, {_clock(self.steps)} for steps"
        )


def time_to_train(model_name: str, category: str, params: Params, project: Project, device: torch.device) -> str:
    """In words; where it cannot be known yet, why."""
    try:
        return timed(model_name, category, params, project, device).words
    except (BlemishError, ModelError) as error:
        return f"unknown: {error}"


def timed(model_name: str, category: str, params: Params, project: Project, device: torch.device) -> Timing:
    """Train a little and count up; nothing is written.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the category, or what the model learns from besides, is not prepared.
        WeightsError: pretrained weights are missing or do not fit.
        ModelError: the model cannot work with this data.
    """
    params.check_category(category)
    config = params.model_config_of(model_name)
    data = learnt_from(PreparedData(project.prepared(category), frame_of(config), device), config)
    inputs = find_inputs(model_name, config, project, device)
    model = build(params.method_of(model_name), config, params.seed).to(device)
    inputs.load_into(model)
    before = _passed(model.prepare, data, "train", config.batch_size)
    steps = _stepped(model, inputs.added_to(data), config.batch_size, len(data.rows("train")), params.seed)
    model.eval()
    with torch.no_grad():
        after = _passed(model.calibrate, data, "holdout", config.batch_size)
        after += _passed(model.check_scores, data, "holdout", config.batch_size)
    return Timing(before + after, steps)


def _passed(pass_over: Callable[[Iterable[Batch]], None], data: Images, split: Split, batch_size: int) -> float:
    """Seconds of a pass over a split, from passes over some of it.

    They are taken to grow with the number of images and with its square, as the choice of a memory does.
    """
    rows = data.rows(split)
    start, before = time.monotonic(), (0, 0.0)
    pass_over(SplitBatches(data, rows[:_FIRST], batch_size))  # the first is slower
    for doubled in count():
        number = min(len(rows), _FIRST * 2**doubled)
        began = time.monotonic()
        pass_over(SplitBatches(data, rows[:number], batch_size))
        _wait_for(data.device)
        found = number, time.monotonic() - began
        if number == len(rows) or time.monotonic() - start > _PATIENCE:
            return _grown(before, found, len(rows))
        before = found
    raise AssertionError


def _grown(before: tuple[int, float], last: tuple[int, float], number: int) -> float:
    """What a n + b n^2 is for a `number`, where it is known of two."""
    (few, of_few), (more, of_more) = before, last
    each = of_more / more
    square = max(0.0, (each - of_few / few) / (more - few)) if few else 0.0
    return (each - square * more) * number + square * number**2


def _stepped(model: AnomalyModel, data: BatchSource[Batch], batch_size: int, normals: int, seed: int) -> float:
    """Seconds of all steps: of some from every phase of training, and what the first meeting with an image adds.

    Each is taken twice, since a model may keep what it has made of an image. Losses mean nothing here and are not
    looked at: in training, no step is taken without those before it.
    """
    total = model.total_steps(normals)
    training = model.optimizer(total)
    if training is None:
        return 0.0
    optimizer, _ = training
    model.train()
    generator = torch.Generator(device=data.device)

    def step(number: int) -> float:
        began = time.monotonic()
        generator.manual_seed(step_seed(seed, number))
        batch = data.training_batch(seed, number, batch_size)
        for terms in model.losses(batch, Progress(number, total, generator)):
            optimizer.zero_grad(set_to_none=True)
            torch.stack([term for term in terms.values() if term.requires_grad]).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            optimizer.step()
        _wait_for(data.device)
        return time.monotonic() - began

    def taken(numbers: Iterable[int]) -> tuple[float, float]:
        """Mean seconds of the steps the first and the second time."""
        start, new, again = time.monotonic(), list[float](), list[float]()
        for number in numbers:
            new.append(step(number))
            again.append(step(number))
            if time.monotonic() - start > _PATIENCE:
                break
        return fmean(new), fmean(again)

    step(0)  # the first is slower
    of_new = min(total, math.ceil(normals / batch_size))  # steps
    new, again = taken(number % total for number in range(1, 1 + min(_STEPS, of_new)))
    _, each = taken(int(total * (number * _GOLDEN % 1)) for number in range(_STEPS))
    return of_new * max(0.0, new - again) + total * each


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < _MINUTES_FROM else f"{seconds / 60:,.0f} min"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
