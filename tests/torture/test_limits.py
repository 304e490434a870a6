"""No space, no memory, by limits that any user can set: one line, what was there stays, and the next call works."""

import functools
from collections.abc import Callable

import pytest
from projects import Made, cases
from verbs import Ended, Fault, LittleMemory, SmallFiles, run

KILOBYTE, MEGABYTE = 2**10, 2**20
SPACES = (100, 10 * KILOBYTE, 100 * KILOBYTE, 500 * KILOBYTE, 2 * MEGABYTE)
MEMORIES = (30 * MEGABYTE, 40 * MEGABYTE, 60 * MEGABYTE, 100 * MEGABYTE)  # with less, the libraries' own C code crashes
SOME = ("prepare", "train", "evaluate")  # that are tried with little memory wherever the suite runs
LINES = 3  # at most, of what a verb says that fails
HANGS = 120.0  # seconds after which a verb is killed: without memory for its next thread, CPython may wait for ever


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    thorough = metafunc.config.getoption("--torture")
    some = not thorough and metafunc.definition.name == "test_no_memory"
    metafunc.parametrize(("model", "verb"), [case for case in cases(thorough) if not some or case[1] in SOME])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return functools.cache(lambda model: Made(tmp_path_factory.mktemp(model), model))


def assert_told(project: Made, verb: str, fault: Fault) -> bool:
    """Whether the verb failed; if so, that it said why and did no harm."""
    starved = run(project.root, *project.verbs[verb], fault=fault, kill_after=HANGS)
    if starved.code == 0:
        return False
    if not (isinstance(fault, LittleMemory) and wordless(starved)):
        assert starved.code == 1, f"{fault}: exit code {starved.code}\n{starved.output}"
        assert "Traceback" not in starved.output
        assert starved.lines[-1].startswith("error: ")
        # C libraries may say something of their own when they are refused memory: which do depends on the machine.
        assert isinstance(fault, LittleMemory) or len(starved.lines) <= LINES, starved.output
    project.assert_survives(verb, str(fault))
    return True


def wordless(starved: Ended) -> bool:
    """A C library's own crash, a hang, or CPython's word for an allocation that failed where it does not look."""
    return starved.code < 0 or starved.lines[-1] == "SystemError: error return without exception set"


def test_no_space(made: Callable[[str], Made], model: str, verb: str, thorough: bool) -> None:
    project = made(model)
    project.renew(verb)
    told = [assert_told(project, verb, SmallFiles(space)) for space in (SPACES if thorough else SPACES[::3])]
    assert any(told)


def test_no_memory(made: Callable[[str], Made], model: str, verb: str, thorough: bool) -> None:
    """What a verb needs beyond its imports depends on the machine: how often it fails does, too."""
    project = made(model)
    project.renew(verb)
    for memory in MEMORIES if thorough else MEMORIES[2:3]:
        assert_told(project, verb, LittleMemory(memory))
