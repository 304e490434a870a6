"""A folder of images in a supported layout -> resized uint8 arrays per split, with an index.

Layouts, found per category:

    mvtec    train/good, test/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png
    folder   normal, optional abnormal (images, or one folder per defect type), optional masks (mirrors abnormal)

A mask is `<stem>_mask` or `<stem>` with any image suffix. Without a folder of masks, a category has image labels only.
Masks are resized by the nearest pixel, images bilinearly and antialiased; neither keeps the aspect ratio.

Every problem of a category is found before one error lists them all, and nothing is kept of a category that has one.
"""

import contextlib
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator
from scipy import ndimage

from pipelines.errors import DatasetError, ImageError, StageError
from pipelines.files import atomic_folder, read_json, write_json
from pipelines.pictures import images

FORMAT = 2  # of a prepared folder; raised when what is written changes

Layout = Literal["mvtec", "folder"]
Split = Literal["train", "holdout", "anomalous_train", "test"]
SPLITS: tuple[Split, ...] = ("train", "holdout", "anomalous_train", "test")  # the order of an index

GOOD = "good"  # the defect type of a normal image

INDEX_FILE = "index.json"
_SILENTLY_IGNORED = frozenset({"license.txt", "readme.txt", "thumbs.db", "desktop.ini"})
_PROBLEMS_SHOWN = 10
_CHUNK = 64  # images decoded before the next are started: bounds memory, whatever the size of the category
_ANOMALY_STREAM = 1  # apart from the draws of normal images, which the same seed orders
_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class AnomalousTrainConfig(BaseModel):
    """Section `prepare.anomalous_train`: the real anomalies that supervised methods may learn from.

    They leave the test split for every model, so that all rows of a report are on the same test. `spread` is the
    published protocol of BGAD (Yao et al., CVPR 2023): count // T of each of the T types, the rest at random; at least
    half of each type stays. `one_type` is the open-set protocol: all from one type, drawn by the seed, and nothing else
    of that type is tested on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    count: NonNegativeInt  # per category, at the most
    protocol: Literal["spread", "one_type"]


class PrepareConfig(BaseModel):
    """Section `prepare` of `params.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    image_sizes: Annotated[list[PositiveInt], Field(min_length=1)]  # pixels; every size that a model asks for
    white_level: Annotated[int, Field(ge=1, le=65535)]  # 16-bit value shown as white
    holdout: Annotated[float, Field(gt=0, lt=1)]  # share of the normal training images
    test_normal: Annotated[float, Field(gt=0, lt=1)]  # share of `normal`, in the plain-folder layout only
    anomalous_train: AnomalousTrainConfig
    surfaces: list[str]  # categories that fill the image: no part stands out from a background
    seed: NonNegativeInt

    @field_validator("image_sizes")
    @classmethod
    def _unique(cls, sizes: list[int]) -> list[int]:
        if len(set(sizes)) != len(sizes):
            raise ValueError("sizes must differ from one another")
        return sizes


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """What is known about row i of the arrays."""

    path: str  # relative to the category's folder, posix
    split: Split
    label: bool  # True where anomalous
    defect: str  # "good", or the type of defect
    width: int  # of the upright original, pixels
    height: int
    mask: str | None  # relative to the category's folder, posix
    mask_row: int | None  # row in the arrays of masks


@dataclass(frozen=True, slots=True)
class PreparedIndex:
    """Contents of a prepared folder; `images[i]` describes row i of each `images_<size>.npy`."""

    category: str
    layout: Layout
    image_sizes: tuple[int, ...]
    white_level: int
    has_masks: bool
    surface: bool  # the category fills the image
    counts: Mapping[str, int]  # train, holdout, anomalous_train, test_normal, test_anomalous
    data_sha256: str  # of every image and mask used, with its path
    warnings: tuple[str, ...]  # one line each, for the user
    images: tuple[IndexedImage, ...]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the index of a prepared folder.

        Raises:
            StageError: the folder is missing, or was made by another version.
        """
        remedy = f"run `blemish prepare {folder.name}`"
        if not (folder / INDEX_FILE).is_file():
            raise StageError(f"{folder}: no prepared images; {remedy}")
        content = read_json(folder / INDEX_FILE)
        if (found := content.pop("format", None)) != FORMAT:
            raise StageError(f"{folder}: prepared in format {found}, this version reads {FORMAT}; {remedy}")
        return cls(
            **content
            | {
                "image_sizes": tuple(content["image_sizes"]),
                "warnings": tuple(content["warnings"]),
                "images": tuple(IndexedImage(**image) for image in content["images"]),
            }
        )

    def rows(self, split: Split) -> list[int]:
        return [row for row, image in enumerate(self.images) if image.split == split]


def images_file(folder: Path, size: int) -> Path:
    """Where a prepared folder holds its images (N, size, size, 3), uint8."""
    return folder / f"images_{size}.npy"


def masks_file(folder: Path, size: int) -> Path:
    """Where a prepared folder holds the masks of its anomalous images (M, size, size), bool; absent without masks."""
    return folder / f"masks_{size}.npy"


def prepare(
    source: Path, category: str, config: PrepareConfig, destination: Path, on_progress: Callable[[int, int], None]
) -> PreparedIndex:
    """Decode, check and resize the images of the category's folder `source` into the prepared folder `destination`.

    `on_progress` is told (images done, images in all). The same files give the same bytes.

    Raises:
        DatasetError: `source` cannot be used; the message lists every problem.
        ImageError: the same, when files that cannot be read are the only problem.
    """
    layout = _detect_layout(source)
    findings = _Findings()
    listing = _list_mvtec(source, findings) if layout == "mvtec" else _list_folder(source, findings)
    masks = _pair_masks(source, listing, findings)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = _digests(source, listing, masks, pool)
        items = _split(source, listing, masks, digests, config, findings)
        with atomic_folder(destination) as folder:
            originals = _write_arrays(source, items, config, folder, pool, on_progress, findings)
            findings.raise_problems(category)
            index = _index(category, layout, items, originals, digests, config, findings)
            write_json(folder / INDEX_FILE, {"format": FORMAT} | asdict(index))
    return index


@dataclass(frozen=True, slots=True)
class _Findings:
    """What is wrong with a category, and what its user should know; gathered so that all of it is told at once."""

    problems: list[DatasetError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, message: str) -> None:
        self.problems.append(DatasetError(message))

    def raise_problems(self, category: str) -> None:
        if not self.problems:
            return
        kind = ImageError if all(isinstance(problem, ImageError) for problem in self.problems) else DatasetError
        if len(self.problems) == 1:
            raise kind(f"category {category!r}: {self.problems[0]}")
        lines = [f"category {category!r} has {len(self.problems)} problems:"]
        lines += [f"  - {problem}" for problem in self.problems[:_PROBLEMS_SHOWN]]
        if len(self.problems) > _PROBLEMS_SHOWN:
            lines.append(f"  and {len(self.problems) - _PROBLEMS_SHOWN} more")
        raise kind("\n".join(lines))


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files of a category by role; paths are relative to its folder, posix, sorted."""

    training: list[str]  # normals to fit and to hold out
    test_normal: list[str]
    training_folder: str
    takes_test_normal: bool  # the layout has no normal test images of its own
    anomalous: dict[str, str]  # path -> type of defect
    anomalous_folder: str
    mask_folder: str
    masks: list[str] | None  # None: no such folder


@dataclass(frozen=True, slots=True)
class _Item:
    """An image on its way into the arrays."""

    path: str
    split: Split
    defect: str
    mask: str | None


@dataclass(slots=True)
class _Decoded:
    """An image, resized to every size, with its mask: filled as far as the files allow."""

    original: tuple[int, int] | None = None  # (width, height) of the upright original
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    problems: list[DatasetError] = field(default_factory=list)
    altered: list[tuple[int, str]] = field(default_factory=list)  # sizes at which the mask lost regions, and how


# ---------------------------------------------------------------------------------------------------------------- files


def _detect_layout(source: Path) -> Layout:
    if not source.is_dir():
        raise DatasetError(f"{source}: no such folder; put the images there or correct the path in params.yaml")
    mvtec, folder = (source / "train" / GOOD).is_dir(), (source / "normal").is_dir()
    if mvtec and folder:
        raise DatasetError(f"{source}: holds both train/{GOOD} and normal; keep one of the two layouts")
    if mvtec or folder:
        return "mvtec" if mvtec else "folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in source.iterdir())
    found = f"holds {_some(names)}" if names else "is empty"
    raise DatasetError(f"{source}: {found}; expected train/{GOOD} and test/ (as in MVTec AD), or normal/")


def _list_mvtec(source: Path, findings: _Findings) -> _Listing:
    _warn_unused(source, "", {"train", "test", "ground_truth"}, findings)
    _warn_unused(source, "train", {GOOD}, findings)
    test_normal: list[str] = []
    anomalous: dict[str, str] = {}
    if (source / "test").is_dir():
        stray, folders = _scan(source, "test", findings)
        if stray:
            findings.problem(f"{source}: images directly in test ({_some(stray)}); move each into test/<defect>")
        for folder in folders:
            paths = _leaf(source, folder, findings)
            defect = PurePosixPath(folder).name
            if defect == GOOD:
                test_normal = paths
                continue
            anomalous |= dict.fromkeys(paths, defect)
    return _Listing(
        training=_leaf(source, f"train/{GOOD}", findings),
        test_normal=test_normal,
        training_folder=f"train/{GOOD}",
        takes_test_normal=False,
        anomalous=anomalous,
        anomalous_folder="test",
        mask_folder="ground_truth",
        masks=_list_masks(source, "ground_truth", findings),
    )


def _list_folder(source: Path, findings: _Findings) -> _Listing:
    _warn_unused(source, "", {"normal", "abnormal", "masks"}, findings)
    anomalous: dict[str, str] = {}
    if (source / "abnormal").is_dir():
        paths, folders = _scan(source, "abnormal", findings)
        anomalous = dict.fromkeys(paths, "abnormal")
        for folder in folders:
            defect = PurePosixPath(folder).name
            if defect == GOOD:
                findings.problem(f"{source}: {folder} is a defect type called {GOOD!r}; move its images into normal")
            anomalous |= dict.fromkeys(_leaf(source, folder, findings), defect)
    return _Listing(
        training=_leaf(source, "normal", findings),
        test_normal=[],
        training_folder="normal",
        takes_test_normal=True,
        anomalous=anomalous,
        anomalous_folder="abnormal",
        mask_folder="masks",
        masks=_list_masks(source, "masks", findings),
    )


def _list_masks(source: Path, mask_folder: str, findings: _Findings) -> list[str] | None:
    if not (source / mask_folder).is_dir():
        return None
    masks, folders = _scan(source, mask_folder, findings)
    for folder in folders:
        masks += _leaf(source, folder, findings)
    return sorted(masks)


def _scan(source: Path, folder: str, findings: _Findings) -> tuple[list[str], list[str]]:
    """The images directly in a folder, and its sub-folders, both sorted; other files get a warning."""
    paths, folders, ignored = [], [], []
    for entry in sorted((source / folder).iterdir(), key=lambda entry: entry.name):
        relative = f"{folder}/{entry.name}"
        if not _is_unicode(relative):
            findings.problem(f"{source}: the name of {relative!a} is not UTF-8; rename it")
        elif entry.is_dir():
            if not entry.name.startswith("."):
                folders.append(relative)
        elif entry.suffix.lower() in images.SUFFIXES:
            paths.append(relative)
        elif not entry.name.startswith(".") and entry.name.lower() not in _SILENTLY_IGNORED:
            ignored.append(relative)
    if ignored:
        findings.warnings.append(f"{_count(len(ignored), 'file')} ignored, of no image type: {_some(ignored)}")
    return paths, folders


def _leaf(source: Path, folder: str, findings: _Findings) -> list[str]:
    """The images of a folder that holds nothing but images."""
    paths, folders = _scan(source, folder, findings)
    if folders:
        findings.problem(f"{source}: folders among the images of {folder} ({_some(folders)}); move them out")
    return paths


def _warn_unused(source: Path, folder: str, used: set[str], findings: _Findings) -> None:
    entries = sorted(entry.name for entry in (source / folder).iterdir() if entry.is_dir())
    unused = [f"{folder}/{name}".lstrip("/") for name in entries if name not in used and not name.startswith(".")]
    if unused:
        findings.warnings.append(f"folders that are not used: {_some(unused)}")


def _is_unicode(name: str) -> bool:
    """False for a name whose bytes the file system could not decode: JSON cannot hold it."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _some(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"1 {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


# ---------------------------------------------------------------------------------------------------------------- masks


def _pair_masks(source: Path, listing: _Listing, findings: _Findings) -> dict[str, str]:
    """Image -> mask, for every anomalous image; empty where the category has no masks at all."""
    if listing.masks is None:
        return {}
    owners: defaultdict[str, list[str]] = defaultdict(list)
    missing = []
    for path, found in _candidate_masks(listing, listing.masks).items():
        if not found:
            missing.append(path)
        if len(found) > 1:
            findings.problem(f"{source}: {path} has several masks ({_some(found)}); keep one")
        for mask in found:
            owners[mask].append(path)
    if missing:
        findings.problem(
            f"{source}: {_count(len(missing), 'defect image')} without a mask: {_some(missing)}; "
            f"add {listing.mask_folder}/.../<stem>_mask.png for each, or remove {listing.mask_folder} altogether"
        )
    for mask, paths in owners.items():
        if len(paths) > 1:
            findings.problem(f"{source}: {mask} fits several images ({_some(paths)}); give them different stems")
    if orphans := [mask for mask in listing.masks if mask not in owners]:
        findings.problem(
            f"{source}: {_count(len(orphans), 'mask')} without a defect image in {listing.anomalous_folder}: "
            f"{_some(orphans)}; add the images or remove the masks"
        )
    return {paths[0]: mask for mask, paths in owners.items()}


def _candidate_masks(listing: _Listing, masks: list[str]) -> dict[str, list[str]]:
    """Anomalous image -> the masks in the same place below the folder of masks, by the one stem or the other."""
    by_place: defaultdict[PurePosixPath, list[str]] = defaultdict(list)
    for mask in masks:
        by_place[PurePosixPath(mask).relative_to(listing.mask_folder).with_suffix("")].append(mask)
    candidates = {}
    for path in listing.anomalous:
        place = PurePosixPath(path).relative_to(listing.anomalous_folder).with_suffix("")
        candidates[path] = by_place[place.with_name(place.name + "_mask")] + by_place[place]
    return candidates


def _shrink_mask(mask: NDArray[np.bool_], size: int) -> tuple[NDArray[np.bool_], str | None]:
    """Resize a mask; also tell what became of its regions, None if there are as many as before.

    A mask that would come out empty keeps one pixel for each region, the one under its centroid: an anomalous image
    without an anomalous pixel would count against a model that finds it.
    """
    regions, before = ndimage.label(mask, structure=_EIGHT_CONNECTED)
    small = images.resize_mask(mask, size)
    if not small.any():
        centroids = np.array(ndimage.center_of_mass(mask, regions, range(1, before + 1)))  # (R, 2), pixel centres at .0
        rows, columns = ((centroids + 0.5) * size / mask.shape).astype(int).T
        small = np.zeros((size, size), dtype=bool)
        small[rows, columns] = True
        return small, "vanished, kept at the centroid"
    after = ndimage.label(small, structure=_EIGHT_CONNECTED)[1]
    return small, None if after >= before else f"{before} regions became {after}"


# --------------------------------------------------------------------------------------------------------------- splits


def _digests(source: Path, listing: _Listing, masks: Mapping[str, str], pool: ThreadPoolExecutor) -> dict[str, str]:
    """SHA-256 of every image and mask used, by path."""
    paths = [*listing.training, *listing.test_normal, *listing.anomalous, *masks.values()]
    return dict(zip(paths, pool.map(lambda path: _digest(source / path), paths), strict=True))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # decoding meets it again, and reports it
        return f"unreadable: {path}"


def _split(
    source: Path,
    listing: _Listing,
    masks: Mapping[str, str],
    digests: Mapping[str, str],
    config: PrepareConfig,
    findings: _Findings,
) -> list[_Item]:
    """Give every image its split, in the order of the index.

    Files of the same bytes stay together: an image that was fitted tells nothing when it is met again as held out.
    """
    rng = np.random.default_rng(config.seed)
    groups = _same_content(sorted(listing.training), digests)
    needed = 3 if listing.takes_test_normal else 2
    test_normal, holdout = listing.test_normal, []
    if len(groups) < needed:
        findings.problem(_too_few(source, listing, len(groups), needed))
    else:
        if listing.takes_test_normal:
            drawn, groups = _draw(groups, config.test_normal, reserve=2, rng=rng)
            test_normal = _flatten(drawn)
        drawn, groups = _draw(groups, config.holdout, reserve=1, rng=rng)
        holdout = _flatten(drawn)
    train = _flatten(groups)
    _warn_test(train + holdout, test_normal, listing, digests, findings)
    taught, tested = _draw_anomalies(source, listing.anomalous, digests, config, findings)
    return [
        *(_Item(path, "train", GOOD, None) for path in sorted(train)),
        *(_Item(path, "holdout", GOOD, None) for path in sorted(holdout)),
        *(_Item(path, "anomalous_train", listing.anomalous[path], masks.get(path)) for path in sorted(taught)),
        *(
            _Item(path, "test", listing.anomalous.get(path, GOOD), masks.get(path))
            for path in sorted([*test_normal, *tested])
        ),
    ]


def _draw_anomalies(
    source: Path,
    anomalous: Mapping[str, str],
    digests: Mapping[str, str],
    config: PrepareConfig,
    findings: _Findings,
) -> tuple[list[str], list[str]]:
    """Share the anomalies out: (those to learn from, those to test on). Files of the same bytes stay together."""
    by_type: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(anomalous):
        by_type[anomalous[path]].append(path)
    count = config.anomalous_train.count
    if count == 0 or not by_type:
        return [], list(anomalous)
    # A stream of its own: the normal images' splits are the same whatever is asked for here.
    rng = np.random.default_rng([config.seed, _ANOMALY_STREAM])
    types = {name: _shuffled(_same_content(paths, digests), rng) for name, paths in sorted(by_type.items())}
    if config.anomalous_train.protocol == "one_type":
        return _draw_one_type(source, types, count, rng, findings)
    taken = _spread(types, count, rng)
    if len(taken) < count:
        findings.warnings.append(
            f"{len(taken)} of {_count(len(anomalous), 'anomaly', 'anomalies')} to learn from, where "
            f"prepare.anomalous_train.count asks for {count}: at least half of each type is kept for the test"
        )
    return taken, [path for path in anomalous if path not in taken]


def _spread(types: Mapping[str, list[list[str]]], count: int, rng: np.random.Generator) -> list[str]:
    """`count` // T images of each of the T types and the rest from all that is left, at most half of each type."""
    room = {name: sum(map(len, groups)) // 2 for name, groups in types.items()}
    taken: list[str] = []
    left: list[tuple[str, list[str]]] = []
    for name, groups in types.items():
        share = min(count // len(types), room[name])
        for group in groups:
            if len(group) <= share:
                taken += group
                share -= len(group)
                room[name] -= len(group)
            else:
                left.append((name, group))
    for index in rng.permutation(len(left)):
        name, group = left[index]
        if len(group) <= min(room[name], count - len(taken)):
            taken += group
            room[name] -= len(group)
    return taken


def _draw_one_type(
    source: Path, types: Mapping[str, list[list[str]]], count: int, rng: np.random.Generator, findings: _Findings
) -> tuple[list[str], list[str]]:
    if len(types) < 2:
        findings.problem(
            f"{source}: one type of defect ({_some(types)}), but prepare.anomalous_train.protocol is one_type, which "
            "tests on the other types; take spread"
        )
        return [], []
    chosen = list(types)[rng.integers(len(types))]
    taken: list[str] = []
    for group in types[chosen]:
        if len(taken) + len(group) <= count:
            taken += group
    unused = sum(map(len, types[chosen])) - len(taken)
    findings.warnings.append(
        f"{_count(len(taken), 'anomaly', 'anomalies')} of type {chosen} to learn from, {unused} more of it in no "
        "split: one_type tests on the other types"
    )
    return taken, [path for name, groups in types.items() if name != chosen for path in _flatten(groups)]


def _shuffled(groups: list[list[str]], rng: np.random.Generator) -> list[list[str]]:
    return [groups[index] for index in rng.permutation(len(groups))]


def _same_content(paths: list[str], digests: Mapping[str, str]) -> list[list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[digests[path]].append(path)
    return list(groups.values())


def _draw(
    groups: list[list[str]], share: float, reserve: int, rng: np.random.Generator
) -> tuple[list[list[str]], list[list[str]]]:
    """Draw groups until they hold `share` of the images, rounded half up, and return (drawn, left).

    At least one is drawn and at least `reserve` are left. A group that would make too many images is passed over; where
    each would, the smallest is drawn.
    """
    num_images = sum(map(len, groups))
    wanted = min(max(math.floor(share * num_images + 0.5), 1), num_images - reserve)
    order = [int(position) for position in rng.permutation(len(groups))]
    chosen: set[int] = set()
    for position in order:
        if len(chosen) < len(groups) - reserve and len(groups[position]) <= wanted:
            chosen.add(position)
            wanted -= len(groups[position])
    if not chosen:
        chosen = {min(order, key=lambda position: len(groups[position]))}
    rest = [group for position, group in enumerate(groups) if position not in chosen]
    return [groups[position] for position in sorted(chosen)], rest


def _flatten(groups: list[list[str]]) -> list[str]:
    return [path for group in groups for path in group]


def _too_few(source: Path, listing: _Listing, found: int, needed: int) -> str:
    purpose = "to fit, to hold out and to test" if needed == 3 else "to fit and to hold out"
    if not listing.training:
        return (
            f"{source}: {listing.training_folder} holds no image; put at least {needed} normal images there, {purpose}"
        )
    number = _count(found, "image")
    return f"{source}: {listing.training_folder} holds {number} of different content; {purpose} takes at least {needed}"


def _warn_test(
    training: list[str], test_normal: list[str], listing: _Listing, digests: Mapping[str, str], findings: _Findings
) -> None:
    seen = {digests[path]: path for path in training}
    test = sorted([*test_normal, *listing.anomalous])
    if repeated := [f"{path} = {seen[digests[path]]}" for path in test if digests[path] in seen]:
        findings.warnings.append(f"{_count(len(repeated), 'test image')} met in training too: {_some(repeated)}")
    if not test_normal:
        findings.warnings.append("no normal image to test on: metrics that need both kinds cannot be computed")
    if not listing.anomalous:
        findings.warnings.append("no anomalous image to test on: metrics that need both kinds cannot be computed")


# --------------------------------------------------------------------------------------------------------------- arrays


def _write_arrays(
    source: Path,
    items: list[_Item],
    config: PrepareConfig,
    folder: Path,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[int, int], None],
    findings: _Findings,
) -> list[tuple[int, int]]:
    """Write the arrays row by row, so that memory stays bounded; return the (width, height) of each original.

    Written as a plain stream: a full disk raises, where a memory map would kill the process.
    """
    altered: defaultdict[int, list[str]] = defaultdict(list)
    originals: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        image_files, mask_files = _open_arrays(items, config, folder, stack)
        for done, (item, decoded) in enumerate(zip(items, _decode_all(source, items, config, pool), strict=True), 1):
            findings.problems.extend(decoded.problems)
            for size, what in decoded.altered:
                altered[size].append(f"{item.mask} ({what})")
            if not decoded.problems and decoded.original is not None:
                originals.append(decoded.original)
                for image_file, image in zip(image_files, decoded.images, strict=True):
                    image_file.write(image.tobytes())
                for mask_file, mask in zip(mask_files if item.mask else [], decoded.masks, strict=True):
                    mask_file.write(mask.tobytes())
            on_progress(done, len(items))
    for size in sorted(altered):
        masks = _count(len(altered[size]), "mask")
        findings.warnings.append(f"{masks} with fewer regions at {size} pixels: {_some(altered[size])}")
    return originals


def _open_arrays(
    items: list[_Item], config: PrepareConfig, folder: Path, stack: contextlib.ExitStack
) -> tuple[list[BinaryIO], list[BinaryIO]]:
    """Begin the arrays of images and of masks, one of each per size."""
    num_masks = sum(item.mask is not None for item in items)
    image_files, mask_files = [], []
    for size in config.image_sizes:
        shape = (len(items), size, size, 3)
        image_files.append(stack.enter_context(_array_file(images_file(folder, size), shape, np.uint8)))
        if num_masks:
            shape_of_masks = (num_masks, size, size)
            mask_files.append(stack.enter_context(_array_file(masks_file(folder, size), shape_of_masks, np.bool_)))
    return image_files, mask_files


@contextlib.contextmanager
def _array_file(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[BinaryIO]:
    """Begin a .npy file; its rows follow in order."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _decode_all(
    source: Path, items: list[_Item], config: PrepareConfig, pool: ThreadPoolExecutor
) -> Iterator[_Decoded]:
    for start in range(0, len(items), _CHUNK):
        yield from pool.map(lambda item: _decode(source, item, config), items[start : start + _CHUNK])


def _decode(source: Path, item: _Item, config: PrepareConfig) -> _Decoded:
    decoded = _Decoded()
    try:
        rgb = images.load_rgb(source / item.path, config.white_level)
        decoded.original = (rgb.shape[1], rgb.shape[0])
        decoded.images = [images.resize_rgb(rgb, size) for size in config.image_sizes]
    except ImageError as error:
        decoded.problems.append(error)
    if item.mask is None:
        return decoded
    try:
        mask = _load_mask(source, item, decoded.original)
    except DatasetError as error:
        decoded.problems.append(error)
        return decoded
    for size in config.image_sizes:
        small, what = _shrink_mask(mask, size)
        decoded.masks.append(small)
        if what is not None:
            decoded.altered.append((size, what))
    return decoded


def _load_mask(source: Path, item: _Item, original: tuple[int, int] | None) -> NDArray[np.bool_]:
    """The mask of an image whose (width, height) is `original`, None where the image cannot be read."""
    assert item.mask is not None
    path = source / item.mask
    mask = images.load_mask(path)
    height, width = mask.shape
    if original is not None and (width, height) != original:
        raise DatasetError(
            f"{path}: the mask is {width} x {height} pixels, its image {item.path} {original[0]} x {original[1]}; "
            "export it at the size of the image"
        )
    if not mask.any():
        raise DatasetError(
            f"{path}: the mask is all black, its image {item.path} is among the defects; mark the defect"
        )
    return mask


# ---------------------------------------------------------------------------------------------------------------- index


def _index(
    category: str,
    layout: Layout,
    items: list[_Item],
    originals: list[tuple[int, int]],
    digests: Mapping[str, str],
    config: PrepareConfig,
    findings: _Findings,
) -> PreparedIndex:
    mask_rows = {item.path: row for row, item in enumerate(item for item in items if item.mask is not None)}
    entries = tuple(
        IndexedImage(
            path=item.path,
            split=item.split,
            label=item.defect != GOOD,
            defect=item.defect,
            width=width,
            height=height,
            mask=item.mask,
            mask_row=mask_rows.get(item.path),
        )
        for item, (width, height) in zip(items, originals, strict=True)
    )
    return PreparedIndex(
        category=category,
        layout=layout,
        image_sizes=tuple(config.image_sizes),
        white_level=config.white_level,
        has_masks=bool(mask_rows),
        surface=category in config.surfaces,
        counts={
            "train": sum(entry.split == "train" for entry in entries),
            "holdout": sum(entry.split == "holdout" for entry in entries),
            "anomalous_train": sum(entry.split == "anomalous_train" for entry in entries),
            "test_normal": sum(entry.split == "test" and not entry.label for entry in entries),
            "test_anomalous": sum(entry.split == "test" and entry.label for entry in entries),
        },
        data_sha256=_data_digest(digests),
        warnings=tuple(findings.warnings),
        images=entries,
    )


def _data_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 over the lines `<SHA-256 of the file>  <path>` sorted by path, as `sha256sum` writes them."""
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
