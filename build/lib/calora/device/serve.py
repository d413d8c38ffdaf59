"""`calora serve`: an exported folder over HTTP, on this machine, with a key."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import signal
import socket
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvicorn

from calora.device.app import make_app
from calora.device.catalogue import Catalogue
from calora.device.engine import LlamaEngine
from calora.device.folder import MANIFEST
from calora.device.limits import KEY, Limits
from calora.device.pool import NOTHING, Pool, stamp
from calora.device.served import check_reference
from calora.errors import CaloraError, first_line

LOOK = 1.0  # seconds between looks at the folder
FAREWELL = 5  # seconds that running requests have to end
LOCAL = ("127.0.0.1", "localhost", "[::1]")  # names of this machine on itself


def serve(
    folder: Path,
    limits: Limits,
    host: str,
    port: int,
    threads: int | None = None,
    memory: float | None = None,
    allowed: Collection[Path] = (),
    reference: Path | None = None,
) -> None:
    """Serve an exported folder until SIGINT or SIGTERM, with the adapters that manifest.json has meanwhile.

    Args:
        folder: what `calora export` wrote.
        limits: of requests.
        host: address to listen on; whoever reaches it and has the key may use it, without encryption.
        port: 0: a free one.
        threads: of the processor; by default as many as llama.cpp takes.
        memory: MB that adapters may take; None: as many as there are.
        allowed: folders besides the served one of which adapters may be added.
        reference: an export of the uncompressed base, to compare with, which a second llama.cpp runs.

    Raises:
        CaloraError: a folder is broken or none, or of another base, a package is missing, or the port is taken.
    """
    catalogue = Catalogue.read(folder)
    other = Catalogue.read(reference) if reference else None
    if other:
        check_reference(catalogue, other)
    given = os.environ.get(KEY)
    if given is not None and (len(given) < 16 or not given.isascii() or not given.isprintable() or " " in given):
        raise CaloraError(
            KEY, "16 printable characters or more, without spaces", f"{len(given)} characters", "unset it: one is made"
        )
    key = given or secrets.token_urlsafe(24)
    bound = _bind(host, port)
    with bound:
        limits = replace(limits, context=min(limits.context, catalogue.context))
        start = partial(LlamaEngine, context=limits.context, slots=limits.slots, threads=threads)
        pools = [Pool(catalogue, partial(start, catalogue.base), limits, memory, allowed)]
        pools += [Pool(other, partial(start, other.base), limits)] if other else []
        config = uvicorn.Config(
            make_app(pools[0], limits, key, pools[1] if other else None, _names(bound, host)),
            log_level="warning", access_log=False, lifespan="off",
            server_header=False, timeout_graceful_shutdown=FAREWELL, limit_concurrency=limits.slots + limits.waiting + 64,
        )  # fmt: skip
        # uvicorn ends at these signals, then raises them again; ours make that a normal end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        print(f"{folder} on {address}/v1: {', '.join(catalogue.models)}")
        print(f"API key: {f'as in {KEY}' if given else key}")
        print(f"to try it: {address}/{'' if given else f'#key={key}'}", flush=True)
        asyncio.run(_run(uvicorn.Server(config), bound, pools))
    print("ended", flush=True)


async def _run(server: uvicorn.Server, bound: socket.socket, pools: Sequence[Pool]) -> None:
    watch = asyncio.create_task(_watch(pools[0]))
    try:
        await server.serve(sockets=[bound])
    finally:
        watch.cancel()
        for pool in pools:
            await pool.close()


async def _watch(pool: Pool) -> None:
    """Take what `calora export` adds to the folder meanwhile, and leave out what is no longer there."""
    manifest = pool.catalogue.folder / MANIFEST
    seen = stamp(manifest)
    while True:
        await asyncio.sleep(LOOK)
        if (now := stamp(manifest)) in (seen, NOTHING):
            continue
        seen = now
        try:
            if await pool.follow():
                print(f"now: {', '.join(pool.catalogue.models)}", flush=True)
        except CaloraError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _names(bound: socket.socket, host: str) -> tuple[str, ...] | None:
    """What this server may be called by a request; None, any, where others than this machine may reach it."""
    return (host, *LOCAL) if ipaddress.ip_address(bound.getsockname()[0]).is_loopback else None


def _bind(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a taken port is said at once."""
    if not 0 <= port < 2**16:
        raise CaloraError("--port", "a port: 0 to 65535", port, "correct it")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # who reads the address may come at once, and waits until the server runs
    except OSError as error:
        raise CaloraError(
            f"{host}, port {port}", "an address that is free", first_line(error), "name another --port"
        ) from None
    return bound
