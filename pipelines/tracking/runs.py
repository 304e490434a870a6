"""One run per cell: `train` opens it, `evaluate` and `export` open it again by the id that a trained model carries."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
import psutil
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunStatus,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipelines.callers import is_gone
from pipelines.environment import environment, packages
from pipelines.errors import StageError
from pipelines.names import as_key
from pipelines.paths import Cell
from pipelines.tracking.records import MAX_TEXT, TRAIN_SECONDS, as_texts, common_settings, flatten
from pipelines.tracking.run_names import run_name
from pipelines.tracking.store import (
    RUNS_PER_CALL,
    STORE_ERRORS,
    asked_briefly,
    errors_told,
    is_known,
    is_there_by_now,
    prepare_store,
    told_at_once,
    used_by_mlflow,
)

PARENT = "BLEMISH_PARENT_RUN"  # in the environment: the id of the sweep's run
_DIGEST_LENGTH = 32  # characters; the store takes 36
_NOT_IN_METRICS = r"[^\w.\- /]"  # in their names, in MLflow on every system
_LONGEST_METRIC = 250  # characters of a name
# MLflow's limits for one batch
_MAX_METRICS_PER_CALL = 1000
_MAX_PARAMS_PER_CALL = 100
_ENVIRONMENT_TAGS = ("python", "torch", "cpu", "gpu")  # to search by; all of it is logged as a file
_HALF_COPIED = ".artifact.uploading."  # what MLflow calls a file until it is whole
_DESCRIPTION = "mlflow.note.content"  # the tag that MLflow's page shows as the run's description
_POINTS_PER_CALL = 20
_LAST_POINTS = 15.0  # seconds for a chart's last points, at the end of a run


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that is being written to."""

    run_id: str
    client: mlflow.MlflowClient
    on_server: bool

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, nested mappings as dotted names. A run's settings never change, so a resumed run skips them."""
        known = self.client.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in as_texts(values).items() if name not in known]
        for start in range(0, len(new), _MAX_PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=new[start : start + _MAX_PARAMS_PER_CALL])

    def settings(self, values: Mapping[str, Any]) -> None:
        """Log what a training was made with, as `params` does, and what every method has under a name they share."""
        flat = flatten(values)
        self.params(flat | common_settings(flat))

    def tags(self, values: Mapping[str, Any]) -> None:
        tags = [RunTag(name, value) for name, value in as_texts(values).items()]
        self.client.log_batch(self.run_id, tags=tags)

    def without_tags(self, prefix: str) -> None:
        """Take back all whose name begins so."""
        for name in self.known_tags():
            if name.startswith(prefix):
                self.client.delete_tag(self.run_id, name)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.metric_points([(name, value, step) for name, value in values.items()])

    def metric_points(self, points: list[tuple[str, float, int]]) -> None:
        """Log (name, value, step) points in as few calls as the store allows.

        Names may hold anything, such as that of a defect's folder; what MLflow refuses in them becomes its code.
        """
        now = time.time()
        self.timed_points([(name, value, step, now) for name, value, step in points])

    def timed_points(self, points: list[tuple[str, float, int, float]]) -> None:
        """Log (name, value, step, seconds since 1970) points, as `metric_points` does."""
        metrics = [
            Metric(as_key(name, _NOT_IN_METRICS, _LONGEST_METRIC), value, int(1000 * seconds), step)
            for name, value, step, seconds in points
        ]
        for start in range(0, len(metrics), _MAX_METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS_PER_CALL])

    def are_taken(self, points: list[tuple[str, float, int, float]]) -> bool:
        """Log them as `timed_points` does, or say that the server is away just now; of a local store, errors are told.

        Points that were logged before, whether or not the answer arrived, are not there twice: each has its own time.
        """
        try:
            with asked_briefly():
                self.timed_points(points)
        except STORE_ERRORS:
            if not self.on_server:
                raise
            return False
        return True

    def describe(self, markdown: str) -> None:
        """Say what the run is in words, at the top of its page."""
        self.client.set_tag(self.run_id, _DESCRIPTION, markdown[:MAX_TEXT])

    def known_tags(self) -> dict[str, str]:
        return dict(self.client.get_run(self.run_id).data.tags)

    def text(self, content: str, path: str) -> None:
        self.client.log_text(self.run_id, content, path)

    def dataset(self, name: str, digest: str, source: Path) -> None:
        """Say which data the run learnt from, for MLflow's Dataset column."""
        where = json.dumps({"uri": source.resolve().as_uri()})
        dataset = Dataset(name, digest[:_DIGEST_LENGTH], "local", where)
        tags = [InputTag("mlflow.data.context", "training")]
        inputs = [DatasetInput(dataset, tags)]
        try:
            self.client.log_inputs(self.run_id, inputs)
        except MlflowException as error:
            if not is_there_by_now(error):
                raise
            # Of runs that begin at once on data that the store has not seen, one has entered them: now they are found.
            self.client.log_inputs(self.run_id, inputs)

    def file(self, path: Path, folder: str) -> None:
        self.client.log_artifact(self.run_id, str(path), folder)

    def output(self, path: Path, folder: str) -> None:
        """Log a large file of a stage, which nobody writes to in place: in a store on the same disk it lies there once.

        DVC has it once more as the same file (`cache.type` in .dvc/config), and keeps it from being written to.
        """
        place = _local(self.client.get_run(self.run_id))
        if place is None or not _linked(path, place / folder / path.name):
            self.file(path, folder)

    def decision_model(self, bundle: Path) -> None:
        """Log a bundle as a model that takes pictures and decides, replacing none that an earlier export logged."""
        with warnings.catch_warnings(action="ignore"):  # MLflow's, of itself
            from mlflow import pyfunc
            from mlflow.models import ModelSignature
            from mlflow.types import ColSpec, Schema

            numbers = [ColSpec("double", name, required=False) for name in ("score", "threshold")]
            texts = [ColSpec("string", name, required=False) for name in ("decision", "disposition", "error")]
            pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("decisions.py")),
                artifacts={"bundle": bundle.resolve().as_uri()},
                signature=ModelSignature(inputs=Schema([ColSpec("string")]), outputs=Schema([*numbers, *texts])),
                # Given, because MLflow would otherwise find them by running the model in a fresh process.
                pip_requirements=["onnxruntime", "numpy", "pillow"],
            )


