import math
import warnings
from itertools import combinations, pairwise

import onnxruntime
import pytest
import torch
from drawn_batches import seeded
from torch import Tensor

from anomaly_models.common import memory_bank
from anomaly_models.common.memory_bank import HeldVectors, MemoryBank, greedy_coreset


@pytest.fixture
def features() -> Tensor:
    return torch.randn(120, 16, generator=seeded(0)) + 5


def brute_force(features: Tensor, size: int) -> tuple[list[int], list[float]]:
    """Section 3.1 as it is written, in double precision."""
    exact = features.double()
    nearest = (exact - exact[0]).norm(dim=1)
    indices, radii = [0], [float(nearest.max())]
    while len(indices) < size:
        indices.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (exact - exact[indices[-1]]).norm(dim=1))
        radii.append(float(nearest.max()))
    return indices, radii


def bank_of(*groups: Tensor) -> MemoryBank:
    bank = MemoryBank(len(groups), groups[0].shape[1])
    bank.fill(groups)
    return bank


def test_greedy_is_the_published_algorithm(features: Tensor) -> None:
    indices, radii = greedy_coreset(features, 40)
    expected_indices, expected_radii = brute_force(features, 40)
    assert indices.tolist() == expected_indices
    torch.testing.assert_close(radii, torch.tensor(expected_radii), rtol=1e-5, atol=0)


def test_greedy_starts_at_the_first_vector_and_repeats_none(features: Tensor) -> None:
    indices, radii = greedy_coreset(features, len(features))
    assert indices[0] == 0
    assert sorted(indices.tolist()) == list(range(len(features)))
    assert (radii.diff() <= 0).all()
    assert radii[-1] == 0 < radii[-2]


def test_smaller_coresets_are_prefixes(features: Tensor) -> None:
    indices, radii = greedy_coreset(features, 30)
    shorter_indices, shorter_radii = greedy_coreset(features, 11)
    assert torch.equal(indices[:11], shorter_indices)
    assert torch.equal(radii[:11], shorter_radii)


def test_centres_are_at_least_a_radius_apart(features: Tensor) -> None:
    indices, radii = greedy_coreset(features, 25)
    apart = torch.pdist(features[indices]).min()
    assert apart >= radii[-2] - 1e-5
    assert radii[-2] >= radii[-1]


def test_the_radius_is_at_most_twice_the_best_possible() -> None:
    few = torch.randn(11, 4, generator=seeded(3)) + 20 * torch.eye(4).repeat(3, 1)[:11]  # four clusters
    apart = torch.cdist(few, few)
    for size in range(2, 7):
        best = min(apart[list(centres)].amin(0).max() for centres in combinations(range(11), size))
        radius = greedy_coreset(few, size)[1][-1]
        assert best - 1e-5 <= radius <= 2 * best


def test_duplicates_are_covered_exactly() -> None:
    distinct = torch.randn(5, 512, generator=seeded(1)) * 3 + 40
    indices, radii = greedy_coreset(distinct.repeat(30, 1), 12)
    assert len(set(indices[:5].tolist())) == 5
    assert set((indices[:5] % 5).tolist()) == set(range(5))
    assert indices[5:].tolist() == [0] * 7  # every distinct vector is chosen: the first is repeated
    assert (radii[:4] > 0).all()
    assert (radii[4:] == 0).all()


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_identical_vectors_need_one_centre(value: float) -> None:
    indices, radii = greedy_coreset(torch.full((20, 64), value), 4)
    assert indices.tolist() == [0, 0, 0, 0]
    assert radii.tolist() == [0, 0, 0, 0]


def test_covering_radius_is_the_largest_distance_to_the_bank(features: Tensor) -> None:
    indices, radii = greedy_coreset(features, 20)
    distance = bank_of(features[indices])(features[None], 1)
    torch.testing.assert_close(distance.max(), radii[-1], rtol=1e-5, atol=0)


