"""`kill -9` before and after each rename, where a result takes the place of the one before it; as in test_kills.py."""

import functools
import itertools
import signal
from collections.abc import Callable, Iterator

import pytest
from projects import Made, cases
from verbs import KillAtRename, run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    thorough = metafunc.config.getoption("--torture")
    metafunc.parametrize(("model", "verb"), [case for case in cases(thorough) if thorough or case[0] == "fapm"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return functools.cache(lambda model: Made(tmp_path_factory.mktemp(model), model))


def moments(thorough: bool) -> Iterator[KillAtRename]:
    """Of all renames; or of the first, and of the first exchange of two folders."""
    some = [(0, True), (0, False)]
    for number, exchanges in ((number, False) for number in itertools.count()) if thorough else some:
        yield from (KillAtRename(number, after, exchanges) for after in (False, True))


def test_killed_around_renames(made: Callable[[str], Made], model: str, verb: str, thorough: bool) -> None:
    """Checkpoints are renamed too, here at each step."""
    project, tried = made(model), 0
    project.renew(verb)
    for moment in moments(thorough):
        killed = run(project.root, *project.verbs[verb], fault=moment)
        if killed.code == 0 and moment.exchanges:
            continue  # it writes files alone
        if killed.code == 0:
            break  # it has no more of them
        assert killed.code == -signal.SIGKILL, killed.output
        project.assert_survives(verb, str(moment))
        tried += 1
    assert tried > 0
