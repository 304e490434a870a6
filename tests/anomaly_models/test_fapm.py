"""The acceptance facts of the method, on a tiny random network: they are about geometry, not about accuracy."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from drawn_batches import batch_of, num_parameters, same_state, seeded
from einops import rearrange
from pydantic import ValidationError
from tiny_models import SETTINGS
from torch import Tensor
from torch.nn import functional as F

from anomaly_models.base import Batch, ModelError
from anomaly_models.common.memory_bank import HeldVectors, MemoryBank, covering_radii, greedy_coreset
from anomaly_models.fapm import FAPM, FAPMConfig, enlarge, far_patches, image_score

SIDE = 64  # of SETTINGS: maps of 16 x 16 and 8 x 8, cut into 4 x 4 patches of 4 x 4 and 2 x 2 positions
TINY = SETTINGS["fapm"]


def config(**changes: Any) -> FAPMConfig:
    return FAPMConfig.model_validate(TINY | changes)


def images(number: int, seed: int, side: int = SIDE) -> Tensor:
    return torch.rand(number, 3, side, side, generator=seeded(seed))


def batches(image: Tensor) -> Iterator[Batch]:
    return map(batch_of, torch.split(image, 4))


def fitted(train: Tensor, **changes: Any) -> FAPM:
    torch.manual_seed(0)
    model = FAPM(config(**changes))
    model.prepare(batches(train))
    return model.eval()


def bank(model: FAPM, layer: int) -> MemoryBank:
    found = model.banks[layer]
    assert isinstance(found, MemoryBank)
    return found


def bank_rows(model: FAPM, layer: int, patch: int) -> Tensor:
    memory = bank(model, layer)
    return memory.vectors[patch, : int(memory.count[patch])] + memory.centre[patch]


@pytest.fixture(scope="module")
def train() -> Tensor:
    # Blocks of different contrast, so that patches differ in spread.
    contrast = F.interpolate(torch.linspace(0.05, 1, 16).view(1, 1, 4, 4), scale_factor=16)
    return (images(10, seed=1) - 0.5) * contrast + 0.5


@pytest.fixture(scope="module")
def test() -> Tensor:
    return images(5, seed=2)


@pytest.fixture(scope="module")
def model(train: Tensor) -> FAPM:
    return fitted(train)


# Layout


def test_the_papers_layout_is_seven_by_seven_patches_of_16_and_4_positions() -> None:
    backbone = {"name": "wide_resnet50_2.tv_in1k", "weights": "timm", "layers": [2, 3], "combine": "separate"}
    with torch.device("meta"):
        model = FAPM(config(image_size=256, crop=224, grid=7, backbone=backbone))
        fine, coarse = model.features(torch.zeros(2, 3, 256, 256, device="meta"))
    assert model.sizes == ((28, 28), (14, 14))
    assert model.by_patch(fine).shape == (49, 2 * 16, 512)
    assert model.by_patch(coarse).shape == (49, 2 * 4, 1024)
    u, v = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    patch = 7 * (u // 4) + v // 4
    assert torch.equal(model.by_patch(patch.view(1, 1, 28, 28)), torch.arange(49).view(49, 1, 1).expand(49, 16, 1))
    partner = torch.empty(14, 14, dtype=torch.long)
    partner[u // 2, v // 2] = patch  # the coarse position that a fine one is added to
    assert torch.equal(model.by_patch(partner.view(1, 1, 14, 14)), torch.arange(49).view(49, 1, 1).expand(49, 4, 1))


def test_the_papers_backbone_ends_after_layer_3() -> None:
    backbone = {"name": "wide_resnet50_2.tv_in1k", "weights": "timm", "layers": [2, 3], "combine": "separate"}
    with torch.device("meta"):
        model = FAPM(config(image_size=256, crop=224, grid=7, backbone=backbone))
        whole = timm.create_model("wide_resnet50_2", pretrained=False)
    assert num_parameters(model) == num_parameters(model.backbone) == 24_862_528
    assert num_parameters(whole) == 68_883_240


def test_positions_belong_to_the_patch_that_covers_them(model: FAPM) -> None:
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    patch = 4 * (rows // 4) + columns // 4
    grouped = model.by_patch(patch.expand(3, 1, 16, 16))
    assert torch.equal(grouped, torch.arange(16).view(16, 1, 1).expand(16, 3 * 16, 1))


def test_partition_has_an_inverse(model: FAPM) -> None:
    features = images(2, seed=0, side=16)
    grouped = model.by_patch(features)
    back = rearrange(grouped, "(gh gw) (b h w) d -> b d (gh h) (gw w)", gh=4, gw=4, h=4, w=4)
    assert torch.equal(back, features)


def test_geometric_layout_is_nearest_interpolation() -> None:
    scores = torch.rand(2, 3, 5, 2, 2)
    expected = F.interpolate(scores.flatten(0, 2)[:, None], scale_factor=2, mode="nearest").view(2, 3, 5, 4, 4)
    assert torch.equal(enlarge(scores, 2, "geometric"), expected)


def test_released_layout_puts_the_quadrants_on_rows() -> None:
    scores = torch.arange(4.0).view(1, 1, 1, 2, 2)
    assert enlarge(scores, 2, "released")[0, 0, 0].tolist() == [[float(row)] * 4 for row in range(4)]


def test_zeros_beyond_the_border_count_in_the_average(model: FAPM) -> None:
    image = images(1, seed=3)
    raw = model.backbone(image)[0]
    averaged = model.features(image)[0]
    torch.testing.assert_close(averaged[..., 0, 0], raw[..., :2, :2].sum((2, 3)) / 9)


# Coreset


def test_banks_hold_training_vectors_of_their_own_patch(model: FAPM, train: Tensor) -> None:
    for layer, features in enumerate(model.features(train)):
        vectors = model.by_patch(features)
        for patch in range(16):
            rows = bank_rows(model, layer, patch)
            distances = torch.cdist(rows, vectors[patch], compute_mode="donot_use_mm_for_euclid_dist")
            assert distances.amin(1).max() < 1e-3


def test_bank_sizes_follow_the_ratios(model: FAPM) -> None:
    assert model.bank_sizes(160) == (16, 32)
    assert model.bank_sizes(20) == (4, 8)  # never fewer than the neighbours
    assert model.bank_sizes(6) == (4, 6)  # never more than there are
    for layer, (near, far) in enumerate([(16, 32), (4, 8)]):
        sizes = torch.where(model.far[layer], far, near)
        assert torch.equal(bank(model, layer).count, sizes)


def test_far_patches_are_those_of_large_radius(model: FAPM) -> None:
    for near_radius, radius, far in zip(model.near_radius, model.radius, model.far, strict=True):
        assert torch.equal(far, near_radius > near_radius.mean())
        assert 0 < far.sum() < 16
        assert (radius[far] <= near_radius[far]).all()
        assert torch.equal(radius[~far], near_radius[~far])
        assert near_radius[far].min() > near_radius[~far].max()


def test_each_layer_has_far_patches_of_its_own() -> None:
    fine, coarse = fitted(images(10, seed=1)).far
    assert not torch.equal(fine, coarse)


def test_radius_is_the_largest_distance_of_a_training_vector(model: FAPM, train: Tensor) -> None:
    for layer, features in enumerate(model.features(train)):
        distance = bank(model, layer)(model.by_patch(features), 1).amax(dim=(1, 2))
        torch.testing.assert_close(distance, model.radius[layer], rtol=1e-4, atol=0)


@pytest.mark.parametrize("changes", [{"coreset_ratio": 0.2}, {"adaptive_ratio": 4}, {"far_rule": {"name": "all"}}])
def test_more_memory_never_raises_a_distance(
    model: FAPM, train: Tensor, test: Tensor, changes: dict[str, object]
) -> None:
    larger = fitted(train, **changes)
    for image, rounding in ((test, 1e-5), (train, 1e-3)):  # which grows towards a distance of 0
        found, before = larger.distances(larger.features(image)), model.distances(model.features(image))
        assert (found <= before + rounding).all()


def test_preparing_twice_gives_the_same_memory(model: FAPM, train: Tensor) -> None:
    assert same_state(model, fitted(train))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"name": "mean"}, [False, False, False, True]),
        ({"name": "median"}, [False, False, True, True]),
        ({"name": "quantile", "value": 0.9}, [False, False, False, True]),
        ({"name": "mean_std", "value": -0.5}, [False, True, True, True]),
        ({"name": "none"}, [False] * 4),
        ({"name": "all"}, [True] * 4),
    ],
)
def test_far_rules(rule: dict[str, object], expected: list[bool]) -> None:
    # mean 4, standard deviation 3.5, median 2.5
    assert far_patches(torch.tensor([1.0, 2.3, 2.7, 10.0]), config(far_rule=rule).far_rule).tolist() == expected


@pytest.mark.parametrize("name", ["mean", "median"])
def test_no_patch_is_far_when_all_spread_alike(name: str) -> None:
    assert not far_patches(torch.full((49,), 0.1), config(far_rule={"name": name}).far_rule).any()


def test_identical_images_leave_a_memory_that_works(test: Tensor) -> None:
    flat = torch.full((4, 3, SIDE, SIDE), 0.5)
    prediction = fitted(flat)(torch.cat([flat[:1], test[:1]]))
    assert prediction.anomaly_map.isfinite().all()
    assert prediction.score[0] < 1e-2 < prediction.score[1]


# Of more images than are held at once


def test_a_model_that_holds_all_of_them_is_the_same_whatever_the_number_it_could_hold(
    model: FAPM, train: Tensor
) -> None:
    assert same_state(model, fitted(train, held_images=len(train)))
    assert not same_state(model, fitted(train, held_images=len(train) - 1))


@pytest.fixture(scope="module")
def many(train: Tensor) -> Tensor:
    return torch.cat([train, *((images(20, seed) - 0.5) * 0.3 + 0.5 for seed in range(20, 24))])  # 90 images


def test_of_many_images_no_more_is_held_than_of_those_and_no_more_is_kept(
    many: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[int, int]] = []

    def counted_add(self: HeldVectors, vectors: Tensor, added: Any = HeldVectors.add) -> None:
        added(self, vectors)
        held.append((len(self), self.capacity))

    monkeypatch.setattr(HeldVectors, "add", counted_add)
    model = fitted(many, held_images=10)
    assert {capacity for _, capacity in held} == {10 * 16, 10 * 4}
    assert all(number <= capacity for number, capacity in held)
    for layer, (near, far) in enumerate([(16, 32), (4, 8)]):  # as for 10 images
        sizes = torch.where(model.far[layer], far, near)
        assert (bank(model, layer).count <= sizes).all()
        assert bank(model, layer).vectors.shape[1] <= far


def test_the_memory_covers_many_images_within_the_bound(many: Tensor) -> None:
    """The greedy choice's radii are at least the best ones, r*, which the bound is of."""
    model = fitted(many, held_images=10)
    for layer, features in enumerate(model.features(many)):
        for patch, vectors in enumerate(model.by_patch(features)):
            capacity = 10 * len(vectors) // len(many)
            rows = bank_rows(model, layer, patch)
            radii = greedy_coreset(vectors, capacity)[1]
            kept = model.bank_sizes(capacity)[1]
            slack = max(8 * radii[kept - 1], 32 / 3 * radii[capacity - 1])
            (radius,) = covering_radii(vectors, rows, [len(rows)])
            assert radius <= 2 * radii[len(rows) - 1] + slack
            assert radius <= 1.5 * radii[len(rows) - 1]  # and in fact


