"""`calora serve`: an exported folder over HTTP, on this machine, with a key."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
from dataclasses import replace
from pathlib import Path

import uvicorn

from calora.device.app import make_app
from calora.device.catalogue import Catalogue
from calora.device.engine import LlamaEngine
from calora.device.limits import KEY, Limits
from calora.errors import CaloraError, first_line

FAREWELL = 5  # seconds that running requests have to end


def serve(folder: Path, limits: Limits, host: str, port: int, threads: int | None = None) -> None:
    """Serve an exported folder until SIGINT or SIGTERM.

    Args:
        folder: what `calora export` wrote.
        limits: of requests.
        host: address to listen on; whoever reaches it and has the key may use it, without encryption.
        port: 0: a free one.
        threads: of the processor; by default as many as llama.cpp takes.

    Raises:
        CaloraError: the folder is broken or none, a package is missing, or the port is taken.
    """
    catalogue = Catalogue.read(folder)
    given = os.environ.get(KEY)
    if given is not None and (len(given) < 16 or not given.isascii() or not given.isprintable() or " " in given):
        raise CaloraError(
            KEY, "16 printable characters or more, without spaces", f"{len(given)} characters", "unset it: one is made"
        )
    key = given or secrets.token_urlsafe(24)
    bound = _bind(host, port)
    with bound:
        limits = replace(limits, context=min(limits.context, catalogue.context))
        engine = LlamaEngine(catalogue.base, catalogue.loras, limits.context, limits.slots, threads)
        config = uvicorn.Config(
            make_app(catalogue, engine, limits, key), log_level="warning", access_log=False, lifespan="off",
            server_header=False, timeout_graceful_shutdown=FAREWELL, limit_concurrency=limits.slots + limits.waiting + 64,
        )  # fmt: skip
        # uvicorn ends at these signals, then raises them again; ours make that a normal end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/v1"
        print(f"{folder} on {address}: {', '.join(catalogue.models)}")
        print(f"API key: {f'as in {KEY}' if given else key}", flush=True)
        asyncio.run(_run(uvicorn.Server(config), bound, engine))
    print("ended", flush=True)


async def _run(server: uvicorn.Server, bound: socket.socket, engine: LlamaEngine) -> None:
    try:
        await server.serve(sockets=[bound])
    finally:
        await engine.close()


def _bind(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a taken port is said at once."""
    if not 0 <= port < 2**16:
        raise CaloraError("--port", "a port: 0 to 65535", port, "correct it")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise CaloraError(
            f"{host}, port {port}", "an address that is free", first_line(error), "name another --port"
        ) from None
    return bound
