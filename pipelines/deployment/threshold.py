"""The threshold that a person chose, in a copy of the exported file, with who chose it, how and on what.

A copy, since `exported/` is DVC's: `dvc repro` would put a file that was changed there back to what `export` wrote.
What lies below `deployed/` stays as it is, also when a model is trained again, until someone chooses anew.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import onnx

from pipelines.deployment.shipped import deployed, exported, int8_proof
from pipelines.errors import ExportError, StageError
from pipelines.evaluation.outcomes import Evaluation, read_tested
from pipelines.feedback import login_name
from pipelines.files import atomic_file
from pipelines.inference.card import Precision, ThresholdChoice
from pipelines.inference.detector import Detector, ModelCard
from pipelines.numbers import counted
from pipelines.paths import Cell, Project


@dataclass(frozen=True, slots=True)
class Deployed:
    """A file with a chosen threshold."""

    path: Path
    choice: ThresholdChoice
    left_behind: str | None  # why the choices of the file that was deployed before are not in this one


def threshold(
    model: str,
    category: str,
    value: float,
    because: str | None,
    by: str | None,
    project: Project,
    precision: Precision = "float32",
) -> Deployed:
    """Write `deployed/<model>/<category>/model.onnx`: the exported file, graph and weights as they are.

    With `int8` it is model.int8.onnx of both.

    Earlier choices for the same network are kept in it; those for another, of an earlier training, are not, since its
    scores are others. Without `by` it is who is logged in.

    Raises:
        StageError: the cell is not exported, or not in that precision.
        ExportError: the exported file is none of ours, or another version's.
        ArgumentError: it is not known who chooses.
    """
    cell = project.cell(model, category, 0)  # the exported file lies at the same place whatever the seed
    found = exported(cell, precision)
    card = found.card
    if (card.model, card.category) != (model, category):  # the names may lead anywhere: `fapm ../nut`
        raise ExportError(f"{found.path}: of {card.model} on {card.category}, not of {model} on {category}")
    cell = replace(cell, seed=_seed(card))
    proto, path = onnx.load(found.path), deployed(cell, precision)
    before, left_behind = _deployed_before(path, card.run_id)
    former = card.threshold if before is None else before.threshold
    choice = ThresholdChoice(
        threshold=value,
        former=former,
        by=by or login_name("give --by"),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        because=because,
        on_test_images=_on_test_images(cell, card, former, value),
    )
    chosen = replace(card, choices=() if before is None else before.choices).chosen(choice)
    onnx.helper.set_model_props(proto, _metadata(proto) | chosen.to_metadata())
    with atomic_file(path) as temporary:
        onnx.save(proto, temporary)
        assert Detector(temporary).card == chosen
    return Deployed(path, choice, left_behind)


def _deployed_before(path: Path, run_id: str) -> tuple[ModelCard | None, str | None]:
    """The card of the file that is to be replaced, if it is of the same training; else why it is not looked at."""
    if not path.exists():
        return None, None
    try:
        card = Detector(path).card
    except ExportError as error:
        return None, str(error)
    if card.run_id != run_id:
        return None, f"the file deployed before was trained in run {card.run_id}, the exported one in run {run_id}"
    return card, None


def _on_test_images(cell: Cell, card: ModelCard, former: float, value: float) -> str | None:
    """What both thresholds make of the test images, by the scores that this very training and precision left."""
    try:
        if Evaluation.load(cell.evaluation, "").run_id != card.run_id:
            return None
        images = read_tested(cell.evaluated) if card.precision == "float32" else int8_proof(cell).tested
    except StageError:
        return None
    if not images:
        return None
    good, defects = ([image.score for image in images if image.label is label] for label in (False, True))
    found, found_before = (sum(score > at for score in defects) for at in (value, former))
    rejected, rejected_before = (sum(score > at for score in good) for at in (value, former))
    return (
        f"{found} of {counted(len(defects), 'defect')} found and {rejected} of {counted(len(good), 'good part')} "
        f"rejected, {found_before} and {rejected_before} before"
    )


def _seed(card: ModelCard) -> int:
    """That the network was trained with."""
    train = card.params.get("train")
    return int(train.get("seed", 0)) if isinstance(train, dict) else 0


def _metadata(proto: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}
