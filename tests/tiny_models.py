"""The smallest settings that exercise each model, its images and batches, and its way to a file."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_batches import assert_agree, batch_of
from torch import Tensor

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Batch, Prediction
from anomaly_models.common.sizes import Size
from anomaly_models.efficient_ad import EfficientAD
from pipelines.deployment.export import write_graph
from pipelines.inference.detector import Detector, ModelCard
from pipelines.pictures.frames import Fit

SYNTHESIS: dict[str, Any] = {
    "probability": 0.5,
    "self_augmentation": 0.5,
    "blend_low": 0.2,
    "blend_high": 0.8,
    "perlin_threshold": 0.5,
    "perlin_max_exponent": 5,
}
# Maps of 1/4 and 1/8 of the side.
BACKBONE = {"name": "test_resnet", "weights": "package", "layers": [1, 2], "combine": "separate"}

SETTINGS: dict[str, dict[str, Any]] = {
    "adfa": {
        "image_size": 64,
        "resize": "bilinear",
        "fit": "stretch",
        "tiles": None,
        "batch_size": 4,
        "backbone": BACKBONE,
        "input_statistics": "backbone",
        "gamma_d": 2,
        "start": "random",
        "centres": {"name": "positions"},
        "objective": {"name": "soft_topk", "k": 3, "eps": 0.05, "normalize": "row", "candidates": 16, "sqrt": True},
        "kl_weight": True,
        "blur_sigma": 4.0,
        "image_score": "max",
        "epochs": 1,
        "least_variance": 0.1,
        "learning_rate": 1e-3,
        "weight_decay": 5e-4,
    },
    "bgad": {
        "image_size": 64,
        "resize": "bilinear",
        "fit": "stretch",
        "tiles": None,
        "batch_size": 4,
        "backbone": BACKBONE,
        "features": "whitened",
        "passes": {"name": "normals"},
        "anomalies_per_batch": 2,
        "pastes_per_batch": 2,
        "feathered": 0.5,
        "masks": {"name": "area", "abnormal": 0.5},
        "epochs": 3,
        "normal_epochs": 1,
        "warm_up_epochs": 1,
        "learning_rate": 1e-3,
        "vectors_per_step": 128,
        "steps_per_batch": [2, 1],
        "boundary": {"name": "ema", "momentum": 0.9},
        "beta": 0.05,
        "tau": 0.1,
        "normaliser": {"name": "quantile", "factor": 2.5},
        "focal": "clipped",
        "push_pull_weight": 1.0,
        "ceiling_quantile": 1.0,
    },
    "diffusion_ad": {
        "image_size": 64,
        "resize": "bilinear",
        "fit": "stretch",
        "tiles": None,
        "batch_size": 4,
        "unet": {
            "image_size": 64,
            "width": 8,
            "multipliers": [1, 2],
            "blocks": 1,
            "attention_sizes": [32],
            "heads": 4,
            "recomputed_levels": 1,
        },
        "segmentation_width": 4,
        "synthesis": SYNTHESIS,
        "steps": 3,  # layers that start as zero hold the gradient back, for two steps from those furthest in
        "learning_rate": 1e-3,
        "segmentation_learning_rate": 1e-3,
        "schedule": "cosine",
        "noise_scale": 1.0,
        "predicts": {"name": "noise"},
        "denoises": "normal",
        "timesteps": "random",
        "big_steps_end": 600,
        "reconstruction_weight": 0.1,
        "gradient_clip": 1.0,
        "ema_decay": 0.9,
        "precision": "float32",
        "small_step": 200,
        "big_step": 400,
        "top_pixels": 50,
    },
    "fapm": {
        "image_size": 64,
        "resize": "bilinear",
        "fit": "stretch",
        "tiles": None,
        "batch_size": 4,
        "backbone": BACKBONE,
        "crop": 64,
        "grid": 4,
        "held_images": 1000,
        "coreset_ratio": 0.1,
        "adaptive_ratio": 2,
        "far_rule": {"name": "mean"},
        "neighbours": 4,
        "coarse_layout": "geometric",
        "image_score": "released",
        "blur_sigma": 4.0,
    },
    "efficient_ad": {
        "image_size": 128,
        "resize": "bilinear",
        "fit": "stretch",
        "tiles": None,
        "batch_size": 4,
        "width": "tiny",
        "teacher": "never-read.safetensors",
        "steps": 3,
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "hard_quantile": 0.999,
        "penalty_weight": 1.0,
        "overall_weight": 0.5,
        "quantile_low": 0.9,
        "quantile_high": 0.995,
        "precision": "float32",
    },
}

BATCH_SIZE = 4
STEPS = 3
CARD = ModelCard(
    model="tiny",
    category="noise",
    image_size=Size(64, 64),
    resize="bilinear",
    fit="stretch",
    tiles=None,
    by_tile=False,
    scored_pixels=1,
    region=None,
    black_level=0,
    white_level=65535,
    above_white="refuse",
    page=None,
    dicom_window="file",
    max_megapixels=90,
    threshold=0.5,
    pixel_threshold=0.75,
    false_alarm_rate=0.1,
    reject_above=None,
    review_load=None,
    groups=None,
    run_id="none",
    data_sha256="none",
    weights=[],
    params={"seed": 0},
)


def pretrain(model: AnomalyModel) -> None:
    """Stand in for pretrained weights; a random Backbone needs nothing more."""
    if isinstance(model, EfficientAD):
        model.load_teacher(model.teacher.state_dict())


def settings_of(name: str) -> dict[str, Any]:
    if name not in SETTINGS:
        pytest.fail(f"{name} is in MODELS, but tiny_models.SETTINGS has no smallest settings for it")
    return SETTINGS[name]


def build(name: str, seed: int = 0, **changes: Any) -> AnomalyModel:
    torch.manual_seed(seed)
    model_class = MODELS[name]
    return model_class(model_class.Config.model_validate(settings_of(name) | changes))


def random_images(name: str, number: int, seed: int) -> Tensor:
    """Noise, from a stream that numpy has frozen: the goldens depend on it."""
    side = settings_of(name)["image_size"]
    pixels = np.random.RandomState(seed).random_sample((number, 3, side, side))
    return torch.from_numpy(pixels.astype(np.float32))


def normals(name: str, seed: int) -> list[Batch]:
    return [batch_of(random_images(name, BATCH_SIZE, seed + index)) for index in range(2)]


def training_batch(name: str, step: int) -> Batch:
    return batch_with_squares(partial(random_images, name, BATCH_SIZE), step)


def batch_with_squares(draw: Callable[[int], Tensor], step: int) -> Batch:
    """Half of the images have an anomalous square; `draw` makes `BATCH_SIZE` images of a seed."""
    image = draw(100 + step)
    mask, label = torch.zeros_like(image[:, :1]), torch.arange(BATCH_SIZE) % 2 == 1
    mask[label, :, 8:24, 8:24] = 1
    return Batch(
        image,
        mask,
        label,
        penalty=draw(200 + step),
        texture=draw(300 + step),
        row=torch.arange(BATCH_SIZE) + BATCH_SIZE * step,
    )


@torch.no_grad()
def predict(model: AnomalyModel, image: Tensor) -> Prediction:
    prediction: Prediction = model(image)
    return prediction


def exported(model: AnomalyModel, path: Path, fit: Fit = "stretch") -> Detector:
    """The model as `blemish export` ships it, at `path`, opened as `blemish predict` does."""
    write_graph(model, path, opset=18, card=replace(CARD, image_size=model.config.image_size, fit=fit))
    return Detector(path)


@torch.no_grad()
def assert_file_agrees(
    detector: Detector, model: AnomalyModel, image: Tensor, atol: float = 1e-4, region: Tensor | None = None
) -> None:
    """On one image and on four."""
    for number in (1, 4):
        some = None if region is None else region[:number]
        found = detector.graph(image[:number].numpy(), None if some is None else some.numpy())
        assert_agree(found, model(image[:number], some), atol)
