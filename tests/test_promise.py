"""The promised false-alarm rate, by simulation: held-out images and further good ones are drawn from one pool.

What precedes a model's scale is computed once per image of the pool; then each draw calibrates, scores and decides as
`train`, `evaluate` and `predict` do.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from drawn_batches import batch_of, parts, same_state, seeded
from tiny_models import build, normals, predict, pretrain
from torch import Tensor, nn

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Batch, ModelError
from anomaly_models.efficient_ad import RawMaps
from pipelines.evaluation.thresholds import NUM_FOLDS, cross_fit, refit, threshold_at

BEFORE_THE_SCALE = {"bgad": "log_likelihoods", "efficient_ad": "raw_maps"}  # the method that gives it
CERTAIN = 3.3  # standard errors
SLACK = 0.001  # of the rate

Estimate = tuple[float, float]  # with its standard error
Pool = tuple[AnomalyModel, Tensor]  # a model, and images of good parts for it, or what stands for them

each_model = pytest.mark.parametrize("name", MODELS)


@dataclass(frozen=True)
class Rates:
    """False-alarm rates over many draws."""

    promised: float
    fair: Estimate  # by a model that was calibrated on the whole pool
    deployed: Estimate  # by the highest score that the deployed model gives to the images that it was calibrated on
    cross_fitted: Estimate  # as `evaluate` sets the threshold

    def __str__(self) -> str:
        found = (self.fair, self.deployed, self.cross_fitted)
        return " | ".join([f"{100 * self.promised:5.2f}", *(f"{100 * rate:5.2f} ± {100 * e:.2f}" for rate, e in found)])


# ---- pools -------------------------------------------------------------------------------------------------------


def lit_parts(number: int, size: int) -> Tensor:
    """Parts under a light that is another one on each picture."""
    light = 0.98 + 0.04 * torch.rand(number, 1, 1, 1, generator=seeded(1))
    return (light * parts(number, seed=2, size=size)).clamp(0, 1)


def model_of(name: str) -> AnomalyModel:
    model = build(name)
    pretrain(model)
    model.prepare(normals(name, seed=0))
    return model.eval()


@cache
@torch.no_grad()
def drawn_pool(name: str, number: int) -> Pool:
    model, images = model_of(name), lit_parts(number, tiny_models.SETTINGS[name]["image_size"])
    method = BEFORE_THE_SCALE.get(name, "forward")
    if method == "forward" and type(model).calibrate is not AnomalyModel.calibrate:
        return model, images  # another model that calibrates: slower
    found = [getattr(model, method)(chunk) for chunk in images.split(8)]
    kind = type(found[0])
    outputs = [torch.cat(layer) for layer in zip(*found, strict=True)]
    return model, replayed(model, method, outputs, list if kind is list else kind._make)


@cache
def stand_in_pool(spread: float, shape: float, number: int) -> Pool:
    """EfficientAD with raw maps of random numbers.

    Each image is harder or easier by a log-normal factor of its own, for each map, and each cell by a gamma one.
    """
    numbers = torch.distributions.Gamma(shape, shape)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        cells = [numbers.sample((1, 1, 24, 24)) for _ in range(2)]
        factors = [(spread * torch.randn(number, 1, 1, 1)).exp() for _ in cells]
        maps = [each * of * numbers.sample((number, 1, 24, 24)) for each, of in zip(cells, factors, strict=True)]
    model = model_of("efficient_ad")
    return model, replayed(model, "raw_maps", maps, RawMaps._make)


def replayed(model: Any, method: str, outputs: list[Tensor], made_of: Callable[[list[Tensor]], Any]) -> Tensor:
    """Let `method` give the `outputs` (N, ...) of known images; gives what to pass as images, (N, 1, 1, 1)."""

    def look_up(places: Tensor) -> Any:
        return made_of([output[places.flatten().long()] for output in outputs])

    setattr(model, method, look_up)
    return torch.arange(len(outputs[0]), dtype=torch.float32).reshape(-1, 1, 1, 1)


# ---- the simulation ------------------------------------------------------------------------------------------------


def calibrated(model: AnomalyModel, images: Tensor) -> AnomalyModel:
    if type(model).calibrate is AnomalyModel.calibrate:
        return model
    model = copy.deepcopy(model)
    model.calibrate([batch_of(images)])
    return model


def by_others(model: AnomalyModel, images: Tensor) -> Tensor:
    """The score of each image by a model that it did not calibrate, as far as models calibrate."""

    def batches(places: Sequence[int]) -> list[Batch]:
        return [batch_of(images[list(places)])]

    scores = torch.full((len(images),), -torch.inf)
    for other, places in cross_fit(model, [None] * len(images), batches):
        scores[list(places)] = predict(other, images[list(places)]).score
    return scores


def simulated(pool: Pool, num_held_out: int, draws: int) -> Rates:
    """Of held-out sets whose highest score is the threshold.

    By the fair model, the expectation over all draws is what is promised. The others' rates differ from it little, so
    that the differences are what is simulated.
    """
    model, images = pool
    fair = predict(calibrated(model, images), images).score
    rate, generator = 1 / (num_held_out + 1), seeded(3)
    promised = threshold_at(fair[:num_held_out], rate).expected_rate
    rates = torch.zeros(draws, 3, dtype=torch.float64)
    for draw in rates:
        held_out, further = torch.randperm(len(images), generator=generator).tensor_split([num_held_out])
        deployed = calibrated(model, images[held_out])
        scores = predict(deployed, images).score
        own = scores[held_out]
        higher = torch.maximum(own, by_others(deployed, images[held_out]))
        for place, (known, new) in enumerate([(fair[held_out], fair), (own, scores), (higher, scores)]):
            draw[place] = (new[further] > threshold_at(known, rate).value).double().mean()
    rates[:, 1:] += promised - rates[:, :1]
    error, mean = torch.std_mean(rates, dim=0)
    return Rates(promised, *zip(mean.tolist(), (error / draws**0.5).tolist(), strict=True))


@each_model
def test_what_is_promised_is_kept(name: str) -> None:
    rates = simulated(drawn_pool(name, 30), num_held_out=8, draws=40)
    assert rates.promised == pytest.approx(1 / 9)
    assert abs(rates.fair[0] - rates.promised) <= CERTAIN * rates.fair[1]
    assert rates.cross_fitted[0] <= rates.promised + CERTAIN * rates.cross_fitted[1] + SLACK


def test_a_scale_from_the_same_images_alone_would_break_the_promise() -> None:
    rates = simulated(stand_in_pool(0.6, 2.0, 200), num_held_out=8, draws=60)
    assert rates.deployed[0] > rates.promised + CERTAIN * rates.deployed[1]
    assert rates.cross_fitted[0] <= rates.promised + CERTAIN * rates.cross_fitted[1]
    assert rates.cross_fitted[0] > rates.promised / 2  # the threshold is not simply out of reach


@pytest.mark.slow
def test_the_promise_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of docs/statistics.md; `pytest -s` shows it."""
    pools = {f"`{name}`": drawn_pool(name, 150) for name in MODELS}
    pools |= {
        f"`efficient_ad`, stand-in maps, spread {spread}, shape {shape:g}": stand_in_pool(spread, shape, 300)
        for spread, shape in ((0.3, 1.0), (0.6, 2.0), (1.0, 2.0))
    }
    rows = {(name, number): simulated(pool, number, draws=250) for name, pool in pools.items() for number in (8, 20)}
    with capsys.disabled():
        print("\n| Scores of | Held out | Promised | Fair scale | Same images | As deployed |")
        print("|---|---:|---:|---:|---:|---:|")
        for (name, number), rates in rows.items():
            print(f"| {name} | {number} | {rates} |")
    for place, rates in rows.items():
        assert abs(rates.fair[0] - rates.promised) <= CERTAIN * rates.fair[1], place
        assert rates.cross_fitted[0] <= rates.promised + CERTAIN * rates.cross_fitted[1] + SLACK, place


