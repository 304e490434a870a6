"""The data of one training epoch: 200 photographs of 1,024 pixels, seen at 256."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import Contender, Loaded, Row
from benchmarks.rows.project import GOOD, SIZE, fapm_project

BATCH = 25


def make(folder: Path) -> None:
    fapm_project(folder)


def ours(folder: Path) -> Loaded:
    import torch

    from anomaly_models.common.sizes import Size
    from pipelines.data.batches import PreparedData
    from pipelines.pictures.frames import Frame

    prepared = fapm_project(folder) / "data" / "prepared" / "part"
    data = PreparedData(prepared, Frame(Size(SIZE, SIZE), "bilinear", "stretch"), torch.device("cpu"))

    def act() -> Any:
        return torch.cat([data.training_batch(0, step, BATCH).image for step in range(GOOD // BATCH)])

    return Loaded(figures(act()), act)


def anomalib(workers: int) -> Callable[[Path], Loaded]:
    def load(folder: Path) -> Loaded:
        import torch
        from anomalib.data import Folder
        from torchvision.transforms.v2 import Resize

        data = Folder(
            "part",
            root=fapm_project(folder) / "images" / "part" / "train",
            normal_dir="good",
            train_batch_size=BATCH,
            num_workers=workers,
            augmentations=Resize((SIZE, SIZE), antialias=True),
            test_split_mode="none",
            val_split_mode="none",
        )
        data.prepare_data()
        data.setup()

        def act() -> Any:
            return torch.cat([batch.image for batch in data.train_dataloader()])

        return Loaded(figures(act()), act)

    return load


def figures(images: Any) -> dict[str, Any]:
    return {"shape": list(images.shape), "mean": float(images.mean())}


ROW = Row(
    title="data of one training epoch: 200 PNGs of 1,024 pixels, 256 out",
    brief="an epoch of data",
    contenders={
        "prepared arrays": Contender(ours),
        "anomalib, no worker": Contender(anomalib(0), is_peer=True),
        "anomalib, 2 workers": Contender(anomalib(2), is_peer=True),
    },
    equal="files, size, filter, batches of 25 as float32; the mean of all pixels to 0.005",
    target={"anomalib, no worker": 20, "anomalib, 2 workers": 20},
    make=make,
    warmed=False,
    tolerance={"shape": 0, "mean": 0.005},
    missed="Ours takes some tenths of a second, which a neighbour's load changes more than their seconds.",
)
