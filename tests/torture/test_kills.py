"""`kill -9` at random moments: the earlier result is there until the new one is, the next call ends with the bits of an
undisturbed run, and nothing is left behind.
"""

import functools
import random
import signal
from collections.abc import Callable

import pytest
from projects import Made, cases
from verbs import run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(("model", "verb"), cases(metafunc.config.getoption("--torture")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return functools.cache(lambda model: Made(tmp_path_factory.mktemp(model), model))


def test_killed_at_random_moments(made: Callable[[str], Made], model: str, verb: str, thorough: bool) -> None:
    project, drawn = made(model), random.Random(f"{model} {verb}")
    project.renew(verb)
    for _ in range(20 if thorough else 1):
        moment = drawn.uniform(0, project.took[verb])
        killed = run(project.root, *project.verbs[verb], kill_after=moment)
        assert killed.code in (-signal.SIGKILL, 0), killed.output  # 0: it was faster this time
        project.assert_survives(verb, f"{moment:.2f} s of {project.took[verb]:.2f}")
