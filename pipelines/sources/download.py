"""Data sets by name: fetched, drawn, or taken from a package. A data set's folder is whole or not there."""

import gzip
import hashlib
import lzma
import shutil
import tarfile
import time
import zipfile
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import requests
from pydantic import BaseModel, BeforeValidator, ConfigDict
from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TaskID, TransferSpeedColumn
from urllib3.exceptions import HTTPError, MaxRetryError

from anomaly_models.common.settings import Settings
from pipelines.errors import BlemishError, DownloadError, ParamsError
from pipelines.files import DiskFull, atomic_folder, full_disk, reporting_full_disk
from pipelines.memory import out_of_memory
from pipelines.progress import counting, progress_bar
from pipelines.sources import demo_data, solar_cells
from pipelines.sources.catalogue import SOURCES, Source, Terms

_CHUNK = 1 << 16  # bytes; what has come of one is lost when the connection breaks
_INFLATED, _NO_BOMB = 20, 10**9  # as many times its size, or bytes, an archive may unpack to
_TIMEOUT = (15.0, 60.0)  # seconds: to connect, and without a byte
_PAUSES = (1.0, 4.0)  # seconds between the three tries
_TRANSIENT = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}  # and every 5xx


class ArchiveConfig(Settings):
    """`archive`: "official", the URL of a mirror, or the path of a local file, which is left where it is."""

    archive: str

    def url(self, source: Source) -> str | None:
        """Where to fetch it; None for a local file."""
        if self.archive == "official":
            return source.url
        return self.archive if self.archive.lower().startswith(("http://", "https://")) else None


def _refuse_unknown(_config: object) -> object:
    raise ValueError(f"unknown data set; known: {', '.join(DownloadParams.model_fields)}")


class DownloadParams(Settings):
    """The section `download`: each data set that is wanted, by name. One that is not wanted is left out."""

    # as good as "forbid", but the message lists what is known, beside the problems of the other entries
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, BeforeValidator(_refuse_unknown)]]

    demo: demo_data.DemoConfig | None = None
    demo_textures: demo_data.DemoTexturesConfig | None = None
    mvtec_ad: ArchiveConfig | None = None
    dtd: ArchiveConfig | None = None
    imagenette: ArchiveConfig | None = None
    elpv: solar_cells.SolarCellsConfig | None = None

    def wanted(self) -> dict[str, BaseModel]:
        """Each data set that the section names, in the order of the fields above."""
        return {name: config for name, config in self if config is not None}


def download(name: str, params: DownloadParams, data_dir: Path, console: Console) -> None:
    """Make `data_dir/<name>`, replacing what was there once the new folder is whole. Progress goes to `console`.

    An interrupted download leaves `data_dir/.archives/*.part`, from which the next one goes on.

    Raises:
        ParamsError: `name` is not in `params`.
        DownloadError: the archive cannot be had, is not the published one, or cannot be extracted.
        DatasetError: the package that holds it is not installed, is another, or holds less than is wanted.
        DiskFull: there is no room for it.
    """
    if name not in DownloadParams.model_fields:
        known = ", ".join(DownloadParams.model_fields)
        raise ParamsError(f"data set '{name}': unknown; known: {known}")
    config = params.wanted().get(name)
    if config is None:
        listed = ", ".join(params.wanted())
        raise ParamsError(f"data set '{name}': not in the section 'download' of params.yaml, which lists: {listed}")
    if isinstance(config, ArchiveConfig):
        acquire(name, config, data_dir, console)
    elif isinstance(config, solar_cells.SolarCellsConfig):
        _take(name, config, data_dir / name, console)
    else:
        _draw(name, config, data_dir / name, console)


def acquire(name: str, config: ArchiveConfig, data_dir: Path, console: Console) -> None:
    """Make `data_dir/<name>` from the archive of SOURCES[name], as `download` does, errors included."""
    source = SOURCES[name]
    _state(source, console)
    with progress_bar(console, DownloadColumn(binary_units=False), TransferSpeedColumn()) as progress:
        _Acquisition(name, source, data_dir, progress).make(config)


def _state(terms: Terms, console: Console) -> None:
    console.print(terms.sentence(), markup=False, highlight=False, soft_wrap=True)


def _take(name: str, config: solar_cells.SolarCellsConfig, folder: Path, console: Console) -> None:
    _state(solar_cells.TERMS, console)
    with counting(console, f"{name}: copying", MofNCompleteColumn()) as show, atomic_folder(folder) as temporary:
        solar_cells.place_cells(temporary, config, show)


def _draw(name: str, config: BaseModel, folder: Path, console: Console) -> None:
    with counting(console, f"{name}: drawing", MofNCompleteColumn()) as show, atomic_folder(folder) as temporary:
        if isinstance(config, demo_data.DemoConfig):
            demo_data.draw_demo(temporary, config, show)
        else:
            assert isinstance(config, demo_data.DemoTexturesConfig)
            demo_data.draw_textures(temporary, config, show)


