import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli

ROOT = Path(__file__).parents[1]
MODELS = sorted((ROOT / "anomaly_models").rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").rglob("*.py"))

# A machine on the line runs `predict` without torch, and the rest answers sooner for it.
TORCH_FREE = (
    "cli",
    "pipelines.report.compare",
    "pipelines.sources.demo_data",
    "pipelines.evaluation.description",
    "pipelines.sources.download",
    "pipelines.environment",
    "pipelines.errors",
    "pipelines.files",
    "pipelines.report.gallery",
    "pipelines.report.gif",
    "pipelines.report.seeds",
    "pipelines.report.page",
    "pipelines.pictures.images",
    "pipelines.deployment.latency",
    "pipelines.evaluation.certainty",
    "pipelines.pictures.overlays",
    "pipelines.pictures.panels",
    "pipelines.settings.params",
    "pipelines.paths",
    "pipelines.inference.predict",
    "pipelines.preparation.prepare",
    "pipelines.settings.presets",
    "pipelines.report.readme",
    "pipelines.report.literature",
    "pipelines.report.report",
    "pipelines.sources.catalogue",
    "pipelines.report.summary",
    "pipelines.report.field_tables",
    "pipelines.tracking.runs",
)
MLFLOW_FREE = tuple(name for name in TORCH_FREE if name != "pipelines.tracking.runs")


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top_level(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODELS, ids=relative)
def test_models_know_tensors_only(path: Path) -> None:
    outside = {"pipelines", "cli", "mlflow", "dvc", "typer", "yaml", "rich", "requests", "PIL", "pathlib", "logging"}
    assert top_level(path) & outside == set()


@pytest.mark.parametrize("path", [ROOT / "cli.py", *PIPELINES], ids=relative)
def test_only_tracking_imports_mlflow(path: Path) -> None:
    assert "mlflow" not in top_level(path) or relative(path).startswith("pipelines/tracking/")


@pytest.mark.parametrize("path", PIPELINES, ids=relative)
def test_pipelines_do_not_know_the_command_line(path: Path) -> None:
    assert top_level(path) & {"cli", "typer"} == set()


@pytest.mark.parametrize("path", [*MODELS, *PIPELINES], ids=relative)
def test_nothing_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert printed == []


def test_there_are_no_packages_of_tests() -> None:
    """`tests/pipelines/__init__.py` would hide the real package."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


IMPORT_ALL = """
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    found = {heavy} & set(sys.modules)
    assert not found, f"{{name}} imports {{sorted(found)}}"
"""


@pytest.mark.parametrize(
    ("names", "heavy"),
    [(TORCH_FREE, {"torch", "torchvision", "timm", "kornia"}), (MLFLOW_FREE, {"mlflow", "dvc", "matplotlib"})],
    ids=["torch", "mlflow"],
)
def test_light_modules_import_nothing_heavy(names: tuple[str, ...], heavy: set[str]) -> None:
    code = IMPORT_ALL.format(names=names, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The command line


# Typer names a command after its function
COMMANDS = {command.callback.__name__: command for command in cli.app.registered_commands if command.callback}

HELP = """
import sys
sys.argv = ["blemish", *sys.argv[1:]]
import cli
try:
    cli.main()
finally:
    heavy = {"torch", "mlflow", "numpy", "yaml", "PIL", "onnxruntime", "dvc"} & set(sys.modules)
    sys.stderr.write(" ".join(sorted(heavy)))
"""


def cpu_seconds(*arguments: str) -> float:
    """User and system time of one `blemish` with these arguments, which must import nothing heavy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", HELP, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert done.stderr == ""
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_answers_at_once() -> None:
    assert min(cpu_seconds("--help") for _ in range(3)) < 0.5
    cpu_seconds("train", "--help")


def test_every_command_is_explained() -> None:
    for name, command in COMMANDS.items():
        assert command.callback.__doc__, name
        assert command.rich_help_panel in (cli.PIPELINE, cli.USE), name


# dvc.yaml

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_verb_is_a_function(name: str) -> None:
    match = re.match(r"python cli\.py (\S+)", STAGES[name]["cmd"])
    assert match is not None
    assert match[1] == name
    assert COMMANDS[name].rich_help_panel == cli.PIPELINE


def test_every_pipeline_verb_is_a_stage() -> None:
    assert {name for name, command in COMMANDS.items() if command.rich_help_panel == cli.PIPELINE} == set(STAGES)


def test_the_arguments_of_a_stage_are_those_of_its_verb() -> None:
    for name, stage in STAGES.items():
        arguments = re.findall(r"\$\{item\.(\w+)\}", stage["cmd"])
        expected = [p for p in COMMANDS[name].callback.__annotations__ if p not in ("device", "dry_run", "return")]
        assert arguments == expected == list(stage.get("matrix", {})), name


def test_sources_that_a_stage_depends_on_exist_and_are_its_own() -> None:
    for name, stage in STAGES.items():
        sources = [path for path in stage.get("deps", []) if path.startswith(("pipelines/", "anomaly_models/"))]
        for path in sources:
            assert (ROOT / path.replace("${item.model}", "fapm")).exists(), f"{name}: {path}"
        if name != "download":
            assert any(path.endswith(f"/{name}.py") for path in sources), name


def test_parameters_that_a_stage_depends_on_exist() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, stage in STAGES.items():
        for path in stage["params"]:
            section, _, item = path.partition(".${item.")
            found = params
            for part in section.split("."):
                assert part in found, f"{name}: {path}"
                found = found[part]
            assert not item or isinstance(found, dict), f"{name}: {path}"


def test_what_a_stage_makes_is_not_committed() -> None:
    """DVC itself would tell git of cached folders only."""
    for name, stage in STAGES.items():
        for out in stage["outs"]:
            path = re.sub(r"\$\{.*?\}", "x", next(iter(out)) if isinstance(out, dict) else out)
            found = subprocess.run(["git", "check-ignore", "-q", f"{path}/file"], cwd=ROOT, check=False)
            assert found.returncode == 0, f"{name}: {path}"


def test_every_model_has_its_folder_of_inputs() -> None:
    """A dependency of `train`; without it DVC refuses the cell."""
    from anomaly_models import MODELS

    assert {path.name for path in (ROOT / "pretrained").iterdir()} == set(MODELS)
