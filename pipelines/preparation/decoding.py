"""Every picture and mask of a category, decoded once: what is known of each, and its rows in temporary files.

Which split a picture belongs to depends on the pixels of all, for copies stay together. So rows are written in the
order of the files first, and put into the order of the index when that is known: memory stays bounded.

Masks are resized by the nearest pixel, images antialiased; both come into a frame in the same way.
"""

import contextlib
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_models.common.sizes import Size
from pipelines.errors import DatasetError, ImageError
from pipelines.numbers import counted
from pipelines.pictures import images
from pipelines.pictures.frames import Frame, Shape, greyed, size_of
from pipelines.pictures.reading import Reading
from pipelines.preparation.config import PrepareConfig
from pipelines.preparation.listing import Findings, Listing, Masks, Saturation, some
from pipelines.preparation.lookalikes import is_black_and_white, is_nearly_black_and_white, masks_beside, same_stems
from pipelines.threads import in_order

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)
_MASK = Reading(0, 255, "refuse", page=None, dicom_window="file", max_megapixels=None)  # a byte's value is what it says
_MOST_OF_A_PICTURE = 0.5  # marked by a mask: it may be inverted


class Spool:
    """Rows of one length in a temporary file, found again by the path of their picture."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}  # (offset, length)

    def append(self, path: str, row: NDArray[np.generic]) -> None:
        content = row.tobytes()
        self._places[path] = self._file.tell(), len(content)
        self._file.write(content)

    def row(self, path: str) -> bytes:
        offset, length = self._places[path]
        self._file.seek(offset)
        return self._file.read(length)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A category's pictures, by their paths."""

    images: Mapping[Frame, Spool]  # rows (height, width, 3), uint8
    masks: Mapping[Shape, Spool]  # rows (height, width), bool, of the pictures that have a mask
    originals: dict[str, tuple[int, int]] = field(default_factory=dict)  # (width, height), upright; of readable ones
    pixels: dict[str, str] = field(default_factory=dict)  # SHA-256 of the upright RGB pixels and their shape
    findings: Findings = field(default_factory=Findings)
    shrunk: dict[Shape, str] = field(default_factory=dict)  # a warning of masks that lost regions in it
    saturations: dict[str, int] = field(default_factory=dict)  # by mask, pixels of the original; of MVTec LOCO alone


def mask_shapes(frames: Sequence[Frame]) -> list[Shape]:
    """Masks are resized by the nearest pixel, whatever the images are by."""
    return list(dict.fromkeys(frame.shape for frame in frames))


@contextlib.contextmanager
def decoded(
    source: Path,
    listing: Listing,
    masks: Mapping[str, Masks],
    config: PrepareConfig,
    frames: Sequence[Frame],
    of_interest: NDArray[np.bool_] | None,
    folder: Path,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[int, int], None],
) -> Iterator[Decoded]:
    """Decode all pictures of a listing, with their `masks`; the rows are in `folder` until the block ends.

    Of each, what lies outside of the region `of_interest`, (H, W), is left out.
    """
    good = [*listing.training, *(listing.holdout or [])]
    paths = [*sorted(good), *sorted([*listing.test_normal, *listing.anomalous]), *sorted(listing.learnt)]
    with contextlib.ExitStack() as stack:

        def spool() -> Spool:
            return Spool(stack.enter_context(tempfile.TemporaryFile(dir=folder)))

        image_rows = {frame: spool() for frame in frames}
        mask_rows = {shape: spool() for shape in mask_shapes(frames)}
        result = Decoded(image_rows, mask_rows)
        pictures = []

        def decode(path: str) -> _Picture:
            return _decode(source, path, masks.get(path, ()), listing.saturations, config, frames, of_interest)

        jobs = in_order(decode, paths, pool)
        for done, picture in enumerate(jobs, 1):
            _keep(picture, result)
            pictures.append(picture.without_rows())
            on_progress(done, len(paths))
        _tell_of_lookalikes(source, listing, pictures, result.findings)
        if of_interest is not None:
            _tell_of_other_sizes(source, pictures, size_of(of_interest), result.findings)
        _tell_of_too_large(source, pictures, frames, result.findings)
        _tell_of_masks(pictures, result.findings)
        result.shrunk.update(_told_of_shrinking(pictures))
        _tell_of_range(source, pictures, config, result.findings)
        yield result


