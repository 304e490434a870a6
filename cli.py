"""The command line: every verb is one function of `pipelines`, and only this module prints errors and exits."""

import atexit
import errno
import gc
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.paths import Project
    from pipelines.settings.params import Params

# Heavy modules are imported inside the commands, so that `--help` answers at once.
app = typer.Typer(
    help="Train, compare and ship visual anomaly detectors.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)

PIPELINE = "Pipeline (what dvc.yaml calls)"
USE = "Use"

Model = Annotated[str, typer.Argument(help="A model of params.yaml, such as fapm.", show_default=False)]
Category = Annotated[str, typer.Argument(help="A category of params.yaml.", show_default=False)]
Seed = Annotated[
    int | None,
    typer.Option(help="Of train.seeds; the first, if not given.", show_default=False),
]
Device = Annotated[
    str, typer.Option(envvar="BLEMISH_DEVICE", help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
]


class Stage(TyperCommand):
    """A verb that takes its arguments by name too, as DVC writes them: `--model fapm --category 'a name'`.

    Whatever stands behind a name is its value, also where it looks like an option.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        others, values = list(args), []
        for name in [param.name for param in self.params if param.param_type_name == "argument"]:
            if f"--{name}" not in others[:-1]:
                return super().parse_args(ctx, args)
            place = others.index(f"--{name}")
            values.append(others[place + 1])
            del others[place : place + 2]
        return super().parse_args(ctx, [*others, "--", *values])

    def invoke(self, ctx: Any) -> Any:
        if "DVC_STAGE" in os.environ:
            from pipelines.callers import end_with_callers

            end_with_callers()
        return super().invoke(ctx)


def _project() -> "Project":
    from pipelines.paths import Project

    return Project(Path())


def _on_server() -> bool:
    """Whether the runs are kept by one; if not, MLflow need not even be imported to ask it anything."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")


def _require_server(project: "Project") -> None:
    """Where the runs are on a server, that it answers: said within seconds, before hours are spent."""
    if _on_server():
        from pipelines.tracking.store import require_answer

        require_answer(project.root)


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _is_not_needed(params: "Params", section: str, model: str, folder: Path) -> bool:
    """Say so where `section` describes something for a model that is not in `models`; DVC expects the folder anyway."""
    if model in params.models or model not in getattr(params, section):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    typer.echo(f"{section}.{model}: not needed, since {model} is not in models")
    return True


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"blemish {version('blemish')}")
        raise typer.Exit


@app.callback()
def blemish(
    _: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which Blemish this is.")
    ] = False,
) -> None:
    """Nothing of its own: the verbs follow."""


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


