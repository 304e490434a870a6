"""What a result was made with: Python, packages, machine; read from the system, without importing any package."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")
_NAMED = ("blemish", "torch", "onnxruntime", "timm", "kornia", "mlflow", "dvc")


def environment() -> dict[str, str]:
    """The main versions and the machine, for the tags of a run; what is not installed is left out."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": str(os.cpu_count()),
        "memory_gigabytes": f"{psutil.virtual_memory().total / 1e9:.0f}",
    }
    for package in _NAMED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | _gpu()


def packages() -> str:
    """Every installed package as `name==version`, a line each, as pip takes them."""
    found = {f"{package.metadata['Name']}=={package.version}" for package in distributions()}
    return "\n".join(sorted(found, key=str.casefold)) + "\n"


def cpu_name() -> str:
    """What the processor is sold as; where the system does not tell, its architecture."""
    return _told("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The instructions that the processor has, as Linux calls them; none where the system does not tell."""
    return frozenset(_told("flags").split())


def _told(name: str) -> str:
    """What Linux tells of the first processor."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _gpu() -> dict[str, str]:
    """The GPU that this process computes on, if it computes with torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
