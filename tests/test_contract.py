"""What every model promises (`anomaly_models.base`), on tiny random networks: contracts do not need accuracy."""

import copy
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import safetensors.torch
import tiny_models
import torch
from drawn_batches import assert_agree, resume, same_state, take_steps
from tiny_models import STEPS, build, normals, predict, pretrain, random_images, training_batch
from torch import Tensor

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Prediction
from anomaly_models.common.backbones import Backbone


@dataclass(frozen=True)
class Trained:
    model: AnomalyModel
    optimised: frozenset[str]  # names of the parameters that the optimiser holds
    received: frozenset[str]  # names of those that got a gradient in some step
    before: dict[str, Tensor]  # parameters as the first step found them
    terms: list[dict[str, Tensor]]  # detached


@cache
def trained(name: str) -> Trained:
    model = build(name)
    pretrain(model)
    model.train()
    model.prepare(normals(name, seed=0))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    training = model.optimizer(STEPS)
    optimised, received, terms = set(), set(), []
    if training is not None:
        optimizer, _ = training
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        optimised = {key for key, value in model.named_parameters() if id(value) in held}
        for losses in take_steps(model, training, partial(training_batch, name), range(STEPS), STEPS):
            received |= {key for key, value in model.named_parameters() if value.grad is not None}
            terms.append({term: value.detach() for term, value in losses.items()})
    model.eval()
    model.calibrate(normals(name, seed=10))
    return Trained(model, frozenset(optimised), frozenset(received), before, terms)


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_prediction_has_one_finite_map_and_score_per_image(name: str) -> None:
    image = random_images(name, 3, seed=1)
    prediction = predict(trained(name).model, image)
    assert prediction.anomaly_map.shape == (3, 1, *image.shape[2:])
    assert prediction.score.shape == (3,)
    for value in prediction:
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    assert len(set(prediction.score.tolist())) == 3  # a constant would pass every other test


@each_model
def test_an_image_alone_scores_as_in_a_batch(name: str) -> None:
    model, image = trained(name).model, random_images(name, 3, seed=2)
    together = predict(model, image)
    for index in range(3):
        expected = Prediction(*(value[index : index + 1] for value in together))
        assert_agree(predict(model, image[index : index + 1]), expected, atol=1e-5)


@each_model
def test_a_resumed_run_ends_with_the_same_bits(name: str) -> None:
    killed = build(name)
    pretrain(killed)
    killed.prepare(normals(name, seed=0))
    if killed.optimizer(STEPS) is None:
        return  # gradient-free: there is no step to resume at
    resumed = build(name, seed=1)  # other random parts than those that are saved
    resume(killed, resumed, partial(training_batch, name), stop=1, total=STEPS)
    resumed.eval()
    resumed.calibrate(normals(name, seed=10))
    assert same_state(resumed, trained(name).model)


@each_model
def test_twice_gives_the_same(name: str) -> None:
    model, image = trained(name).model, random_images(name, 2, seed=3)
    assert_agree(predict(model, image), predict(model, image), atol=0)


@each_model
def test_state_dict_is_the_whole_model(name: str, tmp_path: Path) -> None:
    model, image = trained(name).model, random_images(name, 2, seed=4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = build(name, seed=1).eval()  # of other random weights than those that were trained
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_agree(predict(fresh, image), predict(model, image), atol=0)


class Watch:
    """Notes the files opened and the connections made while it is on. Audit hooks cannot be taken off again."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[object, ...]) -> None:
        if self.on and event in {"open", "socket.connect", "socket.getaddrinfo"}:
            self.seen.append(f"{event} {args[0]}")


@each_model
def test_building_touches_neither_disk_nor_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build(name)  # whatever libraries import on first use
    monkeypatch.delattr(safetensors.torch, "safe_open")  # it opens files without Python's noticing
    watch = Watch()
    watch.on = True
    build(name)
    watch.on = False
    assert watch.seen == []


@each_model
def test_every_setting_must_be_given(name: str) -> None:
    assert all(field.is_required() for field in MODELS[name].Config.model_fields.values())


@each_model
def test_what_requires_a_gradient_gets_one_and_the_rest_stays(name: str) -> None:
    result = trained(name)
    parameters = dict(result.model.named_parameters())
    assert {key for key, value in parameters.items() if value.requires_grad} == result.optimised == result.received
    frozen = parameters.keys() - result.optimised
    assert all(torch.equal(parameters[key], result.before[key]) for key in frozen)
    assert not any(torch.equal(parameters[key], result.before[key]) for key in result.optimised)


@each_model
def test_loss_terms_are_finite_scalars(name: str) -> None:
    for terms in trained(name).terms:
        assert terms
        assert all(value.shape == () and value.isfinite() for value in terms.values())


@each_model
def test_a_gradient_free_model_takes_no_steps(name: str) -> None:
    model = build(name)
    assert (model.optimizer(STEPS) is None) == (model.total_steps(num_normals=8) == 0)


@each_model
def test_train_mode_leaves_frozen_parts_alone(name: str) -> None:
    model = copy.deepcopy(trained(name).model)
    image = random_images(name, 2, seed=5)
    before = predict(model, image)
    frozen = [part for part in model.modules() if isinstance(part, Backbone)]
    maps = [part(image) for part in frozen]
    model.train()
    for part, expected in zip(frozen, maps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part(image), expected, strict=True))
    if not trained(name).optimised:
        assert_agree(predict(model, image), before, atol=0)
    model.eval()
    assert_agree(predict(model, image), before, atol=0)


@each_model
def test_the_exported_file_gives_the_same_at_any_batch_size(name: str, tmp_path: Path) -> None:
    model = trained(name).model
    detector = tiny_models.exported(model, tmp_path / "model.onnx")
    assert detector.card == replace(tiny_models.CARD, image_size=model.config.image_size)
    tiny_models.assert_file_agrees(detector, model, random_images(name, 4, seed=7))
