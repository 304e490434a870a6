from pathlib import Path

import numpy as np

from pipelines.evaluation.outcomes import PixelCounts


def test_pixels_survive_the_file(tmp_path: Path) -> None:
    kept = PixelCounts(np.eye(3, dtype=np.int32), np.ones((3, 3), np.int32), np.full((3, 3), 0.25, np.float32))
    kept.save(tmp_path / "pixels.npz")
    read = PixelCounts.load(tmp_path / "pixels.npz").of([2, 0])
    assert (read.normal == [[0, 0, 1], [1, 0, 0]]).all()
    assert read.regions.dtype == np.float32
