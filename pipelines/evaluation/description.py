"""A run in words, for the top of its MLflow page: who has nothing else can name data, split, code and threshold."""

from collections.abc import Mapping, Sequence

from anomaly_models.common.settings import Tiles
from pipelines.evaluation.measures import METRICS
from pipelines.evaluation.outcomes import (
    NOTHING_TO_TEST_ON,
    DefectOutcome,
    Evaluation,
    GroupsOutcome,
    Protocol,
    ScoredImage,
    Threshold,
)
from pipelines.names import as_code, in_markdown
from pipelines.numbers import UNKNOWN, interval, percent, score

_SHOWN = 5  # images of each kind of error


def description(evaluation: Evaluation, tested: Sequence[ScoredImage], tags: Mapping[str, str]) -> str:
    """Markdown from what `evaluate` wrote, and the run's tags of the code."""
    wrong = [image for image in tested if image.label != (image.decision == "defect")]
    rows = {
        "Data": _data(evaluation),
        "Split": _split(evaluation),
        "Code": _code(tags),
        "Seed": str(evaluation.protocol.seed),
        "Variant": in_markdown(tags.get("variant", "")),
        "Threshold": _threshold(evaluation.threshold, evaluation.protocol.threshold_from),
        "Review": evaluation.review.text(evaluation.threshold.value),
        "Groups": _groups(evaluation.groups),
        "Missed defects": _images([image for image in wrong if image.label], lowest_first=True),
        "False alarms": _images([image for image in wrong if not image.label], lowest_first=False),
    }
    parts = [
        f"**{evaluation.model}** on **{in_markdown(evaluation.category)}**",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items() if text)]),
        _figures(evaluation) if evaluation.counts.num_tested else f"There is {NOTHING_TO_TEST_ON}.",
        _defects(evaluation.defects),
        "Pictures and curves are under `figures/`, the score of each image in `evaluation/predictions.csv`, the split "
        "in `data/index.json`, all packages in `environment/packages.txt`. 95 % intervals are over the test images.",
    ]
    return "\n\n".join(part for part in parts if part)


def _data(evaluation: Evaluation) -> str:
    name = in_markdown(f"{evaluation.data_set}/{evaluation.category}")
    return (
        f"{name}, SHA-256 of its files {evaluation.data_sha256[:16]}…, "
        f"resized to {evaluation.protocol.image_size} pixels ({_way(evaluation.protocol)}){_tiles(evaluation)}"
        f"{f'; pixel metrics on {region}' if (region := evaluation.protocol.region) else ''}"
    )


def _way(protocol: Protocol) -> str:
    return protocol.resize if protocol.fit == "stretch" else f"{protocol.resize}, {protocol.fit}"


def _tiles(evaluation: Evaluation) -> str:
    if evaluation.settings.get("tiles") is None:
        return ""
    tiles = Tiles.model_validate(evaluation.settings["tiles"])
    return f", seen in tiles of {tiles.side} that overlap by {tiles.overlap} or more"


def _split(evaluation: Evaluation) -> str:
    counts = evaluation.counts
    taken = f", {counts.apart} real defects apart, for models that learn from some" if counts.apart else ""
    tested = f"tested on {counts.test_normal} good and {counts.test_anomalous} defective ones"
    held_out = f"{counts.holdout} held out" if counts.holdout else "none held out (folds)"
    return (
        f"{counts.train} good images to fit, {held_out}{taken}; "
        f"{tested if counts.num_tested else 'no image to test on'}; "
        f"`data/index.json`, SHA-256 {evaluation.index_sha256[:16]}…"
    )


def _code(tags: Mapping[str, str]) -> str:
    if "git_commit" not in tags:
        return "outside git"
    changed = ", with changes that are not committed" if tags.get("git_dirty") == "true" else ""
    return f"commit {tags['git_commit']}{changed}"


def _threshold(threshold: Threshold, threshold_from: str) -> str:
    asked = f"{100 * threshold.rate_requested:g} % false alarms"
    set_for = f"set for {asked}"
    if not threshold.attainable:
        set_for = f"their highest, since {asked} take {threshold.num_images_needed} to promise"
    return (
        f"{threshold.value:.6g}: number {threshold.rank} from below of {threshold.num_images} {threshold_from}, "
        f"{set_for}; expected "
        f"{percent(threshold.expected_rate)} %, 95 % interval "
        f"{interval((threshold.interval_low, threshold.interval_high))} %. A score above it is a defect."
    )


def _groups(groups: GroupsOutcome | None) -> str:
    """What they say of the promise, and the tested ones with the most false alarms."""
    if groups is None:
        return ""
    tested = [
        f"{UNKNOWN if group.name is None else as_code(group.name)} {group.tested.false_alarms} of {group.tested.count}"
        for group in groups.worst_first()
        if group.tested
    ]
    more = [f"{len(tested) - _SHOWN} more"] if len(tested) > _SHOWN else []
    shown = f" False alarms of good test images: {', '.join([*tested[:_SHOWN], *more])}." if tested else ""
    return f"{in_markdown(groups.text[0].upper() + groups.text[1:])}.{shown}"


def _figures(evaluation: Evaluation) -> str:
    ends = evaluation.intervals
    lines = [
        f"| {metric.heading} | {percent(evaluation.known[metric.key])} | {interval(ends.get(metric.key))} |"
        for metric in METRICS
        if metric.key in evaluation.known
    ]
    return "\n".join(["| Metric | % | 95 % interval |", "| --- | ---: | ---: |", *lines]) if lines else ""


def _defects(defects: Mapping[str, DefectOutcome]) -> str:
    found = [f"{in_markdown(name)} {round(d.recall * d.count)} of {d.count}" for name, d in defects.items()]
    return f"Defects found: {', '.join(found)}." if found else ""


def _images(wrong: Sequence[ScoredImage], *, lowest_first: bool) -> str:
    """Images that were decided wrongly, the worst first."""
    ordered = sorted(wrong, key=lambda image: image.score, reverse=not lowest_first)
    shown = [f"{as_code(image.path)} ({score(image.score)})" for image in ordered[:_SHOWN]]
    more = [f"{len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    return ", ".join([*shown, *more]) or "none"