def test_an_image_unlike_those_before_it_enters_a_full_memory(many: Tensor) -> None:
    other = 1 - images(1, seed=5)
    model = fitted(torch.cat([many, other, many[:3]]), held_images=10)
    without = fitted(many, held_images=10)
    assert model(other).score < 0.8 * without(other).score


def test_equal_images_leave_fewer_vectors_than_neighbours(test: Tensor) -> None:
    flat = torch.full((12, 3, SIDE, SIDE), 0.5)
    model = fitted(flat, held_images=1)
    assert (bank(model, 0).count == 4).all()
    prediction = model(torch.cat([flat[:1], test[:1]]))
    assert prediction.anomaly_map.isfinite().all()
    assert prediction.score[0] < 1e-2 < prediction.score[1]


def test_a_patch_outside_the_region_stays_empty_while_others_are_full(many: Tensor) -> None:
    region = torch.ones(4, 1, SIDE, SIDE)
    region[..., :16, :16] = 0  # the first patch
    region[..., 16:24, :16] = 0  # half of the fifth
    torch.manual_seed(0)
    model = FAPM(config(held_images=2))
    model.prepare(batch_of(image, region=region[: len(image)]) for image in torch.split(many, 4))
    for layer in range(2):
        count = bank(model, layer).count
        assert (bank_rows(model, layer, 0) == 0).all()
        assert count[0] == 4
        assert (count[1:] <= 8).all()
        assert model.near_radius[layer, 0] == 0 < model.near_radius[layer, 4]


