"""Several processes that train one cell, as `torchrun` starts them: they meet, agree on a state, and end together.

The first one (rank 0) does all that is done once: it holds the lock, the checkpoint and the MLflow run, and it alone
says anything. What it has, the others are given: they may be on machines without a disk in common.
"""

import contextlib
import datetime
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anomaly_models.common.shards import WHOLE, ProcessLost, Shard, asking_others
from pipelines.device import choose_device
from pipelines.errors import BlemishError, ParamsError, StageError

_WAIT = datetime.timedelta(hours=12)  # for the first process, which may learn from many images, or wait for a server
_LAST_WORDS = datetime.timedelta(seconds=10)  # that the first process has for what all of them have found


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process, among those that train together."""

    shard: Shard = WHOLE
    _control: dist.ProcessGroup | None = None  # on the CPU, apart from what the devices tell one another

    @property
    def leads(self) -> bool:
        return self.shard.rank == 0

    def given(self, value: Any = None) -> Any:
        """What the first process gives here, which all take up."""
        if self.shard.alone:
            return value
        found = [value]
        with asking_others():
            dist.broadcast_object_list(found, src=0, group=self._control, device=torch.device("cpu"))
        return found[0]

    def give_state(self, model: nn.Module, training: tuple[Optimizer, LRScheduler] | None) -> None:
        """Give all processes the weights of the first one, and where its optimiser stands."""
        if self.shard.alone:
            return
        parts = [model, *(training or ())]
        written = io.BytesIO()
        if self.leads:
            torch.save([part.state_dict() for part in parts], written)
        content = torch.empty(self.given(written.tell()), dtype=torch.uint8)
        if self.leads:
            content.copy_(torch.frombuffer(written.getbuffer(), dtype=torch.uint8))
        with asking_others():
            dist.broadcast(content, src=0, group=self._control)
        if not self.leads:
            device = next(model.parameters()).device
            states = torch.load(io.BytesIO(content.numpy().tobytes()), map_location=device, weights_only=True)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)

    def end(self) -> None:
        """Wait until all are done, and part."""
        if self.shard.alone:
            return
        with asking_others():
            dist.barrier(group=self._control)
        dist.destroy_process_group()

    def first_has_ended(self) -> bool:
        """Whether the first process ends, too, within the time that it may need to say why."""
        began = time.monotonic()
        with contextlib.suppress(RuntimeError):  # what gloo says of either
            answer = dist.irecv(torch.empty(1), src=0, group=self._control)
            assert answer is not None
            answer.wait(_LAST_WORDS)
        return time.monotonic() - began < _LAST_WORDS.total_seconds()


ALONE = Ranks()


def num_processes() -> int:
    """How many train together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of_rank(name: str) -> torch.device:
    """As `choose_device`; of several processes on a machine each takes a GPU of its own.

    Raises:
        ParamsError: there are fewer GPUs, or one was named for all.
    """
    if num_processes() == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return choose_device(name)
    if name not in ("auto", "cuda"):
        raise ParamsError(f"device '{name}': of {num_processes()} processes each takes its own; use auto, cuda or cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        here = os.environ.get("LOCAL_WORLD_SIZE", local + 1)
        raise ParamsError(
            f"device '{name}': this machine has {torch.cuda.device_count()} GPUs for {here} processes; start as many "
            "processes as there are GPUs, or use cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other processes, if `torchrun` has started any, and end with them.

    Whatever ends the first one is said by it alone. The others end without a word, unless it is theirs alone.
    """
    if num_processes() == 1:
        yield ALONE
        return
    ranks = _met()
    try:
        yield ranks
        ranks.end()
    except ProcessLost as lost:
        if not ranks.leads:
            sys.exit(1)
        sys.exit(
            f"error: another of the {ranks.shard.world} processes has ended ({lost}); the same command goes on from "
            "the last checkpoint"
        )
    except BlemishError as error:
        if ranks.leads:
            raise
        if ranks.first_has_ended():
            sys.exit(1)
        raise StageError(f"process {ranks.shard.rank} of {ranks.shard.world}, from 0: {error}") from error


def _met() -> Ranks:
    if not dist.is_available():
        raise StageError("this build of torch has no torch.distributed; train with one process")
    with_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpu else "gloo", timeout=_WAIT)
    except (ValueError, RuntimeError) as error:  # what torchrun sets is missing, or nobody answers
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{num_processes()} processes do not meet ({reason}); start them by torchrun") from error
    control = dist.new_group(backend="gloo", timeout=_WAIT)
    assert isinstance(control, dist.ProcessGroup)
    return Ranks(Shard(dist.get_rank(), dist.get_world_size()), control)
