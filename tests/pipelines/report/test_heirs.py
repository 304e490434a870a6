import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from made_up import params_of, put_evaluation
from rich.console import Console

from pipelines.evaluation.metrics import image_metrics
from pipelines.evaluation.outcomes import (
    EVALUATION_FOLDER,
    Evaluation,
    read_predictions,
    read_tested,
    write_predictions,
)
from pipelines.evaluation.succession import Succession
from pipelines.paths import EVALUATION_FILE, PREDICTIONS_FILE, Cell, Project
from pipelines.report import heirs
from pipelines.report.report import report
from pipelines.report.summary import Summary, summarise
from pipelines.report.terminal import print_results
from pipelines.tracking import registry
from pipelines.tracking.cells import cell_runs
from pipelines.tracking.runs import cell_run
from pipelines.tracking.store import tracking_uri

# SQLAlchemy warns of what MLflow's tables ask of it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

EXPERIMENT, REGISTERED = "demo", "demo-nut"
SINCE = "2026-11-28T10:00:00+00:00"
FROZEN = {"frozen": SINCE}


def train(
    root: Path, model: str, *, blind: str = "", auroc: float = 0.995, exported: bool = True, **changes: Any
) -> str:
    """A run of a model and its cell, as the verbs leave them; it takes defects of the type `blind` for good parts."""
    cell = Cell(root, model, "nut", 0)
    shutil.rmtree(cell.evaluated, ignore_errors=True)
    with cell_run(cell, EXPERIMENT, None) as run:
        put_evaluation(
            cell.evaluated, model, "nut", auroc=auroc, good=30, defect=40, masks=False, alike=0.95, run_id=run.run_id,
            **changes,
        )  # fmt: skip
        evaluation = _blinded(cell, blind)
        run.metrics(evaluation.known)
        for path in cell.evaluated.iterdir():
            run.file(path, EVALUATION_FOLDER)
        if exported:
            export(cell, run)
        return run.run_id


def _blinded(cell: Cell, blind: str) -> Evaluation:
    rows = read_predictions(cell.evaluated)
    rows = [row.model_copy(update={"score": row.score - 3}) if row.defect == blind else row for row in rows]
    write_predictions(cell.evaluated, rows)
    tested = read_tested(cell.evaluated)
    scores = torch.tensor([image.score for image in tested], dtype=torch.float64)
    figures = image_metrics(scores, torch.tensor([image.label for image in tested])).figures
    evaluation = Evaluation.load(cell.evaluation, "")
    evaluation = evaluation.model_copy(update={"metrics": evaluation.metrics | figures})
    evaluation.save(cell.evaluation)
    return evaluation


def export(cell: Cell, run: Any) -> None:
    cell.exported.mkdir(parents=True, exist_ok=True)
    cell.onnx.write_bytes(b"a graph")
    cell.parity.write_text("{}")
    run.file(cell.parity, "export")
    packed = cell.exported / f"{cell.model}-nut.zip"
    packed.write_bytes(b"a bundle")  # which nobody asks
    run.decision_model(packed)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A champion that is blind to holes, and its run; its test was not frozen yet."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run_id = train(root, "old", blind="hole")
        registry.crown(root, EXPERIMENT, REGISTERED, run_id, "the best")
    return root, run_id


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def write_html(_summary: Any, _project: Project, folder: Path, _place: Path, _originals: Any) -> Path:
        (folder / "report.html").touch()
        return folder / "report.html"

    monkeypatch.setattr("pipelines.report.page.write", write_html)  # there are no pictures


