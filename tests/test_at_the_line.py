"""What the README and docs/at-the-line.md say works as written, on a file that can be worked out by hand."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bright_model import CARD, write_model
from clone import REPOSITORY
from PIL import Image

README, PAGE = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/at-the-line.md"))
VERDICT, TABLE = ["blemish", "verdict"], ["--feedback", "watched/feedback.csv"]
MAIN = "import cli, sys; sys.argv[0] = 'blemish'; cli.main()"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with an exported file, a good picture and one with a defect of 3 x 2 pixels of 16 x 16."""
    exported = tmp_path / "exported" / "fapm" / "my_part"
    exported.mkdir(parents=True)
    write_model(exported / "model.onnx", replace(CARD, model="fapm", category="my_part").to_metadata())
    pixels = np.full((16, 16), 20, dtype=np.uint8)
    (tmp_path / "new_images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "new_images" / "a.png")
    pixels[4:6, 8:11] = 204
    Image.fromarray(pixels).save(tmp_path / "new_images" / "b.png")
    return tmp_path


def python(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_lines_of_python(root: Path) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = python(root, "-c", lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["good 0.078431375 0 new_images/a.png", "defect 0.8 6 new_images/b.png"]


def test_the_commands(root: Path) -> None:
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^(blemish .*)$", PAGE, re.MULTILINE)]
    # Which need an evaluated cell: test_int8, test_bundle, test_serve, test_watch, test_learning and test_drift.py.
    others = [
        ["blemish", "bundle", "fapm", "my_part", "--precision", "int8"],
        ["blemish", "bundle", "fapm", "my_part"],
        ["blemish", "serve", "bundles/fapm-my_part.zip"],
        ["blemish", "watch", "camera/", "--bundle", "bundles/fapm-my_part.zip", "--move"],
        [*VERDICT, "good", "watched/review/0001.png", "watched/review/0007.png", *TABLE],
        [*VERDICT, "scratch", "watched/review/0003.png", *TABLE, "--by", "Kim"],
        ["blemish", "learn", "watched/feedback.csv"],
        ["blemish", "run"],
        ["blemish", "drift", "watched", "--bundle", "bundles/fapm-my_part.zip"],
    ]
    assert [command for command in commands if command in others] == others
    commands = [command for command in commands if command not in others]
    outcomes = [python(root, "-c", MAIN, *arguments) for _, *arguments in commands]
    assert [done.returncode for done in outcomes] == [0, 0, 0, 0, 3, 0, 0], [done.stderr for done in outcomes]
    assert [(row["path"], row["decision"]) for row in map(json.loads, outcomes[3].stdout.splitlines())] == [
        ("new_images/a.png", "good"),
        ("new_images/b.png", "defect"),
    ]
    assert (root / "sorted" / "defect" / "b.png").exists()
    assert "threshold 2.5 instead of 0.502" in outcomes[5].stdout
    assert "2 images scored, 0 with a defect at threshold 2.5 (chosen by " in outcomes[6].stdout


def test_without_torch_other_verbs_say_what_they_miss(root: Path) -> None:
    hidden = f"import sys; sys.modules['ruamel.yaml'] = None; {MAIN}"
    done = python(root, "-c", hidden, "check")
    assert done.returncode == 1
    reason = "is not installed, as in an installation for `predict` alone; install Blemish whole"
    assert done.stderr.strip() == f"error: the package 'ruamel.yaml' {reason}"
