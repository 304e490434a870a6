"""A histogram of float32 scores whose bins follow the scores: as fine as its room allows, exact where that suffices.

A score's key is its bit pattern as an integer in the order of the scores. Keys with the same leading bits are a page.
Of each page the lowest and the highest key met are known, and so many trailing bits of its keys are dropped that it has
at most `most` bins; `most` is one number for all pages, the largest power of two for which they fit into the room. So
scores in a narrow band, of which float32 has few, keep a bin each, whatever else there is.

Layout and counts are functions of what was counted, not of the order: a page's range only grows, with it `most` only
falls, and the bits dropped only become more. Counts are integers. Parts that are merged end where the whole does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.regions import Pixels

Integers = NDArray[np.int64]

_KEY_BITS = 32
_LEAST_BITS = 4  # of the bins of a page: `most` is 16 or more, so that no more than all bits of the room are dropped
REGION = 2**44  # a whole region, in the integers that its pixels share it in: half a million of them fit into a bin


def keys_of(scores: NDArray[np.float32]) -> Integers:
    """Integers in [0, 2^32), ordered as the scores are."""
    return _flipped(scores.view(np.int32)).astype(np.int64) + 2 ** (_KEY_BITS - 1)


def scores_of(keys: Integers) -> NDArray[np.float32]:
    return _flipped((keys - 2 ** (_KEY_BITS - 1)).astype(np.int32)).view(np.float32)


def _flipped(pattern: NDArray[np.int32]) -> NDArray[np.int32]:
    """Its own inverse. A float32 read as a signed integer is in order but for the negatives, which run backwards."""
    flipped: NDArray[np.int32] = pattern ^ ((pattern >> 31) & np.int32(0x7FFFFFFF))
    return flipped


class Ranges(NamedTuple):
    """The keys met in each page, (pages,): above the highest possible and below 0 where there are none."""

    low: Integers
    high: Integers

    @classmethod
    def empty(cls, bits: int) -> "Ranges":
        """For 2^bits bins."""
        pages = 2 ** (bits - _LEAST_BITS)
        return cls(np.full(pages, 2**_KEY_BITS), np.full(pages, -1))

    def with_keys(self, keys: Integers) -> "Ranges":
        page = keys >> _page_shift(len(self.low))
        beyond = (keys < self.low[page]) | (keys > self.high[page])
        low, high = self.low.copy(), self.high.copy()
        np.minimum.at(low, page[beyond], keys[beyond])
        np.maximum.at(high, page[beyond], keys[beyond])
        return Ranges(low, high)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which bin a key belongs to: bins are numbered as the scores ascend."""

    dropped: Integers  # (pages,) trailing bits
    start: Integers  # (pages,) the bin of a page's key, without those bits, less that key
    num_bins: int

    @classmethod
    def of(cls, ranges: Ranges, bits: int) -> "Layout":
        pages = np.flatnonzero(ranges.high >= 0)
        low, high = ranges.low[pages], ranges.high[pages]
        widths = high - low + 1
        most = 2 ** _page_shift(len(ranges.low))
        # Not by the bins in use: dropping a bit halves these, and `most` could rise again.
        while np.minimum(widths, most).sum() > 2**bits:
            most //= 2
        dropped = np.zeros_like(pages)
        while (wide := (high >> dropped) - (low >> dropped) >= most).any():
            dropped += wide
        sizes = (high >> dropped) - (low >> dropped) + 1
        ends = np.cumsum(sizes)
        of_page = np.zeros((2, len(ranges.low)), dtype=np.int64)
        of_page[:, pages] = dropped, ends - sizes - (low >> dropped)
        return cls(of_page[0], of_page[1], num_bins=int(sizes.sum()))

    def bins(self, keys: Integers) -> Integers:
        page = keys >> _page_shift(len(self.start))
        return self.start[page] + (keys >> self.dropped[page])


class Counts(NamedTuple):
    """Pixels by key, each (B,)."""

    keys: Integers  # the lowest of each bin, or of single scores
    normal: Integers
    anomalous: Integers
    overlap: Integers  # each anomalous pixel counts REGION times its weight


class Histogram:
    """Counts in at most 2^bits bins."""

    def __init__(self, bits: int, ranges: Ranges, counts: Counts) -> None:
        """Of counts whose keys lie in `ranges`, up to trailing bits that were dropped there."""
        self._bits = bits
        self._lay_out(ranges, counts)

    def add(self, images: Sequence[Pixels]) -> None:
        normal = keys_of(np.concatenate([image.normal for image in images]))
        anomalous = keys_of(np.concatenate([image.anomalous for image in images]))
        weights = np.concatenate([image.weights for image in images])
        ranges = self.ranges.with_keys(normal).with_keys(anomalous)
        if not all(map(np.array_equal, ranges, self.ranges)):
            self._lay_out(ranges, self.counts())
        self._normal += np.bincount(self._layout.bins(normal), minlength=self._layout.num_bins)
        bins = self._layout.bins(anomalous)
        self._anomalous += np.bincount(bins, minlength=self._layout.num_bins)
        np.add.at(self._overlap, bins, np.rint(REGION * weights).astype(np.int64))

    def counts(self) -> Counts:
        """Of the bins that are not empty, from the lowest scores to the highest."""
        kept = np.flatnonzero(self._normal + self._anomalous)
        return Counts(self._keys(kept), self._normal[kept], self._anomalous[kept], self._overlap[kept])

    def _lay_out(self, ranges: Ranges, counts: Counts) -> None:
        self.ranges = ranges
        self._layout = Layout.of(ranges, self._bits)
        bins = self._layout.bins(counts.keys)
        tables = np.zeros((3, self._layout.num_bins), dtype=np.int64)
        for table, values in zip(tables, counts[1:], strict=True):
            np.add.at(table, bins, values)
        self._normal, self._anomalous, self._overlap = tables

    def _keys(self, bins: Integers) -> Integers:
        """The lowest key of each bin (B,), ascending."""
        low, high = self.ranges
        dropped = self._layout.dropped
        sizes = np.where(high >= 0, (high >> dropped) - (low >> dropped) + 1, 0)
        page = np.repeat(np.arange(len(sizes)), sizes)[bins]
        keys: Integers = (bins - self._layout.start[page]) << dropped[page]
        return keys


def _page_shift(num_pages: int) -> int:
    """Trailing bits that keys of one page differ in."""
    return _KEY_BITS - num_pages.bit_length() + 1
