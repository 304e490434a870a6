"""A trained model -> one ONNX file, kept only if it reproduces the original on the category's real test images.

The proof runs from the original files through `pipelines.pictures.images` and onnxruntime, as `predict` will, and
compares maps, scores and decisions with the trained model on the arrays that `evaluate` used: the number you saw is the
one you ship.
"""

import io
import math
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from anomaly_models.base import AnomalyModel
from pipelines.data.batches import PreparedData
from pipelines.errors import ExportError, StageError
from pipelines.files import atomic_folder, read_json, write_json
from pipelines.inference.detector import Detector, ModelCard
from pipelines.paths import Project
from pipelines.settings.params import Params
from pipelines.tracking.runs import cell_run
from pipelines.training.trained import load_trained

_EXAMPLE_BATCH = 2  # tracing with one image would fix the batch at one
_BATCH_CHECK = 4  # the same file must also score several images at once


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the exported graph is from its original, over real images from their original files."""

    num_images: int
    tolerance: float
    max_map_difference: float
    max_score_difference: float
    max_batch_difference: float  # of maps and scores, `_BATCH_CHECK` images at once against one by one
    decisions_changed: int
    onnxruntime: str

    def check(self, model: str, category: str) -> None:
        """Raise ExportError if the file must not be kept."""
        worst = max(self.max_map_difference, self.max_score_difference, self.max_batch_difference)
        if self.decisions_changed or not worst <= self.tolerance:
            raise ExportError(
                f"{model} on {category}: the exported graph differs from the trained model by {worst:.2g} (allowed: "
                f"{self.tolerance:.2g}) and changes {self.decisions_changed} of {self.num_images} decisions; "
                "the file was not kept"
            )


def export(model_name: str, category: str, params: Params, project: Project) -> Parity:
    """Write `exported/<model>/<category>`: model.onnx, and parity.json beside it as its proof. Runs on the CPU.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the cell is not trained and evaluated, or its data has changed since.
        ExportError: the graph does not reproduce the model; nothing is kept.
    """
    params.check_category(category)
    trained = load_trained(project.model(model_name, category), torch.device("cpu"))
    evaluation = _evaluation(project, model_name, category)
    card = ModelCard(
        model=model_name,
        category=category,
        image_size=trained.image_size,
        white_level=int(trained.run["settings"]["prepare"]["white_level"]),
        threshold=evaluation["threshold"]["value"],
        pixel_threshold=evaluation["threshold"]["pixel_value"],
        false_alarm_rate=evaluation["threshold"]["rate_requested"],
        run_id=trained.run["run_id"],
        data_sha256=trained.data_sha256,
        params=trained.run["settings"],
    )
    with atomic_folder(project.export(model_name, category)) as folder:
        path = folder / "model.onnx"
        write_graph(trained.model, path, trained.image_size, params.export.opset, card)
        source = Path(params.data.root) / category
        data = PreparedData(project.prepared(category), trained.image_size, torch.device("cpu"))
        trained.check_data(data)
        parity = measure_parity(trained.model, Detector(path), data, project.root / source, params.export.tolerance)
        parity.check(model_name, category)
        write_json(folder / "parity.json", asdict(parity))
    _track(project, params, trained.run, parity, card.image_size)
    return parity


def _evaluation(project: Project, model_name: str, category: str) -> dict[str, Any]:
    path = project.evaluation(model_name, category) / "evaluation.json"
    if not path.exists():
        raise StageError(f"{path}: not there; run `blemish evaluate {model_name} {category}` first")
    evaluation: dict[str, Any] = read_json(path)
    return evaluation


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
    model: AnomalyModel, detector: Detector, data: PreparedData, source: Path, tolerance: float
) -> Parity:
    """Compare on every test image: original files through the exported graph, prepared arrays through the model."""
    rows = data.rows("test")
    threshold = detector.card.threshold
    map_difference = score_difference = 0.0
    changed = 0
    first_images: list[np.ndarray] = []
    first_outputs: list[tuple[np.ndarray, np.ndarray]] = []
    for row in rows:
        image = detector.load(source / data.index.images[row].path)
        shipped_map, shipped_score = detector(image)
        with torch.no_grad():
            seen = model(data.batch([row]).image)
        map_difference = max(map_difference, _difference(shipped_map, seen.anomaly_map.numpy()))
        score_difference = max(score_difference, _difference(shipped_score, seen.score.numpy()))
        changed += bool(shipped_score[0] > threshold) != bool(seen.score.numpy()[0] > threshold)
        if len(first_images) < _BATCH_CHECK:
            first_images.append(image)
            first_outputs.append((shipped_map, shipped_score))
    together = detector(np.concatenate(first_images))
    alone = [np.concatenate(outputs) for outputs in zip(*first_outputs, strict=True)]
    return Parity(
        num_images=len(rows),
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


def _track(project: Project, params: Params, run: dict[str, Any], parity: Parity, image_size: int) -> None:
    folder = project.export(run["model"], run["settings"]["data"]["category"])
    with cell_run(
        project.root, params.tracking.experiment, run["model"], run["settings"]["data"]["category"], run["run_id"]
    ) as opened:
        opened.tags({"parity": asdict(parity)})
        opened.file(folder / "parity.json", "export")
        opened.onnx_model(folder / "model.onnx", image_size)
