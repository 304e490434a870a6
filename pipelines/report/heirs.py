"""Who may take the champion's place in categories whose test is frozen: the best of the report, and its equals."""

import os
from pathlib import Path

from pipelines.errors import StageError
from pipelines.evaluation.outcomes import EVALUATION_FOLDER, Evaluation, Outcome, read_outcome, read_tested
from pipelines.evaluation.succession import Succession, Trial, trial
from pipelines.names import registered_model
from pipelines.paths import EVALUATION_FILE, PREDICTIONS_FILE, Project
from pipelines.report.summary import MAIN_METRIC, CellSummary, Summary, leaders

_KEPT = (EVALUATION_FILE, PREDICTIONS_FILE)  # of a run; what is compared takes no pixels
_EXPORT_FOLDER = "export"  # of a run, where `export` keeps its proof


def successions(summary: Summary, project: Project, experiment: str) -> dict[str, Succession]:
    """By category, of those whose test is frozen and that have a champion in the model registry.

    Raises:
        StageError: the store cannot be reached.
    """
    from pipelines.tracking.registry import reigning

    found = {}
    for category in summary.categories:
        cells = [cell for cell in summary.cells if cell.category == category]
        since = next((cell.frozen for cell in cells if cell.frozen), None)
        champion = reigning(project.root, experiment, registered_model(summary.data_set, category)) if since else None
        if since and champion:
            heirs = _heirs(summary, cells, category)
            found[category] = _succession(champion, heirs, since, project, experiment, summary.resamples)
    return found


def _heirs(summary: Summary, cells: list[CellSummary], category: str) -> list[CellSummary]:
    """The best, and what cannot be told from it."""
    best = summary.champions.get(MAIN_METRIC, {}).get(category)
    by_model = {cell.model: cell for cell in cells}
    return [by_model[model] for model in (leaders(best) if best else ())]


def _succession(
    champion: str, heirs: list[CellSummary], since: str, project: Project, experiment: str, resamples: int
) -> Succession:
    """Compare each heir with the champion, by what that logged in its run.

    One of the best stays champion: from equal to equal, a model would come to reign that the first one had beaten.
    """
    if (own := next((heir for heir in heirs if heir.run_id == champion), None)) is not None:
        return Succession(model=own.model, run_id=champion, since=since)
    try:
        model, before = _logged(champion, project)
    except StageError as error:
        model = _name(champion, project, experiment)
        trials = [Trial(model=heir.model, run_id=str(heir.run_id), refused=str(error)) for heir in heirs]
    else:
        trials = [_trial(before, heir, project, resamples) for heir in heirs]
    return Succession(model=model, run_id=champion, since=since, trials=tuple(trials))


def _logged(run_id: str, project: Project) -> tuple[str, Outcome]:
    """What a run has of its evaluation; errors do not tell where it was fetched to."""
    from pipelines.tracking.cells import fetched

    with fetched(project.root, [run_id], _KEPT, EVALUATION_FOLDER) as folders:
        try:
            return _read(folders[run_id])
        except StageError as error:
            raise StageError(str(error).replace(f"{folders[run_id]}{os.sep}", "its ")) from None


def _name(run_id: str, project: Project, experiment: str) -> str:
    """The model of a run that cannot be read."""
    from pipelines.tracking.cells import cell_runs

    return next((run.model for run in cell_runs(project.root, experiment) if run.run_id == run_id), "the model")


def _trial(champion: Outcome, heir: CellSummary, project: Project, resamples: int) -> Trial:
    place, run_id = project.cell(heir.model, heir.category, heir.seed), str(heir.run_id)
    try:
        if heir.onnx_megabytes is None or not _is_exported(run_id, place.parity.name, project):
            raise StageError(f"it is not exported since it was trained; run {place.verb('export')}")
        _, now = _read(place.evaluated)
        defects = {image.path: image.defect for image in read_tested(place.evaluated)}
    except StageError as error:
        return Trial(model=heir.model, run_id=run_id, refused=str(error))
    return trial(champion, now, defects, run_id, resamples)


def _is_exported(run_id: str, proof: str, project: Project) -> bool:
    """Whether its model is in the store; the exported file that lies here may be of an earlier training."""
    from pipelines.tracking.cells import fetched

    with fetched(project.root, [run_id], [proof], _EXPORT_FOLDER) as folders:
        return (folders[run_id] / proof).exists()


def _read(folder: Path) -> tuple[str, Outcome]:
    """The model, and what it said of the test images."""
    evaluation = Evaluation.load(folder / EVALUATION_FILE, "the champion cannot be compared with")
    return evaluation.model, read_outcome(folder, evaluation, evaluation.model)
