import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from pipelines import environment as module
from pipelines.environment import cpu_flags, cpu_name, environment, packages


def test_the_versions_and_the_machine() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["onnxruntime"] == version("onnxruntime")
    assert int(found["cpu_cores"]) >= 1
    assert found["cpu"]


def test_every_package_on_a_line_of_its_own() -> None:
    lines = packages().splitlines()
    assert f"numpy=={version('numpy')}" in lines
    assert lines == sorted(set(lines), key=str.casefold)


def test_the_processors_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu_name() == (platform.processor() or platform.machine())
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Quick (R) 9\nmodel name\t: Quick (R) 9\n")
    assert cpu_name() == "Quick (R) 9"
    assert cpu_flags() == frozenset()
    with (tmp_path / "cpuinfo").open("a") as file:
        file.write("flags\t\t: fpu avx2\n\nflags\t\t: fpu\n")
    assert cpu_flags() == {"fpu", "avx2"}


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NAMED", ("numpy", "no-such-package"))
    assert environment()["numpy"] == version("numpy")
    assert "no-such-package" not in environment()
