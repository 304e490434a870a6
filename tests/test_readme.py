"""Every command of the README's shell blocks works as written; they are run here, on a small project."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from clone import REPOSITORY, commit, copy_project, environment
from conftest import CATEGORY, FAPM, draw_category, tiny_params, write_params
from dvc.cli import parse_args

import cli

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PORT, SERVED = "5077", "8077"


def shell_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


class Shell:
    """A clone with a small params.yaml and the environment that runs the tests; remembers what was typed in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.typed: set[str] = set()
        self.environment = environment(root / ".venv" / "bin", COLUMNS="200", PYTHONPATH=str(root))

    def type(self, command: str) -> str:
        """Run a command of the README, with the test's names in the place of the README's."""
        self.typed.add(command)
        mine = command.replace("my_part", CATEGORY).replace("gear", CATEGORY)
        done = subprocess.run(
            mine.split(), cwd=self.root, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{mine}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    folders = ("anomaly_models", "pipelines", "presets", "pretrained", ".dvc")
    files = ("cli.py", "dvc.yaml", "Makefile", "pyproject.toml", "requirements.lock", ".dvcignore", ".gitignore")
    root = copy_project(tmp_path / "blemish", *folders, *files)
    (root / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (root / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (root / ".venv" / ".installed").touch()
    draw_category(root / "images" / CATEGORY, train=8, good=3, defect=3)
    draw_category(root / "new_images", train=1, good=1, defect=1)
    write_params(root, tiny_params())
    commit(root)
    return Shell(root)


def get(url: str, process: "subprocess.Popen[str]") -> int:
    """The status of a page that is being started."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return int(answer.status)
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)


def walk_as_a_newcomer(shell: Shell) -> None:
    for command in ("make demo", "make report"):
        printed = shell.type(command)
        assert re.search(rf"fapm .* {CATEGORY} .* 100\.0", printed)
        assert "make ui" in printed
    assert (shell.root / "reports" / "tests" / "report.html").stat().st_size > 10_000
    assert "fapm" in shell.type("blemish compare")
    shell.type("blemish gif fapm gear")
    assert list(shell.root.rglob("*.gif"))


def open_the_mlflow_page(shell: Shell) -> None:
    shell.typed.add("make ui")
    assert "\tblemish ui\n" in (shell.root / "Makefile").read_text(encoding="utf-8")
    command = ["blemish", "ui", "--port", PORT]  # make's own port may be taken
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=shell.root, env=shell.environment, **quiet) as process:
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{PORT}/#/experiments/" in process.stdout.readline()
            assert get(f"http://127.0.0.1:{PORT}/", process) == 200
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def with_one_model(root: Path) -> None:
    """One small model keeps the test short."""
    values: dict[str, Any] = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    assert values["data"] == {"root": "my_images", "categories": [CATEGORY]}
    values["models"] = {"fapm": FAPM}
    write_params(root, values)


def take_a_folder_of_ones_own(shell: Shell) -> None:
    (shell.root / "images").rename(shell.root / "my_images")
    assert f"{CATEGORY} (layout mvtec): 8 good parts" in shell.type("blemish start my_images")
    with_one_model(shell.root)
    assert CATEGORY in shell.type("blemish run")
    printed = shell.type("blemish predict exported/fapm/my_part/model.onnx new_images/")
    assert "images scored" in printed
    assert (shell.root / "predictions" / "predictions.csv").exists()
    assert "threshold 2.5 instead of" in shell.type("blemish threshold fapm my_part 2.5")


def take_it_to_the_line(shell: Shell) -> None:
    assert "samples replayed" in shell.type("blemish bundle fapm my_part")
    assert "samples of fapm on" in shell.type("blemish verify bundles/fapm-my_part.zip")
    shell.typed.add("blemish serve bundles/fapm-my_part.zip")
    command = ["blemish", "serve", f"bundles/fapm-{CATEGORY}.zip", "--port", SERVED]  # the usual port may be taken
    with subprocess.Popen(command, cwd=shell.root, env=shell.environment, stdout=subprocess.DEVNULL) as process:
        try:
            assert get(f"http://127.0.0.1:{SERVED}/ready", process) == 200
        finally:
            process.terminate()


def test_every_command_of_the_readme(shell: Shell) -> None:
    """One test, since each part goes on from the project that the one before it left. `make test` runs this one."""
    walk_as_a_newcomer(shell)
    open_the_mlflow_page(shell)
    take_a_folder_of_ones_own(shell)
    take_it_to_the_line(shell)
    assert set(shell_commands()) - {"make test"} == shell.typed
    assert "\nmake test\n" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_fits_two_screens_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) < 110
    assert {f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")} <= set(
        re.findall(r"\]\(([^)#]+)", README)
    )


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = link.partition("#")
            if "://" in path:
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for words in headings}, link


def test_verbs_and_targets_named_in_the_text_exist() -> None:
    verbs = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"`blemish (\w+)", text)) <= verbs
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets


def commands_of(program: str) -> set[str]:
    """Those of all pages, of a block or within a line, as they are typed."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    typed = [line for block in re.findall(r"```(?:sh|yaml)\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = [re.search(rf"(?:^|[ /])({program} [^#]*)", line) for line in typed]
    within = re.findall(rf"(?<!`)`({program} [^`]*)`", text)
    return {" ".join(command.split()) for command in [match[1] for match in found if match] + within}


def test_options_named_in_the_text_are_known() -> None:
    """A verb may stand without its arguments; what does follow it must be understood."""
    app: Any = typer.main.get_command(cli.app)
    commands = [shlex.split(command)[1:] for command in commands_of("blemish") if "import" not in command]
    assert len(commands) > 25
    for verb, *arguments in commands:
        if verb.startswith("--"):
            continue
        try:
            app.commands[verb].make_context(verb, arguments)
        except Exception as error:
            if type(error).__name__ != "MissingParameter":
                raise


def test_dvc_knows_what_the_text_asks_of_it() -> None:
    commands = commands_of("dvc")
    assert len(commands) > 15
    for command in commands:
        parse_args(shlex.split(command)[1:])
