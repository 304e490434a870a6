"""Saving whole or not at all, and loading only what belongs to the same settings."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipelines.errors import StageError
from pipelines.files import atomic_file
from pipelines.unreadable import reading


def fingerprint(settings: Mapping[str, Any], sources: Iterable[Path]) -> str:
    """A hash of everything a training run depends on: its settings and data version, and the code of `sources`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_LOG = logging.getLogger(__name__)  # whose warnings Python writes to stderr as they are, if nobody asked otherwise
Point = tuple[str, float, int, float]  # of a curve: its name, value, step, and time in seconds since 1970


class Checkpoint:
    """The resumable state of one training run: a file in a folder named after the run's fingerprint.

    No generator state is stored, since every batch and every step's randomness is a function of (seed, step).
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._parent = folder
        self._fingerprint = fingerprint
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self.folder = folder / fingerprint
        self.path = self.folder / "checkpoint.pt"
        self.points: list[Point] = []  # up to this step, which the tracking store may not have taken yet

    @property
    def seconds(self) -> float:
        """Time spent on this run so far, what was done before a kill and checkpointed included."""
        return self._seconds_before + time.monotonic() - self._started

    def save(self, step: int, model: nn.Module, training: tuple[Optimizer, LRScheduler] | None) -> None:
        """Replace the checkpoint atomically; `step` is the next one to take."""
        optimizer, scheduler = training if training else (None, None)
        state = {
            "fingerprint": self._fingerprint,
            "step": step,
            "seconds": self.seconds,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None,
            "scheduler": scheduler.state_dict() if scheduler else None,
            "points": self.points,
        }
        # Given a name, torch.save would write from C++ and not say why it failed on a full disk.
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def load(
        self, model: nn.Module, training: tuple[Optimizer, LRScheduler] | None, device: torch.device
    ) -> int | None:
        """Fill the model and its optimiser; gives the next step to take, or None if there is no checkpoint yet.

        One that cannot be read, as a power cut may leave it, is set aside, so that its cell can be trained.

        Raises:
            StageError: what the file holds does not fit, or was made with other settings, data or code.
        """
        if not self.path.exists():
            return None
        aside = self.path.with_name(f"{self.path.name}.damaged")
        try:
            with reading(self.path, f"it is now {aside.name}, and training begins anew"):
                state: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
                state["fingerprint"], state["step"]
        except StageError as error:
            _LOG.warning("%s", error)
            self.path.replace(aside)
            return None
        with reading(self.path, "delete it to start afresh"):
            return self._fill(state, model, training)

    def _fill(self, state: dict[str, Any], model: nn.Module, training: tuple[Optimizer, LRScheduler] | None) -> int:
        if state["fingerprint"] != self._fingerprint:
            raise StageError(
                f"{self.path}: made with other settings, data or code (fingerprint {state['fingerprint']}, "
                f"now {self._fingerprint}); delete it to start afresh"
            )
        model.load_state_dict(state["model"])
        if training:
            optimizer, scheduler = training
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
        self._seconds_before = float(state["seconds"])
        self.points = [(str(name), float(value), int(at), float(when)) for name, value, at, when in state["points"]]
        return int(state["step"])

    def forget_all(self) -> None:
        """Remove this cell's checkpoints, those of earlier settings included: the finished model stands elsewhere."""
        shutil.rmtree(self._parent, ignore_errors=True)


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """The size in bytes of a state dict's tensors."""
    return sum(value.numel() * value.element_size() for value in state.values())
