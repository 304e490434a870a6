"""One file, one answer: whichever door a picture comes through, its score and its decision are the same."""

import base64
import csv
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from at_the_line import play, post, running
from conftest import CATEGORY
from PIL import Image
from starlette.testclient import TestClient
from tiny_projects import MODELS, lay_out

from pipelines.evaluation.outcomes import read_predictions
from pipelines.inference.bundle import allowed
from pipelines.inference.detector import Detector
from pipelines.inference.proven import Proven
from pipelines.inference.watch import Pace, watch
from pipelines.paths import Project

MORE = 6  # pictures of other sizes and kinds than those that were trained on


def draw_more(folder: Path, like: Path) -> None:
    """Pictures as other cameras and programs save them: larger, long, grey, 16 bits, turned by EXIF, transparent."""
    folder.mkdir()
    part = Image.open(like).convert("RGB")
    part.resize((301, 203), Image.Resampling.BICUBIC).save(folder / "large.jpg", quality=90)
    part.resize((257, 33)).save(folder / "long.png")
    part.convert("L").save(folder / "grey.bmp")
    deep = np.asarray(part.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    part.save(folder / "turned.jpg", exif=exif, quality=90)
    part.putalpha(Image.linear_gradient("L").resize(part.size))
    part.save(folder / "transparent.webp", lossless=True)
    assert len(list(folder.iterdir())) == MORE


def scores_of(path: Path) -> dict[str, tuple[float, str]]:
    """Score and decision of each picture, by its folder and name."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows if row["error"]] == []
    return {"/".join(Path(row["path"]).parts[-2:]): (float(row["score"]), row["decision"]) for row in rows}


def by_mlflow(project: Path, pictures: list[Path]) -> list[dict[str, tuple[float, str]]]:
    """Of the champion, loaded and given paths; and behind MLflow's own server, given their bytes."""
    with warnings.catch_warnings(action="ignore"):  # of classes of its own
        import mlflow.pyfunc
        from mlflow.pyfunc import scoring_server

    with pytest.MonkeyPatch.context() as monkeypatch:  # `set_tracking_uri` would hold for all tests to come
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
        champion = mlflow.pyfunc.load_model(f"models:/images-{CATEGORY}@champion")
    loaded = champion.predict([str(path) for path in pictures]).to_dict("records")
    given = {"inputs": [base64.b64encode(path.read_bytes()).decode() for path in pictures]}
    with TestClient(scoring_server.init(champion)) as client:
        answer = client.post("/invocations", json=given)
    assert answer.status_code == 200, answer.text
    names = ["/".join(path.parts[-2:]) for path in pictures]
    return [
        {name: (row["score"], row["decision"]) for name, row in zip(names, rows, strict=True)}
        for rows in (loaded, answer.json()["predictions"])
    ]


def by_watch(project: Path, folders: list[Path]) -> dict[str, tuple[float, str]]:
    told: list[dict[str, Any]] = []
    pace = Pace(settle=0.0, patience=0.0, poll=0.01)
    for folder in folders:
        stop, bundle = threading.Event(), Proven(project / "part.zip")
        watch(folder, bundle, project / f"watched {folder.name}", [], told.append, stop, pace=pace, once=True)
    return {
        "/".join(Path("more", record["picture"]).parts[-2:]): (record["score"], record["decision"]) for record in told
    }


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_door_gives_the_same_answer(model: str, tmp_path: Path, blemish: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for verb in lay_out(tmp_path, model):
        if verb[0] != "latency":
            done = blemish(*verb)
            assert done.code == 0, done.err
    assert blemish("bundle", model, CATEGORY, "--output", "part.zip").code == 0
    test = tmp_path / "images" / CATEGORY / "test"
    draw_more(tmp_path / "more", test / "square" / "000.png")
    cell = Project(tmp_path).cell(model, CATEGORY, 0)
    assert blemish("predict", str(cell.onnx), str(test), "more").code == 0
    found = scores_of(tmp_path / "predictions" / "predictions.csv")
    assert len(found) == 8 + MORE

    threshold = Detector(cell.onnx).card.threshold
    others = {"evaluate": {image.path.removeprefix("test/"): image for image in read_predictions(cell.evaluated)}}
    seen = {name: (image.score, image.decision) for name, image in others["evaluate"].items() if name in found}
    assert len(seen) == 8
    done = play(tmp_path / "part.zip", "predict", str(test), "more", "--output", "alone")
    assert done.returncode == 0, done.stderr
    alone = scores_of(tmp_path / "alone" / "predictions.csv")
    served = {}
    with running(tmp_path / "part.zip") as address:
        for path in [*test.rglob("*.png"), *(tmp_path / "more").iterdir()]:
            answer = post(address, path.read_bytes()).json()
            served["/".join(path.parts[-2:])] = (answer["score"], answer["decision"])
    loaded, hosted = by_mlflow(tmp_path, [*test.rglob("*.png"), *(tmp_path / "more").iterdir()])
    watched = by_watch(tmp_path, [test, tmp_path / "more"])
    assert alone.keys() == served.keys() == loaded.keys() == hosted.keys() == watched.keys() == found.keys()
    for door in (seen, alone, served, loaded, hosted, watched):
        for name, (score, decision) in door.items():
            assert score == pytest.approx(found[name][0], abs=allowed(score, threshold), rel=0), name
            assert decision == found[name][1], name
