"""Test split -> metrics, decisions, figures. The only stage that opens the test split.

Thresholds come from held-out good parts, before a test image is looked at. Where these calibrate the model, the score
that counts, and is written, is the higher of the deployed model's and that of the model as others calibrate it. The
thresholds that the test images would have chosen are reported beside them under the name oracle. Without test images
there is a threshold and no figure.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange

from anomaly_models.common.sizes import Size
from pipelines.data.batches import PreparedData
from pipelines.data.index import PreparedIndex
from pipelines.data.tiled import Detects, whole
from pipelines.evaluation import figures
from pipelines.evaluation.certainty import intervals_of
from pipelines.evaluation.description import description
from pipelines.evaluation.groups import compare_groups, fitted_by_group
from pipelines.evaluation.held_out import (
    ThresholdFrom,
    predicted,
    score_held_out_images,
    score_known_defects,
    thresholds,
)
from pipelines.evaluation.intervals import share_interval
from pipelines.evaluation.measures import PROMISED
from pipelines.evaluation.metrics import (
    ExactPixelMetrics,
    PixelCurves,
    PixelMetrics,
    PixelResult,
    StreamingPixelMetrics,
    confusion_at,
    image_metrics,
    known,
    recall_by_defect_type,
)
from pipelines.evaluation.outcomes import (
    EVALUATION_FOLDER,
    Counts,
    DefectOutcome,
    Evaluation,
    HoldoutThreshold,
    PixelCounts,
    Protocol,
    Review,
    TestImage,
    Threshold,
    bin_edges,
    count_pixels,
    read_outcome,
    read_tested,
    scored,
    write_predictions,
)
from pipelines.evaluation.regions import Pixels, Regions, centre, shrunk
from pipelines.evaluation.review import review
from pipelines.files import atomic_folder, write_json
from pipelines.paths import Cell, Project
from pipelines.pictures.frames import OUTSIDE, Window
from pipelines.pictures.images import resize_mask
from pipelines.pictures.overlays import Mask, resize_map
from pipelines.pictures.panels import Thresholds
from pipelines.settings.params import Params
from pipelines.tracking.runs import cell_run
from pipelines.training.trained import Trained, load_trained


def evaluate(
    model_name: str, category: str, params: Params, project: Project, device: torch.device, seed: int | None = None
) -> dict[str, float | int | None]:
    """Write `evaluations/<model>/<category>/seed<seed>` and the same in `metrics`; gives the latter's numbers.

    Raises:
        ParamsError: no such model, category or seed (the first, if None) in the params file.
        StageError: the cell is not trained, or its data has changed since.
    """
    params.check_category(category)
    cell = project.cell(model_name, category, params.seed_of(seed))
    trained = load_trained(cell, device)
    data = trained.data(project, device)
    held_out, threshold_from = score_held_out_images(trained, data)
    threshold, pixel_threshold = thresholds(held_out, threshold_from, params.evaluate.false_alarm_rate)
    detects = whole(trained.model, trained.config)
    originals = Originals(project.root / params.data.root / category, params.evaluate.resolution == "native")
    learns = trained.learns_from_defects or params.chosen_on_defects(model_name)
    tested = data.index.tested(defects_apart=params.defects_apart(learns=learns))
    results = score_test_images(detects, data, tested, originals, _compared(trained, params))
    known_defects = score_known_defects(detects, data, tested, learns=trained.learns_from_defects)
    to_person = review(
        [image.score for image in held_out],
        threshold,
        known_defects,
        reject_rate=params.evaluate.reject_rate,
        review_rate=params.evaluate.review_rate,
    )
    masked = data.index.has_masks and bool(results)
    pixels = _compare_pixels(results, params.evaluate.pixel_metrics, pixel_threshold) if masked else None
    of_cell = Thresholds(threshold.value, pixel_threshold)
    evaluation = _summarise(trained, data, params, results, threshold, of_cell, to_person, threshold_from, pixels)
    with atomic_folder(cell.evaluated) as temporary:
        images = scored(results, held_out, threshold.value, {image.path: image.group for image in data.index.images})
        write_predictions(temporary, images)
        if pixels and pixels.counts:
            pixels.counts.save(temporary / cell.pixels.name)
        intervals = intervals_of(read_outcome(temporary, evaluation, model_name))
        groups = compare_groups(images, fitted_by_group(data.index), threshold.expected_rate)
        evaluation = evaluation.model_copy(update={"intervals": intervals, "groups": groups})
        evaluation.save(temporary / cell.evaluation.name)
        drawn = figures.draw(temporary, results, of_cell, pixels.curves if pixels else None) if results else []
    # The flat file is written last: it stands for a finished evaluation, and DVC compares it.
    write_json(cell.metrics, evaluation.known | evaluation.recalls)
    _track(cell, params, evaluation, drawn)
    return evaluation.metrics


def _compared(trained: Trained, params: Params) -> Size:
    """Of the centre whose pixels are compared."""
    seen_at_once = params.evaluate.region == "seen" and trained.config.tiles is None
    return trained.config.seen if seen_at_once else trained.config.image_size


class Originals(NamedTuple):
    """The files of a category as they came."""

    folder: Path
    compared: bool  # whether pixels are compared at their size, not at the prepared one


def score_test_images(
    model: Detects, data: PreparedData, rows: Sequence[int], originals: Originals, compared: Size
) -> list[TestImage]:
    """The test images of these rows, each by itself, as `predict` will see it.

    All pixels are compared, or those of the centre that is `compared` of the prepared pixels.
    """
    return [_test_image(model, data, row, originals, compared) for row in rows]


def _test_image(model: Detects, data: PreparedData, row: int, originals: Originals, compared: Size) -> TestImage:
    entry, batch, shape = data.index.images[row], data.batch([row]), data.frame.shape
    framed, score = predicted(model, batch)
    anomaly_map = shape.restored(framed, entry.original, 0)
    rgb = rearrange(batch.image * 255, "1 c h w -> h w c").round().byte().cpu().numpy()
    truth, regions = None, None
    if data.index.has_masks:
        truth = shape.restored(batch.mask[0, 0].cpu().numpy() > 0, entry.original, 0)
        regions = _regions(data, row, truth, originals, compared)
    return TestImage(
        path=entry.path,
        defect=entry.defect,
        label=entry.label,
        score=score,
        rgb=shape.restored(rgb, entry.original, OUTSIDE),
        anomaly_map=anomaly_map,
        truth=truth,
        width=entry.width,
        height=entry.height,
        regions=regions,
    )


def _counted(data: PreparedData, row: int, shape: tuple[int, ...], compared: Size) -> Window | Mask:
    """Which pixels of a mask (H, W) of an image count: those that the model sees of what is `compared`."""
    size, original = data.frame.size, data.index.images[row].original
    if data.frame.fit == "stretch" and data.of_interest is None:
        return centre(shape, compared, size)
    seen = np.zeros(size, dtype=bool)
    seen[centre(size, compared, size)] = True
    region = data.frame.shape.region(original, data.of_interest)
    restored = data.frame.shape.restored(seen if region is None else seen & region, original, 0)
    return resize_mask(restored, Size(*shape))


def _regions(data: PreparedData, row: int, truth: Mask, originals: Originals, compared: Size) -> Regions:
    """The true regions; `truth` is all that they mark, at the prepared size. Defects have masks in the originals alone.

    Raises:
        StageError: a mask that is needed is not there any more, or has changed since it was prepared.
    """
    entry = data.index.images[row]
    saturations: list[float] = [mask.saturation for mask in entry.masks if mask.saturation is not None]
    if not saturations:
        mask = data.native_mask(row, originals.folder) if originals.compared else truth
        return Regions.of(mask, _counted(data, row, mask.shape, compared))
    masks = data.native_masks(row, originals.folder)
    if not originals.compared:
        masks = [shrunk(mask, data.frame.shape) for mask in masks]
        scale = masks[0].size / entry.original.area
        saturations = [saturation * scale for saturation in saturations]
    return Regions.of_defects(masks, saturations, _counted(data, row, masks[0].shape, compared))


class _ComparedPixels(NamedTuple):
    result: PixelResult
    curves: PixelCurves
    counts: PixelCounts | None  # of each image in bins along the curves; None where one class of pixel is absent
    overlaps: dict[str, float]  # AUPRO, or sPRO, by the metric's name

    @property
    def figures(self) -> dict[str, float]:
        """As an evaluation names them."""
        segmented = {"pixel_f1": self.counts.f1 if self.counts else math.nan}
        return self.result.ranked | segmented | self.overlaps


def _compare_pixels(
    results: Sequence[TestImage], pixel_metrics: Literal["exact", "streaming"], threshold: float
) -> _ComparedPixels:
    exact = pixel_metrics == "exact"
    metrics: PixelMetrics = ExactPixelMetrics() if exact else StreamingPixelMetrics()
    # The exact metrics keep every score anyway. The streaming ones see one image after another, and for the counts once
    # more: with all maps at the size of the originals, memory would not be bounded.
    images = list(_pixels(results)) if exact else None
    metrics.add(images or _pixels(results))
    points = metrics.operating_points()
    curves = points.curves()
    counts = None
    if len(curves.threshold):
        counts = count_pixels(images or _pixels(results), bin_edges(curves.threshold), threshold)
    saturated = any(result.regions is not None and result.regions.defects is not None for result in results)
    overlaps = {name: float(value) for name, value in points.curve.overlaps(saturated=saturated).items()}
    return _ComparedPixels(points.result(), curves, counts, overlaps)


def _pixels(results: Sequence[TestImage]) -> Iterator[Pixels]:
    """At the size of the true regions: the map goes up to an original's, bilinear."""
    for result in results:
        assert result.regions is not None
        height, width = result.regions.shape
        yield result.regions.split(resize_map(result.anomaly_map, width, height), result.path)


