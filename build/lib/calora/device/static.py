"""The page to try it: its files need no key, and may load from this server alone."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent / "page"
KINDS = {  # said here: a machine's own table may call scripts plain text, which browsers then refuse
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"
PATHS = frozenset({"/", *(f"/{file.name}" for file in FOLDER.iterdir() if file.suffix in KINDS and file.name != INDEX)})
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the page's files to an application, the page itself at `/`."""

    async def file(request: Request) -> FileResponse:
        path = FOLDER / (request.url.path.removeprefix("/") or INDEX)
        return FileResponse(path, headers=HEADERS, media_type=KINDS[path.suffix])

    for path in PATHS:
        app.add_route(path, file)
