import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from anomaly_models.common.memory_bank import MemoryBank
from pipelines.errors import StageError
from pipelines.training.checkpoint import Checkpoint, fingerprint, state_bytes

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("scale", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def training(model: nn.Module) -> tuple[Optimizer, LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return optimizer, MultiStepLR(optimizer, [3], 0.1)


def take_steps(model: Net, state: tuple[Optimizer, LRScheduler], steps: range) -> None:
    optimizer, scheduler = state
    for step in steps:
        x = torch.rand(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        model.scale += 1


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight, first, resumed = Net(0), Net(0), Net(1)
    straight_state, first_state, resumed_state = map(training, (straight, first, resumed))
    take_steps(straight, straight_state, range(6))

    take_steps(first, first_state, range(2))
    Checkpoint(tmp_path / "cell", "abc").save(2, first, first_state)

    assert Checkpoint(tmp_path / "cell", "abc").load(resumed, resumed_state, CPU) == 2
    assert_equal(resumed.state_dict(), first.state_dict())
    assert_equal(resumed_state[0].state_dict()["state"], first_state[0].state_dict()["state"])
    take_steps(resumed, resumed_state, range(2, 6))
    assert_equal(resumed.state_dict(), straight.state_dict())
    assert resumed_state[1].get_last_lr() == straight_state[1].get_last_lr() == [pytest.approx(0.01)]


def test_a_model_without_gradients_has_a_checkpoint_too(tmp_path: Path) -> None:
    fitted = MemoryBank(2, 3)
    fitted.fill([torch.rand(5, 3), torch.rand(4, 3)])
    Checkpoint(tmp_path, "abc").save(0, fitted, None)
    empty = MemoryBank(2, 3)
    assert Checkpoint(tmp_path, "abc").load(empty, None, CPU) == 0
    assert_equal(empty.state_dict(), fitted.state_dict())


def test_there_is_none_at_first(tmp_path: Path) -> None:
    model = Net(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert Checkpoint(tmp_path / "cell", "abc").load(model, training(model), CPU) is None
    assert_equal(model.state_dict(), before)
    assert not (tmp_path / "cell").exists()


def test_other_settings_start_afresh(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "abc").save(5, Net(0), None)
    assert Checkpoint(tmp_path, "xyz").load(Net(0), None, CPU) is None
    assert Checkpoint(tmp_path, "abc").load(Net(0), None, CPU) == 5


def test_a_checkpoint_of_other_settings_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    old, new = Checkpoint(tmp_path, "abc"), Checkpoint(tmp_path, "xyz")
    old.save(5, Net(0), None)
    old.folder.rename(new.folder)
    model = Net(1)
    with pytest.raises(StageError) as caught:
        new.load(model, None, CPU)
    assert str(caught.value) == (
        f"{tmp_path / 'xyz' / 'checkpoint.pt'}: made with other settings, data or code (fingerprint abc, now xyz); "
        "delete it to start afresh"
    )
    assert_equal(model.state_dict(), Net(1).state_dict())


def test_time_spent_before_a_kill_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("pipelines.training.checkpoint.time", clock)
    now = 100.0
    killed = Checkpoint(tmp_path, "abc")
    now = 107.0
    killed.save(1, Net(0), None)
    now = 109.0  # work that is lost
    resumed = Checkpoint(tmp_path, "abc")
    assert resumed.load(Net(0), None, CPU) == 1
    now = 112.0
    assert resumed.seconds == 10.0


def test_killed_while_saving_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, "abc")
    checkpoint.save(1, Net(0), None)

    def dying(_state: object, file: Any) -> None:
        file.write(b"PK half of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(2, Net(1), None)
    model = Net(2)
    assert checkpoint.load(model, None, CPU) == 1
    assert_equal(model.state_dict(), Net(0).state_dict())
    assert [path.name for path in checkpoint.folder.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_is_one_line_and_leaves_the_older_one(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import torch
from pipelines.training.checkpoint import Checkpoint
from pipelines.files import DiskFull
checkpoint = Checkpoint(Path(sys.argv[1]), "abc")
checkpoint.save(1, torch.nn.Linear(2, 2), None)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(2, torch.nn.Linear(300, 300), None)
except DiskFull as error:
    sys.exit(f"error: {error}")
"""
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    path = tmp_path / "abc" / "checkpoint.pt"
    assert done.stderr == f"error: {path}: File too large; nothing was kept of it: free some space and run again\n"
    assert Checkpoint(tmp_path, "abc").load(nn.Linear(2, 2), None, CPU) == 1
    assert [path.name for path in path.parent.iterdir()] == ["checkpoint.pt"]


def test_all_are_forgotten_when_training_is_done(tmp_path: Path) -> None:
    for name in ("abc", "xyz"):
        Checkpoint(tmp_path / "cell", name).save(0, Net(0), None)
    Checkpoint(tmp_path / "other", "abc").save(0, Net(0), None)
    Checkpoint(tmp_path / "cell", "abc").forget_all()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    Checkpoint(tmp_path / "cell", "abc").forget_all()  # nothing there is nothing to do


def test_the_fingerprint_tells_settings_and_code_apart(tmp_path: Path) -> None:
    code = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in code:
        path.write_text("x = 1\n")
    settings = {"models": {"fapm": {"grid": 8, "layers": [2, 3]}}, "data": {"sha256": "0"}}
    first = fingerprint(settings, code)
    assert len(first) == 16
    assert first == fingerprint({"data": {"sha256": "0"}, **settings}, reversed(code))  # order does not matter
    others = [
        fingerprint({**settings, "data": {"sha256": "1"}}, code),
        fingerprint({"models": {"fapm": {"grid": 4, "layers": [2, 3]}}, "data": {"sha256": "0"}}, code),
        fingerprint(settings, code[:1]),
    ]
    code[1].write_text("x = 2\n")
    others.append(fingerprint(settings, code))
    assert len({first, *others}) == 5


def test_bytes_of_a_state() -> None:
    assert state_bytes({"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.uint8)}) == 29


def test_a_checkpoint_that_cannot_be_read_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It kept its cell from being trained until somebody found and deleted it."""
    checkpoint = Checkpoint(tmp_path / "cell", "abc")
    checkpoint.save(2, Net(0), training(Net(0)))
    whole = checkpoint.path.read_bytes()
    torch.save([1], tmp_path / "list")
    torch.save({"step": 1}, tmp_path / "part")
    others = [(tmp_path / name).read_bytes() for name in ("list", "part")]
    for content in [b"", whole[:100], whole[: len(whole) // 2], whole[::-1], b"{}", *others]:
        caplog.clear()
        checkpoint.path.write_bytes(content)
        model, state = Net(1), training(Net(1))
        assert checkpoint.load(model, state, CPU) is None
        assert_equal(model.state_dict(), Net(1).state_dict())  # nothing of it was taken
        assert not checkpoint.path.exists()
        aside = checkpoint.path.with_name("checkpoint.pt.damaged")
        assert aside.read_bytes() == content
        (line,) = caplog.messages
        assert line.startswith(f"{checkpoint.path}: damaged, or by another version of Blemish (")
        assert line.endswith("); it is now checkpoint.pt.damaged, and training begins anew")
        assert "\n" not in line


def test_a_checkpoint_that_does_not_fit_gets_a_line(tmp_path: Path) -> None:
    net = Net(0)
    checkpoint = Checkpoint(tmp_path / "cell", "abc")
    checkpoint.save(2, net, training(net))
    whole = torch.load(checkpoint.path, weights_only=True)
    for wrong in ({"step": "x"}, {"model": 3}, {"model": {}}, {"seconds": None}, {"points": 5}, {"points": [("a",)]}):
        torch.save(whole | wrong, checkpoint.path)
        with pytest.raises(StageError) as caught:
            checkpoint.load(Net(1), training(Net(1)), CPU)
        message = str(caught.value)
        assert message.startswith(f"{checkpoint.path}: damaged, or by another version of Blemish (")
        assert message.endswith("); delete it to start afresh")
        assert len(message.splitlines()) == 1


class RunsCode:
    """As pickle writes it, reading it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_never_runs_code(tmp_path: Path, legacy: bool) -> None:
    checkpoint, witness = Checkpoint(tmp_path / "cell", "abc"), tmp_path / "ran"
    checkpoint.save(2, Net(0), None)
    hostile = {"fingerprint": "abc", "step": RunsCode(witness)}
    torch.save(hostile, checkpoint.path, _use_new_zipfile_serialization=not legacy)
    assert checkpoint.load(Net(1), None, CPU) is None
    checkpoint.path.write_bytes(pickle.dumps(hostile))
    assert checkpoint.load(Net(1), None, CPU) is None
    assert not witness.exists()
    pickle.loads(pickle.dumps(hostile))
    assert witness.exists()  # it would have
