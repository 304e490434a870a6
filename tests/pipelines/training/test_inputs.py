"""What models want reaches them; EfficientAD through its verbs, from a killed training to the exported file."""

import hashlib

import pytest
import tiny_models
import torch
from conftest import CATEGORY, MeanColour, MeanColourConfig, tiny_params, write_params
from made_up import distill_settings
from safetensors.torch import load_file, save_file

from anomaly_models.base import Wants
from anomaly_models.common.synthesis import SynthesisConfig
from anomaly_models.efficient_ad import EfficientAD
from pipelines.files import read_json
from pipelines.training import loop

TEACHER = "pretrained/efficient_ad/teacher/teacher.safetensors"


@pytest.fixture
def efficient_ad(root):
    """A project that trains EfficientAD for three steps."""
    values = tiny_params()
    values["distill"] = {"efficient_ad": distill_settings(steps=2, batch_size=2)}
    values["penalty"] = {"efficient_ad": {"image_size": 128, "limit": 5}}
    values["models"] = {"efficient_ad": tiny_models.SETTINGS["efficient_ad"] | {"batch_size": 1, "teacher": TEACHER}}
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
    run = read_json(root / "models/efficient_ad" / CATEGORY / "seed0.trained" / "run.json")
    teacher = hashlib.sha256((root / TEACHER).read_bytes()).hexdigest()
    assert run["settings"]["inputs"]["teacher_sha256"] == teacher
    whole = load_file(root / "models/efficient_ad" / CATEGORY / "seed0.trained" / "model.safetensors")

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
    resumed = load_file(root / "models/efficient_ad" / CATEGORY / "seed0.trained" / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    succeed(blemish, ["evaluate", *cell], ["export", *cell])


@pytest.fixture
def demanding(root, sixth_model, monkeypatch):
    """A sixth model that wants all there is; gives the batches and the teacher that training hands to it."""
    values = tiny_params()
    values["prepare"]["anomalous_train"] = {"count": 2, "protocol": "spread"}
    values["penalty"] = values["textures"] = {sixth_model: {"image_size": 64, "limit": 5}}
    sizes = {"image_size": 64, "resize": "bilinear", "fit": "stretch", "tiles": None}
    values["models"] = {sixth_model: sizes | {"batch_size": 3, "steps": 2, "learning_rate": 0.05}}
    write_params(root, values)
    everything = dict.fromkeys(("foreground", "penalty", "textures"), True) | {"teacher": "teacher.safetensors"}
    wants = Wants(**everything, anomalies=2, synthesis=SynthesisConfig(**tiny_models.SYNTHESIS))
    batches, teachers, losses = [], [], MeanColour.losses

    def watched(self, batch, progress):
        batches.append(batch)
        return losses(self, batch, progress)

    monkeypatch.setattr(MeanColourConfig, "wants", wants)
    monkeypatch.setattr(MeanColour, "losses", watched)
    monkeypatch.setattr(MeanColour, "load_teacher", lambda _, state: teachers.append(state))
    return batches, teachers


def test_a_sixth_model_gets_what_it_wants(root, blemish, sixth_model, demanding):
    batches, teachers = demanding
    cell = (sixth_model, CATEGORY)
    succeed(blemish, ["download", "demo_textures"], ["prepare", CATEGORY])
    remedy = "run `blemish distill mean_colour`, or correct models.mean_colour.teacher"
    assert blemish("train", *cell).err == f"error: teacher teacher.safetensors: no such file; {remedy}\n"
    save_file({"weight": torch.ones(1)}, root / "teacher.safetensors")
    for kind in ("penalty", "textures"):
        assert f"run `blemish {kind} mean_colour`" in blemish("train", *cell).err
        succeed(blemish, [kind, sixth_model])
    succeed(blemish, ["train", *cell])
    assert teachers == [{"weight": torch.ones(1)}]
    assert len(batches) == 2
    for batch in batches:
        assert batch.label.tolist() == [False] * 3 + [True] * 2
        assert batch.foreground.shape == (5, 1, 64, 64)
        assert batch.penalty.shape == batch.texture.shape == batch.image.shape
    inputs = read_json(root / "models" / sixth_model / CATEGORY / "seed0.trained" / "run.json")["settings"]["inputs"]
    assert inputs.keys() == {"teacher_sha256", "penalty_sha256", "textures_sha256"}
    succeed(blemish, ["synthesis", CATEGORY, "--model", sixth_model, "--number", "1"])


def test_a_model_that_wants_nothing_gets_nothing(root, blemish, sixth_model):
    succeed(blemish, ["prepare", CATEGORY], ["train", sixth_model, CATEGORY])
    assert (
        read_json(root / "models" / sixth_model / CATEGORY / "seed0.trained" / "run.json")["settings"]["inputs"] == {}
    )


def test_what_is_missing_is_one_line(root, blemish, efficient_ad):
    succeed(blemish, ["prepare", CATEGORY])
    outcome = blemish("train", "efficient_ad", CATEGORY)
    assert outcome.code == 1
    remedy = "run `blemish distill efficient_ad`, or correct models.efficient_ad.teacher"
    assert outcome.err == f"error: teacher {TEACHER}: no such file; {remedy}\n"
    (root / TEACHER).parent.mkdir(parents=True)
    (root / TEACHER).write_bytes(b"nonsense")
    refused = blemish("train", "efficient_ad", CATEGORY).err
    assert "no penalty images; run `blemish penalty efficient_ad`" in refused
    (root / "data" / "demo_textures").mkdir()
    outcome = blemish("penalty", "efficient_ad")
    assert "holds no photos" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert (
        blemish("distill", "fapm").err
        == "error: distill.fapm: not in params.yaml; its distill section serves: efficient_ad\n"
    )


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
    """DVC's stage has its empty folder or files, and a teacher of earlier stays."""
    efficient_ad["penalty"] = {"efficient_ad": {"image_size": 128, "limit": 5}}
    efficient_ad["models"] = tiny_params()["models"]
    write_params(root, efficient_ad)
    for _ in range(2):
        outcome = blemish(verb, "efficient_ad")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out == f"{verb}.efficient_ad: not needed, since efficient_ad is not in models\n"
    folder = root / "pretrained" / "efficient_ad" / {"distill": "teacher"}.get(verb, verb)
    files = ["run.json", "teacher.safetensors"] if verb == "distill" else []
    assert sorted(path.name for path in folder.iterdir()) == files
    assert not any(path.stat().st_size for path in folder.iterdir())
    for name in files:
        (folder / name).write_text("earlier")
    assert blemish(verb, "efficient_ad").code == 0
    assert [(folder / name).read_text() for name in files] == ["earlier"] * len(files)
    checked = blemish("check").out.splitlines()
    assert f"{verb}.efficient_ad: not used, since efficient_ad is not in models" in checked
