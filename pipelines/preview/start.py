"""Verb start: a folder of pictures -> what it holds, what it lacks, and a short params.yaml for it."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from anomaly_models import MODELS
from anomaly_models.common.sizes import Size
from pipelines.data.index import GOOD, Layout
from pipelines.errors import DatasetError, ParamsError, hint
from pipelines.numbers import counted, rate
from pipelines.paths import Project
from pipelines.pictures.images import is_litter
from pipelines.preparation.layouts import choose_layout, list_category, shown_layouts
from pipelines.preparation.listing import Findings, Listing, some
from pipelines.preparation.splits import number_drawn
from pipelines.preview.check import INPUTS
from pipelines.settings.new_project import keep_out_of_git
from pipelines.settings.params import validated
from pipelines.settings.presets import PRESETS, replace
from pipelines.settings.problems import refusal

QUICK = ("adfa", "fapm")  # learn in seconds, and between them suit parts in one place and at any angle
_PRESET = "folder"
_FEW = 19  # held-out good parts below which 5 % false alarms cannot be promised
_LONG = 1.5  # sides of a picture whose ratio is larger lose by a square
_AREA = 256**2  # pixels that the preset's models see
_STEP = 64  # pixels that sides of a rectangle are a multiple of, FAPM's patch among them
_REDUCED = 3  # times, from which on small faults may vanish
_RECTANGULAR = ("adfa", "bgad", "fapm")
_WORDS_OF_YAML = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
# Seconds for a cell, a good part to learn from and a tested part, on one core of the machine of the README's figures.
_SECONDS = {
    "adfa": (30, 0.2, 0.2),
    "bgad": (35, 1.6, 0.2),
    "diffusion_ad": (200, 0.1, 0.1),
    "efficient_ad": (130, 0.1, 0.1),
    "fapm": (30, 0.2, 0.2),
}


@dataclass(frozen=True, slots=True)
class Look:
    """What a category's folder holds, as far as names and headers tell."""

    name: str
    layout: Layout
    learnt: int  # good parts to learn from and to hold out
    held_out: int  # of them, as published
    good: int  # to test on
    takes_good: bool  # to test on some of those to learn from
    defects: Counter[str]  # by type
    masks: bool
    sizes: Counter[Size]
    grey: int  # pictures
    copies: int  # files that are another's, byte for byte
    folders: tuple[str, ...]  # below that of the good parts
    warnings: tuple[str, ...]

    @property
    def size(self) -> Size:
        """The one that most pictures have."""
        return self.sizes.most_common(1)[0][0] if self.sizes else Size.square(256)

    @property
    def ratio(self) -> float | None:
        """Width by height, where it is that of all pictures within a twentieth."""
        found = [size.width / size.height for size in self.sizes]
        return found[0] if found and max(found) <= 1.05 * min(found) else None

    @property
    def text(self) -> str:
        """In one line."""
        defects = sum(self.defects.values())
        types = f" of {counted(len(self.defects), 'type')}" if len(self.defects) > 1 else ""
        test = [counted(self.good, "good part")] if self.good else ["a quarter of them"] if self.takes_good else []
        test += [f"{counted(defects, 'defect')}{types}, {'with' if self.masks else 'without'} masks"] if defects else []
        sizes = f" and {counted(len(self.sizes) - 1, 'other size')}" if len(self.sizes) > 1 else ""
        colour = "grey" if self.grey == sum(self.sizes.values()) else "colour"
        return (
            f"{self.name} (layout {self.layout}): {counted(self.learnt, 'good part')}; to test on "
            f"{' and '.join(test) or 'nothing'}; {self.size.width} x {self.size.height} pixels{sizes}, "
            f"{colour}"
        )


@dataclass(frozen=True, slots=True)
class Started:
    """What was found and decided, for the user."""

    categories: tuple[Look, ...]
    left_out: tuple[str, ...]  # folders that are no category, and why
    notes: tuple[str, ...]
    minutes: float  # that all of it will take, on this many cores


