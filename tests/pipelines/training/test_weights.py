import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from drawn_batches import perturbed
from safetensors.torch import save, save_file
from torch import Tensor, nn

from anomaly_models.common.backbones import Backbone, BackboneConfig
from anomaly_models.efficient_ad import EfficientAD, EfficientADConfig, Width, patch_description_network
from pipelines.errors import WeightsError
from pipelines.training.weights import (
    load_pretrained,
    load_teacher_into,
    pretrained_backbone,
    read_state_dict,
)

HUB_FILE = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"


def backbone(weights: str | Path, name: str = "test_resnet.r160_in1k", layers: tuple[int, ...] = (1, 2)) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(name=name, weights=str(weights), layers=layers, combine="separate"))


def full_classifier(name: str = "test_resnet") -> dict[str, Tensor]:
    torch.manual_seed(1)
    state: dict[str, Tensor] = timm.create_model(name, pretrained=False).state_dict()
    return state


def assert_loaded(loaded: Backbone, state: dict[str, Tensor]) -> None:
    own = {name: value for name, value in loaded.pyramid.state_dict().items() if "num_batches" not in name}
    assert own
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in own.items())


# Models


def test_every_backbone_of_a_model_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "whole.pth"
    torch.save(full_classifier(), path)
    model = nn.ModuleDict({"a": backbone(path), "b": nn.Sequential(nn.Conv2d(3, 3, 1)), "c": backbone(path)})
    untouched = model["b"].state_dict()["0.weight"].clone()
    load_pretrained(model)
    for name in "ac":
        filled = model[name]
        assert isinstance(filled, Backbone)
        assert_loaded(filled, full_classifier())
    assert torch.equal(model["b"].state_dict()["0.weight"], untouched)


# Files


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_whole_classifier_is_accepted(tmp_path: Path, suffix: str) -> None:
    state, path = full_classifier(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = backbone(path)
    load_pretrained(loaded)
    assert_loaded(loaded, state)


def test_names_that_timm_flattens_are_found(tmp_path: Path) -> None:
    path, whole = tmp_path / "convnext.pth", timm.create_model("test_convnext", pretrained=False).eval()
    torch.save(whole.state_dict(), path)
    loaded = backbone(path, "test_convnext", (1, 2))
    load_pretrained(loaded)
    image = torch.rand(1, 3, 64, 64)
    normalised = (image - loaded.mean) / loaded.std
    expected = whole.forward_intermediates(normalised, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded(image), expected, strict=True))


# Vision transformers, which are cut and whose positions have a grid


TRANSFORMERS = {  # names, and a side that is not the one of the file
    "test_vit.r160_in1k": 96,
    "test_vit2.r160_in1k": 208,
    "vit_tiny_patch16_224": 80,
    "eva02_tiny_patch14_224": 84,
    "vit_small_patch16_dinov3.lvd1689m": 80,
}


def transformer(weights: str | Path, name: str, side: int) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig(name=name, weights=str(weights), layers=(0, 1), combine="separate")
    return Backbone(config, side)


def whole_transformer(name: str, **changes: object) -> Any:
    """At the size of its weights, and able to take others by itself, as timm does it."""
    torch.manual_seed(1)
    return perturbed(timm.create_model(name, dynamic_img_size=True, **changes).eval())


@torch.no_grad()
def assert_same_maps(loaded: Backbone, whole: Any, side: int) -> None:
    image = torch.rand(2, 3, side, side)
    normalised = (image - loaded.mean) / loaded.std
    expected = whole.forward_intermediates(normalised, indices=[0, 1], norm=True, intermediates_only=True)
    for features, tokens in zip(loaded(image), expected, strict=True):
        torch.testing.assert_close(features, tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "side"), TRANSFORMERS.items())
def test_positions_are_resampled_as_timm_does_it(tmp_path: Path, name: str, side: int) -> None:
    whole, path = whole_transformer(name), tmp_path / "transformer.safetensors"
    save_file(whole.state_dict(), path)
    loaded = transformer(path, name, side)
    load_pretrained(loaded)
    assert_same_maps(loaded, whole, side)


def test_positions_of_another_grid_than_the_published_are_resampled_once(tmp_path: Path) -> None:
    """From the file's grid to the image's, not by way of the grid that the network was published with."""
    whole = whole_transformer("test_vit", img_size=128)
    torch.save(whole.state_dict(), tmp_path / "other.pth")
    loaded = transformer(tmp_path / "other.pth", "test_vit", 96)
    load_pretrained(loaded)
    assert_same_maps(loaded, whole, 96)