@dataclass(frozen=True, slots=True)
class _Acquisition:
    """One archive on its way to `data_dir/<name>`."""

    name: str
    source: Source
    data_dir: Path
    progress: Progress

    @property
    def remedy(self) -> str:
        return f"set download.{self.name}.archive to a mirror's URL or a local copy of {self.source.file_name}"

    def make(self, config: ArchiveConfig) -> None:
        url = config.url(self.source)
        archive = self.verified_local(Path(config.archive).expanduser()) if url is None else self.fetched(url)
        self.extract(archive)
        if url is not None:
            archive.unlink()

    def verified_local(self, archive: Path) -> Path:
        if not archive.is_file():
            raise DownloadError(
                f"download.{self.name}.archive: no such file '{archive}'; {self.remedy}, or to 'official'"
            )
        if mismatch := self.mismatch(archive):
            raise DownloadError(f"{archive}: {mismatch}; it is not {self.source.file_name} as published: {self.remedy}")
        return archive

    def fetched(self, url: str) -> Path:
        """The verified archive, from an earlier run that could not extract it or from `url`."""
        folder = self.data_dir / ".archives"
        archive = folder / self.source.file_name
        if archive.is_file():
            if self.mismatch(archive) is None:
                return archive
            archive.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{archive.name}.part"
        _Fetch(url, part, self).run()
        if mismatch := self.mismatch(part):
            part.unlink()
            raise DownloadError(f"{url}: {mismatch}; the file is deleted: try again, or {self.remedy}")
        part.replace(archive)
        return archive

    def mismatch(self, archive: Path) -> str | None:
        """What distinguishes the file from the published one: its size where that is known, else its SHA-256."""
        size = archive.stat().st_size
        if self.source.size is not None and size != self.source.size:
            return f"size is {size:,} bytes, expected {self.source.size:,}"
        digest = hashlib.sha256()
        task = self.progress.add_task(f"{self.name}: verifying", total=size)
        with archive.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                self.progress.advance(task, len(chunk))
        found = digest.hexdigest()
        return None if found == self.source.sha256 else f"SHA-256 is {found}, expected {self.source.sha256}"

    def check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.data_dir).free
        if free < needed:
            raise DiskFull(
                f"{self.data_dir}: {self.name} needs {needed / 1e9:.1f} GB there and {free / 1e9:.1f} GB are free; "
                "free some space and run again"
            )

    def extract(self, archive: Path) -> None:
        folder = self.data_dir / self.name
        self.data_dir.mkdir(parents=True, exist_ok=True)
        # images are compressed already: they take about the room that the archive takes
        self.check_space(archive.stat().st_size)
        with atomic_folder(folder) as temporary:
            try:
                if self.source.packing == "zip":
                    self.unpack_zip(archive, temporary)
                else:
                    self.unpack_tar(archive, temporary, self.source.packing)
            except Exception as error:  # tarfile and zipfile raise nearly any class on damaged bytes
                if isinstance(error, BlemishError) or full_disk(error) or out_of_memory(error):
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DownloadError(f"{archive}: damaged, cut short or unsafe ({reason}); {self.remedy}") from error
            if self.source.top_folder is not None:
                _move_up(temporary, self.source.top_folder)
            missing = [name for name in self.source.contents if not (temporary / name).exists()]
            if missing:
                raise DownloadError(f"{archive}: holds no {', '.join(missing)}; {self.remedy}")

    def unpack_tar(self, archive: Path, target: Path, packing: Literal["tar.gz", "tar.xz"]) -> None:
        task = self.progress.add_task(f"{self.name}: extracting", total=archive.stat().st_size)
        # "r|": read once from front to back; a seek would decompress everything before it anew
        with (
            archive.open("rb") as compressed,
            _decompress(compressed, packing) as decompressed,
            tarfile.open(fileobj=decompressed, mode="r|") as members,
        ):
            known = _Members(archive)
            for member in members:
                known.add(member.name, member.size)
                self.check_space(member.size)
                members.extract(member, target, filter="data")
                self.progress.update(task, completed=compressed.tell())
            while decompressed.read(_CHUNK):
                pass  # to the end, where a cut shows and the checksum is compared

    def unpack_zip(self, archive: Path, target: Path) -> None:
        with zipfile.ZipFile(archive) as packed:
            members = packed.infolist()
            known = _Members(archive)
            for member in members:
                known.add(member.filename, member.file_size)  # no member gives more than it states
            self.check_space(known.size)
            task = self.progress.add_task(f"{self.name}: extracting", total=known.size)
            for member in members:
                packed.extract(member, target)
                self.progress.advance(task, member.file_size)