@pytest.fixture
def root(store: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy, so that a test may add to it."""
    shutil.copytree(store[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def old(store: tuple[Path, str]) -> str:
    return store[1]


def succession(root: Path, *models: str) -> Succession | None:
    project = Project(root)
    summary = summarise(params_of(list(models), ["nut"]), project, cell_runs(root, EXPERIMENT))
    return heirs.successions(summary, project, EXPERIMENT).get("nut")


def reported(root: Path, *models: str) -> str:
    return report(params_of(list(models), ["nut"]), Project(root)).read_text(encoding="utf-8")


def crowned(root: Path) -> str | None:
    return registry.reigning(root, EXPERIMENT, REGISTERED)


def test_a_category_whose_test_is_not_frozen_has_no_succession(root: Path, old: str) -> None:
    new = train(root, "new", blind="cut", auroc=0.999)
    assert succession(root, "new") is None
    text = reported(root, "new")
    assert "## Champion" not in text
    assert crowned(root) == new != old


def test_a_frozen_category_without_champion_has_none(tmp_path: Path) -> None:
    new = train(tmp_path, "new", **FROZEN)
    assert succession(tmp_path, "new") is None
    assert "## Champion" not in reported(tmp_path, "new")
    assert crowned(tmp_path) == new


def test_a_champion_that_is_the_best_itself_stays_and_nothing_is_compared(root: Path) -> None:
    run_id = train(root, "old", **FROZEN)
    train(root, "new", blind="cut", **FROZEN)
    registry.crown(root, EXPERIMENT, REGISTERED, run_id, "the best")
    found = succession(root, "new", "old")
    assert found == Succession(model="old", run_id=run_id, since=SINCE)
    assert f"- Champion of nut: old of run {run_id[:8]}, as before.\n" in reported(root, "new", "old")
    assert crowned(root) == run_id


def test_a_champion_that_ties_with_the_best_stays(root: Path, old: str) -> None:
    """It is blind to one type, the other model to the other."""
    Cell(root, "old", "nut", 0).evaluation.write_text(_with(Cell(root, "old", "nut", 0).evaluation, **FROZEN))
    train(root, "new", blind="cut", auroc=0.999, **FROZEN)
    summary = summarise(params_of(["old", "new"], ["nut"]), Project(root))
    assert summary.champions["image_auroc"]["nut"].best == "new"
    assert succession(root, "old", "new") == Succession(model="old", run_id=old, since=SINCE)


def _with(path: Path, **changes: Any) -> str:
    return json.dumps(json.loads(path.read_text()) | changes)


def test_a_better_heir_becomes_champion(root: Path, old: str) -> None:
    new = train(root, "new", **FROZEN)
    text = reported(root, "new")
    sentence = (
        f"Champion of nut: new of run {new[:8]}, not found worse than old of run {old[:8]} on any type of defect of "
        "the test that is frozen since 2026-11-28."
    )
    assert f"## Champion\n\n- {sentence}\n" in text
    client = mlflow.MlflowClient(tracking_uri(root))
    champion = client.get_model_version_by_alias(REGISTERED, "champion")
    assert (champion.run_id, champion.description) == (new, sentence)


def test_a_worse_heir_does_not_and_every_report_says_why(root: Path, old: str) -> None:
    """It is better by AUROC, for it sees the holes; but not the cuts that the champion sees."""
    new = train(root, "new", blind="cut", auroc=0.9999, **FROZEN)
    text = reported(root, "new")
    assert crowned(root) == old
    summary = Summary.of(Project(root), EXPERIMENT)
    found = summary.successions["nut"]
    (refused,) = found.trials
    assert {worse.defect for worse in refused.worse} == {"cut"}
    lost = next(worse.changed_sides for worse in refused.worse if worse.figure == "image_auroc")
    assert lost
    assert set(lost) == right(root, "old") - right(root, "new")
    section = text.split("## Champion\n\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(":")[0] for line in section[:2]] == ["- Champion of nut", f"- new of run {new[:8]} is refused"]
    assert f"still old of run {old[:8]}. Its bundle: blemish bundle champion nut" in section[0]
    assert ", ".join(lost[:5]) in section[1]
    printed = io.StringIO()
    print_results(Project(root), params_of(["new"], ["nut"]), Console(file=printed, width=10_000))
    for sentence in found.sentences("nut"):
        assert sentence in printed.getvalue()
    assert "Take it to the line: blemish bundle champion nut\n" in printed.getvalue()
    assert "blemish verify bundles/old-nut.zip" in printed.getvalue()


def right(root: Path, model: str) -> set[str]:
    """The good parts and cuts that a model decides rightly on."""
    cell = Cell(root, model, "nut", 0)
    threshold = Evaluation.load(cell.evaluation, "").threshold.value
    tested = [image for image in read_tested(cell.evaluated) if image.defect != "hole"]
    return {image.path for image in tested if (image.score > threshold) == image.label}


def rivals(root: Path) -> tuple[str, str]:
    """The best, which is worse on cuts, and one that cannot be told from it, and is as good as the champion."""
    return train(root, "best", blind="cut", auroc=0.999, **FROZEN), train(root, "equal", blind="hole", **FROZEN)


def test_what_ties_with_the_best_becomes_champion_where_the_best_is_refused(root: Path) -> None:
    best, equal = rivals(root)
    found = succession(root, "best", "equal")
    assert found is not None
    assert [(one.model, one.run_id, one.passed) for one in found.trials] == [
        ("best", best, False),
        ("equal", equal, True),
    ]
    reported(root, "best", "equal")
    assert crowned(root) == equal


def test_the_next_report_does_not_go_on_to_the_model_that_was_refused(root: Path) -> None:
    _, equal = rivals(root)
    for _ in range(3):
        reported(root, "best", "equal")
        assert crowned(root) == equal
    assert succession(root, "best", "equal") == Succession(model="equal", run_id=equal, since=SINCE)


def test_without_the_alias_the_best_is_crowned(root: Path) -> None:
    best, _ = rivals(root)
    mlflow.MlflowClient(tracking_uri(root)).delete_registered_model_alias(REGISTERED, "champion")
    assert "## Champion" not in reported(root, "best", "equal")
    assert crowned(root) == best


def artifact(root: Path, run_id: str, name: str) -> Path:
    (found,) = (root / "mlartifacts").rglob(f"{run_id}/artifacts/{EVALUATION_FOLDER}/{name}")
    return found


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda root, old: artifact(root, old, EVALUATION_FILE).unlink(), "evaluation.json: not there"),
        (lambda root, old: artifact(root, old, PREDICTIONS_FILE).unlink(), "predictions.csv: not there"),
        (
            lambda root, old: artifact(root, old, EVALUATION_FILE).write_text(
                _with(artifact(root, old, EVALUATION_FILE), of_another_version=1)
            ),
            "evaluation.json: damaged, or by another version of Blemish (of_another_version",
        ),
    ],
    ids=["no evaluation", "no predictions", "another version"],
)
def test_a_champion_that_cannot_be_compared_with_is_not_replaced(
    root: Path, old: str, damage: Callable[[Path, str], object], told: str
) -> None:
    damage(root, old)
    train(root, "new", **FROZEN)
    text = reported(root, "new")
    assert crowned(root) == old
    line = next(line for line in text.splitlines() if "is refused" in line)
    assert f"is refused: its {told}" in line.replace("\\", "")
    assert f"Champion of nut: still old of run {old[:8]}" in text


def test_a_champion_whose_test_was_another_is_not_replaced(root: Path, old: str) -> None:
    train(root, "new", **FROZEN, test_sha256="f" * 64, pixels_sha256="q" * 64)
    assert "is refused: the test files of nut changed between the two evaluations." in reported(root, "new")
    assert crowned(root) == old


def test_an_heir_that_is_not_exported_is_refused(root: Path, old: str) -> None:
    train(root, "new", exported=False, **FROZEN)
    assert "is refused: it is not exported since it was trained; run \\`blemish export new nut\\`." in reported(
        root, "new"
    )
    assert crowned(root) == old


def test_an_heir_whose_exported_file_is_gone_is_refused(root: Path, old: str) -> None:
    """As where `export` refuses now what it once exported."""
    train(root, "new", **FROZEN)
    Cell(root, "new", "nut", 0).onnx.unlink()
    assert "is refused: it is not exported since it was trained" in reported(root, "new")
    assert crowned(root) == old


def test_an_heir_that_was_trained_anew_and_not_exported_again_is_refused(root: Path, old: str) -> None:
    """The exported file that lies there is of the training before."""
    train(root, "new", **FROZEN)
    new = train(root, "new", exported=False, **FROZEN)
    assert Cell(root, "new", "nut", 0).onnx.exists()
    found = succession(root, "new")
    assert found is not None
    reason = "it is not exported since it was trained; run `blemish export new nut`"
    assert [(one.run_id, one.refused) for one in found.trials] == [(new, reason)]
    reported(root, "new")
    assert crowned(root) == old


def test_an_heir_whose_run_is_in_another_store_is_refused(root: Path, old: str) -> None:
    """There is no model of it that could become champion."""
    train(root, "new", **FROZEN)
    evaluation = Cell(root, "new", "nut", 0).evaluation
    evaluation.write_text(_with(evaluation, run_id="0" * 32))
    found = succession(root, "new")
    assert found is not None
    assert found.model == "old"
    assert "not found; mend it, or check MLFLOW_TRACKING_URI" in found.trials[0].sentences[0]
    reported(root, "new")
    assert crowned(root) == old


def test_a_champion_whose_run_is_gone_is_not_replaced(root: Path, old: str) -> None:
    """Deleted for good, as by `mlflow gc`; the registry still has its model."""
    new = train(root, "new", **FROZEN)
    mlflow.MlflowClient(tracking_uri(root))._tracking_client.store._hard_delete_run(old)
    text = reported(root, "new")
    assert crowned(root) == old
    assert f"still the model of run {old[:8]}" in text
    assert f"new of run {new[:8]} is refused: tracking store " in text


def test_good_parts_alone_leave_the_champion(root: Path, old: str) -> None:
    """Without a defect nobody is best."""
    cell = Cell(root, "new", "nut", 0)
    with cell_run(cell, EXPERIMENT, None) as run:
        put_evaluation(cell.evaluated, "new", "nut", good=30, defect=0, run_id=run.run_id, frozen=SINCE)
    assert succession(root, "new") == Succession(model="old", run_id=old, since=SINCE)
