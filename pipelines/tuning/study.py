"""Optuna: a study in a database, which several processes and machines may share and from which none loses anything.

What a trial tries is a function of the seed and of the trials that have ended before it, not of how often the process
was killed: a trial that was cut off counts for nothing, and the next one is just that again. A process that is gone is
noticed at once on its own machine, and by its silence of minutes on another.
"""

import contextlib
import hashlib
import socket
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, OptunaError, TrialPruned
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from pipelines.callers import is_gone
from pipelines.errors import StageError
from pipelines.files import atomic_file
from pipelines.tracking.database import in_address
from pipelines.tracking.secrets import shown, without_secrets
from pipelines.tuning.spaces import Choices, Range, Space, named

# Of a trial: that it is the model's own settings; why they were refused; the step at which it was given up.
BASE, REASON, PRUNED_AT = "base", "reason", "pruned_at"
_PROCESS = "process"  # that runs it: host, process id, start
_HEARTBEAT, _SILENCE = 20, 120  # seconds
_WAIT = 60  # seconds for another process that is writing
_AT_RANDOM = 8  # trials before which those that ended are too few to learn from
_BEFORE_PRUNING = 4  # trials that are judged whole
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "MySQLdb": "mysqlclient"}

Settings = dict[str, Any]  # by their dotted names
GivenUp = TrialPruned


@dataclass(frozen=True, slots=True)
class Place:
    """A database, by its address; None: the project's own file."""

    address: str | None
    file: Path

    @property
    def url(self) -> str:
        return self.address or f"sqlite:///{in_address(self.file.resolve())}"

    @property
    def lock(self) -> FileLock:
        """What the processes of this project do one after the other."""
        return FileLock(self.file.with_name(f".{self.file.stem}.lock"))

    @property
    def shown(self) -> str:
        return f"sqlite:///{self.file.resolve()}" if self.address is None else shown(self.address)


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial that has ended, in whichever way but by being cut off."""

    number: int
    settings: Settings | None  # None: the model's own
    value: float | None  # the objective; None where it was not judged whole
    attributes: dict[str, Any]

    @property
    def is_base(self) -> bool:
        return self.settings is None


class Study:
    """Trials of one space, in order; opened under its name, begun if it is not there.

    Raises:
        StageError: the database cannot be used.
    """

    def __init__(self, place: Place, name: str, space: Space, base: Settings, seed: int) -> None:
        self._place, self._space, self._base, self._seed = place, space, base, seed
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _errors_told(place):
            self._storage = _storage(place)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=_BEFORE_PRUNING),
            )

    def close(self) -> None:
        """Let the database go."""
        _let_go(self._storage)

    def ended(self) -> list[Ended]:
        with _errors_told(self._place):
            return [self._ended(trial) for trial in self._study.get_trials(deepcopy=False) if _counts(trial)]

    def elsewhere(self) -> int:
        """How many trials run in other processes, as far as is known."""
        with _errors_told(self._place), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._forget_dead()
            optuna.storages.fail_stale_trials(self._study)
            return sum(trial.state == TrialState.RUNNING for trial in self._study.get_trials(deepcopy=False))

    def run_one(self, objective: Callable[["Trying"], float], refusals: tuple[type[Exception], ...]) -> None:
        """Run the next trial. One of the `refusals` ends it alone, and its reason is kept; all else ends the search.

        Raises:
            StageError: the database cannot be used.
        """

        def tried(trial: Trial) -> float:
            lock.release()
            trial.set_user_attr(_PROCESS, _process())  # which may have taken what another one has queued
            try:
                return objective(Trying(trial, self._settings(trial)))
            except refusals as error:
                trial.set_user_attr(REASON, " ".join(str(error).split())[:1000])
                raise

        # SQLite lets two processes take one queued trial.
        lock = self._place.lock
        with _errors_told(self._place), lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._forget_dead()
            self._queue_one()
            trials = self._study.get_trials(deepcopy=False)
            begun = sum(_counts(trial) or trial.state == TrialState.RUNNING for trial in trials)
            self._study.sampler = optuna.samplers.TPESampler(seed=_seed(self._seed, begun), n_startup_trials=_AT_RANDOM)
            logger = optuna.logging.get_logger("optuna")
            before, logger.disabled = logger.disabled, True
            try:
                self._study.optimize(tried, n_trials=1, catch=refusals)
            finally:
                logger.disabled = before

    def _settings(self, trial: Trial) -> Settings | None:
        """What to try; None: the model's own."""
        if trial.user_attrs.get(BASE):
            for key, setting in self._space.items():
                if setting.holds(self._base[key]):  # else no trial of this space can be compared with it by this key
                    _suggest(trial, key, setting)
            return None
        return {key: setting.value(_suggest(trial, key, setting)) for key, setting in self._space.items()}

    def _ended(self, trial: FrozenTrial) -> Ended:
        own = bool(trial.user_attrs.get(BASE))
        settings = None if own else {k: setting.value(trial.params[k]) for k, setting in self._space.items()}
        value = trial.value if trial.state == TrialState.COMPLETE else None
        return Ended(trial.number, settings, value, dict(trial.user_attrs))

    def _forget_dead(self) -> None:
        """Fail what runs in a process of this machine that is gone."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _is_ours_and_dead(trial):
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _queue_one(self) -> None:
        """Let the next trial be known as this process's from its first moment on.

        The model's own settings are the first, and again if that trial was cut off.
        """
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return
        attributes: dict[str, Any] = {_PROCESS: _process()}
        values: dict[str, Any] = {}
        begun = [trial for trial in trials if _counts(trial) or trial.state == TrialState.RUNNING]
        if not any(trial.user_attrs.get(BASE) for trial in begun):
            attributes[BASE] = True
            values = {key: named(self._base[key]) for key, s in self._space.items() if s.holds(self._base[key])}
        self._study.enqueue_trial(values, user_attrs=attributes)


@dataclass(frozen=True, slots=True)
class Trying:
    """The trial that runs."""

    _trial: Trial
    settings: Settings | None  # None: the model's own

    @property
    def number(self) -> int:
        return int(self._trial.number)

    def keep(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)

    def report(self, step: int, objective: float) -> None:
        """Tell what a trial has come to. Raises TrialPruned if others were better at this step."""
        self._trial.report(objective, step)
        if self._trial.should_prune():
            self._trial.set_user_attr(PRUNED_AT, step)
            raise TrialPruned


def _suggest(trial: Trial, key: str, setting: Range | Choices) -> Any:
    if isinstance(setting, Choices):
        return trial.suggest_categorical(key, setting.names)
    suggest = trial.suggest_int if setting.whole else trial.suggest_float
    return suggest(key, setting.low, setting.high, log=setting.log)


def _counts(trial: FrozenTrial) -> bool:
    """Whether it has ended by itself: judged, given up, or refused for its settings."""
    if trial.state == TrialState.FAIL:
        return REASON in trial.user_attrs
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def _seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"trial {number} of seed {seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _process() -> list[Any]:
    process = psutil.Process()
    return [socket.gethostname(), process.pid, process.create_time()]


def _is_ours_and_dead(trial: FrozenTrial) -> bool:
    host, pid, started = trial.user_attrs.get(_PROCESS, [None, 0, 0.0])
    return host == socket.gethostname() and is_gone(pid, started)


# ---- the database ----------------------------------------------------------------------------------------------------


def _storage(place: Place) -> Any:
    if place.address is None:
        with place.lock:
            if not place.file.exists():
                _begin(place.file)
    return _opened(place.url)


def _let_go(storage: Any) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _begin(path: Path) -> None:
    """Make the tables elsewhere, and put the file in place whole."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, atomic_file(path) as temporary:
        made = Path(folder) / path.name
        storage = _opened(f"sqlite:///{in_address(made)}")
        _let_go(storage)
        _copied(made, temporary)


