"""The smallest settings that exercise each model, and a session of ONNX Runtime on its graph."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

SYNTHESIS: dict[str, Any] = {
    "probability": 0.5,
    "self_augmentation": 0.5,
    "blend_low": 0.2,
    "blend_high": 0.8,
    "perlin_threshold": 0.5,
    "perlin_max_exponent": 5,
}
BACKBONE = {"name": "test_resnet", "weights": "embedded", "layers": [1, 2]}  # maps of 1/4 and 1/8 of the side

SETTINGS: dict[str, dict[str, Any]] = {
    "adfa": {
        "image_size": 64,
        "batch_size": 4,
        "backbone": BACKBONE,
        "gamma_d": 2,
        "objective": {
            "name": "soft_topk",
            "k": 3,
            "eps": 0.05,
            "normalize": "row",
            "candidates": 16,
            "sqrt": True,
        },
        "kl_weight": True,
        "blur_sigma": 4.0,
        "image_score": "max",
        "epochs": 1,
        "learning_rate": 1e-3,
        "weight_decay": 5e-4,
    },
    "bgad": {
        "image_size": 64,
        "batch_size": 4,
        "backbone": BACKBONE,
        "features": "whitened",
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
        "normaliser": 10.0,
        "focal": "clipped",
        "push_pull_weight": 1.0,
        "ceiling_quantile": 1.0,
    },
    "diffusion_ad": {
        "image_size": 64,
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
        "batch_size": 4,
        "backbone": BACKBONE,
        "crop": 64,
        "grid": 4,
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
        "batch_size": 4,
        "width": "tiny",
        "teacher": "never-read.safetensors",
        "steps": 3,
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "hard_quantile": 0.999,
        "penalty_weight": 1.0,
        "quantile_low": 0.9,
        "quantile_high": 0.995,
        "precision": "float32",
    },
}


def onnx_session(model: nn.Module, image_size: int, path: Path) -> onnxruntime.InferenceSession:
    """Export a model whose images have that side to `path`, for any number of them at once."""
    torch.onnx.export(
        model,
        (torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)),),
        path,
        input_names=["image"],
        output_names=["anomaly_map", "score"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        opset_version=18,
        external_data=False,
        verbose=False,
    )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
