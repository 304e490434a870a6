"""A student learns a teacher's maps and becomes a file that the package can embed."""

import io
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines.errors import DatasetError, ParamsError, WeightsError
from pipelines.paths import Project
from pipelines.preparation.photos import PhotoArrays, decode_once
from pipelines.teachers import pretrain as module
from pipelines.teachers.pretrain import Crops, PretrainConfig, load_config, pretrain, warmup_cosine
from pipelines.tracking.store import tracking_uri
from pipelines.training import loop, weights
from pipelines.training.weights import EMBEDDED, pretrained_backbone

CPU = torch.device("cpu")
VALUES = {
    "student": "resnet18",
    "teacher": {"name": "resnet18.tv_in1k", "weights": "embedded", "layers": [1, 2, 3], "combine": "separate"},
    "photos": ["photos", "textures"],
    "image_size": 48,
    "crop": 32,
    "min_crop": 24,
    "batch_size": 4,
    "steps": 6,
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "seed": 0,
}
CONFIG = PretrainConfig.model_validate(VALUES)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATISTICS_BATCHES", 2)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for number in range(6):
        path = root / ("photos" if number % 2 else "textures") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((60, 50), Image.Resampling.BILINEAR).save(path)
    return Project(root)


@pytest.fixture(scope="module")
def arrays(project: Project, tmp_path_factory: pytest.TempPathFactory) -> PhotoArrays:
    folders = [project.root / name for name in CONFIG.photos]
    return decode_once(folders, [48], tmp_path_factory.mktemp("arrays") / "photos", quiet(), "decoding")


# --- crops and schedule


def test_crops_are_a_function_of_seed_and_step(arrays: PhotoArrays) -> None:
    crops = Crops(arrays, CONFIG, CPU)
    batch = crops.training_batch(0, 3, 5)
    assert batch.shape == (5, 3, 32, 32)
    assert 0 <= float(batch.min()) < float(batch.max()) <= 1
    assert torch.equal(batch, Crops(arrays, CONFIG, CPU).training_batch(0, 3, 5))
    assert not torch.equal(batch, crops.training_batch(0, 4, 5))
    assert not torch.equal(batch, crops.training_batch(1, 3, 5))


def test_a_crop_of_the_whole_is_the_photo_or_its_mirror_image_in_colour_or_grey(arrays: PhotoArrays) -> None:
    config = CONFIG.model_copy(update={"crop": 48, "min_crop": 48})
    crops = torch.cat([Crops(arrays, config, CPU).training_batch(0, step, 6) for step in range(40)])
    photos = torch.from_numpy(np.load(arrays.file(48))).permute(0, 3, 1, 2) / 255
    known = torch.cat([photos, photos.flip(-1)])
    is_grey = (crops == crops[:, :1]).flatten(1).all(1)
    assert 0.1 < float(is_grey.float().mean()) < 0.3
    nearest = torch.cdist(crops[~is_grey].flatten(1), known.flatten(1), 1.0).min(dim=1)
    assert float(nearest.values.max()) == 0
    mirrored = float((nearest.indices >= len(photos)).float().mean())
    assert 0.4 < mirrored < 0.6


