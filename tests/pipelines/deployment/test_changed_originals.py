"""A picture that was written anew after `prepare` is told as that, by every verb that reads originals again."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CATEGORY, draw_part, tiny_params, write_params

from anomaly_models.base import Prediction
from anomaly_models.common.sizes import Size
from pipelines.data.batches import PreparedData
from pipelines.deployment import latency as latency_module
from pipelines.deployment.export import export, measure_parity
from pipelines.deployment.latency import latency
from pipelines.errors import StageError
from pipelines.evaluation.evaluate import evaluate
from pipelines.pictures.frames import Frame
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.training.train import train

CPU = torch.device("cpu")
PICTURE, MASK = "test/square/001.png", "ground_truth/square/001_mask.png"
REMEDY = r"; put it back, or run `blemish prepare squares` again and all that follows \(`dvc repro`\)$"
CHANGED = r"not the file that was prepared, it has changed since \(SHA-256 [0-9a-f]{12}…, was [0-9a-f]{12}…\)" + REMEDY
GONE = "No such file or directory, and it was prepared" + REMEDY


def write_anew(path):
    image, mask = draw_part(np.random.default_rng(4242), square=True)
    (mask if path.stem.endswith("_mask") else image).save(path)


def remove(path):
    path.unlink()


def prepared(project, params):
    source = project.root / "images" / CATEGORY
    prepare(source, CATEGORY, params.prepare, params.views().frames, project.prepared(CATEGORY), lambda *_: None)
    return source


def test_the_graph_is_not_blamed(project, params, console):
    source = prepared(project, params)
    train("fapm", CATEGORY, params, project, CPU, console)
    evaluate("fapm", CATEGORY, params, project, CPU)
    shutil.copy(source / PICTURE, project.root / "kept.png")
    for happens, told in ((write_anew, CHANGED), (remove, GONE)):
        happens(source / PICTURE)
        with pytest.raises(StageError, match=f"^{re.escape(str(source / PICTURE))}: {told}"):
            export("fapm", CATEGORY, params, project)
        assert not project.cell("fapm", CATEGORY, 0).exported.exists()
    shutil.copy(project.root / "kept.png", source / PICTURE)  # put back: another date, the same file
    assert export("fapm", CATEGORY, params, project).decisions_changed == 0


@pytest.mark.parametrize(("happens", "told"), [(write_anew, CHANGED), (remove, GONE)])
def test_latency_is_not_measured_on_other_pictures(project, params, monkeypatch, happens, told):
    source = prepared(project, params)
    happens(source / PICTURE)
    monkeypatch.setattr(latency_module, "Detector", lambda *_args, **_kwargs: SimpleNamespace())
    with pytest.raises(StageError, match=f"^{re.escape(str(source / PICTURE))}: {told}"):
        latency("fapm", CATEGORY, params, project)


def _mean_colour(image, _region):
    return Prediction(image[:, :1], image.mean((1, 2, 3)))


def test_held_out_parts_too_where_there_is_nothing_to_test_on(project, params):
    source = project.root / "images" / CATEGORY
    for folder in ("test", "ground_truth"):
        shutil.rmtree(source / folder)
    prepared(project, params)
    data = PreparedData(project.prepared(CATEGORY), Frame(Size.square(64), "bilinear", "stretch"), CPU)
    path = source / data.index.images[data.rows("holdout")[0]].path
    write_anew(path)
    detector = SimpleNamespace(card=SimpleNamespace(threshold=1.0), load=lambda path: pytest.fail(f"reads {path}"))
    with pytest.raises(StageError, match=f"^{re.escape(str(path))}: {CHANGED}"):
        measure_parity(_mean_colour, detector, data, [], source, 0.01)


@pytest.mark.parametrize(("happens", "told"), [(write_anew, CHANGED), (remove, GONE)])
def test_a_mask_at_its_own_size(project, console, happens, told):
    values = tiny_params()
    values["evaluate"]["resolution"] = "native"
    write_params(project.root, values)
    params = load_checked(project.params)
    source = prepared(project, params)
    train("fapm", CATEGORY, params, project, CPU, console)
    happens(source / MASK)
    with pytest.raises(StageError, match=f"^{re.escape(str(source / MASK))}: {told}"):
        evaluate("fapm", CATEGORY, params, project, CPU)