def start(folder: Path, models: Sequence[str], project: Project, cores: int, *, force: bool) -> Started:
    """Look at a folder of categories, or at one category, and write `params.yaml`: the preset `folder`, cut short.

    Raises:
        DatasetError: no category is in it; the message says what was looked at.
        ParamsError: a model is not known, or `params.yaml` has edits that would be lost, and not `force`.
    """
    if not models:
        raise ParamsError(f"--models: no model; name some of {', '.join(MODELS)}, or all")
    if unknown := [name for name in models if name not in MODELS]:
        raise ParamsError(f"model '{unknown[0]}': unknown{hint(unknown[0], MODELS)}; known: {', '.join(MODELS)}")
    root, names, left_out = find_categories(folder)
    looks = tuple(look(root / name) for name in names)
    values = _preset()
    notes = settle(values, looks, models, _written(root, project))
    file = io.StringIO()
    _yaml().dump(values, file)
    text = re.sub(r"(?<=[^\n]\n)(?=^\w+:)", "\n", file.getvalue(), flags=re.MULTILINE)  # a line between sections
    _, problems = validated(yaml.safe_load(text))
    if problems:
        raise refusal(project.params, problems)
    replace(text.encode(), project.params, force, f"`blemish start {folder} --force`")
    if kept := keep_out_of_git(project, _pictures_in(root, names, project)):
        notes.append(f".gitignore: {', '.join(kept)}, since pictures are not for Git")
    return Started(looks, tuple(left_out), tuple(notes), _minutes(looks, models, cores))


def find_categories(folder: Path) -> tuple[Path, list[str], list[str]]:
    """The folder that holds categories, their names, and of each other folder in it a line that says why it is none.

    Raises:
        DatasetError: there is no such folder, or no category in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; give the one that holds your pictures")
    folder = folder.resolve()
    if shown_layouts(folder):
        choose_layout(folder, "auto", Findings())
        return folder.parent, [folder.name], []
    names, left_out = [], list[str]()
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith(".") or is_litter(entry.name):
            continue
        try:
            choose_layout(entry, "auto", Findings())
            names.append(entry.name)
        except DatasetError as error:
            left_out.append(str(error))
    if not names:
        if len(left_out) == 0:
            choose_layout(folder, "auto", Findings())  # which says what is wrong
        raise DatasetError("\n  - ".join([f"{folder}: holds no category", *left_out[:3]]))
    return folder, names, left_out


def look(source: Path) -> Look:
    """Names, headers and digests of a category's pictures; none is decoded."""
    findings = Findings()
    layout = choose_layout(source, "auto", findings)
    listing = list_category(source, layout, findings)
    sizes, grey, digests = Counter[Size](), 0, Counter[str]()
    for path in listing.pictures:
        content = (source / path).read_bytes()
        digests[hashlib.sha256(content).hexdigest()] += 1
        if (header := _header(content)) is not None:
            sizes[header[0]] += 1
            grey += header[1]
    return Look(
        name=source.name,
        layout=layout,
        learnt=len(listing.training) + len(listing.holdout or []) + list(listing.learnt.values()).count(GOOD),
        held_out=len(listing.holdout or []),
        good=len(listing.test_normal),
        takes_good=listing.takes_test_normal,
        defects=Counter(listing.anomalous.values()),
        masks=bool(listing.masks),
        sizes=sizes,
        grey=grey,
        copies=sum(number - 1 for number in digests.values()),
        folders=tuple(sorted({_folder_below(listing, path) for path in listing.training} - {""})),
        warnings=(*map(str, findings.problems), *findings.warnings),
    )


def _folder_below(listing: Listing, path: str) -> str:
    rest = path.removeprefix(f"{listing.training_folder}/")
    return rest.rpartition("/")[0] if rest != path else ""


def _header(content: bytes) -> tuple[Size, bool] | None:
    """Size and whether it is grey; None for what Pillow cannot open, of which `prepare` says what it is."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return Size(image.height, image.width), image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "F")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None


# ---- the file ------------------------------------------------------------------------------------------------------


def _yaml() -> YAML:
    found = YAML()
    found.width = 4096  # a comment stays on its line
    return found


def _preset() -> Any:
    return _yaml().load((PRESETS / f"{_PRESET}.yaml").read_text(encoding="utf-8"))


def _written(root: Path, project: Project) -> str:
    """A folder in the project as DVC writes it, any other with all of its path."""
    own = project.root.resolve()
    return root.relative_to(own).as_posix() if root.is_relative_to(own) else str(root)


def _pictures_in(root: Path, names: Sequence[str], project: Project) -> list[str]:
    """The folders of the project that hold them, relative to it."""
    written = _written(root, project)
    if Path(written).is_absolute():
        return []
    return list(names) if written == "." else [written]


def settle(values: Any, looks: Sequence[Look], models: Sequence[str], root: str) -> list[str]:
    """Change the preset's content into that for these categories and models; gives a line for each decision."""
    values["data"]["root"] = _text(root)
    values["data"]["categories"][:] = [_text(found.name) for found in looks]
    values["tracking"]["experiment"] = _text(looks[0].name if len(looks) == 1 else Path(root).name or "parts")
    for name in [name for name in values["models"] if name not in models]:
        del values["models"][name]
    for section in INPUTS:
        values[section] = {name: value for name, value in values[section].items() if name in models}
    if not any(values[section] for section in INPUTS):
        values["download"] = {}  # of photos and textures, which nobody reads
    del values["sweep"]  # of many machines, which a file may do without
    notes = [_rectangle(values, looks)]
    if drawing := [name for name in models if name in ("bgad", "diffusion_ad")]:
        notes.append(f"{some(drawing)}: name the categories that fill the picture, as fabric does, in prepare.surfaces")
    return [note for note in notes if note] + [note for found in looks for note in _notes(found, values)]


