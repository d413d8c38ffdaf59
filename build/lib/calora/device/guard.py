"""What stands before every request: whom it means, its key, and how large its body may be and how long that may take."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Collection

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = frozenset({"/health"})
PORT = re.compile(rb":\d+$")


def problem(status: int, message: str, code: str | None = None, retry: bool = False) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if retry else None
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers)


class Guard:
    """An ASGI application in front of another one.

    Args:
        app: the other one.
        key: that a request has to have as `Authorization: Bearer KEY`, but for /health and `public`.
        largest: bytes of a body.
        seconds: that a body may take to arrive.
        public: paths that need no key.
        hosts: names that a request may have as `Host`, without a port; None: any. Another one is a site's whose name was made
            to lead here (DNS rebinding), which the browser takes for that site's own server.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str,
        largest: int,
        seconds: float,
        public: Collection[str] = (),
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app, self.key, self.largest, self.seconds = app, f"Bearer {key}".encode(), largest, seconds
        self.open = OPEN | set(public)
        self.hosts = None if hosts is None else {host.lower().encode() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.hosts is not None and PORT.sub(b"", headers.get(b"host", b"").lower()) not in self.hosts:
            refusal = problem(
                421, f"This server is called {', '.join(sorted(map(bytes.decode, self.hosts)))}", "wrong_host"
            )
            return await refusal(scope, receive, send)
        if scope["path"] not in self.open and not hmac.compare_digest(headers.get(b"authorization", b""), self.key):
            refusal = problem(401, "A wrong API key, or none: send `Authorization: Bearer KEY`", "invalid_api_key")
            return await refusal(scope, receive, send)
        if self._too_large(headers.get(b"content-length", b"")):
            return await problem(413, self._limit, "too_large")(scope, receive, send)
        await self.app(scope, self._counted(receive), send)

    @property
    def _limit(self) -> str:
        return f"The body may have {self.largest} bytes"

    def _too_large(self, length: bytes) -> bool:
        return length.isdigit() and (len(length) > 18 or int(length) > self.largest)

    def _counted(self, receive: Receive) -> Receive:
        """A body without a length, or with a wrong one, is counted as it comes."""
        came, whole, deadline = 0, False, asyncio.get_running_loop().time() + self.seconds

        async def counted() -> Message:
            nonlocal came, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body did not arrive within {self.seconds:g} s") from None
            came += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if came > self.largest:
                raise HTTPException(413, self._limit)
            return message

        return counted
