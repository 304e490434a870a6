"""Optuna's part: what is tried in which order, what counts, and what becomes of what was killed."""

import signal
import subprocess
import sys

import pytest
from team_services import database, missing

from pipelines.errors import StageError
from pipelines.tuning.spaces import Choices, Range
from pipelines.tuning.study import Place, Study

SPACE = {"rate": Range(0.001, 1.0, log=True, whole=False), "size": Choices((1, 2, 4)), "layers": Choices(([1], [1, 2]))}
OWN = {"rate": 0.1, "size": 2, "layers": [1, 2]}


OPEN = []


def opened(root, name="one", own=None, seed=0, address=None):
    """Closed when the test has ended."""
    study = Study(Place(address, root / "tune.db"), name, SPACE, own or OWN, seed)
    OPEN.append(study)
    return study


@pytest.fixture(autouse=True)
def _all_closed():
    yield
    while OPEN:
        OPEN.pop().close()


def value(trying):
    """Best at rate 0.01 and size 4."""
    settings = trying.settings or OWN
    return -abs(settings["rate"] - 0.01) + settings["size"] / 10 + len(settings["layers"]) / 100


def tried(study):
    return [(trial.settings, trial.value) for trial in study.ended()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    study = opened(tmp_path_factory.mktemp("whole"))
    for _ in range(12):
        study.run_one(value, ())
    return tried(study)


def test_the_models_own_settings_are_the_first(whole):
    assert whole[0] == (None, -0.09 + 0.2 + 0.02)
    assert all(settings is not None for settings, _ in whole[1:])


def test_a_search_learns_from_its_trials(whole):
    assert max(found for _, found in whole) > 0.4


def test_the_same_seed_tries_the_same(tmp_path, whole):
    study = opened(tmp_path)
    for _ in range(12):
        study.run_one(value, ())
        study = opened(tmp_path)  # each time as if in a new process
    assert tried(study) == whole
    other = opened(tmp_path, name="other", seed=1)
    for _ in range(3):
        other.run_one(value, ())
    assert tried(other)[1] != whole[1]


def test_what_was_cut_off_is_tried_again_and_changes_nothing(tmp_path, whole):
    """The first, one in the middle, and one whose process is told to end; Optuna keeps them as failed."""
    study = opened(tmp_path)

    def interrupted(error):
        def objective(trying):
            raise error

        return objective

    for number in range(12):
        if number in (0, 5):
            with pytest.raises(KeyboardInterrupt):
                study.run_one(interrupted(KeyboardInterrupt()), ())
            with pytest.raises(StageError, match="the store is away"):
                study.run_one(interrupted(StageError("the store is away")), (ValueError,))
        study.run_one(value, ())
    assert tried(study) == whole


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths}
from test_study import opened
def objective(trying):
    print("runs", flush=True)
    time.sleep(600)
opened(Path({root!r})).run_one(objective, ())
"""


SHARED = """
import sys
from pathlib import Path
sys.path[:0] = {paths}
from test_study import opened, value
study, own = opened(Path({root!r})), 0
while len(study.ended()) + study.elsewhere() < 30:
    study.run_one(value, ())
    own += 1
