"""What is measured, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device import folders


@dataclass(frozen=True)
class Setting:
    """Of all parts.

    Args:
        base: folder of the uncompressed model.
        compressed: of the compressed one whose adapters are served; its name is that of its recipe.
        eight: of one in 8 bits.
        adapters: of the compressed one, by task; none: random ones.
        teachers: LoRAs of the uncompressed one.
        cache: where exported folders are kept.
        counts: of adapters.
        threads: of the processor, one number a row of `decode`; the first one is that of all other parts.
        rounds: of `decode`.
        requests: of each load; tokens: of each of their answers.
        soak: requests of the soak, over `mixed` adapters with `prompts` prompts each.
    """

    base: Path
    compressed: Path
    eight: Path
    adapters: Mapping[str, Path]
    teachers: Mapping[str, Path]
    cache: Path
    counts: tuple[int, ...] = (1, 4, 16, 64)
    threads: tuple[int, ...] = (2, 1)
    rounds: int = 5
    requests: int = 60
    tokens: int = 16
    soak: int = 10_000
    mixed: int = 16
    prompts: int = 16

    def exported(self, count: int) -> Path:
        """The compressed base with so many adapters."""
        most = max(*self.counts, self.mixed, count)
        name = self.compressed.name
        whole = folders.many(self.compressed, self.adapters, most, self.cache / f"{name}-{most}")
        return whole if count == most else folders.first(whole, count, self.cache / f"{name}-{most}-{count}")

    def exported_eight(self) -> Path:
        """The base in 8 bits with an adapter of the same shape."""
        return folders.many(self.eight, self.adapters, 1, self.cache / f"{self.eight.name}-1")

    def merged(self) -> dict[str, Path]:
        """What a task costs as a model of its own: in 4 bits (rounded once more), and exactly."""
        return {"4-bit": self.exported(0), "bf16": folders.plain(self.base, self.cache / "plain")}

    def told(self) -> dict[str, Any]:
        """What of it is stored beside results."""
        return {
            "recipe": self.compressed.name, "adapters": sorted(self.adapters), "threads": self.threads[0],
            "requests": self.requests, "tokens": self.tokens,
        }  # fmt: skip