@app.command(rich_help_panel=PIPELINE)
def check(
    params_only: Annotated[
        bool, typer.Option("--params-only", help="As DVC's stage needs it: each folder is its own stage's to refuse.")
    ] = False,
) -> None:
    """Validate params.yaml as a whole, look for the folders and files that it names, and list every problem."""
    from pipelines.preview.found import found_before, keep

    project = _project()
    if params_only and (known := found_before(project)) is not None:
        typer.echo("\n".join(known))
        return
    from pipelines.errors import StageError
    from pipelines.numbers import counted
    from pipelines.preview.check import load_checked, missing, require_packages, unused_sections, write_checked

    params = load_checked(project.params)
    require_packages(params)
    unused = unused_sections(params)
    for line in unused:
        typer.echo(line)
    write_checked(params, project)
    if not params_only and (problems := missing(params, project)):
        raise StageError("\n  - ".join([f"params.yaml is in order, {counted(len(problems), 'thing')} not", *problems]))
    seeds = f" x {len(params.train.seeds)} seeds" if len(params.train.seeds) > 1 else ""
    categories = counted(len(params.data.categories), "category", "categories")
    cells = f"{counted(len(params.models), 'model')} x {categories}{seeds}"
    outcome = f"params.yaml: {cells}, no problem"
    typer.echo(outcome)
    keep(project, params.models, [*unused, outcome])


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def download(source: Annotated[str, typer.Argument(help="A data set of params.yaml's download section.")]) -> None:
    """Fetch, verify and extract a data set, or draw an embedded one."""
    from pipelines import refusals
    from pipelines.preview.check import load_checked
    from pipelines.sources.download import DownloadParams
    from pipelines.sources.download import download as run

    project = _project()
    # Usually the first stage: all of the file is checked here, so that nothing runs for an hour before a typo shows.
    params = load_checked(project.params)
    with refusals.kept(project.refusal("download", source), "download"):
        run(source, DownloadParams.model_validate(params.download), project.data, _console())


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def prepare(category: Category) -> None:
    """Decode and resize a category's images into arrays with masks and an index."""
    from pipelines import refusals
    from pipelines.preparation.prepare import prepare as run
    from pipelines.progress import counting
    from pipelines.settings.params import load_params
    from pipelines.sources.catalogue import check_mvtec_ad

    project = _project()
    params = load_params(project.params)
    params.check_category(category)
    source = project.root / params.data.root / category
    if source.parent.resolve() == (project.data / "mvtec_ad").resolve():
        check_mvtec_ad(source.parent, [category])  # a published set has published counts
    refused = refusals.kept(project.refusal("prepare", category), "prepare")
    with refused, counting(_console(), f"prepare {category}") as on_progress:
        made = run(source, category, params.prepare, params.views().frames, project.prepared(category), on_progress)
    for warning in made.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for note in made.notes:
        typer.echo(f"{category}: {note}")
    counts = ", ".join(f"{name} {count}" for name, count in made.index.counts.items())
    typer.echo(f"{category}: {counts}")


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def distill(model: Model, device: Device = "auto") -> None:
    """Make a model's teacher from a backbone and a folder of photos, or fetch the published one."""
    from pipelines import refusals
    from pipelines.device import choose_device
    from pipelines.preview.check import load_checked
    from pipelines.teachers.config import DistillConfig, Teachers
    from pipelines.teachers.distill import TEACHER_FILE, TEACHER_RECORD, fetch_published
    from pipelines.teachers.distill import distill as run

    project = _project()
    params = load_checked(project.params)
    teacher = project.input_of(model, "teacher")
    if _is_not_needed(params, "distill", model, teacher):
        for name in (TEACHER_FILE, TEACHER_RECORD):  # DVC expects them, too
            (teacher / name).touch()
        return
    config = params.entry("distill", model, Teachers)
    with refusals.kept(project.refusal("distill", model), "distill"):
        _require_server(project)
        if isinstance(config, DistillConfig):
            photos = project.root / params.photos
            run(model, config, photos, params.tracking.experiment, project, choose_device(device), _console())
        else:
            fetch_published(model, config, project, _console())


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def penalty(model: Model) -> None:
    """Decode the photos that a model must not take for the part."""
    from pipelines import refusals
    from pipelines.preparation.penalty import Penalties, make_penalty
    from pipelines.settings.params import load_params

    project = _project()
    params = load_params(project.params)
    folder = project.input_of(model, "penalty")
    if _is_not_needed(params, "penalty", model, folder):
        return
    config = params.entry("penalty", model, Penalties)
    with refusals.kept(project.refusal("penalty", model), "penalty"):
        number = make_penalty(config, project.root / params.photos, folder, _console())
    typer.echo(f"{model}: {number} penalty images")


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def textures(model: Model) -> None:
    """Decode the pictures of surfaces that a model's synthetic defects are filled with."""
    from pipelines import refusals
    from pipelines.preparation.textures import TextureSets, make_textures
    from pipelines.settings.params import load_params

    project = _project()
    params = load_params(project.params)
    folder = project.input_of(model, "textures")
    if _is_not_needed(params, "textures", model, folder):
        return
    config = params.entry("textures", model, TextureSets)
    with refusals.kept(project.refusal("textures", model), "textures"):
        number = make_textures(config, project.root / params.texture_photos, folder, _console())
    typer.echo(f"{model}: {number} textures")


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def train(
    model: Model,
    category: Category,
    seed: Seed = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, FLOPs, memory, steps and time; train nothing.")
    ] = False,
) -> None:
    """Train one model on one category; goes on where a killed run stopped. `torchrun` starts several processes."""
    from pipelines.preview.check import load_checked

    project = _project()
    if dry_run:
        from pipelines.device import choose_device
        from pipelines.preview.dry_run import estimate
        from pipelines.preview.minutes import time_to_train

        params = load_checked(project.params)
        typer.echo("\n".join(estimate(model, category, params, project).lines()))
        typer.echo(f"time         {time_to_train(model, category, params, project, choose_device(device))}")
        return
    from pipelines.training.ranks import device_of_rank, joined

    with joined() as ranks:
        from pipelines.sweeps import stages

        params = load_checked(project.params)
        cell = project.cell(model, category, params.seed_of(seed))
        stages.train(cell, params, project, device_of_rank(device), _console(), ranks)


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def evaluate(model: Model, category: Category, seed: Seed = None, device: Device = "auto") -> None:
    """Measure a trained model on the test split: metrics, threshold, scores, figures."""
    from pipelines.device import choose_device
    from pipelines.preview.check import load_checked
    from pipelines.sweeps import stages

    project = _project()
    params = load_checked(project.params)
    cell = project.cell(model, category, params.seed_of(seed))
    stages.evaluate(cell, params, project, choose_device(device), typer.echo, _warn)


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def export(model: Model, category: Category) -> None:
    """Write a trained model as one ONNX file, kept only if it reproduces the original."""
    from pipelines.preview.check import load_checked
    from pipelines.sweeps import stages

    project = _project()
    params = load_checked(project.params)
    stages.export(project.cell(model, category, params.seed), params, project, _console(), typer.echo, _warn)


