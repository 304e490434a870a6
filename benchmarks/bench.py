"""Speed against what people use, side by side in one run: benchmarks/results.json, and from it the table in the docs.

    make bench                            # all rows
    python -m benchmarks.bench metrics    # some of them; the others stay as they were measured

Each side of a row is a process of its own, on one thread, which has done its work once before the clock starts, and
whose results must equal the other's. Then they take turns, so that a busy neighbour slows all of them alike. A ratio
is the median over the turns of how many times longer a side took than ours in the same turn, by the clock.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rows import NAMES, differences, row
from pipelines.environment import cpu_name

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".bench" / "environment" / "bin" / "python"
SCRATCH = ROOT / "benchmarks" / "data"  # anomalib warns of pictures in a hidden folder
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE, BEGIN, END = ROOT / "docs" / "results.md", "<!-- bench -->", "<!-- /bench -->"
# OpenMP's threads would spin between two turns, beside whoever has the next.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Side:
    """A contender's process."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log
        told = self._answer()
        self.results: dict[str, Any] = told["results"]
        self.versions: dict[str, str] = told["versions"]

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


@contextlib.contextmanager
def side(name: str, contender: str, python: Path, folder: Path) -> Iterator[Side]:
    log = folder / f"{contender.replace(' ', '_')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(python), "-m", "benchmarks.side", name, contender, str(folder)],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
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
                side(name, contender, PEERS if one.is_peer else Path(sys.executable), folder)
            )
            for contender, one in found.contenders.items()
        }
        agreed = differences(found, {contender: one.results for contender, one in sides.items()})
        turns: dict[str, list[dict[str, float]]] = {contender: [] for contender in sides}
        for number in range(1 + pairs):
            for contender, one in sides.items():
                turn = one.turn()
                if number:  # the first allocates memory and picks kernels
                    turns[contender].append(turn)
        versions: dict[str, str] = {}
        for one in sides.values():
            versions |= one.versions
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
        "missed": found.missed,
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def figures(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(median(turn[name] for turn in turns), 4) for name in ("wall", "cpu", "megabytes")}


def ratio(theirs: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]]) -> dict[str, float]:
    pairs = sorted(their["wall"] / our["wall"] for their, our in zip(theirs, ours, strict=True))
    return {"median": round(median(pairs), 2), "lowest": round(pairs[0], 2), "highest": round(pairs[-1], 2)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: a line for each two sides, and below it what stands beside a target that is missed."""
    lines = [
        "| row | ours, s | theirs, s | times faster (lowest to highest) | asked for |",
        "|---|---:|---:|---:|---:|",
    ]
    for entry in rows:
        ours = seconds(entry["sides"][entry["ours"]])
        for name, found in entry["ratios"].items():
            span = f"**{found['median']:.1f}** ({found['lowest']:.1f} to {found['highest']:.1f})"
            target = entry["targets"].get(name)
            asked = "" if target is None else f"{target:g}" + ("" if found["median"] >= target else ": missed")
            theirs = seconds(entry["sides"][name])
            lines.append(f"| {entry['title']}: {entry['ours']} against {name} | {ours} | {theirs} | {span} | {asked} |")
    lines.append("")
    for entry in rows:
        missed = any(found["median"] < entry["targets"].get(name, 0) for name, found in entry["ratios"].items())
        why = f" {entry['missed']}" if missed and entry["missed"] else ""
        lines.append(f"* {entry['title']}. Equal: {entry['equal']}.{why}")
    last, turns = rows[-1], min(entry["pairs"] for entry in rows)
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    days = " to ".join(dict.fromkeys((min(entry["date"] for entry in rows), max(entry["date"] for entry in rows))))
    lines += ["", f"Measured {days} on {last['machine']}; {versions}. Medians of {turns} turns or more."]
    return "\n".join(lines)


def seconds(side: Mapping[str, float]) -> str:
    return f"{side['wall']:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*NAMES, []], help="default: all")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side (default: %(default)s)")
    arguments = parser.parse_args()
    known = {entry["row"]: entry for entry in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for name in arguments.rows or NAMES:
        known[name] = measured(name, arguments.pairs)
        print(json.dumps(known[name]["ratios"]), name, flush=True)
        rows = [known[one] for one in NAMES if one in known]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
