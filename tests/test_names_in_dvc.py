"""Names of params.yaml in the real dvc.yaml, with the real DVC: none reaches a shell, none leads out of the project.

The verbs are a stand-in that writes down how it was called, and refuses or makes what its stage promises.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from clone import REPOSITORY, environment
from conftest import tiny_params

import cli

VERB = """
import json, os, sys
from pathlib import Path
from ruamel.yaml import YAML
verb, *arguments = sys.argv[1:]
with open("called.jsonl", "a") as log:
    print(json.dumps([verb, *arguments]), file=log)
if verb in os.environ.get("REFUSES", "").split():
    sys.exit("error: refused")
params = YAML(typ="safe").load(Path("params.yaml"))
named = dict(zip(arguments[::2], arguments[1::2]))
model, category = named.get("--model", ""), named.get("--category", "")
folder = Path({
    "check": "checked", "download": f"data/{named.get('--source')}", "prepare": f"data/prepared/{category}",
    "distill": f"pretrained/{model}/teacher", "penalty": f"pretrained/{model}/penalty",
    "report": "reports/" + params["tracking"]["experiment"],
    "textures": f"pretrained/{model}/textures", "train": f"models/{model}/{category}/seed0.trained",
    "evaluate": f"evaluations/{model}/{category}/seed0", "export": f"exported/{model}/{category}", "latency": "latency",
}[verb])
folder.mkdir(parents=True, exist_ok=True)
if verb == "check":
    (folder / "params.txt").write_text("good")
    (folder / "frames.txt").write_text("seen")
    for place in ("in_models", "models", "tests", "stages"):
        (folder / place).mkdir(exist_ok=True)
    for name in {*params["models"], *params["distill"], *params["penalty"], *params["textures"]}:
        (folder / "in_models" / f"{name}.txt").write_text(str(name in params["models"]))
    for name in params["models"]:
        for place in ("models", "tests"):
            (folder / place / f"{name}.txt").write_text("all")
    for stage in "prepare distill penalty textures train evaluate export latency report".split():
        (folder / "stages" / f"{stage}.txt").write_text("code")
elif verb == "latency":
    (folder / model).mkdir(exist_ok=True)
    (folder / model / f"{category}.json").write_text("{}")
elif verb == "distill":
    for name in ("run.json", "teacher.safetensors"):
        (folder / name).write_text(verb if model in params["models"] else "")
else:
    (folder / "made").write_text(verb)
if verb == "prepare":
    (folder / "index.json").write_text("{}")
    (folder / "seen_by").mkdir(exist_ok=True)
    for name in params["models"]:
        (folder / "seen_by" / f"{name}.json").write_text("{}")
if verb == "report":
    Path("metrics").mkdir(exist_ok=True)
    Path("metrics/summary.json").write_text("{}")
if verb == "evaluate":
    (folder / "evaluation.json").write_text("{}")
    Path("metrics", model, category).mkdir(parents=True, exist_ok=True)
    Path("metrics", model, category, "seed0.json").write_text("{}")
"""

EACH_ALONE = """
import sys
from dvc.exceptions import DvcException
from dvc.repo import Repo
repo, names = Repo(), []
try:
    names = [stage.addressing for stage in repo.index.stages]
except DvcException as error:
    print("refused:", error)
for name in names:
    if name.partition("@")[0] not in sys.argv[1:]:
        continue
    try:
        repo.reproduce(name, single_item=True, force=True)
    except DvcException as error:
        print("refused:", name, error, error.__cause__)