@pytest.mark.parametrize(
    ("changes", "capacities"),
    [
        ({"held_images": 5}, [5 * 16, 5 * 4]),
        ({"held_images": 5, "grid": 1}, [5 * 256, 5 * 64]),
        ({"held_images": 1, "grid": 8}, [4, 4]),  # as many as the neighbours
        # nine tiles: with a memory for each, or one for all of them
        ({"held_images": 5, "image_size": 160, "tiles": {"side": 64, "overlap": 16}}, [5 * 16, 5 * 4]),
        ({"held_images": 5, "image_size": 160, "tiles": {"side": 64, "overlap": 16}, "grid": 1}, [45 * 256, 45 * 64]),
    ],
)
def test_what_a_patch_may_hold_is_what_it_has_of_so_many_pictures(
    changes: dict[str, Any], capacities: list[int]
) -> None:
    model = FAPM(config(**{"image_score": "max"} | changes).network)
    held = [model.held_by_patch(size) for size in model.sizes]
    assert [{each.capacity for each in of_layer} for of_layer in held] == [{capacity} for capacity in capacities]
    assert [len(of_layer) for of_layer in held] == [len(bank(model, layer).count) for layer in range(2)]


def test_a_coreset_of_all_vectors_is_chosen_from_half_of_what_fits() -> None:
    model = FAPM(config(coreset_ratio=1.0, held_images=5))
    held = model.held_by_patch(model.sizes[0])[0]
    assert (held.capacity, held.kept) == (80, 40)