@dataclass(slots=True)
class _Picture:
    """A picture with its mask: filled as far as the files allow."""

    path: str
    masks: Masks
    original: tuple[int, int] | None = None
    pixels: str = ""
    highest: int | None = None  # value in the file, of more than 8 bits only
    black_and_white: bool = False  # two values, as a mask
    nearly_so: bool = False
    turned_alone: bool = False  # by EXIF, without its mask, in a way that leaves the shape
    marked: float = 0.0  # share of the picture that the mask marks
    image_rows: list[NDArray[np.uint8]] = field(default_factory=list)
    mask_rows: list[NDArray[np.bool_]] = field(default_factory=list)
    altered: list[tuple[Shape, str]] = field(default_factory=list)  # frames in which the mask lost regions, and how
    saturations: dict[str, int] = field(default_factory=dict)  # by mask
    problems: list[DatasetError] = field(default_factory=list)

    @property
    def mask_name(self) -> str:
        """For messages: of several masks, what they have in common."""
        return self.masks[0] if len(self.masks) == 1 else str(PurePosixPath(self.masks[0]).parent)

    def without_rows(self) -> "_Picture":
        self.image_rows, self.mask_rows = [], []
        return self


def _decode(
    source: Path,
    path: str,
    masks: Masks,
    saturations: Mapping[int, Saturation] | None,
    config: PrepareConfig,
    frames: Sequence[Frame],
    of_interest: NDArray[np.bool_] | None,
) -> _Picture:
    result, shapes = _Picture(path, masks, pixels=f"unreadable: {path}"), mask_shapes(frames)
    try:
        picture = images.read(source / path, config.reading)
        height, width = picture.rgb.shape[:2]
        result.original = width, height
        digest = hashlib.sha256(np.ascontiguousarray(picture.rgb).data)
        digest.update(f"{width} x {height}".encode())
        result.pixels = digest.hexdigest()
        result.highest = picture.highest
        result.black_and_white = is_black_and_white(picture.rgb)
        result.nearly_so = is_nearly_black_and_white(picture.rgb)
        fits = of_interest is None or picture.rgb.shape[:2] == of_interest.shape
        rgb = greyed(picture.rgb, of_interest) if fits else picture.rgb
        if all(shape.holds(size_of(rgb)) for shape in shapes):
            result.image_rows = [frame.fitted(rgb) for frame in frames]
    except ImageError as error:
        result.problems.append(error)
    if not masks:
        return result
    try:
        if saturations is not None:
            found = {mask: _saturation(source / mask, saturations, config.max_megapixels) for mask in masks}
            result.saturations.update(found)
        marked = _load_masks(source, path, masks, result.original, config.max_megapixels)
    except DatasetError as error:
        result.problems.append(error)
        return result
    result.marked = float(marked.mean())
    if result.original is not None:
        result.turned_alone = _is_turned_alone(source / path, config.page, source / masks[0], marked.shape)
    if of_interest is not None and marked.shape == of_interest.shape:
        marked = marked & of_interest
    for shape in shapes if result.image_rows else ():
        small, what = _fit_mask(marked, shape)
        result.mask_rows.append(small)
        if what is not None:
            result.altered.append((shape, what))
    return result


def _load_masks(
    source: Path, path: str, masks: Masks, original: tuple[int, int] | None, max_megapixels: int
) -> NDArray[np.bool_]:
    """All that the masks of a picture mark; its (width, height) is `original`, None where it cannot be read."""
    marked = _load_mask(source, path, masks[0], original, max_megapixels)
    for mask in masks[1:]:
        marked = marked | _load_mask(source, path, mask, original, max_megapixels)
    return marked