@app.command(rich_help_panel=PIPELINE, cls=Stage)
def latency(model: Model, category: Category) -> None:
    """Measure how fast an exported model answers on this machine, part by part."""
    from pipelines.deployment.latency import latency as run
    from pipelines.settings.params import load_params

    project = _project()
    params = load_params(project.params)
    _require_server(project)
    found = run(model, category, params, project)
    total = found.milliseconds.total
    typer.echo(
        f"{model} on {category}: {total.p50:.1f} ms from file to decision (95 % within {total.p95:.1f}), "
        f"{found.throughput.images_per_second:.1f} images/s in batches of {found.throughput.batch_size}, "
        f"on {found.hardware}" + (f"; int8: {found.int8.milliseconds.total.p50:.1f} ms" if found.int8 else "")
    )


@app.command(rich_help_panel=USE)
def start(
    folder: Annotated[
        Path, typer.Argument(help="It holds a folder for each kind of part, or is one.", show_default=False)
    ],
    models: Annotated[str, typer.Option(help="Comma between them; or all.")] = "adfa,fapm",
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite edits of params.yaml that are not committed.")
    ] = False,
) -> None:
    """Look at a folder of pictures, say what is in it, and write a params.yaml for it; then `blemish run`."""
    from anomaly_models import MODELS
    from pipelines.numbers import counted
    from pipelines.preview.start import start as begin

    cores = os.cpu_count() or 1
    chosen = list(MODELS) if models == "all" else [name for name in models.split(",") if name]
    found = begin(folder, chosen, _project(), cores, force=force)
    for look in found.categories:
        typer.echo(look.text)
    for line in (*found.left_out, *found.notes):
        typer.echo(f"- {line}")
    typer.echo(
        f"params.yaml: {', '.join(chosen)}; `blemish run` takes about {counted(round(found.minutes), 'minute')} here. "
        f"Other models: --models all, or some of {', '.join(MODELS)}"
    )


@app.command(rich_help_panel=USE)
def run(
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at once, each on a core; as many as there are cores if not given.")
    ] = None,
) -> None:
    """Do all that params.yaml asks for, cell beside cell; print the results. What fails does not stop the others."""
    from pipelines.preview.check import load_checked
    from pipelines.sweeps.local import run as run_all

    project = _project()
    params = load_checked(project.params)
    _require_server(project)
    failures = run_all(params, project, _console(), jobs or os.cpu_count() or 1)
    _end_with_results(failures, params, project)


