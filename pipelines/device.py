"""Which device to compute on."""

import re

import torch

from pipelines.errors import ParamsError


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one.

    Raises:
        ParamsError: no such device, or no GPU of that number on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torch would take more (mps, meta), and reads cuda:999 as cuda:-25
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise ParamsError(f"device '{name}': unknown; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParamsError(f"device '{name}': this machine has {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device
