"""The loop: any model, from prepared arrays to trained weights; resumable at any moment, ended by a bad loss."""

import hashlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from anomaly_models import MODELS
from anomaly_models import base as contract
from anomaly_models.base import AnomalyModel, Batch, Prediction
from pipelines.data.batches import Images, PreparedData, SplitBatches, frame_of
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
from pipelines.training.loop import Learner, Schedule, Training, follow_steps, run_steps
from pipelines.training.ranks import ALONE, Ranks
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
    ranks: Ranks = ALONE,
) -> None:
    """Train one cell and write `models/<model>/<category>/seed<seed>.trained`: weights, settings, the MLflow run's id.

    Without a `seed` it is the first of the file. A run that was killed goes on from its last checkpoint and, on the
    CPU, ends with the same bits. Of several processes, which all call it, the first one does all but the steps.

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
    if not ranks.shard.alone:
        _require_shares(model_name, method, category, config, len(data.rows("train")), ranks.shard.world)
    inputs = find_inputs(model_name, config, project, device)
    training = _Training(model_name, method, config, seed, data, inputs, device, ranks)
    if not ranks.leads:
        _follow(training, category)
        return
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
        run.tags({"processes": ranks.shard.world})
        if variant := _variant(model_name, params):
            run.tags({"variant": variant})
        if tuned := params.tuned_of(model_name):
            run.tags({"tuned": tuned.text})
        run.file(project.prepared(category) / INDEX_FILE, "data")  # which image is in which split
        warnings: list[str] = []
        if warning := inputs.warning(data):
            _warn(warning, warnings, run, console)
        try:
            model = _fit(training, checkpoint, run, console)
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
        run.output(cell.weights, "checkpoint")


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


def _require_shares(
    model_name: str, method: str, category: str, config: contract.Config, num_normals: int, world: int
) -> None:
    """Raise StageError if several processes cannot train this, or if some of them would have nothing to do."""
    if num_normals < world:
        raise StageError(
            f"{model_name} on {category}: {num_normals} good images to learn from are fewer than {world} processes; "
            f"start {num_normals} or fewer"
        )
    if config.learns_at_once:
        return
    if not MODELS[method].learns_in_shares:
        raise StageError(f"{model_name}: {method} cannot be trained by several processes; start one, without torchrun")
    if config.batch_size < world:
        raise StageError(
            f"{model_name}.batch_size {config.batch_size} is smaller than {world} processes, which share each batch; "
            f"raise it, or start {config.batch_size}"
        )


@dataclass(frozen=True, slots=True)
class _Training:
    """What every process has of a cell before it begins."""

    model_name: str
    method: str
    config: contract.Config
    seed: int
    data: Images
    inputs: Inputs
    device: torch.device
    ranks: Ranks

    def built(self) -> tuple[AnomalyModel, Training]:
        """The model as its seed makes it, and what is to move its parameters."""
        model = build(self.method, self.config, self.seed).to(self.device)
        return model, model.optimizer(self.total_steps(model))

    def total_steps(self, model: AnomalyModel) -> int:
        return model.total_steps(len(self.data.rows("train")))

    def normals(self) -> SplitBatches:
        return self.data.batches("train", self.config.batch_size)

    def prepare(self, model: AnomalyModel) -> None:
        """Let all processes learn what takes no step; the first one has the pretrained weights."""
        shard = self.ranks.shard
        if shard.alone:
            model.prepare(self.normals())
            return
        self.ranks.give_state(model, None)
        rows = self.data.rows("train")[shard.rank :: shard.world]
        model.prepare_together(self.normals(), SplitBatches(self.data, rows, self.config.batch_size), shard)

    def schedule(self, first: int, model: AnomalyModel) -> Schedule:
        return Schedule(self.seed, self.config.batch_size, first, self.total_steps(model))


def _fit(training: _Training, checkpoint: Checkpoint, run: OpenRun, console: Console) -> AnomalyModel:
    data, ranks = training.data, training.ranks
    model, moving = training.built()
    first_step = checkpoint.load(model, moving, training.device)
    ranks.given((torch.get_num_threads(), first_step))
    if first_step is None:
        training.inputs.load_into(model)
        with console.status(f"learning from {len(data.index.rows('train'))} normal images"):
            training.prepare(model)
        checkpoint.save(0, model, moving)
        first_step = 0
    elif moving is not None:
        total = training.total_steps(model)
        console.print(f"goes on at step {first_step} of {total}, where it was killed", highlight=False)
    if moving is not None:
        ranks.give_state(model, moving)
        learner = Learner(model, model.losses, moving, model.same_every_step)
        schedule = training.schedule(first_step, model)
        run_steps(learner, training.inputs.added_to(data), schedule, checkpoint, run, console, ranks.shard)
    model.eval()
    model.calibrate(data.batches("holdout", training.config.batch_size))
    model.check_scores(data.batches("holdout", training.config.batch_size))
    return model


def _follow(training: _Training, category: str) -> None:
    """What a process does that is not the first one: its share of all that `_fit` does together."""
    ranks = training.ranks
    try:
        model, moving = training.built()
        threads, first_step = ranks.given()
        torch.set_num_threads(threads)
        if first_step is None:
            training.prepare(model)
        if moving is not None:
            ranks.give_state(model, moving)
            learner = Learner(model, model.losses, moving, model.same_every_step)
            batches = training.inputs.added_to(training.data)
            follow_steps(learner, batches, training.schedule(first_step or 0, model), ranks.shard)
    except contract.ModelError as error:
        raise StageError(f"{training.model_name} on {category}: {error}") from error
