"""Coresets by greedy k-centre selection, vectors that stream by, and the distance to the nearest stored vectors.

Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018, Algorithm 1,
started at the first vector so that the result is a function of the data alone.

Squared distances are expanded, ‖q‖² + ‖m‖² - 2 q·m, which turns the work into matrix products (ten times faster than
`torch.cdist` on a CPU) but cancels: of equal vectors it leaves the root of a rounding error, 0.01 where a typical
distance is 15. Subtracting the mean of a group first cuts that. It is good enough to find the nearest stored vectors,
which lie farther apart than it errs (`_ROUNDING`); their distances are then taken of the differences, so that equal
vectors are at distance 0.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

# What the expansion leaves between identical vectors, relative to the largest squared norm: 20 to 60 times eps.
_ROUNDING = 4e-6

# Vectors that are compared with others at once: the distances of so many stay in the processor's cache.
_AT_ONCE = 1024

# The squared norm of a pad row. No real squared distance comes near it, and unlike infinity it never makes a NaN.
_NEVER_NEAREST = 1e30


def greedy_coreset(features: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Choose `size` rows of `features` (n, D), each the farthest from those chosen before it; the first is row 0.

    Returns the indices (size,) and the covering radii (size,): radius t is the largest distance from any row to the
    nearest of the first t + 1 chosen ones. The first m of a larger selection are the selection of size m. Once every
    distinct vector is chosen the radius is 0 and row 0 is repeated, so that any bank has the same shape. Distinct are
    vectors that the expansion can tell apart: at least a five-hundredth of the largest norm from one another.

    One group at a time: its vectors stay in the processor's cache, which a batched product over all groups defeats.
    """
    assert 1 <= size <= len(features), f"{size} of {len(features)} vectors"
    centred = features - features.mean(0)
    squared_norm = centred.square().sum(1)  # (n,)
    rounding = _ROUNDING * squared_norm.max()
    indices = torch.zeros(size, dtype=torch.long, device=features.device)
    radii = features.new_zeros(size)
    nearest = torch.full_like(squared_norm, torch.inf)  # (n,), squared
    for step in range(size):
        index = indices[step]
        distance = torch.addmv(squared_norm + squared_norm[index], centred, centred[index], alpha=-2)  # squared
        nearest = torch.minimum(nearest, distance.where(distance > rounding, 0.0))
        nearest[index] = 0.0
        radius, farthest = nearest.max(0)
        if radius == 0:
            break
        radii[step] = radius.sqrt()
        if step + 1 < size:
            indices[step + 1] = farthest
    return indices, radii


def covering_radii(features: Tensor, chosen: Tensor, sizes: Sequence[int]) -> Tensor:
    """The largest distance from any row of `features` (n, D) to the nearest of the first so many of `chosen` (m, D).

    One radius per size, (S,), sizes ascending; 0 where there is no row.
    """
    if len(features) == 0:
        return features.new_zeros(len(sizes))
    centre = chosen.mean(0)
    rows, centres = features - centre, chosen - centre
    nearest = torch.full_like(rows[:, 0], torch.inf)
    radii = []
    for start, end in pairwise([0, *sizes]):
        if end > start:
            nearest = torch.minimum(nearest, _to_nearest(rows, centres[start:end]))
        radii.append(nearest.max())
    return torch.stack(radii)


def _to_nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """The distances (n,) from `rows` (n, D) to the nearest of `centres` (m, D); the mean of all is about 0."""
    nearest = torch.full_like(rows[:, 0], torch.inf)
    for some in torch.split(centres, _AT_ONCE):
        offset = torch.addmm(some.square().sum(1), rows, some.T, alpha=-2)
        found = offset.argmin(1)  # ranked by the expansion; the distance is taken of the difference
        nearest = torch.minimum(nearest, torch.linalg.vector_norm(rows - some[found], dim=1))
    return nearest