def _summarise(
    trained: Trained,
    data: PreparedData,
    params: Params,
    results: list[TestImage],
    threshold: HoldoutThreshold,
    of_cell: Thresholds,
    to_person: Review,
    threshold_from: ThresholdFrom,
    pixels: _ComparedPixels | None,
) -> Evaluation:
    """All but the intervals and the groups, which follow from what is written."""
    scores = torch.tensor([result.score for result in results], dtype=torch.float32)
    labels = torch.tensor([result.label for result in results], dtype=torch.bool)
    image = image_metrics(scores, labels)
    counts = confusion_at(scores, labels, threshold.value)
    run = trained.run
    metrics = {
        **image.figures,
        "recall": counts.true_positives / image.num_anomalous if image.num_anomalous else None,
        "false_alarms": counts.false_positives / image.num_normal if image.num_normal else None,
        PROMISED: threshold.expected_rate,
        **(pixels.figures if pixels else {}),
        "threshold": threshold.value,
        "train_seconds": run.train_seconds,
        "train_steps": run.train_steps,
    }
    return Evaluation(
        model=run.model,
        method=run.settings.method,
        category=data.index.category,
        run_id=run.run_id,
        data_set=params.data.name,
        data_sha256=run.settings.data.sha256,
        test_sha256=data.index.test_sha256,
        index_sha256=run.settings.data.index_sha256,
        frozen=data.index.frozen,
        pixels_sha256=_pixels_sha256(results),
        settings=run.model_settings,
        protocol=Protocol(
            image_size=trained.config.image_size,
            resize=trained.config.resize,
            fit=trained.config.fit,
            resolution=params.evaluate.resolution,
            mask_resize="none" if params.evaluate.resolution == "native" else "nearest",
            compared=_compared(trained, params),
            of_interest=data.index.region is not None,
            pixel_metrics=params.evaluate.pixel_metrics,
            threshold_from=threshold_from,
            seed=run.settings.train.seed,
        ),
        counts=_counts(data.index, results),
        metrics={name: known(value) for name, value in metrics.items()},
        threshold=Threshold(**dict(threshold), pixel_value=of_cell.pixel, oracle=known(image.oracle_threshold)),
        review=to_person,
        confusion=counts,
        defects=_defects(results, threshold),
        intervals={},
        groups=None,
    )


