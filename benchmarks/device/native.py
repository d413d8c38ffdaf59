"""Contexts of llama.cpp by the functions of xllamacpp's library: one that switches between adapters, and one for each.

The structures that describe a model and a context are taken as blocks of bytes, larger than they are, of which only the
length of a context, their first number, is changed; they are passed on the stack, where their end is not looked for.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

CONTEXT, PROMPT, STEPS = 256, 32, 24  # tokens
CONTEXTS = 8  # at most


class Options(ctypes.Structure):
    """llama_model_params or llama_context_params, and some more bytes."""

    _fields_ = [("numbers", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("tokens", ctypes.c_int32), *((f"pointer{place}", ctypes.c_void_p) for place in range(6))]


def library() -> ctypes.CDLL:
    """xllamacpp's library with the types of its functions."""
    import xllamacpp

    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer, number, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    for name, result, arguments in (
        ("llama_model_default_params", Options, []), ("llama_context_default_params", Options, []),
        ("llama_model_load_from_file", pointer, [text, Options]), ("llama_init_from_model", pointer, [pointer, Options]),
        ("llama_adapter_lora_init", pointer, [pointer, text]),
        ("llama_set_adapters_lora", number, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_batch_get_one", Batch, [pointer, number]), ("llama_decode", number, [pointer, Batch]),
        ("llama_set_n_threads", None, [pointer, number, number]),
        ("llama_log_set", None, [pointer, pointer]), ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
    ):  # fmt: skip
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class Native:
    """A base with adapters."""

    def __init__(self, base: Path, adapters: Sequence[Sequence[Path]], threads: int) -> None:
        self.lib, self.threads = library(), threads
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.lib.llama_log_set(ctypes.cast(self.quiet, ctypes.c_void_p), None)
        self.model = self.lib.llama_model_load_from_file(str(base).encode(), self.lib.llama_model_default_params())
        loaded: dict[Path, int] = {}
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {base}")
        for path in dict.fromkeys(path for some in adapters for path in some):
            loaded[path] = self.lib.llama_adapter_lora_init(self.model, str(path).encode())
        if not all(loaded.values()):
            raise RuntimeError(f"llama.cpp does not load an adapter of {', '.join(map(str, loaded))}")
        self.adapters = [[loaded[path] for path in some] for some in adapters]

    def context(self) -> int:
        """A new one."""
        options = self.lib.llama_context_default_params()
        options.numbers[0] = CONTEXT
        made: int = self.lib.llama_init_from_model(self.model, options)
        self.lib.llama_set_n_threads(made, self.threads, self.threads)
        return made

    def switch(self, context: int, number: int) -> None:
        """Have an adapter on, alone."""
        own = self.adapters[number]
        some, scales = (ctypes.c_void_p * len(own))(*own), (ctypes.c_float * len(own))(*[1.0] * len(own))
        if self.lib.llama_set_adapters_lora(context, some, len(own), scales):
            raise RuntimeError("llama.cpp does not take the adapter")

    def read(self, context: int, tokens: Sequence[int]) -> float:
        """Seconds that a context takes for further tokens."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        start = time.perf_counter()
        if self.lib.llama_decode(context, self.lib.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama.cpp does not read the tokens")
        return time.perf_counter() - start

    def logits(self, context: int, count: int) -> list[float]:
        """The first ones of those after the last token."""
        found: list[float] = self.lib.llama_get_logits_ith(context, -1)[:count]
        return found


def compare(base: Path, adapters: Sequence[Sequence[Path]], threads: int) -> dict[str, float]:
    """ms of a token: with one adapter, switching at every token, and of contexts that each have theirs, in turn; MB of these."""
    native, before = Native(base, adapters, threads), _memory()
    prompt, single = list(range(100, 100 + PROMPT)), native.context()
    native.switch(single, 0)
    native.read(single, prompt)
    same = [native.read(single, [100 + step]) for step in range(STEPS)]
    turns = []
    for step in range(STEPS):
        start = time.perf_counter()
        native.switch(single, (step + 1) % len(adapters))
        native.read(single, [100 + step])
        turns.append(time.perf_counter() - start)
    one, some = _memory(), [native.context() for _ in adapters[:CONTEXTS]]
    for number, context in enumerate(some):
        native.switch(context, number)
        native.read(context, prompt)
        native.read(context, [100])
    own = [native.read(context, [100 + step]) for step in range(STEPS) for context in some]
    found = {"one_mb": one - before, "each_mb": (_memory() - one) / len(some)}
    for name, times in (("same_ms", same), ("turns_ms", turns), ("own_ms", own)):
        found[name] = 1000 * statistics.median(times)
    return found


def _memory() -> float:
    return float(psutil.Process().memory_full_info().pss) / 1e6
