"""Whether the parts that come still score, and look, as the good parts did that the threshold comes from.

The test is sequential, and exact however few good parts were held out: a conformal test martingale in the procedure of
Shiryaev and Roberts (Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman, "Retrain or not retrain: conformal test
martingales for change-point detection", COPA 2021). Each part's value is ranked among those of the held-out good
parts and of all parts since. If all of them are exchangeable, the ranks are independent and uniform (Vovk, Nouretdinov
and Gammerman, ICML 2003), and no way of betting on them makes money: the Simple Jumper bets on ranks that are low, high
or as they should be, and now and then changes its mind. R becomes (1 + R) times what a stake would have become, once in
ten minutes, and a change is told when R reaches c. Without a change R less the number of looks is a martingale, so
that it takes c looks at least until a false alarm, on average: c is chosen for the false alarms in 30 days of work.

Of scores, those below the threshold alone are ranked: defects are no drift, and no one knows how many there will be.
(The threshold is the k-th of the held-out scores: the k - 1 below it and further good ones below it are exchangeable.)
"""

import bisect
import math
import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.inference.measures import MEASURES

SCORE = "score"
QUANTITIES = (SCORE, *MEASURES)
_FALSE_ALARMS = 0.1  # in 30 days of work, all quantities together, at most on average
BLOCK = 600  # seconds between two looks
_BLOCKS = 30 * 24 * 3600 // BLOCK
_MOST = 50  # parts between two looks, the first ones: of thousands, what changed is the usual case at the next look
_JUMP = 0.01  # share of the stake that is put elsewhere with each part; of the paper
_LONGEST = 100_000  # of such parts, after which it begins anew: their sorted list would grow for ever
_RECENT = 500  # parts, whose mean is told


@dataclass(frozen=True, slots=True)
class Change:
    """That a quantity is no longer what it was."""

    quantity: str
    is_higher: bool
    at: float  # seconds since 1970
    mean: float  # of the latest parts
    expected: float  # of the held-out good parts

    @property
    def text(self) -> str:
        direction = "higher" if self.is_higher else "lower"
        return (
            f"{self.quantity} is {direction} than of the good parts that the threshold comes from: {self.mean:.4g} on "
            f"average of late, {self.expected:.4g} then; look at camera, light and parts, and calibrate anew"
        )


class SequentialTest:
    """Of one quantity; it ends with the first change that it tells."""

    def __init__(self, quantity: str, reference: Sequence[float], looks: float) -> None:
        self.quantity = quantity
        self.change: Change | None = None
        self.number = 0  # of parts
        self._since_look = 0
        self._reference, self._looks = sorted(reference), looks
        self._random = random.Random(0)  # noqa: S311  # breaks ties; the same parts give the same answer
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._begin()

    def _begin(self) -> None:
        self._known = list(self._reference)
        self._stakes = [1 / 3] * 3  # on ranks that are high, as they should be, low
        self._statistic, self._gain = 0.0, 1.0

    @property
    def evidence(self) -> float:
        """0 where nothing speaks for a change, 1 where it is told; on a logarithmic scale."""
        if self.change is not None:
            return 1.0
        return min(math.log1p(self._statistic * self._gain) / math.log1p(self._looks), 1.0)

    @property
    def expected(self) -> float:
        return math.fsum(self._reference) / len(self._reference)

    @property
    def mean(self) -> float | None:
        return math.fsum(self._recent) / len(self._recent) if self._recent else None

    def add(self, value: float) -> None:
        """The next part's."""
        self.number += 1
        self._recent.append(value)
        self._since_look += 1
        if self.change is not None or self._since_look > _MOST:
            return
        below, up_to = bisect.bisect_left(self._known, value), bisect.bisect_right(self._known, value)
        rank = (below + self._random.random() * (up_to - below + 1)) / (len(self._known) + 1)
        self._known.insert(up_to, value)
        mixed = [(1 - _JUMP) * stake + _JUMP / 3 for stake in self._stakes]
        grown = [stake * (1 + bet * (rank - 0.5)) for stake, bet in zip(mixed, (1, 0, -1), strict=True)]
        total = math.fsum(grown)
        self._gain *= total
        self._stakes = [stake / total for stake in grown]

    def look(self, now: float) -> Change | None:
        """The end of a block: a change, if it is told now."""
        self._since_look = 0
        if self.change is not None:
            return None
        self._statistic, self._gain = (1 + self._statistic) * self._gain, 1.0
        if self._statistic >= self._looks:
            assert self.mean is not None
            self.change = Change(self.quantity, self._stakes[0] > self._stakes[2], now, self.mean, self.expected)
        elif len(self._known) > _LONGEST:
            self._begin()
        return self.change


class Monitor:
    """All quantities of the parts that a bundle decides on."""

    def __init__(self, calibration: Mapping[str, Sequence[float]], threshold: float) -> None:
        below = [score for score in calibration.get(SCORE, ()) if score < threshold]
        known = {**{name: calibration.get(name, ()) for name in MEASURES}, SCORE: below}
        looks = _BLOCKS * len(QUANTITIES) / _FALSE_ALARMS
        self.tests = {name: SequentialTest(name, known[name], looks) for name in QUANTITIES if len(known[name])}
        self._threshold = threshold
        self._block: int | None = None

    def add(self, now: float, values: Mapping[str, float]) -> list[Change]:
        """A part's values at a time (seconds since 1970); gives what is told now of all before it."""
        block, told = int(now // BLOCK), []
        if self._block is not None and block != self._block:
            told = [change for test in self.tests.values() if (change := test.look(now)) is not None]
        self._block = block
        for name, test in self.tests.items():
            value = values.get(name)
            if value is not None and (name != SCORE or value < self._threshold):
                test.add(value)
        return told

    @property
    def changes(self) -> list[Change]:
        """That were told."""
        return [test.change for test in self.tests.values() if test.change is not None]

    def replay(self, parts: Iterable[tuple[float, Mapping[str, float]]]) -> None:
        """Parts of before, in the order of their times."""
        for now, values in parts:
            self.add(now, values)
