"""Small folders of images in the known layouts, prepared or refused."""

import numpy as np
import pytest
from PIL import Image

from anomaly_models.common.sizes import Size
from pipelines.errors import DatasetError
from pipelines.pictures.frames import Frame
from pipelines.preparation.config import AnomalousTrainConfig, PrepareConfig
from pipelines.preparation.prepare import prepare

CONFIG = PrepareConfig(
    layout="auto",
    black_level=0,
    white_level=65535,
    above_white="refuse",
    page=None,
    dicom_window="file",
    max_megapixels=90,
    holdout=0.2,
    test_normal=0.2,
    groups=None,
    anomalous_train=AnomalousTrainConfig(count=0, protocol="spread"),
    regions={},
    surfaces=[],
    seed=0,
)
FRAMES = {
    "bgad": Frame(Size.square(16), "bilinear", "stretch"),
    "fapm": Frame(Size.square(8), "bilinear", "stretch"),
    "adfa": Frame(Size.square(8), "lanczos", "stretch"),
}
WIDTH, HEIGHT = 30, 20


def write_image(path, seed, width=WIDTH, height=HEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def write_mask(path, box=(4, 4, 12, 12), width=WIDTH, height=HEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("1", (width, height))
    mask.paste(1, box)
    mask.save(path)


def draw_mvtec(root):
    """10 training images; 2 good, 2 cracked and 1 bent to test on."""
    for number in range(10):
        write_image(root / f"train/good/{number:03}.png", number)
    for number in range(2):
        write_image(root / f"test/good/{number:03}.png", 100 + number)
        write_image(root / f"test/crack/{number:03}.jpg", 200 + number)
        write_mask(root / f"ground_truth/crack/{number:03}_mask.png")
    write_image(root / "test/bent/000.png", 300)
    write_mask(root / "ground_truth/bent/000.png")
    for name in ("license.txt", "train/good/readme.txt", "train/good/.DS_Store", "test/crack/Thumbs.db"):
        (root / name).write_text("not an image")
    return root


def draw_plain(root):
    """10 normal images, 3 abnormal of which one in a folder of its defect type."""
    for number in range(10):
        write_image(root / f"normal/{number:03}.png", number)
    for number in range(2):
        write_image(root / f"abnormal/{number:03}.png", 200 + number)
        write_mask(root / f"masks/{number:03}.png")
    write_image(root / "abnormal/dent/000.bmp", 300)
    write_mask(root / "masks/dent/000_mask.png")
    return root


def made(root, config=CONFIG, destination=None, frames=FRAMES):
    destination = destination or root.parent / "prepared" / root.name
    return prepare(root, root.name, config, frames, destination, lambda done, total: None)


def run(root, config=CONFIG, destination=None):
    """The index alone."""
    return made(root, config, destination).index


def problem(root, config=CONFIG, kind=DatasetError):
    destination = root.parent / "prepared" / root.name
    with pytest.raises(kind) as caught:
        run(root, config)
    assert type(caught.value) is kind
    assert not destination.exists()
    assert not any(destination.parent.glob(".*")), "a temporary folder was left behind"
    return str(caught.value)


def paths_of(index, split):
    return [image.path for image in index.images if image.split == split]


def masks_of(image):
    return [mask.path for mask in image.masks]
