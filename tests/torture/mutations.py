"""Damage to a file's bytes, and to what a JSON or a YAML file says; each a pure function of the random stream."""

import copy
import json
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**200, 0.5, 1e308, -1e-308, float("nan"), float("inf")),
    *("", "0", "a", "x" * 5000, "../../x", "a\0b", "\ud800", "$(touch x)", "<script>", "nan", "1e400", "\n", "good"),
    *([], {}, [[]], [None], {"a": 1}, [1, 2, 3]),
)
_TOKENS = (bytes(8), b"\xff" * 8, *b'-1 1e999 NaN null { [[ " 99999999999999999999 &a *a'.split(), b"\n\n")


def damaged(content: bytes, random: Random) -> bytes:
    """One to four of: flipped bits, other bytes, a hole, a cut, a part twice, a part gone, a token."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        if not changed:
            break
        place = random.randrange(min(len(changed), random.choice((64, 4096, len(changed)))))
        length = random.choice((1, 2, 8, 64, 1024))
        match random.randrange(7):
            case 0:
                changed[place] ^= 1 << random.randrange(8)
            case 1:
                changed[place : place + length] = random.randbytes(min(length, len(changed) - place))
            case 2:
                changed[place : place + length] = bytes(min(length, len(changed) - place))
            case 3:
                del changed[place:]
            case 4:
                changed[place:place] = changed[place : place + length]
            case 5:
                del changed[place : place + length]
            case _:
                changed[place:place] = random.choice(_TOKENS)
    return bytes(changed)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all values within."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def said_otherwise(value: Any, random: Random) -> Any:
    """A copy in which one to three values are others, gone, twice, or under another name."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        places = _places(value)
        if not places:
            return random.choice(HOSTILE)
        container, key = random.choice(places)
        match random.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[f"{key}x"] = container.pop(key)
            case 2:
                container[key] = copy.deepcopy(random.choice(places)[0])
            case _:
                container[key] = copy.deepcopy(random.choice(HOSTILE))
    return value


def json_said_otherwise(content: bytes, random: Random) -> bytes:
    return json.dumps(said_otherwise(json.loads(content), random)).encode("utf-8", "surrogatepass")
