"""Known vulnerabilities of what the locks pin, by pip-audit; without a network, from a copy of OSV's records of PyPI.

`make audit` asks OSV's server. `make audit OSV=all.zip` reads a copy of it, a ZIP of one JSON file for each record, as
OSV offers one for each ecosystem: this script then answers pip-audit in the server's stead, on this machine alone.
"""

import contextlib
import json
import subprocess
import sys
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
# That of `predict` is a part of the first.
LOCKS = ("requirements.lock", "requirements-extras.lock", "requirements-audit.lock")

Records = dict[str, list[dict[str, Any]]]


def read_records(copy: Path) -> Records:
    """By the name of the package."""
    records: Records = defaultdict(list)
    with zipfile.ZipFile(copy) as packed:
        for member in packed.namelist():
            if member.endswith(".json"):
                record = json.loads(packed.read(member))
                for affected in record.get("affected", []):
                    if affected.get("package", {}).get("ecosystem") == "PyPI":
                        records[canonicalize_name(affected["package"]["name"])].append(record)
    return records


def is_affected(record: dict[str, Any], name: str, version: str) -> bool:
    """As OSV's schema says: the version is listed, or lies between two events of a range."""
    for affected in record["affected"]:
        if canonicalize_name(affected.get("package", {}).get("name", "")) != name:
            continue
        if version in affected.get("versions", []):
            return True
        ranges = [found["events"] for found in affected.get("ranges", []) if found["type"] == "ECOSYSTEM"]
        if any(_is_within(Version(version), events) for events in ranges):
            return True
    return False


def _is_within(version: Version, events: list[dict[str, str]]) -> bool:
    within = False
    for event in sorted(events, key=_place):
        ((kind, at),) = event.items()
        place = _version(at)
        if kind == "introduced" and version >= place:
            within = True
        elif (kind == "fixed" and version >= place) or (kind == "last_affected" and version > place):
            within = False
    return within


def _place(event: dict[str, str]) -> Version:
    return _version(next(iter(event.values())))


def _version(text: str) -> Version:
    """A record may name what is none: then nothing is before it."""
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")


@contextlib.contextmanager
def answering(records: Records) -> Iterator[str]:
    """The address, on loopback, of a server that answers queries as OSV's does."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, version = canonicalize_name(query["package"]["name"]), query["version"]
            found = [record for record in records.get(name, []) if is_affected(record, name, version)]
            body = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody asked."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()


def audit(*options: str) -> int:
    """1 where a pinned package has a known vulnerability, else 0."""
    common = ["--disable-pip", "--progress-spinner=off", "--vulnerability-service", "osv", *options]
    return max(_audit(lock, common) for lock in LOCKS)


def _audit(lock: str, options: list[str]) -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / lock), *options]
    print(f"{lock}: ", end="", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if "Traceback" in done.stderr:
        sys.exit(f"error: {done.stderr.splitlines()[-1]}\nWithout a network, give a copy of the records: OSV=all.zip")
    print(done.stderr, end="")
    return done.returncode


def main(copy: str | None) -> int:
    if copy is None:
        return audit()
    try:
        records = read_records(Path(copy))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        sys.exit(f"error: {copy}: no copy of OSV's records ({error}); give the ZIP that it offers of PyPI")
    print(f"{copy}: records of {len(records)} packages")
    with answering(records) as address:
        return audit("--osv-url", address)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if sys.argv[1:] else None))