def test_crops_come_in_every_size(arrays: PhotoArrays, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    original = torch.nn.functional.interpolate

    def observed(image: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        sides.append(image.shape[-1])
        return original(image, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module.F, "interpolate", observed)
    Crops(arrays, CONFIG, CPU).training_batch(0, 0, 300)
    assert min(sides) == 24
    assert max(sides) == 48


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    assert [warmup_cosine(step, 4, 12) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert warmup_cosine(8, 4, 12) == pytest.approx(0.5)
    assert warmup_cosine(12, 4, 12) == pytest.approx(0.0)
    assert warmup_cosine(0, 0, 12) == 1.0


# --- the run


def test_the_file_can_be_embedded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    output = project.root / "made" / "student.safetensors"
    pretrain(CONFIG, output, project, CPU, quiet())
    shipped, made = load_file(EMBEDDED), load_file(output)
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in shipped.items()}
    assert {value.dtype for value in made.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in made.values())
    with safe_open(EMBEDDED, "pt") as first, safe_open(output, "pt") as second:
        assert second.metadata().keys() == first.metadata().keys()
        for name in ("architecture", "mean", "std"):
            assert second.metadata()[name] == first.metadata()[name]
        assert second.metadata()["made"].startswith(
            "feature distillation from resnet18.tv_in1k, layers [1, 2, 3], on 6"
        )
    monkeypatch.setattr(weights, "EMBEDDED", output)
    backbone = pretrained_backbone(CONFIG.teacher.model_copy(update={"layers": (2, 3)}))
    assert torch.equal(backbone.pyramid.state_dict()["conv1.weight"], made["conv1.weight"].float())
    assert not project.work("pretrain", "student").exists()


def test_the_losses_fall(project: Project) -> None:
    config = CONFIG.model_copy(update={"steps": 30, "batch_size": 6})
    pretrain(config, project.root / "falling.safetensors", project, CPU, quiet())
    client = mlflow.MlflowClient(tracking_uri(project.root))
    experiment = client.get_experiment_by_name("pretrain")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'pretrain-falling'")
    assert run.info.status == "FINISHED"
    assert run.data.params["data.photos"] == "6"
    for layer in (1, 2, 3):
        losses = [metric.value for metric in client.get_metric_history(run.info.run_id, f"loss.layer{layer}")]
        assert len(losses) == 30
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = (project.root / f"{name}.safetensors" for name in ("whole", "killed"))
    pretrain(CONFIG, whole, project, CPU, quiet())
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step
    with monkeypatch.context() as patch:
        original = Crops.training_batch

        def killed_at_3(self: Crops, seed: int, step: int, batch_size: int) -> torch.Tensor:
            if seed == CONFIG.seed and step == 3:
                raise KeyboardInterrupt
            return original(self, seed, step, batch_size)

        patch.setattr(Crops, "training_batch", killed_at_3)
        with pytest.raises(KeyboardInterrupt):
            pretrain(CONFIG, killed, project, CPU, quiet())
    assert not killed.exists()
    pretrain(CONFIG, killed, project, CPU, quiet())
    first, second = load_file(whole), load_file(killed)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- refusals


def test_a_teacher_of_other_strides_is_one_line(project: Project) -> None:
    teacher = CONFIG.teacher.model_copy(update={"layers": (2, 3)})
    with pytest.raises(WeightsError, match=r"layers \[2, 3\] have strides \[8, 16\], those of resnet18 \[4, 8, 16\]"):
        pretrain(CONFIG.model_copy(update={"teacher": teacher}), project.root / "x.safetensors", project, CPU, quiet())


def test_an_empty_folder_is_one_line(project: Project, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"photos": ["photos", str(tmp_path)]})
    with pytest.raises(DatasetError, match=r"^[^\n]*: holds no photos[^\n]*$"):
        pretrain(config, project.root / "x.safetensors", project, CPU, quiet())


def test_settings_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    assert load_config(path) == CONFIG


def test_the_recipe_beside_the_embedded_weights_is_valid() -> None:
    assert load_config(EMBEDDED.parent / "pretrain.yaml").steps == 5880


def test_every_problem_of_the_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    values = {**VALUES, "steps": 0, "photos": [], "crops": 3}
    del values["seed"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ParamsError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 4 problems"
    assert sorted(line.split()[0].rstrip(":") for line in lines[1:]) == ["crops", "photos", "seed", "steps"]
    for change, message in (
        ({"min_crop": 50}, "min_crop 50 is larger than image_size 48"),
        ({"warmup_steps": 6}, "warmup_steps 6 leave nothing of 6 steps"),
        ({"student": "resnet19"}, "timm has no model 'resnet19'"),
        ({"student": "test_vit"}, "student test_vit is a vision transformer; take a convolutional network"),
    ):
        path.write_text(yaml.safe_dump({**VALUES, **change}))
        with pytest.raises(ParamsError, match=message):
            load_config(path)
