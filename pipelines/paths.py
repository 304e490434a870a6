"""Where everything lies, relative to the project folder (the one that holds `params.yaml`)."""

from dataclasses import dataclass
from pathlib import Path

INDEX_FILE = "index.json"  # of a folder of arrays: what its rows are


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

    def model(self, model: str, category: str) -> Path:
        """What `train` makes: weights, run id, and the settings they were made with."""
        return self.root / "models" / model / category

    def work(self, model: str, category: str) -> Path:
        """Resumable checkpoints. Never a DVC output: DVC deletes those before it runs a stage again."""
        return self.root / "work" / model / category

    def evaluation(self, model: str, category: str) -> Path:
        return self.root / "evaluations" / model / category

    def metrics(self, model: str, category: str) -> Path:
        return self.root / "metrics" / model / f"{category}.json"

    def export(self, model: str, category: str) -> Path:
        return self.root / "exported" / model / category

    def latency(self, model: str, category: str) -> Path:
        """How fast the exported file answers, on the machine that measured it."""
        return self.root / "latency" / model / f"{category}.json"

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