"""


class Place:
    """A project in a folder beside others that are not its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def params(self, **changes: Any) -> None:
        text = yaml.safe_dump(tiny_params() | changes, sort_keys=False, allow_unicode=True)
        (self.root / "params.yaml").write_text(text, encoding="utf-8")

    def run(self, *command: str, refuses: str = "") -> subprocess.CompletedProcess[str]:
        log = self.root / "called.jsonl"
        log.unlink(missing_ok=True)
        env = environment(Path(sys.executable).parent, REFUSES=refuses, DVC_NO_ANALYTICS="true")
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, check=False)

    def each_alone(self, *verbs: str, refuses: str = "") -> str:
        """As `dvc repro --force --single-item` of every stage of these verbs, whatever becomes of the others."""
        done = self.run(sys.executable, "-c", EACH_ALONE, *verbs, refuses=refuses)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def called(self) -> list[list[str]]:
        log = self.root / "called.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def not_its_own(self) -> dict[str, str]:
        """All that no stage has to touch."""
        outer = self.root.parent
        own = ("dvc.lock", ".dvc/", "params.yaml", "called.jsonl", "data/", "checked/", ".git/", "pretrained/")
        found = {str(path.relative_to(outer)): path for path in outer.rglob("*") if path.is_file()}
        return {
            name: path.read_text(errors="replace")
            for name, path in found.items()
            if not name.startswith(tuple(f"project/{start}" for start in own))
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    root = tmp_path / "project"
    for name in ("anomaly_models", "pipelines"):
        for path in (REPOSITORY / name).rglob("*.py"):
            copy = root / path.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
    (root / "anomaly_models" / "weights").mkdir()
    for path in (
        "../victim/a.txt",
        "../victim/teacher/a",
        "../victim/model.onnx",
        "../victim.json",
        "docs/a.txt",
        "images/x/a.png",
        "anomaly_models/weights/a",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    for model in ("fapm", "efficient_ad", "diffusion_ad"):
        (root / "pretrained" / model).mkdir(parents=True)
        (root / "pretrained" / model / ".gitkeep").touch()
    (root / "cli.py").write_text(VERB)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / ".dvc").mkdir()
    shutil.copy(REPOSITORY / ".dvc" / "config", root / ".dvc" / "config")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return Place(root)


HOSTILE = ["x; touch P #", "$(touch P)", "x'; touch P; echo '", "--device"]


def test_no_name_reaches_a_shell(place: Place) -> None:
    """Keys and categories alike, also where `check` has let them pass: plain, and `--single-item`."""
    for name in HOSTILE:
        (place.root / "images" / name).mkdir()
    keys = {name: {"seed": 0} for name in HOSTILE}
    data = {"root": "images", "categories": HOSTILE}
    place.params(download=keys, textures=keys, data=data, texture_photos="images")
    before = place.not_its_own()
    plain = place.run("dvc", "repro", "--keep-going").stderr, place.called()
    alone = place.each_alone("download", "prepare", "textures", "train"), place.called()
    assert not list(place.root.parent.rglob("P"))
    for said, calls in (plain, alone):
        for verb, option in (("download", "--source"), ("prepare", "--category"), ("textures", "--model")):
            assert {call[2] for call in calls if call[:2] == [verb, option]} == set(HOSTILE), said
        cells = {tuple(call[1:]) for call in calls if call[0] == "train"}
        assert cells == {("--model", "fapm", "--category", name, "--seed", "0") for name in HOSTILE}
    assert before.items() <= place.not_its_own().items()


def test_what_categories_may_be_called_dvc_finds(place: Place) -> None:
    names = ["pcb-1", "pcb-1-1", "Zahnrad_grün", "gru\u0308n", "齿轮 1.2"]
    for name in names:
        (place.root / "images" / name).mkdir()
    place.params(download={}, data={"root": "images", "categories": names})
    done = place.run("dvc", "repro", *(f"train@fapm-{name}-0" for name in names))
    assert done.returncode == 0, done.stderr
    assert sorted(call[4] for call in place.called() if call[0] == "train") == sorted(names)


OUTSIDE = ["..", "../images", "../docs", "../../victim", "../../../victim", "x/../../../../victim"]
STAGES = tuple(yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def everywhere(name: str) -> dict[str, Any]:
    """What params.yaml says, with a name wherever one can be."""
    sections = {key: {name: {"seed": 0}} for key in ("download", "distill", "penalty", "textures")}
    models = {"fapm": {"x": 1}, name: {"x": 1}}
    data = {"root": "images", "categories": [name, "x"]}
    photos = {"photos": "images", "texture_photos": "images"}
    return sections | {"models": models, "data": data, "tracking": {"experiment": name}} | photos


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_to_a_folder_that_is_not_the_project_s(place: Place, name: str) -> None:
    """Plain, where all ends with `check`; and every stage alone, categories and models alike."""
    place.params(**everywhere(name))
    before = place.not_its_own()
    said = place.run("dvc", "repro", refuses="check").stderr
    assert place.not_its_own() == before, said
    assert [call[0] for call in place.called()] in (["check"], []), said
    said = place.each_alone(*STAGES, refuses=" ".join(STAGES))
    assert place.not_its_own() == before, said
    called = {tuple(call) for call in place.called()}
    verbs = {verb for verb, *_ in called} | {"report"}  # whose output, which has a cache, DVC refuses outside by itself
    assert verbs == set(STAGES), said
    assert ("train", "--model", "fapm", "--category", name, "--seed", "0") in called
    assert all((verb, "--model", name, "--category", "x", "--seed", "0") in called for verb in ("train", "evaluate"))
    assert ("export", "--model", name, "--category", "x") in called


def test_no_seed_reaches_a_shell_nor_leads_elsewhere(place: Place) -> None:
    seeds = ["x; touch P #", "/../../../../../victim/a", "/../../../../docs/a"]
    place.params(data={"root": "images", "categories": ["x"]}, train={"seeds": seeds})
    before = place.not_its_own()
    said = place.each_alone("train", "evaluate", refuses="train evaluate")
    assert {call[-1] for call in place.called()} == set(seeds), said
    assert place.not_its_own() == before
    assert not list(place.root.parent.rglob("P"))


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


def test_a_model_that_leaves_models_and_comes_back(place: Place) -> None:
    """`check` tells DVC: its inputs are not made, and made anew once they are wanted; the others' stay as they are."""
    models, images = {"fapm": {"x": 1}, "efficient_ad": {"x": 1}}, {"seed": 0}
    sections = {"distill": {"efficient_ad": images}, "penalty": {"efficient_ad": images}, "textures": {"fapm": images}}
    rest = sections | {"download": {}, "photos": "images", "texture_photos": "images"}
    rest["data"] = {"root": "images", "categories": ["x"]}
    made = place.root / "pretrained" / "efficient_ad" / "teacher" / "teacher.safetensors"
    place.params(models=models, **rest)
    assert {"check", "distill@efficient_ad", "textures@fapm"} < set(ran(place.run("dvc", "repro")))
    assert made.read_text() == "distill"
    assert ran(place.run("dvc", "repro")) == []
    place.params(models={"fapm": {"x": 1}}, **rest)
    assert ran(place.run("dvc", "repro")) == ["check", "distill@efficient_ad", "penalty@efficient_ad", "report"]
    assert made.read_text() == ""
    place.params(models={"fapm": {"x": 2}}, **rest)
    again = ran(place.run("dvc", "repro"))
    assert not [stage for stage in again if stage.startswith(("distill", "penalty", "textures", "prepare"))]
    place.params(models=models, **rest)
    assert place.run("dvc", "repro").returncode == 0
    assert made.read_text() == "distill"  # of DVC's cache of earlier runs


def test_an_output_that_stays_does_not_count_as_made(place: Place) -> None:
    data = {"root": "images", "categories": ["x"]}
    place.params(download={}, data=data)
    assert place.run("dvc", "repro", "prepare@x").returncode == 0
    (place.root / "images" / "x" / "a.png").write_text("another")
    failed = place.run("dvc", "repro", "train@fapm-x-0", refuses="prepare")
    assert failed.returncode != 0
    assert [call[0] for call in place.called()] == ["prepare"]
    assert ran(place.run("dvc", "repro", "train@fapm-x-0")) == ["prepare@x", "train@fapm-x-0"]
    assert ran(place.run("dvc", "repro", "--force", "prepare@x")) == ["check", "prepare@x"]
    assert ran(place.run("dvc", "repro", "train@fapm-x-0")) == []


# What the verbs make of it


@pytest.mark.parametrize("name", [*HOSTILE, *OUTSIDE, "--model", "--category", "-h", "--help", "--", "", "a b"])
def test_a_verb_takes_its_arguments_by_name(name: str) -> None:
    command = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]

    def taken(*arguments: str) -> dict[str, Any]:
        return command.make_context("train", list(arguments)).params

    found = taken("--model", "fapm", "--category", name)
    assert (found["model"], found["category"], found["device"]) == ("fapm", name, "auto")
    found = taken("--device", "cpu", "--category", "x", "--model", name, "--dry-run")
    assert (found["model"], found["category"], found["device"], found["dry_run"]) == (name, "x", "cpu", True)
    assert taken("fapm", "--device", "cpu", "x")["category"] == "x"


@pytest.mark.parametrize("arguments", [["--model", "fapm"], ["--model", "fapm", "x"], ["fapm"], ["fapm", "x", "y"]])
def test_half_of_the_names_is_not_enough(arguments: list[str], blemish: Any) -> None:
    outcome = blemish("train", *arguments)
    assert outcome.code == 2
    assert "Usage" in outcome.err


@pytest.mark.parametrize("name", ["x; touch P #", "$(touch P)", "../../victim", "-h"])
def test_a_verb_refuses_such_a_name(root: Path, blemish: Any, name: str) -> None:
    for verb, option in (("download", "--source"), ("prepare", "--category"), ("textures", "--model")):
        outcome = blemish(verb, option, name)
        assert outcome.code == 1
        assert outcome.err.startswith("error: ")
        assert len(outcome.err.splitlines()) == 1
