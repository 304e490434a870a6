"""Ray, found or begun: on this machine for as long as a sweep takes, or the cluster at an address."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import ArgumentError, StageError
from pipelines.lineage import ROOT
from pipelines.numbers import counted
from pipelines.settings.params import Params
from pipelines.sweeps.board import demands
from pipelines.variables import python_path, set_for_now

_ANSWER = 15.0  # seconds that a cluster has to answer in
_LONGEST_FOLDER = 40  # characters before those of Ray's sockets, whose paths may have 107
_CODE = ("anomaly_models", "pipelines")
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
# Nothing is told to Ray's makers; and what it is to do with GPUs of a cell that reserves none, which it asks for
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# What to ask a cluster's head at its port, and at that for clients, by the scheme of its address: Ray's own questions
_ASK = {
    "": "import sys; from ray.scripts.scripts import cli; cli(['health-check', '--address', sys.argv[1]])",
    "ray": """
import sys
import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.ray_client_pb2 import ClusterInfoRequest, ClusterInfoType
from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub

try:
    RayletDriverStub(init_grpc_channel(sys.argv[1])).ClusterInfo(ClusterInfoRequest(type=ClusterInfoType.PING))
except grpc.RpcError as error:
    sys.exit(f"{error.code().name}: {error.details()}")
""",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Ray, when this process is connected to it."""

    ray: Any
    is_local: bool

    @property
    def nodes(self) -> list[dict[str, float]]:
        """What each machine that is alive has."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    @property
    def total(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for node in self.nodes:
            for name in ("CPU", "GPU", "memory"):
                found[name] = found.get(name, 0.0) + node.get(name, 0.0)
        return found

    def in_use(self) -> str:
        total, free = self.total, self.ray.available_resources()
        used = [
            f"{total[name] - free.get(name, 0.0):.3g} of {total[name]:.3g} {name}s"
            for name in ("CPU", "GPU")
            if total.get(name)
        ]
        return f"{' and '.join(used)} in use on {counted(len(self.nodes), 'machine')}"

    def require_room(self, params: Params) -> None:
        """Every model's cells find a machine that has what they reserve.

        Raises:
            ArgumentError: those of a model do not.
        """
        nodes = self.nodes
        for model in params.models:
            wanted = demands(params.sweep.of(model))
            if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
                continue
            most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
            lacking = {name: amount for name, amount in wanted.items() if most[name] < amount} or wanted
            asked = " and ".join(_amount(name, amount) for name, amount in lacking.items())
            there = " and ".join(_amount(name, most[name]) for name in lacking)
            raise ArgumentError(
                f"a cell of {model} wants {asked}, and no machine has it: the most that one has is {there}; lower "
                "sweep in params.yaml, or add a machine"
            )

    def require_server(self, tracking: str) -> None:
        """Raises ArgumentError where other machines would write to a file of this one."""
        here = socket.gethostname()
        others = {node["NodeManagerHostname"] for node in self.ray.nodes() if node["Alive"]} - {here}
        if others and not tracking.startswith("http"):
            raise ArgumentError(
                f"cells on {', '.join(sorted(others)[:3])} need an MLflow server: start one (deploy/team has it), and "
                "set MLFLOW_TRACKING_URI to its address"
            )


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**30:.3g} GiB of memory" if name == "memory" else f"{amount:.3g} {name}s"


@contextlib.contextmanager
def connected(address: str | None, jobs: int, words: Path) -> Iterator[Cluster]:
    """Ray on this machine, for `jobs` CPUs and with all that it begins gone afterwards, or the cluster at an address.

    What Ray says by itself goes to the file `words`.

    Raises:
        ArgumentError: Ray is not installed, or no cluster answers at the address, or not to this token.
        StageError: Ray does not start here.
    """
    if importlib.util.find_spec("ray") is None:
        raise ArgumentError("a sweep needs Ray: pip install 'blemish[ray]', or use `blemish run`")
    words.parent.mkdir(parents=True, exist_ok=True)
    begun = _local(jobs) if address is None else _remote(address)
    with (
        words.open("a", encoding="utf-8") as file,
        contextlib.redirect_stderr(file),
        contextlib.redirect_stdout(file),
        begun as cluster,
    ):
        yield cluster


@contextlib.contextmanager
def _local(jobs: int) -> Iterator[Cluster]:
    """Nobody else's: on the loopback, with a token of its own."""
    base = tempfile.gettempdir()
    short = base if len(base) <= _LONGEST_FOLDER - len("/blemish-ray-12345678") else "/tmp"  # noqa: S108
    with (
        tempfile.TemporaryDirectory(prefix="blemish-ray-", dir=short, ignore_cleanup_errors=True) as folder,
        set_for_now(**_SETTINGS, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)),
    ):
        import ray  # which reads the environment then, and never again

        try:
            try:
                ray.init(
                    "local",
                    num_cpus=jobs,
                    include_dashboard=False,
                    runtime_env={"env_vars": {"PYTHONPATH": python_path(ROOT)}},
                    _temp_dir=folder,
                    _node_ip_address="127.0.0.1",
                    **_QUIET,
                )
            except Exception as error:  # Ray raises many kinds, of its own and others
                said = _reason(error)
                raise StageError(f"Ray does not start here ({said}): call again, or use `blemish run`") from None
            yield Cluster(ray, True)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _remote(address: str) -> Iterator[Cluster]:
    """The code travels along, so that all machines compute the same."""
    has_token = any(name in os.environ for name in _TOKEN) or (Path.home() / ".ray" / "auth_token").exists()
    mode = os.environ.get("RAY_AUTH_MODE", "token" if has_token else "disabled")
    with set_for_now(**_SETTINGS, RAY_AUTH_MODE=mode), tempfile.TemporaryDirectory() as folder:
        _require_answer(address)
        for name in _CODE:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "cli.py", folder)
        import ray

        try:
            ray.init(address, runtime_env={"working_dir": folder}, **_QUIET)
        except Exception as error:  # Ray raises many kinds, of its own and others
            raise ArgumentError(f"Ray at {address}: {_reason(error)}") from None
        try:
            yield Cluster(ray, False)
        finally:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Ask in a process of its own: Ray's library waits long, and ends the process that it is in."""
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdecimal():
        raise ArgumentError(f"address '{address}': give that of a Ray cluster, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ArgumentError(
            f"Ray at {address} does not answer ({_reason(error)}): start it there with `ray start --head`"
        ) from None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK[scheme], place], capture_output=True, text=True, timeout=_ANSWER, check=False
        )
    except subprocess.TimeoutExpired:
        raise ArgumentError(f"Ray at {address} does not answer as Ray does: is it that of a cluster's head?") from None
    if "AuthenticationError" in done.stderr or "UNAUTHENTICATED" in done.stderr:
        raise ArgumentError(
            f"Ray at {address} refuses the token: set RAY_AUTH_TOKEN to the cluster's, or put it into ~/.ray/auth_token"
        )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise ArgumentError(f"Ray at {address} cannot be used: {said[-1]}")


def _reason(error: BaseException) -> str:
    """One line: where the first announces what another process has said, its last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip() if lines[0].endswith(":") else lines[0]