def test_distances_are_those_of_cdist_within_each_group(features: Tensor) -> None:
    groups = [features[:50], features[50:57], features[57:]]
    queries = torch.randn(3, 9, 16) + 5
    distance = bank_of(*groups)(queries, 4)
    for group, query, found in zip(groups, queries, distance, strict=True):
        expected = torch.cdist(query.double(), group.double()).sort(dim=1).values[:, :4]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_pad_rows_are_never_the_nearest(scale: float) -> None:
    short, long = torch.randn(4, 8) * scale, torch.randn(90, 8) * scale
    far_away = torch.full((2, 1, 8), 1e5 * scale)
    distance = bank_of(short, long)(far_away, 4)
    expected = torch.cdist(far_away[0], short).sort(dim=1).values
    torch.testing.assert_close(distance[0], expected, rtol=1e-3, atol=0)


def test_stored_vectors_are_at_distance_zero_far_from_the_origin() -> None:
    stored = torch.randn(60, 512, generator=seeded(2)) + 100
    assert (bank_of(stored)(stored[None], 1) == 0).all()


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1.0])
def test_distances_are_true_ones_and_sorted_however_near_the_vectors_are(spread: float) -> None:
    """Twenty distant vectors `spread` from one another, as a flat background's are, which a bank may rank wrongly."""
    drawn = torch.randn(60, 512, generator=seeded(3))
    near = 20 + spread * drawn[:40]
    stored, queries = torch.cat([3 * drawn[40:], near[:20]]), near[20:]
    distance = bank_of(stored)(queries[None], 4)[0]
    assert (distance.diff(dim=1) >= 0).all()
    true = torch.cdist(queries.double(), stored.double())
    rounding = 1e-6 * distance + 1e-8 * float(stored.norm(dim=1).max())
    assert ((distance[..., None] - true[:, None]).abs().amin(2) <= rounding).all()
    ranking_error = 1e-6 * (stored - stored.mean(0)).square().sum(1).max()
    smallest = true.sort(dim=1).values[:, :4]
    assert (distance.square() <= smallest.square() + ranking_error).all()


