"""A training step as one CUDA graph: all its kernels in one launch, so that a GPU does not wait for Python meanwhile.

What is recorded is done again in the same memory, by the same numbers that Python held. So the batch is copied to where
the first one was, the learning rate is on the device, and a model says of itself that its step depends on nothing else
(`AnomalyModel.same_every_step`). Random numbers are those of the generator as it is seeded before the step.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

WARM_UP = 3  # steps in which libraries choose their kernels, and the optimiser makes its state
B = TypeVar("B")
T = TypeVar("T")


class Recorder(Protocol):
    """What notes the work on a device, to do it again."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Where work is done before it is noted."""

    def record(self, work: Callable[[], T]) -> T:
        """Note what `work` does on the device, which does not do it; `replay` fills the tensors that it gives."""

    def replay(self) -> None: ...


class CudaGraph:
    """By CUDA; `generator` is the one that the work draws from."""

    def __init__(self, generator: torch.Generator) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(generator)
        self._side = torch.cuda.Stream(generator.device)  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Not on the stream that all else waits for: autograd would lead what is recorded back to it."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream().wait_stream(self._side)

    def record(self, work: Callable[[], T]) -> T:
        with torch.cuda.graph(self._graph, stream=self._side):
            return work()

    def replay(self) -> None:
        self._graph.replay()


def recorder_on(device: torch.device, generator: torch.Generator) -> Recorder | None:
    """None where nothing is gained: a CPU has no launches to save."""
    return CudaGraph(generator) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of an optimiser's step, on the device."""

    names: tuple[str, ...]
    values: Tensor  # (len(names),) float64, of the terms of the loss
    gradient_norm: Tensor  # before any clipping


class Recorded(Generic[B]):
    """Takes the first steps as they are, and all others of batches of the same form from the record of one."""

    def __init__(
        self, recorder: Recorder, optimizer: Optimizer, step: Callable[[B], Outcome], seed: Callable[[int], object]
    ) -> None:
        self._recorder, self._optimizer, self._step, self._seed = recorder, optimizer, step, seed
        self._warm = 0
        self._batch: B | None = None
        self._outcome: Outcome | None = None

    def __call__(self, batch: B, seed: int) -> Outcome:
        """Take a step with the generator as `seed` begins it; what it gives is overwritten by the next one."""
        if self._batch is None and self._warm == WARM_UP:
            self._batch = _copied(batch)
            with _capturable(self._optimizer):
                self._outcome = self._recorder.record(lambda: self._step(self._held))
        self._seed(seed)
        if self._outcome is not None and _form(batch) == _form(self._held):
            for name, value in _tensors(self._held).items():
                value.copy_(_tensors(batch)[name], non_blocking=True)
            self._recorder.replay()
            return self._outcome
        self._warm = min(WARM_UP, self._warm + 1)
        with self._recorder.aside():
            return self._step(batch)

    @property
    def _held(self) -> B:
        assert self._batch is not None
        return self._batch


def settle(optimizer: Optimizer, device: torch.device, *, recorded: bool) -> None:
    """Let the learning rates, which a checkpoint of another machine may have filled, be where they are used.

    In a record, that is on the device; elsewhere they are numbers.
    """
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if recorded else rate


@contextlib.contextmanager
def _capturable(optimizer: Optimizer) -> Iterator[None]:
    """Let torch know that its step is meant to be recorded; where one is not, it would warn."""
    for group in optimizer.param_groups:
        group["capturable"] = group["lr"].device.type == "cuda"
    yield
    for group in optimizer.param_groups:
        group["capturable"] = False


def _tensors(batch: Any) -> dict[str, Tensor]:
    held = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _form(batch: Any) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    return {name: (value.shape, value.dtype, value.device) for name, value in _tensors(batch).items()}


def _copied(batch: B) -> B:
    return replace(batch, **{name: value.clone() for name, value in _tensors(batch).items()})  # type: ignore[type-var]  # a dataclass
