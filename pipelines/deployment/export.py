"""A trained model -> one ONNX file, kept only if it reproduces the original on the category's real test images.

Where there is nothing to test on, the held-out good parts stand in for them, and the proof says so.

The proof runs from the original files through `pipelines.pictures.images` and onnxruntime, as `predict` will, and
compares maps, scores and decisions with the trained model on the arrays that `evaluate` used: the number you saw is the
one you ship.
"""

import io
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from anomaly_models.base import AnomalyModel, Prediction
from pipelines.data.batches import PreparedData
from pipelines.data.tiled import Detects, whole
from pipelines.deployment import bundle
from pipelines.deployment.records import Decision, Deviation, Parity
from pipelines.errors import ExportError
from pipelines.evaluation.outcomes import Evaluation
from pipelines.files import atomic_folder
from pipelines.inference.detector import Detector, ModelCard
from pipelines.inference.engine import Inputs
from pipelines.memory import out_of_memory
from pipelines.paths import Project
from pipelines.pictures.images import to_input
from pipelines.settings.params import Params
from pipelines.tracking.runs import cell_run
from pipelines.training.trained import load_trained

_EXAMPLE_BATCH = 2  # tracing with one image would fix the batch at one
_LARGEST = 2**31 - 2**24  # bytes of weights: protobuf's limit, less a margin for the graph itself
_BATCH_CHECK = 4  # the same file must also score several images at once
_ROUNDING = 1e-5  # relative; float32 itself has 1e-7, of which deep networks make some 1e-6


