"""Settings tried beside one another: every variant of a YAML file trained and evaluated on categories of a root.

Run `python benchmarks/trials.py TRIALS.yaml ROOT OUTPUT [--only VARIANT ...]`. The file names a preset, what all
variants change of it, the categories, the seeds, and the variants: of each the models that it is about, with what it
changes of their sections. Every variant and seed is a project of its own in OUTPUT, made by the verbs of the command
line; a cell that is there is not made again, so a broken run goes on. OUTPUT/<variant>-<seed>.json holds the figures,
and the table of all variants is printed. Start one process per core, with OMP_NUM_THREADS=1 and other variants, for the
same OUTPUT.

Choose on development data alone (benchmarks/development.py); what is reported is measured once, on the other set.
"""

import argparse
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

FIGURES = ("image_auroc", "pixel_auroc", "aupro_30")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trials", type=Path)
    parser.add_argument("root", type=Path, help="holds a folder per category")
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", help="of the variants")
    parser.add_argument("--categories", nargs="+", help="of the categories")
    parser.add_argument("--latency", action="store_true", help="export, and measure the exported file too")
    arguments = parser.parse_args()
    trials = yaml.safe_load(arguments.trials.read_text(encoding="utf-8"))
    preset = Path(__file__).parents[1] / "presets" / f"{trials['preset']}.yaml"
    basis = changed(yaml.safe_load(preset.read_text(encoding="utf-8")), trials.get("changes", {}))
    basis["data"] = {
        "root": str(arguments.root.resolve()),
        "categories": arguments.categories or trials["categories"],
    }
    output = arguments.output.resolve()
    for variant in arguments.only or trials["variants"]:
        for seed in trials["seeds"]:
            run_variant(basis, variant, trials["variants"][variant], seed, output, latency=arguments.latency)
    print_table(output)


def changed(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `params` with other values at the dotted paths of `changes`; a path that is not there is an error."""
    result = copy.deepcopy(params)
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = result
        for name in sections:
            section = section[name]
        if key not in section:
            raise KeyError(path)
        section[key] = value
    return result


def run_variant(
    basis: dict[str, Any], variant: str, models: dict[str, Any], seed: int, output: Path, latency: bool
) -> None:
    changes = {
        path if path.startswith("distill.") else f"models.{model}.{path}": value
        for model, settings in models.items()
        for path, value in (settings or {}).items()
    }
    params = changed(basis, changes | {"train.seeds": [seed]})
    params["models"] = {model: params["models"][model] for model in models}
    for section in ("distill", "penalty", "textures"):
        params[section] = {model: entry for model, entry in params[section].items() if model in models}
    project = output / f"{variant}-{seed}".replace(" ", "_")
    project.mkdir(parents=True, exist_ok=True)
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    os.chdir(project)
    record = output / f"{variant}-{seed}.json"
    rows = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    for model, category in undone(params, rows):
        rows.append({"variant": variant, "seed": seed} | run_cell(params, model, category, latency))
        record.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(rows[-1], flush=True)


def undone(params: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    done = {(row["model"], row["category"]) for row in rows}
    for model in params["models"]:
        for category in params["data"]["categories"]:
            if (model, category) not in done:
                yield model, category


def run_cell(params: dict[str, Any], model: str, category: str, latency: bool) -> dict[str, Any]:
    """Everything that the cell needs and is not there yet, and its figures."""
    verb("check")
    for source in params["download"]:
        if not Path("data", source).exists():
            verb("download", source)
    if not Path("data/prepared", category).exists():
        verb("prepare", "--category", category)
    for section, made in (("distill", "teacher"), ("penalty", "penalty"), ("textures", "textures")):
        if model in params[section] and not Path("pretrained", model, made).exists():
            verb(section, "--model", model)
    cell = ("--model", model, "--category", category)
    for stage in ("train", "evaluate", *(("export", "latency") if latency else ())):
        verb(stage, *cell)
    seed = params["train"]["seeds"][0]
    metrics = json.loads(Path("metrics", model, category, f"seed{seed}.json").read_text(encoding="utf-8"))
    figures = {name: metrics.get(name) for name in (*FIGURES, "recall", "false_alarms", "train_seconds")}
    row = {"model": model, "category": category} | figures
    if not latency:
        return row
    measured = json.loads(Path("latency", model, f"{category}.json").read_text(encoding="utf-8"))
    return row | {"total_ms": measured["milliseconds"]["total"]["p50"]}


def verb(*arguments: str) -> None:
    import cli

    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    if result.exit_code:
        raise SystemExit(f"{' '.join(arguments)}: {result.output}")


def print_table(output: Path) -> None:
    rows = [row for path in sorted(output.glob("*.json")) for row in json.loads(path.read_text(encoding="utf-8"))]
    for model, category in sorted({(row["model"], row["category"]) for row in rows}):
        print(f"\n{model} on {category}")
        for row in rows:
            if (row["model"], row["category"]) == (model, category):
                figures = " / ".join(f"{100 * row[name]:.1f}" if row[name] is not None else "-" for name in FIGURES)
                print(f"  {row['variant']:<28} seed {row['seed']}: {figures}")


if __name__ == "__main__":
    main()