@app.command(rich_help_panel=USE)
def sweep(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="Of a Ray cluster, such as 10.0.0.1:6379; this machine, if not given.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="CPUs of this machine to work with; all, if not given.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="MODEL.KEY=a,b",
            help="Add to params.yaml a variant of the model for each value, and for each combination.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Do as `run` does, on Ray: on this machine or a cluster, with what params.yaml's `sweep` reserves for a cell."""
    from rich.console import Console

    from pipelines.preview.check import load_checked
    from pipelines.sweeps.on_ray import sweep as run_all
    from pipelines.sweeps.overrides import add_overrides

    project = _project()
    params = load_checked(project.params)
    _require_server(project)
    if settings:
        for line in add_overrides(project.params, settings, params):
            typer.echo(line)
        params = load_checked(project.params)
    # Of this stream, since Ray writes to whatever is called stderr.
    failures = run_all(params, project, Console(file=sys.stderr), address, jobs or os.cpu_count() or 1, device)
    _end_with_results(failures, params, project)


def _end_with_results(failures: list[str], params: "Params", project: "Project") -> None:
    """Print the report's table, whatever failed; without a failure DVC has written the report."""
    from rich.console import Console

    from pipelines.report.terminal import print_results

    if failures:
        from pipelines.report.report import report as write_report

        write_report(params, project)
    complete = print_results(project, params, Console())
    if _on_server():
        from pipelines.report.summary import Summary
        from pipelines.tracking.cells import warning_of_absent

        cells = Summary.of(project, params.tracking.experiment).cells
        runs = {str(cell.run_id): f"{cell.model} on {cell.category}" for cell in cells}
        if warning := warning_of_absent(project.root, runs):
            typer.echo(f"warning: {warning}", err=True)
    if not complete:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def tune(
    model: Model,
    category: Category,
    trials: Annotated[
        int, typer.Option(min=2, help="That the search has in the end, the model's own settings first.")
    ] = 30,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="After which no trial is begun.", show_default=False)
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW:HIGH",
            help="Also KEY=LOW:HIGH:log, KEY=a,b,c, KEY=x0.3:x3; once for each setting, instead of the method's own.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the variant; MODEL_tuned, if not given.", show_default=False)
    ] = None,
    defects: Annotated[
        Literal["real", "synthetic"] | None,
        typer.Option(
            help="To tell good parts from; real ones that no test has, if there are enough.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search, the synthetic defects and the trainings.")] = 0,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="BLEMISH_TUNE_STORAGE",
            metavar="URL",
            help="A database for several machines, such as postgresql+psycopg://...; tune.db, if not given.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Search for better settings on good parts and defects that no test has; write a variant of the model.

    The same call again goes on with the same search, whatever ended it.
    """
    from pipelines.device import choose_device
    from pipelines.preview.check import load_checked
    from pipelines.tuning.tune import Wish
    from pipelines.tuning.tune import tune as run

    project = _project()
    params = load_checked(project.params)
    _require_server(project)
    wish = Wish(trials, minutes, search or [], name, defects, seed, storage)
    for line in run(model, category, wish, params, project, choose_device(device), _console()):
        typer.echo(line)


@app.command(rich_help_panel=PIPELINE)
def report() -> None:
    """Gather every cell's results: tables, intervals, comparisons, report.html, a summary run."""
    from pipelines.report.report import report as run
    from pipelines.settings.params import load_params

    project = _project()
    params = load_params(project.params)
    _require_server(project)
    typer.echo(f"{run(params, project)}: written")


@app.command(rich_help_panel=USE)
def compare(
    by: Annotated[Literal["model", "category", "defect"], typer.Option(help="What a row of the table is.")] = "model",
    metric: Annotated[
        str | None,
        typer.Option(help="Such as aupro_30; image_auroc by default, and recall by defect.", show_default=False),
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(help="Beginnings of MLflow run ids, instead of the last run of each cell.", show_default=False),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Instead of tracking.experiment of params.yaml.", show_default=False)
    ] = None,
) -> None:
    """Compare runs on the images that they share, from MLflow: figures, intervals, who beats whom."""
    from rich.console import Console

    from pipelines.report.compare import compare_runs
    from pipelines.settings.params import load_params

    project = _project()
    params = load_params(project.params)
    chosen = [run_id for part in runs or [] for run_id in part.split(",") if run_id]
    experiment = experiment or params.tracking.experiment
    _require_server(project)
    compare_runs(project.root, experiment, by, metric, chosen, params.evaluate.bootstrap, Console())


@app.command(rich_help_panel=USE)
def results() -> None:
    """Print the table of the last report, what it lacks (then the exit code is 1), and where to look next."""
    from rich.console import Console

    from pipelines.report.terminal import print_results
    from pipelines.settings.params import load_params

    project = _project()
    if not print_results(project, load_params(project.params), Console()):
        raise typer.Exit(1)


FEW = 20  # pictures, of which each has its line in the terminal
DEFECT_FOUND = 3  # exit code; 1 is that of an error, 2 that of a wrong option


