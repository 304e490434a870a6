"""The teacher learns what PatchCore would say of a photo; a killed run ends with the same bits."""

import hashlib
import io
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from filelock import FileLock
from made_up import distill_settings
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from anomaly_models.base import Progress
from anomaly_models.common.imagenet import grey
from anomaly_models.common.scoring import resize_map
from anomaly_models.common.sizes import Size
from anomaly_models.efficient_ad import patch_description_network
from pipelines.errors import DatasetError, StageError, WeightsError
from pipelines.files import read_json
from pipelines.paths import Project
from pipelines.preparation.photos import PhotoArrays, decode_once
from pipelines.sources.catalogue import SOURCES
from pipelines.teachers import distill as module
from pipelines.teachers.config import DistillConfig, PublishedTeacherConfig
from pipelines.teachers.distill import (
    DescribedPhotos,
    Distillation,
    PatchDescriptions,
    TeacherRecord,
    describing_backbone,
    distill,
    fetch_published,
    pooling_kernels,
)
from pipelines.tracking.store import tracking_uri
from pipelines.training import loop
from pipelines.training.weights import pretrained_backbone

CPU = torch.device("cpu")
SIZE = 64
CONFIG = DistillConfig.model_validate(distill_settings(steps=8, batch_size=3))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        photo = Image.fromarray(blocks).resize((90, 80), Image.Resampling.NEAREST)
        photo.save(root / "photos" / f"{number}.png")
    return Project(root)


@pytest.fixture(scope="module")
def arrays(project: Project, tmp_path_factory: pytest.TempPathFactory) -> PhotoArrays:
    folder = tmp_path_factory.mktemp("arrays") / "photos"
    return decode_once(
        [project.root / "photos"], [Size.square(SIZE), Size.square(2 * SIZE)], folder, quiet(), "decoding"
    )


@pytest.fixture(scope="module")
def descriptions() -> PatchDescriptions:
    return PatchDescriptions(pretrained_backbone(CONFIG.backbone), 128)


# --- descriptions


def as_patchcore(maps: list[Tensor], channels: int) -> Tensor:
    """Neighbourhoods, resized, pooled to 1,024 numbers per stage and then to `channels`, one step after the other."""
    side = maps[0].shape[-1]
    stages = []
    for features in maps:
        neighbourhoods = F.unfold(features, 3, padding=1)  # (B, C * 9, H * W), channel by channel
        grids = rearrange(neighbourhoods, "b i (h w) -> b i h w", h=features.shape[-2])
        resized = F.interpolate(grids, (side, side), mode="bilinear", align_corners=False)
        vectors = rearrange(resized, "b i h w -> (b h w) 1 i")
        stages.append(F.adaptive_avg_pool1d(vectors, 1024))
    pooled = F.adaptive_avg_pool1d(torch.cat(stages, dim=2), channels)
    return rearrange(pooled, "(b h w) 1 c -> b c h w", h=side, w=side)