def cell_tags(cell: Cell) -> dict[str, str]:
    """What the run of a cell is found by, the DVC stage that wrote to it last, and the sweep that it belongs to."""
    tags = {"model": cell.model, "category": cell.category, "stage": os.environ.get("DVC_STAGE", "")}
    parent = os.environ.get(PARENT)
    return tags | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})


@contextlib.contextmanager
def sweep_run(project: Path, experiment: str, settings: Mapping[str, Any]) -> Iterator[OpenRun]:
    """Open the run that the runs of a sweep's cells are nested in, once PARENT of the environment has its id.

    When it ends, those are KILLED that are RUNNING still: their processes or machines are gone.
    """
    with open_run(project, experiment, "sweep", {"stage": "sweep"}, None) as run:
        run.params(settings)
        try:
            yield run
        finally:
            _end_nested(run)


def _end_nested(parent: OpenRun) -> None:
    experiment = parent.client.get_run(parent.run_id).info.experiment_id
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    while found := parent.client.search_runs([experiment], query, max_results=RUNS_PER_CALL):
        for run in found:
            _terminate(parent.client, run, RunStatus.KILLED)


@contextlib.contextmanager
def cell_run(cell: Cell, experiment: str, run_id: str | None) -> Iterator[OpenRun]:
    """Open the run of a cell, or a new one if `run_id` is None or unknown to this store; close it whatever happens.

    An exception marks the run FAILED, an interruption or SIGTERM marks it KILLED, and a run left RUNNING by a process
    that no longer exists is marked KILLED by the next call of this function.
    """
    with open_run(cell.root, experiment, cell.name, cell_tags(cell), run_id) as run:
        yield run


@contextlib.contextmanager
def summary_run(project: Path, experiment: str, key: str) -> Iterator[OpenRun]:
    """Open the run that sums up a set of cells; the same set (by `key`) gets the same run again."""
    tags = {"summary_key": key}
    with open_run(project, experiment, "summary", tags, _known_by(project, experiment, tags)) as run:
        yield run


@contextlib.contextmanager
def search_run(project: Path, experiment: str, name: str, study: str) -> Iterator[OpenRun]:
    """Open the run of a search for settings; the same study gets the same run again. It is no cell's."""
    tags = {"study": study}
    with open_run(project, experiment, name, tags, _known_by(project, experiment, tags)) as run:
        yield run


