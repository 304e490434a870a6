"""An exported cell -> one file that carries the detector, its proof and what runs it; `inference.bundle` reads it."""

import ast
import csv
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_models import MODELS
from pipelines import lineage
from pipelines.data.index import PreparedIndex
from pipelines.deployment.records import Int8, Latency, Parity
from pipelines.deployment.shipped import deployed, int8_proof, shipped
from pipelines.environment import environment
from pipelines.errors import ExportError, StageError
from pipelines.evaluation.outcomes import Evaluation, ScoredImage, read_predictions
from pipelines.files import atomic_file
from pipelines.inference import bundle as opened
from pipelines.inference.bundle import Bundle, Replayed, Sample, allowed
from pipelines.inference.card import Precision
from pipelines.inference.detector import Detector, ModelCard
from pipelines.inference.drift import SCORE
from pipelines.inference.measures import MEASURES, measured
from pipelines.names import registered_model
from pipelines.numbers import counted, interval, percent
from pipelines.paths import INDEX_FILE, Cell, Project
from pipelines.settings.params import Params
from pipelines.sources.catalogue import SOURCES
from pipelines.sources.solar_cells import TERMS as SOLAR_CELLS

_MAIN = """\
import sys
from pathlib import Path

try:
    import numpy, onnxruntime, PIL
except ModuleNotFoundError as error:
    sys.exit(f"error: the package '{error.name}' is not installed; pip install onnxruntime numpy Pillow")

from pipelines.inference.runner import main

main(Path(__file__).parent)
"""
# What is called in a bundle: by Python itself, and by MLflow for the one that it logs.
_CODE = ("pipelines/inference/runner.py", "pipelines/inference/answers.py")
_RUNTIME = ("onnxruntime", "numpy", "pillow")
_CLEAR = 100  # times what rounding is allowed: so far from the threshold a sample has to be, for one decision anywhere
_TIME = (1980, 1, 1, 0, 0, 0)  # of every file in it, so that the same cell gives the same bytes


@dataclass(frozen=True, slots=True)
class Made:
    """A bundle that was written."""

    path: Path
    num_samples: int
    is_deployed: bool  # holds the file with the threshold that a person chose


def bundle(
    model: str,
    category: str,
    params: Params,
    project: Project,
    path: Path | None = None,
    precision: Precision = "float32",
) -> Made:
    """Write one file, by default `bundles/<model>-<category>.zip`: graph, card, samples with scores, and a runner.

    Of the exported file of that precision, or of the deployed one where a person chose a threshold for the same
    training. Kept only if it replays its own samples.

    Raises:
        ParamsError: no such category in the params file.
        StageError: the cell is not evaluated, exported or as it was then; a sample's file has changed.
        ExportError: the file does not reproduce its own samples.
    """
    params.check_category(category)
    cell = project.cell(model, category, params.seed)
    detector = shipped(cell, precision)
    latency = Latency.load(cell.latency, f"run {cell.verb('latency')} again") if cell.latency.exists() else None
    path = path or project.root / "bundles" / name_of(cell, precision)
    num_samples = write(path, cell, detector, latency, params, project)
    return Made(path, num_samples, is_deployed=detector.path == deployed(cell, precision))


def bundle_champion(
    category: str, params: Params, project: Project, path: Path | None = None, precision: Precision = "float32"
) -> Made:
    """Likewise of the champion in the model registry, which may be of an earlier training than what lies here.

    Raises:
        StageError: nobody is champion, or the store cannot be used; or as `bundle`.
        ExportError: what the store has is no bundle, or does not reproduce its own samples.
    """
    from pipelines.tracking.registry import bundle_of_champion, reigning

    params.check_category(category)
    experiment, name = params.tracking.experiment, registered_model(params.data.name, category)
    run_id = reigning(project.root, experiment, name)
    if run_id is None:
        raise StageError(f"{category}: nobody is champion in the model registry; run `blemish report` first")
    for model in params.models:
        cell = project.cell(model, category, params.seed)
        if cell.onnx.is_file() and Detector(cell.onnx).card.run_id == run_id:
            return bundle(model, category, params, project, path, precision)
    if precision != "float32":
        raise StageError(
            f"{category}: the champion is of an earlier training than what lies here, and the registry has its float32 "
            "file alone"
        )
    with bundle_of_champion(project.root, experiment, name) as logged:
        made = Bundle(logged)
        replayed = _replayed(made)
        path = path or project.root / "bundles" / logged.name
        with atomic_file(path) as temporary:
            shutil.copyfile(logged, temporary)
    return Made(path, len(replayed), is_deployed=False)