@app.command(rich_help_panel=USE)
def gate(
    metric: Annotated[str, typer.Option(help="Such as recall, false_alarms or image_auroc.", show_default=False)],
    at_least: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share, such as 0.9.", show_default=False)
    ] = None,
    at_most: Annotated[float | None, typer.Option(min=0, max=1, help="Likewise.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="All, if not given.", show_default=False)] = None,
    category: Annotated[str | None, typer.Option(help="All, if not given.", show_default=False)] = None,
) -> None:
    """Fail unless every cell of the last report has a figure that is asked for: for CI."""
    from pipelines.report.gate import Gate
    from pipelines.report.gate import gate as run
    from pipelines.settings.params import load_params

    project = _project()
    typer.echo(run(project, load_params(project.params), Gate(metric, at_least, at_most, model, category)))


@app.command(rich_help_panel=USE)
def predict(
    model: Annotated[Path, typer.Argument(help="The model.onnx that `export` wrote, or a bundle.", show_default=False)],
    sources: Annotated[list[Path], typer.Argument(help="Image files and folders.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Folder for the results.")] = Path(
        "predictions"
    ),
    threshold: Annotated[
        str | None,
        typer.Option(metavar="VALUE", help="On the score, instead of the file's; a higher score is a defect."),
    ] = None,
    sort_into: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Copy the pictures into good/ and defect/ of this folder.", show_default=False
        ),
    ] = None,
    verdicts: Annotated[
        bool | None,
        typer.Option(
            "--verdicts/--no-verdicts",
            help=f"A line per picture on stdout; if not given, for up to {FEW} pictures.",
            show_default=False,
        ),
    ] = None,
    json_lines: Annotated[
        bool,
        typer.Option("--json-lines", help="Nothing on stdout but a JSON object per picture, as soon as it is scored."),
    ] = False,
    fail_on_defect: Annotated[
        bool, typer.Option("--fail-on-defect", help=f"Exit code {DEFECT_FOUND} if a picture has a defect.")
    ] = False,
) -> None:
    """Score images with an exported model: verdicts, CSV, JSON and heat-map overlays.

    Exit code 0: all pictures were scored. 1: some could not be (each is named on stderr), or nothing could be done.
    2: a wrong option. 3: all were scored and one or more has a defect, only with --fail-on-defect.
    """
    from pipelines.inference.bundle import Bundle, is_bundle
    from pipelines.inference.detector import Detector, as_threshold
    from pipelines.inference.predict import Result, summed_up
    from pipelines.inference.predict import predict as run
    from pipelines.paths import PREDICTIONS_FILE
    from pipelines.progress import counting

    given = None if threshold is None else as_threshold(threshold)
    detector = Bundle(model).engine() if is_bundle(model) else Detector(model)
    done = 0
    with counting(_console(), "predict") as on_progress:

        def tell(result: Result, total: int) -> None:
            nonlocal done
            done += 1
            if json_lines:
                typer.echo(result.to_json())
            elif result.error is None and (total <= FEW if verdicts is None else verdicts):
                typer.echo(result.line)
            on_progress(done, total)

        found = run(detector, sources, output, tell, threshold=given, sort_into=sort_into)
    typer.echo(f"{summed_up(found, detector.card, given)}: {output / PREDICTIONS_FILE}", err=json_lines)
    for result in found:
        if result.error is not None:
            typer.echo(f"error: {result.error}", err=True)
    if any(result.error is not None for result in found):
        raise typer.Exit(1)
    if fail_on_defect and any(result.decision == "defect" for result in found):
        raise typer.Exit(DEFECT_FOUND)


@app.command(rich_help_panel=USE)
def bundle(
    model: Annotated[
        str,
        typer.Argument(
            help="A model of params.yaml, or champion: the report's best; after `learn`, the registry's.",
            show_default=False,
        ),
    ],
    category: Category,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", dir_okay=False, help="bundles/MODEL-CATEGORY.zip, if not given."),
    ] = None,
    precision: Annotated[
        Literal["float32", "int8"], typer.Option(help="Of export.precisions: int8 is MODEL-CATEGORY-int8.zip.")
    ] = "float32",
) -> None:
    """Write the exported model, its proof, samples and what runs it as one file for a machine on the line."""
    from pipelines.deployment.bundle import bundle as run
    from pipelines.deployment.bundle import bundle_champion
    from pipelines.settings.params import load_params

    project = _project()
    params = load_params(project.params)
    if model == "champion" and model not in params.models:
        from pipelines.report.summary import Summary

        params.check_category(category)
        summary = Summary.of(project, params.tracking.experiment)
        if category in summary.successions:
            made = bundle_champion(category, params, project, output, precision)
        else:
            made = run(summary.best_first(category)[0], category, params, project, output, precision)
    else:
        made = run(model, category, params, project, output, precision)
    chosen = ", with the threshold that was chosen by hand" if made.is_deployed else ""
    typer.echo(f"{made.path}: {made.path.stat().st_size / 1e6:.1f} MB, {made.num_samples} samples replayed{chosen}")
    name = shlex.quote(str(made.path))
    typer.echo(f"On the line, with onnxruntime, numpy and Pillow: python {name} verify, python {name} predict IMAGES")


