"""Verb tune: search a model's settings on a category's development images; the best become a variant of it.

The model's own settings are the first trial, so that what is written is better than they are by the objective; if
nothing is, nothing is written. The same call again goes on with the same study, up to as many trials as it names.
"""

import contextlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import MofNCompleteColumn

from anomaly_models import MODELS
from anomaly_models.base import Config, ModelError
from pipelines.data.batches import frame_of
from pipelines.errors import TrainingDiverged
from pipelines.lineage import code_of
from pipelines.numbers import counted, interval, percent
from pipelines.paths import Project
from pipelines.progress import progress_bar
from pipelines.settings.params import Params
from pipelines.settings.problems import problems_in
from pipelines.settings.sections import changed, value_at
from pipelines.settings.tuned import Tuned
from pipelines.tracking.runs import OpenRun, search_run, trial_run
from pipelines.training.checkpoint import fingerprint
from pipelines.training.inputs import find_inputs
from pipelines.tuning.development import Access, Defects, Development, exam_of
from pipelines.tuning.judge import Verdict
from pipelines.tuning.spaces import named, space_of
from pipelines.tuning.study import PRUNED_AT, REASON, Ended, GivenUp, Place, Settings, Study, Trying
from pipelines.tuning.trial import Task, attempt
from pipelines.tuning.winner import require_name, write_winner