def test_a_file_in_dinov2s_own_spelling_is_read(tmp_path: Path) -> None:
    """Registers have another name there, and the class token has a position."""
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    whole = whole_transformer(name, img_size=70)
    state = {key: value for key, value in whole.state_dict().items() if not re.match(r"blocks\.([2-9]|1\d)", key)}
    position = torch.rand_like(state["cls_token"])
    state["cls_token"] = state["cls_token"] - position[:, 0]
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    loaded = transformer(tmp_path / "dinov2_vits14_reg4_pretrain.pth", name, 56)
    load_pretrained(loaded)
    assert_same_maps(loaded, whole, 56)


@pytest.mark.parametrize("other", ["test_resnet", "test_vit3"])
def test_another_network_than_the_transformer_is_refused_in_one_line(tmp_path: Path, other: str) -> None:
    torch.save(full_classifier(other), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"^[^\n]*do not fit test_vit: [^\n]* and \d+ more$"):
        load_pretrained(transformer(tmp_path / "other.pth", "test_vit", 96))


def test_positions_that_are_no_square_are_refused_in_one_line(tmp_path: Path) -> None:
    state = full_classifier("test_vit")
    state["pos_embed"] = torch.zeros(1, 1 + 90, 64)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"^[^\n]*other\.pth do not fit test_vit: RuntimeError: shape [^\n]*$"):
        load_pretrained(transformer(tmp_path / "other.pth", "test_vit", 96))


def test_the_counter_that_old_checkpoints_lack_is_not_missed(tmp_path: Path) -> None:
    state = {name: value for name, value in full_classifier().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    load_pretrained(backbone(tmp_path / "old.pth"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth: no such file"):
        load_pretrained(backbone(tmp_path / "absent.pth"))


@pytest.mark.parametrize("name", ["junk.pth", "junk.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02cos\nsystem\n."])
def test_bytes_that_are_no_checkpoint_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: not a readable state dict") as caught:
        read_state_dict(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"), [({"state_dict": {}, "epoch": 3}, r"\['state_dict', 'epoch'\]"), ([1], "list"), ({}, r"\[\]")]
)
def test_other_checkpoints_are_refused(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=f"not a state dict .*found .*{found}"):
        read_state_dict(tmp_path / "other.pth")


def test_the_first_mismatches_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = full_classifier()
    state["conv1.0.weight"] = torch.zeros(7, 3, 3, 3)
    del state["bn1.bias"]
    torch.save(state, tmp_path / "other.pth")
    model = backbone(tmp_path / "other.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = r"conv1.0.weight: expected \(16, 3, 3, 3\), found \(7, 3, 3, 3\)"
    with pytest.raises(WeightsError, match=rf"{first}; bn1.bias: expected \(32,\), found none$"):
        load_pretrained(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_architecture_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(full_classifier("test_efficientnet"), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"do not fit test_resnet.* and \d+ more$"):
        load_pretrained(backbone(tmp_path / "other.pth"))


def test_a_backbone_outside_of_any_model(tmp_path: Path) -> None:
    torch.save(full_classifier(), tmp_path / "whole.pth")
    config = BackboneConfig(name="test_resnet", weights=str(tmp_path / "whole.pth"), layers=(2, 3), combine="separate")
    assert_loaded(pretrained_backbone(config), full_classifier())
    with pytest.raises(WeightsError, match=r"timm gives no features for layers \[2, 9\]"):
        pretrained_backbone(BackboneConfig(name="resnet18", weights="package", layers=(2, 9), combine="separate"))


# Teachers

REMEDY = "run `blemish distill efficient_ad`"


def student_of(width: Width) -> EfficientAD:
    torch.manual_seed(0)
    values = {
        "image_size": 256,
        "resize": "bilinear",
        "fit": "stretch",
        "tiles": None,
        "batch_size": 1,
        "width": width,
        "teacher": "file",
    }
    values |= {"steps": 1, "learning_rate": 1e-4}
    values |= {"weight_decay": 0.0, "hard_quantile": 0.999, "penalty_weight": 1.0, "precision": "float32"}
    return EfficientAD(
        EfficientADConfig.model_validate(values | {"overall_weight": 0.5, "quantile_low": 0.9, "quantile_high": 0.995})
    )


# A stand-in with the published shapes (paper, Tables 6 and 7), written down and not taken from our networks.
PUBLISHED: dict[Width, list[tuple[int, int, int]]] = {
    "small": [(128, 3, 4), (256, 128, 4), (256, 256, 3), (384, 256, 4)],
    "medium": [(256, 3, 4), (512, 256, 4), (512, 512, 1), (512, 512, 3), (384, 512, 4), (384, 384, 1)],
}
POSITIONS = (0, 3, 6, 8, 10, 12)  # of the convolutions, where all layers are numbered


def published(width: Width) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for number, (outputs, inputs, side) in enumerate(PUBLISHED[width], start=1):
        state[f"conv{number}.weight"] = torch.rand(outputs, inputs, side, side, generator=generator)
        state[f"conv{number}.bias"] = torch.rand(outputs, generator=generator)
    return state


@pytest.mark.parametrize("width", ["small", "medium"])
@pytest.mark.parametrize("spelling", ["named", "numbered"])
def test_published_teachers_are_read(tmp_path: Path, width: Width, spelling: str) -> None:
    state = published(width)
    numbered = {
        f"{POSITIONS[number]}.{kind}": state[f"conv{number + 1}.{kind}"]
        for number in range(len(PUBLISHED[width]))
        for kind in ("weight", "bias")
    }
    torch.save(state if spelling == "named" else numbered, tmp_path / f"pretrained_teacher_{width}.pth")
    model = student_of(width)
    load_teacher_into(model, tmp_path / f"pretrained_teacher_{width}.pth", REMEDY)
    own = model.teacher.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in state)


def test_a_distilled_teacher_is_read(tmp_path: Path) -> None:
    network = patch_description_network("tiny", padded=True)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    model = student_of("tiny")
    load_teacher_into(model, tmp_path / "teacher.safetensors", REMEDY)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in model.teacher.state_dict().items())


def test_a_teacher_of_another_width_is_one_line(tmp_path: Path) -> None:
    torch.save(published("medium"), tmp_path / "teacher.pth")
    message = r"^teacher [^\n]*teacher\.pth: the teacher's weights do not fit width small"
    with pytest.raises(WeightsError, match=message):
        load_teacher_into(student_of("small"), tmp_path / "teacher.pth", REMEDY)
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"^teacher [^\n]*other\.safetensors: [^\n]*$"):
        load_teacher_into(student_of("tiny"), tmp_path / "other.safetensors", REMEDY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r" [^\n]*teacher\.pth: no such file"),
        ({"epoch": 3, "model": {}}, r": weights [^\n]*teacher\.pth: not a state dict[^\n]*"),
    ],
)
def test_what_is_no_teacher_names_its_remedy(tmp_path: Path, content: object, message: str) -> None:
    if content:
        torch.save(content, tmp_path / "teacher.pth")
    with pytest.raises(WeightsError, match=f"^teacher{message}; {REMEDY}$"):
        load_teacher_into(student_of("tiny"), tmp_path / "teacher.pth", REMEDY)


