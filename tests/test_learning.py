"""From people's verdicts to another champion, or none: learn, train, report, in a project of its own."""

import contextlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from clone import commit, copy_project, environment
from conftest import tiny_params, write_params
from mlflow import MlflowClient
from PIL import Image

import cli
from pipelines import feedback

CATEGORY = "part"
SHELL = environment(Path(sys.executable).parent)
LIGHT, DARK = 150, 70  # of two lots of good parts


def draw(path: Path, brightness: int, defect: str | None, seed: int) -> Path:
    """A part with a little noise, 64 pixels wide; a square is a bright block, a line a black one across the part."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(brightness, 4, (64, 64, 3)).clip(0, 255)
    at = int(rng.integers(8, 40))
    if defect == "square":
        pixels[at : at + 14, 20:34] = 250
    if defect == "line":
        pixels[at : at + 5] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def blemish(root: Path, *arguments: str) -> str:
    """What a verb prints in this process, where torch is imported already."""
    printed = io.StringIO()
    with contextlib.chdir(root), contextlib.redirect_stdout(printed):
        assert cli.app(list(arguments), standalone_mode=False) in (None, 0)
    return printed.getvalue()


def made(root: Path) -> None:
    """What `blemish run` would make anew."""
    blemish(root, "prepare", CATEGORY)
    for verb in ("train", "evaluate", "export"):
        blemish(root, verb, "fapm", CATEGORY)
    blemish(root, "report")


def judged(root: Path, table: str, verdict: str, pictures: Sequence[Path]) -> str:
    """Written down and learnt."""
    blemish(root, "verdict", verdict, *map(str, pictures), "--by", "Jo", "--feedback", table)
    return blemish(root, "learn", table)


class State(NamedTuple):
    """After a report."""

    run_id: str  # of what was trained last
    champion: str
    splits: dict[str, str]
    summary: dict[str, Any]
    results: str
    report: str
    bundle: str  # the run that `blemish bundle champion` ships
    told: str  # by `learn`

    @property
    def cell(self) -> dict[str, Any]:
        found: dict[str, Any] = self.summary["cells"][0]
        return found


def state(root: Path, told: str = "") -> State:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    index = json.loads((root / "data" / "prepared" / CATEGORY / "index.json").read_text(encoding="utf-8"))
    place = root / "reports" / "tests"
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    blemish(root, "bundle", "champion", CATEGORY, "--output", "shipped.zip")
    with zipfile.ZipFile(root / "shipped.zip") as bundle:
        card = json.loads(bundle.read("card.json"))
    return State(
        run_id=summary["cells"][0]["run_id"],
        champion=str(client.get_model_version_by_alias(f"images-{CATEGORY}", "champion").run_id),
        splits={image["path"]: image["split"] for image in index["images"]},
        summary=summary,
        results=" ".join(blemish(root, "results").split()),
        report=(place / "report.md").read_text(encoding="utf-8"),
        bundle=card["detector"]["run_id"],
        told=told,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose training knows the light parts alone, while the test has dark ones, too."""
    code = ("anomaly_models", "pipelines", "pretrained", ".dvc", "cli.py", "dvc.yaml", ".dvcignore", ".gitignore")
    root = copy_project(tmp_path_factory.mktemp("project"), *code)
    values = tiny_params()
    values["data"]["categories"] = [CATEGORY]
    values["evaluate"]["bootstrap"] = 500
    write_params(root, values)
    folder = root / "images" / CATEGORY
    for number in range(16):
        draw(folder / f"train/good/{number:03}.png", LIGHT, None, number)
    for number in range(8):
        draw(folder / f"test/good/{number:03}.png", (LIGHT, DARK)[number % 2], None, 100 + number)
        for kind in ("square", "line"):
            draw(folder / f"test/{kind}/{number:03}.png", (LIGHT, DARK)[number % 2], kind, 200 + number)
    commit(root)
    return root


@pytest.fixture(scope="module")
def first(root: Path) -> State:
    made(root)
    return state(root)