@app.command(rich_help_panel=USE)
def verify(
    bundle: Annotated[Path, typer.Argument(help="The file that `bundle` wrote.", show_default=False)],
) -> None:
    """Check every byte of a bundle, and whether its samples are answered on this machine as they were.

    Exit code 0: they are. 1: a byte has changed, or a score, map or decision is another here.
    """
    from pipelines.inference.bundle import Bundle, verdict

    opened = Bundle(bundle)
    found = opened.replay(opened.engine())
    typer.echo("\n".join([*(replayed.line for replayed in found), verdict(opened, found)]))
    if not all(replayed.is_same for replayed in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def serve(
    bundles: Annotated[list[Path], typer.Argument(help="The files that `bundle` wrote.", show_default=False)],
    host: Annotated[str, typer.Option(help="Another address than this machine's own needs BLEMISH_TOKEN.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the network; a core each, if not given.", show_default=False)
    ] = None,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Of a picture's file; larger ones are refused.")] = 100,
    waiting: Annotated[int, typer.Option(min=1, help="Pictures of a bundle that may wait; more are sent away.")] = 64,
    feedback: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Keep there what people say of parts, for `learn`.", show_default=False),
    ] = None,
) -> None:
    """Answer over HTTP: a picture's bytes in, score and decision out; a page to drop a picture on.

    A bundle whose file is replaced is taken over without a pause, once it is whole and answers its samples.
    """
    from pipelines.inference import serve as server
    from pipelines.numbers import counted

    token = server.token_for(host)
    app = server.application(bundles, server.Limits(max_megabytes, waiting), token, threads, feedback)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"{counted(len(bundles), 'bundle')} at http://{shown}:{port}: drop a picture on the page there, or")
    typer.echo(f"curl --data-binary @part.png http://{shown}:{port}/predict")
    server.serve(app, host, port)


@app.command(rich_help_panel=USE)
def watch(
    folder: Annotated[Path, typer.Argument(help="That a camera fills; its folders too.", show_default=False)],
    bundle: Annotated[Path, typer.Option(help="The file that `bundle` wrote.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for what is decided, not in FOLDER.")
    ] = Path("watched"),
    move: Annotated[
        bool, typer.Option("--move", help="Move pictures to accept, review, reject and unreadable.")
    ] = False,
    webhook: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="POST each decision there, signed with BLEMISH_WEBHOOK_SECRET.", show_default=False
        ),
    ] = None,
    settle: Annotated[float, typer.Option(min=0, help="Seconds that a picture must not change to count as whole.")] = (
        2.0
    ),
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds without a change after which an unreadable picture is given up.")
    ] = 30.0,
    poll: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks at the folder.")] = 0.5,
    once: Annotated[
        bool, typer.Option("--once", help="End when all that lies there is decided and delivered.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the network; a core each, if not given.", show_default=False)
    ] = None,
) -> None:
    """Follow a folder as a camera fills it: each picture is decided on once, when it is whole.

    Killed and started again it goes on where it was. A bundle whose file is replaced is taken over.
    """
    from pipelines.inference.outlets import webhook as receiver
    from pipelines.inference.proven import Proven
    from pipelines.inference.watch import Pace, line_of, stopping
    from pipelines.inference.watch import watch as run

    def tell(record: dict[str, Any]) -> None:
        typer.echo(line_of(record), err=record["error"] is not None)

    outlets = [receiver(webhook)] if webhook else []
    proven = Proven(bundle, threads)
    typer.echo(f"{folder}: watched with {proven.card.model} on {proven.card.category}; results in {output}")
    with stopping() as stop:
        run(folder, proven, output, outlets, tell, stop, pace=Pace(settle, patience, poll), move=move, once=once)


@app.command(rich_help_panel=USE)
def drift(
    output: Annotated[Path, typer.Argument(help="Folder that `watch` writes.", show_default=False)],
    bundle: Annotated[Path, typer.Option(help="The file that it decides by.", show_default=False)],
    fail_on_drift: Annotated[
        bool, typer.Option("--fail-on-drift", help=f"Exit code {DEFECT_FOUND} if something has changed.")
    ] = False,
) -> None:
    """Say whether parts still score and look as the good ones did that the threshold comes from."""
    from datetime import datetime

    from pipelines.errors import ArgumentError
    from pipelines.inference.bundle import Bundle
    from pipelines.inference.drift import Monitor
    from pipelines.inference.watch import parts
    from pipelines.numbers import score

    if not (output / "results").is_dir():
        raise ArgumentError(f"{output}: no results in it; give the folder that `blemish watch` writes")
    opened = Bundle(bundle)
    monitor = Monitor(opened.calibration, opened.card.threshold)
    monitor.replay(parts(output, opened.card.run_id))
    for name, test in monitor.tests.items():
        typer.echo(
            f"{name:10}  {score(test.mean)} of late, {score(test.expected)} of the good parts held out  "
            f"(of {test.number} parts; evidence of a change {100 * test.evidence:.0f} %)"
        )
    for change in monitor.changes:
        at = datetime.fromtimestamp(change.at).astimezone().isoformat(timespec="minutes")
        typer.echo(f"changed by {at}: {change.text}", err=True)
    if not monitor.changes:
        typer.echo("no change told; without one, at most one false alarm in ten months of work is expected")
    if monitor.changes and fail_on_drift:
        raise typer.Exit(DEFECT_FOUND)


