"""Evaluated runs read back, and their files fetched."""

import contextlib
import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow

from pipelines.errors import StageError
from pipelines.tracking.database import StoredRun, finished_runs
from pipelines.tracking.records import CellRun, common_settings
from pipelines.tracking.secrets import shown
from pipelines.tracking.store import RUNS_PER_CALL, bring_along, is_known, local_uri, told_at_once, tracking_uri

_DOWNLOADS_AT_ONCE = 8


def cell_runs(project: Path, experiment: str) -> list[CellRun]:
    """Every evaluated run of a model on a category, wherever it was made, as the store knows it.

    Raises:
        StageError: the store cannot be reached, or has no such experiment.
    """
    uri, path = tracking_uri(project), project / "mlflow.db"
    if uri == local_uri(project) and not path.exists():
        raise StageError(
            f"{path}: no runs yet; run `dvc repro`, or set MLFLOW_TRACKING_URI to the server that has them"
        )
    bring_along(project)
    with told_at_once(uri):
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None or not found.experiment_id:
            known = ", ".join(f"'{other.name}'" for other in client.search_experiments())
            raise StageError(f"experiment '{experiment}' is not in {shown(uri)}, which has: {known}")
        with _uncollected():
            own = uri == local_uri(project)
            runs = finished_runs(path, found.experiment_id) if own else _finished(client, found.experiment_id)
            return [_cell_run(run) for run in runs if _is_evaluated(run)]


def warning_of_absent(project: Path, runs: Mapping[str, str]) -> str | None:
    """What to do where the store lacks some of the `runs`, names by id: they are in the one that was set before.

    Raises:
        StageError: the store cannot be reached.
    """
    uri = tracking_uri(project)
    with told_at_once(uri):
        client = mlflow.MlflowClient(uri)
        absent = [name for run_id, name in runs.items() if not is_known(client, run_id)]
    if not absent:
        return None
    return (
        f"{shown(uri)} lacks {len(absent)} of {len(runs)} runs, such as that of {absent[0]}, made while another store "
        "was set: unset MLFLOW_TRACKING_URI to see them, or make all anew with `dvc repro --force`"
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Of each run there are some 160 objects, all of them alive: to look for garbage among them takes the longest."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _finished(client: mlflow.MlflowClient, experiment_id: str) -> Iterator[StoredRun]:
    token: str | None = ""
    while token is not None:
        page = client.search_runs(
            [experiment_id], "attributes.status = 'FINISHED'", max_results=RUNS_PER_CALL, page_token=token or None
        )
        for run in page:
            data = run.data
            yield StoredRun(run.info.run_id, run.info.start_time, data.params, data.metrics, data.tags)
        token = page.token or None


def _is_evaluated(run: StoredRun) -> bool:
    return {"model", "category"} <= run.tags.keys() and "threshold" in run.metrics


def _cell_run(run: StoredRun) -> CellRun:
    common = common_settings(run.params)
    return CellRun(
        run_id=run.run_id,
        model=run.tags["model"],
        category=run.tags["category"],
        started=run.started,
        settings={name: value for name, value in run.params.items() if name not in common},
        metrics=run.metrics,
        tags={name: value for name, value in run.tags.items() if not name.startswith("mlflow.")},
    )


@contextlib.contextmanager
def fetched(project: Path, run_ids: Sequence[str], names: Sequence[str], folder: str) -> Iterator[dict[str, Path]]:
    """Copy files that runs logged under `folder` into a temporary place each; gives the places by run id.

    A file that a run does not have is left out.
    """
    client = mlflow.MlflowClient(tracking_uri(project))
    with (
        tempfile.TemporaryDirectory() as temporary,
        told_at_once(tracking_uri(project)),
        ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool,
    ):
        places = {run_id: Path(temporary) / run_id for run_id in run_ids}
        list(pool.map(lambda run_id: _fetch(client, run_id, names, folder, places[run_id]), run_ids))
        yield places


def _fetch(client: mlflow.MlflowClient, run_id: str, names: Sequence[str], folder: str, place: Path) -> None:
    place.mkdir()
    there = {item.path for item in client.list_artifacts(run_id, folder)}
    for name in names:
        if f"{folder}/{name}" in there:
            # Some stores give the file back below `folder`, some without it.
            found = Path(client.download_artifacts(run_id, f"{folder}/{name}", str(place)))
            if found != place / name:
                found.rename(place / name)
