"""What `make` installs is pinned by hashes, and no host is named."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = [f"requirements{of}.lock" for of in ("", "-extras", "-predict", "-serve", "-audit", "-bench")]
PINNED = re.compile(
    r"^([a-z0-9.-]+)==(\S+)(?: ; .*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def locked(name: str) -> dict[str, str]:
    """The version of each package."""
    return {package: version for package, version, _ in PINNED.findall((ROOT / name).read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_a_pin_a_hash_or_a_comment(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [line for line in PINNED.sub("", text).splitlines() if line and not line.lstrip().startswith("#")] == []
    assert "://" not in text


@pytest.mark.parametrize("group", ["predict", "serve"])
def test_the_locks_of_the_line_are_parts_of_the_whole_one(group: str) -> None:
    """The same versions, so that scores are the same, and no torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [requirement for requirement in project["dependency-groups"][group] if isinstance(requirement, str)]
    assert set(wanted) <= set(project["project"]["dependencies"])
    pins = locked(f"requirements-{group}.lock")
    assert {requirement.partition(">")[0] for requirement in wanted} <= pins.keys()
    assert pins.items() <= locked("requirements.lock").items()
    assert not {"torch", "mlflow", "dvc", "onnx", "scipy"} & pins.keys()


def test_what_we_are_compared_with_stands_on_the_same() -> None:
    """What both import is of one version, or figures would compare that, too."""
    ours, theirs = locked("requirements.lock"), locked("requirements-bench.lock")
    assert {"torch", "torchvision", "numpy", "onnxruntime", "pillow", "timm"} <= theirs.keys()
    assert {name: version for name, version in theirs.items() if ours.get(name, version) != version} == {}


def test_each_extra_is_locked() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pins = locked("requirements-extras.lock")
    (tested,) = [requirement for requirement in extras["dev"] if requirement.startswith("blemish[")]
    names_tested = tested.removeprefix("blemish[").removesuffix("]").split(",")
    wanted = {
        requirement for name, extra in extras.items() if name not in ("dev", *names_tested) for requirement in extra
    }
    assert wanted <= {f"{package}=={version}" for package, version in pins.items()}
    assert not pins.keys() & locked("requirements.lock").keys()
    for requirement in (requirement for name in names_tested for requirement in extras[name]):
        assert re.split(r"[\[>]", requirement)[0] in locked("requirements.lock")