@pytest.mark.parametrize("channels", [128, 384])
def test_descriptions_are_those_of_patchcore(channels: int) -> None:
    describe = PatchDescriptions(pretrained_backbone(CONFIG.backbone), channels)
    image = torch.rand(2, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(0))
    described = describe(image)
    assert described.shape == (2, channels, SIZE // 4, SIZE // 4)
    torch.testing.assert_close(described, as_patchcore(describe.backbone(image), channels), rtol=1e-4, atol=1e-5)


def test_pooling_averages_and_keeps_stages_apart() -> None:
    first, second = pooling_kernels([512, 1024], 384)
    assert first.shape == (384, 512, 3, 3)
    torch.testing.assert_close((first.sum((1, 2, 3)) + second.sum((1, 2, 3))), torch.ones(384))
    assert not first[192:].any()
    assert not second[:192].any()
    # output 0 averages all nine taps of the first three channels, here of 4608 numbers pooled to 1024 and then to 384
    assert first[0, :3].all()
    assert not first[0, 3:].any()


def test_a_backbone_that_begins_at_another_stride_is_refused() -> None:
    backbone = CONFIG.backbone.model_copy(update={"layers": (1, 2)})
    with pytest.raises(WeightsError, match=r"layers \[1, 2\] begin at stride 4; distillation needs 8"):
        PatchDescriptions(pretrained_backbone(backbone), 128)


@pytest.mark.parametrize(
    ("name", "seen", "side"), [("vit_tiny_patch16_224", 128, 8), ("vit_small_patch14_reg4_dinov2", 126, 9)]
)
def test_blocks_of_a_transformer_describe_on_the_networks_grid(name: str, seen: int, side: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    values = {"name": name, "weights": str(tmp_path / "weights.pth"), "layers": (0, 1)}
    config = CONFIG.model_copy(update={"backbone": CONFIG.backbone.model_copy(update=values)})
    describe = PatchDescriptions(describing_backbone(config), 128)
    image = torch.rand(2, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(0))
    maps = describe.backbone(resize_map(image, Size.square(seen)))
    assert [tuple(features.shape[2:]) for features in maps] == [(side, side)] * 2
    on_the_grid = F.interpolate(as_patchcore(maps, 128), (SIZE // 4, SIZE // 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(describe(image), on_the_grid, rtol=1e-4, atol=1e-5)


def test_a_transformer_without_such_blocks_is_refused() -> None:
    backbone = CONFIG.backbone.model_copy(update={"name": "test_vit", "layers": (6,)})
    with pytest.raises(WeightsError, match=r"backbone test_vit: it has blocks 0 to 5, found layers \[6\]"):
        describing_backbone(CONFIG.model_copy(update={"backbone": backbone}))


def test_a_description_is_the_same_remembered_or_not(arrays, descriptions, monkeypatch) -> None:
    remembering = DescribedPhotos(arrays, SIZE, descriptions, seed=0)
    first = remembering.training_batch(0, 0, 4)
    again = remembering.training_batch(0, 0, 4)
    monkeypatch.setattr(module, "MEMORY_BYTES", 128 * 16 * 16 * 2 * 3)  # room for three photos
    forgetful = DescribedPhotos(arrays, SIZE, descriptions, seed=0)
    others = [forgetful.training_batch(0, step, 4) for step in (3, 2, 0)][-1]
    for batch in (again, others):
        assert torch.equal(batch.image, first.image)
        assert torch.equal(batch.description, first.description)


def test_a_photo_is_grey_for_both_networks_or_for_none(arrays, descriptions, monkeypatch) -> None:
    monkeypatch.setattr(module, "GREY_PROBABILITY", 0.5)
    stream = DescribedPhotos(arrays, SIZE, descriptions, seed=0)
    rows = list(range(len(stream)))
    colour = torch.from_numpy(np.load(arrays.file(Size.square(2 * SIZE)))).permute(0, 3, 1, 2) / 255
    batch = stream.training_batch(0, 0, len(rows))
    is_grey = (batch.image == batch.image[:, :1]).flatten(1).all(1)
    assert 0 < int(is_grey.sum()) < len(rows)
    order = module.stream_rows(len(rows), (0,), 0, len(rows))
    for place, row in enumerate(order):
        seen = colour[row : row + 1]
        seen = grey(seen).expand_as(seen) if is_grey[place] else seen
        torch.testing.assert_close(batch.description[place], descriptions(seen)[0], rtol=1e-3, atol=2e-3)


# --- learning


def test_bf16_is_close_and_leaves_the_loss_in_float32(arrays, descriptions) -> None:
    batch = DescribedPhotos(arrays, SIZE, descriptions, seed=0).training_batch(0, 0, 4)
    progress = Progress(0, 1, torch.Generator())
    losses, gradients = [], []
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        distillation = Distillation("tiny", precision)
        (loss,) = next(distillation.losses(batch, progress)).values()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(distillation.network[0].weight.grad)
    assert losses[1].dtype == gradients[1].dtype == torch.float32
    assert losses[1] != losses[0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    assert F.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.99


# --- the run


def make_teacher(project: Project, name: str, config: DistillConfig = CONFIG) -> None:
    distill(name, config, project.root / "photos", "test", project, CPU, quiet())


def forget_teachers(project: Project) -> None:
    """Which would be taken over."""
    shutil.rmtree(project.inputs("any").parent, ignore_errors=True)


def teacher_of(project: Project, name: str) -> dict[str, Tensor]:
    return load_file(project.input_of(name, "teacher") / "teacher.safetensors")


def losses_of(project: Project, run_id: str, name: str) -> list[float]:
    client = mlflow.MlflowClient(tracking_uri(project.root))
    return [metric.value for metric in client.get_metric_history(run_id, f"loss.{name}")]


def test_a_teacher_is_made_and_its_loss_falls(project: Project) -> None:
    config = CONFIG.model_copy(update={"steps": 30})
    make_teacher(project, "efficient_ad", config)
    folder = project.input_of("efficient_ad", "teacher")
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "teacher.safetensors"]
    patch_description_network("tiny").load_state_dict(teacher_of(project, "efficient_ad"))
    record = TeacherRecord.load(folder / "run.json", "distil again")
    assert record.settings["distill"]["efficient_ad"]["steps"] == 30
    assert record.settings["data"]["photos"] == 10
    losses = losses_of(project, record.run_id, "distillation")
    assert len(losses) == 30
    assert losses[0] == pytest.approx(1.0, abs=0.3)  # the targets have variance 1
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    run = mlflow.MlflowClient(tracking_uri(project.root)).get_run(record.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["distill.efficient_ad.backbone.weights"] == "package"
    assert not project.work("distill", "efficient_ad").exists()


def test_a_transformer_teaches(project: Project, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    values = {"name": "test_vit", "weights": str(tmp_path / "weights.pth"), "layers": (1, 3, 5), "combine": "mean"}
    make_teacher(project, "vit", CONFIG.model_copy(update={"backbone": CONFIG.backbone.model_copy(update=values)}))
    assert all(value.isfinite().all() for value in teacher_of(project, "vit").values())


def test_a_teacher_of_the_same_settings_is_taken_over(project: Project, monkeypatch) -> None:
    forget_teachers(project)
    make_teacher(project, "efficient_ad")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fit", None)  # would fail: nothing is learnt
        make_teacher(project, "wide")
    first, second = teacher_of(project, "efficient_ad"), teacher_of(project, "wide")
    assert all(first[name].equal(second[name]) for name in first)
    record = TeacherRecord.load(project.input_of("wide", "teacher") / "run.json", "distil again")
    assert record.model == "efficient_ad"  # whose run it is
    assert not project.work("distill", "wide").exists()
    make_teacher(project, "another", CONFIG.model_copy(update={"seed": 1}))
    assert read_json(project.input_of("another", "teacher") / "run.json")["run_id"] != record.run_id


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(project: Project, monkeypatch) -> None:
    forget_teachers(project)
    make_teacher(project, "whole")
    whole = teacher_of(project, "whole")
    forget_teachers(project)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step
    with monkeypatch.context() as patch:
        original = DescribedPhotos.training_batch

        def killed_at_5(self: DescribedPhotos, seed: int, step: int, batch_size: int) -> object:
            if step == 5:
                raise KeyboardInterrupt
            return original(self, seed, step, batch_size)

        patch.setattr(DescribedPhotos, "training_batch", killed_at_5)
        with pytest.raises(KeyboardInterrupt):
            make_teacher(project, "killed")
    assert not project.input_of("killed", "teacher").exists()
    (run_file,) = project.work("distill", "killed").glob("*/run.json")
    run_id = read_json(run_file)["run_id"]

    with monkeypatch.context() as patch:
        patch.setattr(module.Distillation, "learn_statistics", None)  # would fail: they are in the checkpoint
        make_teacher(project, "killed")
    assert read_json(project.input_of("killed", "teacher") / "run.json")["run_id"] == run_id
    assert len(losses_of(project, run_id, "distillation")) == CONFIG.steps
    resumed = teacher_of(project, "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_other_settings_start_afresh(project: Project, monkeypatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "atomic_folder", None)  # fails when the last step is taken
        with pytest.raises(TypeError):
            make_teacher(project, "changed")
    config = CONFIG.model_copy(update={"steps": 1, "seed": 1})
    forget_teachers(project)
    make_teacher(project, "changed", config)
    changed = teacher_of(project, "changed")
    forget_teachers(project)
    make_teacher(project, "fresh", config)
    fresh = teacher_of(project, "fresh")
    assert all(torch.equal(changed[name], fresh[name]) for name in fresh)


# --- refusals


def test_an_empty_folder_of_photos_is_one_line(project: Project, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"^[^\n]*: holds no photos, at any depth; [^\n]*$"):
        distill("empty", CONFIG, tmp_path, "test", project, CPU, quiet())


def test_a_second_process_is_kept_out(project: Project) -> None:
    work = project.work("distill", "busy")
    work.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(work.parent / ".busy.lock"),
        pytest.raises(StageError, match="teacher of busy: another process is training this"),
    ):
        make_teacher(project, "busy")


def test_a_missing_backbone_is_one_line(project: Project) -> None:
    backbone = CONFIG.backbone.model_copy(update={"weights": "absent.pth"})
    with pytest.raises(WeightsError, match=r"^[^\n]*absent\.pth: no such file[^\n]*$"):
        make_teacher(project, "unweighted", CONFIG.model_copy(update={"backbone": backbone}))


def test_settings_have_no_defaults_and_no_strangers() -> None:
    values = CONFIG.model_dump()
    changes = [("image_size", 100), ("image_size", 32), ("steps", 0), ("width", "large"), ("precision", "fp16")]
    for name, value in [*changes, ("grey", 0.1)]:
        with pytest.raises(ValidationError):
            DistillConfig.model_validate(values | {name: value})
    for name in values:
        with pytest.raises(ValidationError, match=name):
            DistillConfig.model_validate({key: value for key, value in values.items() if key != name})


# --- the published teacher


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
    fetch_published("efficient_ad", config, project, quiet())
    state = load_file(project.input_of("efficient_ad", "teacher") / "teacher.safetensors")
    patch_description_network("small").load_state_dict(state)
    assert torch.equal(state["conv1.weight"], torch.load(tmp_path / "teacher.pth")["conv1.weight"])


def test_a_published_teacher_of_another_shape_is_refused(tmp_path, monkeypatch):
    config = published(tmp_path, monkeypatch, "tiny")
    with pytest.raises(WeightsError, match=r"pretrained_teacher_small.pth: .*size mismatch"):
        fetch_published("efficient_ad", config, Project(tmp_path), quiet())
    assert not Project(tmp_path).input_of("efficient_ad", "teacher").exists()