def _copied(database: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as source, contextlib.closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def _opened(url: str) -> Any:
    # A file waits for others that write; a connection that the server has closed meanwhile is noticed.
    ways = {"connect_args": {"timeout": _WAIT}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.storages.RDBStorage(url, engine_kwargs=ways, heartbeat_interval=_HEARTBEAT, grace_period=_SILENCE)


@contextlib.contextmanager
def _errors_told(place: Place) -> Iterator[None]:
    """Whatever the database refuses becomes one line, without the password that may stand in its address."""
    try:
        yield
    except (SQLAlchemyError, OptunaError, sqlite3.Error) as error:
        raise _unusable(place, error) from None  # whose own text may hold the address
    except ImportError as error:
        cause = error.__cause__
        name = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if name is None:
            raise
        remedy = f"`pip install {_DRIVERS.get(name, name)}`"
        raise StageError(f"storage {place.shown}: the package that reaches it is missing; {remedy}") from None


def _unusable(place: Place, error: Exception) -> StageError:
    cause: BaseException = error
    while (below := getattr(cause, "orig", None) or cause.__cause__) is not None:
        cause = below
    reason = " ".join(without_secrets(str(cause)).split()) or type(cause).__name__
    remedy = "mend it, or check --storage"
    if "file is not a database" in reason or "malformed" in reason:
        remedy = "put a copy of it in place, or move it away and the next run begins another"
    elif "database is locked" in reason:
        remedy = "another process has it: wait for it to end, and run again"
    elif "readonly" in reason or "unable to open" in reason or "disk" in reason:
        remedy = "see to it that there is space and that this user may write there, and run again"
    return StageError(f"storage {place.shown}: {reason}; {remedy}")
