"""How numbers are written, in tables, sentences and pages alike: shares in percent, what is not known as a dash."""

from collections.abc import Iterable, Sequence

UNKNOWN = "-"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def interval(ends: Sequence[float] | None) -> str:
    """Of shares, in percent."""
    return UNKNOWN if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"


def narrow_interval(ends: Sequence[float] | None) -> str:
    """The same in whole percent, where there is little room."""
    return UNKNOWN if ends is None else f"{100 * ends[0]:.0f}-{100 * ends[1]:.0f}"


def spread(mean: float, sd: float) -> str:
    """Mean and standard deviation of a share over several runs, in percent."""
    return f"{percent(mean)} ± {percent(sd)}"


def rate(share: float) -> str:
    """With its unit, which does not leave it at the end of a line."""
    return f"{100 * share:.3g}\u00a0%"


def score(value: float | None) -> str:
    """A score or a threshold, which has no unit."""
    return UNKNOWN if value is None else f"{value:.4g}"


def scores_apart(one: float, other: float) -> tuple[str, str]:
    """Two of them, with as many digits as it takes to see that they differ."""
    for digits in range(4, 18):
        texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if texts[0] != texts[1]:
            return texts
    return score(one), score(other)


def p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things: "1 image", "2 images"."""
    return f"1 {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def listed(words: Iterable[str]) -> str:
    """As in a sentence: "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def seconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"


def decimal(value: float | None) -> str:
    """Milliseconds, megabytes, images a second."""
    return UNKNOWN if value is None else f"{value:,.1f}"