@app.command(rich_help_panel=USE)
def verdict(
    said: Annotated[str, typer.Argument(metavar="VERDICT", help="good, or the type of defect.", show_default=False)],
    pictures: Annotated[
        list[Path], typer.Argument(help="That it is said of; folders are searched to the bottom.", show_default=False)
    ],
    feedback: Annotated[
        Path, typer.Option(dir_okay=False, help="The table that rows are added to; begun if it is not there.")
    ] = Path("feedback.csv"),
    by: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who says it; who is logged in, if not given.", show_default=False),
    ] = None,
) -> None:
    """Write down what someone says of pictures that were decided on, for `learn`."""
    from pipelines import feedback as table
    from pipelines.errors import DatasetError
    from pipelines.inference.predict import find_images
    from pipelines.numbers import counted

    found = find_images(pictures, feedback.parent / "overlays")  # of `watch`, which are no pictures of parts
    if problems := [image.error for image in found if image.error is not None]:
        raise DatasetError(problems[0])
    who = table.usable_name(by or table.login_name("give --by"))
    table.append(feedback, [image.path for image in found], table.usable_verdict(said), who)
    typer.echo(f"{feedback}: {counted(len(found), 'picture')} {said}, says {who}")


@app.command(rich_help_panel=USE)
def learn(
    feedback: Annotated[
        Path,
        typer.Argument(help="A table with the columns path, verdict, who and when.", show_default=False),
    ],
    category: Annotated[
        str | None, typer.Option(help="Of rows that name none, where params.yaml has several.", show_default=False)
    ] = None,
) -> None:
    """Let people's verdicts join the data: good parts and known defects, never the test, which stays as it is.

    `blemish run` trains on it then. The champion changes only if a new model is not found worse on the test.
    """
    from pipelines.preparation.learn import Place
    from pipelines.preparation.learn import learn as run
    from pipelines.settings.params import load_params

    project = _project()
    params = load_params(project.params)
    if category is not None:
        params.check_category(category)
    places = {
        name: Place(project.root / params.data.root / name, project.prepared(name)) for name in params.data.categories
    }
    brought = [project.data / name for name in params.download]
    found = run(feedback, category, places, params.prepare, brought)
    for one in found:
        for line in one.lines:
            typer.echo(line)
    if any(one.changes for one in found):
        typer.echo("Next: `blemish run`, or `dvc repro`; with data that `dvc add` keeps, call that first")


# `-0.5` is a value here, no option.
@app.command(rich_help_panel=USE, context_settings={"ignore_unknown_options": True})
def threshold(
    model: Model,
    category: Category,
    value: Annotated[str, typer.Argument(help="On the score; a higher score is a defect.", show_default=False)],
    because: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Why, and on what it was chosen.", show_default=False)
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who chose it; who is logged in, if not given.", show_default=False),
    ] = None,
    precision: Annotated[
        Literal["float32", "int8"], typer.Option(help="Of export.precisions: of int8 it is model.int8.onnx.")
    ] = "float32",
) -> None:
    """Deploy another threshold: a copy of the exported file that holds it, with who chose it, how and on what.

    The copy is deployed/MODEL/CATEGORY/model.onnx, which `dvc repro` leaves alone; graph and weights are the same.
    """
    from pipelines.deployment.threshold import threshold as run
    from pipelines.inference.detector import as_threshold
    from pipelines.numbers import scores_apart

    done = run(model, category, as_threshold(value), because, by, _project(), precision)
    if done.left_behind:
        typer.echo(f"{done.left_behind}: its choices are not in the new one", err=True)
    now, before = scores_apart(done.choice.threshold, done.choice.former)
    typer.echo(f"{done.path}: threshold {now} instead of {before}, chosen by {done.choice.by}")
    if done.choice.on_test_images:
        typer.echo(f"On the test images: {done.choice.on_test_images}")
    typer.echo(f"Use it: blemish predict {shlex.quote(str(done.path))} IMAGE_OR_FOLDER")


