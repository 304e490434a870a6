"""A tiny project of one model, and what must hold of it whatever was done to its verbs."""

import re
import shutil
import sqlite3
from pathlib import Path

from tiny_projects import INPUTS, MODELS, lay_out
from verbs import LOG, run

# Where each verb's result lies
_RESULTS = {
    "download": ("data/demo_textures",),
    "prepare": ("data/prepared",),
    "distill": ("pretrained/efficient_ad/teacher",),
    "penalty": ("pretrained/efficient_ad/penalty",),
    "textures": ("pretrained/diffusion_ad/textures",),
    "train": ("models",),
    "evaluate": ("evaluations", "metrics"),
    "export": ("exported",),
    "latency": ("latency",),
    "report": ("reports",),
}
# What two undisturbed runs differ in: the id of the MLflow run, and seconds that something took.
_ID = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_SECONDS = re.compile(rb'"((?:train_)?seconds)": [0-9.e-]+')
_FIGURE = re.compile(rb"[0-9.]+")
_KEPT = {LOG, ".mlflow.lock", ".dvc", ".git", ".gitignore", ".dvcignore"}


def cases(thorough: bool) -> list[tuple[str, str]]:
    """Models and their verbs; what all models share is tried with one."""
    verbs = ("download", "prepare", "train", "evaluate", "export", "latency", "report")
    found = [("fapm", verb) for verb in verbs if thorough or verb != "download"]  # which has tests of its own
    for model in [*MODELS][:-1] if thorough else ["efficient_ad"]:
        found += [(model, verb) for verb in (*INPUTS.get(model, ()), "train")]
        found += [(model, verb) for verb in ("evaluate", "export", "latency") if thorough]
    return found


class Made:
    """A model's project, made whole; how long each verb took, in seconds, and what it left."""

    def __init__(self, root: Path, model: str) -> None:
        self.root = root
        self.verbs = {verb[0]: verb for verb in lay_out(root, model)}
        self.took: dict[str, float] = {}
        for name, verb in self.verbs.items():
            ended = run(root, *verb)
            assert ended.code == 0, ended.output
            self.took[name] = ended.seconds
        self.whole = {name: results(root, name) for name in self.verbs}

    def renew(self, verb: str) -> None:
        """Before a verb is tried: a download takes what is there, and others have measured a report's times anew."""
        self.clear(verb)
        if verb == "report":
            for name in ("evaluate", "export", "latency", "report"):
                assert run(self.root, *self.verbs[name]).code == 0
            self.whole["report"] = results(self.root, "report")

    def clear(self, verb: str) -> None:
        """Let there be nothing that the verb would leave as it is."""
        if verb == "download":
            shutil.rmtree(self.root / "data" / "demo_textures", ignore_errors=True)

    def changed(self, verb: str) -> list[str]:
        """The files of a verb's result that are not what they were."""
        found, whole = results(self.root, verb), self.whole[verb]
        return sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))

    def assert_survives(self, verb: str, moment: str) -> None:
        """After a kill: the earlier result stands, and the verb called again makes the same, and tidies up."""
        nothing = verb == "download" and not results(self.root, verb)
        assert nothing or not self.changed(verb), (
            f"{verb}: no whole result after a kill at {moment}: {self.changed(verb)}"
        )
        again = run(self.root, *self.verbs[verb])
        assert again.code == 0, f"{verb} after a kill at {moment}:\n{again.output}"
        assert "Traceback" not in again.output
        assert not self.changed(verb), f"{verb}: other bits after a kill at {moment}: {self.changed(verb)}"
        assert not problems(self.root), f"{verb} after a kill at {moment}: {problems(self.root)}"
        self.clear(verb)


def results(root: Path, verb: str) -> dict[str, bytes]:
    """The verb's files and what they hold, but for what two undisturbed runs differ in."""
    found = {}
    for folder in _RESULTS[verb]:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and not any(map(_is_half_made, [path, *path.parents])):
                content = _SECONDS.sub(rb'"\1": 0', _ID.sub(b"ID", path.read_bytes()))
                found[path.relative_to(root).as_posix()] = _FIGURE.sub(b"0", content) if verb == "latency" else content
    return found


def problems(root: Path) -> list[str]:
    """What a verb that ended well may not leave behind."""
    found = [f"half-made: {path.relative_to(root)}" for path in root.rglob(".*") if _is_half_made(path)]
    work = [path.relative_to(root) for path in root.glob("work/**/*") if path.is_file() and path.suffix != ".lock"]
    found += [f"work: {path}" for path in work]
    database = sqlite3.connect(root / "mlflow.db")
    try:
        running = database.execute("select run_uuid, name from runs where status = 'RUNNING'").fetchall()
    except sqlite3.OperationalError:
        running = []  # no training has begun the store
    finally:
        database.close()
    return found + [f"RUNNING: {name} {run_id}" for run_id, name in running]


def _is_half_made(path: Path) -> bool:
    return path.name not in _KEPT and path.suffix != ".lock" and not {".git", ".dvc"} & set(path.parts)
