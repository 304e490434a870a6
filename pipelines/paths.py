"""Where everything lies, relative to the project folder (the one that holds `params.yaml`)."""

from dataclasses import dataclass
from pathlib import Path

INDEX_FILE = "index.json"  # of a folder of arrays: what its rows are
PREDICTIONS_FILE = "predictions.csv"  # a row per image, of `evaluate` and of `predict`
# Of an evaluation, in the project and in its run
EVALUATION_FILE = "evaluation.json"
PIXELS_FILE = "pixels.npz"  # absent without masks
EXAMPLES_FILE = "examples.png"
CURVES_FILE = "curves.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """A model on a category under a seed, and where all that is made of it lies.

    The folders are called after model and category alone: a cell trained under another seed takes the place of the one
    before it, and only their runs stand side by side.
    """

    root: Path
    model: str
    category: str
    seed: int = 0

    @property
    def name(self) -> str:
        """What its run is called; of several seeds, those after the first are told apart."""
        return f"{self.model}-{self.category}" + (f"-seed{self.seed}" if self.seed else "")

    def verb(self, verb: str) -> str:
        """The command that makes a part of it, for messages: `blemish train fapm nut`."""
        return f"`blemish {verb} {self.model} {self.category}`"

    @property
    def work(self) -> Path:
        """Resumable checkpoints. Never a DVC output: DVC deletes those before it runs a stage again."""
        return self._in("work")

    @property
    def trained(self) -> Path:
        """The folder that `train` makes."""
        return self._in("models")

    @property
    def weights(self) -> Path:
        return self.trained / "model.safetensors"

    @property
    def run_record(self) -> Path:
        """Run id, and the settings that the weights were made with."""
        return self.trained / "run.json"

    @property
    def evaluated(self) -> Path:
        """The folder that `evaluate` makes."""
        return self._in("evaluations")

    @property
    def evaluation(self) -> Path:
        return self.evaluated / EVALUATION_FILE

    @property
    def predictions(self) -> Path:
        return self.evaluated / PREDICTIONS_FILE

    @property
    def pixels(self) -> Path:
        return self.evaluated / PIXELS_FILE

    @property
    def examples(self) -> Path:
        return self.evaluated / EXAMPLES_FILE

    @property
    def curves(self) -> Path:
        return self.evaluated / CURVES_FILE

    @property
    def metrics(self) -> Path:
        """The evaluation's figures alone, flat, for DVC to compare."""
        return self._in("metrics", ".json")

    @property
    def exported(self) -> Path:
        """The folder that `export` makes."""
        return self._in("exported")

    @property
    def onnx(self) -> Path:
        return self.exported / "model.onnx"

    @property
    def parity(self) -> Path:
        """The proof that the exported file is the trained model."""
        return self.exported / "parity.json"

    @property
    def latency(self) -> Path:
        """How fast the exported file answers, on the machine that measured it."""
        return self._in("latency", ".json")

    def _in(self, folder: str, suffix: str = "") -> Path:
        return self.root / folder / self.model / f"{self.category}{suffix}"


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
    def data(self) -> Path:
        return self.root / "data"

    def prepared(self, category: str) -> Path:
        return self.data / "prepared" / category

    def cell(self, model: str, category: str, seed: int = 0) -> Cell:
        return Cell(self.root, model, category, seed)

    def work(self, stage: str, name: str) -> Path:
        """As `Cell.work`, of a training that is no cell's."""
        return self.root / "work" / stage / name

    def teacher(self, model: str) -> Path:
        """What `distill` makes for a model."""
        return self.root / "pretrained" / model / "teacher"

    def penalty(self, model: str) -> Path:
        """What `penalty` makes for a model."""
        return self.root / "pretrained" / model / "penalty"

    def textures(self, model: str) -> Path:
        """What `textures` makes for a model."""
        return self.root / "pretrained" / model / "textures"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def summary(self) -> Path:
        return self.reports / "summary.json"
