"""One trial: a model of other settings learns from the development images, and is judged on what it has not seen."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from anomaly_models.base import Batch, Config
from pipelines.data.arrays import BatchSource
from pipelines.data.tiled import learnt_from
from pipelines.tracking.runs import OpenRun
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.inputs import Inputs
from pipelines.training.loop import Learner, Schedule, run_steps
from pipelines.training.trained import build
from pipelines.tuning.development import Development, Exam
from pipelines.tuning.judge import Verdict, judge

LOOKS = (0.25, 0.5, 0.75)  # shares of the steps after which a trial is judged as it stands, and may be given up

Report = Callable[[int, Verdict], None]  # of a step and what was found there; may raise to end the trial


@dataclass(frozen=True, slots=True)
class Task:
    """All that the trials of a search have in common."""

    method: str
    data: Development
    exam: Exam
    inputs: Inputs
    seed: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Looking:
    """A stream of batches that is looked up from: before some of them, `look` is called."""

    batches: BatchSource[Batch]
    before: frozenset[int]
    look: Callable[[int], None]

    @property
    def device(self) -> torch.device:
        return self.batches.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        if step in self.before:
            self.look(step)
        return self.batches.training_batch(seed, step, batch_size)


def attempt(task: Task, config: Config, run: OpenRun, report: Report) -> tuple[Verdict, int]:
    """Train a model of these settings and judge it, on the way too if it learns step by step; gives the steps, too.

    Raises:
        ModelError: it cannot work with these settings and images.
        TrainingDiverged: a loss, a weight or a score is not finite.
    """
    inputs = replace(task.inputs, config=config)
    data = learnt_from(task.data, config)
    holdout = data.batches("holdout", config.batch_size)
    model = build(task.method, config, task.seed).to(task.device)
    inputs.load_into(model)
    total_steps = model.total_steps(len(data.rows("train")))
    training = model.optimizer(total_steps)
    model.prepare(data.batches("train", config.batch_size))
    if training is not None:

        def look(step: int) -> None:
            as_it_stands = copy.deepcopy(model).eval()
            as_it_stands.calibrate(holdout)
            report(step, judge(as_it_stands, config, task.exam, task.device))

        steps = frozenset(round(share * total_steps) for share in LOOKS) - {0}
        batches = _Looking(inputs.added_to(data), steps, look)
        schedule = Schedule(task.seed, config.batch_size, 0, total_steps)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            # A trial that is killed is tried anew.
            checkpoint = Checkpoint(Path(folder), "trial")
            learner = Learner(model, model.losses, training, model.same_every_step)
            run_steps(learner, batches, schedule, checkpoint, run, Console(quiet=True))
    model.eval().calibrate(holdout)
    model.check_scores(holdout)
    return judge(model, config, task.exam, task.device), total_steps
