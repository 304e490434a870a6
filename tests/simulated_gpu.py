"""A GPU that is not there: torch's fake tensors know their device and shape, and complain where two devices mix."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

GPU = torch.device("cuda", 0)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select")  # operations whose result Python has to know


@contextlib.contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it tensors have no values, and may be on `GPU`; there is no backward pass, which would ask the driver."""
    with FakeTensorMode(allow_non_fake_inputs=True), monkeypatch.context() as patched:
        patched.setattr(Tensor, "pin_memory", lambda values: values)
        patched.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patched.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        yield


class Generator(torch.Generator):
    """One that says it was there."""

    device = GPU


def to_gpu(module: nn.Module) -> None:
    """Move it where `simulated_gpu` is; `nn.Module.to` cannot, since fake tensors do not swap with real ones."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                moved = torch.empty_like(value, device=GPU)
                part._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=GPU)


class Waits(TorchDispatchMode):
    """What within it waits for the GPU: values that Python asks for, and transfers that are not sent off."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        given = args[0].device.type if args and isinstance(args[0], Tensor) else None
        if name.startswith(WAITING) and given == GPU.type:
            self.found[name] += 1
        goal = kwargs.get("device") if name == "_to_copy" else None
        if goal is not None and goal.type != given and not kwargs.get("non_blocking"):
            self.found[f"{given} to {goal.type}"] += 1
        if name == "copy_" and args[1].device.type != given and True not in (*args[2:], *kwargs.values()):
            self.found[f"{args[1].device.type} to {given}"] += 1
        return func(*args, **kwargs)


class Tape(TorchDispatchMode):
    """Does on a CPU what a CUDA graph does: what it has recorded it does again, in the same memory, with the numbers
    that Python had then; recording changes nothing; a value that Python asks for is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replayed = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, work: Callable[[], Any]) -> Any:
        with self:
            result = work()
        with torch.no_grad():
            for value, before in reversed(self._before):
                value.copy_(before)
        self._before.clear()
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, found in self._calls:
            again = tree_leaves(func(*args, **kwargs))
            known = {_memory(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
            for old, new in zip(tree_leaves(found), again, strict=True):
                if isinstance(old, Tensor) and _memory(old) not in known:
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert not func.name().removeprefix("aten::").startswith(WAITING), f"{func.name()} in a record"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before += [(one, one.clone()) for one in tree_leaves(value) if isinstance(one, Tensor)]
        found = func(*args, **kwargs)
        if "empty" not in func.name():
            self._calls.append((func, args, kwargs, found))
        return found


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