class _Members:
    """What an archive holds so far: pictures are compressed already, so one that inflates holds something else."""

    def __init__(self, archive: Path) -> None:
        self._most = max(_INFLATED * archive.stat().st_size, _NO_BOMB)
        self.size = 0
        self._names: dict[str, str] = {}

    def add(self, name: str, size: int) -> None:
        """Raises ValueError: too much, or a name that another system takes for one that is there."""
        self.size += size
        if self.size > self._most:
            raise ValueError(f"it would unpack to more than {self._most / 1e9:.1f} GB")
        other = self._names.setdefault(name.casefold().rstrip("/"), name.rstrip("/"))
        if other != name.rstrip("/"):
            raise ValueError(f"{other} and {name} are one file where case does not count")


def _decompress(file: IO[bytes], packing: Literal["tar.gz", "tar.xz"]) -> gzip.GzipFile | lzma.LZMAFile:
    return gzip.open(file) if packing == "tar.gz" else lzma.open(file)


def _move_up(folder: Path, name: str) -> None:
    """Move what `folder/name` holds into `folder`; nothing where there is no such folder."""
    inner = folder / name
    if inner.is_dir():
        for path in list(inner.iterdir()):
            path.replace(folder / path.name)
        inner.rmdir()


class _TransientError(Exception):
    """What another try may mend."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    """A URL on its way to the file `part`. Whose bytes `part` begins with does not matter: the SHA-256 decides."""

    url: str
    part: Path
    acquisition: _Acquisition

    def run(self) -> None:
        """Fetch what is missing of `part`. Three tries in a row that bring it no further are the end."""
        size = self.acquisition.source.size
        if size is not None and self.num_bytes() == size:
            return  # whole, though killed before it was verified
        task = self.acquisition.progress.add_task(f"{self.acquisition.name}: downloading", total=size)
        furthest = self.num_bytes()
        failures = 0
        while True:
            try:
                self.attempt(task)
                return
            except (_TransientError, requests.ConnectionError, requests.Timeout, HTTPError) as error:
                failures = 1 if self.num_bytes() > furthest else failures + 1
                furthest = max(furthest, self.num_bytes())
                if failures > len(_PAUSES):
                    raise DownloadError(
                        f"{self.url}: {_reason(error)} ({failures} tries); run again to go on after "
                        f"{self.num_bytes():,} bytes, or {self.acquisition.remedy}"
                    ) from error
                time.sleep(_PAUSES[failures - 1])
            except requests.RequestException as error:  # a URL that is none, endless redirects
                raise DownloadError(f"{self.url}: {_reason(error)}; {self.acquisition.remedy}") from error

    def num_bytes(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self, task: TaskID) -> None:
        """One request for what is missing of `part`; it begins anew where the server knows no ranges."""
        offset = self.num_bytes()
        # the archive as it is: a server may offer to compress it once more, or to send a .tar.gz decompressed
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        with requests.get(self.url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if offset and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing is missing; what there may be too much, the SHA-256 tells
            self.check_status(response)
            if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                offset = 0
            length = response.headers.get("Content-Length", "")
            total = offset + int(length) if length.isdecimal() else None
            self.check_size(total, offset)
            self.acquisition.progress.update(task, completed=offset, total=total)
            self.receive(response, task, resumed=offset > 0)

    def check_status(self, response: requests.Response) -> None:
        if response.ok:
            return
        answer = f"HTTP {response.status_code} {response.reason}"
        if response.status_code in _TRANSIENT or response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _TransientError(answer)
        raise DownloadError(f"{self.url}: {answer}; {self.acquisition.remedy}")

    def check_size(self, total: int | None, offset: int) -> None:
        """Before the first byte: is it the published file, and is there room for it and for what it holds?"""
        if total is None:
            return
        expected = self.acquisition.source.size
        if expected is not None and total != expected:
            raise DownloadError(
                f"{self.url}: {total:,} bytes are offered, expected {expected:,}; {self.acquisition.remedy}"
            )
        self.acquisition.check_space(total - offset + total)

    def receive(self, response: requests.Response, task: TaskID, resumed: bool) -> None:
        try:
            with reporting_full_disk(self.part), self.part.open("ab" if resumed else "wb") as file:
                for chunk in response.raw.stream(_CHUNK, decode_content=False):
                    file.write(chunk)
                    self.acquisition.progress.advance(task, len(chunk))
        except DiskFull as error:
            raise DiskFull(
                f"{self.part}: the disk is full; what was fetched is kept: free some space and run again to go on"
            ) from error


def _reason(error: Exception) -> str:
    """One line: the cause, without the layers that requests and urllib3 put about it."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    cause = error.args[0] if isinstance(error, requests.ConnectionError) and error.args else error
    if isinstance(cause, MaxRetryError):
        cause = cause.reason
    return " ".join(str(cause).split())
