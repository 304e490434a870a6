import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import mlflow
import pytest
from conftest import tiny_params, write_params
from made_up import put_evaluation
from rich.console import Console

from pipelines.errors import StageError
from pipelines.evaluation.outcomes import EVALUATION_FOLDER
from pipelines.paths import Cell
from pipelines.report.compare import compare_runs
from pipelines.tracking import cells, pages, runs

QUALITY = {"strong": 0.98, "weak": 0.88, "twin": 0.98}


def log_run(
    root: Path, folder: Path, model: str, category: str, *, seed: int = 0, auroc: float = 0.95, **changes: Any
) -> str:
    """A run as `train`, `evaluate` and `latency` leave it."""
    evaluation = put_evaluation(folder, model, category, auroc=auroc, seed=seed, good=60, defect=60, **changes)
    with runs.cell_run(Cell(root, model, category, seed), "tests", None) as run:
        run.settings({"method": model, "train": {"seed": seed}, "models": {model: evaluation.settings}})
        run.metrics(evaluation.known)
        run.metrics({"latency.total.p50": 12.5, "onnx_megabytes": 20.0})
        for path in folder.iterdir():
            run.file(path, EVALUATION_FOLDER)
        return run.run_id


Ids = dict[tuple[str, str], str]  # of runs, by model and category


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ids]:
    """Three models on two categories, and an older run of one of them."""
    root = tmp_path_factory.mktemp("store")
    write_params(root, tiny_params())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        log_run(root, tmp_path_factory.mktemp("old"), "weak", "nut", auroc=0.6)
        ids = {
            (model, category): log_run(root, tmp_path_factory.mktemp("cell"), model, category, auroc=auroc)
            for model, auroc in QUALITY.items()
            for category in ("nut", "bolt")
        }
    return root, ids


@pytest.fixture
def root(store: tuple[Path, Ids], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, so that a test may add to it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(store[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ids(store: tuple[Path, Ids]) -> Ids:
    return store[1]


def printed(root: Path, by: Any = "model", metric: str | None = None, runs: tuple[str, ...] = ()) -> str:
    text = io.StringIO()
    compare_runs(root, "tests", by, metric, runs, 200, Console(file=text, width=140, no_color=True))
    return text.getvalue()


def row(text: str, *beginning: str) -> list[str]:
    """The cells of the first line that begins so; columns are at least two blanks apart."""
    pattern = r"\s*" + r"\s+".join(map(re.escape, beginning)) + r"\s"
    line = next(line for line in text.splitlines() if re.match(pattern, line))
    return re.split(r"\s{2,}", line.strip())


def test_models_from_the_best_to_the_worst(root: Path) -> None:
    text = printed(root)
    order = [line.split()[0] for line in text.splitlines() if line.split() and line.split()[0] in QUALITY]
    assert order[2] == "weak"  # and by its last run, not by the older and worse one
    assert "Image AUROC, percent; average over bolt, nut" in text
    weak = row(text, "weak")
    assert re.fullmatch(r"\d\d\.\d", weak[1])
    assert float(weak[1]) > 75
    assert re.fullmatch(r"-\d+\.\d", weak[3])
    assert weak[4:] == ["240", "1", "25", "12.5", "20.0"]  # seconds are summed over categories, the rest averaged
    assert row(text, order[1])[3].startswith("tie (")


def test_every_pair_is_told_in_words(root: Path) -> None:
    text = printed(root)
    assert re.search(r"^strong beats weak by \d+\.\d points \(p (= 0\.0\d*|< 0\.001)\)\.$", text, re.MULTILINE)
    assert re.search(
        r"^(strong|twin) is \d\.\d points ahead of (strong|twin), as may be chance .*: not distinguishable\.$",
        text,
        re.MULTILINE,
    )


def test_categories(root: Path) -> None:
    text = printed(root, "category", "aupro_30")
    assert "AUPRO 0.3, percent (95 % interval)" in text
    header = next(line for line in text.splitlines() if "strong" in line)
    assert header.split() == ["Category", "Images", "strong", "twin", "weak"]
    for category, images in (("bolt", "120"), ("nut", "120"), ("average", "240")):
        cells = row(text, category)
        assert cells[1] == images
        assert len(re.findall(r"\d+\.\d \(\d+-\d+\)", "  ".join(cells))) == 3


def test_defects(root: Path) -> None:
    text = printed(root, "defect")
    assert "Defects found at the deployed threshold" in text
    cells = row(text, "nut", "cut")
    assert cells[2] == "30"
    assert len(cells) == 6
    assert float(cells[3]) > float(cells[5])
    assert "let the same share" in printed(root, "defect", "recall_at_rate")


def test_chosen_runs(root: Path, ids: Ids) -> None:
    text = printed(root, runs=(ids["strong", "nut"][:8], ids["weak", "nut"]))
    assert "average over nut" in text
    assert "twin" not in text
    assert row(text, "weak")[4] == "120"


def test_runs_of_different_categories_are_not_compared(root: Path, ids: Ids) -> None:
    text = printed(root, runs=(ids["strong", "nut"], ids["weak", "bolt"]))
    assert "strong and weak cannot be compared by Image AUROC: nut and bolt are two categories." in text
    assert row(text, "strong")[3:5] == ["120", "1"]  # nobody is the best


def test_runs_on_other_images_are_not_compared(root: Path, tmp_path: Path, ids: Ids) -> None:
    new = log_run(root, tmp_path / "new", "new", "nut", test_sha256="other", pixels_sha256="other")
    text = printed(root, runs=(ids["strong", "nut"], new))
    assert "the test files of nut changed between the two evaluations." in text


def test_two_seeds_of_one_model_are_a_tie(root: Path, tmp_path: Path) -> None:
    """Twelve points apart on the same images: still what another seed does, and nothing says it would do less."""
    log_run(root, tmp_path / "0", "seeded", "nut", seed=0, auroc=0.96)
    log_run(root, tmp_path / "1", "seeded", "nut", seed=1, auroc=0.84)
    found = [run for run in cells.cell_runs(root, "tests") if run.model == "seeded"]
    text = printed(root, runs=tuple(run.run_id for run in found))
    assert re.search(
        r"seeded seed 0 is 1?\d\.\d points ahead of seeded seed 1, as may be chance \(p = 0\.\d+\): not dist", text
    )
    assert re.search(r"2 \(± \d+\.\d\)", text)


def test_from_the_command_line(root: Path, blemish: Any, ids: Ids) -> None:
    outcome = blemish("compare", "--by", "category", "--metric", "recall")
    assert outcome.code == 0, outcome.err
    assert "Defects found, percent" in outcome.out
    first, second = (ids[model, "nut"][:8] for model in ("strong", "weak"))
    one_by_one = blemish("compare", "--runs", first, "--runs", second).out
    assert blemish("compare", "--runs", f"{first},{second}").out == one_by_one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "auroc"), "metric 'auroc': unknown; there are: image_auroc, image_ap, "),
        (("--by", "defect", "--metric", "aupro_30"), "metric 'aupro_30': unknown by defect; there are: recall, "),
        (("--runs", "0000"), "run '0000': no evaluated run's id begins so (with at least 4 characters); "),
        (("--runs", "0"), "run '0': no evaluated run's id begins so (with at least 4 characters); "),
        (("--experiment", "else"), "experiment 'else' is not in sqlite:///"),
    ],
)
def test_errors_are_one_line(root: Path, blemish: Any, arguments: tuple[str, ...], message: str) -> None:
    outcome = blemish("compare", *arguments)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {message}")
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_fresh_project_has_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blemish: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, tiny_params())
    outcome = blemish("compare")
    remedy = "run `dvc repro`, or set MLFLOW_TRACKING_URI to the server that has them"
    assert outcome.err == f"error: mlflow.db: no runs yet; {remedy}\n"
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_of_another_version_says_what_to_do(root: Path, tmp_path: Path) -> None:
    with runs.cell_run(Cell(root, "ancient", "nut", 0), "tests", None) as run:
        run.metrics({"threshold": 1.0, "image_auroc": 0.9})
    message = rf"^run {run.run_id} \(ancient on nut\): holds no evaluation/predictions.csv; "
    with pytest.raises(StageError, match=message):
        printed(root)


