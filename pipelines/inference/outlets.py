"""Where decisions go when they are made: one small interface, behind which a webhook stands, or a field bus later."""

import base64
import binascii
import hashlib
import hmac
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from pipelines.errors import ArgumentError

SECRET = "BLEMISH_WEBHOOK_SECRET"  # noqa: S105  # where it is: a secret has no place among a command's arguments
_SECONDS = 10  # that a receiver has for its answer
_LATER = frozenset({408, 425, 429})  # with 500 and above: statuses of a receiver that may take it another time


class Unavailable(Exception):
    """It cannot be delivered just now; to be tried again."""


class Unwanted(Exception):
    """The receiver will not have it, now or later."""


class Outlet(Protocol):
    """Takes the record of one picture, once or, after a crash, again: `record["id"]` tells.

    Raises:
        Unavailable: not just now.
        Unwanted: never.
    """

    def deliver(self, record: Mapping[str, Any]) -> None: ...

    def __str__(self) -> str:
        """What it is called in messages."""


class Webhook:
    """Posts records as JSON, signed as Standard Webhooks 1.0.0 says, for which receivers have libraries.

    `webhook-signature` is `v1,` and the Base64 of HMAC-SHA256 over `<webhook-id>.<webhook-timestamp>.<body>`.

    Raises:
        ArgumentError: no address, or no secret.
    """

    def __init__(self, url: str, secret: str | None) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ArgumentError(f"--webhook {url}: no address of a receiver; give one such as https://host/decisions")
        if urlsplit(url).username is not None:
            raise ArgumentError(
                "--webhook: a name and a password in the address; leave them out, the signature says who"
            )
        if not secret:
            raise ArgumentError(f"--webhook: set the secret that the receiver knows, in the environment: {SECRET}=...")
        self._url, self._key = url, _key(secret)

    def __str__(self) -> str:
        return self._url.partition("?")[0]  # what stands behind it may be a key

    def deliver(self, record: Mapping[str, Any]) -> None:
        body = json.dumps(record).encode()
        name, stamp = str(record["id"]), str(int(time.time()))
        signed = hmac.digest(self._key, f"{name}.{stamp}.".encode() + body, hashlib.sha256)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": name,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }
        request = urllib.request.Request(self._url, body, headers)  # noqa: S310  # http or https, as was checked
        try:
            with _OPENER.open(request, timeout=_SECONDS):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            line = f"answers {error.code}"
            raise (Unavailable if error.code in _LATER or error.code >= _FAILING else Unwanted)(line) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(str(reason) or type(reason).__name__) from None


_FAILING = 500  # the first status that says that the receiver, not what it was sent, is to blame


class _Nowhere(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the record."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_Nowhere)


def webhook(url: str) -> Webhook:
    """With the secret that the environment holds; raises ArgumentError."""
    return Webhook(url, os.environ.get(SECRET))


def _key(secret: str) -> bytes:
    """As Standard Webhooks writes it, `whsec_` and Base64; of any other text, its bytes."""
    if secret.startswith("whsec_"):
        try:
            return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise ArgumentError(f"{SECRET}: not Base64 behind whsec_; copy it again") from None
    return secret.encode()