_REFUSALS = (ModelError, TrainingDiverged)  # of settings, by a trial


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks of a search."""

    trials: int  # that the study has in the end
    minutes: float | None  # after which no trial is begun
    search: Sequence[str]  # settings and what to try of them, as `spaces` reads it; nothing: those of the method
    name: str | None  # of the variant
    defects: Defects | None
    seed: int
    storage: str | None  # the address of a database; None: the project's own


@dataclass(frozen=True, slots=True)
class Search:
    """A search that is under way."""

    model: str
    category: str
    config: Config
    own: Settings  # of the settings that are searched, the model's values
    task: Task
    project: Project
    experiment: str
    console: Console


def tune(
    model: str, category: str, wish: Wish, params: Params, project: Project, device: torch.device, console: Console
) -> list[str]:
    """Search, and write the winner into params.yaml; gives what was found, a line each.

    Raises:
        ParamsError: no such model or category in the params file, or a wish that cannot be met.
        StageError: the category is not prepared or has too few images for a search, or the database or the tracking
            store cannot be used; what has been tried is kept.
        WeightsError: pretrained weights are missing or do not fit.
    """
    params.check_category(category)
    config, method = params.model_config_of(model), params.method_of(model)
    name = wish.name or f"{model}_tuned"
    require_name(name, model, category, params)
    dumped = config.model_dump(mode="json")
    space = space_of(method, model, dumped, wish.search, partial(_refusal, model, method, config))
    learns = config.wants.anomalies > 0
    access = Access(params.defects_apart(learns=learns or params.chosen_on_defects(model)), learns, wish.defects)
    data = Development(project.prepared(category), frame_of(config), device, access)
    inputs = find_inputs(model, config, project, device)
    task = Task(method, data, exam_of(data, wish.seed), inputs, wish.seed, device)
    settings = {
        "method": method,
        "model": dumped,
        "space": {key: str(setting) for key, setting in space.items()},
        "inputs": inputs.version,
        "data": data.sha256,
        "surface": data.index.surface,
        "region": data.index.region,
        "frame": str(frame_of(config)),
        "defects": data.defects,
        "seed": wish.seed,
        "device": device.type,
    }
    code = code_of("pipelines/tuning/trial.py", inspect.getfile(MODELS[method]))
    key = f"{model}-{category}-{fingerprint(settings, code)}"
    own = {setting: value_at(dumped, setting) for setting in space}
    search = Search(model, category, config, own, task, project, params.tracking.experiment, console)
    place = Place(wish.storage, project.studies)
    with (
        contextlib.closing(Study(place, key, space, own, wish.seed)) as study,
        search_run(project.root, search.experiment, f"tune {model}-{category}", key) as run,
    ):
        _introduce(search, study, place, wish)
        told = {"tuned_model": model, "tuned_category": category, "tuned_on": data.defects}
        run.tags({**told, "search_seed": wish.seed, "data_set": params.data.name})
        run.params({"search": settings["space"], "own": {k: named(value) for k, value in own.items()}})
        _run_trials(search, study, wish)
        return _conclude(search, study, name, run)


def _refusal(model: str, method: str, config: Config, values: Mapping[str, Any]) -> str | None:
    """Why the model cannot be tried with other values of its settings; None if it can."""
    section = changed(config.model_dump(mode="json"), values)
    try:
        other = type(config).model_validate(section)
        with torch.device("meta"):  # shapes without numbers
            MODELS[method](other.network)
    except ValidationError as error:
        return problems_in(error, f"models.{model}", type(config), section)[0]
    except ModelError as error:
        return str(error)
    for name in ("penalty", "textures"):
        if getattr(other.wants, name) and not getattr(config.wants, name):
            return f"asks for {name}, which {model} does without; leave it out, or tune a variant that has it"
    return None


def _with(config: Config, settings: Settings) -> Config:
    """Raises ValidationError if the settings do not go together."""
    return type(config).model_validate(changed(config.model_dump(mode="json"), settings))


def _introduce(search: Search, study: Study, place: Place, wish: Wish) -> None:
    exam, data = search.task.exam, search.task.data
    kind = "known" if data.defects == "real" else "synthetic"
    _say(
        search,
        f"{search.model} on {search.category}: learns from {len(data.index.rows('train'))} good parts, is to tell "
        f"{exam.normals} others from {exam.num_defects} {kind} defects; test images and held-out parts are not seen",
    )
    if done := len(study.ended()):
        _say(search, f"goes on after {done} of {counted(wish.trials, 'trial')}, which are in {place.shown}")


def _run_trials(search: Search, study: Study, wish: Wish) -> None:
    end = None if wish.minutes is None else time.monotonic() + 60 * wish.minutes
    with progress_bar(search.console, MofNCompleteColumn()) as bar:
        shown = bar.add_task("trials", total=wish.trials, completed=len(study.ended()))
        while len(study.ended()) + study.elsewhere() < wish.trials and (end is None or time.monotonic() < end):
            study.run_one(partial(_try, search), _REFUSALS)
            ended = study.ended()
            bar.update(shown, completed=len(ended))
            _say(search, _line(max(ended, key=lambda trial: trial.number)))


def _try(search: Search, trying: Trying) -> float:
    """One trial, with its run in MLflow; whatever ends it is told there."""
    settings = search.own if trying.settings is None else trying.settings
    tags = {"tuned_model": search.model, "tuned_category": search.category, "trial": str(trying.number)}
    pruned: GivenUp | None = None
    with trial_run(search.project.root, search.experiment, f"trial {trying.number}", tags) as run, _refusal_told(run):
        run.params({key: named(value) for key, value in settings.items()})

        def report(step: int, found: Verdict) -> None:
            run.metrics(found.metrics(), step)
            trying.report(step, found.objective)

        started = time.monotonic()
        try:
            config = search.config if trying.settings is None else _with(search.config, trying.settings)
            found, steps = attempt(search.task, config, run, report)
        except GivenUp as error:
            run.tags({"state": "pruned"})
            pruned = error
        except ValidationError as error:
            section = changed(search.config.model_dump(mode="json"), settings)
            raise ModelError(problems_in(error, f"models.{search.model}", type(search.config), section)[0]) from None
        else:
            seconds = round(time.monotonic() - started, 1)
            run.metrics(found.metrics(), steps)
            run.metrics({"seconds": seconds})
            run.tags({"state": "complete"})
            ends = list(found.interval)
            trying.keep({"auroc": found.auroc, "aupro": found.aupro, "interval": ends, "seconds": seconds})
    if pruned is not None:
        raise pruned
    return found.objective


@contextlib.contextmanager
def _refusal_told(run: OpenRun) -> Iterator[None]:
    try:
        yield
    except _REFUSALS as error:
        run.tags({"state": "refused", "reason": str(error)})
        raise


def _line(trial: Ended) -> str:
    what = "as it is" if trial.settings is None else _in_words(trial.settings)
    if trial.value is not None:
        return f"trial {trial.number}: {percent(trial.value)} in {trial.attributes['seconds']:.0f} s: {what}"
    if REASON in trial.attributes:
        return f"trial {trial.number}: refused: {trial.attributes[REASON]}: {what}"
    if PRUNED_AT not in trial.attributes:
        return f"trial {trial.number}: stopped"
    return f"trial {trial.number}: given up at step {trial.attributes[PRUNED_AT]}: {what}"


def _in_words(settings: Settings) -> str:
    return ", ".join(f"{key} {named(value)}" for key, value in settings.items())


def _conclude(search: Search, study: Study, name: str, run: OpenRun) -> list[str]:
    """Compare the best trial with the model's own settings, and write it down if it is better."""
    ended = study.ended()
    base = next((trial for trial in ended if trial.is_base), None)
    judged = [trial for trial in ended if trial.value is not None]
    if base is None or not judged:
        return [*_waiting(study), "nothing is written: no trial has been judged yet"]
    best = max(judged, key=lambda trial: (_known(trial), trial.is_base, -trial.number))
    figures = {"trials": len(ended), "best": best.value, "before": base.value}
    run.metrics({figure: value for figure, value in figures.items() if value is not None})
    run.tags({"best_trial": str(best.number)})
    lines = [_row("as it is", base)]
    if best.is_base:
        return [*lines, *_waiting(study), f"nothing is written: none of {counted(len(ended), 'trial')} is better"]
    assert best.settings is not None
    lines += [_row("the best", best), *_changes(search, best.settings), *_waiting(study)]
    if study.elsewhere():
        return [*lines, "nothing is written yet: the call that ends the last trial does it; or call again"]
    tuned = Tuned(
        model=search.model,
        category=search.category,
        trials=len(ended),
        defects=search.task.data.defects,
        objective=round(_known(best), 4),
        before=None if base.value is None else round(base.value, 4),
    )
    section = changed(search.config.model_dump(mode="json"), best.settings)
    notes = write_winner(search.project.params, name, search.task.method, section, tuned)
    run.tags({"variant": name})
    return [*lines, *notes, f"{search.project.params}: {name}, {tuned.text}; `blemish run` trains and tests it"]


def _known(trial: Ended) -> float:
    assert trial.value is not None
    return trial.value


def _row(title: str, trial: Ended) -> str:
    found = trial.attributes
    if trial.value is None:
        return f"{title:11} not judged: {found.get(REASON, 'given up')}"
    pixels = "" if found["aupro"] is None else f", AUPRO 0.3 {percent(found['aupro'])}"
    return (
        f"{title:11} {percent(trial.value)}: image AUROC {percent(found['auroc'])} "
        f"(95 %: {interval(found['interval'])}){pixels}"
    )


def _changes(search: Search, settings: Settings) -> list[str]:
    """What is otherwise than in the model's own settings, which stand in brackets."""
    words = [f"{key} {named(v)} ({named(search.own[key])})" for key, v in settings.items() if v != search.own[key]]
    return [f"{'':11} {', '.join(words)}"] if words else []


def _waiting(study: Study) -> list[str]:
    running = study.elsewhere()
    return [f"{counted(running, 'trial')} running in other processes"] if running else []


def _say(search: Search, line: str) -> None:
    search.console.print(line, markup=False, highlight=False, soft_wrap=True)
