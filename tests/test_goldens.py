"""What each model computed when it was last looked at: `tests/goldens.json`, held to 1e-4.

A refactoring that changes numbers, and the tests of these numbers with them, fails here. After a change that is meant
to, renew the file and say in the commit which models moved and why:

    pytest tests/test_goldens.py --renew-goldens

Images and weights come from numpy's RandomState, whose stream is frozen. What a training step draws comes from torch's
generator on the CPU; should a release of torch change that stream, the goldens of all models that draw change with it.
"""

import json
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_batches import take_steps
from tiny_models import STEPS, build, normals, predict, pretrain, random_images, training_batch
from torch import Tensor

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel

FILE = Path(__file__).with_name("goldens.json")
PLACES = 5  # on the diagonal of each map
# Adam's first steps go as far for a gradient of rounding errors, which a bias before a batch normalisation has, as for
# any other: at the suite's rates another processor would give other numbers.
SLOWER = {"diffusion_ad": {"learning_rate": 1e-5, "segmentation_learning_rate": 1e-5}}
TOLERANCE = 1e-4  # absolute up to 1, relative above


@torch.no_grad()
def fill(model: AnomalyModel) -> None:
    """Give all weights values that depend on their name and shape alone."""
    for name, value in model.state_dict().items():
        numbers = numbers_for(name.replace("averaged.", "networks."), tuple(value.shape))
        if name.endswith(".bias"):
            value.copy_(0.1 * numbers)
        elif name.endswith(".weight") and value.ndim == 1:  # of a normalisation
            value.copy_(1 + 0.1 * numbers)
        elif name.endswith(".weight"):
            value.copy_(numbers / value[0].numel() ** 0.5)
        elif name.endswith(".rotation"):
            value.copy_(torch.linalg.qr(numbers).Q)


def numbers_for(name: str, shape: tuple[int, ...]) -> Tensor:
    """Of mean 0 and variance 1, float64."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))


def outputs(name: str, image: Tensor) -> dict[str, list[float]]:
    """The losses of the suite's three steps; then ten numbers of the maps, and the scores, of two images."""
    model = build(name, **SLOWER.get(name, {}))
    fill(model)
    pretrain(model)
    model.train()
    model.prepare(normals(name, seed=0))
    training = model.optimizer(STEPS)
    batch_at = partial(training_batch, name)
    steps = take_steps(model, training, batch_at, range(STEPS), STEPS) if training is not None else ()
    losses = [torch.stack([term.detach() for term in terms.values()]).sum() for terms in steps]
    model.eval()
    model.calibrate(normals(name, seed=10))
    prediction = predict(model, image)
    diagonal = prediction.anomaly_map.diagonal(dim1=2, dim2=3)
    side = diagonal.shape[-1]
    chosen = diagonal[..., side // 6 :: side // 7][..., :PLACES].flatten()
    return {"losses": rounded(losses), "map": rounded(chosen), "score": rounded(prediction.score)}


def rounded(values: Iterable[Tensor]) -> list[float]:
    return [float(f"{float(value):.7g}") for value in values]


def renew(name: str, found: dict[str, list[float]]) -> None:
    goldens = {**(json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}), name: found}
    lines = [f'"{name}": {json.dumps(goldens[name])}' for name in MODELS if name in goldens]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_before(name: str, pytestconfig: pytest.Config) -> None:
    found = outputs(name, random_images(name, 2, seed=20))
    if pytestconfig.getoption("renew_goldens"):
        renew(name, found)
    golden = json.loads(FILE.read_text(encoding="utf-8")).get(name)
    assert golden is not None, f"no goldens for {name} yet: pytest tests/test_goldens.py --renew-goldens -k {name}"
    for part, values in golden.items():
        difference = np.abs(np.subtract(found[part], values)) / np.maximum(1, np.abs(values))
        assert difference.max(initial=0) <= TOLERANCE, part
