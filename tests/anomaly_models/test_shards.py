"""Several processes: the losses of a step are those of one, and FAPM's merged coresets cover what they promise."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_batches import batch_of, seeded
from processes import Case, Curves, together, trained
from tiny_models import SETTINGS, build, normals
from torch import Tensor, nn

from anomaly_models import MODELS
from anomaly_models.base import Batch
from anomaly_models.common import shards
from anomaly_models.common.memory_bank import covering_radii, greedy_coreset
from anomaly_models.common.shards import WHOLE, Shard
from anomaly_models.fapm import FAPM

SMALL_UNET = SETTINGS["diffusion_ad"]["unet"] | {"image_size": 32, "attention_sizes": [16]}
SMALL = {"image_size": 32, "unet": SMALL_UNET}
# Training multiplies a rounding error: by a thousand in 20 steps of DiffusionAD at the suite's rate. BGAD's multiplies
# one by a member of its small mini-batches, where a vector lies on the boundary: the published one is one of them.
IN_FLOAT32 = [
    Case("adfa", 20, {"epochs": 3}),
    Case("bgad", 20, {"learning_rate": 1e-4}),
    Case("efficient_ad", 20),
    Case("diffusion_ad", 20, {"learning_rate": 1e-5, "segmentation_learning_rate": 1e-5}),
]
SOFT = {"name": "soft_topk", "k": 3, "eps": 0.05, "normalize": "batch_max", "candidates": None, "sqrt": True}
SPHERE = {"name": "hypersphere", "attracted": 3, "repelled": 3, "radius": 5.0, "train_radius": True}
MIXED = {"passes": {"name": "mixed", "anomalous": 4}, "anomalies_per_batch": 1, "pastes_per_batch": 1}
IN_FLOAT64 = [
    Case("adfa", 3, {"objective": SOFT}),
    Case("adfa", 3, {"objective": SPHERE | {"alpha": 0.1, "nu": 1.0}}),
    Case("bgad", 6),
    Case("bgad", 6, MIXED | {"focal": "published", "steps_per_batch": "published", "features": "raw"}),
    Case("efficient_ad", 3),
    Case("diffusion_ad", 4, SMALL),
    Case("diffusion_ad", 4, SMALL | {"predicts": {"name": "image", "components": 4, "folds": 2}, "denoises": "all"}),
]


@dataclass(frozen=True)
class Alone:
    """What one process makes of the cases, made once."""

    single: list[Curves]
    double: list[Curves]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    return Alone(trained(IN_FLOAT32, 1, folder / "32"), trained(IN_FLOAT64, 1, folder / "64", precise=True))


def named(cases: list[Case], found: list[float]) -> dict[str, float]:
    return {f"{case.model} {','.join(case.changes)}": value for case, value in zip(cases, found, strict=True)}


def too_far(cases: list[Case], found: list[Curves], expected: list[Curves], most: float) -> dict[str, float]:
    distances = named(cases, [one.furthest(two) for one, two in zip(found, expected, strict=True)])
    return {name: distance for name, distance in distances.items() if not distance <= most}


def test_two_processes_have_the_losses_of_one_for_20_steps(alone: Alone, tmp_path: Path) -> None:
    found = trained(IN_FLOAT32, 2, tmp_path / "two")
    assert too_far(IN_FLOAT32, found, alone.single, 1e-5) == {}
    weights = [one.furthest_weight(two) for one, two in zip(found, alone.single, strict=True)]
    # A weight with hardly a gradient goes where rounding sends it: 20 steps of 1e-4 at the most, and how far of that is
    # the processor's business.
    assert max(weights) < 2e-3, named(IN_FLOAT32, weights)


def test_four_processes_have_the_losses_of_one_for_20_steps(alone: Alone, tmp_path: Path) -> None:
    cases = IN_FLOAT32[:2]
    assert too_far(cases, trained(cases, 4, tmp_path / "four"), alone.single[:2], 1e-5) == {}


def test_what_differs_is_rounding_also_where_shares_are_unequal(alone: Alone, tmp_path: Path) -> None:
    """Three processes share four images; in float64, at the suite's rates, and with the other objectives."""
    found = trained(IN_FLOAT64, 3, tmp_path / "three", precise=True)
    assert too_far(IN_FLOAT64, found, alone.double, 1e-11) == {}


def test_every_model_with_an_optimiser_takes_part() -> None:
    assert {name for name in MODELS if build(name).optimizer(3)} == {case.model for case in IN_FLOAT32}
    assert all(build(name).learns_in_shares for name in MODELS if name != "fapm")


# The parts


