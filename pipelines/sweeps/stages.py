"""The stages of a cell: what the verbs `train`, `evaluate` and `export` do, and a sweep's workers in their stead.

For `dvc repro` each is a process of its own, so that each imports what it needs alone: seconds, for ONNX or metrics.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from rich.console import Console

from pipelines import refusals
from pipelines.deployment.records import Int8
from pipelines.evaluation.outcomes import Evaluation, doubtful_promise, equal_scores
from pipelines.paths import Cell, Project
from pipelines.progress import counting
from pipelines.report.terminal import one_line
from pipelines.settings.params import Params
from pipelines.tracking import store
from pipelines.training.ranks import ALONE, Ranks

Say = Callable[[str], None]


def train(
    cell: Cell, params: Params, project: Project, device: torch.device, console: Console, ranks: Ranks = ALONE
) -> None:
    """Raises what `training.train` does."""
    from pipelines.training.train import train as run

    with _kept(cell, params, project, "train") if ranks.leads else contextlib.nullcontext():
        run(cell.model, cell.category, params, project, device, console, cell.seed, ranks)


def evaluate(cell: Cell, params: Params, project: Project, device: torch.device, say: Say, warn: Say) -> None:
    """Raises what `evaluation.evaluate` does."""
    from pipelines.evaluation.evaluate import evaluate as run

    with _kept(cell, params, project, "evaluate"):
        found = run(cell.model, cell.category, params, project, device, cell.seed)
    say(one_line(found))
    evaluation = Evaluation.load(cell.evaluation, f"run {cell.verb('evaluate')} again")
    for warning in (equal_scores(cell.evaluated), doubtful_promise(evaluation)):
        if warning:
            warn(f"{cell.title}: {warning}")


def export(cell: Cell, params: Params, project: Project, console: Console, say: Say, warn: Say) -> None:
    """Raises what `deployment.export` does."""
    from pipelines.deployment.export import export as run

    with (
        _kept(cell, params, project, "export"),
        counting(console, f"proof of {cell.model} on {cell.category}") as on_progress,
    ):
        parity = run(cell.model, cell.category, params, project, on_progress)
    if parity.at_threshold:
        warn(parity.at_threshold)
    say(
        f"{cell.onnx}: {parity.num_images} {parity.images}, maps within {parity.map.difference:.1e}, scores within "
        f"{parity.score.difference:.1e}, no decision changed{' but by rounding' if parity.at_threshold else ''}"
    )
    if cell.int8_proof.exists():
        int8 = Int8.load(cell.int8_proof, f"run {cell.verb('export')} again")
        say(f"{cell.title}: no int8 file: {int8.refused}" if int8.refused else f"{cell.int8}: {int8.text}")


@contextlib.contextmanager
def _kept(cell: Cell, params: Params, project: Project, verb: str) -> Iterator[None]:
    """Why a verb refuses a cell is kept for the report; what is no cell of params.yaml leaves nothing.

    Where the runs are on a server, that one does not answer is said within seconds, before hours are spent.
    """
    known = (cell.model, cell.category) in params.cells()
    with refusals.kept(cell.refusal, verb) if known else contextlib.nullcontext():
        store.require_answer(project.root)
        yield