def export(
    model_name: str,
    category: str,
    params: Params,
    project: Project,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Parity:
    """Write `exported/<model>/<category>`: model.onnx, and parity.json beside it as its proof. Runs on the CPU.

    With int8 among `export.precisions` also int8.json, and model.int8.onnx if it decides as well.

    `on_progress` is told how many images of the proof are done, and of how many.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the cell is not trained and evaluated, or its data has changed since, on disk too.
        ExportError: the graph does not reproduce the model; nothing is kept.
    """
    params.check_category(category)
    cell = project.cell(model_name, category, params.seed)
    trained = load_trained(cell, torch.device("cpu"))
    data = trained.data(project, torch.device("cpu"))
    prepare = trained.run.settings.prepare
    evaluation = Evaluation.load(cell.evaluation, f"run {cell.verb('evaluate')} first")
    threshold = evaluation.threshold
    card = ModelCard(
        model=model_name,
        category=category,
        image_size=trained.config.image_size,
        resize=trained.config.resize,
        fit=trained.config.fit,
        tiles=trained.config.tiles,
        by_tile=trained.config.network.places > 1,
        scored_pixels=trained.config.scored_pixels,
        region=data.index.region,
        black_level=prepare.black_level,
        white_level=prepare.white_level,
        above_white=prepare.above_white,
        page=prepare.page,
        dicom_window=prepare.dicom_window,
        max_megapixels=params.prepare.max_megapixels,
        threshold=threshold.value,
        pixel_threshold=threshold.pixel_value,
        false_alarm_rate=threshold.expected_rate,
        reject_above=evaluation.review.reject_above,
        review_load=evaluation.review.load_ends,
        groups=evaluation.groups.text if evaluation.groups else None,
        run_id=trained.run.run_id,
        data_sha256=trained.run.settings.data.sha256,
        weights=trained.weights,
        params=trained.run.settings.model_dump(),
    )
    with atomic_folder(cell.exported) as folder:
        path = folder / cell.onnx.name
        write_graph(trained.model, path, params.export.opset, card)
        source = Path(params.data.root) / category
        learns = trained.learns_from_defects or params.chosen_on_defects(model_name)
        tested = data.index.tested(defects_apart=params.defects_apart(learns=learns))
        parity = measure_parity(
            whole(trained.model, trained.config),
            Detector(path, threads=torch.get_num_threads()),  # else another cell's core is taken, too
            data,
            tested,
            project.root / source,
            params.export.max_difference,
            on_progress,
        )
        parity.check(model_name, category)
        parity.save(folder / cell.parity.name)
        int8 = None
        if "int8" in params.export.precisions:
            from pipelines.deployment.int8 import export_int8  # whose quantiser takes seconds to import

            int8 = export_int8(path, folder, cell, trained, data, evaluation, params)
    with (
        tempfile.TemporaryDirectory() as folder,
        cell_run(cell, params.tracking.experiment, card.run_id) as run,
    ):
        run.tags({"parity": parity.tags()})
        run.file(cell.parity, "export")
        run.without_tags("int8.")  # of an earlier export
        if int8 is not None:
            run.tags({"int8": int8.tags()})
            run.file(cell.int8_proof, "export")
        packed = Path(folder, bundle.name_of(cell))
        bundle.write(packed, cell, Detector(cell.onnx), None, params, project)  # its latency is measured after this
        run.decision_model(packed)
    return parity


def write_graph(model: AnomalyModel, path: Path, opset: int, card: ModelCard) -> None:
    """Write the model, its constants folded, as one file: `image` (any batch) in, `anomaly_map` and `score` out.

    Where a picture does not fill the input, or a part of it does not count, `region` is another input; where each tile
    has its own memory, `tile`, the number of the one that all of the batch are.

    Raises:
        ExportError: the exporter cannot follow `forward`, or protobuf cannot hold so much.
    """
    size = card.input_size
    examples = {"image": torch.rand(_EXAMPLE_BATCH, 3, *size, generator=torch.Generator().manual_seed(0))}
    if card.takes_region:
        examples["region"] = torch.ones(_EXAMPLE_BATCH, 1, *size)
    batch = {0: torch.export.Dim("batch", min=1)}
    exported = model.exportable()
    if card.by_tile:
        exported = _ByTile(model, takes_region=card.takes_region)
        examples["tile"] = torch.zeros(1, dtype=torch.long)
    # The exporter prints its progress and warns of its own internals.
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        torch.no_grad(),
        _out_of_place(exported),
    ):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                exported,
                tuple(examples.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(examples),
                output_names=["anomaly_map", "score"],
                dynamic_shapes=[tuple(None if name == "tile" else batch for name in examples)]
                if card.by_tile
                else tuple(batch for _ in examples),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            if out_of_memory(error):
                raise
            raise ExportError(f"{card.model}: its `forward` cannot be written as a graph ({_reason(error)})") from error
    assert program is not None, "torch.onnx.export gives a program when no file name is passed"
    _check_size(program, model, card)
    proto = program.model_proto
    onnx.helper.set_model_props(proto, card.to_metadata())
    onnx.save(proto, path)


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Meanwhile nothing is computed in place: the exporter takes such operations to pieces, at length.

    The graph is the same.
    """
    changed: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False)]
    for module in changed:
        module.inplace = False
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True


def _reason(error: torch.onnx.OnnxExporterError) -> str:
    """What stopped the exporter, in its first line; its own error is a page of advice to PyTorch's developers."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


class _ByTile(nn.Module):
    """A model with a memory for each tile, whose last input says which."""

    def __init__(self, model: AnomalyModel, *, takes_region: bool) -> None:
        super().__init__()
        self.model, self.takes_region = model, takes_region

    def forward(self, *inputs: torch.Tensor) -> Prediction:
        image, *region, tile = inputs
        return self.model.forward_at(image, region[0] if self.takes_region else None, tile)


def _check_size(program: torch.onnx.ONNXProgram, model: AnomalyModel, card: ModelCard) -> None:
    """Raise ExportError if the graph is too large for one file."""
    constants = [value.const_value for value in program.model.graph.initializers.values()]
    size = sum(constant.nbytes for constant in constants if constant is not None)
    if size > _LARGEST:
        raise ExportError(
            f"{card.model} on {card.category}: its weights take {size / 2**30:.2f} GiB, and one ONNX file holds at "
            f"most 2 (protobuf's limit); {model.makes_it_smaller}, and train it again"
        )


def measure_parity(
    model: Detects,
    detector: Detector,
    data: PreparedData,
    tested: list[int],
    source: Path,
    max_difference: float,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Parity:
    """Compare on every test image: original files through the exported graph, prepared arrays through the model.

    A difference counts in standard deviations of what the model says of held-out good parts, so that it means the same
    on any model's scale. Where these are all alike it counts in what float32 rounds.
    """
    rows = tested or data.index.for_thresholds()
    scales = _Scales.of(model, data, max_difference)
    alone: list[Outputs] = []
    first_images: list[Inputs] = []
    deviations: dict[str, list[Deviation]] = {"score": [], "map": []}
    levels: list[tuple[float, str]] = []
    disagreements: list[Decision] = []
    for number, row in enumerate(rows, 1):
        path = data.index.images[row].path
        inputs, prepared = detector.load(data.index.original(row, source)), data.batch([row])
        shipped, seen = Outputs(*detector(inputs)), _predict(model, prepared.image, prepared.region)
        levels.append((255 * float(np.abs(to_input(inputs.pixels) - prepared.image.numpy()).max()), path))
        deviations["score"].append(scales.score.deviation(path, shipped.score, seen.score))
        deviations["map"].append(scales.map.deviation(path, shipped.anomaly_map, seen.anomaly_map))
        disagreements += scales.score.disagreement(path, shipped.score, seen.score, detector.card.threshold)
        if len(first_images) < _BATCH_CHECK:
            first_images.append(inputs)
            alone.append(shipped)
        on_progress(number, len(rows))
    together = Outputs(*detector(Inputs.together(first_images)))
    in_batch = [
        scale.deviation(data.index.images[row].path, several[place : place + 1], one)
        for place, (row, outputs) in enumerate(zip(rows, alone, strict=False))
        for scale, several, one in (
            (scales.score, together.score, outputs.score),
            (scales.map, together.anomaly_map, outputs.anomaly_map),
        )
    ]
    input_levels, input_image = max(levels)
    return Parity(
        num_images=len(rows),
        images="test images" if tested else "good parts" if data.index.by_folds else "held-out good parts",
        num_held_out=len(data.index.for_thresholds()),
        max_difference=max_difference,
        score=_worst(deviations["score"]),
        map=_worst(deviations["map"]),
        batch=_worst(in_batch),
        input_levels=input_levels,
        input_image=input_image,
        threshold=detector.card.threshold,
        disagreements=tuple(disagreements),
        onnxruntime=onnxruntime.__version__,
    )


class Outputs(NamedTuple):
    """Of one image or several."""

    anomaly_map: np.ndarray  # (B, 1, H, W)
    score: np.ndarray  # (B,)


def _predict(model: Detects, image: torch.Tensor, region: torch.Tensor | None) -> Outputs:
    with torch.no_grad():
        prediction = model(image, region)
    return Outputs(prediction.anomaly_map.numpy(), prediction.score.numpy())


@dataclass(frozen=True, slots=True)
class _Scale:
    """What a difference of a model's scores, or of its maps, is held against."""

    spread: float  # standard deviation over the held-out good parts
    rounding: float  # what float32 leaves after a deep network
    allowed: float

    @classmethod
    def of(cls, held_out: np.ndarray, unlike: np.ndarray, max_difference: float) -> Self:
        """From the values of the good parts, and of a picture unlike them.

        Rounding is relative to the numbers inside the network. Good parts may well be at distance 0 of what it knows;
        how large its numbers are, only something else shows.
        """
        spread = float(held_out.std(dtype=np.float64))
        rounding = _ROUNDING * max(float(np.abs(held_out).max()), float(np.abs(unlike).max()))
        return cls(spread, rounding, max(max_difference * spread, rounding))

    def deviation(self, path: str, shipped: np.ndarray, seen: np.ndarray) -> Deviation:
        """NaN is infinitely far: nothing compares with it."""
        return Deviation(image=path, difference=_difference(shipped, seen), allowed=self.allowed, spread=self.spread)

    def disagreement(self, path: str, shipped: np.ndarray, seen: np.ndarray, threshold: float) -> list[Decision]:
        """The image, if its scores (1,) lie on both sides of the threshold."""
        if bool(shipped[0] > threshold) == bool(seen[0] > threshold):
            return []
        rounding = _difference(shipped, seen) <= self.rounding
        return [Decision(image=path, shipped=float(shipped[0]), seen=float(seen[0]), rounding=rounding)]


@dataclass(frozen=True, slots=True)
class _Scales:
    """Of both outputs."""

    score: _Scale
    map: _Scale

    @classmethod
    def of(cls, model: Detects, data: PreparedData, max_difference: float) -> Self:
        batches = [data.batch([row]) for row in data.index.for_thresholds()]
        held_out = [_predict(model, batch.image, batch.region) for batch in batches]
        unlike = _predict(model, 1 - batches[0].image, batches[0].region)
        scores = np.concatenate([outputs.score for outputs in held_out])
        maps = np.concatenate([outputs.anomaly_map for outputs in held_out])
        return cls(_Scale.of(scores, unlike.score, max_difference), _Scale.of(maps, unlike.anomaly_map, max_difference))


def _worst(deviations: Sequence[Deviation]) -> Deviation:
    return max(deviations, key=lambda deviation: deviation.excess)


def _difference(shipped: np.ndarray, seen: np.ndarray) -> float:
    """The largest difference; infinite where one of the two is no number."""
    difference = float(np.abs(shipped.astype(np.float64) - seen).max())
    return float("inf") if math.isnan(difference) else difference
