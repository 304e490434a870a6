"""The verdict below an overlay, in words: in a band of its own, so that no pixel of the part is covered.

It stands below and not above, so that a place in the overlay is the same place in the picture.
"""

import math

from PIL import Image, ImageDraw, ImageFont

from pipelines.inference.card import Disposition
from pipelines.pictures.overlays import Pixels

# Okabe and Ito's, darkened so that white can be read on it; the words say the same.
_GROUND: dict[Disposition, tuple[int, int, int]] = {
    "accept": (0, 114, 178),
    "review": (128, 96, 0),
    "reject": (192, 79, 0),
}
_SAID: dict[Disposition, str] = {"accept": "GOOD", "review": "DEFECT: REVIEW", "reject": "DEFECT"}
_INK = (255, 255, 255)
_SMALLEST = 12  # px, of letters that can be read
_LETTERS = 18  # heights of a letter in a line, roughly: a picture is to be as wide
_PART = 25  # of a picture's side, likewise
_ROWS = 512


def marked(overlay: Pixels, disposition: Disposition, words: str) -> Image.Image:
    """(H, W, 3) with a band below it that says the disposition, and `words` in a second line.

    The band is higher on a larger picture. A picture that is narrower than the words gets an empty strip to its right.
    """
    height, width = overlay.shape[:2]
    size = max(_SMALLEST, round(min(math.sqrt(width * height) / _PART, width / _LETTERS)))
    lines = [(_SAID[disposition], ImageFont.load_default(1.4 * size)), (words, ImageFont.load_default(size))]
    margin = size // 2
    needed = round(max(font.getlength(text) for text, font in lines)) + 2 * margin
    canvas = Image.new("RGB", (max(width, needed), height + 3 * size + 2 * margin), _GROUND[disposition])
    for top in range(0, height, _ROWS):  # a large picture would be in memory twice
        canvas.paste(Image.fromarray(overlay[top : top + _ROWS]), (0, top))
    draw = ImageDraw.Draw(canvas)
    for (text, font), top in zip(lines, (margin, margin + 1.75 * size), strict=True):
        draw.text((margin, height + top), text, fill=_INK, font=font)
    return canvas
