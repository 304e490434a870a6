"""A split that stays as it is while pictures are learnt: what was tested before is tested still, and nothing else.

Once people's verdicts join a category, its split is drawn no more: `learnt/split.json` says of every picture that was
there where it belongs. What comes later is never tested on. A good part joins those that are fitted or those that are
held out, by a hash, so that it stays there as more come: of its group where there are groups, else of its pixels. A
defect is known: no model learns from it, for nobody has marked where it is, but it helps to tell from which score on a
part may be rejected without a look (`pipelines.evaluation.review`). Copies of what is tested are left out.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.data.index import GOOD, MAY_BE_TESTED, PreparedIndex, Split
from pipelines.numbers import counted
from pipelines.pictures import images
from pipelines.preparation.config import PrepareConfig
from pipelines.preparation.listing import LEARNT, Findings, Listing, Masks, all_below, some
from pipelines.preparation.lookalikes import says_good
from pipelines.preparation.splits import Item, together, warn_groups, warn_test
from pipelines.records import Record

if TYPE_CHECKING:  # whoever looks for a layout alone need not wait for scipy
    from pipelines.preparation.decoding import Decoded

SPLIT_FILE = "split.json"
Place = tuple[Split, int | None]  # and the fold


class FrozenSplit(Record):
    """Contents of `learnt/split.json`."""

    format: Literal[1] = 1
    since: str  # ISO 8601
    images: dict[str, Split]  # by path
    folds: dict[str, int]  # likewise, with `prepare.holdout: folds`
    left_out: tuple[str, ...]  # pictures that were in no split: a published one may meet some of them twice

    @classmethod
    def of(cls, index: PreparedIndex, pictures: Iterable[str]) -> "FrozenSplit":
        """As `index` has it, of all `pictures` that there are."""
        images = {image.path: image.split for image in index.images}
        return cls(
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
            images=images,
            folds={image.path: image.fold for image in index.images if image.fold is not None},
            left_out=tuple(sorted(set(pictures) - images.keys())),
        )

    @classmethod
    def of_category(cls, source: Path) -> "FrozenSplit | None":
        """None where nothing was learnt.

        Raises:
            StageError: the file is damaged, or another version's.
        """
        path = source / LEARNT / SPLIT_FILE
        return cls.load(path, f"put it back as it was, or {_anew(source)}") if path.exists() else None

    def place(self, path: str) -> Place:
        return self.images[path], self.folds.get(path)


def _anew(source: Path) -> str:
    return f"remove {source / LEARNT}, and the test is drawn anew"


def with_learnt(source: Path, listing: Listing, findings: Findings) -> Listing:
    """With the pictures of `learnt/good/` and `learnt/<type of defect>/`, and those below."""
    folder = source / LEARNT
    if not folder.is_dir():
        return listing
    learnt, loose = dict[str, str](), list[str]()
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            defect = GOOD if says_good(entry.name) else entry.name
            learnt |= dict.fromkeys(all_below(source, f"{LEARNT}/{entry.name}", findings, lambda _: False), defect)
        elif entry.suffix.lower() in images.SUFFIXES and not images.is_litter(entry.name):
            loose.append(entry.name)
    if loose:
        findings.problem(
            f"{source}: images directly in {LEARNT} ({some(loose)}); move each into {LEARNT}/good or {LEARNT}/<defect>"
        )
    if not (folder / SPLIT_FILE).exists():
        if learnt:
            findings.problem(
                f"{source}: {LEARNT} holds pictures and no {SPLIT_FILE}, which says what is tested; move them to where "
                "the others of their kind are, and let `blemish learn` fill it"
            )
        return listing
    return replace(listing, learnt=learnt, split_file=folder / SPLIT_FILE)


def resplit(
    source: Path,
    frozen: FrozenSplit,
    listing: Listing,
    masks: Mapping[str, Masks],
    rows: "Decoded",
    groups: Mapping[str, str],
    config: PrepareConfig,
    findings: Findings,
) -> list[Item]:
    """Give every image the split that it had, and those that have come since theirs; in the order of the index."""
    pixels = rows.pixels
    old = {path: frozen.place(path) for path in listing.pictures if path in frozen.images}
    _tell_of_gone(source, frozen, old.keys(), findings)
    if listing.holdout is None and (config.holdout == "folds") != bool(frozen.folds):
        findings.problem(
            f"{source}: prepare.holdout = {config.holdout!r}, but the split is frozen since {frozen.since[:10]} with "
            f"{'folds' if frozen.folds else 'a share'}; set it back, or {_anew(source)}"
        )
    learners = [path for path, (split, _) in old.items() if split == "anomalous_train"]
    if learners and listing.masks is None:
        findings.problem(
            f"{source}: {counted(len(learners), 'defect')} to learn from since {frozen.since[:10]}, and no "
            f"{listing.mask_folder} that marks them; put it back, or {_anew(source)}"
        )
    new = _come_since(frozen, listing, rows, findings)
    good = [path for path, (split, _) in old.items() if split in ("train", "holdout")]
    _tell_of_contradictions(source, good, new, pixels, findings)
    originals = {pixels[path]: old[path] for path in good}
    copies = {path: originals[pixels[path]] for path in new if pixels[path] in originals}  # which take no other along
    placed = old | copies
    joining = [path for path in new if new[path] == GOOD and path not in copies]
    for unit in together(sorted([*good, *joining]), pixels, groups):
        place = next((old[path] for path in unit if path in old), None) or _drawn(unit, pixels, groups, frozen, config)
        placed |= {path: place for path in unit if path not in placed}
    placed |= {path: ("known", None) for path, defect in new.items() if defect != GOOD}
    labels = {**listing.anomalous, **listing.learnt}
    items = {
        split: [
            Item(path, split, labels.get(path, GOOD), masks.get(path), fold)
            for path, (own, fold) in sorted(placed.items())
            if own == split
        ]
        for split in ("train", "holdout", "anomalous_train", "withheld", "known", "test")
    }
    if not items["train"] or not (items["holdout"] or frozen.folds):
        findings.problem(f"{source}: too few of the good parts of before are there; put some back, or {_anew(source)}")
    _warn(items, listing, pixels, groups, findings)
    return [item for found in items.values() for item in found]


def _come_since(frozen: FrozenSplit, listing: Listing, rows: "Decoded", findings: Findings) -> dict[str, str]:
    """Path -> "good" or type of defect, of the pictures that the test has not, in whatever copy."""
    pixels, before = rows.pixels, {*frozen.images, *frozen.left_out}
    found = dict.fromkeys([*listing.training, *(listing.holdout or [])], GOOD) | dict(listing.anomalous)
    found |= listing.learnt
    new = {path: defect for path, defect in found.items() if path in rows.originals and path not in before}
    if untested := [path for path in listing.test_normal if path not in before]:
        findings.warnings.append(
            f"{counted(len(untested), 'picture')} left out, put to the test since {frozen.since[:10]}, when it was "
            f"frozen: {some(untested)}"
        )
    tested = {pixels[path]: path for path, split in frozen.images.items() if split in MAY_BE_TESTED and path in pixels}
    if met := [f"{path} = {tested[pixels[path]]}" for path in sorted(new) if pixels[path] in tested]:
        findings.warnings.append(f"{counted(len(met), 'picture')} left out, for the test has it: {some(met)}")
    return {path: defect for path, defect in new.items() if pixels[path] not in tested}


def _drawn(
    unit: list[str],
    pixels: Mapping[str, str],
    groups: Mapping[str, str],
    frozen: FrozenSplit,
    config: PrepareConfig,
) -> Place:
    """By a hash, so that the same pictures come to the same side whatever else is learnt."""
    key = min(groups.get(path) or pixels[path] for path in unit)
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    if frozen.folds:
        return "train", number % (max(frozen.folds.values()) + 1)
    return ("holdout" if config.holdout != "folds" and number < config.holdout * 2**64 else "train"), None


def _tell_of_gone(source: Path, frozen: FrozenSplit, here: Iterable[str], findings: Findings) -> None:
    gone = sorted(frozen.images.keys() - set(here))
    if tested := [path for path in gone if frozen.images[path] in MAY_BE_TESTED]:
        findings.problem(
            f"{source}: {counted(len(tested), 'picture')} of the test not there, which is frozen since "
            f"{frozen.since[:10]}: {some(tested)}; put them back, or {_anew(source)}"
        )
    if others := [path for path in gone if path not in tested]:
        findings.warnings.append(f"{counted(len(others), 'good part')} of before not there: {some(others)}")


def _tell_of_contradictions(
    source: Path, good: Iterable[str], new: Mapping[str, str], pixels: Mapping[str, str], findings: Findings
) -> None:
    """One picture, said to be good and said to be none."""
    passed = {pixels[path]: path for path in [*good, *(path for path in new if new[path] == GOOD)]}
    if found := [f"{path} = {passed[pixels[path]]}" for path in new if new[path] != GOOD and pixels[path] in passed]:
        findings.problem(
            f"{source}: {counted(len(found), 'defect')} also among the good parts, pixel by pixel: {some(found)}; "
            "remove what is wrong"
        )


def _warn(
    items: Mapping[str, list[Item]],
    listing: Listing,
    pixels: Mapping[str, str],
    groups: Mapping[str, str],
    findings: Findings,
) -> None:
    """As of a split that is drawn."""
    paths = {split: [item.path for item in found] for split, found in items.items()}
    test_normal = [item.path for item in items["test"] if item.defect == GOOD]
    tested = [item.path for item in items["test"] if item.defect != GOOD]
    held_out = paths["holdout"] or [item.path for item in items["train"] if item.fold is not None]
    warn_groups(held_out, test_normal, groups, findings)
    learnt_from = [*paths["train"], *paths["holdout"], *paths["anomalous_train"]]
    warn_test(learnt_from, test_normal, tested, listing, pixels, findings)
