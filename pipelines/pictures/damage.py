"""Damage that Pillow's decoders forgive: a file half written, with a hole, or with the head of another.

They read on without a word, and what follows the damage is rubbish that looks like a part. So before a file is decoded:

    JPEG    libjpeg-turbo decodes it once more, at an eighth of its size, and each of its warnings is damage: data that
            run out, bytes left over, wrong codes, restart markers out of order, no end marker. What follows the end
            marker is allowed: cameras pad with zeros, and keep further frames there.
    PNG     every chunk's CRC must be right, the last being IEND.
    TIFF    each strip or tile: Deflate's checksum; JPEG as above.
    zeros   256 zero bytes in a row, where a sector was never written, mean nothing in JPEG's, TIFF's and WebP's
            compressed data, except in a JPEG whose tables give the code of zeros to "as before" (a flat picture).

What remains hidden: wrong bytes, not zeros, in uncompressed files (BMP, TIFF) and in WebP, LZW, PackBits, Zstandard and
fax codes, which have no checksum; zeros in uncompressed files, where they are black; in a JPEG, wrong bytes that happen
to decode to as many blocks as were there, one hole of 512 random bytes in about 200.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Sequence

from PIL import Image, TiffImagePlugin

try:
    import simplejpeg
except ModuleNotFoundError:  # a bundle does without: of a JPEG, it finds holes, and Pillow that it ends early
    simplejpeg = None

_HOLE = bytes(256)  # half a sector

_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # that ends a scan, or begins a segment with a length
_DHT, _EOI, _SOS = b"\xc4", b"\xd9", b"\xda"
_EOI_MARKER = b"\xff" + _EOI
_PADDING = 16  # bytes that may follow it in a strip, a tile or a DICOM's frame
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a frame's header, by its process
_AC = 16  # added to the number of a Huffman table for AC coefficients

_UNCOMPRESSED, _JPEG = 1, 7  # values of TIFF's tag Compression
_DEFLATE = {8, 32946}
_JPEG_TABLES = 347
_PLACES = ((273, 279), (324, 325))  # tags of strips and of tiles: offsets, lengths


def find_damage(content: bytes, image: Image.Image) -> str | None:
    """What is wrong with the bytes of `image`, opened and not yet decoded; None where nothing shows."""
    if image.format in {"JPEG", "MPO"}:
        return _damage_of_jpeg(content)
    if image.format == "PNG":
        return _damage_of_png(content)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _damage_of_tiff(content, image)
    if image.format == "WEBP":
        return _damage_of_webp(content)
    return None


def _hole_in(compressed: bytes) -> str | None:
    return "a hole of zeros in its data" if _HOLE in compressed else None


# ----------------------------------------------------------------------------------------------------------------- JPEG


def _damage_of_jpeg(content: bytes) -> str | None:
    if _has_hole(content):
        return "a hole of zeros in its data"
    if simplejpeg is None:
        return None
    try:
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return None


def find_damage_in_jpeg_part(content: bytes) -> str | None:
    """What is wrong with a JPEG within another file; of 12 bits, or without loss, holes show and a missing end."""
    if _is_of_8_bits(content):
        return _damage_of_jpeg(content)
    if _has_hole(content):
        return "a hole of zeros in its data"
    return None if _EOI_MARKER in content[-_PADDING:] else "its end is missing"


def _is_of_8_bits(content: bytes) -> bool:
    """By the header of the frame, which tells the process: baseline, extended and progressive have codes of 8 bits."""
    position = 2
    while position + 5 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker in _FRAMES:
            return marker <= 0xC2 and content[position + 4] == 8
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return True


def _has_hole(content: bytes) -> bool:
    """Whether zeros stand in a scan where they are no picture.

    A code of nothing but zero bits is the first of its Huffman table. Where that means "no difference" (DC) or "end of
    block" (AC), or where plain bits stand instead of codes (refined DC), flat areas are zeros. Elsewhere each zero bit
    would be one more coefficient of -1.
    """
    if _HOLE not in content:
        return False
    zero_codes: dict[int, int] = {}
    is_scan_of_codes, end = False, 0
    for marker in _MARKER.finditer(content):
        if marker.start() < end:
            continue  # within the segment before
        if is_scan_of_codes and content.find(_HOLE, end, marker.start()) >= 0:
            return True
        if marker[1] == _EOI:
            break
        length = int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        segment = content[marker.end() + 2 : marker.end() + length]
        end = marker.end() + length
        if marker[1] == _DHT:
            zero_codes |= _zero_codes(segment)
        is_scan_of_codes = marker[1] == _SOS and any(zero_codes.get(table) for table in _tables_of_scan(segment))
    return False


def _zero_codes(segment: bytes) -> Iterator[tuple[int, int]]:
    """(table, symbol of its code of zero bits) of each Huffman table in a segment DHT."""
    while len(segment) > 17:
        yield segment[0], segment[17]
        segment = segment[17 + sum(segment[1:17]) :]


def _tables_of_scan(segment: bytes) -> Iterator[int]:
    """The Huffman tables that a segment SOS names and its scan reads."""
    components = segment[2 : 1 + 2 * segment[0] : 2]
    first, last, bits = segment[1 + 2 * segment[0] :][:3]
    for tables in components:
        if first == 0 and bits < 16:
            yield tables >> 4
        if last > 0:
            yield _AC + (tables & 15)


# ---------------------------------------------------------------------------------------------------- PNG, TIFF, WebP


def _damage_of_png(content: bytes) -> str | None:
    position = 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        end = position + 8 + length  # of the kind and the data
        if content[end : end + 4] != zlib.crc32(content[position + 4 : end]).to_bytes(4, "big"):
            return f"wrong checksum of the chunk at byte {position}"
        if content[position + 4 : position + 8] == b"IEND":
            return None
        position = end + 4
    return "its end is missing"


def _damage_of_tiff(content: bytes, image: TiffImagePlugin.TiffImageFile) -> str | None:
    tags = image.tag_v2
    compression = tags.get(259, _UNCOMPRESSED)
    if compression == _UNCOMPRESSED:
        return None  # Pillow misses what is missing
    places = [
        place
        for offsets, lengths in _PLACES
        for place in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False)
    ]
    return find_damage_in_parts(content, places, compression, tags.get(_JPEG_TABLES, b""))


def find_damage_in_parts(
    content: bytes, places: Sequence[tuple[int, int]], compression: int, jpeg_tables: bytes
) -> str | None:
    """What is wrong with the strips or tiles of a TIFF, at their (offset, length); None where nothing shows."""
    for offset, length in places:
        part = content[offset : offset + length]
        if not part or len(part) < length:
            return "its end is missing"
        if damage := _damage_of_part(part, compression, jpeg_tables):
            return f"in the strip or tile at byte {offset}, {damage}"
    return None


def _damage_of_part(part: bytes, compression: int, tables: bytes) -> str | None:
    """What is wrong with a strip or tile; JPEG's `tables` are a file of their own, from start marker to end marker."""
    if compression == _UNCOMPRESSED:
        return None
    if compression == _JPEG:
        return find_damage_in_jpeg_part(tables[:-2] + part[2:] if tables else part)
    if compression not in _DEFLATE:
        return _hole_in(part)
    try:
        zlib.decompress(part)
    except zlib.error as error:
        return str(error)
    return None


def _damage_of_webp(content: bytes) -> str | None:
    position = 12
    while position + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, position)
        end = position + 8 + length
        if kind in {b"VP8 ", b"VP8L"} and (damage := _hole_in(content[position + 8 : end])):
            return damage
        position = end + length % 2
    return None
