from itertools import product

import pytest

from pipelines.names import as_code, as_key, in_markdown

METRIC = r"[^\w.\- /]"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, name) for name in ("recall.cut_lead", "Kratzer_groß", "scratch 2.5-a", "type_1_a_b", "a_x", "x2b_")),
        ("a+b", "a_x2b_b"),
        ("a=b", "a_x3d_b"),
        ("a_x2b_b", "a_x5f_x2b_b"),
        ("u\u0308", "u_x308_"),
    ],
)
def test_ordinary_names_are_their_own_keys(name: str, key: str) -> None:
    assert as_key(name, METRIC, 250) == key


def test_keys_of_different_names_differ() -> None:
    """Of all names of up to six signs that codes are made of, and signs that have one."""
    names = ["".join(signs) for length in range(1, 7) for signs in product("_x2b+5f", repeat=length)]
    assert len({as_key(name, METRIC, 250) for name in names}) == len(names)


def test_long_names_keep_their_beginning_and_differ() -> None:
    names = [f"{'+' * 100}{end}" for end in ("a", "b")] + ["a" * 251, "a" * 252]
    keys = [as_key(name, METRIC, 250) for name in names]
    assert len(set(keys)) == 4
    assert {len(key) for key in keys} == {250}
    assert as_key("a" * 250, METRIC, 250) == "a" * 250


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metal_nut", "metal_nut"),
        ("Kratzer ü, 50 % (tief)", "Kratzer ü, 50 % (tief)"),
        ("_a_ __b__", r"\_a\_ \_\_b\_\_"),
        ('<b onclick="x">&lt;', '&lt;b onclick="x">&amp;lt;'),
        ("a|b`c\\|d", r"a\|b\`c\\\|d"),
        ("[a](javascript:x) *b* ~~c~~ $d$", r"\[a\](javascript:x) \*b\* \~\~c\~\~ \$d\$"),
        ("a\n| b\r\u2028c", r"a \| b  c"),
    ],
)
def test_in_markdown(name: str, text: str) -> None:
    assert in_markdown(name) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("a/b_c.png", "`a/b_c.png`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a|b\n<c>", "`a\\|b <c>`")],
)
def test_as_code(name: str, text: str) -> None:
    assert as_code(name) == text
