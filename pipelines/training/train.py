"""The loop: any model, from prepared arrays to trained weights; resumable at any moment, ended by a bad loss."""

import hashlib
import inspect
import math
from collections.abc import Sequence

import torch
from rich.console import Console

from anomaly_models import MODELS
from anomaly_models import base as contract
from anomaly_models.base import AnomalyModel, Batch, Prediction
from pipelines.data.batches import Images, PreparedData, frame_of
from pipelines.data.tiled import learnt_from
from pipelines.errors import StageError, TrainingDiverged
from pipelines.lineage import code_of
from pipelines.paths import INDEX_FILE, Project
from pipelines.settings.params import Params
from pipelines.settings.variants import Variant, sentences
from pipelines.tracking.records import as_texts
from pipelines.tracking.runs import OpenRun, cell_tags
from pipelines.training.checkpoint import Checkpoint, state_bytes
from pipelines.training.inputs import Inputs, find_inputs
from pipelines.training.loop import Learner, Schedule, run_steps
from pipelines.training.trained import OfTraining, RunRecord, RunSettings, build, save_trained, weights_of
from pipelines.training.work import Work

_ROUNDING = 2**-21  # relative: four units in the last place of a float32


def train(
    model_name: str,
    category: str,
    params: Params,
    project: Project,
    device: torch.device,
    console: Console,
    seed: int | None = None,
) -> None:
    """Train one cell and write `models/<model>/<category>/seed<seed>.trained`: weights, settings, the MLflow run's id.

    Without a `seed` it is the first of the file. A run that was killed goes on from its last checkpoint and, on the
    CPU, ends with the same bits.

    Raises:
        ParamsError: no such model, category or seed in the params file.
        StageError: the category is not prepared, another process is training this cell, or the model cannot work with
            this data or these settings.
        WeightsError: pretrained weights are missing or do not fit.
        TrainingDiverged: a loss is not finite, or a weight, a map or a score of the finished model.
    """
    params.check_category(category)
    seed = params.seed_of(seed)
    config, method = params.model_config_of(model_name), params.method_of(model_name)
    prepared = PreparedData(project.prepared(category), frame_of(config), device)
    data = learnt_from(prepared, config)
    _require_holdout(model_name, category, MODELS[method].min_holdout, data)
    inputs = find_inputs(model_name, config, project, device)
    settings = RunSettings(
        method=method,
        models={model_name: config.model_dump()},
        inputs=inputs.version,
        prepare=params.prepare,
        train=OfTraining(seed=seed),
        data=prepared.version,
    )
    cell = project.cell(model_name, category, seed)
    work = Work(title=cell.title, run_name=cell.name, folder=cell.work, tags=cell_tags(cell))
    code = code_of("pipelines/training/train.py", inspect.getfile(MODELS[method]))
    experiment = params.tracking.experiment
    with (
        work.locked(),
        work.tracked(settings.model_dump(), code, device, project.root, experiment) as (checkpoint, run),
    ):
        source = project.root / params.data.root / category
        run.dataset(f"{params.data.name}/{category}", data.index.data_sha256, source)
        run.tags({"data_set": params.data.name, "data_sha256": data.index.data_sha256, "seed": seed, "method": method})
        if variant := _variant(model_name, params):
            run.tags({"variant": variant})
        if tuned := params.tuned_of(model_name):
            run.tags({"tuned": tuned.text})
        run.file(project.prepared(category) / INDEX_FILE, "data")  # which image is in which split
        warnings: list[str] = []
        if warning := inputs.warning(data):
            _warn(warning, warnings, run, console)
        try:
            model = _fit(inputs, method, config, seed, data, device, checkpoint, run, console)
        except contract.ModelError as error:
            raise StageError(f"{model_name} on {category}: {error}") from error
        scores = _holdout_scores(model, model_name, data)
        weights = weights_of(model)
        record = RunRecord(
            run_id=run.run_id,
            model=model_name,
            category=category,
            settings=settings,
            train_seconds=round(checkpoint.seconds, 3),
            train_steps=model.total_steps(len(data.rows("train"))),
            train_images=len(data.index.rows("train")),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            state_megabytes=round(state_bytes(model.state_dict()) / 1e6, 3),
            weights_sha256=hashlib.sha256(weights).hexdigest(),
        )
        save_trained(weights, record, cell)
        if warning := _equal_scores_warning(scores, model_name, category):
            _warn(warning, warnings, run, console)
        for warning in model.warnings():
            _warn(f"{model_name} on {category}: {warning}", warnings, run, console)
        run.metrics(record.metrics())
        run.file(cell.weights, "checkpoint")