def _counts(index: PreparedIndex, results: Sequence[TestImage]) -> Counts:
    tested = {result.path for result in results}
    return Counts(
        train=len(index.rows("train")),
        holdout=len(index.rows("holdout")),
        test_normal=sum(not result.label for result in results),
        test_anomalous=sum(result.label for result in results),
        apart=sum(index.images[row].path not in tested for row in index.apart()),
    )


def _pixels_sha256(results: Sequence[TestImage]) -> str:
    """Of the test images and masks as the model sees them."""
    digest = hashlib.sha256()
    for result in results:
        digest.update(rearrange(result.rgb, "h w c -> c h w").tobytes())
        digest.update((np.zeros(result.rgb.shape[:2], bool) if result.truth is None else result.truth).tobytes())
    return digest.hexdigest()


def _defects(results: list[TestImage], threshold: HoldoutThreshold) -> dict[str, DefectOutcome]:
    """Each type of defect by itself."""
    scores = torch.tensor([result.score for result in results], dtype=torch.float32)
    labels = torch.tensor([result.label for result in results], dtype=torch.bool)
    types = [result.defect for result in results]
    found = recall_by_defect_type(scores, labels, types, threshold.value)
    good = scores[~labels].sort(descending=True).values
    allowed = math.floor(threshold.rate_requested * len(good) + 1e-9)
    level = good[allowed] if len(good) else None
    at_rate = recall_by_defect_type(scores, labels, types, float(level)) if level is not None else {}
    outcomes: dict[str, DefectOutcome] = {}
    for name, recall in found.items():
        chosen = torch.tensor([not result.label or result.defect == name for result in results])
        outcomes[name] = DefectOutcome(
            count=recall.num_images,
            recall=recall.recall,
            recall_interval=share_interval(recall.recall, recall.num_images),
            recall_at_rate=at_rate[name].recall if at_rate else None,
            auroc=known(image_metrics(scores[chosen], labels[chosen]).auroc),
        )
    return outcomes


def _track(cell: Cell, params: Params, evaluation: Evaluation, drawn: list[str]) -> None:
    with cell_run(cell, params.tracking.experiment, evaluation.run_id) as run:
        run.metrics(evaluation.known | evaluation.recalls)
        run.tags({"test": evaluation.counts.of_test()})
        run.tags({name: getattr(evaluation, name).model_dump() for name in ("protocol", "threshold", "review")})
        run.describe(description(evaluation, read_tested(cell.evaluated), run.known_tags()))
        for name in drawn:
            run.output(cell.evaluated / name, "figures")
        for path in (cell.evaluation, cell.predictions, cell.pixels):
            if path.exists():
                run.file(path, EVALUATION_FOLDER)
