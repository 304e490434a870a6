"""What a sweep costs by the number of its cells: seconds, bytes, requests to MLflow.

Run `python benchmarks/sweep.py [CELLS ...]`, whole tens; 10, 100 and 300 if none are given, half an hour on two cores.
Cells are as small as they can be (FAPM on drawn parts of 64 pixels), so that what shows is what stands around them. The
requests are those of the first number, to a server of their own.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import requests
import yaml

ROOT = Path(__file__).resolve().parents[1]
CATEGORIES = ["fabric", "gear", "bracket", "ruler", "wood"]
BLEMISH = str(Path(sys.executable).with_name("blemish"))
KEPT = ("models", "evaluations", "exported", "metrics", "mlartifacts", "mlflow.db", "dvc.lock", ".dvc/cache", "reports")


def lay_out(root: Path, cells: int) -> None:
    root.mkdir()
    subprocess.run([BLEMISH, "init"], cwd=root, check=True, capture_output=True)
    values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    values["download"]["demo"] |= {"categories": CATEGORIES, "image_size": 64, "train": 20, "test_good": 4}
    values["download"]["demo"] |= {"test_defect": 2}
    values["data"]["categories"] = CATEGORIES
    fapm = values["models"]["fapm"] | {"image_size": 64, "crop": 64, "grid": 1}
    values |= {"models": {"fapm": fapm}, "distill": {}, "textures": {}}
    values["train"]["seeds"] = list(range(cells // len(CATEGORIES)))
    values["prepare"]["surfaces"] = ["fabric"]
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def timed(root: Path, *command: str, **more: str) -> float:
    environment = os.environ | {"DVC_NO_ANALYTICS": "true", "OMP_NUM_THREADS": "1", **more}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    started = time.perf_counter()
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def measured(root: Path, cells: int) -> dict[str, float]:
    lay_out(root, cells)
    seconds = timed(root, BLEMISH, "sweep", "--jobs", "2")
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    (run,) = client.search_runs([experiment.experiment_id], "tags.stage = 'sweep'")
    found = {"cells": cells, "whole_seconds": round(seconds, 1)}
    found |= {name: round(value, 1) for name, value in run.data.metrics.items()}
    found["latency_and_report_seconds"] = round(
        seconds - (run.info.end_time - run.info.start_time) / 1000 - _before(root, run.info.start_time), 1
    )
    found["again_seconds"] = round(timed(root, BLEMISH, "sweep", "--jobs", "2"), 1)
    found["dvc_status_seconds"] = round(timed(root, "dvc", "status"), 1)
    found |= {f"megabytes {name}": round(size(root / name) / 1e6, 2) for name in KEPT if (root / name).exists()}
    return found


def _before(root: Path, start: int) -> float:
    """Seconds from the check of params.yaml until the sweep's run is open."""
    return start / 1000 - (root / "work" / "logs" / "check.log").stat().st_ctime


def requests_made(root: Path, cells: int) -> dict[str, float]:
    """By what a server writes down of each."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    root.mkdir(parents=True)
    log = root / "server.log"
    store = ["--backend-store-uri", f"sqlite:///{root / 'server.db'}", "--artifacts-destination", str(root / "files")]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--uvicorn-opts", "--access-log"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                requests.get(f"{address}/health", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.1)
        lay_out(root / "project", cells)
        for name in ("check", "download@demo", "download@demo_textures", *(f"prepare@{one}" for one in CATEGORIES)):
            timed(root / "project", "dvc", "repro", "--single-item", name)
        before = len(_asked(log))
        timed(root / "project", BLEMISH, "sweep", "--jobs", "2", MLFLOW_TRACKING_URI=address)
        asked = _asked(log)[before:]
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    sent = [line for line in asked if "mlflow-artifacts" in line]
    return {"requests_per_cell": len(asked) / cells, "of_them_files_per_cell": len(sent) / cells}


def _asked(log: Path) -> list[str]:
    return re.findall(r'"(?:GET|POST|PUT|PATCH|DELETE) [^"]+" \d+', log.read_text(encoding="utf-8"))


def main(numbers: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for cells in numbers:
            print(json.dumps(measured(Path(folder) / str(cells), cells)), flush=True)
        print(json.dumps(requests_made(Path(folder) / "server", numbers[0])))


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]] or [10, 100, 300])