def name_of(cell: Cell, precision: Precision = "float32") -> str:
    """What its bundle is called."""
    return f"{cell.model}-{cell.category}{'' if precision == 'float32' else f'-{precision}'}.zip"


def write(path: Path, cell: Cell, detector: Detector, latency: Latency | None, params: Params, project: Project) -> int:
    """The bundle of one of a cell's files; gives the number of samples.

    Raises:
        StageError: the cell is not evaluated, or not as it was then; a sample's file has changed.
        ExportError: the file does not reproduce its own samples; nothing is kept.
    """
    evaluation = _evaluation(cell, detector.card)
    images: Sequence[ScoredImage] = read_predictions(cell.evaluated, f"run {cell.verb('evaluate')} again")
    int8 = None
    if detector.card.precision == "int8":
        int8 = int8_proof(cell)
        evaluation, images, latency = int8.of(evaluation), int8.images, latency and latency.int8
    originals = _originals(cell, project, evaluation, project.root / params.data.root / cell.category)
    with atomic_file(path) as temporary:
        about = _about(cell, detector.card, evaluation, latency, int8, _terms(evaluation.data_set, params))
        _write(temporary, _contents(detector, about, images, originals))
        replayed = _replayed(Bundle(temporary))
    return len(replayed)


def _replayed(made: Bundle) -> list[Replayed]:
    """Raises ExportError where a sample is answered otherwise than it was."""
    found = made.replay(made.engine())
    if different := [sample.line for sample in found if not sample.is_same]:
        card = made.card
        raise ExportError(
            f"{card.model} on {card.category}: the bundle does not reproduce its own samples ({different[0]})"
        )
    return found


def _evaluation(cell: Cell, card: ModelCard) -> Evaluation:
    evaluation = Evaluation.load(cell.evaluation, f"run {cell.verb('evaluate')} first")
    if evaluation.run_id != card.run_id:
        raise StageError(
            f"{cell.title}: the exported file is of run {card.run_id}, the evaluation of run {evaluation.run_id}; run "
            f"{cell.verb('export')} again"
        )
    return evaluation


def _originals(cell: Cell, project: Project, evaluation: Evaluation, source: Path) -> "_Originals":
    folder = project.prepared(cell.category)
    index = PreparedIndex.load(folder)
    if hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest() != evaluation.index_sha256:
        raise StageError(f"{cell.category}: prepared anew since {cell.title} was evaluated; run `dvc repro` first")
    return _Originals(index, {image.path: row for row, image in enumerate(index.images)}, source)


@dataclass(frozen=True, slots=True)
class _Originals:
    """The files that pictures were prepared from."""

    index: PreparedIndex
    rows: dict[str, int]
    source: Path

    def file(self, image: ScoredImage) -> Path:
        """Raises StageError if it is not what it was."""
        return self.index.original(self.rows[image.path], self.source)


# ------------------------------------------------------------------------------------------------------------ contents


