"""What every resumable training run needs about its loop: a lock, a checkpoint, and one MLflow run across kills."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import PositiveInt

from pipelines.errors import StageError
from pipelines.records import Record
from pipelines.tracking.runs import OpenRun, open_run
from pipelines.training.checkpoint import Checkpoint, fingerprint

RUN_FILE = "run.json"


class Begun(Record):
    """Beside the checkpoint: the MLflow run that a killed process goes on with."""

    run_id: str
    threads: PositiveInt  # of torch on the CPU, by which the last digits of a sum depend


@dataclass(frozen=True, slots=True)
class Work:
    """A training run, as its user sees it: what it is called, where its checkpoints lie, what others may find it by."""

    title: str  # in messages
    run_name: str  # in MLflow, where it is the first with these tags
    folder: Path  # of checkpoints and caches; gone when the run has ended well
    tags: dict[str, str]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the same run.

        Raises:
            StageError: another one is at it.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.parent / f".{self.folder.name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise StageError(
                f"{self.title}: another process is training this; wait for it, or stop it and run again"
            ) from None
        with lock:
            yield

    @contextlib.contextmanager
    def tracked(
        self, settings: Mapping[str, Any], sources: Iterable[Path], device: torch.device, root: Path, experiment: str
    ) -> Iterator[tuple[Checkpoint, OpenRun]]:
        """Open the checkpoint and the MLflow run of these settings and this code, or go on with those of a killed run.

        It goes on with as many threads as it began with, so that its bits are those of a run that nobody killed. When
        the block ends well, checkpoints and caches are removed. Call it inside `locked`.
        """
        checkpoint = Checkpoint(self.folder, fingerprint({**settings, "device": device.type}, sources))
        run_file = checkpoint.folder / RUN_FILE
        begun = Begun.load(run_file, f"delete {checkpoint.folder} to begin anew") if run_file.exists() else None
        known, threads = (begun.run_id, begun.threads) if begun else (None, torch.get_num_threads())
        opened = open_run(root, experiment, self.run_name, self.tags, known, settings=settings, sampled=True)
        with _computing_with(threads), opened as run:
            Begun(run_id=run.run_id, threads=threads).save(run_file)
            run.settings(settings)
            run.tags({"device": device.type, "threads": str(threads)})
            yield checkpoint, run
        checkpoint.forget_all()


@contextlib.contextmanager
def _computing_with(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
