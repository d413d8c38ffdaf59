"""llama.cpp's own server, started in this process by the package xllamacpp. Nothing here imports torch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calora.errors import CaloraError, first_line

ONLY = 100.0  # added to the logits of a task's answers, so that one of them has the highest
# How often a thread asks whether the others have come, which it does after every operation, before it sleeps. By libgomp's own
# 300,000 two threads take a hundred times as long where another program wants the same cores.
SPINS = "1000"
INSTALL = "pip install 'calora[device]'"


@contextmanager
def installed() -> Iterator[None]:
    """Around imports of what the extra `device` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CaloraError(error.name, "the package", "none", INSTALL) from None


def library() -> Any:
    """The module xllamacpp."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # libgomp reads it when it is loaded
    try:
        import xllamacpp
    except ImportError:
        raise CaloraError("xllamacpp", "the package, to run llama.cpp", "none", INSTALL) from None
    return xllamacpp


def start(
    base: Path, loras: Mapping[str, Path], context: int, slots: int, threads: int | None = None
) -> tuple[Any, str]:
    """llama.cpp's server in this process, on a free port of localhost, all LoRAs off; and the key that it asks for.

    Args:
        base: base.gguf.
        loras: GGUF LoRAs by name; llama.cpp knows them by their place.
        context: most tokens of one request.
        slots: requests that it works on at a time.
        threads: of the processor; by default as many as llama.cpp takes.

    Raises:
        CaloraError: xllamacpp is not installed, or llama.cpp cannot load a file.
    """
    lib, key = library(), secrets.token_hex()
    params = lib.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(base), context * slots, slots, False
    params.verbosity, params.api_keys = -1, [key]
    params.fit_params = False  # which loads all twice, to choose what is said here
    # Prompts that are kept outside the slots are found again by their tokens alone, whichever LoRA was on.
    params.cache_ram_mib = 0
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # Scale 0: loaded with `lora_init_without_apply` alone they would all be on.
    params.lora_adapters = [lib.CommonAdapterLoraInfo(str(path), 0.0) for path in loras.values()]
    try:
        return lib.Server(params), key
    except Exception as error:
        found = f"{first_line(error)} (of {', '.join(map(str, [base, *loras.values()]))})"
        raise CaloraError("llama.cpp", "files that it can load", found, "export the folder again") from None
