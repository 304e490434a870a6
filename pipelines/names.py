"""Names that users gave to folders and files, in places that take not every sign."""

import hashlib
import re
import unicodedata

_DIGEST = 16  # characters


def as_key(name: str, refused: str, longest: int) -> str:
    """`name` with the code of each sign that the regular expression `refused` finds: `a_x2b_b` for `a+b`.

    Names that differ have keys that differ: what looks like such a code has its first sign coded, and what is longer
    than `longest` characters ends in a digest of the whole.
    """
    key = re.sub(f"{refused}|_(?=x[0-9a-f]+(?:_|{refused}))", lambda sign: f"_x{ord(sign[0]):x}_", name)
    if len(key) <= longest:
        return key
    return f"{key[: longest - _DIGEST - 1]}_{hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]}"


def registered_model(data_set: str, category: str) -> str:
    """What a category's models are called in the model registry."""
    return f"{data_set}-{category}"


def in_markdown(name: str) -> str:
    """`name` in a heading, a sentence or a table, where none of its signs means anything."""
    text = _on_one_line(name).replace("&", "&amp;").replace("<", "&lt;")
    # An underscore within a word means nothing, as in `metal_nut`.
    return re.sub(r"[\\`*~\[\]|$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def as_code(name: str) -> str:
    """`name` in a table of Markdown, between backquotes."""
    text = _on_one_line(name).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _on_one_line(name: str) -> str:
    return "".join(" " if unicodedata.category(sign) in {"Cc", "Zl", "Zp"} else sign for sign in name)