def _load_mask(
    source: Path, path: str, mask: str, original: tuple[int, int] | None, max_megapixels: int
) -> NDArray[np.bool_]:
    marked = images.load_mask(source / mask, max_megapixels)
    height, width = marked.shape
    if original is not None and (width, height) != original:
        raise DatasetError(
            f"{source / mask}: the mask is {width} x {height} pixels, its image {path} {original[0]} x {original[1]}; "
            "export it at the size of the image"
        )
    if not marked.any():
        raise DatasetError(
            f"{source / mask}: the mask is all black, its image {path} is among the defects; mark the defect"
        )
    return marked


def _saturation(mask: Path, saturations: Mapping[int, Saturation], max_megapixels: int) -> int:
    """How many pixels of a mask count as all of its defect, which its grey value tells the kind of."""
    grey = images.load_rgb(mask, replace(_MASK, max_megapixels=max_megapixels))[..., 0]
    values = np.unique(grey[grey > 0]).tolist()
    if len(values) > 1:
        raise DatasetError(f"{mask}: holds the values {some(map(str, values))}; each mask is one defect of one value")
    if values and values[0] not in saturations:
        raise DatasetError(f"{mask}: holds the value {values[0]}, which defects_config.json does not know; correct it")
    return saturations[values[0]].pixels(int((grey > 0).sum())) if values else 0


def _is_turned_alone(picture: Path, page: int | None, mask: Path, shape: tuple[int, ...]) -> bool:
    """Whether the mask may lie in the pixels as they are stored: the shape tells where a turn changes it."""
    stored = images.orientation(picture, page)
    return (shape[0] == shape[1] or stored <= 4) and stored > 1 and images.orientation(mask, None) == 1


def _fit_mask(mask: NDArray[np.bool_], shape: Shape) -> tuple[NDArray[np.bool_], str | None]:
    """Bring a mask into a frame; also tell what became of its regions, None if there are as many as before.

    A mask that would come out empty keeps one pixel for each region, the one under its centroid: an anomalous image
    without an anomalous pixel would count against a model that finds it. It is empty where nothing of it is seen.
    """
    place, framed = shape.place(size_of(mask)), np.zeros(shape.size, dtype=bool)
    seen = mask[place.seen]
    if not seen.any():
        return framed, "lies outside of what is seen"
    regions, before = ndimage.label(seen, structure=_EIGHT_CONNECTED)
    framed[place.shown], what = _shrink_mask(seen, regions, before, size_of(framed[place.shown]))
    return framed, what


def _shrink_mask(
    mask: NDArray[np.bool_], regions: NDArray[np.signedinteger[Any]], before: int, size: Size
) -> tuple[NDArray[np.bool_], str | None]:
    small = images.resize_mask(mask, size)
    if not small.any():
        centroids = np.array(ndimage.center_of_mass(mask, regions, range(1, before + 1)))  # (R, 2), pixel centres at .0
        rows, columns = ((centroids + 0.5) * size / mask.shape).astype(int).T
        small = np.zeros(size, dtype=bool)
        small[rows, columns] = True
        return small, "vanished, kept at the centroid"
    after = ndimage.label(small, structure=_EIGHT_CONNECTED)[1]
    return small, None if after >= before else f"{before} regions became {after}"


def _keep(picture: _Picture, result: Decoded) -> None:
    result.findings.problems.extend(picture.problems)
    result.pixels[picture.path] = picture.pixels
    result.saturations.update(picture.saturations)
    if picture.original is None or not picture.image_rows:
        return
    result.originals[picture.path] = picture.original
    for spool, row in zip(result.images.values(), picture.image_rows, strict=True):
        spool.append(picture.path, row)
    for spool, mask_row in zip(result.masks.values(), picture.mask_rows, strict=False):
        spool.append(picture.path, mask_row)


# ------------------------------------------------------------------------------------------------------ what all tell