@contextlib.contextmanager
def trial_run(project: Path, experiment: str, name: str, tags: dict[str, str]) -> Iterator[OpenRun]:
    """Open a new run within the search that is open."""
    with open_run(project, experiment, name, tags, None, nested=True) as run:
        yield run


def _known_by(project: Path, experiment: str, tags: Mapping[str, str]) -> str | None:
    """The id of the run that has these tags, none of which holds a quote."""
    uri, experiment_id = prepare_store(project, experiment)
    with errors_told(uri):
        same = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
        found = mlflow.MlflowClient(uri).search_runs([experiment_id], same, max_results=1)
    return found[0].info.run_id if found else None


@contextlib.contextmanager
def open_run(
    project: Path,
    experiment: str,
    name: str,
    tags: dict[str, str],
    run_id: str | None,
    *,
    settings: Mapping[str, Any] | None = None,
    sampled: bool = False,
    nested: bool = False,
) -> Iterator[OpenRun]:
    """Open the run `run_id`, or a new one called `name` if that is None or unknown to this store.

    With the `settings` of a training, a new run is also called after those that its cell's first run did not have.
    `sampled` draws the process's use of CPU and memory as long as the run is open. One that is `nested` is within the
    run that is open, whose code and environment are its own.
    """
    uri, experiment_id = prepare_store(project, experiment)
    with _sigterm_exits(), used_by_mlflow(uri), errors_told(uri):
        client = mlflow.MlflowClient(uri)
        reap(client, experiment_id)
        run_id = run_id if run_id and is_known(client, run_id) else None
        if run_id is None and settings is not None:
            name = run_name(name, as_texts(settings), _earlier(client, experiment_id, tags))
        # What a cell was trained with and for stays; what a later stage ran with stands beside it.
        origin = {} if nested else {**git_tags(project), **_experiment_tags()}
        origin = {f"latest.{name}" if run_id else name: value for name, value in origin.items()}
        tags = {**tags, **_process_tags(), **origin}
        # A known run is opened where it is, even if the experiment has another name by now.
        run = mlflow.start_run(run_id, experiment_id, run_name=None if run_id else name, nested=nested, tags=tags)
        opened = OpenRun(run.info.run_id, client, uri.startswith("http"))
        try:
            if run_id is None and not nested:
                _log_environment(opened)
            with _sampled(opened) if sampled else contextlib.nullcontext():
                yield opened
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt | SystemExit)
            # What went wrong is what the user is told, not that the store does not answer either.
            with contextlib.suppress(StageError), told_at_once(uri):
                _end(client, opened.run_id, RunStatus.KILLED if killed else RunStatus.FAILED)
            raise
        _end(client, opened.run_id, RunStatus.FINISHED)


def _earlier(
    client: mlflow.MlflowClient, experiment_id: str, tags: Mapping[str, str]
) -> list[tuple[str, dict[str, str]]]:
    """The name and the settings of each run of the same cell, or of the same model's teacher; the first one first."""
    keys = ("model", "category") if "category" in tags else ("model", "stage")
    same = " and ".join(f"tags.{key} = '{tags[key]}'" for key in keys)
    found = client.search_runs([experiment_id], same, max_results=RUNS_PER_CALL, order_by=["attributes.start_time ASC"])
    return [(run.info.run_name, run.data.params) for run in found]


def _end(client: mlflow.MlflowClient, run_id: str, status: int) -> None:
    mlflow.end_run(RunStatus.to_string(status))
    _terminate(client, client.get_run(run_id), status)


def _terminate(client: mlflow.MlflowClient, run: Run, status: int) -> None:
    """Let a run that was trained last as long as its training, and any other until now.

    MLflow's page has a column of durations that no view can hide. Up to the end of the last stage, it would count the
    hours for which nothing was done.
    """
    seconds = run.data.metrics.get(TRAIN_SECONDS)
    end = None if seconds is None else run.info.start_time + round(1000 * seconds)
    client.set_terminated(run.info.run_id, RunStatus.to_string(status), end)


def _log_environment(run: OpenRun) -> None:
    found = environment()
    run.tags({"environment": {name: found[name] for name in _ENVIRONMENT_TAGS if name in found}})
    run.text(json.dumps(found, indent=2), "environment/environment.json")
    run.text(packages(), "environment/packages.txt")


