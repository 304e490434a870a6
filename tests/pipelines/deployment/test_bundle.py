"""`blemish bundle`, and what becomes of it on another machine: whole or refused, the same answers from every door."""

import csv
import hashlib
import json
import random
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from at_the_line import ONLY, play
from bright_model import CARD as BRIGHT
from conftest import CATEGORY, draw_category, tiny_params, write_params
from rich.console import Console

from anomaly_models.common.settings import Tiles
from anomaly_models.common.sizes import Size
from pipelines import lineage
from pipelines.deployment import bundle as module
from pipelines.deployment.bundle import bundle
from pipelines.deployment.export import export
from pipelines.deployment.threshold import threshold
from pipelines.errors import ExportError, StageError
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.outcomes import read_predictions
from pipelines.inference.bundle import Bundle, Replayed, Sample, comment, digest_and_end
from pipelines.inference.card import Card, ThresholdChoice
from pipelines.inference.detector import Detector, ModelCard
from pipelines.inference.engine import Engine
from pipelines.inference.measures import MEASURES, measured
from pipelines.paths import Project
from pipelines.pictures.windows import GivenWindow
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.report.report import report
from pipelines.settings.params import Params
from pipelines.training.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    draw_category(root / "images" / CATEGORY)
    write_params(root, tiny_params())
    made = Project(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        params = load_checked(root / "params.yaml")
        source, folder = root / "images" / CATEGORY, made.prepared(CATEGORY)
        prepare(source, CATEGORY, params.prepare, params.views().frames, folder, lambda *_: None)
        train("fapm", CATEGORY, params, made, CPU, Console(quiet=True))
        evaluate("fapm", CATEGORY, params, made, CPU)
        export("fapm", CATEGORY, params, made)
    return made


@pytest.fixture
def params(project: Project, monkeypatch: pytest.MonkeyPatch) -> Params:
    monkeypatch.chdir(project.root)
    return load_checked(project.params)


@pytest.fixture
def path(project: Project, params: Params, tmp_path: Path) -> Path:
    return bundle("fapm", CATEGORY, params, project, tmp_path / "squares.zip").path


# ------------------------------------------------------------------------------------------------------------ contents


def test_the_same_cell_gives_the_same_bytes(path: Path, project: Project, params: Params, tmp_path: Path) -> None:
    made = bundle("fapm", CATEGORY, params, project)
    assert made.path == project.root / "bundles" / f"fapm-{CATEGORY}.zip"
    assert made.path.read_bytes() == path.read_bytes()
    assert (made.num_samples, made.is_deployed) == (5, False)


def test_it_holds_the_file_that_was_exported_and_the_sha256_of_everything(path: Path, project: Project) -> None:
    cell = project.cell("fapm", CATEGORY, 0)
    with zipfile.ZipFile(path) as archive:
        digests = json.loads(archive.read("manifest.json"))["sha256"]
        assert {*digests, "manifest.json"} == {*archive.namelist()}
        for name, digest in digests.items():
            assert hashlib.sha256(archive.read(name)).hexdigest() == digest
        assert archive.read("model.onnx") == cell.onnx.read_bytes()
        assert not [name for name in archive.namelist() if name.endswith((".pkl", ".pt", ".pyc"))]


def test_the_card_says_what_it_is_how_good_and_on_what_terms(path: Path, project: Project) -> None:
    opened, cell = Bundle(path), project.cell("fapm", CATEGORY, 0)
    detector = Detector(cell.onnx)
    assert opened.card.to_json() == detector.card.to_json()
    about = opened.about
    assert about["metrics"]["image_auroc"]["value"] == pytest.approx(1.0)
    assert len(about["metrics"]["image_auroc"]["interval_95"]) == 2
    assert about["parity"]["num_images"] == 8
    assert about["latency"] is None
    assert about["data"]["images"]["holdout"] == 3
    assert (about["data"]["name"], about["seed"]) == ("images", 0)
    assert about["licences"]["weights"] == detector.card.weights
    assert "whoever took the pictures" in about["licences"]["data"]
    assert "Different" in about["method"]
    assert "Of good parts like the 3 held out" in " ".join(about["limits"])
    held_out = [image.score for image in read_predictions(cell.evaluated) if image.split == "holdout"]
    assert [
        float(row["threshold_score"]) for row in csv.DictReader(opened.read("calibration.csv").decode().splitlines())
    ] == held_out


def test_further_parts_are_compared_with_the_held_out_ones_as_they_are_scored(path: Path, project: Project) -> None:
    opened, source = Bundle(path), project.root / "images" / CATEGORY
    engine = opened.engine()
    held_out = [i for i in read_predictions(project.cell("fapm", CATEGORY, 0).evaluated) if i.split == "holdout"]
    inputs = [engine.load(source / image.path) for image in held_out]
    assert opened.calibration["score"] == [float(engine(one)[1][0]) for one in inputs]
    for name in MEASURES:
        assert opened.calibration[name] == [measured(one)[name] for one in inputs]


def test_terms_are_those_of_the_set_that_was_downloaded(params: Params) -> None:
    with_mvtec = params.model_copy(update={"download": {**params.download, "mvtec_ad": {}}})
    assert module._terms("mvtec_ad", with_mvtec).startswith("MVTec AD")
    assert "not for commercial use" in module._terms("mvtec_ad", with_mvtec)
    assert module._terms("demo_textures", params) == "drawn by Blemish: under its own licence"
    for own in ("images", "mvtec_ad", "demo"):  # folders of one's own may be called so
        assert "whoever took the pictures" in module._terms(own, params)


def test_samples_are_of_both_kinds_and_away_from_the_threshold(path: Path) -> None:
    opened = Bundle(path)
    assert {sample.shows for sample in opened.samples} == {"good", "square"}
    assert {sample.decision for sample in opened.samples} == {"good", "defect"}
    assert min(abs(sample.score - opened.card.threshold) for sample in opened.samples) > 0.01


def test_a_threshold_that_a_person_chose_goes_along(project: Project, params: Params, tmp_path: Path) -> None:
    before = Detector(project.cell("fapm", CATEGORY, 0).onnx).card.threshold
    deployed = threshold("fapm", CATEGORY, before + 1, "two were missed", "anna", project).path
    try:
        made = bundle("fapm", CATEGORY, params, project, tmp_path / "chosen.zip")
    finally:
        shutil.rmtree(deployed.parents[1])
    assert made.is_deployed
    opened = Bundle(made.path)
    assert opened.card.threshold == before + 1
    assert isinstance(opened.card.choices[0], ThresholdChoice)
    assert "Its threshold was chosen by anna: no rate of false alarms is promised." in opened.about["limits"]


def test_the_best_of_the_report_by_name(project: Project, params: Params, tmp_path: Path, blemish) -> None:
    path = tmp_path / "best.zip"
    unknown = blemish("bundle", "champion", CATEGORY, "--output", str(path))
    assert (unknown.code, path.exists()) == (1, False)
    assert "summary.json: not there; run `make demo` or `dvc repro`" in unknown.err
    report(params, project)
    made = blemish("bundle", "champion", CATEGORY, "--output", str(path))
    assert made.code == 0, made.err
    assert "5 samples replayed" in made.out
    assert Bundle(path).card.model == "fapm"
    missing = blemish("bundle", "champion", "nut", "--output", str(path))
    assert missing.code == 1
    assert "category 'nut'" in missing.err


# ------------------------------------------------------------------------------------------------------------ refusals


def test_every_byte_counts(path: Path) -> None:
    content = path.read_bytes()
    rng = random.Random(0)
    places = {0, len(content) - 1, len(content) - 72, *(rng.randrange(len(content)) for _ in range(200))}
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        with pytest.raises(ExportError, match=r"squares\.zip: (not as it was written|no whole bundle)"):
            Bundle(path)
    for length in (0, 1, 70, 71, 72, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ExportError, match=r"(no whole bundle|not as it was written).*copy it again"):
            Bundle(path)


def sign(path: Path) -> None:
    """Let its last bytes be the sum of the others."""
    digest, end = digest_and_end(path)
    path.write_bytes(path.read_bytes()[: -len(end)] + comment(digest))


def test_no_bundle_another_format_and_nothing_there(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.zip: no such file; give the bundle"):
        Bundle(tmp_path / "none.zip")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(other, "w") as archive:
        archive.comment = comment("0" * 64)
        archive.writestr("card.json", json.dumps(json.loads(whole.read("card.json")) | {"format": "99"}))
    sign(other)
    with pytest.raises(ExportError, match=r"other\.zip: a bundle of format 99, this version reads 2; make it again"):
        Bundle(other)
    for card in (b"[]", b"{", b'{"format": "2"}', b'{"format": "2", "detector": {"image_size": 3}}'):
        with zipfile.ZipFile(other, "w") as archive:
            archive.comment = comment("0" * 64)
            archive.writestr("card.json", card)
        sign(other)
        with pytest.raises(StageError, match=r"other\.zip: damaged, or by another version of Blemish .*copy it again"):
            Bundle(other)


def test_what_is_not_exported_or_was_trained_or_prepared_anew(
    project: Project, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Project(tmp_path / "copy")
    shutil.copytree(project.root, copy.root, ignore=shutil.ignore_patterns("bundles", "mlartifacts", "mlflow.db"))
    monkeypatch.chdir(copy.root)
    index = copy.prepared(CATEGORY) / "index.json"
    index.write_bytes(index.read_bytes() + b"\n")
    with pytest.raises(
        StageError, match=r"squares: prepared anew since fapm on squares was evaluated; run `dvc repro`"
    ):
        bundle("fapm", CATEGORY, params, copy)
    cell = copy.cell("fapm", CATEGORY, 0)
    proto = onnx.load(cell.onnx)
    card = replace(Detector(cell.onnx).card, run_id="another")
    onnx.helper.set_model_props(proto, card.to_metadata())
    onnx.save(proto, cell.onnx)
    with pytest.raises(StageError, match=r"the exported file is of run another, the evaluation of run \w+; run `blem"):
        bundle("fapm", CATEGORY, params, copy)
    cell.onnx.unlink()
    with pytest.raises(StageError, match=r"fapm on squares is not exported: no .+; run `blemish export fapm squares`"):
        bundle("fapm", CATEGORY, params, copy)
    assert not (copy.root / "bundles" / "fapm-squares.zip").exists()


# ------------------------------------------------------------------------------------------------- on another machine


def test_it_runs_where_nothing_else_is_installed(path: Path, project: Project) -> None:
    done = play(path, "verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same ") == 5
    assert (
        done.stdout.splitlines()[-1] == f"{path}: whole, and all 5 samples of fapm on squares are answered as they were"
    )
    about = play(path, "about")
    assert json.loads(about.stdout) == Bundle(path).about


def test_it_answers_as_evaluate_and_predict_do(path: Path, project: Project, blemish) -> None:
    cell, images = project.cell("fapm", CATEGORY, 0), project.root / "images" / CATEGORY / "test"
    done = play(path, "predict", str(images), "--output", "elsewhere", "--fail-on-defect")
    assert done.returncode == 3, done.stderr
    here = blemish("predict", str(cell.onnx), str(images), "--output", "here")
    bundled = blemish("predict", str(path), str(images), "--output", "bundled")
    assert (here.code, bundled.code) == (0, 0)
    rows = (path.parent / "elsewhere" / "predictions.csv").read_bytes()
    assert (Path("here") / "predictions.csv").read_bytes() == (Path("bundled") / "predictions.csv").read_bytes() == rows
    scores = {
        Path(row["path"]).relative_to(images.parent).as_posix(): (float(row["score"]), row["decision"])
        for row in csv.DictReader(rows.decode().splitlines())
    }
    seen = {image.path: image for image in read_predictions(cell.evaluated) if image.split == "test"}
    assert scores.keys() == seen.keys()
    for name, (score, decision) in scores.items():
        assert score == pytest.approx(seen[name].score, abs=1e-4)
        assert decision == seen[name].decision


def test_what_cannot_be_read_is_told_and_the_rest_is_scored(path: Path, project: Project) -> None:
    images = path.parent / "images"
    images.mkdir()
    shutil.copy(project.root / "images" / CATEGORY / "test" / "good" / "000.png", images / "whole.png")
    (images / "half.png").write_bytes((images / "whole.png").read_bytes()[:500])
    (images / "scan.dcm").write_bytes(b"no DICOM")
    done = play(path, "predict", str(images))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "half.png: damaged image" in done.stderr
    assert "1 image scored" in done.stdout
    nowhere = play(path, "predict", str(path.parent / "nowhere"))
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert nowhere.stderr == f"error: {path.parent / 'nowhere'}: no such file or folder\n"


def test_a_machine_that_computes_otherwise_is_told(path: Path, monkeypatch: pytest.MonkeyPatch, blemish) -> None:
    whole = blemish("verify", str(path))
    assert whole.code == 0
    assert "whole, and all 5 samples" in whole.out
    call = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, inputs: (call(self, inputs)[0], call(self, inputs)[1] + 0.01))
    other = blemish("verify", str(path))
    assert other.code == 1
    assert other.out.count("DIFFERS") == 5
    assert "5 of 5 samples of fapm on squares are not answered here as they were; do not use it" in other.out


@pytest.mark.parametrize(
    ("score", "decision", "of_score", "of_map", "same"),
    [
        (1.0, "good", 1e-5, 1e-5, True),
        (1.0, "defect", 1e-5, 1e-5, False),
        (1.0, "good", 2e-3, 0.0, False),
        (1.0, "good", 0.0, 2e-3, False),
        (1.0, "good", float("nan"), 0.0, False),
        (1.0, "good", 0.0, float("nan"), False),
    ],
)
def test_the_same_is_the_same_score_map_and_decision(score, decision, of_score, of_map, same) -> None:
    sample = Sample("samples/0.png", "good", 1.0, "good")
    assert Replayed(sample, score, decision, of_score, of_map, (1e-3, 1e-3)).is_same is same


def test_nothing_that_scores_pictures_needs_more_than_a_bundle_has() -> None:
    known = {*sys.stdlib_module_names, *ONLY.split(), "pipelines", "anomaly_models"}
    optional = {"imagecodecs", "pydicom", "simplejpeg", "tifffile", "pydantic"}  # imported where they are there
    for code in lineage.needed_by("pipelines/inference/runner.py"):
        for line in code.read_text(encoding="utf-8").splitlines():
            if line.startswith(("import ", "from ")):
                assert line.split()[1].partition(".")[0] in known, f"{code}: {line}"
            elif line.strip().startswith("import ") or (line.strip().startswith("from ") and " import " in line):
                assert line.split()[1].partition(".")[0] in known | optional, f"{code}: {line}"


# ---------------------------------------------------------------------------------------------------------------- card


def test_a_card_is_written_and_read_back_whatever_it_holds() -> None:
    choice = ThresholdChoice(2.5, 2.0, "anna", "2026-11-28T10:00:00+00:00", None, None)
    cards = [
        BRIGHT,
        replace(BRIGHT, image_size=Size(32, 64), tiles=Tiles(side=Size(16, 32), overlap=4), region="abc"),
        replace(
            BRIGHT,
            dicom_window=GivenWindow(centre=40.0, width=400.0),
            choices=(choice,),
            false_alarm_rate=None,
            review_load=None,
        ),
    ]
    for card in cards:
        written = json.loads(json.dumps(card.to_json()))
        plain = Card.from_json(written)
        assert plain.to_json() == written
        assert (plain.input_size, plain.takes_region, plain.threshold) == (
            card.input_size,
            card.takes_region,
            card.threshold,
        )
        assert (plain.reject_above, plain.review_load) == (card.reject_above, card.review_load)
        assert isinstance(card, ModelCard)


def test_a_sample_that_is_not_reproduced_leaves_no_bundle(
    project: Project, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Engine.decode
    monkeypatch.setattr(
        Engine,
        "decode",
        lambda self, content, name: decode(self, content, name) // (1 if isinstance(self, Detector) else 2),
    )
    target = tmp_path / "other.zip"
    with pytest.raises(ExportError, match=r"fapm on squares: the bundle does not reproduce its own samples \(DIFFERS"):
        bundle("fapm", CATEGORY, params, project, target)
    assert not target.exists()
    assert [*tmp_path.iterdir()] == []
