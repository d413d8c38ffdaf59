"""Which runtime answers a task faster on this machine: measured once, and remembered in the cache folder."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from calora.common.files import read_json, write_json
from calora.common.versions import versions
from calora.device.cache import cache_folder
from calora.errors import CaloraError
from calora.models.tasks import Row, Task

REMEMBERED = "runtimes.json"
TEXTS, WORDS, WRITTEN = 32, 40, 48  # of a measurement: rows, words of a column, tokens that are written
VOCABULARY = ("a", "film", "that", "was", "long", "and", "dull", "but", "its", "end", "is", "good", "music", "liked")


class Answering(Protocol):
    """A model that can be measured."""

    def answer(self, texts: Sequence[Any]) -> list[str]:
        """Answers to rows."""

    def complete(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """What is written behind prompts."""


M = TypeVar("M", bound=Answering)


def faster(base: str, task: Task | None, threads: int, ways: Mapping[str, Callable[[], M]]) -> M:
    """The model of the runtime that answers the task faster, or that writes faster where there is none; says which, and why.

    Args:
        base: fingerprint of the compressed model.
        task: of the adapter that is active.
        threads: that compute.
        ways: runtime -> a function that opens the model with it; the first one has to work.

    Raises:
        CaloraError: the first one does not work.
    """
    about = {
        "base": base, "task": task and task.to_json(), "threads": threads, "processor": processor(),
        "versions": {**versions(), "xllamacpp": version("xllamacpp")},
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / REMEMBERED
    try:
        known = read_json(path, "measure again")
    except CaloraError:  # there is none, or a broken one
        known = {}
    if key in known:
        seconds: dict[str, float] = known[key]["seconds"]
        chosen = min(seconds, key=seconds.__getitem__)
        _say(chosen, task, seconds, f"measured before, {path}")
        return ways[chosen]()
    models, seconds = dict[str, M](), dict[str, float]()
    for name, opened in ways.items():
        models[name] = opened()
        seconds[name] = round(_seconds(models[name], task), 4)
    chosen = min(seconds, key=seconds.__getitem__)
    write_json(path, {**known, key: {**about, "seconds": seconds}})
    _say(chosen, task, seconds, f"measured now, remembered in {path}")
    return models[chosen]


def _seconds(model: Answering, task: Task | None) -> float:
    """Seconds that a row of the task takes among many, or a text that is written alone."""
    rng = random.Random(0)
    if task is None:
        prompt = _words(rng)
        model.complete([prompt], 2)
        return _timed(lambda: model.complete([prompt], WRITTEN))
    rows = [_row(task, rng) for _ in range(TEXTS)]
    model.answer(rows[:1])
    return _timed(lambda: model.answer(rows)) / TEXTS


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _row(task: Task, rng: random.Random) -> Row:
    """Texts in the columns of the prompt, and short ones in those of the answers."""
    row: dict[str, Any] = {column: _words(rng) for column in task.columns}
    answers = {column: _words(rng, 4) for column in task.answer_columns}
    return row | {column: [text, *_words(rng, 4).split()] if task.listed else text for column, text in answers.items()}


def _words(rng: random.Random, count: int = WORDS) -> str:
    return " ".join(rng.choices(VOCABULARY, k=count))


def processor() -> str:
    """What the processor calls itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def _say(chosen: str, task: Task | None, seconds: Mapping[str, float], where: str) -> None:
    other = next(name for name in seconds if name != chosen)
    work = f"answers {task.name}" if task else "writes"
    told = f"{1000 * seconds[chosen]:.0f} ms a text, {other} {1000 * seconds[other]:.0f}"
    print(f"calora: {chosen} {work} faster: {told} ({where})", file=sys.stderr)