def test_nothing_evaluated_yet(root: Path, tmp_path: Path) -> None:
    with runs.cell_run(Cell(root, "fapm", "nut", 0), "empty", None):
        pass
    with pytest.raises(StageError, match=r"^experiment 'empty': no run has been evaluated yet; run `dvc repro`, or"):
        compare_runs(root, "empty", "model", None, (), 50, Console(quiet=True))


def test_what_was_made_for_another_store_is_told_of(root: Path) -> None:
    with runs.cell_run(Cell(root, "fapm", "nut", 0), "tests", None) as run:
        pass
    assert cells.warning_of_absent(root, {run.run_id: "fapm on nut"}) is None
    told = cells.warning_of_absent(root, {run.run_id: "fapm on nut", "0" * 32: "adfa on nut"})
    assert str(told).startswith(
        f"sqlite:///{root}/mlflow.db lacks 1 of 2 runs, such as that of adfa on nut, made while "
    )


# Over the network


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_server_that_does_not_answer_is_told_of_soon(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(StageError) as caught:
        printed(root)
    assert time.monotonic() - started < 30
    assert "check MLFLOW_TRACKING_URI" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def server(store: tuple[Path, Ids], tmp_path: Path) -> Iterator[str]:
    """MLflow's own, with a place of its own for artifacts."""
    port = free_port()
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            with urlopen(f"{address}/health", timeout=5):
                break
        except (URLError, OSError):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield address
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_runs_on_a_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for model in ("strong", "weak"):
        log_run(elsewhere, tmp_path / model, model, "nut", auroc=QUALITY[model])
    here = tmp_path / "here"  # nothing but the address is shared
    here.mkdir()
    text = printed(here)
    assert re.search(r"^strong beats weak by \d+\.\d points \(p (= 0\.0\d*|< 0\.001)\)\.$", text, re.MULTILINE)
    assert not list(here.iterdir())
    assert pages.pages(here, "tests").base == server
    assert mlflow.MlflowClient(server).get_experiment_by_name("tests") is not None
