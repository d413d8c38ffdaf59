"""What stands before every request: its key, and how large its body may be and how long that may take."""

from __future__ import annotations

import asyncio
import hmac

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health",)


def problem(status: int, message: str, code: str | None = None, retry: bool = False) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if retry else None
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers)


class Guard:
    """An ASGI application in front of another one.

    Args:
        app: the other one.
        key: that a request has to have as `Authorization: Bearer KEY`, but for /health.
        largest: bytes of a body.
        seconds: that a body may take to arrive.
    """

    def __init__(self, app: ASGIApp, key: str, largest: int, seconds: float) -> None:
        self.app, self.key, self.largest, self.seconds = app, f"Bearer {key}".encode(), largest, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and not hmac.compare_digest(headers.get(b"authorization", b""), self.key):
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