print(own)
"""


def test_two_processes_share_a_study(tmp_path):
    code = SHARED.format(paths=[path for path in sys.path if path], root=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shares = [int(process.communicate(timeout=300)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    study = opened(tmp_path)
    assert study.elsewhere() == 0
    assert len(study.ended()) == sum(shares) >= 30
    assert [trial.is_base for trial in study.ended()].count(True) == 1
    assert max(trial.value for trial in study.ended()) > 0.4


@pytest.mark.parametrize("done", [0, 3])
def test_a_killed_process_is_noticed_at_once(tmp_path, whole, done):
    study = opened(tmp_path)
    for _ in range(done):
        study.run_one(value, ())
    code = KILLED.format(paths=[path for path in sys.path if path], root=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        assert study.elsewhere() == 1
        assert len(study.ended()) == done
        process.send_signal(signal.SIGKILL)
    for _ in range(12 - done):
        study.run_one(value, ())
    assert study.elsewhere() == 0
    assert tried(study) == whole


def test_a_trial_that_others_outdo_is_given_up(tmp_path):
    study, steps = opened(tmp_path), []

    def objective(trying):
        for step in (1, 2, 3):
            steps.append(step)
            trying.report(step, 0.0 if len(study.ended()) == 5 else 1.0)
        return 1.0

    for _ in range(6):
        study.run_one(objective, ())
    assert steps == [1, 2, 3] * 5 + [1]
    last = study.ended()[-1]
    assert (last.value, last.attributes["pruned_at"]) == (None, 1)


def test_refused_settings_count_and_say_why(tmp_path):
    study = opened(tmp_path)
    study.run_one(value, ())

    def objective(trying):
        raise ValueError("too\n large")

    study.run_one(objective, (ValueError,))
    assert len(study.ended()) == 2
    assert study.ended()[1].value is None
    assert study.ended()[1].attributes["reason"] == "too large"


def test_own_settings_outside_of_the_space(tmp_path):
    """They are tried as they are; by this key nothing is learnt from them."""
    study = opened(tmp_path, own=OWN | {"size": 3})
    study.run_one(lambda trying: 1.0, ())
    for _ in range(10):
        study.run_one(value, ())
    first, *others = study.ended()
    assert (first.settings, first.value) == (None, 1.0)
    assert {trial.settings["size"] for trial in others} <= {1, 2, 4}


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("postgresql+psycopg://me:hunter22@127.0.0.1:9/x", r"^storage postgresql\+psycopg://127.0.0.1:9/x: connect"),
        ("nonsense", r"^storage nonsense: .*; mend it, or check --storage$"),
        ("oracle+nothing://me:hunter22@host/x", r"^storage oracle\+nothing://host/x: .*; mend it, or check --storage$"),
        ("mysql+pymysql://me:hunter22@host/x", r"^storage mysql\+pymysql://host/x: the package .* install pymysql`$"),
        ("sqlite:////nowhere/at/all/tune.db", r"^storage sqlite:////nowhere/at/all/tune.db: unable to open database"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_used(address, told, tmp_path):
    with pytest.raises(StageError, match=told) as caught:
        opened(tmp_path, address=address)
    assert "\n" not in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "tune.db").write_text("text " * 1000)
    with pytest.raises(
        StageError, match=r"tune.db: file is not a database; put a copy of it in place, or move it away"
    ):
        opened(tmp_path)


def test_a_database_is_begun_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.tuning.study._copied", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".db"] == []
    monkeypatch.undo()
    opened(tmp_path).run_one(value, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tune.lock", "tune.db"]


def test_the_file_of_a_project_of_any_name(tmp_path):
    root = tmp_path / ("100% {x} #1" + ("?" if sys.platform != "win32" else ""))
    root.mkdir()
    opened(root).run_one(value, ())
    assert (root / "tune.db").exists()
    assert list(tmp_path.iterdir()) == [root]
    (root / "tune.db").write_text("text " * 1000)
    with pytest.raises(StageError) as caught:
        opened(root, name="other")
    assert f"{root / 'tune.db'}: file is not a database" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="starts a server as Debian has it")
@pytest.mark.skipif("postgres" in missing(), reason="PostgreSQL is not installed here")
def test_a_study_in_postgresql(tmp_path, whole):
    with database() as found, found.started():
        for _ in range(12):
            study = opened(tmp_path, address=found.uri)
            study.run_one(value, ())
        assert tried(study) == whole
        assert not (tmp_path / "tune.db").exists()
        wrong = found.uri.replace("not%20a%20secret", "hunter22")
        with pytest.raises(
            StageError, match=r"^storage postgresql\+psycopg://127.0.0.1:\d+/mlflow: .*password"
        ) as told:
            opened(tmp_path, address=wrong)
        assert "hunter22" not in str(told.value)
        assert "\n" not in str(told.value)
    with pytest.raises(StageError, match=r"^storage postgresql\+psycopg://127.0.0.1:\d+/mlflow: .*; mend it, or check"):
        study.run_one(value, ())
