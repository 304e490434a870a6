"""A tiny project of one model with all that it needs, as verbs make it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conftest import CATEGORY, FAPM, draw_category, tiny_params, write_params
from made_up import distill_settings
from tiny_models import SETTINGS

TEACHER = "pretrained/efficient_ad/teacher/teacher.safetensors"
_BACKBONE = {"backbone": FAPM["backbone"]}  # of real weights, so that scores differ
MODELS: dict[str, dict[str, Any]] = {
    "adfa": SETTINGS["adfa"] | _BACKBONE | {"epochs": 3},
    "bgad": SETTINGS["bgad"] | _BACKBONE,
    "diffusion_ad": SETTINGS["diffusion_ad"] | {"steps": 4},
    "efficient_ad": SETTINGS["efficient_ad"] | {"batch_size": 1, "teacher": TEACHER, "steps": 6},
    "fapm": FAPM,
}
INPUTS: dict[str, dict[str, Any]] = {
    "efficient_ad": {
        "distill": {"efficient_ad": distill_settings(steps=6, batch_size=2)},
        "penalty": {"efficient_ad": {"image_size": 128, "limit": 5}},
    },
    "diffusion_ad": {"textures": {"diffusion_ad": {"image_size": 64, "limit": 5}}},
}


def lay_out(root: Path, model: str, changes: Mapping[str, Any] = MappingProxyType({})) -> list[tuple[str, ...]]:
    """Write the images and params.yaml; gives the verbs that make all of it, in DVC's order."""
    draw_category(root / "images" / CATEGORY)
    inputs = INPUTS.get(model, {})
    write_params(root, tiny_params() | inputs | {"models": {model: MODELS[model]}} | changes)
    verbs: list[tuple[str, ...]] = [("download", "demo_textures"), ("prepare", CATEGORY)]
    verbs += [(verb, model) for verb in inputs]
    verbs += [(verb, model, CATEGORY) for verb in ("train", "evaluate", "export", "latency")]
    return [*verbs, ("report",)]
