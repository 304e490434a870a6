"""The whole way on a folder of one's own, as one types it, offline: 12 good parts, 3 defects, no masks, two models."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from clone import commit, copy_project, environment
from isolated import isolated
from mlflow import MlflowClient
from PIL import Image

CATEGORY = "Gehäuse links"
WIDTH, HEIGHT = 500, 1260

# What is typed, in the project's folder; between `preset` and `check`, params.yaml is edited as `edited` says.
BEGIN = "blemish preset folder"
COMMANDS = """
blemish check
dvc repro
blemish report
blemish results
blemish predict "exported/fapm/Gehäuse links/model.onnx" "meine Bilder/neue Teile" -o "Ergebnisse für heute"
blemish predict "exported/efficient_ad/Gehäuse links/model.onnx" "meine Bilder/neue Teile" -o Ergebnisse
"""


def draw_housing(path: Path, seed: int, scratched: bool) -> None:
    """A bright housing before a dark background, WIDTH x HEIGHT pixels."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(60, 8, (HEIGHT, WIDTH, 3))
    pixels[120:1140, 60:440] = rng.normal(160, 8, (1020, 380, 3))
    if scratched:
        top = int(rng.integers(300, 800))
        pixels[top : top + 160, 180:320] = 20
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def edited(text: str) -> str:
    """The preset for this folder and two models, which train for seconds."""
    values = yaml.safe_load(text)
    values["data"] = {"root": "meine Bilder", "categories": [CATEGORY]}
    values["models"] = {name: values["models"][name] for name in ("fapm", "efficient_ad")}
    values["models"]["efficient_ad"] |= {"image_size": 128, "steps": 12}
    values["models"]["fapm"] |= {"image_size": 128, "crop": 128, "grid": 4}
    values["models"]["fapm"]["backbone"]["layers"] = [2, 3]  # the finest costs 16 times as much
    values["distill"]["efficient_ad"] |= {"steps": 12}
    values["download"]["demo_textures"] |= {"image_size": 128, "per_class": 1}
    values["evaluate"]["bootstrap"] = 50
    values["latency"]["seconds"] = 0.1
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


class Shell:
    """In a clone of the project, under git."""

    def __init__(self, root: Path) -> None:
        self.root = root
        programs = Path(sys.executable).parent
        self.environment = environment(programs, COLUMNS="200", PYTHONPATH=str(root), BLEMISH_DEVICE="cpu")

    def type(self, command: str) -> str:
        words = [*isolated(), "sh", "-c", command]
        done = subprocess.run(words, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    code = ("anomaly_models", "pipelines", "presets", "pretrained", ".dvc", "cli.py", "dvc.yaml", "params.yaml")
    root = copy_project(tmp_path / "Mein Projekt", *code, ".dvcignore", ".gitignore")
    parts = root / "meine Bilder" / CATEGORY
    for number in range(12):
        draw_housing(parts / "normal" / f"Prüfling {number + 1:02}.png", number, scratched=False)
    for number in range(3):
        draw_housing(parts / "abnormal" / f"Kratzer tief {number + 1}.png", 100 + number, scratched=True)
    for number in range(2):
        draw_housing(root / "meine Bilder" / "neue Teile" / f"größer {number}.png", 200 + number, scratched=number == 1)
    commit(root)
    return Shell(root)


def test_check_repro_report_predict(shell: Shell) -> None:
    shell.type(BEGIN)
    params = shell.root / "params.yaml"
    params.write_text(edited(params.read_text(encoding="utf-8")), encoding="utf-8")
    said = {command: shell.type(command) for command in COMMANDS.strip().splitlines()}
    check, repro, _, results, *predictions = said.values()
    assert "params.yaml: 2 models x 1 category, no problem" in check
    stages = {line.split("'")[1] for line in repro.splitlines() if line.startswith("Running stage")}
    cells = [f"{model}-{CATEGORY}" for model in ("fapm", "efficient_ad")]
    of_cells = {f"{verb}@{cell}" for verb in ("export", "latency") for cell in cells}
    of_cells |= {f"{verb}@{cell}-0" for verb in ("train", "evaluate") for cell in cells}
    made = {"check", "download@demo_textures", f"prepare@{CATEGORY}", "distill@efficient_ad", "textures@diffusion_ad"}
    assert stages == of_cells | made | {"report"}
    assert "3+3" in results  # 6 defects may be learnt from, by a model that is not there: all 3 are in the test

    for folder, output in zip(("Ergebnisse für heute", "Ergebnisse"), predictions, strict=True):
        assert "2 images scored" in output
        with (shell.root / folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [Path(row["path"]).name for row in rows] == ["größer 0.png", "größer 1.png"]
        assert float(rows[0]["score"]) < float(rows[1]["score"])
    summary = json.loads((shell.root / "reports" / "my_images" / "summary.json").read_text(encoding="utf-8"))
    assert [cell["model"] for cell in summary["cells"]] == ["fapm", "efficient_ad"]
    assert all(cell["metrics"]["image_auroc"] is not None for cell in summary["cells"])
    assert all(cell["metrics"].get("pixel_auroc") is None for cell in summary["cells"])  # no masks
    page = (shell.root / "reports" / "my_images" / "report.html").read_text(encoding="utf-8")
    assert CATEGORY in page
    assert "Kratzer tief 1.png" in page
    index = json.loads((shell.root / "data/prepared" / CATEGORY / "index.json").read_text(encoding="utf-8"))
    assert {(image["width"], image["height"]) for image in index["images"]} == {(WIDTH, HEIGHT)}
    client = MlflowClient(f"sqlite:///{shell.root / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert {*cells, "summary"} <= names