# Scores


def test_distances_are_the_sum_over_layers_of_the_own_patchs(model: FAPM, test: Tensor) -> None:
    fine, coarse = model.features(test)
    found = model.distances([fine, coarse])
    for image, u, v in [(0, 0, 0), (1, 5, 14), (2, 15, 15), (4, 7, 8), (3, 10, 3)]:
        patch = 4 * (u // 4) + v // 4
        expected = torch.zeros(4, dtype=torch.double)
        for layer, query in enumerate([fine[image, :, u, v], coarse[image, :, u // 2, v // 2]]):
            distance = (bank_rows(model, layer, patch).double() - query.double()).norm(dim=1)
            expected += distance.sort().values[:4]
        torch.testing.assert_close(found[image, :, u, v].double(), expected, rtol=1e-4, atol=1e-5)


def test_removing_a_layer_removes_its_term(model: FAPM, train: Tensor, test: Tensor) -> None:
    both = model.distances(model.features(test))
    fine = fitted(train, backbone=TINY["backbone"] | {"layers": [1]})
    fine.backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    fine.prepare(batches(train))
    nearest = bank(model, 1)(model.by_patch(model.features(test)[1]), 4)
    coarse = enlarge(rearrange(nearest, "p (b h w) k -> b k p h w", h=2, w=2), 2, "geometric")
    coarse = rearrange(coarse, "b k (gh gw) h w -> b k (gh h) (gw w)", gh=4)
    torch.testing.assert_close(both - coarse, fine.distances(fine.features(test)), rtol=0, atol=1e-5)


def test_training_images_lie_within_the_radii(model: FAPM, train: Tensor) -> None:
    nearest = model.distances(model.features(train))[:, 0]
    bound = rearrange(model.radius.sum(0), "(gh gw) -> gh gw", gh=4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (nearest <= bound + 1e-4).all()


def test_what_the_memory_holds_is_at_distance_zero(model: FAPM, train: Tensor) -> None:
    """Each coreset begins with the first image's first position of its patch."""
    nearest = model.distances(model.features(train[:1]))[0, 0]
    assert nearest[::4, ::4].max() < 1e-2 < nearest.median()


def test_patches_do_not_influence_one_another(model: FAPM, test: Tensor) -> None:
    fine, coarse = model.features(test)
    other_fine, other_coarse = fine + 1, coarse + 1
    other_fine[..., 4:8, 8:12], other_coarse[..., 2:4, 4:6] = fine[..., 4:8, 8:12], coarse[..., 2:4, 4:6]
    before, after = model.distances([fine, coarse]), model.distances([other_fine, other_coarse])
    changed = (before - after).abs().amax(dim=(0, 1)) > 1e-5
    assert not changed[4:8, 8:12].any()
    assert changed.sum() == 16 * 16 - 16


def test_pixels_beyond_a_patch_reach_its_scores_through_the_backbone(model: FAPM, test: Tensor) -> None:
    changed = test.clone()
    changed[..., 12:16, 32:48] = 1 - changed[..., 12:16, 32:48]  # just above the patch of rows 16 to 31
    before, after = (model.distances(model.features(image)) for image in (test, changed))
    assert (before - after)[..., 6:8, 8:12].abs().max() > 1e-3  # where no average of 3 x 3 reaches


def test_memories_of_two_patches_are_not_exchangeable(model: FAPM, train: Tensor, test: Tensor) -> None:
    shuffled = fitted(train)
    for name in ("centre", "vectors", "squared_norm", "count"):
        memory = bank(shuffled, 0)
        setattr(memory, name, getattr(memory, name).flip(0))
    assert not torch.allclose(shuffled(test).anomaly_map, model(test).anomaly_map, rtol=0.01)


def test_a_shift_by_one_patch_changes_the_scores(model: FAPM, train: Tensor) -> None:
    assert (model(train.roll(16, dims=3)).score > model(train).score).all()


def test_map_is_zero_outside_the_crop(train: Tensor, test: Tensor) -> None:
    anomaly_map = fitted(train, crop=48, grid=2)(test).anomaly_map
    assert anomaly_map.shape == (5, 1, SIDE, SIDE)
    inside = F.pad(torch.ones(48, 48, dtype=torch.bool), (8, 8, 8, 8))
    assert (anomaly_map[..., inside] > 0).all()
    assert (anomaly_map[..., ~inside] == 0).all()


def test_a_grid_of_one_is_one_memory_per_layer(train: Tensor) -> None:
    model = fitted(train, grid=1, far_rule={"name": "none"})
    assert model.far.shape == (2, 1)
    assert bank(model, 0).count.tolist() == [10 * 256 // 10]


def test_image_scores_by_hand() -> None:
    nearest_last = torch.tensor([2.0, 2.2, 2.5, 3.0]).view(1, 4, 1, 1)
    distances = torch.cat([nearest_last * 0.5, nearest_last], dim=3)  # the second position is the farthest
    assert image_score(distances, "max").item() == 2
    assert image_score(distances, "released").item() == pytest.approx(2 * 0.587, abs=1e-3)
    assert image_score(distances, "patchcore").item() == pytest.approx(2 * 0.848, abs=1e-3)


def test_released_score_is_bounded_and_not_scale_free() -> None:
    distances = torch.rand(6, 4, 5, 5).sort(dim=1).values + 0.1
    highest = image_score(distances, "max")
    score = image_score(distances, "released")
    assert (score >= 0).all()
    assert (score <= 0.75 * highest + 1e-6).all()
    equal = torch.full((1, 4, 2, 2), 3.0)
    assert image_score(equal, "released").item() == pytest.approx(0.75 * 3)
    assert not torch.allclose(image_score(5 * distances, "released"), 5 * score, rtol=0.01)
    assert image_score(1e4 * distances, "released").isfinite().all()


def test_scale_can_turn_the_released_order_round() -> None:
    """Of images whose distances ascend alike and are about equal; their maxima keep their order."""
    distances = torch.tensor([[2.0, 2.1, 2.2, 3.5], [1.9, 1.9, 1.9, 1.9]]).view(2, 4, 1, 1)
    order = [image_score(scale * distances, "released").argmax().item() for scale in (0.01, 1.0)]
    assert order == [0, 1]
    assert [image_score(scale * distances, "max").argmax().item() for scale in (0.01, 1.0)] == [0, 0]


def far_apart(*gaps: float) -> Tensor:
    """One position per image whose largest distance is so much above its second largest; (B, 4, 1, 1)."""
    return torch.stack([torch.tensor([30.0, 31.0, 33.0, 33.0 + gap]) for gap in gaps]).view(len(gaps), 4, 1, 1)


def published(distances: Tensor, place: int) -> Tensor:
    """(1 - softmax) x nearest distance as it is written, in double precision."""
    exact = distances.flatten(1).double()
    return (1 - exact.softmax(1)[:, place]) * exact[:, 0]


@pytest.mark.parametrize(("kind", "place"), [("released", -1), ("patchcore", 0)])
def test_scores_are_the_published_ones_where_these_do_not_cancel(kind: Any, place: int) -> None:
    distances = torch.rand(50, 4, 1, 1, generator=seeded(6)).sort(dim=1).values
    distances *= torch.linspace(0.1, 12, 50).view(50, 1, 1, 1)
    torch.testing.assert_close(image_score(distances, kind).double(), published(distances, place), rtol=1e-5, atol=0)


def test_released_score_keeps_its_order_where_the_published_one_is_zero() -> None:
    gaps = torch.arange(0.0, 85.0, 2.5)
    scores = image_score(far_apart(*gaps.tolist()), "released")
    assert (scores.diff() < 0).all()
    exact = 30 / (1 + gaps.double().exp() / (1 + math.exp(-2) + math.exp(-3)))
    torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=0)
    assert (published(far_apart(*gaps.tolist()).float(), -1)[gaps > 40] == 0).all()
    nearer = far_apart(50.0, 50.0)
    nearer[1] += 5
    assert image_score(nearer, "released").diff() > 0  # all distances grow alike


class Score(torch.nn.Module):
    def forward(self, distances: Tensor) -> Tensor:
        return image_score(distances, "released")


def test_the_exported_score_is_as_stable() -> None:
    distances = far_apart(0.0, 5.0, 20.0, 40.0, 80.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Score(), (distances,), dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {"distances": distances.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), image_score(distances, "released"), rtol=1e-4, atol=0)


def test_a_score_below_what_float32_holds_is_refused(model: FAPM, train: Tensor) -> None:
    model.check_scores(batches(images(4, seed=9)))
    large = fitted(train)
    for memory in large.banks:
        assert isinstance(memory, MemoryBank)
        memory.vectors *= 1e4
        memory.squared_norm *= 1e8
    with pytest.raises(ModelError, match=r"image_score: released is 0 for a held-out part .* set image_score: max$"):
        large.check_scores(batches(images(4, seed=9)))


def test_parts_at_distance_zero_are_no_reason_to_refuse(train: Tensor) -> None:
    flat = torch.full((4, 3, SIDE, SIDE), 0.5)
    fitted(flat).check_scores(batches(flat))


def test_score_comes_from_the_map_before_smoothing(model: FAPM, test: Tensor) -> None:
    prediction = model(test)
    distances = model.distances(model.features(test))
    assert torch.equal(prediction.score, image_score(distances, "released"))
    assert (prediction.anomaly_map.amax(dim=(1, 2, 3)) < distances[:, 0].amax(dim=(1, 2))).all()


# Settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop": 65}, "crop must be at most image_size, found 65 of 64"),
        ({"crop": 16, "blur_sigma": 5.0}, "blur_sigma 5.0 reaches beyond a map of 16 pixels"),
        ({"neighbours": 1}, "greater than or equal to 2"),
        ({"held_images": 0}, "greater than 0"),
        ({"coreset_ratio": 0.0}, "greater than 0"),
        ({"coreset_ratio": 1.5}, "less than or equal to 1"),
        ({"adaptive_ratio": 0}, "greater than 0"),
        ({"far_rule": {"name": "quantile", "value": 1.2}}, "less than 1"),
        ({"far_rule": {"name": "mean", "value": 1.2}}, "Extra inputs"),
        ({"far_rule": {"name": "mode"}}, "'mean', 'median', 'none', 'all', 'quantile', 'mean_std'"),
        ({"image_score": "mean"}, "'released', 'max' or 'patchcore'"),
        ({"coarse_layout": "rows"}, "'geometric' or 'released'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**changes)


def test_settings_survive_json() -> None:
    settings = config(far_rule={"name": "quantile", "value": 0.9})
    assert FAPMConfig.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": 7}, "sides of the feature maps, 16 and 8 for crop 64, found 7; take one of 1, 2, 4, 8"),
        (
            {"crop": 60},
            "multiple of 8, the stride of the deepest layer of test_resnet, found 60; the nearest are 56 and 64",
        ),
    ],
)
def test_grids_that_do_not_fit_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        FAPM(config(**changes))


def test_too_few_vectors_are_refused(train: Tensor) -> None:
    with pytest.raises(ModelError, match="3 vectors per patch in the normal images and needs 4"):
        fitted(train[:3], grid=8)


def test_no_images_are_refused() -> None:
    with pytest.raises(ModelError, match="no normal image"):
        FAPM(config()).prepare([])