@app.command(rich_help_panel=USE)
def synthesis(
    category: Category,
    model: Annotated[str, typer.Option(help="A DiffusionAD entry of params.yaml.")] = "diffusion_ad",
    number: Annotated[int, typer.Option(min=1, help="Defects on the sheet.")] = 12,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="PNG; synthesis_CATEGORY.png if not given.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Draw a contact sheet of the synthetic defects that training will see."""
    from pipelines.device import choose_device
    from pipelines.files import atomic_file
    from pipelines.preview.check import load_checked
    from pipelines.preview.contact_sheet import contact_sheet

    project = _project()
    params = load_checked(project.params)
    sheet = contact_sheet(model, category, number, params, project, choose_device(device))
    path = output or Path(f"synthesis_{category}.png")
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    typer.echo(f"{path}: {number} synthetic defects of {model} on {category}")


@app.command(rich_help_panel=USE)
def gif(
    model: Model,
    category: Category,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", dir_okay=False, help="File to write; animations/MODEL/CATEGORY.gif if not given."
        ),
    ] = None,
) -> None:
    """Animate an evaluated model: part by part what it sees, what it decides, and what was true."""
    from pipelines.report.gif import write_gif
    from pipelines.settings.params import load_params

    project = _project()
    cell = project.cell(model, category, load_params(project.params).seed)
    path = write_gif(cell, output or project.root / "animations" / model / f"{category}.gif")
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command(rich_help_panel=USE)
def init(
    preset: Annotated[
        str | None, typer.Option(help="Of params.yaml; demo, where there is none yet.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write dvc.yaml anew, whatever it holds.")] = False,
) -> None:
    """Begin a project in this folder: params.yaml, dvc.yaml, DVC and what it and Git are to ignore."""
    from pipelines.settings.new_project import begin

    for line in begin(_project(), preset, force):
        typer.echo(line)
    typer.echo("Next: `blemish start FOLDER` for your own pictures; `blemish run` makes all that params.yaml asks for")


@app.command(rich_help_panel=USE)
def preset(
    name: Annotated[str, typer.Argument(help="demo, folder, medical, mvtec_ad or solar.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Overwrite edits that are not committed.")] = False,
) -> None:
    """Put a complete params.yaml in place."""
    from pipelines.settings.presets import put_in_place

    put_in_place(name, _project().params, force)
    typer.echo(f"params.yaml: preset {name}")


@app.command(rich_help_panel=USE)
def publish(
    name: Annotated[str, typer.Argument(help="The name in the markers, such as demo.", show_default=False)],
    from_report: Annotated[
        bool, typer.Option("--from-report", help="First keep the last report as benchmarks/results/NAME.json.")
    ] = False,
) -> None:
    """Write a kept report's tables between their markers in README.md and docs/results.md."""
    from pipelines.report.readme import keep_report, update_pages
    from pipelines.settings.params import load_params

    project = _project()
    if from_report:
        keep_report(project, load_params(project.params).tracking.experiment, name)
    for page in update_pages(project, name):
        typer.echo(f"{page}: table {name}")


@app.command(rich_help_panel=USE)
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 5000) -> None:
    """Serve the MLflow page on this machine; print where it shows the figures of all runs."""
    from pipelines.evaluation.measures import TEN
    from pipelines.settings.params import load_params
    from pipelines.tracking.pages import page_of, serve

    project = _project()
    experiment = load_params(project.params).tracking.experiment
    _require_server(project)
    typer.echo(f"The runs of '{experiment}': {page_of(project.root, experiment, port, TEN)}")
    serve(project.root, port)


def main() -> None:
    """Run the command line; errors that are the user's to mend become one message on stderr and exit code 1."""
    from pipelines.tracking.secrets import discreet_output, masked

    # A third of what `check` takes would be spent on looking for garbage among torch's classes, of which there is none.
    if sys.argv[1:2] == ["check"]:
        gc.disable()
        atexit.register(gc.freeze)
    # DVC logs and CI want plain tracebacks for what is our bug.
    os.environ.setdefault("TYPER_STANDARD_TRACEBACK", "1")
    try:
        with discreet_output():
            app()
    except Exception as error:
        if (line := _in_a_line(error)) is None:
            raise
        sys.exit(masked(f"error: {line}"))


_EXTRAS = {"optuna": "tune"}  # of packages that a verb is nothing without


def _in_a_line(error: Exception) -> str | None:
    """What the user can mend; None for a bug."""
    from pipelines.errors import BlemishError
    from pipelines.memory import out_of_memory

    if isinstance(error, BlemishError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}...: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        if (extra := _EXTRAS.get(str(error.name).partition(".")[0])) is not None:
            return f"the package '{error.name}' is not installed; `pip install 'blemish[{extra}]'`"
        if str(error.name).partition(".")[0] in ("anomaly_models", "pipelines"):
            return None
        reason = "is not installed, as in an installation for `predict` alone; install Blemish whole"
        return f"the package '{error.name}' {reason}"
    return out_of_memory(error)


if __name__ == "__main__":
    main()
