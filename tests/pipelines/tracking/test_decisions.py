"""The model that MLflow keeps, where MLflow is and Blemish is not: what scores lies in its bundle."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import pytest
from clone import REPOSITORY
from conftest import CATEGORY
from tiny_projects import lay_out

from pipelines.evaluation.outcomes import read_predictions
from pipelines.inference.detector import Detector
from pipelines.paths import Project
from pipelines.tracking.store import tracking_uri

# Blemish cannot be found, and something else has the name of its package, as a folder of many a project has.
ELSEWHERE = """
import json, sys, warnings
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if not Path(path, "pipelines", "inference").is_dir()] + ["."]
warnings.simplefilter("ignore")
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(sys.argv[2:]).to_dict("records")))
import pipelines
print(pipelines.__file__)
"""


@pytest.fixture
def logged(root: Path, blemish: Any) -> Path:
    """Its folder in the store."""
    for verb in lay_out(root, "fapm"):
        if verb[0] != "latency":
            assert blemish(*verb).code == 0
    (model,) = mlflow.MlflowClient(tracking_uri(root)).search_logged_models(["1"])
    return Path(urlparse(model.artifact_location).path)


def test_it_decides_where_nothing_of_blemish_is_installed(logged: Path, root: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    (away / "pipelines").mkdir(parents=True)
    (away / "pipelines" / "__init__.py").touch()
    picture = root / "images" / CATEGORY / "test" / "square" / "000.png"
    given = [sys.executable, "-c", ELSEWHERE, str(logged), str(picture), "nothing.png", "QUJD"]
    done = subprocess.run(given, cwd=away, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers, code = done.stdout.splitlines()
    first, *others = json.loads(answers)
    detector = Detector(Project(root).cell("fapm", CATEGORY, 0).onnx)
    assert first["score"] == pytest.approx(float(detector(detector.load(picture))[1][0]), abs=1e-4)
    assert (first["threshold"], first["error"]) == (detector.card.threshold, None)
    assert first["decision"] == detector.card.decision(first["score"])
    assert [answer["score"] for answer in others] == [answer["decision"] for answer in others] == [None, None]
    assert [answer["error"].partition(":")[0] for answer in others] == ["'nothing.png'", "picture"]
    assert Path(code).is_relative_to(logged / "artifacts" / f"fapm-{CATEGORY}.zip")


@pytest.mark.usefixtures("logged")
def test_the_lines_that_the_docs_show(root: Path) -> None:
    page = (REPOSITORY / "docs" / "at-the-line.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for number, name in enumerate(("a.png", "b.png")):
        shutil.copy(root / "images" / CATEGORY / "test" / "square" / f"00{number}.png", root / name)
    shown = f"{lines.replace('demo-gear', f'images-{CATEGORY}').strip()}\n".replace(
        "champion.predict", "_ = champion.predict"
    )
    told = f"import warnings; warnings.simplefilter('ignore')\n{shown}print(_.error.isna().all(), *_.decision)"
    done = subprocess.run([sys.executable, "-c", told], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scored = {
        image.path: image.decision for image in read_predictions(Project(root).cell("fapm", CATEGORY, 0).evaluated)
    }
    assert done.stdout.split() == ["True", *(scored[f"test/square/00{number}.png"] for number in (0, 1))]


def test_a_bundle_that_was_changed_is_not_loaded(logged: Path) -> None:
    path = logged / "artifacts" / f"fapm-{CATEGORY}.zip"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(logged), "a.png"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ExportError" in done.stderr.splitlines()[-1]
    assert "not as it was written" in done.stderr