def meet(shard: Shard, folder: Path) -> dict[str, Any]:
    """What a process finds of numbers that all have, or that are its own."""
    share = shard.share_of(5)
    values = torch.arange(5.0)
    own = share.of(values)
    rank = torch.tensor([float(shard.rank)], requires_grad=True)
    shard.sum(rank).square().sum().backward()
    layer, norm = shards.BatchNorm2d(3), nn.BatchNorm2d(3)
    shards.share_batch_norms(layer, shard)
    image = torch.randn(5, 3, 4, 4, generator=seeded(0)) + 3
    whole, part = image.clone().requires_grad_(), share.of(image).requires_grad_()
    weight = torch.randn(5, 3, 4, 4, generator=seeded(1))
    (norm(whole) * weight).sum().backward()
    (layer(part) * share.of(weight)).sum().backward()
    shard.add_gradients(layer.parameters())
    return {
        "own": own.tolist(),
        "mean": float(shard.total(share.mean(own))),
        "weighed": float(shard.total(share.weighed(own.mean()))),
        "gathered": sorted(shard.gathered(own).tolist()),
        "nothing": shard.gathered(own[:0] if shard.rank else own).tolist(),
        "lowest": float(shard.lowest(own.min())),
        "highest": float(shard.highest(own.max())),
        "gradient": rank.grad,
        "given": shard.spread(torch.tensor([10.0 * shard.rank]), owner=1).tolist(),
        "collected": shard.collected(own.unsqueeze(1), [3, 2], owner=1),
        "norms": [
            (layer.weight.grad, norm.weight.grad),
            (layer.running_mean, norm.running_mean),
            (layer.running_var, norm.running_var),
            (part.grad, share.of(whole.grad)),
        ],
    }


def test_what_two_processes_tell_one_another(tmp_path: Path) -> None:
    first, second = together(2, tmp_path / "meet", meet)
    assert (first["own"], second["own"]) == ([0, 2, 4], [1, 3])
    for found in (first, second):
        assert found["mean"] == found["weighed"] == pytest.approx(2)
        assert found["gathered"] == [0, 1, 2, 3, 4]
        assert found["nothing"] == [0, 2, 4]
        assert (found["lowest"], found["highest"]) == (0, 4)
        assert found["gradient"].tolist() == [4]  # of two squares of the same sum, 1, that each adds to the loss
        assert found["given"] == [10]
        for one, two in found["norms"]:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert first["collected"] is None
    assert second["collected"].flatten().tolist() == [0, 2, 4, 1, 3]


def test_one_process_has_all_of_it() -> None:
    values = torch.arange(5.0, requires_grad=True)
    share = WHOLE.share_of(5)
    assert share.of(values) is values
    assert share.weighed(values) is values
    assert WHOLE.total(values) is WHOLE.sum(values) is WHOLE.lowest(values) is values
    assert share.mean(values) == values.mean()


# FAPM


def covered(features: Tensor, size: int, num_shares: int) -> tuple[float, float, float]:
    """The radius of a merged coreset, what the shares' own add up to at most, and the radius of one chosen at once."""
    parts = [features[rank::num_shares] for rank in range(num_shares)]
    chosen = [greedy_coreset(part, min(size, len(part))) for part in parts]
    union = torch.cat([part[indices] for part, (indices, _) in zip(parts, chosen, strict=True)])
    indices, radii = greedy_coreset(union, size)
    bound = max(float(own[-1]) for _, own in chosen) + float(radii[-1])
    at_once = greedy_coreset(features, size)[1][-1]
    return float(covering_radii(features, union[indices], [size])[0]), bound, float(at_once)


def test_a_merged_coreset_covers_within_four_times_the_best_radius() -> None:
    """The best that there is, by brute force, with centres among the vectors; these are at most as good as any."""
    for seed in range(40):
        features = torch.randn(12, 2, generator=seeded(seed), dtype=torch.float64)
        distance = torch.cdist(features, features)
        best = min(float(distance[list(centres)].amin(0).max()) for centres in combinations(range(12), 3))
        for num_shares in (2, 3, 4):
            radius, bound, at_once = covered(features, 3, num_shares)
            assert radius <= bound + 1e-9 <= 4 * best + 1e-8
            assert at_once <= 2 * best + 1e-9


def test_a_merged_coreset_is_hardly_worse_than_one_chosen_at_once() -> None:
    ratios = []
    for seed in range(10):
        centres = 4 * torch.randn(8, 16, generator=seeded(seed))
        features = centres.repeat(50, 1) + torch.randn(400, 16, generator=seeded(100 + seed))
        radius, bound, at_once = covered(features, 40, num_shares=4)
        assert radius <= bound + 1e-4
        ratios.append(radius / at_once)
    assert max(ratios) < 1.2
    assert sum(ratios) / len(ratios) < 1.1


def test_covering_radii_by_hand() -> None:
    line = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    assert covering_radii(line, torch.tensor([[0.0], [9.0], [5.0]]), [1, 2, 3]).tolist() == [9, 4, 1]
    assert covering_radii(line[:0], line, [1, 4]).tolist() == [0, 0]


def fapm(**changes: Any) -> FAPM:
    model = build("fapm", **changes)
    assert isinstance(model, FAPM)
    return model


def images() -> list[Batch]:
    return [*normals("fapm", seed=0), *normals("fapm", seed=30)]


