"""EfficientAD through its verbs: teacher, penalty images, training that is killed and goes on, evaluation, export."""

import hashlib
import zipfile
from dataclasses import replace

import pytest
import torch
from conftest import CATEGORY, tiny_params, write_params
from rich.console import Console
from safetensors.torch import load_file

from anomaly_models.efficient_ad import EfficientAD, patch_description_network
from pipelines.errors import WeightsError
from pipelines.files import read_json
from pipelines.paths import Project
from pipelines.sources.catalogue import SOURCES
from pipelines.teachers.distill import PublishedTeacherConfig, fetch_published
from pipelines.training import loop

TEACHER = "pretrained/efficient_ad/teacher/teacher.safetensors"


@pytest.fixture
def efficient_ad(root):
    """A project that trains EfficientAD for three steps."""
    values = tiny_params()
    values["prepare"]["image_sizes"] = [128]
    values["distill"] = {
        "efficient_ad": {
            "source": "distilled",
            "width": "tiny",
            "backbone": {"name": "resnet18.tv_in1k", "weights": "embedded", "layers": [2, 3]},
            "image_size": 64,
            "steps": 2,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "weight_decay": 1e-5,
            "precision": "float32",
            "seed": 0,
        }
    }
    values["penalty"] = {"efficient_ad": {"image_size": 128, "limit": 5}}
    values["models"] = {
        "efficient_ad": {
            "image_size": 128,
            "batch_size": 1,
            "width": "tiny",
            "teacher": TEACHER,
            "steps": 3,
            "learning_rate": 1e-3,
            "weight_decay": 1e-5,
            "hard_quantile": 0.9,
            "penalty_weight": 1.0,
            "quantile_low": 0.9,
            "quantile_high": 0.995,
            "precision": "float32",
        }
    }
    write_params(root, values)
    return values


def succeed(blemish, *verbs):
    for verb in verbs:
        outcome = blemish(*verb)
        assert outcome.code == 0, outcome.err