def _variant(model_name: str, params: Params) -> str | None:
    """What it has otherwise than the first model of its method, in words; None of the first itself."""
    models = [
        Variant(name, params.method_of(name), as_texts(params.model_config_of(name).model_dump()), params.told_of(name))
        for name in params.models
    ]
    return sentences(models).get(model_name)


def _warn(warning: str, before: list[str], run: OpenRun, console: Console) -> None:
    """Print a warning, and keep it with those `before` it."""
    console.print(f"warning: {warning}", markup=False, highlight=False)
    before.append(warning)
    run.tags({"warning": "; ".join(before)})


@torch.no_grad()
def _holdout_scores(model: AnomalyModel, model_name: str, data: Images) -> list[float]:
    """Of the held-out good images, one by one. Raises TrainingDiverged if a score or a map is not finite."""
    scores, bad = list[float](), 0
    for batch in data.batches("holdout", batch_size=1):
        found = _predict(model, batch)
        bad += not bool(found.score.isfinite().all() and found.anomaly_map.isfinite().all())
        scores.append(float(found.score))
    if bad:
        raise TrainingDiverged(
            f"{model_name} on {data.index.category}: what the trained model says of {bad} of {len(scores)} "
            "held-out good images is not finite; lower the learning rate or check the data"
        )
    return scores


def _equal_scores_warning(scores: Sequence[float], model_name: str, category: str) -> str | None:
    """What to do if the held-out images have one score, up to rounding: it then says nothing about a part."""
    if len(scores) < 2 or not math.isclose(min(scores), max(scores), rel_tol=_ROUNDING):
        return None
    return (
        f"{model_name} on {category}: all {len(scores)} held-out good images score {scores[0]:.6g}, so that "
        "the threshold means nothing; the score is saturated (another image_score or other settings of the model may "
        "help), or the images are constant or copies of one another (look at them)"
    )


def _predict(model: AnomalyModel, batch: Batch) -> Prediction:
    """Of one image, or of one tile."""
    if batch.tile is None:
        return Prediction(*model(batch.image, batch.region))
    return model.forward_at(batch.image, batch.region, batch.tile.to(batch.image.device))


def _require_holdout(model_name: str, category: str, needed: int, data: Images) -> None:
    """Before the first step, since calibration comes after the last. Raises StageError."""
    found = len(data.rows("holdout"))
    if found < needed:
        raise StageError(
            f"{model_name} on {category}: calibration needs {needed} or more held-out good images, found {found}; "
            "give more good images, or raise prepare.holdout"
        )


def _fit(
    inputs: Inputs,
    method: str,
    config: contract.Config,
    seed: int,
    data: Images,
    device: torch.device,
    checkpoint: Checkpoint,
    run: OpenRun,
    console: Console,
) -> AnomalyModel:
    model = build(method, config, seed).to(device)
    normals = data.batches("train", config.batch_size)
    total_steps = model.total_steps(len(data.rows("train")))
    training = model.optimizer(total_steps)
    first_step = checkpoint.load(model, training, device)
    if first_step is None:
        inputs.load_into(model)
        with console.status(f"learning from {len(data.index.rows('train'))} normal images"):
            model.prepare(normals)
        checkpoint.save(0, model, training)
        first_step = 0
    elif training is not None:
        console.print(f"goes on at step {first_step} of {total_steps}, where it was killed", highlight=False)
    if training is not None:
        schedule = Schedule(seed, config.batch_size, first_step, total_steps)
        learner = Learner(model, model.losses, training)
        run_steps(learner, inputs.added_to(data), schedule, checkpoint, run, console)
    model.eval()
    model.calibrate(data.batches("holdout", config.batch_size))
    model.check_scores(data.batches("holdout", config.batch_size))
    return model
