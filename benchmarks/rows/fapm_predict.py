"""FAPM against PatchCore, a picture at a time: from a file of 1,024 pixels to a decision; and the search alone."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Contender, Loaded, Row
from benchmarks.rows.fapm_fit import RATIO, fapm, load, patchcore_model, weights_of
from benchmarks.rows.onnx_of_peer import session
from benchmarks.rows.project import GOOD, SIZE, exported_fapm, fapm_project, test_pictures

POSITIONS = (SIZE // 8) ** 2  # of a picture, in the finer map
PLACES = (
    "pictures of 256 pixels, backbone (EfficientNet-Lite0), layers, a memory of a tenth of 200 pictures, one thread"
)


def make(folder: Path) -> None:
    """The weights, and a picture as a network takes it."""
    import torch
    from safetensors.torch import save_file

    from pipelines.inference.detector import Detector

    root = fapm_project(folder)
    detector = Detector(exported_fapm(folder))
    picture = torch.from_numpy(detector.load(test_pictures(root)[0]).pixels).permute(0, 3, 1, 2).float() / 255
    save_file({**weights_of(fapm()), "picture": picture.contiguous()}, folder / "weights.safetensors")


def ours(folder: Path) -> Loaded:
    from pipelines.inference.detector import Detector

    root = fapm_project(folder)
    detector, files = Detector(exported_fapm(folder), threads=1), cycle(test_pictures(root))

    def act() -> None:
        _, scores = detector(detector.load(next(files)))
        detector.card.decision(float(scores[0]))

    return Loaded({}, act)


def patchcore(folder: Path) -> tuple[Any, Any]:
    """With a memory of so many vectors, and what it is given; which vectors they are changes no time."""
    import torch

    weights = load(folder / "weights.safetensors")
    mean, std, picture = (weights.pop(name) for name in ("mean", "std", "picture"))
    model = patchcore_model(weights)
    model.eval()
    model.memory_bank = torch.randn(int(RATIO * GOOD * POSITIONS), 152, generator=torch.Generator().manual_seed(0))
    return model, lambda pixels=picture: (pixels - mean) / std


def in_torch(folder: Path) -> Loaded:
    import torch

    model, normalised = patchcore(folder)
    return Loaded({}, from_file(folder, lambda pixels: model(normalised(torch.from_numpy(pixels))).pred_score))


def in_onnx(folder: Path) -> Loaded:
    import torch

    model, normalised = patchcore(folder)
    run = session(model, normalised(), folder / "patchcore.onnx")
    return Loaded({}, from_file(folder, lambda pixels: run(normalised(torch.from_numpy(pixels)).numpy())[1]))


def from_file(folder: Path, score: Callable[[np.ndarray], Any]) -> Callable[[], object]:
    """As anomalib reads a picture: Pillow, and torchvision's antialiased resizing of floats."""
    import torch
    from anomalib.data.utils import read_image
    from torchvision.transforms.v2 import Resize

    files, resize = cycle(test_pictures(fapm_project(folder))), Resize((SIZE, SIZE), antialias=True)

    def act() -> bool:
        with torch.no_grad():
            pixels = resize(read_image(next(files), as_tensor=True))[None]
            return float(np.asarray(score(pixels.numpy())).max()) > 0.0

    return act


def our_search(folder: Path) -> Loaded:
    """In torch on both sides, without the backbone."""
    import torch

    model = fapm(SIZE)
    vectors = load(fapm_project(folder) / "models" / "fapm" / "part" / "seed0.trained" / "model.safetensors")
    model.load_state_dict(vectors, strict=False)
    maps = model.features(load(folder / "weights.safetensors")["picture"])

    def act() -> Any:
        with torch.no_grad():
            return model.distances(maps)

    return Loaded({}, act)


def their_search(folder: Path) -> Loaded:
    import torch

    model, _ = patchcore(folder)
    queries = torch.randn(POSITIONS, 152, generator=torch.Generator().manual_seed(1))

    def act() -> Any:
        with torch.no_grad():
            return model.nearest_neighbors(queries, 1)

    return Loaded({}, act)


ROW = Row(
    title="FAPM, batch 1, from a file to a decision",
    brief="FAPM from a file to a decision",
    contenders={
        "exported": Contender(ours),
        "anomalib's PatchCore in torch": Contender(in_torch, is_peer=True),
        "its ONNX": Contender(in_onnx, is_peer=True),
    },
    equal=f"files, {PLACES}",
    target={"anomalib's PatchCore in torch": 2, "its ONNX": 2},
    make=make,
)
SEARCH = Row(
    title="the search for the nearest alone, in torch",
    contenders={"FAPM": Contender(our_search), "anomalib's PatchCore": Contender(their_search, is_peer=True)},
    equal=f"{PLACES}; so many positions",
    target={"anomalib's PatchCore": 20},
    make=make,
    missed="It was 10 before FAPM looked for the nearest alone where its score needs no others. Half of what is left "
    "is the matrix product, a third the search in its result, which torch does number by number.",
)
