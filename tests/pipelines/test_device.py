import pytest
import torch

from pipelines.device import choose_device
from pipelines.errors import ParamsError


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(expected)


def test_a_gpu_is_counted_before_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:1"):
        assert choose_device(name) == torch.device(name)
    with pytest.raises(ParamsError, match=r"^device 'cuda:2': this machine has 2 GPUs; use auto or cpu$"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ParamsError, match=r"^device 'cuda': this machine has 0 GPUs; use auto or cpu$"):
        choose_device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:999", "cpu:0", "mps", "meta", "cpu\n"]
)
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ParamsError) as caught:
        choose_device(name)
    assert str(caught.value) == f"device '{name}': unknown; use auto, cpu, cuda or cuda:N"
