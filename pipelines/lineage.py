"""Which code a stage's result depends on: what its module imports, followed to the end.

A killed run may go on only on the same code, and DVC rebuilds what other code made: both go by this one answer.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Not followed, since no result depends on it: where things lie, what is said of them and who is told; how weights are
# kept; what reads and checks settings, whose values DVC compares; what is fetched, which a SHA-256 pins.
NO_PART_OF_A_RESULT = (
    "anomaly_models/__init__.py",
    "pipelines/*.py",
    "pipelines/settings/*",
    "pipelines/sources/download.py",
    "pipelines/tracking/*",
    "pipelines/training/checkpoint.py",
    "pipelines/training/trained.py",
    "pipelines/training/work.py",
)


# The module of each stage whose code `check` writes down for DVC, and what its texts are made by. `download` is none:
# gigabytes are not fetched again because a line moved.
STAGES = {
    "prepare": ("pipelines/preparation/prepare.py",),
    "distill": ("pipelines/teachers/distill.py",),
    "penalty": ("pipelines/preparation/penalty.py",),
    "textures": ("pipelines/preparation/textures.py",),
    "train": ("pipelines/training/train.py",),
    "evaluate": ("pipelines/evaluation/evaluate.py",),
    "export": ("pipelines/deployment/export.py",),
    "latency": ("pipelines/deployment/latency.py",),
    "report": ("pipelines/report/report.py", "pipelines/names.py", "pipelines/numbers.py"),
}


def code_of_stage(stage: str) -> list[Path]:
    """All files that a stage's result depends on but for the method's own, with what lies beside them as data.

    In the order of their names.
    """
    code = code_of(*STAGES[stage])
    beside = {
        path
        for folder in {path.parent for path in code}
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    return sorted({*code, *beside})


def code_of(*files: str) -> list[Path]:
    """The project's files that a result of these depends on, themselves first: what they import, and so on.

    Files are named from the folder that holds `pipelines`, such as "pipelines/training/train.py".
    """
    return _followed(files, _is_no_part)


def needed_by(*files: str) -> list[Path]:
    """The project's files without which these cannot run, themselves and their packages' own among them."""
    code = _followed(files, lambda _: False)
    packages = {folder / "__init__.py" for path in code for folder in path.parents if ROOT in folder.parents}
    return sorted({*code, *packages})


def _followed(files: Sequence[str], is_left_out: Callable[[Path], bool]) -> list[Path]:
    """These and what they import, wherever in a file the import stands, but for what is left out."""
    found = dict.fromkeys(ROOT / file for file in files)
    waiting = list(found)
    while waiting:
        for path in _imported(waiting.pop()):
            if path not in found and not is_left_out(path):
                found[path] = None
                waiting.append(path)
    return list(found)


def _is_no_part(path: Path) -> bool:
    relative = path.relative_to(ROOT)
    # A pattern of as many parts: the star of `Path.match` stays within one.
    return any(relative.match(p) and p.count("/") == len(relative.parts) - 1 for p in NO_PART_OF_A_RESULT)


@cache
def _imported(path: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(_files_in(ast.parse(path.read_text(encoding="utf-8")))))


def _files_in(tree: ast.Module) -> Iterator[Path]:
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            path = ROOT / f"{module.replace('.', '/')}.py"
            if module.partition(".")[0] in ("anomaly_models", "pipelines") and path.is_file():
                yield path


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements within, wherever they stand; their expressions, nine nodes of ten, hold no import."""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for inner in getattr(node, block, ()):
            yield inner
            yield from _statements(inner)
