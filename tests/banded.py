"""What of an overlay is the picture, and neither the band below it nor the strip beside it."""

import numpy as np
from PIL import Image


def picture_size(overlay: Image.Image) -> tuple[int, int]:
    """Its width and height, if the picture has no pixel of the band's colour."""
    pixels = np.asarray(overlay)
    is_picture = (pixels != pixels[-1, -1]).any(axis=2)
    return int(is_picture[0].sum()), int(is_picture[:, 0].sum())