# ---- all good parts learnt from, each scored by a model of the other folds -----------------------------------------

AT_ONCE: dict[str, dict[str, Any]] = {"adfa": {"epochs": 0}, "fapm": {}}  # settings with which `prepare` is all
each_that_learns_at_once = pytest.mark.parametrize("name", AT_ONCE)


def started(name: str) -> AnomalyModel:
    model = build(name, **AT_ONCE[name])
    pretrain(model)
    return model


def batches_of(images: Tensor) -> Callable[[Sequence[int]], list[Batch]]:
    return lambda places: [batch_of(images[list(places)])]


def learnt(model: AnomalyModel, images: Tensor) -> AnomalyModel:
    model = copy.deepcopy(model)
    model.prepare([batch_of(images)])
    return model.eval()


@torch.no_grad()
def simulated_by_folds(pool: Pool, number: int, draws: int, rate: float) -> tuple[float, Estimate]:
    """The promised rate, and what happens to further parts by the model that learnt from all."""
    model, images = pool
    generator, promised = seeded(3), 0.0
    rates = torch.zeros(draws, dtype=torch.float64)
    for draw in range(draws):
        own, further = images[torch.randperm(len(images), generator=generator)].tensor_split([number])
        shipped = learnt(model, own)
        scores = torch.zeros(number)
        for other, places in refit(shipped, [place % NUM_FOLDS for place in range(number)], batches_of(own)):
            scores[list(places)] = predict(other, own[list(places)]).score
        threshold = threshold_at(scores, rate)
        promised = threshold.expected_rate
        rates[draw] = (predict(shipped, further).score > threshold.value).double().mean()
    error, mean = torch.std_mean(rates)
    return promised, (float(mean), float(error) / draws**0.5)