def _contents(
    detector: Detector, about: dict[str, Any], images: Sequence[ScoredImage], originals: _Originals
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file but the manifest."""
    yield "__main__.py", _MAIN.encode()
    yield "README.txt", _readme(detector.card).encode()
    yield "requirements.txt", "".join(f"{name}=={version(name)}\n" for name in _RUNTIME).encode()
    for code in lineage.needed_by(*_CODE):
        yield code.relative_to(lineage.ROOT).as_posix(), code.read_bytes()
    yield opened.GRAPH, detector.path.read_bytes()
    yield opened.CARD, _json(about)
    yield opened.CALIBRATION, _calibration(detector, images, originals)
    samples, maps = [], {}
    for number, image in enumerate(_chosen(images, detector.card.threshold)):
        original = originals.file(image)
        name = f"samples/{number}{original.suffix.lower()}"
        content = original.read_bytes()
        found, scores = detector(detector.fitted(detector.decode(content, Path(name)), name))
        maps[str(number)] = found[0, 0]
        score = float(scores[0])
        samples.append(Sample(name, image.defect, score, detector.card.decision(score)))
        yield name, content
    yield opened.SAMPLES, _json([sample._asdict() for sample in samples])
    yield opened.MAPS, _arrays(maps)


def _chosen(images: Sequence[ScoredImage], threshold: float) -> list[ScoredImage]:
    """Up to five, none of them at the threshold: tested ones, or held-out ones where there are none.

    Of the good ones that which scores in the middle and the highest that passes, of the defects the lowest, the middle
    and the highest.
    """
    tested = [image for image in images if image.split == "test"] or list(images)
    far = [
        image for image in tested if abs(image.score - threshold) > _CLEAR * allowed(image.score, threshold)
    ] or tested
    good, defects = (sorted((i for i in far if i.label is label), key=lambda i: i.score) for label in (False, True))
    passed = [image for image in good if image.score <= threshold] or good
    wanted = [*good[len(good) // 2 :][:1], *passed[-1:], *defects[:1], *defects[len(defects) // 2 :][:1], *defects[-1:]]
    return list({image.path: image for image in wanted}.values())


def _about(
    cell: Cell, card: ModelCard, evaluation: Evaluation, latency: Latency | None, int8: Int8 | None, terms: str
) -> dict[str, Any]:
    """`card.json`: what it is, how good, how sure, on what terms."""
    parity = Parity.load(cell.parity, f"run {cell.verb('export')} again")
    return {
        "format": opened.FORMAT,
        "made_with": environment(),
        "detector": card.to_json(),
        "data": {
            "name": evaluation.data_set,
            "category": evaluation.category,
            "sha256": evaluation.data_sha256,
            "index_sha256": evaluation.index_sha256,
            "images": evaluation.counts.model_dump(mode="json"),
            "terms": terms,
        },
        "seed": evaluation.protocol.seed,
        "threshold": evaluation.threshold.model_dump(mode="json"),
        "metrics": {
            name: {"value": value, "interval_95": evaluation.intervals.get(name)}
            for name, value in evaluation.metrics.items()
        },
        "defects": {name: found.model_dump(mode="json") for name, found in evaluation.defects.items()},
        "groups": evaluation.groups.text if evaluation.groups else None,
        "parity": parity.model_dump(mode="json"),
        "int8": None if int8 is None else int8.model_dump(mode="json", exclude={"images"}),
        "latency": None if latency is None else latency.model_dump(mode="json", exclude={"int8"}),
        "limits": _limits(card, evaluation, int8),
        "method": _method(evaluation.method),
        "licences": {"weights": card.weights, "data": terms, "code": "Apache-2.0"},
    }


def _terms(data_set: str, params: Params) -> str:
    """On what terms the pictures that it learnt from may be used; a folder may be called as a data set is."""
    if params.download.get(data_set) is None:
        return "known to whoever took the pictures: a folder of one's own"
    known = SOLAR_CELLS if data_set == "elpv" else SOURCES.get(data_set)
    return "drawn by Blemish: under its own licence" if known is None else known.sentence()


def _limits(card: ModelCard, evaluation: Evaluation, int8: Int8 | None) -> list[str]:
    """In sentences, where what was measured ends."""
    counts, at = evaluation.counts, evaluation.threshold
    told = [
        f"It learnt from {counted(counts.train, 'good part')}; its figures are of {counts.test_images} pictures, good "
        "and defective. Other parts, cameras and light are not covered."
    ]
    if card.choices:
        told.append(f"Its threshold was chosen by {card.choices[-1].by}: no rate of false alarms is promised.")
    else:
        rate = f"{percent(at.expected_rate)} % (95 % interval {interval((at.interval_low, at.interval_high))})"
        told.append(f"Of good parts like the {at.num_images} held out, {rate} are expected to be rejected.")
        told.append(evaluation.review.text(card.threshold))
        if not at.attainable:
            told.append(f"Too few were held out for the rate that was asked for; it takes {at.num_images_needed}.")
    if int8 is not None:
        told.append(
            f"It computes convolutions in 8-bit integers: {int8.text}. `verify` says if a machine does so alike."
        )
    size = card.image_size
    told.append(f"Pictures are made to {size} pixels (`{card.fit}`); what is smaller than a pixel there is not seen.")
    told.append(f"Pictures above {card.max_megapixels} megapixels are refused.")
    if card.region is not None:
        told.append("It takes pictures of one size alone, that of its region of interest.")
    told.append("The runner inside finds less damage in JPEGs than `blemish predict`, unless simplejpeg is installed.")
    told.append("DICOM needs pydicom, and 16-bit colour and rarer TIFFs imagecodecs and tifffile.")
    return told


def _method(method: str) -> str:
    """The paper, and where the model deliberately differs from it: what stands at the head of its file."""
    module = MODELS.data[method].partition(":")[0]
    file = lineage.ROOT / f"{module.replace('.', '/')}.py"
    told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else None
    return told or method


def _readme(card: ModelCard) -> str:
    return f"""A detector of visual anomalies: {card.model} on {card.category}, run {card.run_id}.

It needs Python 3.11 or newer with onnxruntime, numpy and Pillow (requirements.txt has the versions it was made with).
Do not unpack it: Python runs the file as it is. Called, say, detector.zip:

    python detector.zip verify                  is every byte as it was, and does this machine answer as its maker's?
    python detector.zip predict new_images/     verdicts, CSV, JSON and overlays
    python detector.zip about                   data, figures with intervals, limits, licences

card.json says what it is, calibration.csv has the scores of the good parts that the threshold comes from, samples/ has
pictures with the scores and maps that are to come of them, manifest.json the SHA-256 of each file.
"""


def _calibration(detector: Detector, images: Sequence[ScoredImage], originals: _Originals) -> bytes:
    """Of the held-out good parts: the score that the threshold comes from, and what further parts compare with.

    The first may be that of another calibration, or of a model that learnt from others; where the model learnt from
    all good parts, no score of its own compares with those of further ones.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["threshold_score", SCORE, *MEASURES])
    for image in images:
        if image.split == "holdout":
            inputs = detector.load(originals.file(image))
            own = "" if originals.index.by_folds else repr(float(detector(inputs)[1][0]))
            writer.writerow([repr(image.score), own, *map(repr, measured(inputs).values())])
    return file.getvalue().encode()


def _arrays(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its annotation takes a name for `allow_pickle`
    return file.getvalue()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ------------------------------------------------------------------------------------------------------------- writing


def _write(path: Path, contents: Iterable[tuple[str, bytes]]) -> None:
    """As a ZIP whose last bytes are the SHA-256 of all before them."""
    digests = {}
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = opened.comment("0" * 64)
        for name, content in contents:
            digests[name] = hashlib.sha256(content).hexdigest()
            archive.writestr(_entry(name), content)
        archive.writestr(_entry(opened.MANIFEST), _json({"sha256": digests}))
    digest, end = opened.digest_and_end(path)
    with path.open("r+b") as file:
        file.seek(-len(end), io.SEEK_END)
        file.write(opened.comment(digest))


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry
