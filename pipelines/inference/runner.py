"""The command line of a bundle, `python gear.zip`: all that a machine needs beside onnxruntime, numpy and Pillow."""

import argparse
import json
import sys
from pathlib import Path

from pipelines.errors import ArgumentError, BlemishError
from pipelines.inference.bundle import Bundle, verdict
from pipelines.inference.predict import Result, predict, summed_up
from pipelines.memory import out_of_memory
from pipelines.paths import PREDICTIONS_FILE

DEFECT_FOUND = 3  # exit code


def main(path: Path, arguments: list[str] | None = None) -> None:
    """Run a verb of the bundle at `path`; errors that are the user's to mend are one line on stderr and exit code 1."""
    given = _parser(path).parse_args(arguments)
    try:
        code: int = given.verb(Bundle(path), given)
    except BlemishError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # of these, a memory that has run out is the user's to mend
        if (line := out_of_memory(error)) is None:
            raise
        sys.exit(f"error: {line}")
    sys.exit(code)


def _parser(path: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python {path.name}", description="A detector of visual anomalies, with its proof."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verify = verbs.add_parser("verify", help="score the samples inside, and say whether all is as it was")
    verify.set_defaults(verb=_verify)
    about = verbs.add_parser("about", help="what it is: data, figures with intervals, limits, licences, as JSON")
    about.set_defaults(verb=_about)
    scoring = verbs.add_parser("predict", help="score pictures: verdicts, CSV, JSON and overlays")
    scoring.add_argument("sources", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    scoring.add_argument("--output", "-o", type=Path, default=Path("predictions"), help="folder for the results")
    scoring.add_argument("--json-lines", action="store_true", help="a JSON object per picture on stdout, no more")
    scoring.add_argument("--fail-on-defect", action="store_true", help=f"exit code {DEFECT_FOUND} if there is a defect")
    scoring.set_defaults(verb=_predict)
    return parser


def _verify(bundle: Bundle, _: argparse.Namespace) -> int:
    found = bundle.replay(bundle.engine())
    print(*(replayed.line for replayed in found), verdict(bundle, found), sep="\n")
    return 0 if all(replayed.is_same for replayed in found) else 1


def _about(bundle: Bundle, _: argparse.Namespace) -> int:
    print(json.dumps(bundle.about, indent=2, ensure_ascii=False))
    return 0


def _predict(bundle: Bundle, given: argparse.Namespace) -> int:
    if given.output.exists() and not given.output.is_dir():
        raise ArgumentError(f"--output {given.output}: not a folder; give one that is, or a new name")

    def tell(result: Result, _total: int) -> None:
        if given.json_lines:
            print(result.to_json(), flush=True)
        elif result.error is None:
            print(result.line)

    found = predict(bundle.engine(), given.sources, given.output, tell)
    told = sys.stderr if given.json_lines else sys.stdout
    print(f"{summed_up(found, bundle.card, None)}: {given.output / PREDICTIONS_FILE}", file=told)
    for result in found:
        if result.error is not None:
            print(f"error: {result.error}", file=sys.stderr)
    if any(result.error is not None for result in found):
        return 1
    return DEFECT_FOUND if given.fail_on_defect and any(result.decision == "defect" for result in found) else 0