def _text(name: str) -> str:
    """A name that every reader of YAML takes for text: DVC's takes 08 for a number, ours `no` for false."""
    plain = re.fullmatch(r"[^\W\d][\w./-]*", name) and name.lower() not in _WORDS_OF_YAML
    return name if plain else DoubleQuotedScalarString(name)


def _rectangle(values: Any, looks: Sequence[Look]) -> str:
    """Long pictures, all of the same proportions, are not squeezed into a square."""
    ratios = [found.ratio for found in looks]
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios) or max(known) > 1.05 * min(known) or 1 / _LONG <= known[0] <= _LONG:
        return ""
    height, width = (max(_STEP, round((_AREA * factor) ** 0.5 / _STEP) * _STEP) for factor in (1 / known[0], known[0]))
    chosen = [name for name in values["models"] if name in _RECTANGULAR]
    for name in chosen:
        section = values["models"][name]
        section["image_size"] = {"height": height, "width": width}
        if name == "fapm":
            section["crop"] = {"height": height, "width": width}
            section["grid"] = {"height": height // _STEP, "width": width // _STEP}
    if not chosen:
        return ""
    others = [name for name in values["models"] if name not in _RECTANGULAR]
    squares = f"; {', '.join(others)}: stretched to squares" if others else ""
    return f"{', '.join(chosen)}: image_size {width} x {height} (width x height), as the pictures are long{squares}"


def _notes(found: Look, values: Mapping[str, Any]) -> list[str]:
    """What the user should know of a category before anything runs."""
    told = list(found.warnings)
    held_out = _held_out(found, values["prepare"])
    if held_out < _FEW:
        folds = ", or let all set it (prepare.holdout: folds)" if set(values["models"]) <= set(QUICK) else ""
        told.append(
            f"{counted(held_out, 'good part')} set the threshold and can promise {rate(1 / (held_out + 1))} false "
            f"alarms at best; {_FEW} could promise 5 %: add good parts{folds}"
        )
    if found.copies:
        told.append(f"{counted(found.copies, 'file')} byte for byte another's: copies stay on one side of a split")
    if not found.defects:
        told.append("no defects: a detector with its threshold, but no figure of how many defects it finds")
    elif not found.masks:
        told.append("no masks: figures by image only")
    if len(found.folders) > 1:
        told.append(
            f"good parts lie in {some(found.folders)}: if these are days, lots or cameras, set prepare.groups: "
            "{folder: 1}"
        )
    seen = max(_area(section["image_size"]) for section in values["models"].values())
    if (reduced := (found.size.area / seen) ** 0.5) > _REDUCED:
        told.append(
            f"pictures are shown to the models {reduced:.0f} times smaller: if faults are only some {2 * reduced:.0f} "
            "pixels wide, raise image_size or set tiles (docs/frames.md)"
        )
    return [f"{found.name}: {note}" for note in told]


def _held_out(found: Look, settings: Mapping[str, Any]) -> int:
    """Good parts that will set the threshold, but for copies, which stay together."""
    left = found.learnt
    if found.held_out or left < (3 if found.takes_good else 2):  # else `prepare` refuses
        return found.held_out
    if found.takes_good:
        left -= number_drawn(left, settings["test_normal"], reserve=2)
    return number_drawn(left, settings["holdout"], reserve=1)


def _area(size: Any) -> int:
    return int(size["height"] * size["width"] if isinstance(size, Mapping) else size**2)


def _minutes(looks: Iterable[Look], models: Sequence[str], cores: int) -> float:
    """A guess, within a factor of two or so."""
    seconds = 0.0
    for found in looks:
        tested = found.good + sum(found.defects.values())
        seconds += sum(
            fixed + learnt * found.learnt + each * tested for fixed, learnt, each in (_SECONDS[name] for name in models)
        )
    return seconds / max(1, min(cores, 2 * len(models))) / 60 + 1
