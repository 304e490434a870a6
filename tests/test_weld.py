"""What its own size is worth to a picture with small faults: the drawn weld seam, 2,000 x 300 pixels, faults of six."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_params, write_params
from test_pictures_of_any_shape import works

from pipelines.evaluation.outcomes import Evaluation
from pipelines.paths import Project
from pipelines.sources.demo_data import DemoConfig, draw_demo

PRESET = Path(__file__).parents[1] / "presets" / "folder.yaml"
OWN_SIZE = {"image_size": {"height": 304, "width": 2016}}
TILES = {"tiles": {"side": 304, "overlap": 48}}
FINE = {"layers": [1, 2]}  # 4 and 8 pixels per position


@pytest.mark.slow
def test_squeezed_it_is_ranked_by_chance_and_at_its_own_size_it_is_not(root: Path, blemish: Any) -> None:
    """In one piece and in tiles; with the fine layers in the square, too, whose pixels are too few."""
    config = DemoConfig(categories=["weld"], image_size=2000, train=28, test_good=12, test_defect=4, seed=300)
    draw_demo(root / "images", config, lambda _done, _total: None)
    section = yaml.safe_load(PRESET.read_text(encoding="utf-8"))["models"]["adfa"]
    section["backbone"] |= FINE
    values = tiny_params()
    values["data"]["categories"] = values["prepare"]["surfaces"] = ["weld"]
    found = []
    for changes in ({}, OWN_SIZE, OWN_SIZE | TILES):
        values["models"] = {"adfa": section | changes}
        write_params(root, values)
        works(blemish, ["prepare", "weld"], ["train", "adfa", "weld"], ["evaluate", "adfa", "weld"])
        found.append(
            Evaluation.load(Project(root).cell("adfa", "weld", 0).evaluation, "evaluate").metrics["image_auroc"]
        )
    squeezed, whole, tiled = found
    assert squeezed is not None
    assert whole is not None
    assert tiled is not None
    assert squeezed < 0.75
    assert min(whole, tiled) > 0.95
