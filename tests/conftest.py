"""A small project to run the stages on: bright squares on grey noise, 64 pixels, ImageNet features."""

import copy
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from drawn_folders import draw_mvtec, draw_plain
from PIL import Image
from rich.console import Console
from tiny_models import SETTINGS
from torch import Tensor, nn

import cli
from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Batch, Config, Prediction, Progress
from anomaly_models.common.scoring import highest, within
from pipelines.paths import Project
from pipelines.preview.check import load_checked
from pipelines.settings.params import Params
from pipelines.tracking import store
from pipelines.tracking.database import begin
from pipelines.tracking.store import make

CATEGORY = "squares"
# Hundreds of processes are begun: without what CPython keeps of a compiled module, each would compile all of them anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-goldens", action="store_true", help="write tests/goldens.json anew (tests/test_goldens.py)"
    )
    parser.addoption("--torture", action="store_true", help="all of tests/torture, of which CI runs a part: hours")


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--torture"))


FAPM = SETTINGS["fapm"] | {
    "backbone": {"name": "tf_efficientnet_lite0", "weights": "package", "layers": [2, 3], "combine": "separate"},
    "grid": 2,
    "coreset_ratio": 0.25,
    "neighbours": 2,
    "image_score": "max",
    "blur_sigma": 2.0,
}


def tiny_params() -> dict[str, Any]:
    """The content of a valid params.yaml; a fresh copy each time."""
    return {
        "download": {"demo_textures": {"image_size": 64, "per_class": 1, "seed": 0}},
        "data": {"root": "images", "categories": [CATEGORY]},
        "prepare": {"layout": "auto", "black_level": 0, "white_level": 65535, "above_white": "refuse", "page": None}
        | {"dicom_window": "file"}
        | {"holdout": 0.25, "test_normal": 0.25, "anomalous_train": {"count": 0, "protocol": "spread"}}
        | {"regions": {}, "surfaces": [], "groups": None}
        | {"max_megapixels": 90, "seed": 0},
        "photos": "data/demo_textures",
        "texture_photos": "data/demo_textures",
        "distill": {},
        "penalty": {},
        "textures": {},
        "models": {"fapm": copy.deepcopy(FAPM)},
        "train": {"seeds": [0]},
        "evaluate": {"resolution": "prepared", "region": "image", "pixel_metrics": "exact", "false_alarm_rate": 0.2}
        | {"reject_rate": 0.1, "review_rate": 0.2}
        | {"bootstrap": 50, "learnt_defects": "tested_by_nobody"},
        "export": {"opset": 18, "max_difference": 0.01, "precisions": ["float32"], "max_decisions_changed": 0.05},
        "latency": {"threads": 1, "seconds": 0.05, "batch_size": 2},
        "tracking": {"experiment": "tests"},
    }


def write_params(root: Path, values: dict[str, Any]) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def draw_part(rng: np.random.Generator, square: bool) -> tuple[Image.Image, Image.Image]:
    """A grey part and its mask (80 x 64 pixels), with a bright square where asked."""
    pixels = rng.normal(110, 12, (64, 80, 3)).clip(0, 255)
    mask = np.zeros((64, 80), np.uint8)
    if square:
        top, left = rng.integers(8, 40), rng.integers(8, 56)
        pixels[top : top + 14, left : left + 14] = 240
        mask[top : top + 14, left : left + 14] = 255
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(mask)


def draw_category(folder: Path, train: int = 12, good: int = 4, defect: int = 4) -> None:
    """A category in MVTec AD's layout."""
    rng = np.random.default_rng(0)
    for split, defect_type, count in (("train", "good", train), ("test", "good", good), ("test", "square", defect)):
        for number in range(count):
            image, mask = draw_part(rng, defect_type == "square")
            path = folder / split / defect_type / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            if defect_type == "square":
                mask_path = folder / "ground_truth" / "square" / f"{number:03}_mask.png"
                mask_path.parent.mkdir(parents=True, exist_ok=True)
                mask.save(mask_path)


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    return draw_mvtec(tmp_path / "nut")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return draw_plain(tmp_path / "part")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with images and params.yaml, made the working directory."""
    draw_category(tmp_path / "images" / CATEGORY)
    write_params(tmp_path, tiny_params())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "make", lambda path: path.write_bytes(empty_store()))
    return tmp_path


@functools.cache
def empty_store() -> bytes:
    """An SQLite file as MLflow begins it, which takes it seconds."""
    with tempfile.TemporaryDirectory() as folder:
        begin(path := Path(folder) / "mlflow.db", make)
        return path.read_bytes()


@pytest.fixture
def project(root: Path) -> Project:
    return Project(root)


@pytest.fixture
def params(root: Path) -> Params:
    return load_checked(root / "params.yaml")


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


class Outcome:
    """What a verb printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def blemish(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a verb as the console script does, in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["blemish", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            if isinstance(leaving.code, str):  # what the interpreter does with sys.exit(message)
                print(leaving.code, file=sys.stderr)
            code = 1 if isinstance(leaving.code, str) else int(leaving.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


class MeanColourConfig(Config):
    steps: int
    learning_rate: float


class MeanColour(AnomalyModel):
    """A sixth model: learns the mean picture by gradient descent; the map is the distance to it."""

    Config = MeanColourConfig
    mean: Tensor

    def __init__(self, config: MeanColourConfig) -> None:
        super().__init__()
        self.config = config
        self.centre = nn.Parameter(torch.rand(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("scale", torch.ones(()))

    def prepare(self, normals: Any) -> None:
        self.mean = torch.cat([batch.image.mean((2, 3)) for batch in normals]).mean(0)

    def total_steps(self, num_normals: int) -> int:
        return self.config.steps

    def optimizer(self, total_steps: int) -> Any:
        optimizer = torch.optim.AdamW([self.centre], lr=self.config.learning_rate)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_steps)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[dict[str, Tensor]]:
        noise = torch.randn(3, generator=progress.generator, device=batch.image.device) * 0.1
        distance = (batch.image.mean((2, 3)) + noise - self.centre).square().mean()
        yield {"distance": distance, "monitor": distance.detach() * 0}

    @torch.no_grad()
    def calibrate(self, holdout: Any) -> None:
        self.scale = torch.cat([self.distances(batch.image).flatten() for batch in holdout]).max()

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        anomaly_map = self.distances(image) / self.scale
        return Prediction(within(anomaly_map, region), highest(anomaly_map, region))

    def distances(self, image: Tensor) -> Tensor:
        (found,) = self.once_per_image(self._distances, image)
        return found

    def _distances(self, image: Tensor) -> list[Tensor]:
        centre = (self.centre + self.mean) / 2
        return [(image - centre[None, :, None, None]).square().mean(1, keepdim=True)]


MEAN_COLOUR = {
    "image_size": 64,
    "resize": "bilinear",
    "fit": "stretch",
    "tiles": None,
    "batch_size": 3,
    "steps": 12,
    "learning_rate": 0.05,
}


@pytest.fixture
def sixth_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`mean_colour`, registered and in params.yaml."""
    monkeypatch.setitem(MODELS.data, "mean_colour", "conftest:MeanColour")
    values = tiny_params()
    values["models"] = {"mean_colour": MEAN_COLOUR}
    write_params(root, values)
    return "mean_colour"
