"""What stands before a service: API key, body size, requests in work. Pure ASGI, answers before the body is read where it can."""

from __future__ import annotations

import hmac
import os
from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medsae.errors import ConfigError


def api_key(variable: str | None) -> str | None:
    """The key in the environment variable; None where no variable is named.

    Raises:
        ConfigError: one is named and empty: the service then does not start, rather than start open.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"api_key_env names {variable}, which is not set: put the key there before Ray starts")
    return key


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as one line of JSON."""
    return JSONResponse({"error": {"code": status, "message": " ".join(message.split())}}, status, headers)


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        key_env: environment variable of the key that requests must bear, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; None asks for none. Read
            where the guard runs, so that the key is no part of what Serve stores of an application.
        max_body: bytes of a request's body.
        max_in_work: POST requests in work; one more is answered 429.
        retry_after: seconds that a caller is told to wait.
        open_paths: paths that need no key (health checks).
    """

    def __init__(
        self,
        app: ASGIApp,
        key_env: str | None,
        max_body: int,
        max_in_work: int,
        retry_after: int = 2,
        open_paths: Collection[str] = ("/healthz", "/readyz"),
    ) -> None:
        self.app, self.key, self.max_body, self.max_in_work = app, api_key(key_env), max_body, max_in_work
        self.retry_after, self.open_paths = retry_after, frozenset(open_paths)
        self.in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        # Behind a route prefix `path` still holds it, and `root_path` says which.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.key is not None and path not in self.open_paths and not _bears(headers, self.key):
            await error(401, "missing or wrong API key: send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.max_body:
            await self._too_large()(scope, receive, send)
        elif scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif self.in_work >= self.max_in_work:
            await error(429, "the service is busy, try again later", {"Retry-After": str(self.retry_after)})(scope, receive, send)
        else:
            await self._post(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.in_work += 1
        try:
            body = await read_body(receive, self.max_body)
            if body is None:
                await self._too_large()(scope, receive, send)
            else:
                await self.app(scope, replay(body, receive), send)
        finally:
            self.in_work -= 1

    def _too_large(self) -> JSONResponse:
        return error(413, f"the body is larger than {self.max_body} bytes")


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """The body; None once it is larger than `limit`, whatever length was announced."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            return None
        if not message.get("more_body", False):
            return b"".join(pieces)


def _bears(headers: dict[bytes, bytes], key: str) -> bool:
    scheme, _, told = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        told = headers.get(b"x-api-key", b"")
    return hmac.compare_digest(told.strip(), key.encode())


def replay(body: bytes, receive: Receive) -> Receive:
    """Hands out the body that was read, then whatever comes (a disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