def _tell_of_lookalikes(source: Path, listing: Listing, pictures: list[_Picture], findings: Findings) -> None:
    """Masks among the pictures: any model finds them, and so figures go up."""
    by_path = {picture.path: picture for picture in pictures}
    if any(by_path[path].black_and_white for path in listing.training):
        return  # here a good part may look like this: a silhouette
    twins = same_stems(by_path)
    told = masks_beside(by_path)
    found = [
        path
        for path, picture in by_path.items()
        if (picture.black_and_white or (picture.nearly_so and any(not by_path[twin].nearly_so for twin in twins[path])))
        and path not in told
    ]
    if found:
        findings.problem(
            f"{source}: {counted(len(found), 'picture')} of black and white only, as masks are: {some(found)}; move "
            f"masks into {listing.mask_folder} (<stem>_mask.png), or remove them"
        )


def _tell_of_other_sizes(source: Path, pictures: list[_Picture], size: Size, findings: Findings) -> None:
    others = [
        f"{picture.path} ({picture.original[0]} x {picture.original[1]})"
        for picture in pictures
        if picture.original is not None and picture.original != (size.width, size.height)
    ]
    if others:
        findings.problem(
            f"{source}: {counted(len(others), 'picture')} of another size than the region of interest, which is of "
            f"{size.width} x {size.height} pixels: {some(others)}; correct prepare.regions, or remove them"
        )


def _tell_of_too_large(source: Path, pictures: list[_Picture], frames: Sequence[Frame], findings: Findings) -> None:
    """Pictures that no model would resize, and that do not go into its frame."""
    sizes = {picture.path: Size(*reversed(picture.original)) for picture in pictures if picture.original is not None}
    for shape in mask_shapes(frames):
        if others := [path for path, size in sizes.items() if not shape.holds(size)]:
            height, width = (max(sides) for sides in zip(*sizes.values(), strict=True))
            findings.problem(
                f"{source}: {counted(len(others), 'picture')} larger than image_size {shape.size}, which `fit: native` "
                f"does not resize to: {some(others)}; set image_size: {{height: {height}, width: {width}}}"
            )


def _told_of_shrinking(pictures: list[_Picture]) -> Iterator[tuple[Shape, str]]:
    altered: defaultdict[Shape, list[str]] = defaultdict(list)
    for picture in pictures:
        for shape, what in picture.altered:
            altered[shape].append(f"{picture.mask_name} ({what})")
    for shape in sorted(altered):
        masks = counted(len(altered[shape]), "mask")
        yield shape, f"{masks} with fewer regions at {shape} pixels: {some(altered[shape])}"


def _tell_of_masks(pictures: list[_Picture], findings: Findings) -> None:
    if turned := [picture.path for picture in pictures if picture.turned_alone]:
        findings.warnings.append(
            f"{counted(len(turned), 'picture')} turned by EXIF, without a mask that is: {some(turned)}; "
            "if the masks were drawn on the pictures as they are stored, turn them too"
        )
    if wide := [picture for picture in pictures if picture.marked > _MOST_OF_A_PICTURE]:
        findings.warnings.append(
            f"{counted(len(wide), 'mask')} marking most of the picture: "
            f"{some(f'{picture.mask_name} ({picture.marked:.0%})' for picture in wide)}; all that is not black counts "
            "as defect: if it is the good part that they mark, invert them (black for good)"
        )


def _tell_of_range(source: Path, pictures: list[_Picture], config: PrepareConfig, findings: Findings) -> None:
    """12 bits in a file of 16 would leave 16 of 256 shades."""
    values = [picture.highest for picture in pictures if picture.highest is not None]
    if not values:
        return
    told = f"the brightest value in {counted(len(values), 'picture')} of 16 bits is {max(values)}"
    if max(values) <= config.black_level:
        findings.problem(
            f"{source}: {told}, not above prepare.black_level {config.black_level}: all are black; lower it"
        )
        return
    used = max(2 ** max(values).bit_length() - 1, 255)
    if 2 * (used - config.black_level) < config.white_level - config.black_level:
        findings.warnings.append(
            f"{told} of white_level {config.white_level}, so that few shades are left: set prepare.white_level: {used}"
        )
