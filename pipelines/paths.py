"""Where everything lies, relative to the project folder (the one that holds `params.yaml`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INDEX_FILE = "index.json"  # of a folder of arrays: what its rows are
PREDICTIONS_FILE = "predictions.csv"  # a row per image, of `evaluate` and of `predict`
SUMMARY_FILE = "summary.json"  # of a report
# Of an evaluation, in the project and in its run
EVALUATION_FILE = "evaluation.json"
PIXELS_FILE = "pixels.npz"  # absent without masks
EXAMPLES_FILE = "examples.png"
CURVES_FILE = "curves.json"
CURVES_PICTURE = "curves.png"


class _Place:
    """Where one thing of each cell lies: a folder of its model and category, a file in it, or one in its stead."""

    def __init__(self, folder: str, file: str = "", suffix: str = "") -> None:
        self._folder, self._file, self._suffix = folder, file, suffix

    def __get__(self, cell: "Cell", _: object) -> Path:
        return cell.root / self._folder / cell.model / f"{cell.category}{self._suffix}" / self._file


class _PlaceOfSeed(_Place):
    """Likewise, of what each seed has one of: `seed0` in the folder of its model and category."""

    def __get__(self, cell: "Cell", _: object) -> Path:
        folder = cell.root / self._folder / cell.model / cell.category
        return folder / f"seed{cell.seed}{self._suffix}" / self._file


@dataclass(frozen=True, slots=True)
class Cell:
    """A model on a category under a seed, and where all that is made of it lies.

    `model` is the name that the model has in params.yaml: that of its method, or of a variant of it. What is shipped is
    made of one seed, the first of the file, and lies where no seed is named.
    """

    root: Path
    model: str
    category: str
    seed: int

    # Of resumable checkpoints; no DVC output, since DVC deletes those before it runs a stage again.
    work = _PlaceOfSeed("work")
    # Which stages a sweep has done that DVC has not yet been told of.
    done = _PlaceOfSeed("work", suffix=".done")
    # Called as no folder of the user's is, since DVC deletes it before anyone looks at the category's name.
    trained = _PlaceOfSeed("models", suffix=".trained")
    weights = _PlaceOfSeed("models", "model.safetensors", suffix=".trained")
    # The run's id, and the settings that the weights were made with.
    run_record = _PlaceOfSeed("models", "run.json", suffix=".trained")
    evaluated = _PlaceOfSeed("evaluations")
    evaluation = _PlaceOfSeed("evaluations", EVALUATION_FILE)
    predictions = _PlaceOfSeed("evaluations", PREDICTIONS_FILE)
    pixels = _PlaceOfSeed("evaluations", PIXELS_FILE)
    examples = _PlaceOfSeed("evaluations", EXAMPLES_FILE)
    curves = _PlaceOfSeed("evaluations", CURVES_FILE)
    metrics = _PlaceOfSeed("metrics", suffix=".json")  # the evaluation's figures alone, flat, for Git
    exported = _Place("exported")
    onnx = _Place("exported", "model.onnx")
    parity = _Place("exported", "parity.json")  # the proof that the exported file is the trained model
    int8 = _Place("exported", "model.int8.onnx")  # absent unless asked for, and kept
    int8_proof = _Place("exported", "int8.json")  # what it decides on the test images, and why it was kept or not
    deployed = _Place("deployed", "model.onnx")  # the same with a threshold that a person chose; no DVC output
    deployed_int8 = _Place("deployed", "model.int8.onnx")
    latency = _Place("latency", suffix=".json")  # of the exported file, on the machine that measured it
    refusal = _PlaceOfSeed("refused", suffix=".json")  # why a verb refused it; absent if none did

    @property
    def name(self) -> str:
        """What its run is called; of several seeds, those after the first are told apart."""
        return f"{self.model}-{self.category}" + (f"-seed{self.seed}" if self.seed else "")

    @property
    def title(self) -> str:
        """For messages: "fapm on nut", of several seeds, those after the first told apart."""
        return f"{self.model} on {self.category}" + (f", seed {self.seed}" if self.seed else "")

    def verb(self, verb: str) -> str:
        """The command that makes a part of it, for messages: `blemish train fapm nut`."""
        seed = f" --seed {self.seed}" if self.seed and verb in ("train", "evaluate") else ""
        return f"`blemish {verb} {self.model} {self.category}{seed}`"


@dataclass(frozen=True, slots=True)
class Project:
    """The folders of one project. Nothing is created here."""

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def checked(self) -> Path:
        """What `check` makes for DVC: other stages depend on it."""
        return self.root / "checked"

    @property
    def found(self) -> Path:
        """What `check` found last, and of what."""
        return self.root / "work" / "found.json"

    @property
    def data(self) -> Path:
        return self.root / "data"

    def prepared(self, category: str) -> Path:
        return self.data / "prepared" / category

    @property
    def studies(self) -> Path:
        """The database of searches for settings, unless another is named."""
        return self.root / "tune.db"

    def cell(self, model: str, category: str, seed: int) -> Cell:
        return Cell(self.root, model, category, seed)

    def work(self, stage: str, name: str) -> Path:
        """As `Cell.work`, of a training that is no cell's."""
        return self.root / "work" / stage / name

    def log(self, name: str) -> Path:
        """Of what `run` and `sweep` begin."""
        return self.root / "work" / "logs" / f"{name}.log"

    def inputs(self, model: str) -> Path:
        return self.root / "pretrained" / model

    def input_of(self, model: str, kind: Literal["teacher", "penalty", "textures"]) -> Path:
        """What `distill`, `penalty` or `textures` makes for a model."""
        return self.inputs(model) / kind

    def refusal(self, verb: str, name: str) -> Path:
        """As `Cell.refusal`, of what all models or all categories need: `prepare` of a category, `distill` of a model.

        No name of a model has a hyphen.
        """
        return self.root / "refused" / f"all-{verb}" / f"{name}.json"

    def report(self, experiment: str) -> Path:
        """The folder of the report of a tracking experiment, beside those of others.

        An experiment may be called as a path is, `/Users/me/parts`.
        """
        return self.root / "reports" / experiment.removeprefix("/")

    def summary(self, experiment: str) -> Path:
        return self.report(experiment) / SUMMARY_FILE

    @property
    def averages(self) -> Path:
        """The averages' main figures alone, for `dvc metrics` and `dvc exp`."""
        return self.root / "metrics" / "summary.json"
