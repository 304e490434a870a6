"""A trained model -> one ONNX file, kept only if it reproduces the original on the category's real test images.

Where there is nothing to test on, the held-out good parts stand in for them, and the proof says so.

The proof runs from the original files through `pipelines.pictures.images` and onnxruntime, as `predict` will, and
compares maps, scores and decisions with the trained model on the arrays that `evaluate` used: the number you saw is the
one you ship.
"""

import io
import math
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from anomaly_models.base import AnomalyModel
from pipelines.data.batches import PreparedData
from pipelines.deployment.records import Parity
from pipelines.evaluation.outcomes import Evaluation
from pipelines.files import atomic_folder
from pipelines.inference.detector import Detector, ModelCard
from pipelines.paths import Project
from pipelines.settings.params import Params
from pipelines.tracking.runs import cell_run
from pipelines.training.trained import load_trained

_EXAMPLE_BATCH = 2  # tracing with one image would fix the batch at one
_BATCH_CHECK = 4  # the same file must also score several images at once


def export(model_name: str, category: str, params: Params, project: Project) -> Parity:
    """Write `exported/<model>/<category>`: model.onnx, and parity.json beside it as its proof. Runs on the CPU.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the cell is not trained and evaluated, or its data has changed since, on disk too.
        ExportError: the graph does not reproduce the model; nothing is kept.
    """
    params.check_category(category)
    cell = project.cell(model_name, category, params.train.seed)
    trained = load_trained(cell, torch.device("cpu"))
    threshold = Evaluation.load(cell.evaluation, f"run {cell.verb('evaluate')} first").threshold
    card = ModelCard(
        model=model_name,
        category=category,
        image_size=trained.image_size,
        white_level=trained.run.settings.prepare.white_level,
        threshold=threshold.value,
        pixel_threshold=threshold.pixel_value,
        false_alarm_rate=threshold.rate_requested,
        run_id=trained.run.run_id,
        data_sha256=trained.run.settings.data.sha256,
        params=trained.run.settings.model_dump(),
    )
    with atomic_folder(cell.exported) as folder:
        path = folder / cell.onnx.name
        write_graph(trained.model, path, trained.image_size, params.export.opset, card)
        source = Path(params.data.root) / category
        data = PreparedData(project.prepared(category), trained.image_size, torch.device("cpu"))
        trained.check_data(data)
        apart = params.defects_apart(learns=trained.learns_from_defects)
        tested = data.index.tested(defects_apart=apart)
        parity = measure_parity(
            trained.model, Detector(path), data, tested, project.root / source, params.export.tolerance
        )
        parity.check(model_name, category)
        parity.save(folder / cell.parity.name)
    with cell_run(cell, params.tracking.experiment, card.run_id) as run:
        run.tags({"parity": parity.model_dump()})
        run.file(cell.parity, "export")
        run.onnx_model(cell.onnx, card.image_size)
    return parity


def write_graph(model: AnomalyModel, path: Path, image_size: int, opset: int, card: ModelCard) -> None:
    """Write the model, its constants folded, as one file: `image` (any batch) in, `anomaly_map` and `score` out."""
    example = torch.rand(_EXAMPLE_BATCH, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    # The exporter prints its progress and warns of its own internals.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.exportable(),
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["anomaly_map", "score"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None, "torch.onnx.export gives a program when no file name is passed"
    proto = program.model_proto
    onnx.helper.set_model_props(proto, card.to_metadata())
    onnx.save(proto, path)


def measure_parity(
    model: AnomalyModel, detector: Detector, data: PreparedData, tested: list[int], source: Path, tolerance: float
) -> Parity:
    """Compare on every test image: original files through the exported graph, prepared arrays through the model."""
    rows = tested or data.rows("holdout")
    threshold = detector.card.threshold
    map_difference = score_difference = 0.0
    changed = 0
    first_images: list[np.ndarray] = []
    first_outputs: list[tuple[np.ndarray, np.ndarray]] = []
    for row in rows:
        image = detector.load(data.index.original(row, source))
        shipped_map, shipped_score = detector(image)
        with torch.no_grad():
            seen = model(data.batch([row]).image)
        map_difference = max(map_difference, _difference(shipped_map, seen.anomaly_map.numpy()))
        score_difference = max(score_difference, _difference(shipped_score, seen.score.numpy()))
        # The threshold is the score of a held-out part, which rounding alone moves to either side.
        sets_threshold = not tested and _difference(np.array([threshold]), seen.score.numpy()) <= tolerance
        changed += not sets_threshold and bool(shipped_score[0] > threshold) != bool(seen.score.numpy()[0] > threshold)
        if len(first_images) < _BATCH_CHECK:
            first_images.append(image)
            first_outputs.append((shipped_map, shipped_score))
    together = detector(np.concatenate(first_images))
    alone = [np.concatenate(outputs) for outputs in zip(*first_outputs, strict=True)]
    return Parity(
        num_images=len(rows),
        images="test images" if tested else "held-out good parts",
        tolerance=tolerance,
        max_map_difference=map_difference,
        max_score_difference=score_difference,
        max_batch_difference=max(_difference(a, b) for a, b in zip(together, alone, strict=True)),
        decisions_changed=changed,
        onnxruntime=onnxruntime.__version__,
    )


def _difference(shipped: np.ndarray, seen: np.ndarray) -> float:
    """The largest difference, absolute up to 1 and relative above; NaN is infinite, since nothing compares with it.

    Models score on scales of their own: at a score of 700, float32 itself rounds by 6e-5.
    """
    difference = float((np.abs(shipped - seen) / np.maximum(1, np.abs(seen))).max())
    return float("inf") if math.isnan(difference) else difference
