"""`blemish serve` under load: 64 clients on loopback for a minute, each of which asks again as soon as it is answered.

Run `python benchmarks/serve.py BUNDLE FOLDER_OF_PICTURES [SECONDS] [CLIENTS]`. Clients and server share the machine.
"""

import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import requests

PORT = 8765
ADDRESS = f"http://127.0.0.1:{PORT}"


class Clients:
    """Ask until the time is over; how it went."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures = itertools.cycle(pictures)
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.network: list[float] = []

    def ask(self, until: float) -> None:
        with requests.Session() as session:
            while time.monotonic() < until:
                begun = time.perf_counter()
                try:
                    response = session.post(f"{ADDRESS}/predict", data=next(self._pictures), timeout=60)
                except requests.RequestException as error:
                    self.statuses[type(error).__name__] += 1
                    continue
                self.statuses[str(response.status_code)] += 1
                if response.ok:
                    self.seconds.append(time.perf_counter() - begun)
                    self.network.append(response.json()["milliseconds"]["network"])

    def together(self, number: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.ask, args=(until,)) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main(bundle: Path, folder: Path, seconds: float = 60, number: int = 64) -> None:
    pictures = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    server = subprocess.Popen([sys.executable, "cli.py", "serve", str(bundle), "--port", str(PORT)])
    try:
        for _ in range(600):
            try:
                requests.get(f"{ADDRESS}/health", timeout=60)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        process = psutil.Process(server.pid)
        alone = Clients(pictures)
        alone.together(1, seconds / 6)
        tell("1 client", alone, seconds / 6, process)
        for part in range(3):
            many = Clients(pictures)
            many.together(number, seconds / 3)
            tell(f"{number} clients, third {part + 1}", many, seconds / 3, process)
    finally:
        server.terminate()
        server.wait()


def tell(name: str, clients: Clients, seconds: float, process: psutil.Process) -> None:
    milliseconds = [1000 * value for value in clients.seconds]
    cuts = statistics.quantiles(milliseconds, n=20)
    print(
        f"{name}: {len(milliseconds) / seconds:.1f} pictures a second, p50 {cuts[9]:.1f} ms, p95 {cuts[18]:.1f} ms, "
        f"the network's part {statistics.median(clients.network):.1f} ms; {dict(clients.statuses)}; memory "
        f"{process.memory_info().rss / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]))