@contextlib.contextmanager
def _sampled(run: OpenRun) -> Iterator[None]:
    """Log what this process uses, at first every second and then ever more rarely; a resumed run goes on in time."""
    history = run.client.get_metric_history(run.run_id, _MEMORY)
    stop, away = threading.Event(), threading.Event()
    before = max((point.step for point in history), default=0)
    sampler = threading.Thread(target=_sample, args=(run, stop, away, before), daemon=True)
    sampler.start()
    try:
        yield
    except STORE_ERRORS:  # nobody waits for such a store once more, for a few points of a chart
        away.set()
        raise
    finally:
        stop.set()
        sampler.join(0 if away.is_set() else _LAST_POINTS)  # it may have begun to wait for the store by itself


_MEMORY, _CPU, _GPU_MEMORY = (
    "system/process_memory_megabytes",
    "system/process_cpu_percentage",
    "system/gpu_memory_megabytes",
)


def _sample(run: OpenRun, stop: threading.Event, away: threading.Event, seconds_before: int) -> None:
    """A point's step is the run's age in seconds, so that the charts of several runs lie over one another.

    Points are gathered and sent a few at a time, each with its own time, which MLflow's page draws them by.

    The wait grows with the age: some four hundred points, whether a run takes a minute or a day.
    """
    process = psutil.Process()
    process.cpu_percent()  # the first answer is about nothing
    started, points, ended = time.monotonic(), list[tuple[str, float, int, float]](), False
    while not ended:
        ended = stop.wait(max(1.0, (time.monotonic() - started) / 50))
        step = seconds_before + round(time.monotonic() - started)
        used = {_CPU: process.cpu_percent(), _MEMORY: process.memory_info().rss / 1e6}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            used[_GPU_MEMORY] = torch.cuda.memory_allocated() / 1e6
        points += [(name, value, step, time.time()) for name, value in used.items()]
        if (ended and not away.is_set()) or len(points) >= _POINTS_PER_CALL:
            with contextlib.suppress(*STORE_ERRORS):  # a gap in a chart is no reason to lose the training
                run.timed_points(points)
            points = []


def reap(client: mlflow.MlflowClient, experiment_id: str) -> list[str]:
    """Mark KILLED what is RUNNING on this machine in a process that is gone; gives the ids."""
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    dead = [run for run in running if _is_ours_and_dead(run)]
    for run in dead:
        _terminate(client, run, RunStatus.KILLED)
        _sweep(run)
    return [run.info.run_id for run in dead]


def _sweep(run: Run) -> None:
    """Remove what MLflow had half copied to a folder of this machine when the process was killed."""
    place = _local(run)
    if place is not None:
        for half in place.rglob(f"{_HALF_COPIED}*"):
            half.unlink(missing_ok=True)


def _local(run: Run) -> Path | None:
    """Where a run's files lie; None if that is no folder of this machine."""
    place = urlsplit(run.info.artifact_uri)
    return Path(url2pathname(place.path)) if place.scheme in ("", "file") else None


def _linked(path: Path, name: Path) -> bool:
    """Give a file a second name; False where the disk is another one, or has no such links."""
    name.parent.mkdir(parents=True, exist_ok=True)
    half = name.with_name(f"{_HALF_COPIED}{name.name}")
    try:
        os.link(path, half)
        half.replace(name)
    except OSError:
        return False
    finally:
        half.unlink(missing_ok=True)  # it stays where `name` was the same file already
    return True


def _is_ours_and_dead(run: Run) -> bool:
    tags = run.data.tags
    if tags.get("host") != socket.gethostname() or "pid" not in tags:
        return False
    return is_gone(int(tags["pid"]), float(tags["pid_started"]))


def _process_tags() -> dict[str, str]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": str(process.pid), "pid_started": str(process.create_time())}


def _experiment_tags() -> dict[str, str]:
    """The experiment of DVC that the run is part of, if it is one's."""
    name = os.environ.get("DVC_EXP_NAME")
    return {"dvc_exp_name": name} if name else {}


def git_tags(project: Path) -> dict[str, str]:
    """The commit of the project's folder and whether tracked files differ from it; nothing outside git.

    Nor in a repository that has none of the project's files: a ZIP may be unpacked within another project.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None or not git("ls-files"):
        return {}
    # What the pipeline itself rewrites while it runs would make every run dirty.
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock", ":!metrics")
    return {"git_commit": commit, "git_dirty": str(bool(dirty)).lower()}


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM ends a Python process without running its `finally` blocks; turn it into an exit that does."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
