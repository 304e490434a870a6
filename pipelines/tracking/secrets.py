"""Passwords in the address of a tracking store: kept out of messages, and out of whatever else is printed.

An address may hold them before an @ (`http://user:password@host`), or in its query (`?password=`). People forget to
percent-encode them: an @ or a / in a password leaves no way of telling where it ends, so that less is shown then.
"""

import base64
import contextlib
import html
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast
from urllib.parse import quote, unquote

from pipelines.errors import BlemishError
from pipelines.memory import out_of_memory

_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "BLEMISH_TUNE_STORAGE")
_PASSWORDS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_ADDRESS = re.compile(r"[\w+.\-]+://[^\s'\"<>]+")
_SHORTEST = 4  # characters of what is looked for in texts: all others would lose their letters for a shorter one
_LONGEST_NAME = 16  # characters of a user's name; what is longer is a token
_MASK = "***"


def without_secrets(text: str) -> str:
    """A message about the store, with every address in it as `shown`."""
    return _ADDRESS.sub(lambda found: shown(found[0]), masked(text))


def shown(address: str) -> str:
    """What an address names: without user, password and query; its scheme alone where that cannot be told apart."""
    scheme, marks, rest = address.partition("//")
    if not marks:
        return _MASK if re.search("[@?#]", address) else address  # a path, or an address whose scheme was forgotten
    if scheme.startswith(("sqlite:", "sqlite+", "file:")):
        return address.partition("?")[0]  # a file has no user
    before, _, place = rest.rpartition("@")
    if re.search("[/?#]", before):
        return f"{scheme}//{_MASK}"
    return f"{scheme}//{re.split('[?#]', place)[0]}"


def masked(text: str) -> str:
    """Any text, with the secrets of this process's environment replaced wherever they stand in it."""
    secrets = _secrets()
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, secrets[secret])
    return text


@contextlib.contextmanager
def discreet_output() -> Iterator[None]:
    """Mask what is written to stdout and stderr, also by MLflow, by threads, and by the traceback of a bug.

    Without secrets in the environment, nothing is done.
    """
    if not _secrets():
        yield
        return
    with contextlib.redirect_stdout(_discreet(sys.stdout)), contextlib.redirect_stderr(_discreet(sys.stderr)):
        try:
            yield
        except BlemishError:
            raise  # the caller's to print
        except Exception as error:  # any bug: its traceback is printed here, where it is masked, and not by Python
            if out_of_memory(error):
                raise  # likewise
            traceback.print_exc()
            sys.exit(1)


class _Discreet:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(masked(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discreet(stream: TextIO) -> TextIO:
    return cast(TextIO, _Discreet(stream))


def _secrets() -> dict[str, str]:
    """Each text that must not be printed, and what stands in its place."""
    secrets: set[str] = set()
    whole: dict[str, str] = {}
    for name in _ADDRESSES:
        address = os.environ.get(name, "")
        if shown(address) != address:
            whole[address] = shown(address)
            secrets |= _secrets_of(address)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    for password in filter(None, map(os.environ.get, _PASSWORDS)):
        secrets |= {password, _header(user, password)}
    written = {form for secret in secrets for form in _forms(secret)}
    return {**dict.fromkeys((form for form in written if len(form) >= _SHORTEST), _MASK), **whole}


def _secrets_of(address: str) -> set[str]:
    """Passwords and values of the query; and their pieces, of which a client may print one that it takes for a host."""
    rest = address.partition("//")[2] or address
    login = rest.rpartition("@")[0]
    user, _, password = login.partition(":")
    values = [pair.partition("=")[2] or pair for pair in re.split("[&;]", rest.partition("?")[2])]
    secrets = {password, *values}
    if not password or len(user) > _LONGEST_NAME:
        secrets.add(user)
    pieces = {piece for secret in secrets for piece in re.split("[:@/?#&=;]", secret)}
    return secrets | pieces | {_header(unquote(user), unquote(password))}


def _header(user: str, password: str) -> str:
    """What a request carries, which a server may send back."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _forms(secret: str) -> set[str]:
    """A secret as clients and tracebacks may write it."""
    return {secret, unquote(secret), quote(secret), quote(secret, safe=""), repr(secret)[1:-1], html.escape(secret)}
