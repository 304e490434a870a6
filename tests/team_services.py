"""What a team shares, started for real on this machine: PostgreSQL, an MLflow server on it, an OpenSSH server."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import requests

PATIENCE = 120.0  # seconds that a server may take to answer
PASSWORD = "not a secret"  # of a database that lives as long as a test


def program(name: str) -> str | None:
    """Debian keeps PostgreSQL's out of the way, where several versions may be."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), Path("/usr/sbin")]
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))


def missing() -> list[str]:
    """What is not installed here of what the servers are."""
    return [name for name in ("initdb", "postgres", "sshd", "ssh-keygen") if program(name) is None]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def until(answers: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            answers()
            return
        except (OSError, psycopg.Error, requests.RequestException):
            if time.monotonic() > end:
                raise TimeoutError(f"{what} does not answer") from None
            time.sleep(0.1)


@contextlib.contextmanager
def running(command: list[str], log: Path, user: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """In a group of its own, which ends with the block."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, user=user, env=environment
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True, slots=True)
class Database:
    """A cluster of PostgreSQL, which refuses to run as root."""

    folder: Path
    port: int
    user: str | None  # of the system

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg://team:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.port}/mlflow"

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        options = ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        command = [str(program("postgres")), "-D", str(self.folder / "data"), *options]
        with running(command, self.folder / "log", self.user):
            until(lambda: self.connect("postgres").close(), "PostgreSQL")
            yield

    def connect(self, name: str) -> "psycopg.Connection[tuple[object, ...]]":
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="team", password=PASSWORD, dbname=name, autocommit=True
        )


@contextlib.contextmanager
def database() -> Iterator[Database]:
    """An empty one called "mlflow", not started; with a password, as a team's is."""
    user = "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's folders are closed to other users
        folder = Path(place)
        (folder / "password").write_text(PASSWORD)
        if user is not None:
            owner = pwd.getpwnam(user)
            for path in (folder, folder / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        arguments = ["--username=team", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--locale=C.UTF-8"]
        command = [str(program("initdb")), f"--pgdata={folder / 'data'}", "--no-sync", *arguments]
        subprocess.run(command, check=True, capture_output=True, user=user)
        found = Database(folder, free_port(), user)
        with found.started(), found.connect("postgres") as connection:
            connection.execute("CREATE DATABASE mlflow")
        yield found


@contextlib.contextmanager
def tracking_server(folder: Path, store: str) -> Iterator[str]:
    """MLflow's own, through which artifacts pass; gives its address."""
    port = free_port()
    arguments = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    with running([sys.executable, "-m", "mlflow", "server", *arguments, *address], folder / "mlflow.log"):
        uri = f"http://127.0.0.1:{port}"
        until(lambda: requests.get(f"{uri}/health", timeout=5).raise_for_status(), "the MLflow server")
        yield uri


@contextlib.contextmanager
def bucket(folder: Path, name: str) -> Iterator[str]:
    """An empty one, at moto's server, which speaks S3; gives its address."""
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "--port", str(port)], folder / "s3.log"):
        endpoint = f"http://127.0.0.1:{port}"
        until(lambda: requests.get(endpoint, timeout=5).raise_for_status(), "the S3 server")
        requests.put(f"{endpoint}/{name}", timeout=5).raise_for_status()
        yield endpoint


@dataclass(frozen=True, slots=True)
class SecureShell:
    """A server for whoever has the key, and a folder there."""

    port: int
    key: Path
    known_hosts: Path
    folder: Path

    @property
    def url(self) -> str:
        return f"ssh://{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1:{self.port}{self.folder}"


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[SecureShell]:
    folder.mkdir()
    for name in ("host", "client"):
        key = ["-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run([str(program("ssh-keygen")), "-q", *key], check=True)
    found = SecureShell(free_port(), folder / "client", folder / "known_hosts", folder / "remote")
    found.folder.mkdir()
    public = (folder / "host.pub").read_text().split()[:2]
    found.known_hosts.write_text(f"[127.0.0.1]:{found.port} {' '.join(public)}\n")
    settings = {
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "client.pub",
        "PidFile": "none",
        "StrictModes": "no",  # of folders that a test makes
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)  # without which it does not start as root
    command = [str(program("sshd")), "-D", "-e", "-f", str(folder / "config"), "-p", str(found.port)]
    with running([*command, "-o", "ListenAddress=127.0.0.1"], folder / "log"):
        until(lambda: socket.create_connection(("127.0.0.1", found.port), 5).close(), "the OpenSSH server")
        yield found
