"""Who may enter: nobody without the key, except to see that the server lives and to load the page.

The rule is default-deny: a route is closed unless it is named in OPEN; a route added later is closed by itself. Keys
are compared as SHA-256 digests, in a time that tells nothing about them, and a Key cannot be printed.

Without a key, a server that only this machine reaches can still be reached by every page that its browsers show: the
page's own name is made to mean 127.0.0.1 (DNS rebinding), and for the browser server and page are then one site. Such
a request has the page's name in Host; so without a key only names are answered that nobody else can give away.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skymoe.base.errors import ConfigError
from skymoe.base.inside import read_bounded
from skymoe.serve.errors import ApiError

OPEN = frozenset({"/", "/health", "/ready"})
STATIC = "/static/"
KEY_VARIABLE = "SKYMOE_API_KEY"
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

_HOST = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::[0-9]*)?")
_MIN_KEY = 16
_MAX_KEY = 1024
_MAX_KEY_FILE = 4096


class Key:
    """An API key, of which only a digest is kept."""

    def __init__(self, text: str) -> None:
        self._digest = _digest(text.encode())

    def fits(self, given: bytes) -> bool:
        """Whether `given` is the key."""
        return hmac.compare_digest(self._digest, _digest(given))


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def read_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> Key | None:
    """The key from `file`, else from SKYMOE_API_KEY; None when there is neither.

    Raises:
        ConfigError: too short or too long, or no printable ASCII. The message does not repeat it.
    """
    if file is not None:
        text, where = read_bounded(file, max_bytes=_MAX_KEY_FILE).decode("utf-8", "replace").split("\n")[0], str(file)
    else:
        text, where = environment.get(KEY_VARIABLE, ""), f"environment {KEY_VARIABLE}"
        if not text:
            return None
    text = text.strip()
    if not _MIN_KEY <= len(text) <= _MAX_KEY or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(
            f"an API key has {_MIN_KEY} to {_MAX_KEY} characters of printable ASCII without spaces",
            where=where,
            hint='make one: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    return Key(text)


def check_bind(host: str, *, has_key: bool, insecure: bool) -> None:
    """Refuse to listen where others can reach the server, unless they need a key. Raises ConfigError."""
    if has_key or insecure or is_loopback(host):
        return
    raise ConfigError(
        f"{host} can be reached by other machines, and no API key is set",
        where="--host",
        hint=f"set {KEY_VARIABLE} or --api-key-file; --insecure-no-auth listens there without",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost could be anything."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_our_host(value: str, host: str) -> bool:
    """Whether a Host header, with any port or none, is localhost, an address, or `host`, the name we listen under.

    Addresses and localhost are looked up nowhere, so nobody can make them mean another machine.
    """
    match = _HOST.fullmatch(value)
    if match is None:
        return False
    inside, plain = match.groups()
    if plain is not None and plain.lower() in ("localhost", host.lower()):
        return True
    try:
        return ip_address(plain if inside is None else inside).version == (4 if inside is None else 6)
    except ValueError:
        return False


class Gate:
    """ASGI middleware: the key at the door, and headers that keep a browser from mischief on every answer.

    Args:
        app: what is behind the door.
        key: who has it may enter; None lets everybody in who means this server (loopback).
        host: the name or address that the server listens under.
    """

    def __init__(self, app: ASGIApp, *, key: Key | None, host: str) -> None:
        self._app = app
        self._key = key
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)  # the page has a stricter policy of its own
            await send(message)

        if self._key is None and not self._is_meant(scope):
            await _misdirected().response()(scope, receive, send_safely)
        elif self._may_enter(scope):
            await self._app(scope, receive, send_safely)
        else:
            await _unauthorized().response()(scope, receive, send_safely)

    def _is_meant(self, scope: Scope) -> bool:
        """HTTP/1.0 may leave Host out; browsers never do."""
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        return all(is_our_host(value, self._host) for value in given)

    def _may_enter(self, scope: Scope) -> bool:
        path = scope["path"]
        return self._key is None or path in OPEN or path.startswith(STATIC) or self._has_key(self._key, scope)

    def _has_key(self, key: Key, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, text = given[0].partition(b" ")
        return bool(key.fits(text.strip()) and scheme.lower() == b"bearer")


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "this server needs its API key: `Authorization: Bearer KEY`",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _misdirected() -> ApiError:
    return ApiError(
        421,
        "without an API key this server answers to localhost, to addresses, and to the name given by --host",
        code="unknown_host",
    )