def test_the_exported_graph_gives_distance_zero_too() -> None:
    stored = torch.randn(2, 60, 512, generator=seeded(2)) + 100
    bank = bank_of(stored[0], stored[1, :50])
    queries = torch.cat([stored[:, :5], stored[:, 5:10] + torch.randn(2, 5, 512, generator=seeded(5))], dim=1)
    expected = bank(queries, 4)
    assert (expected[:, :5, 0] == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({1: torch.export.Dim("number", min=1)}, None)
        program = torch.onnx.export(bank, (queries, 4), dynamo=True, opset_version=18, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for number in (10, 3):
        (found,) = session.run(None, {"queries": queries[:, :number].numpy()})
        assert (found[:, :5, 0] == 0).all()
        torch.testing.assert_close(torch.from_numpy(found), expected[:, :number], rtol=1e-5, atol=0)


def test_distances_scale_with_the_features(features: Tensor) -> None:
    queries = features[None, :10] + 1
    torch.testing.assert_close(bank_of(3 * features[20:])(3 * queries, 4), 3 * bank_of(features[20:])(queries, 4))


def test_a_larger_bank_never_raises_a_distance(features: Tensor) -> None:
    queries = torch.randn(1, 30, 16) + 5
    smaller, larger = bank_of(features[:40])(queries, 4), bank_of(features)(queries, 4)
    assert (larger <= smaller + 1e-5).all()


def test_order_of_the_stored_vectors_does_not_matter(features: Tensor) -> None:
    queries = torch.randn(1, 30, 16) + 5
    shuffled = features[torch.randperm(len(features))]
    torch.testing.assert_close(bank_of(features)(queries, 4), bank_of(shuffled)(queries, 4), rtol=0, atol=1e-5)


def test_stays_in_single_precision_under_autocast(features: Tensor) -> None:
    bank, queries = bank_of(features), features[None, :5] + 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bank(queries, 2), bank(queries, 2).float())
        inside = bank(queries, 2)
    assert torch.equal(inside, bank(queries, 2))


def test_an_empty_bank_takes_the_saved_shape(features: Tensor) -> None:
    filled = bank_of(features[:50], features[50:57])
    fresh = MemoryBank(2, 16)
    fresh.load_state_dict(filled.state_dict())
    assert fresh.count.tolist() == [50, 7]
    assert torch.equal(fresh(features.expand(2, -1, -1), 3), filled(features.expand(2, -1, -1), 3))


def test_a_bank_of_other_groups_does_not_load(features: Tensor) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        MemoryBank(3, 16).load_state_dict(bank_of(features[:50], features[50:57]).state_dict())


# Vectors that stream by

CAPACITY, KEPT = 60, 20
AT_ONCE = 8


def late(number: int, scale: float) -> Tensor:
    """All about one place, and at the end a few far away."""
    vectors = torch.randn(number, 16, generator=seeded(4))
    vectors[-5:] += scale
    return vectors


def drifting(number: int, step: float) -> Tensor:
    walk = torch.randn(number, 16, generator=seeded(5)) + step * torch.arange(number)[:, None]
    return walk.roll(number // 3, dims=0)  # so that where it begins comes late


STREAMS = {
    "random": torch.randn(3000, 16, generator=seeded(0)) + 5,
    "of few dimensions": torch.randn(3000, 3, generator=seeded(1)),
    "clusters": torch.randn(3000, 8, generator=seeded(2))
    + 40 * torch.randn(9, 8, generator=seeded(3)).repeat(334, 1)[:3000],
    "drifting slowly": drifting(3000, 0.01),
    "drifting fast": drifting(3000, 1.0),
    "an outlier late": late(3000, 30.0),
    "an outlier late and far away": late(3000, 1e4),
    "equal": torch.full((3000, 16), 7.3),
    "zeros": torch.zeros(3000, 16),
    "few distinct": (3 * torch.randn(7, 16, generator=seeded(6)) + 40).repeat(430, 1),
    "half of them equal": torch.cat([torch.full((1500, 16), 2.0), torch.randn(1500, 16, generator=seeded(7))]),
    "growing": torch.randn(3000, 16, generator=seeded(8)) * 1.005 ** torch.arange(3000)[:, None],
    "one after another": torch.linspace(0, 1, 3000)[:, None] * torch.ones(16),
}


class Watched(HeldVectors):
    """Remembers how many it ever held, and its thresholds."""

    def __init__(self, capacity: int, kept: int) -> None:
        super().__init__(capacity, kept)
        self.most = 0
        self.thresholds: list[float] = []

    def _hold(self, rows: Tensor) -> None:
        super()._hold(rows)
        self.most = max(self.most, len(self))

    def _reduce(self) -> None:
        super()._reduce()
        self.thresholds.append(self.threshold)


def held_of(vectors: Tensor, batch: int = 13, capacity: int = CAPACITY, kept: int = KEPT) -> Watched:
    held = Watched(capacity, kept)
    for some in torch.split(vectors, batch):
        held.add(some)
    return held


def farthest(vectors: Tensor, held: HeldVectors) -> float:
    return float(torch.cdist(vectors.double(), torch.cat(held.chunks).double()).amin(1).max())


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bank, "_AT_ONCE", AT_ONCE)


def test_all_are_held_in_order_as_long_as_they_fit(features: Tensor) -> None:
    for batch in (1, 7, 120):
        held = held_of(features, batch, capacity=120)
        assert torch.equal(torch.cat(held.chunks), features)
        assert (held.seen, held.threshold, held.reach) == (120, 0, 0)


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("capacity", "kept"), [(CAPACITY, KEPT), (CAPACITY, 2), (CAPACITY, CAPACITY), (1, 1)])
def test_held_vectors_are_few_and_cover_what_streamed_by(stream: str, capacity: int, kept: int) -> None:
    vectors = STREAMS[stream]
    held = held_of(vectors, capacity=capacity, kept=kept)
    assert held.seen == len(vectors) >= 50 * capacity
    assert held.most <= capacity + AT_ONCE
    assert 1 <= len(held) <= capacity
    rows = torch.cat(held.chunks)
    assert torch.cdist(rows, vectors, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() == 0
    rounding = 1e-6 * float(vectors.norm(dim=1).max())
    assert farthest(vectors, held) <= held.reach + rounding
    assert held.reach <= 4 * held.threshold + rounding
    if held.threshold and len(held) > 1:
        assert torch.pdist(rows.double()).min() > 0.999 * held.threshold


@pytest.mark.parametrize("stream", STREAMS)
def test_the_reach_is_bounded_by_what_the_best_centres_would_have(stream: str) -> None:
    vectors = STREAMS[stream]
    held = held_of(vectors)
    radii = greedy_coreset(vectors, CAPACITY)[1]  # at least r*
    told_apart = 0.002 * float((vectors - vectors.mean(0)).norm(dim=1).max())
    assert held.reach <= max(8 * radii[KEPT - 1], 32 / 3 * radii[CAPACITY - 1], 4 * told_apart)


def best_radius(line: list[float], centres: int) -> float:
    """The smallest radius of so many centres, which may lie anywhere on the line: half of a distance on it."""

    def needed(radius: float) -> int:
        number, end = 0, -math.inf
        for place in sorted(line):
            if place > end:
                number, end = number + 1, place + 2 * radius
        return number

    radii = sorted({abs(one - other) / 2 for one in line for other in line})
    return next(radius for radius in radii if needed(radius + 1e-9) <= centres)


@pytest.mark.parametrize(
    "line",
    [
        torch.rand(150, generator=seeded(9)).tolist(),
        torch.arange(150.0).tolist(),
        torch.arange(150.0).flip(0).square().tolist(),
        [1.07**number for number in range(150)],
        [(-1.06) ** number for number in range(150)],
        [*range(40), *(100 + number / 7 for number in range(80)), *range(1000, 1030)],
    ],
)
@pytest.mark.parametrize(("capacity", "kept"), [(12, 6), (12, 2), (6, 6), (2, 1)])
def test_the_reach_is_within_the_bound_of_the_best_radii(line: list[float], capacity: int, kept: int) -> None:
    """Exactly, since on a line these are known."""
    held = held_of(torch.tensor(line).unsqueeze(1), batch=5, capacity=capacity, kept=kept)
    bound = max(8 * best_radius(line, kept), 32 / 3 * best_radius(line, capacity))
    assert held.reach <= bound * (1 + 1e-3)
    assert farthest(torch.tensor(line).unsqueeze(1), held) <= held.reach


@pytest.mark.usefixtures("few_at_once")
def test_a_place_that_appears_after_a_hundred_reductions_is_covered() -> None:
    growing = torch.randn(2400, 8, generator=seeded(10)) * 1.015 ** torch.arange(2400)[:, None]
    held = held_of(growing, capacity=20, kept=10)
    assert len(held.thresholds) >= 100
    place = torch.full((3, 8), 100 * float(growing.abs().max()))
    held.add(place)
    assert farthest(place, held) <= 1.001 * held.reach < 0.1 * float(place[0].norm())
    assert farthest(growing, held) <= 1.001 * held.reach


def test_thresholds_grow_in_the_first_reductions_as_the_radius_does() -> None:
    held = held_of(STREAMS["random"], capacity=300, kept=100)
    assert len(held.thresholds) >= 2
    assert held.reach == pytest.approx(sum(held.thresholds))
    assert all(1 <= later / earlier < 1.2 for earlier, later in pairwise(held.thresholds[:4]))


def test_what_is_held_covers_about_as_well_as_a_choice_among_all() -> None:
    vectors = STREAMS["random"]
    chosen, radii = greedy_coreset(vectors, 40)
    rows = torch.cat(held_of(vectors, capacity=400, kept=80).chunks)
    from_held = rows[greedy_coreset(rows, 40)[0]]
    radius = torch.cdist(vectors, from_held).amin(1).max()
    assert radius < 1.15 * radii[-1]
    mean, of_all = (torch.cdist(vectors, few).amin(1).mean() for few in (from_held, vectors[chosen]))
    assert mean < 1.1 * of_all


@pytest.mark.parametrize("size", [1, 2, 40])
def test_rows_are_taken_in_turn_unless_one_before_them_covers_them(size: int) -> None:
    rows = torch.randn(size, 3, generator=seeded(11))
    expected: list[int] = []
    for row in range(size):
        if all((rows[row] - rows[one]).norm() > 1 for one in expected):
            expected.append(row)
    assert memory_bank._apart(rows, 1.0).nonzero().flatten().tolist() == expected


def test_covering_does_not_depend_on_the_batches_between_two_reductions() -> None:
    """The stream's parts decide when the number is looked at, and nothing else."""
    first, later = STREAMS["random"][:500], STREAMS["random"][500:560]
    states = []
    for batch in (1, 60):
        held = HeldVectors(499, 100)
        held.add(first)
        for some in torch.split(later, batch):
            held.add(some)
        states.append(torch.cat(held.chunks))
    assert len(states[0]) > 100
    assert torch.equal(*states)
