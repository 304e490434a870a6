"""As a wheel: one package, whose `blemish init` makes a project in any folder; and as an editable install."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from clone import copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params

import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
FOLDERS = ("anomaly_models", "blemish", "pipelines", "presets", ".dvc")
FILES = ("cli.py", "dvc.yaml", "setup.py", "pyproject.toml", "README.md", "LICENSE", ".dvcignore", ".gitignore")
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
ALONE = ("--no-index", "--no-deps")


def run(*command: str | Path, cwd: Path, programs: Path = Path(sys.executable).parent) -> str:
    """What is printed; of a shell that finds these programs first, and no code but what they have installed."""
    env = environment(programs, DVC_NO_ANALYTICS="true", COLUMNS="200")
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("clone"), *FOLDERS, *FILES)


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, *PIP, "wheel", *ALONE, "--no-build-isolation", "--wheel-dir", folder, clone, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def environment_with(folder: Path, *arguments: str | Path) -> Path:
    """An environment that has the packages of this one, and what pip installs by these arguments; its programs."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    programs = folder / "bin"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    run(programs / "python", *PIP, "install", *ALONE, "--ignore-installed", *arguments, cwd=folder.parent)
    return programs


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(tmp_path_factory.mktemp("installed") / "env", wheel)


def test_it_is_one_package_with_the_repository_in_it(wheel: Path) -> None:
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")} == {"blemish"}
    inside = {name.relative_to("blemish/repository").as_posix() for name in names if "repository" in name.parts}
    code = [path for folder in ("anomaly_models", "pipelines", "presets") for path in (ROOT / folder).rglob("*.*")]
    expected = {path.relative_to(ROOT).as_posix() for path in code if path.is_file() and path.suffix != ".pyc"}
    dvc = {".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml"}
    assert inside == expected | dvc | {"cli.py"}


def test_the_detector_is_found_and_no_other_name(installed: Path, tmp_path: Path) -> None:
    look = (
        "from importlib.util import find_spec as find; print([find(n) for n in ('cli', 'pipelines', 'anomaly_models')])"
    )
    assert run(installed / "python", "-c", look, cwd=tmp_path) == "[None, None, None]\n"
    detector = run(installed / "python", "-c", "from blemish import Detector; print(Detector)", cwd=tmp_path)
    assert detector == "<class 'pipelines.inference.detector.Detector'>\n"


def test_the_version(installed: Path, wheel: Path, tmp_path: Path) -> None:
    assert run("blemish", "--version", cwd=tmp_path, programs=installed) == f"blemish {wheel.name.split('-')[1]}\n"


def test_the_tab_key_completes_a_verb(installed: Path, tmp_path: Path) -> None:
    asked = ("_BLEMISH_COMPLETE=complete_bash", "COMP_WORDS=blemish pre", "COMP_CWORD=1")
    assert run("env", *asked, "blemish", cwd=tmp_path, programs=installed).split() == ["prepare", "predict", "preset"]


def test_a_project_anywhere_sees_that_the_code_of_a_stage_has_changed(installed: Path, tmp_path: Path) -> None:
    assert "params.yaml: preset demo" in run("blemish", "init", cwd=tmp_path, programs=installed)
    draw_category(tmp_path / "images" / CATEGORY, train=8, good=3, defect=3)
    write_params(tmp_path, tiny_params())

    def dvc(verb: str) -> str:
        command = (installed / "python", "-m", "dvc", verb, f"prepare@{CATEGORY}")
        return run(*command, cwd=tmp_path, programs=installed)

    made = dvc("repro")
    assert "Running stage 'check'" in made
    assert f"Running stage 'prepare@{CATEGORY}'" in made
    assert "up to date" in dvc("status")
    (code,) = installed.parent.glob("lib/*/site-packages/blemish/repository/pipelines/preparation/rows.py")
    code.write_text(code.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    run("blemish", "check", cwd=tmp_path, programs=installed)
    changed = [line.split() for line in dvc("status").splitlines() if "checked/" in line]
    assert changed == [["modified:", "checked/stages/prepare.txt"]]


def test_an_editable_install_leads_to_the_clone(clone: Path, tmp_path: Path) -> None:
    programs = environment_with(tmp_path / "env", "--no-build-isolation", "--editable", clone)
    look = "import anomaly_models, cli, pipelines; print(cli.__file__)"
    assert run(programs / "python", "-c", look, cwd=tmp_path) == f"{clone / 'cli.py'}\n"
    assert "Usage: blemish" in run("blemish", "--help", cwd=tmp_path, programs=programs)


@pytest.mark.parametrize("target", ["wheel", "wheelhouse", "setup"])
def test_with_an_index_of_cpu_wheels_torch_comes_from_there_and_nothing_for_gpus(target: str) -> None:
    command = ("make", "--dry-run", "--always-make", target, "CPU_WHEELS=file:///somewhere/simple")
    printed = run(*command, cwd=ROOT)
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    torch = " ".join(
        f"{name}=={re.findall(rf'^{name}==([^ ]+)', lock, re.MULTILINE)[0]}" for name in ("torch", "torchvision")
    )
    assert re.search(rf"pip install .*--index-url file:///somewhere/simple {torch}\n", printed)
    (kept,) = set(re.findall(r"awk .* requirements\.lock", printed))
    names = re.findall(r"^([a-z0-9-]+)==", run("sh", "-c", kept, cwd=ROOT), re.MULTILINE)
    left_out = set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE)) - {*names}
    assert {"torch", "torchvision", "triton", "cuda-toolkit", "nvidia-cublas"} <= left_out
    assert all(name.startswith(("torch", "triton", "nvidia", "cuda")) for name in left_out)
    assert "torchmetrics" in names


def test_the_page_names_what_exists() -> None:
    verbs = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert set(re.findall(r"`blemish (\w+)", PAGE)) <= verbs
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGE, re.MULTILINE)) <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"blemish\[(\w+)\]", PAGE)) <= {*extras}
