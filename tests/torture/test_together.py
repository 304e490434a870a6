"""Several verbs at once: nothing is lost, no run is there twice, and who must wait is told so."""

import contextlib
import sqlite3
from pathlib import Path

import pytest
from conftest import CATEGORY
from projects import Made, problems
from tiny_projects import lay_out
from verbs import Ended, begin, run

AT_ONCE = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("fapm"), "fapm")


def together(root: Path, *calls: tuple[str, ...]) -> list[Ended]:
    (root / "logs").mkdir(exist_ok=True)
    begun = [begin(root, *call, log=f"logs/{number}") for number, call in enumerate(calls)]
    return [one.ended() for one in begun]


def test_trainings_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    seeds = list(range(AT_ONCE))
    for verb in lay_out(tmp_path, "fapm", {"train": {"seeds": seeds}})[:2]:
        assert run(tmp_path, *verb).code == 0
    calls = [("train", "fapm", CATEGORY, "--seed", str(seed)) for seed in seeds]
    assert [one.code for one in together(tmp_path, *calls)] == [0] * AT_ONCE
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        runs = database.execute("select name, status from runs").fetchall()
    names = [f"fapm-{CATEGORY}" + (f"-seed{seed}" if seed else "") for seed in seeds]
    assert sorted(runs) == sorted((name, "FINISHED") for name in names)
    assert not problems(tmp_path)


@pytest.mark.parametrize("verb", ["prepare", "evaluate", "export", "report", "train"])
def test_the_same_twice_at_once(made: Made, verb: str) -> None:
    made.renew(verb)
    first, second = together(made.root, made.verbs[verb], made.verbs[verb])
    assert 0 in (first.code, second.code)
    for one in (first, second):
        assert one.code == 0 or one.lines[-1].startswith("error: ")
        assert one.code == 0 or "another process is" in one.lines[-1]
    assert verb == "report" or not made.changed(verb)
    assert not problems(made.root)
    made.assert_survives(verb, "twice at once")


def test_a_model_is_looked_at_while_it_is_trained_anew(made: Made) -> None:
    """Evaluated is one of the two, as a whole; whoever finds a mixture says what to run."""
    calls = [made.verbs[verb] for verb in ("train", "evaluate", "export", "report")]
    trained, *others = together(made.root, *calls)
    assert trained.code == 0, trained.output
    for one in others:
        assert one.code == 0 or (one.code == 1 and one.lines[-1].startswith("error: ")), one.output
        assert "Traceback" not in one.output
    for verb in ("evaluate", "export", "latency", "report"):
        again = run(made.root, *made.verbs[verb])
        assert again.code == 0, again.output
    assert not made.changed("train")
    assert not made.changed("evaluate")
    assert not made.changed("export")
    assert not problems(made.root)
