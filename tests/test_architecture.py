import ast
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from changed_params import put

import cli
from anomaly_models import MODELS as METHODS
from pipelines import lineage
from pipelines.lineage import code_of, code_of_stage
from pipelines.paths import Project
from pipelines.preview.check import load_checked, write_checked

ROOT = Path(__file__).parents[1]
MODELS = sorted((ROOT / "anomaly_models").rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").rglob("*.py"))

# What a room may import, beside itself and the ground. In brackets: of that room, these files alone.
ALLOWED = {
    "pictures": "",
    "tracking": "inference(answers)",
    "sources": "",
    "inference": "pictures",
    "data": "pictures anomaly_models",
    "preparation": "data pictures",
    "settings": "preparation(config) sources anomaly_models(base)",
    "training": "data preparation(config) settings tracking anomaly_models",
    "teachers": "training data preparation sources settings tracking anomaly_models",
    "evaluation": "training(trained) data pictures settings tracking anomaly_models",
    "deployment": "inference training(trained) evaluation data pictures sources(catalogue) "
    "sources(solar_cells) settings tracking anomaly_models",
    "report": "evaluation deployment(records) data(index) pictures sources settings tracking",
    "preview": "teachers training preparation data pictures settings anomaly_models",
    "sweeps": "preview(check) preview(variants) report(terminal) deployment evaluation training settings tracking",
    "tuning": "preview(check) preview(variants) evaluation training data pictures settings tracking anomaly_models",
}
GROUND = {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__"}
# The names, what settings and sizes are.
GROUND_OF_MODELS = {f"anomaly_models/{name}.py" for name in ("__init__", "common/settings", "common/sizes")}

# A machine on the line runs `predict` without torch, and the rest answers sooner for it.
TORCH_FREE = (
    *(f"pipelines/{room}/*.py" for room in ("pictures", "inference", "sources", "settings", "tracking", "report")),
    *(
        f"pipelines/preparation/{name}.py"
        for name in (
            "config",
            "listing",
            "layouts",
            "published",
            "mask_files",
            "lookalikes",
            "decoding",
            "splits",
            "prepare",
        )
    ),
    "pipelines/preparation/prepare.py",
    "pipelines/data/index.py",
    "pipelines/preview/found.py",
    *(
        f"pipelines/evaluation/{name}.py"
        for name in ("curves", "regions", "outcomes", "measures", "certainty", "description")
    ),
    *(f"pipelines/deployment/{name}.py" for name in ("bundle", "latency", "records", "threshold")),
    *(f"pipelines/{name}.py" for name in sorted(GROUND - {"device"})),
    "pipelines/tuning/spaces.py",
    "cli.py",
)
MLFLOW_FREE = (
    *(pattern for pattern in TORCH_FREE if "tracking" not in pattern),
    "pipelines/tracking/records.py",
    "pipelines/tracking/secrets.py",
)


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


# But for the command line of a bundle, which has no other.
@pytest.mark.parametrize("path", [p for p in [*MODELS, *PIPELINES] if p.name != "runner.py"], ids=relative)
def test_nothing_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert printed == []


def test_there_are_no_packages_of_tests() -> None:
    """`tests/pipelines/__init__.py` would hide the real package."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def room_of(path: Path) -> str:
    """The room that a file stands in; the models are one, the ground has no name."""
    first, *rest = path.relative_to(ROOT).parts
    return first if first == "anomaly_models" else rest[0] if len(rest) > 1 else ""


def files_imported(path: Path) -> set[Path]:
    """The project's own files that a file imports, wherever in it the import stands."""
    files = {ROOT / f"{module.replace('.', '/')}.py" for module in imports(path)}
    packages = {ROOT / module.replace(".", "/") / "__init__.py" for module in imports(path)}
    return {file for file in files | packages if file.exists() and file.relative_to(ROOT).parts[0] != "tests"}


def may_import(room: str, path: Path) -> bool:
    if room_of(path) in (room, "") or relative(path) in GROUND_OF_MODELS:
        return True
    for entry in ALLOWED[room].split():
        name, _, files = entry.partition("(")
        if name == room_of(path) and (not files or path.stem in (files.rstrip(")"), "__init__")):
            return True
    return False


def test_every_room_is_in_the_table() -> None:
    rooms = {path.name for path in (ROOT / "pipelines").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("path", [path for path in PIPELINES if room_of(path)], ids=relative)
def test_a_room_imports_what_the_table_allows(path: Path) -> None:
    assert [relative(other) for other in files_imported(path) if not may_import(room_of(path), other)] == []


def test_contributing_shows_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = dict(re.findall(rf"^({'|'.join(ALLOWED)}) +(\S.*)$", text, re.MULTILINE))
    assert shown == {room: allowed or "-" for room, allowed in ALLOWED.items()}


def test_the_ground_knows_no_room() -> None:
    for name in GROUND:
        path = ROOT / "pipelines" / f"{name}.py"
        assert {room_of(other) for other in files_imported(path) if relative(other) not in GROUND_OF_MODELS} <= {""}, (
            name
        )


def test_no_imports_go_round_in_a_circle() -> None:
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " -> ".join(map(relative, (*way, path)))
        if path not in done:
            for other in sorted(files_imported(path) - {path}):
                visit(other, (*way, path))
            done.add(path)

    for path in (*MODELS, *PIPELINES):
        visit(path, ())


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_says_in_one_line_what_it_is(room: str) -> None:
    (line,) = (ROOT / "pipelines" / room / "__init__.py").read_text(encoding="utf-8").splitlines()[:1]
    assert ast.literal_eval(line).endswith(".")
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert re.search(rf"^  {room}/ +\S", page, re.MULTILINE), f"the tree has no line for {room}"


IMPORT_ALL = """
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    found = {heavy} & set(sys.modules)
    assert not found, f"{{name}} imports {{sorted(found)}}"
"""


def modules(patterns: tuple[str, ...]) -> list[str]:
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for path in paths
    ]


@pytest.mark.parametrize(
    ("patterns", "heavy"),
    [
        (TORCH_FREE, {"torch", "torchvision", "timm", "kornia"}),
        (MLFLOW_FREE, {"mlflow", "dvc", "matplotlib"}),
        (TORCH_FREE, {"tifffile", "imagecodecs", "pydicom"}),
    ],
    ids=["torch", "mlflow", "extras"],
)
def test_light_modules_import_nothing_heavy(patterns: tuple[str, ...], heavy: set[str]) -> None:
    assert all(list(ROOT.glob(pattern)) for pattern in patterns)
    code = IMPORT_ALL.format(names=modules(patterns), heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CHECK = """
import sys
from pathlib import Path
from pipelines.preview.check import load_checked, require_packages
require_packages(load_checked(Path("presets/demo.yaml")))
found = {"timm", "torchvision", "mlflow", "kornia", "scipy.ndimage"} & set(sys.modules)
assert not found, sorted(found)
"""


def test_to_check_the_demo_takes_torch_and_nothing_as_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


DETECT = """
import sys
import cli, pipelines.inference.detector, pipelines.inference.predict, pipelines.progress, pipelines.tracking.secrets
import pipelines.inference.bundle
__import__("pipelines.inference." + sys.argv[1])
from importlib.metadata import packages_distributions
found = packages_distributions()
names = {module.partition(".")[0] for module in sys.modules} - sys.stdlib_module_names
print(*{package for name in names for package in found.get(name, [])})
"""


@pytest.mark.parametrize("verb", ["predict", "serve"])
def test_what_runs_at_the_line_needs_what_its_lock_installs(verb: str) -> None:
    lock = (ROOT / f"requirements-{verb}.lock").read_text(encoding="utf-8")
    locked = set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))
    done = subprocess.run([sys.executable, "-c", DETECT, verb], cwd=ROOT, capture_output=True, text=True, check=True)
    needed = {name.lower().replace("_", "-") for name in done.stdout.split() if not name.startswith("opentelemetry")}
    # The second puts itself into every process; FastAPI takes the third, and telemetry, where they are there.
    assert needed - locked <= {"blemish", "setuptools", "orjson"}


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
    """By name and quoted by DVC, never as they are: a name would reach the shell."""
    for name, stage in STAGES.items():
        items = list(stage.get("matrix", {}))
        ending = {"check": " --params-only"}.get(name, " ${item}" if items else "")
        assert stage["cmd"] == f"python cli.py {name}{ending}"
        options = ("device", "dry_run", "params_only", "return")
        expected = [p for p in COMMANDS[name].callback.__annotations__ if p not in options]
        assert items == expected, name
        assert COMMANDS[name].cls is (cli.Stage if items else typer.core.TyperCommand), name


def test_what_dvc_may_delete_before_a_verb_runs() -> None:
    """Only what no name is part of, and what is called as nobody's folder is, whatever the name leads to."""
    ours = (".trained", "/teacher/run.json", "/teacher/teacher.safetensors")
    for name, stage in STAGES.items():
        for out in [*stage["outs"], *stage.get("metrics", [])]:
            (path, flags) = next(iter(out.items())) if isinstance(out, dict) else (out, {})
            if "${" in path:
                assert flags.get("persist", False) is not path.endswith(ours), f"{name}: {path}"


def file_of(name: str) -> Path:
    """The one file that is called as the stage."""
    (found,) = (ROOT / "pipelines").glob(f"*/{name}.py")
    return found


@pytest.mark.parametrize("name", [name for name in STAGES if name not in ("check", "download")])
def test_the_code_of_a_stage_is_complete(name: str) -> None:
    """Each depends on what `check` writes of its code; that is its module, all that this imports, and data beside it.

    `download` has no code among its deps: gigabytes are not fetched again because a line moved.
    """
    assert f"checked/stages/{name}.txt" in STAGES[name]["deps"]
    code = code_of_stage(name)
    assert file_of(name) in code
    assert set(code_of(relative(file_of(name)))) <= set(code)
    assert not [path for path in code if path.suffix == ".pyc"]


def test_a_report_depends_on_its_page_and_its_words() -> None:
    code = {relative(path) for path in code_of_stage("report")}
    assert code >= {"pipelines/report/templates/report.css", "pipelines/report/literature.yaml", "pipelines/names.py"}


def test_every_stage_but_two_tells_of_its_code() -> None:
    assert set(lineage.STAGES) == set(STAGES) - {"check", "download"}
    assert set(STAGES["check"]["deps"]) == {"params.yaml", "anomaly_models", "pipelines"}
    assert not [
        dep for name, stage in STAGES.items() if name != "check" for dep in stage["deps"] if dep[:9] == "pipelines"
    ]


@pytest.mark.parametrize(("name", "own"), [("train", "fapm.py"), ("distill", "efficient_ad.py")])
def test_a_killed_run_resumes_on_no_less_than_the_code_that_dvc_looks_at(name: str, own: str) -> None:
    """The same answer serves both: what is in `deps` and is imported is in the fingerprint."""
    resumed_on = set(code_of(relative(file_of(name)), f"anomaly_models/{own}"))
    assert file_of(name) in resumed_on
    assert ROOT / "pipelines" / "data" / "arrays.py" in resumed_on
    assert ROOT / "anomaly_models" / own in resumed_on
    left_out = [path for path in resumed_on if path.match("tracking/*.py") or path.match("settings/*.py")]
    assert [path for path in left_out if "common" not in path.parts] == []


def test_parameters_that_a_stage_depends_on_exist() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, stage in STAGES.items():
        for path in stage.get("params", []):
            section, _, item = path.partition(".${item.")
            found = params
            for part in section.split("."):
                assert part in found, f"{name}: {path}"
                found = found[part]
            assert not item or isinstance(found, dict), f"{name}: {path}"


def test_a_cells_stages_read_no_params_of_dvc() -> None:
    """DVC reads the whole file again for each of them: a minute, with 300 cells of which nothing has changed."""
    assert [name for name, stage in STAGES.items() if "model" in stage.get("matrix", {}) and "params" in stage] == [
        "distill",
        "penalty",
        "textures",
    ]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("models.fapm.neighbours", 3, {"models/fapm.txt"}),
        ("models.adfa.image_size", 128, {"models/adfa.txt", "frames.txt"}),
        ("train.seeds", [0, 1], set()),
        ("evaluate.false_alarm_rate", 0.1, {"stages/evaluate.txt"}),
        ("evaluate.reject_rate", 0.02, {"stages/evaluate.txt"}),
        ("evaluate.review_rate", 0.2, {"stages/evaluate.txt"}),
        ("evaluate.region", "seen", {"stages/evaluate.txt"}),
        ("evaluate.resolution", "native", {"stages/evaluate.txt"}),
        ("evaluate.pixel_metrics", "streaming", {"stages/evaluate.txt"}),
        ("evaluate.learnt_defects", "tested_by_others", {f"tests/{name}.txt" for name in METHODS if name != "bgad"}),
        ("evaluate.bootstrap", 60, set()),  # the report's: whoever changes it need not evaluate again
        ("export.opset", 19, {"stages/export.txt"}),
        ("export.max_difference", 0.1, {"stages/export.txt"}),
        ("export.precisions", ["float32", "int8"], {"stages/export.txt"}),
        ("export.max_decisions_changed", 0.1, {"stages/export.txt"}),
        ("prepare.max_megapixels", 200, {"stages/export.txt"}),  # `prepare` depends on its own section
        ("latency.threads", 2, {"stages/latency.txt"}),
        ("latency.seconds", 2.0, {"stages/latency.txt"}),
        ("latency.batch_size", 4, {"stages/latency.txt"}),
    ],
)
def test_what_a_changed_setting_rebuilds(tmp_path: Path, key: str, value: Any, told: set[str]) -> None:
    """Each is in a file that `check` makes, or in the `params` of a stage, so that DVC sees it change."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    found = []
    for changes in ({}, {key: value}):
        put(values, changes)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        write_checked(load_checked(tmp_path / "params.yaml"), Project(tmp_path))
        checked = tmp_path / "checked"
        found.append({path.relative_to(checked).as_posix(): path.read_text() for path in checked.rglob("*.txt")})
    before, after = found
    assert {name for name in after if before[name] != after[name]} == told
    known = {path for stage in STAGES.values() for path in stage.get("params", [])}
    assert told or {key, key.partition(".")[0]} & known


def test_every_setting_is_some_stages() -> None:
    """Of the sections that the table above changes one by one, all keys are in it."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (mark,) = (m for m in test_what_a_changed_setting_rebuilds.pytestmark if m.name == "parametrize")
    changed = {key for key, *_ in mark.args[1]}
    for section in ("train", "evaluate", "export", "latency"):
        assert {f"{section}.{key}" for key in params[section]} <= changed


def test_what_a_stage_makes_is_not_committed(tmp_path: Path) -> None:
    """But for figures. DVC itself would tell git of cached folders only.

    In a repository of its own: a downloaded ZIP has none.
    """
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for name, stage in STAGES.items():
        for out in stage["outs"]:
            path = re.sub(r"\$\{.*?\}", "x", next(iter(out)) if isinstance(out, dict) else out)
            found = subprocess.run(["git", "check-ignore", "-q", f"{path}/file"], cwd=tmp_path, check=False)
            assert (found.returncode == 0) is not path.startswith("metrics/"), f"{name}: {path}"


def test_every_model_has_its_folder_of_inputs() -> None:
    """A dependency of `train`; without it DVC refuses the cell."""
    from anomaly_models import MODELS

    assert {path.name for path in (ROOT / "pretrained").iterdir()} == set(MODELS)