@each_that_learns_at_once
def test_folds_keep_what_they_promise(name: str) -> None:
    """From one side: the model that learnt from all scores good parts lower than those that set its threshold."""
    images = lit_parts(60, tiny_models.SETTINGS[name]["image_size"])
    promised, (happens, error) = simulated_by_folds((started(name), images), 12, draws=12, rate=0.2)
    assert promised == pytest.approx(2 / 13)
    assert happens <= promised + CERTAIN * error


@pytest.mark.slow
@each_that_learns_at_once
def test_the_promise_of_folds_in_full(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The second table of docs/statistics.md; `pytest -s` shows it."""
    pool = started(name), lit_parts(150, tiny_models.SETTINGS[name]["image_size"])
    for number in (20, 40):
        promised, (happens, error) = simulated_by_folds(pool, number, draws=100, rate=0.05)
        with capsys.disabled():
            print(f"\n| `{name}` | {number} | {100 * promised:.2f} | {100 * happens:.2f} ± {100 * error:.2f} |")
        assert happens <= promised + CERTAIN * error


@each_model
def test_who_learns_at_once(name: str) -> None:
    """Says so in its settings: folds need not ask for a training each, and no held-out part sets a scale."""
    for changes in ({}, AT_ONCE.get(name, {})):
        model = build(name, **changes)
        at_once = model.total_steps(20) == 0 and type(model).calibrate is AnomalyModel.calibrate
        assert model.config.learns_at_once == at_once
    assert at_once == (name in AT_ONCE)


@each_that_learns_at_once
def test_to_learn_anew_is_to_learn_afresh(name: str) -> None:
    """What a model knew before leaves no trace."""
    images = lit_parts(8, tiny_models.SETTINGS[name]["image_size"])
    model = learnt(started(name), images)
    before = copy.deepcopy(model)
    found = list(refit(model, [0, 1, 0, 1, 0, 1, 2, 2], batches_of(images)))
    assert same_state(model, before)
    assert [list(places) for _, places in found] == [[0, 2, 4], [1, 3, 5], [6, 7]]
    assert same_state(found[0][0], learnt(started(name), images[[1, 3, 5, 6, 7]]))
    assert not same_state(found[0][0], found[1][0])


# ---- what it leaves alone ------------------------------------------------------------------------------------------


@each_model
def test_cross_fitting_leaves_the_model_alone_and_sees_each_image_once(name: str) -> None:
    model = model_of(name)
    images = lit_parts(7, tiny_models.SETTINGS[name]["image_size"])
    model.calibrate([batch_of(images)])
    before = copy.deepcopy(model)
    folds = list(cross_fit(model, [None] * 7, lambda places: [batch_of(images[list(places)])]))
    assert same_state(model, before)
    if type(model).calibrate is AnomalyModel.calibrate:
        assert folds == []
        return
    assert len(folds) == NUM_FOLDS
    assert sorted(place for _, places in folds for place in places) == list(range(7))
    for other, places in folds:
        expected = calibrated(model, images[[place for place in range(7) if place not in places]])
        assert same_state(other, expected)
    assert not all(same_state(other, before) for other, _ in folds)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].calibrate is not AnomalyModel.calibrate])
def test_an_image_passes_the_networks_once_while_its_model_remembers(name: str) -> None:
    model = model_of(name)
    images = lit_parts(7, tiny_models.SETTINGS[name]["image_size"])
    model.calibrate([batch_of(images)])
    expected = predict(model, images).score, by_others(model, images)
    passed = []  # through the first layer, how many images at a time
    layer = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    layer.register_forward_hook(lambda _layer, inputs, _output: passed.append(len(inputs[0])))
    with model.remembering():
        found = predict(model, images).score, by_others(model, images)
        assert passed == [1] * 7
    torch.testing.assert_close(found, expected)
    predict(model, images)
    assert passed == [1] * 7 + [7]


def test_too_few_images_to_leave_any_out() -> None:
    model = model_of("efficient_ad")
    images = lit_parts(3, 128)
    assert len(list(cross_fit(model, [None] * 3, lambda places: [batch_of(images[list(places)])]))) == 3
    with pytest.raises(ModelError, match="2 held-out images: 1 are too few to calibrate on"):
        list(cross_fit(model, [None] * 2, lambda places: [batch_of(images[list(places)])]))
    assert list(cross_fit(model, [], lambda _: [])) == []
