"""What a cell would take is told without training it."""

import re

import pytest
from conftest import CATEGORY, FAPM, tiny_params, write_params
from tiny_models import SETTINGS

EFFICIENT_AD = SETTINGS["efficient_ad"] | {"image_size": 256, "batch_size": 2, "width": "small", "steps": 9}


@pytest.fixture
def told(root, blemish):
    """What `train --dry-run` prints for a model, by the first word of each line."""
    values = tiny_params()
    values["models"]["efficient_ad"] = EFFICIENT_AD
    write_params(root, values)
    blemish("prepare", CATEGORY)

    def tell(model):
        outcome = blemish("train", "--dry-run", model, CATEGORY)
        assert outcome.code == 0, outcome.err
        assert not (root / "models").exists()
        assert not (root / "mlflow.db").exists()
        title, *lines = outcome.out.splitlines()
        return title, {line.split()[0]: " ".join(line.split()[1:]) for line in lines}

    return tell


def test_a_trained_model(told):
    """Parameters and FLOPs as in the paper's appendix: 8 million and 76 G."""
    title, lines = told("efficient_ad")
    assert title == f"efficient_ad on {CATEGORY}, 256 pixels"
    assert lines["parameters"] == "8,057,856, of which 5,363,712 are trained"
    assert lines["FLOPs"] == "75.89 G per image, forward, 2 per multiply-add"
    megabytes = (4 * 8_057_856 + 12 * 5_363_712) / 1e6  # weights; gradients and two moments
    assert lines["memory"].startswith(f"{megabytes:.0f} MB for weights, gradients and optimiser")
    assert lines["steps"] == "9 of 2 (2.0 epochs of 9 normal images)"
    assert lines["time"].startswith("unknown: teacher never-read.safetensors: no such file; run `blemish distill eff")


def test_a_gradient_free_model(told):
    _, lines = told("fapm")
    assert lines["parameters"] == "700,768, of which 0 are trained"
    assert lines["FLOPs"].endswith("the backbone alone, what it is compared with depends on the images")
    assert lines["memory"] == "3 MB for weights, gradients and optimiser; 0 MB for a batch's activations"
    assert lines["steps"] == "none: one pass over 9 normal images"
    assert re.fullmatch(
        r"about \d+ s on this machine, were nothing else running: \d+ s for passes over the images, 0 s for steps",
        lines["time"],
    )


def test_a_transformer_is_measured_on_what_it_sees(root, told):
    """9 patches and the class token, in the centre of an image of 64 pixels that patches of 16 do not lie evenly in."""
    backbone = FAPM["backbone"] | {"name": "test_vit", "layers": [0]}
    values = tiny_params()
    values["models"]["fapm"] |= {"crop": 48, "grid": 1, "backbone": backbone}
    write_params(root, values)
    _, lines = told("fapm")
    width, hidden, tokens = 64, 3 * 64, 10
    patches = 9 * 3 * 16 * 16 * width
    attention = tokens * (4 * width * width + 2 * tokens * width)
    perceptron = tokens * 2 * width * hidden
    assert lines["FLOPs"].startswith(f"{2 * (patches + attention + perceptron) / 1e9:.2f} G per image")


def test_a_category_that_is_not_prepared(root, blemish):
    assert blemish("train", "--dry-run", "fapm", CATEGORY).err == (
        f"error: data/prepared/{CATEGORY}: no prepared images; run `blemish prepare {CATEGORY}`\n"
    )