def prepared_together(changes: dict[str, Any], shard: Shard, folder: Path) -> dict[str, Tensor]:
    model = fapm(**changes)
    model.prepare_together(images(), images()[shard.rank :: shard.world], shard)
    return {name: value.clone() for name, value in model.state_dict().items()}


def vectors_of(model: FAPM, batches: Iterable[Batch]) -> list[Tensor]:
    """Per layer (P, n, D)."""
    levels = zip(*(map(model.by_patch, model.features(batch.image)) for batch in batches), strict=True)
    return [torch.cat(level, dim=1) for level in levels]


@pytest.mark.parametrize("world", [2, 3])
def test_fapm_is_as_large_and_knows_its_true_radii(world: int, tmp_path: Path) -> None:
    states = together(world, tmp_path / "fapm", partial(prepared_together, {}))
    state, expected = states[0], fapm()
    for other in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in other.items())
    expected.prepare(images())
    for name, value in expected.state_dict().items():
        if name.startswith("backbone"):
            assert torch.equal(state[name], value)
    for layer, of_patches in enumerate(vectors_of(expected, images())):
        near, far = expected.bank_sizes(of_patches.shape[1])
        count, is_far = state[f"banks.{layer}.count"], state["far"][layer]
        assert count.tolist() == [far if each else near for each in is_far]
        assert is_far.any()
        for patch, vectors in enumerate(of_patches):
            kept = state[f"banks.{layer}.vectors"][patch, : count[patch]] + state[f"banks.{layer}.centre"][patch]
            radius = torch.cdist(vectors, kept, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max()
            assert float(state["radius"][layer, patch]) == pytest.approx(float(radius), rel=1e-4)
        ratio = state["near_radius"][layer] / expected.near_radius[layer]
        assert ratio.max() < 1.5
        assert ratio.min() > 0.67


def test_fapm_that_is_to_keep_everything_keeps_it(tmp_path: Path) -> None:
    changes = {"coreset_ratio": 1.0, "far_rule": {"name": "all"}}
    state, _ = together(2, tmp_path / "fapm", partial(prepared_together, changes))
    expected = fapm(**changes)
    expected.prepare(images())
    assert state["radius"].max() < 1e-3
    for layer in range(2):
        name = f"banks.{layer}.vectors"
        assert state[name].shape == expected.state_dict()[name].shape
        pairs = [(state[name] + state[f"banks.{layer}.centre"].unsqueeze(1)).sort(dim=1).values]
        own = expected.state_dict()
        pairs.append((own[name] + own[f"banks.{layer}.centre"].unsqueeze(1)).sort(dim=1).values)
        torch.testing.assert_close(*pairs, rtol=0, atol=1e-4)


def many_images() -> list[Batch]:
    return [batch for seed in range(0, 120, 30) for batch in normals("fapm", seed)]


def many_prepared_together(changes: dict[str, Any], shard: Shard, folder: Path) -> dict[str, Tensor]:
    model = fapm(**changes)
    model.prepare_together(many_images(), many_images()[shard.rank :: shard.world], shard)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("held_images", [4, 20])  # of 32; the shares have 16, which fit or do not
def test_fapm_of_more_images_than_are_held_covers_them_within_the_bound(held_images: int, tmp_path: Path) -> None:
    changes = {"held_images": held_images}
    first, second = together(2, tmp_path / "fapm", partial(many_prepared_together, changes))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    model = fapm(**changes)
    for layer, of_patches in enumerate(vectors_of(model, many_images())):
        capacity = of_patches.shape[1] * held_images // 32
        near, far = model.bank_sizes(capacity)
        count, is_far = first[f"banks.{layer}.count"], first["far"][layer]
        for patch, vectors in enumerate(of_patches):
            assert count[patch] <= (far if is_far[patch] else near)
            kept = first[f"banks.{layer}.vectors"][patch, : count[patch]] + first[f"banks.{layer}.centre"][patch]
            radii = greedy_coreset(vectors, capacity)[1]  # at least the best ones, which the bound is of
            slack = max(8 * radii[far - 1], 32 / 3 * radii[capacity - 1]) if held_images < 16 else 0
            (radius,) = covering_radii(vectors, kept, [len(kept)])
            assert radius <= 4 * radii[len(kept) - 1] + slack
            assert radius < 1.8 * radii[len(kept) - 1]
            if held_images > 16:
                assert float(first["radius"][layer, patch]) == pytest.approx(float(radius), rel=1e-4)


def test_fapm_of_equal_images_has_fewer_than_are_wanted_in_all_processes(tmp_path: Path) -> None:
    first, second = together(2, tmp_path / "fapm", equal_prepared_together)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (first["banks.0.count"] == 4).all()  # as many as the neighbours
    assert (first["radius"] < 1e-3).all()


def equal_prepared_together(shard: Shard, folder: Path) -> dict[str, Tensor]:
    model = fapm(held_images=1)
    batches = [batch_of(torch.full((4, 3, 64, 64), 0.5)) for _ in range(6)]
    model.prepare_together(batches, batches[shard.rank :: shard.world], shard)
    return {name: value.clone() for name, value in model.state_dict().items()}