# The hub


class StandInHub(ThreadingHTTPServer):
    """Serves one file as the hub does; `status` other than 200 makes it refuse."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.file = HUB_FILE
        self.content = b""
        self.status = 200
        self.requests: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub

    def do_HEAD(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        status = self.server.status if self.path == self.server.file else 404
        self.send_response(status)
        if status == 200:
            self.send_header("Content-Length", str(len(self.server.content)))
            self.send_header("ETag", f'"{hashlib.sha256(self.server.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name it has in the library)
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    server = StandInHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_hub_weights_are_downloaded_once(hub: StandInHub) -> None:
    state = full_classifier()
    hub.content = save(state)
    loaded = backbone("timm")
    load_pretrained(loaded)
    assert_loaded(loaded, state)
    asked = len(hub.requests)
    again = backbone("timm")
    load_pretrained(again)
    assert_loaded(again, state)
    assert len(hub.requests) == asked  # the cache is enough, so a machine that is cut off later still trains


def test_transformers_come_from_the_hub(hub: StandInHub) -> None:
    whole = whole_transformer("test_vit.r160_in1k")
    hub.file, hub.content = HUB_FILE.replace("test_resnet", "test_vit"), save(whole.state_dict())
    loaded = transformer("timm", "test_vit.r160_in1k", 96)
    load_pretrained(loaded)
    assert_same_maps(loaded, whole, 96)


def test_a_broken_transformer_of_the_hub_is_named(hub: StandInHub) -> None:
    hub.file, hub.content = HUB_FILE.replace("test_resnet", "test_vit"), b"not safetensors"
    with pytest.raises(WeightsError, match=r"model\.safetensors does not load .*; delete it"):
        load_pretrained(transformer("timm", "test_vit.r160_in1k", 96))


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_refusing_hub_is_one_line(hub: StandInHub, status: int) -> None:
    hub.status = status
    with pytest.raises(WeightsError, match=f"test_resnet.r160_in1k: the hub answers {status} .*weights: package"):
        load_pretrained(backbone("timm"))


def test_a_broken_file_of_the_hub_is_named(hub: StandInHub) -> None:
    hub.content = b"not safetensors"
    with pytest.raises(WeightsError, match=r"model\.safetensors does not load .*; delete it"):
        load_pretrained(backbone("timm"))


def test_an_unreachable_hub_fails_at_once_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        use_hub(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path / "cache")
        start = time.monotonic()
        message = r"the hub is unreachable .* \(weights: PATH\), or .* with weights: package$"
        with pytest.raises(WeightsError, match=message):
            load_pretrained(backbone("timm"))
    assert time.monotonic() - start < 5