@pytest.fixture(scope="module")
def better(root: Path, first: State) -> State:
    """Dark parts were rejected, and someone says that they are good; what else there is was a scratch."""
    dark = [draw(root / f"line/{number}.png", DARK, None, 1000 + number) for number in range(16)]
    scratched = [draw(root / f"line/scratched_{number}.png", DARK, "line", 1100 + number) for number in range(4)]
    feedback.append(root / "feedback.csv", scratched, "scratch", "Kim")
    told = judged(root, "feedback.csv", "good", dark)
    done = subprocess.run(["dvc", "repro"], cwd=root, env=SHELL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return state(root, told)


@pytest.fixture(scope="module")
def worse(root: Path, better: State) -> State:
    """Someone says that parts with a bright square are good."""
    squares = [draw(root / f"night/{n}.png", (LIGHT, DARK)[n % 2], "square", 2000 + n) for n in range(40)]
    told = judged(root, "night.csv", "good", squares)
    made(root)
    return state(root, told)


def test_without_verdicts_the_best_is_champion(first: State) -> None:
    assert first.champion == first.run_id == first.bundle
    assert first.summary["successions"] == {}
    assert "## Champion" not in first.report
    assert first.cell["metrics"]["false_alarms"] >= 0.5  # the dark ones


def test_a_better_challenger_takes_over(first: State, better: State) -> None:
    assert "part: 16 good parts and 4 defects (scratch 4) joined" in better.told
    assert "its test stays from now on as it is, 24 pictures" in better.told
    assert better.cell["metrics"]["false_alarms"] <= 0.25
    assert better.cell["metrics"]["recall"] == 1
    assert better.champion == better.run_id == better.bundle != first.champion
    assert f"Champion of part: fapm of run {better.run_id[:8]}, not found worse than" in better.results
    assert f"run {first.run_id[:8]}" in better.report


def test_what_was_tested_is_tested_still_and_nothing_else(first: State, better: State, worse: State) -> None:
    tested = {path for path, split in first.splits.items() if split == "test"}
    for later in (better, worse):
        assert {path for path, split in later.splits.items() if split == "test"} == tested
        assert {path: later.splits[path] for path in first.splits} == first.splits
    learnt = {path: split for path, split in better.splits.items() if path not in first.splits}
    assert {path.split("/")[1] for path, split in learnt.items() if split == "known"} == {"scratch"}
    assert {split for path, split in learnt.items() if "/good/" in path} == {"train", "holdout"}
    assert {path: worse.splits[path] for path in learnt} == learnt


def test_known_defects_say_what_is_rejected_without_a_look(first: State, better: State) -> None:
    assert first.cell["review"]["num_known_defects"] == 0
    assert better.cell["review"]["num_known_defects"] == 4


def test_a_worse_challenger_is_refused_and_the_parts_are_named(better: State, worse: State) -> None:
    assert worse.cell["defects"]["square"]["recall"] < 0.5
    assert worse.champion == better.champion == worse.bundle
    assert worse.champion != worse.run_id
    (trial,) = worse.summary["successions"][CATEGORY]["trials"]
    assert {found["defect"] for found in trial["worse"]} == {"square"}
    (recall,) = [found for found in trial["worse"] if found["figure"] == "recall"]
    assert len(recall["changed_sides"]) > 4
    assert set(recall["changed_sides"]) <= {f"test/square/{number:03}.png" for number in range(8)}
    for text in (worse.results, worse.report):
        assert f"fapm of run {worse.run_id[:8]} is refused: Defects found on square" in text
        assert all(path in text for path in recall["changed_sides"][:5])
    assert "blemish bundle champion part" in worse.results


def test_the_same_verdicts_again_change_nothing(root: Path, worse: State) -> None:
    before = {path: path.read_bytes() for path in (root / "images").rglob("*") if path.is_file()}
    assert "0 good parts and 0 defects joined, 0 corrected, 40 known already" in blemish(root, "learn", "night.csv")
    assert {path: path.read_bytes() for path in (root / "images").rglob("*") if path.is_file()} == before


def test_who_said_it_is_kept(root: Path, worse: State) -> None:
    said = feedback.read(root / "images" / CATEGORY / "learnt" / "feedback.csv")
    assert {verdict.who for verdict in said if verdict.verdict == "scratch"} == {"Kim"}
    assert {verdict.who for verdict in said if verdict.verdict == "good"} == {"Jo"}
    assert all(verdict.picture.is_file() for verdict in said)


def test_a_correction_brings_the_next_one_to_reign(root: Path, better: State, worse: State) -> None:
    squares = sorted((root / "night").glob("*.png"))
    assert "0 good parts and 0 defects joined, 40 corrected" in judged(root, "night.csv", "square", squares)
    made(root)
    after = state(root)
    assert after.champion == after.run_id != better.champion
    assert after.cell["metrics"]["recall"] == 1
