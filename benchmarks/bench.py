"""Speed against what people use, side by side: benchmarks/results.json, from it the docs' table, README's sentences.

    make bench                            # all rows
    python -m benchmarks.bench metrics    # some of them; the others stay as they were measured

Each side of a row is a process of its own, on one thread, which has done its work once before the clock starts, and
whose results must equal the other's. All load at once; then they take turns, so that a busy neighbour slows all of
them alike. A ratio is the median over the turns of how many times longer a side took than ours in the same turn, by
the clock.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from anomaly_models import MODELS
from benchmarks.rows import NAMES, Contender, differences, row
from benchmarks.rows.demo import PART, TRAINING
from pipelines.environment import cpu_flags, cpu_name

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".bench" / "environment" / "bin" / "python"
EARLIER = "986142de"  # of 27 November 2026: what speed was to be measured from
SCRATCH = ROOT / "benchmarks" / "data"  # anomalib warns of pictures in a hidden folder
RESULTS = ROOT / "benchmarks" / "results.json"
README = ROOT / "README.md"
PAGE, BEGIN, END = ROOT / "docs" / "results.md", "<!-- bench -->", "<!-- /bench -->"
# OpenMP's threads would spin between two turns, beside whoever has the next.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

# By what Linux calls them, the widest first.
WIDTHS = {"avx512_vnni": "AVX-512 with VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
WORDS = {"wall": "seconds", "cpu": "seconds of processors", "megabytes": "megabytes of memory"}


class Side:
    """A contender's process, which loads what it needs, beside others."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log

    def loaded(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Its results and versions, once it is ready: before its first turn."""
        told = self._answer()
        return told["results"], told["versions"]

    def turn(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side has ended ({self._process.wait()}): see {self._log}")
        found: dict[str, Any] = json.loads(line)
        return found


def earlier() -> Path:
    """The project as it was, from Git."""
    root = ROOT / ".bench" / EARLIER
    if not root.exists():
        half = root.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        packed = subprocess.run(["git", "archive", EARLIER], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(half, filter="data")
        half.rename(root)
    return root


@contextlib.contextmanager
def side(name: str, contender: str, python: Path, folder: Path, root: Path = ROOT) -> Iterator[Side]:
    """Start a contender, which imports this project's packages from `root` and its row from here."""
    log = folder / f"{contender.replace(' ', '_')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(python), "-m", "benchmarks.side", name, contender, str(folder)],
            cwd=root,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        with process:
            try:
                yield Side(process, log)
            finally:
                process.kill()


def here(contenders: Mapping[str, Contender], flags: Set[str]) -> dict[str, Contender]:
    """Those that a processor with these flags is for."""
    return {name: one for name, one in contenders.items() if not one.needs or one.needs in flags}


def machine() -> str:
    """By how wide its instructions are, too: processors of one name differ in it."""
    widest = next((f", {word}" for flag, word in WIDTHS.items() if flag in cpu_flags()), "")
    return f"{cpu_name()}{widest}, {os.cpu_count()} cores, {platform.system()}"


def measured(name: str, pairs: int) -> dict[str, Any]:
    """A row's entry in results.json; raises ValueError if the sides do not agree."""
    found = row(name)
    folder = SCRATCH / name
    if not (folder / "made").exists():
        folder.mkdir(parents=True, exist_ok=True)
        found.make(folder)
        (folder / "made").touch()
    with contextlib.ExitStack() as stack:
        sides = {
            contender: stack.enter_context(
                side(
                    name,
                    contender,
                    PEERS if one.is_peer else Path(sys.executable),
                    folder,
                    earlier() if one.is_earlier else ROOT,
                )
            )
            for contender, one in here(found.contenders, cpu_flags()).items()
        }
        loaded = {contender: one.loaded() for contender, one in sides.items()}
        agreed = differences(found, {contender: results for contender, (results, _) in loaded.items()})
        turns: dict[str, list[dict[str, float]]] = {contender: [] for contender in sides}
        if found.once:
            pairs = 1
        elif found.warmed:
            for one in sides.values():
                one.turn()  # allocates memory and picks kernels
        for _ in range(pairs):
            for contender, one in sides.items():
                turns[contender].append(one.turn())
    ours = next(iter(sides))
    return {
        "row": name,
        "title": found.title,
        "equal": found.equal,
        "differences": agreed,
        "pairs": pairs,
        "ours": ours,
        "sides": {contender: figures(found_turns) for contender, found_turns in turns.items()},
        "ratios": {contender: ratio(turns[contender], turns[ours]) for contender in sides if contender != ours},
        "targets": dict(found.target),
        "at_most": dict(found.at_most),
        "machine": machine(),
        "versions": {name: value for _, versions in loaded.values() for name, value in versions.items()},
        "date": datetime.now(UTC).date().isoformat(),
    }


def figures(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(median(turn[name] for turn in turns), 4) for name in turns[0]}


def ratio(theirs: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]]) -> dict[str, float]:
    pairs = sorted(their["wall"] / our["wall"] for their, our in zip(theirs, ours, strict=True))
    return {"median": round(median(pairs), 2), "lowest": round(pairs[0], 2), "highest": round(pairs[-1], 2)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: a line for each two sides, what ours say of themselves, and what stands beside a missed target."""
    lines = [
        "| row | ours, s | theirs, s | times faster (lowest to highest) | asked for |",
        "|---|---:|---:|---:|---:|",
    ]
    for entry in rows:
        took = seconds(entry["sides"][entry["ours"]])
        for name, found in entry["ratios"].items():
            span = f"**{found['median']:.1f}** ({found['lowest']:.1f} to {found['highest']:.1f})"
            target = entry["targets"].get(name)
            asked = "" if target is None else f"{target:g}" + ("" if found["median"] >= target else ": missed")
            theirs = seconds(entry["sides"][name])
            lines.append(f"| {entry['title']}: {entry['ours']} against {name} | {took} | {theirs} | {span} | {asked} |")
    lines += ["", "| row | figure | ours | at most |", "|---|---|---:|---:|"]
    for entry in rows:
        ours = entry["sides"][entry["ours"]]
        for name in [*entry["at_most"], *(name for name in ours if name not in {*WORDS, *entry["at_most"]})]:
            figure, limit = ours[name], entry["at_most"].get(name)
            asked = "" if limit is None else f"{limit:g}" + ("" if figure <= limit else ": missed")
            word = WORDS.get(name, name)
            lines.append(f"| {entry['title']}: {entry['ours']} | {word} | **{figure:.3g}** | {asked} |")
    lines.append("")
    machines = list(dict.fromkeys(entry["machine"] for entry in rows))
    for entry in rows:
        why = f" {row(entry['row']).missed}" if misses(entry) else ""
        where = f" Machine {1 + machines.index(entry['machine'])}." if len(machines) > 1 else ""
        lines.append(f"* {entry['title']}. Equal: {entry['equal']}.{why}{where}")
    turns = min(entry["pairs"] for entry in rows if not row(entry["row"]).once)
    known = {name: version for entry in rows for name, version in entry["versions"].items()}
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    days = " to ".join(dict.fromkeys((min(entry["date"] for entry in rows), max(entry["date"] for entry in rows))))
    numbered = " and ".join(f"machine {number} ({name})" for number, name in enumerate(machines, 1))
    lines += ["", f"Measured {days} on {numbered if len(machines) > 1 else machines[0]}; {versions}."]
    lines.append(f"Medians of {turns} turns or more; `--help` of every verb, `dvc repro` and the demo ran once.")
    return "\n".join(lines)


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the README says: how long the demo takes, and how what has a brief name compares with anomalib."""
    faster = [
        f"{brief} {min(entry['ratios'][name]['median'] for name in entry['targets']):.2g}"
        for entry in rows
        if (brief := row(entry["row"]).brief)
    ]
    minutes = next(entry["sides"]["demo"]["wall"] for entry in rows if entry["row"] == "demo") / 60
    return (
        f"the demo itself then takes {minutes:.1f} minutes on two cores. On one of them, times faster than anomalib: "
        f"{', '.join(faster)} ([all of it](docs/results.md#speed))"
    )


def pace(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the README says below its table of the demo: how long each model of it learns, and takes for a part."""
    found = next(entry["sides"]["demo"] for entry in rows if entry["row"] == "demo")

    def each(figure: str) -> str:
        known = [(value, model) for model in MODELS if (value := found.get(figure.format(model))) is not None]
        return ", ".join(f"{model} {value:.3g}" for value, model in sorted(known, reverse=True))

    return (
        f"Seconds of training for both categories, two processes at once: {each(TRAINING)}; milliseconds from a file "
        f"to a decision on one core: {each(PART)}."
    )


def between(page: Path, begin: str, end: str, text: str) -> None:
    written = page.read_text(encoding="utf-8")
    before, after = written.split(begin)[0], written.split(end)[1]
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


def misses(entry: Mapping[str, Any]) -> bool:
    """Whether a row is slower than it is to be, or takes more."""
    ours = entry["sides"][entry["ours"]]
    return any(found["median"] < entry["targets"].get(name, 0) for name, found in entry["ratios"].items()) or any(
        ours[name] > limit for name, limit in entry["at_most"].items()
    )


def seconds(side: Mapping[str, float]) -> str:
    return f"{side['wall']:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*NAMES, []], help="default: all")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side (default: %(default)s)")
    arguments = parser.parse_args()
    known = {entry["row"]: entry for entry in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for name in arguments.rows or NAMES:
        started = time.monotonic()
        known[name] = measured(name, arguments.pairs)
        took = time.monotonic() - started
        print(f"{name} ({took:.0f} s): {json.dumps(known[name]['ratios'])}", flush=True)
        rows = [known[one] for one in NAMES if one in known]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    between(PAGE, BEGIN, END, f"\n{table(rows)}\n")
    between(README, "<!-- speed -->", "<!-- /speed -->", sentence(rows))
    between(README, "<!-- pace -->", "<!-- /pace -->", pace(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
