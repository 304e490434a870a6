"""EfficientAD against the numbers of its paper, and against formulas worked by hand."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from drawn_batches import batch_of, num_parameters, parts, patterns, rates_of, same_state, seeded, take_steps
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR
from torchvision.transforms.v2 import functional as torchvision_functional

from anomaly_models import efficient_ad
from anomaly_models.base import Batch, ModelError, Progress
from anomaly_models.common.sizes import Size
from anomaly_models.efficient_ad import EfficientAD, EfficientADConfig, Width, patch_description_network

SIZE = 128
CELLS = SIZE // 4 - 8
textures = partial(patterns, size=SIZE)
SETTINGS = tiny_models.SETTINGS["efficient_ad"] | {"batch_size": 1, "steps": 20}


def settings(**changes: object) -> EfficientADConfig:
    return EfficientADConfig.model_validate({**SETTINGS, **changes})


def batch_with_penalty(number: int = 1) -> Batch:
    return batch_of(textures(number, seed=6), penalty=textures(number, seed=7))


def step_at(step: int) -> Progress:
    return Progress(step, 20, seeded(step))


def with_teacher(config: EfficientADConfig) -> EfficientAD:
    torch.manual_seed(0)
    model = EfficientAD(config)
    model.load_teacher(patch_description_network(config.width).state_dict())
    return model


@pytest.fixture
def untrained() -> EfficientAD:
    return with_teacher(settings())


@pytest.fixture
def prepared(untrained: EfficientAD) -> EfficientAD:
    untrained.prepare([batch_of(textures(3, seed=1)), batch_of(textures(2, seed=2))])
    return untrained


@pytest.fixture
def calibrated(prepared: EfficientAD) -> EfficientAD:
    prepared.calibrate([batch_of(textures(3, seed=3)), batch_of(textures(1, seed=4))])
    return prepared.eval()


# --- networks


@pytest.mark.parametrize(
    ("width", "teacher", "student", "total"),
    [("small", 2_694_144, 4_267_392, 8_057_856), ("medium", 8_026_624, 11_615_488, 20_738_432)],
)
def test_parameters_as_in_the_paper(width: Width, teacher: int, student: int, total: int) -> None:
    with torch.device("meta"):
        model = EfficientAD(settings(width=width, image_size=256))
    assert num_parameters(model.teacher) == teacher
    assert num_parameters(model.student) == student
    assert model.autoencoder is not None
    assert num_parameters(model.autoencoder) == 1_096_320
    assert num_parameters(model) == total


@pytest.mark.parametrize("width", ["tiny", "small", "medium"])
def test_maps_at_256_pixels(width: Width) -> None:
    channels = efficient_ad.CHANNELS[width]
    with torch.device("meta"):  # shapes without the arithmetic
        image = torch.rand(1, 3, 256, 256)
        assert patch_description_network(width)(image).shape == (1, channels, 56, 56)
        assert patch_description_network(width, padded=True)(image).shape == (1, channels, 64, 64)
        for heads in (1, 2):
            student = efficient_ad.Student(width, imitates_autoencoder=heads == 2)
            assert [head.shape for head in student(image)] == [(1, channels, 56, 56)] * heads


@pytest.mark.parametrize(
    ("width", "padded", "expected"),
    [
        ("small", False, [253, 126, 123, 61, 59, 56]),
        ("small", True, [259, 130, 133, 67, 67, 64]),
        ("medium", False, [253, 126, 123, 61, 61, 59, 56, 56]),
        ("medium", True, [259, 130, 133, 67, 67, 67, 64, 64]),
    ],
)
def test_layers_of_tables_6_and_7(width: Width, padded: bool, expected: list[int]) -> None:
    sides: list[int] = []
    with torch.device("meta"):
        network = patch_description_network(width, padded=padded)
        for name, layer in network.named_children():
            if not name.startswith("relu"):
                layer.register_forward_hook(lambda _module, _inputs, output: sides.append(output.shape[-1]))
        network(torch.rand(1, 3, 256, 256))
    assert sides == expected


@pytest.mark.parametrize("size", [128, 160, 256, 512])
def test_autoencoder_has_64_numbers_at_any_size(size: int) -> None:
    autoencoder = efficient_ad.Autoencoder(Size.square(size), channels=16)
    image = torch.rand(1, 3, size, size)
    assert autoencoder.encoder(image).shape == (1, 64, 1, 1)
    assert autoencoder(image).shape == (1, 16, size // 4 - 8, size // 4 - 8)


def test_autoencoder_sizes_of_table_8() -> None:
    autoencoder = efficient_ad.Autoencoder(Size.square(256), channels=16)
    shapes: list[int] = []
    for convolution in autoencoder.blocks:
        convolution.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[-1]))
    encoded: list[int] = []
    for convolution in autoencoder.encoder[::2]:
        convolution.register_forward_hook(lambda _module, _inputs, output: encoded.append(output.shape[-1]))
    autoencoder(torch.rand(1, 3, 256, 256))
    assert encoded == [128, 64, 32, 16, 8, 1]
    assert autoencoder.sizes == tuple(map(Size.square, (3, 8, 15, 32, 63, 127)))
    assert shapes == [4, 9, 16, 33, 64, 128]


@pytest.mark.parametrize("width", ["tiny", "small", "medium"])
def test_patch_of_33_pixels_is_one_description(width: Width) -> None:
    assert patch_description_network(width)(torch.rand(1, 3, 33, 33)).shape[2:] == (1, 1)


@pytest.mark.parametrize("width", ["tiny", "medium"])
def test_receptive_field(width: Width) -> None:
    torch.manual_seed(0)
    network = patch_description_network(width)
    image = torch.rand(1, 3, 80, 120, requires_grad=True)
    network(image)[0, :, 10, 20].sum().backward()
    assert image.grad is not None
    seen = image.grad.abs().sum(dim=(0, 1)) > 0
    expected = torch.zeros_like(seen)
    expected[40:73, 80:113] = True
    assert torch.equal(seen, expected)


def test_padded_description_is_the_unpadded_one_inside() -> None:
    padded = patch_description_network("tiny", padded=True).double()
    unpadded = patch_description_network("tiny").double()
    unpadded.load_state_dict(padded.state_dict())
    image = torch.rand(1, 3, 96, 96, dtype=torch.float64)
    torch.testing.assert_close(padded(image)[:, :, 4:-4, 4:-4], unpadded(image), rtol=0, atol=1e-14)
    assert (padded(image)[:, :, 3:-5, 3:-5] - unpadded(image)).abs().max() > 1e-3


def test_shift_by_four_pixels_is_a_shift_by_one_cell() -> None:
    network = patch_description_network("tiny").double()
    image = torch.rand(1, 3, 100, 100, dtype=torch.float64)
    torch.testing.assert_close(network(image[:, :, 4:, 4:]), network(image)[:, :, 1:, 1:], rtol=0, atol=1e-14)


def test_pixel_outside_the_window_leaves_the_local_map_alone(calibrated: EfficientAD) -> None:
    image = textures(1, seed=5)
    changed = image.clone()
    changed[:, :, 90:94, 100:103] = 1 - changed[:, :, 90:94, 100:103]
    difference = (calibrated.raw_maps(image).local != calibrated.raw_maps(changed).local)[0, 0]
    rows, columns = difference.nonzero().unbind(dim=1)
    assert difference.any()
    # Cell i sees pixels 4i to 4i + 32.
    assert rows.min() * 4 + 32 >= 90
    assert rows.max() * 4 <= 93
    assert columns.min() * 4 + 32 >= 100
    assert columns.max() * 4 <= 102
    overall, of_changed = calibrated.raw_maps(image).overall, calibrated.raw_maps(changed).overall
    assert overall is not None
    assert of_changed is not None
    assert (overall != of_changed)[0, 0].sum() > difference.sum()


# --- losses


@pytest.mark.parametrize(("num_elements", "expected"), [(384 * 56 * 56, 1_205), (384 * 64 * 64, 1_573), (1, 1)])
def test_number_of_hard_elements(num_elements: int, expected: int) -> None:
    assert efficient_ad.num_hard(num_elements, 0.999) == expected


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_hard_feature_loss_equals_the_quantile_form(quantile: float) -> None:
    target, output = torch.randn(2, 1, 10, 21, 31, generator=seeded(0)).double()
    difference = (target - output).square().flatten()
    expected = difference[difference >= difference.quantile(quantile)].mean()
    torch.testing.assert_close(efficient_ad.hard_feature_loss(target, output, quantile), expected)


def test_hard_feature_loss_grows_from_the_mean_squared_error() -> None:
    target, output = torch.randn(2, 3, 8, 9, 9, generator=seeded(0))
    losses = [efficient_ad.hard_feature_loss(target, output, quantile) for quantile in (0.0, 0.5, 0.9, 0.99, 1.0)]
    torch.testing.assert_close(losses[0], F.mse_loss(output, target))
    assert losses == sorted(losses)


def test_hard_features_are_mined_per_image() -> None:
    target, output = torch.randn(2, 3, 8, 9, 9, generator=seeded(0))
    output[0] *= 100  # would win every place if mined over the batch
    alone = [efficient_ad.hard_feature_loss(target[i : i + 1], output[i : i + 1], 0.99) for i in range(3)]
    torch.testing.assert_close(efficient_ad.hard_feature_loss(target, output, 0.99), torch.stack(alone).mean())


@torch.no_grad()
def test_student_with_the_teachers_weights_has_nothing_to_learn(prepared: EfficientAD) -> None:
    teacher = prepared.exportable().teacher
    prepared.student.trunk.load_state_dict(teacher[:-1].state_dict())
    prepared.student.teacher_head.load_state_dict(teacher[-1].state_dict())
    batch = batch_with_penalty()
    assert next(prepared.losses(batch, step_at(0)))["hard_feature"] < 1e-8
    assert prepared.raw_maps(batch.image).local.max() < 1e-8


@torch.no_grad()
def test_losses_before_the_first_step(prepared: EfficientAD) -> None:
    """A student that says nothing errs by the teacher's variance, 1 per channel; the hardest differences are larger."""
    images = torch.cat([textures(3, seed=1), textures(2, seed=2)])  # the normal images
    terms = next(prepared.losses(Batch(images, images[:, :1], torch.zeros(5), penalty=images), step_at(0)))
    assert 0.7 < terms["autoencoder"] < 1.5
    assert terms["hard_feature"] > 5
    for parameter in prepared.student.teacher_head.parameters():
        parameter.zero_()
    assert prepared.raw_maps(images).local.mean().item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_images_stacked_are_described_as_one_by_one(prepared: EfficientAD) -> None:
    student, images = prepared.student.double().train(), textures(3, seed=5).double()
    alone = [torch.cat(halves) for halves in zip(*(student(image.unsqueeze(0)) for image in images), strict=True)]
    for found, expected in zip(student(images), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def losses_of_one_pass(model: EfficientAD, batch: Batch, progress: Progress) -> dict[str, Tensor]:
    """Algorithm 1 literally: the whole student on each image, halves of its output taken afterwards."""
    generator = progress.generator
    assert batch.penalty is not None
    assert model.autoencoder is not None
    mean, std = model.channel_mean, model.channel_std
    clean = model.normalise(batch.image)
    penalty = model.normalise(efficient_ad.randomly_grey(batch.penalty, generator))
    jittered = model.normalise(efficient_ad.jitter(batch.image, generator))
    reconstruction = model.autoencoder(jittered, generator)
    difference = ((model.teacher(clean) - mean) / std - model.student(clean)[0]).square()
    return {
        "hard_feature": difference[difference >= difference.flatten().quantile(0.999)].mean(),
        "penalty": model.student(penalty)[0].square().mean(),
        "autoencoder": ((model.teacher(jittered) - mean) / std - reconstruction).square().mean(),
        "student_autoencoder": (reconstruction - model.student(jittered)[1]).square().mean(),
    }


def test_losses_are_those_of_algorithm_1(prepared: EfficientAD) -> None:
    batch = batch_with_penalty()
    terms = list(prepared.losses(batch, step_at(0)))
    expected = losses_of_one_pass(prepared, batch, step_at(0))
    assert len(terms) == 1
    torch.testing.assert_close(terms[0], expected)


def test_gradients_reach_what_the_paper_says(prepared: EfficientAD) -> None:
    batch = batch_with_penalty()
    student, autoencoder = prepared.student, prepared.autoencoder
    assert student.autoencoder_head is not None
    assert autoencoder is not None
    parts = {
        "trunk": student.trunk[0].weight,
        "teacher_head": student.teacher_head.weight,
        "autoencoder_head": student.autoencoder_head.weight,
        "autoencoder": autoencoder.encoder[0].weight,
    }
    reached = {}
    terms = next(prepared.losses(batch, step_at(0)))
    for name, loss in terms.items():
        gradients = torch.autograd.grad(loss, list(parts.values()), retain_graph=True, allow_unused=True)
        moved = zip(parts, gradients, strict=True)
        reached[name] = {part for part, gradient in moved if gradient is not None and gradient.abs().max() > 0}
    assert reached == {
        "hard_feature": {"trunk", "teacher_head"},
        "penalty": {"trunk", "teacher_head"},
        "autoencoder": {"autoencoder"},
        "student_autoencoder": {"trunk", "autoencoder_head", "autoencoder"},
    }
    sum(terms.values(), torch.zeros(())).backward()
    assert all(parameter.grad is None for parameter in prepared.teacher.parameters())


def test_losses_are_a_function_of_the_step(prepared: EfficientAD) -> None:
    batch = batch_with_penalty(2)
    first = next(prepared.losses(batch, step_at(3)))
    torch.manual_seed(99)
    again, other = (next(prepared.losses(batch, step_at(step))) for step in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["autoencoder"] != other["autoencoder"]
    assert torch.equal(first["hard_feature"], other["hard_feature"])  # the clean image


def test_penalty_of_weight_zero_needs_no_images() -> None:
    model = with_teacher(settings(penalty_weight=0.0))
    assert "penalty" not in next(model.losses(batch_of(textures(1, seed=6)), step_at(0)))


def test_bf16_is_close_and_leaves_losses_in_float32(prepared: EfficientAD) -> None:
    batch = batch_with_penalty()
    exact = next(prepared.losses(batch, step_at(0)))
    prepared.config = settings(precision="bf16")
    rough = next(prepared.losses(batch, step_at(0)))
    for name, loss in rough.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)
        assert loss.item() != exact[name].item()


def test_rate_drops_at_95_percent_of_the_steps(untrained: EfficientAD) -> None:
    rates = rates_of(untrained.optimizer(total_steps=20), 20)
    assert [rate for (rate,) in rates] == pytest.approx([1e-4] * 19 + [1e-5])
    _, schedule = untrained.optimizer(total_steps=70_000)
    assert isinstance(schedule, MultiStepLR)
    assert dict(schedule.milestones) == {66_500: 1}


# --- images


@pytest.mark.parametrize("seed", range(6))
def test_jitter_is_one_of_torchvisions(seed: int) -> None:
    image = textures(3, seed=1)
    choices = torch.randint(3, (3,), generator=(generator := seeded(seed)))
    factors = 0.8 + 0.4 * torch.rand(3, generator=generator)
    functions: list[Callable[[Tensor, float], Tensor]] = [
        torchvision_functional.adjust_brightness,
        torchvision_functional.adjust_contrast,
        torchvision_functional.adjust_saturation,
    ]
    expected = [functions[c](x, f.item()) for x, c, f in zip(image, choices, factors, strict=True)]
    torch.testing.assert_close(efficient_ad.jitter(image, seeded(seed)), torch.stack(expected), rtol=0, atol=1e-6)


def test_jitter_changes_every_image_differently_and_stays_in_range() -> None:
    image = textures(1, seed=1).expand(32, -1, -1, -1)
    jittered = efficient_ad.jitter(image, seeded(0))
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    assert len(jittered.flatten(1).unique(dim=0)) == 32


def test_three_in_ten_penalty_images_are_grey() -> None:
    image = torch.rand(2000, 3, 2, 2, generator=seeded(0))
    result = efficient_ad.randomly_grey(image, seeded(1))
    is_grey = (result == result[:, :1]).flatten(1).all(dim=1)
    assert is_grey.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(result[~is_grey], image[~is_grey])
    expected = torchvision_functional.rgb_to_grayscale(image[is_grey], num_output_channels=3)
    torch.testing.assert_close(result[is_grey], expected)


def test_dropout_keeps_the_mean() -> None:
    mask = efficient_ad.dropout_mask(torch.zeros(1000, 100), seeded(0))
    assert mask.unique().tolist() == pytest.approx([0, 1.25])
    assert mask.mean().item() == pytest.approx(1, abs=0.01)


# --- statistics


@torch.no_grad()
def test_descriptions_of_the_normal_images_are_standardised(prepared: EfficientAD) -> None:
    images = torch.cat([textures(3, seed=1), textures(2, seed=2)])
    described = prepared._describe(prepared.normalise(images)).double()
    torch.testing.assert_close(described.mean(dim=(0, 2, 3)), torch.zeros(128).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(described.std(dim=(0, 2, 3), correction=0), torch.ones(128).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_values", [2, 3, 3136, 10_001])
def test_quantiles_are_torchs(num_values: int) -> None:
    values = torch.randn(num_values, generator=seeded(0))
    expected = values.quantile(torch.tensor([0.9, 0.995]))
    torch.testing.assert_close(efficient_ad.quantiles(values, (0.9, 0.995)), expected)


def test_quantiles_on_eleven_numbers_worked_by_hand() -> None:
    values = torch.arange(11.0).flip(0)
    assert efficient_ad.quantiles(values, (0.9, 0.95)).tolist() == pytest.approx([9.0, 9.5])


def test_quantiles_have_no_limit_of_elements() -> None:
    values = torch.arange(2**24 + 3, dtype=torch.float32)
    assert efficient_ad.quantiles(values, (0.5, 1.0)).tolist() == pytest.approx([2**23 + 1, 2**24 + 2])


# --- maps


@torch.no_grad()
def test_held_out_quantiles_become_0_and_a_tenth(calibrated: EfficientAD) -> None:
    holdout = torch.cat([textures(3, seed=3), textures(1, seed=4)])
    for row, cells in zip(calibrated.map_quantiles, calibrated.raw_maps(holdout), strict=True):
        assert cells is not None
        low, high = row
        normalised = 0.1 * (cells.flatten() - low) / (high - low)
        assert normalised.quantile(0.9).item() == pytest.approx(0, abs=1e-5)
        assert normalised.quantile(0.995).item() == pytest.approx(0.1, abs=1e-5)


@torch.no_grad()
def test_normalisation_of_four_pixels_worked_by_hand(calibrated: EfficientAD, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated.map_quantiles.copy_(torch.tensor([[1.0, 3.0], [10.0, 20.0]]))
    local = torch.full((1, 1, CELLS, CELLS), 1.0)
    overall = torch.full((1, 1, CELLS, CELLS), 10.0)
    local[0, 0, 8:10, 8:10] = torch.tensor([[1.0, 3.0], [5.0, 0.0]])
    overall[0, 0, 8:10, 8:10] = torch.tensor([[20.0, 10.0], [20.0, 10.0]])
    monkeypatch.setattr(calibrated, "raw_maps", lambda _image: efficient_ad.RawMaps(local, overall))
    cells = torch.zeros(1, 1, 32, 32)
    cells[0, 0, 12:14, 12:14] = torch.tensor([[0.05, 0.05], [0.15, -0.025]])
    expected = F.interpolate(cells, size=SIZE, mode="bilinear")
    prediction = calibrated(torch.zeros(1, 3, SIZE, SIZE))
    torch.testing.assert_close(prediction.anomaly_map, expected)
    torch.testing.assert_close(prediction.score, expected.max().reshape(1))


@torch.no_grad()
def test_overall_weight_is_the_share_of_the_overall_map(calibrated: EfficientAD) -> None:
    image = textures(2, seed=8)
    local, overall = (
        0.1 * (cells - low) / (high - low)
        for cells, (low, high) in zip(
            calibrated.raw_maps(image).together().split(1, 1), calibrated.map_quantiles, strict=True
        )
    )
    for weight in (0.25, 0.5):
        calibrated.config = settings(overall_weight=weight)
        expected = efficient_ad.to_prediction((1 - weight) * local + weight * overall, Size.square(SIZE))
        for model in (calibrated, calibrated.exportable()):
            torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_its_map_there_is_no_autoencoder(tmp_path: Path) -> None:
    model = with_teacher(settings(overall_weight=0))
    model.prepare([batch_of(textures(3, seed=1))])
    assert not any("autoencoder" in name for name in model.state_dict())
    assert next(model.losses(batch_with_penalty(), step_at(0))).keys() == {"hard_feature", "penalty"}
    model.calibrate([batch_of(textures(3, seed=3))])
    image = textures(2, seed=8)
    low, high = model.map_quantiles[0]
    maps = model.raw_maps(image)
    assert maps.overall is None
    expected = efficient_ad.to_prediction(0.1 * (maps.local - low) / (high - low), Size.square(SIZE))
    torch.testing.assert_close(model(image), expected)
    detector = tiny_models.exported(model.eval(), tmp_path / "model.onnx")
    assert sum(node.op_type == "Conv" for node in onnx.load(tmp_path / "model.onnx").graph.node) == 4 + 4
    tiny_models.assert_file_agrees(detector, model, image)


Score = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def score(calibrated: EfficientAD, monkeypatch: pytest.MonkeyPatch) -> Score:
    """The image scores (B,) of raw maps: local and overall, (B, 1, CELLS, CELLS) each."""

    def scored(local: Tensor, overall: Tensor) -> Tensor:
        monkeypatch.setattr(calibrated, "raw_maps", lambda _image: efficient_ad.RawMaps(local, overall))
        prediction = calibrated(torch.zeros(len(local), 3, SIZE, SIZE))
        assert isinstance(prediction.score, Tensor)
        return prediction.score

    return scored


def raw_cells(number: int, seed: int) -> Tensor:
    return 1 + torch.rand(number, 1, CELLS, CELLS, generator=seeded(seed))


@torch.no_grad()
def test_raising_a_pixel_of_either_map_never_lowers_the_score(calibrated: EfficientAD, score: Score) -> None:
    calibrated.map_quantiles.copy_(torch.tensor([[1.2, 1.7], [1.1, 1.9]]))
    maps = [raw_cells(1, seed=1), raw_cells(1, seed=2)]
    before = score(*maps)
    for kind in range(2):
        for by, exceeded in [(0.1, 1), (1, 50), (5, CELLS**2)]:
            raised = [cells.expand(CELLS**2, -1, -1, -1).clone() for cells in maps]
            raised[kind].view(CELLS**2, -1).diagonal().add_(by)  # another pixel of each
            after = score(*raised)
            assert (after >= before).all()
            assert (after > before).sum() >= exceeded


@torch.no_grad()
def test_quantiles_order_no_single_map_but_the_combined_one(calibrated: EfficientAD, score: Score) -> None:
    height = torch.linspace(0, 1, 30).view(-1, 1, 1, 1)
    maps = [raw_cells(30, seed=1) + height, raw_cells(30, seed=2) + height]
    flat, label = torch.ones_like(maps[0]), torch.arange(30) % 3 != 0

    def area(local: Tensor, overall: Tensor, quantiles: list[list[float]]) -> float:
        calibrated.map_quantiles.copy_(torch.tensor(quantiles))
        found: float = roc_auc_score(label, score(local, overall))
        return found

    scales = [[1.0, 2.0], [0.5, 1.9], [1.3, 9.0], [1.5, 1.6]]
    assert len({area(maps[0], flat, [scale, [1.0, 2.0]]) for scale in scales}) == 1
    assert len({area(flat, maps[1], [[1.0, 2.0], scale]) for scale in scales}) == 1
    assert len({area(maps[0], maps[1], [scale, [1.0, 2.0]]) for scale in scales}) > 1


def test_mode_does_not_matter_outside_of_losses(calibrated: EfficientAD) -> None:
    image = textures(1, seed=8)
    evaluated = calibrated(image)
    assert torch.equal(calibrated.train()(image).anomaly_map, evaluated.anomaly_map)


@torch.no_grad()
def test_scaling_the_teacher_changes_nothing(prepared: EfficientAD) -> None:
    image = textures(1, seed=8)
    before = prepared.raw_maps(image).local
    prepared.teacher[-1].weight.mul_(7)
    prepared.teacher[-1].bias.mul_(7)
    prepared.prepare([batch_of(textures(3, seed=1)), batch_of(textures(2, seed=2))])
    torch.testing.assert_close(prepared.raw_maps(image).local, before, rtol=1e-4, atol=1e-5)


def test_that_a_teacher_is_loaded_is_part_of_the_state(untrained: EfficientAD) -> None:
    assert bool(untrained.state_dict()["teacher_loaded"])


def test_folded_is_the_same_function(calibrated: EfficientAD) -> None:
    before, image = copy.deepcopy(calibrated), textures(2, seed=8)
    expected, found = calibrated(image), calibrated.exportable()(image)
    scale = expected.anomaly_map.abs().max().item()
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-5, atol=0)
    assert same_state(calibrated, before)


def test_onnx_of_the_folded_model(calibrated: EfficientAD, tmp_path: Path) -> None:
    detector = tiny_models.exported(calibrated, tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "Conv" for node in nodes) == 4 + 4 + 14
    tiny_models.assert_file_agrees(detector, calibrated, textures(4, seed=9))


# --- what users can get wrong


@pytest.mark.parametrize("size", [100, 96, 250])
def test_image_size_must_fit_the_autoencoder(size: int) -> None:
    with pytest.raises(ValidationError, match=f"EfficientAD needs a multiple of 32, at least 128; found {size}"):
        settings(image_size=size)


def test_quantiles_must_ascend() -> None:
    with pytest.raises(ValidationError, match=r"quantile_low must be below quantile_high; found 0.995 and 0.9"):
        settings(quantile_low=0.995, quantile_high=0.9)


def test_no_teacher() -> None:
    with pytest.raises(ModelError, match="EfficientAD has no teacher"):
        EfficientAD(settings()).prepare([batch_of(textures(1, seed=1))])


@pytest.mark.parametrize(
    ("state", "found"),
    [(patch_description_network("small").state_dict(), r"\(128,\)"), ({"layer1.weight": torch.zeros(1)}, "nothing")],
    ids=["another width", "no teacher"],
)
def test_weights_that_are_no_teacher(state: dict[str, Tensor], found: str) -> None:
    with pytest.raises(ModelError, match=rf"do not fit width tiny: conv1.bias should be \(32,\), found {found}"):
        EfficientAD(settings()).load_teacher(state)


CONSTANT = torch.full((2, 3, SIZE, SIZE), 0.5)


@pytest.mark.parametrize(
    ("images", "said"), [([], "no normal images"), ([CONSTANT], "the normal images are constant")], ids=["none", "grey"]
)
def test_normal_images_to_learn_nothing_from(untrained: EfficientAD, images: list[Tensor], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        untrained.prepare(map(batch_of, images))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "two or more held-out normal images to calibrate; found 0"),
        ([textures(1, seed=1)], "two or more held-out normal images to calibrate; found 1"),
        ([CONSTANT], r"quantiles 0.9 and 0.995 of the local map coincide"),
    ],
    ids=["none", "one", "grey"],
)
def test_held_out_images_to_calibrate_nothing_on(prepared: EfficientAD, images: list[Tensor], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        prepared.calibrate(map(batch_of, images))


def test_no_penalty_images(prepared: EfficientAD) -> None:
    with pytest.raises(ModelError, match=r"penalty_weight is 1.0, but there are no penalty images"):
        next(prepared.losses(batch_of(textures(1, seed=6)), step_at(0)))


# --- learning


@pytest.mark.slow
def test_pasted_blob_scores_above_clean_images() -> None:
    """A random teacher and drawn parts show that training, calibration and localisation fit together."""
    model, images = with_teacher(settings()), parts(20, seed=1, size=SIZE)
    model.prepare([batch_of(images)])

    def batch_at(step: int) -> Batch:
        noise = torch.rand(1, 3, SIZE, SIZE, generator=seeded(step))
        return batch_of(images[step % 20].unsqueeze(0), penalty=noise)

    taken = take_steps(model, model.optimizer(150), batch_at, range(150), 150)
    losses = [sum(term.item() for term in terms.values()) for terms in taken]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    model.calibrate([batch_of(parts(4, seed=2, size=SIZE))])
    defective = parts(1, seed=3, size=SIZE)
    defective[:, :, 50:74, 60:84] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    with torch.no_grad():
        prediction = model(defective)
        clean = model(parts(6, seed=4, size=SIZE))
    assert prediction.score.item() > clean.score.max().item()
    row, column = divmod(int(prediction.anomaly_map.argmax()), SIZE)
    assert 50 <= row < 74
    assert 60 <= column < 84