def test_from_textures_to_a_file_that_decides(root, blemish, efficient_ad, monkeypatch):
    cell = ("efficient_ad", CATEGORY)
    succeed(blemish, ["download", "demo_textures"], ["prepare", CATEGORY])
    succeed(blemish, ["distill", "efficient_ad"], ["penalty", "efficient_ad"], ["train", *cell])
    run = read_json(root / "models/efficient_ad" / CATEGORY / "run.json")
    teacher = hashlib.sha256((root / TEACHER).read_bytes()).hexdigest()
    assert run["settings"]["inputs"]["teacher_sha256"] == teacher
    whole = load_file(root / "models/efficient_ad" / CATEGORY / "model.safetensors")

    losses = EfficientAD.losses

    def interrupted(self, batch, progress):
        assert batch.penalty is not None
        if progress.step == 2:
            raise KeyboardInterrupt
        return losses(self, batch, progress)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(EfficientAD, "losses", interrupted)
        assert blemish("train", *cell).code != 0
    succeed(blemish, ["train", *cell])
    resumed = load_file(root / "models/efficient_ad" / CATEGORY / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    succeed(blemish, ["evaluate", *cell], ["export", *cell])


def test_what_is_missing_is_one_line(root, blemish, efficient_ad):
    succeed(blemish, ["prepare", CATEGORY])
    outcome = blemish("train", "efficient_ad", CATEGORY)
    assert outcome.code == 1
    assert outcome.err == (
        f"error: teacher {TEACHER}: no such file; run `blemish distill efficient_ad`, or correct "
        "models.efficient_ad.teacher\n"
    )
    (root / TEACHER).parent.mkdir(parents=True)
    (root / TEACHER).write_bytes(b"nonsense")
    outcome = blemish("train", "efficient_ad", CATEGORY)
    assert "no penalty images; run `blemish penalty efficient_ad`" in outcome.err
    (root / "data" / "demo_textures").mkdir()
    outcome = blemish("penalty", "efficient_ad")
    assert "holds no photos" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    outcome = blemish("distill", "fapm")
    assert outcome.err == "error: distill.fapm: not in params.yaml; its distill section serves: efficient_ad\n"


def test_too_few_held_out_images_are_refused_before_training(root, blemish, efficient_ad):
    efficient_ad["prepare"]["holdout"] = 0.01  # one image is held out at the least
    write_params(root, efficient_ad)
    succeed(blemish, ["prepare", CATEGORY])
    outcome = blemish("train", "efficient_ad", CATEGORY)
    assert outcome.code == 1
    assert outcome.err == (
        f"error: efficient_ad on {CATEGORY}: calibration needs 2 or more held-out good images, found 1; "
        "give more good images, or raise prepare.holdout\n"
    )


def test_inputs_that_do_not_suit_their_model(root, blemish, efficient_ad):
    efficient_ad["distill"]["efficient_ad"]["width"] = "small"
    efficient_ad["penalty"] = {"efficient_ad": {"image_size": 256, "limit": 5}, "fapm": {"image_size": 64, "limit": 5}}
    write_params(root, efficient_ad)
    problems = blemish("check").err
    assert "distill.efficient_ad.width = 'small': models.efficient_ad.width is 'tiny'" in problems
    assert "penalty.efficient_ad.image_size = 256: models.efficient_ad.image_size is 128" in problems
    assert "penalty.fapm" not in problems


@pytest.mark.parametrize("verb", ["distill", "penalty"])
def test_nothing_is_made_for_a_model_that_is_not_there(root, blemish, efficient_ad, verb):
    """DVC's stage has its empty folder, and a teacher of earlier stays."""
    efficient_ad["penalty"] = {"efficient_ad": {"image_size": 128, "limit": 5}}
    efficient_ad["models"] = tiny_params()["models"]
    efficient_ad["prepare"]["image_sizes"] = [64]
    write_params(root, efficient_ad)
    for _ in range(2):
        outcome = blemish(verb, "efficient_ad")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out == f"{verb}.efficient_ad: not needed, since efficient_ad is not in models\n"
    folder = root / "pretrained" / "efficient_ad" / {"distill": "teacher"}.get(verb, verb)
    assert list(folder.iterdir()) == []
    checked = blemish("check").out.splitlines()
    assert f"{verb}.efficient_ad: not used, since efficient_ad is not in models" in checked


def published(path, monkeypatch, width):
    """A stand-in for the published archive, with a network of `width` under the name of the small one."""
    torch.save(patch_description_network(width).state_dict(), path / "teacher.pth")
    archive = path / "teachers.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("small", "medium"):
            file.write(path / "teacher.pth", f"efficientad_pretrained_weights/pretrained_teacher_{name}.pth")
    source = replace(SOURCES["efficientad_teachers"], sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(SOURCES, "efficientad_teachers", source)
    return PublishedTeacherConfig(source="published", width="small", archive=str(archive))


def test_the_published_teacher_takes_the_place_of_a_distilled_one(tmp_path, monkeypatch):
    project = Project(tmp_path)
    config = published(tmp_path, monkeypatch, "small")
    fetch_published("efficient_ad", config, project, Console(quiet=True))
    state = load_file(tmp_path / TEACHER)
    patch_description_network("small").load_state_dict(state)
    assert torch.equal(state["conv1.weight"], torch.load(tmp_path / "teacher.pth")["conv1.weight"])


def test_a_published_teacher_of_another_shape_is_refused(tmp_path, monkeypatch):
    config = published(tmp_path, monkeypatch, "tiny")
    with pytest.raises(WeightsError, match=r"pretrained_teacher_small.pth: .*size mismatch"):
        fetch_published("efficient_ad", config, Project(tmp_path), Console(quiet=True))
    assert not (tmp_path / TEACHER).exists()