class HeldVectors:
    """Vectors that stream by: all of them as long as they are at most `capacity`, then some that cover what was seen.

    An incremental k-centre clustering (Charikar, Chekuri, Feder, Motwani, "Incremental Clustering and Dynamic
    Information Retrieval", STOC 1997). Of more than `capacity` held vectors, h = `kept` of a greedy choice remain, or
    the first of these, as few as leave none farther than a threshold t from one that remains. From then on a vector
    within t of a held one is left out, so that the held ones are farther than t from one another.

    A vector is left out within the threshold of a held one. That one may be left out under a later threshold, within it
    of another, and so on. So nothing seen is farther from a held vector than `reach`, the sum of all thresholds. The
    next is the radius of the h, or a third of the sum before it where that is more: the sum stays within 4 t. Let r*_k
    be the smallest radius that k centres, wherever they lie, can have over all that was seen. If t is the radius of the
    h, these and the vector farthest from them are at least t apart, and two of them share one of the h best centres:
    t <= 2 r*_h. If it is a third of the sum, of at most 4 t' for the threshold t' before it, it is at most 4/3 t', and
    more than `capacity` vectors were farther than t' apart: t' < 2 r*_capacity. So, however many vectors there are,

        reach <= 4 t <= max(8 r*_h, 32/3 r*_capacity).

    The published algorithm doubles t each time, for 8 r*. That leaves few: of a patch of the demo's gears, a fifth to a
    twentieth of the vectors that remain here, where t grows in the first reductions by no more than it must.

    All of this but for rounding: t is at least what the expansion tells apart (`_ROUNDING`), so that it is not 0 where
    vectors repeat. What is held depends on how the stream is cut, for the number is looked at after each piece that is
    added, and after each `_AT_ONCE` of it.
    """

    def __init__(self, capacity: int, kept: int) -> None:
        assert 1 <= kept <= capacity, f"{kept} of {capacity} vectors"
        self.capacity = capacity
        self.kept = kept
        self.seen = 0
        self.threshold = 0.0  # until there are more than `capacity`
        self.reach = 0.0
        self.chunks: list[Tensor] = []  # (n, D), in the order in which they came

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def add(self, vectors: Tensor) -> None:
        """Look at vectors (n, D). At most `capacity` are held afterwards, and `_AT_ONCE` more meanwhile."""
        self.seen += len(vectors)
        for rows in torch.split(vectors, _AT_ONCE):
            self._hold(self._uncovered(rows) if self.threshold else rows)
            if len(self) > self.capacity:
                self._reduce()

    def _hold(self, rows: Tensor) -> None:
        # Each chunk is longer than the next, so that there are few, and a vector is copied a few times.
        while self.chunks and len(self.chunks[-1]) <= len(rows):
            rows = torch.cat([self.chunks.pop(), rows])
        if len(rows):
            self.chunks.append(rows)

    def _uncovered(self, rows: Tensor) -> Tensor:
        """Those farther than the threshold from all that is held, and from one another."""
        centre = self.chunks[0].mean(0)
        distances = [_to_nearest(rows - centre, chunk - centre) for chunk in self.chunks]
        far = rows[torch.stack(distances).amin(0) > self.threshold]
        return far[_apart(far, self.threshold)] if len(far) else far

    def _reduce(self) -> None:
        vectors = torch.cat(self.chunks)
        indices, radii = greedy_coreset(vectors, self.kept)
        rounding = (_ROUNDING * (vectors - vectors.mean(0)).square().sum(1).max()).sqrt()
        self.threshold = max(float(radii[-1]), self.reach / 3, float(rounding))
        self.reach += self.threshold
        number = 1 + int((radii > self.threshold).sum())  # the first so many have a radius of at most the threshold
        self.chunks = [vectors[indices[:number]]]


def _apart(rows: Tensor, threshold: float) -> Tensor:
    """Which of the rows (n, D), in turn, are farther than `threshold` from those that are before them, (n,) bool."""
    centred = rows - rows.mean(0)
    squared_norm = centred.square().sum(1)
    squared = torch.addmm(squared_norm + rearrange(squared_norm, "n -> n 1"), centred, centred.T, alpha=-2)
    covers = (squared <= threshold**2).tril(-1)  # (n, n): whether a row, were it chosen, would cover a later one
    chosen = torch.zeros_like(covers[0])
    undecided = ~chosen
    while undecided.any():  # a few rounds rather than n turns: a row is chosen once all that would cover it are decided
        now = undecided & ~(covers & undecided).any(1)
        chosen |= now
        undecided &= ~(now | (covers & now).any(1))
    return chosen


class MemoryBank(nn.Module):
    """The stored vectors of P groups, and the distances to the nearest of them; empty until `fill`.

    Groups hold different numbers of vectors; shorter ones are padded with rows that are never the nearest, so that the
    exported graph has static shapes. How many vectors there are is unknown before fitting, so a bank takes the saved
    shape when it is loaded.
    """

    centre: Tensor  # (P, D), subtracted from vectors and queries
    vectors: Tensor  # (P, M, D), centred, zero beyond `count`
    squared_norm: Tensor  # (P, M)
    count: Tensor  # (P,)

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(num_groups, channels))
        self.register_buffer("vectors", torch.zeros(num_groups, 0, channels))
        self.register_buffer("squared_norm", torch.zeros(num_groups, 0))
        self.register_buffer("count", torch.zeros(num_groups, dtype=torch.long))

    def fill(self, groups: Sequence[Tensor]) -> None:
        """Store the vectors (M_p, D) of each of the P groups."""
        num_groups, channels = self.centre.shape
        assert len(groups) == num_groups, f"{len(groups)} groups for {num_groups}"
        largest = max(len(group) for group in groups)
        self.centre = torch.stack([group.mean(0) for group in groups])
        self.vectors = self.centre.new_zeros(num_groups, largest, channels)
        self.squared_norm = self.centre.new_full((num_groups, largest), _NEVER_NEAREST)
        self.count = torch.tensor([len(group) for group in groups], device=self.centre.device)
        for index, group in enumerate(groups):
            centred = group - self.centre[index]
            self.vectors[index, : len(group)] = centred
            self.squared_norm[index, : len(group)] = centred.square().sum(1)

    def forward(self, queries: Tensor, neighbours: int, part: "Part | None" = None) -> Tensor:
        """Distances (P, Q, neighbours), ascending, from the queries (P, Q, D) to the stored vectors of their group.

        Every group must hold at least `neighbours` vectors. P are all groups, or those of a `part` of them.
        """
        centre, vectors, squared_norm = (
            stored if part is None else part.of(stored) for stored in (self.centre, self.vectors, self.squared_norm)
        )
        # Half precision would cost every digit of a small distance, so this stays in float32 under autocast too.
        with torch.autocast(queries.device.type, enabled=False):
            centred = queries.float() - rearrange(centre, "p d -> p 1 d")
            distances = [
                torch.linalg.vector_norm(centred - found, dim=-1)
                for found in _nearest(vectors, squared_norm, centred, neighbours)
            ]
            found = torch.stack(distances, dim=-1)
            # rounding may have ranked two the other way
            return found if neighbours == 1 else found.sort(dim=-1).values

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("vectors", "squared_norm"):
            saved, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if saved is not None and _but_size(saved) == _but_size(own):
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Part(NamedTuple):
    """One of so many equal parts of the groups."""

    number: Tensor  # (1,) int64, from 0
    of_all: int

    def of(self, stored: Tensor) -> Tensor:
        """Of what is stored by group (P, ...)."""
        by_part = rearrange(stored, "(t p) ... -> t p ...", t=self.of_all)
        return by_part.index_select(0, self.number).squeeze(0)


def _nearest(vectors: Tensor, squared_norm: Tensor, centred: Tensor, neighbours: int) -> Iterator[Tensor]:
    """The stored vectors (P, Q, D) nearest to the centred queries, then the next nearest, and so on.

    One after another: together they would be `neighbours` times the queries, which no cache holds.
    """
    # ‖m‖² - 2 m·q ranks as the distance does. The queries are transposed, for they are few: an exported file would hold
    # a transposed copy of the stored vectors.
    norms = rearrange(squared_norm, "p m -> p m 1")
    offset = torch.baddbmm(norms, vectors, rearrange(centred, "p q d -> p d q"), alpha=-2)
    if neighbours == 1:
        found = offset.min(dim=1).indices.unsqueeze(-1)  # a third less time than `argmin`, and half that of `topk`
    else:
        found = rearrange(offset, "p m q -> p q m").topk(neighbours, dim=-1, largest=False).indices
    num_groups, size, _ = vectors.shape
    first = rearrange(torch.arange(num_groups, device=found.device) * size, "p -> p 1 1")  # row of each group
    rows = rearrange(vectors, "p m d -> (p m) d")
    return (rows[index] for index in (found + first).unbind(-1))


def _but_size(stored: Tensor) -> tuple[int, ...]:
    """The shape without the number of vectors."""
    return (*stored.shape[:1], *stored.shape[2:])
