"""What is measured, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device import folders
from calora.common.files import digest

SERVERS = 4  # of merged models that run side by side; more are computed


@dataclass(frozen=True)
class Setting:
    """Of all parts.

    Args:
        base: folder of the uncompressed model.
        compressed: of the compressed one whose adapters are served; its name is that of its recipe.
        others: further recipes, whose speed is measured beside it.
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
    others: Mapping[str, Path]
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
        whole = self._many(self.compressed, most)
        return whole if count == most else folders.first(whole, count, whole.parents[1] / f"{count}")

    def with_an_adapter(self) -> dict[str, Path]:
        """This base and the others, by recipe, each with an adapter of the same shape."""
        return {
            self.compressed.name: self.exported(1),
            **{name: self._many(path, 1) for name, path in self.others.items()},
        }

    def merged(self) -> dict[str, list[Path]]:
        """What tasks cost as models of their own, several each: in 4 bits (rounded once more), and exactly."""
        place = self.cache / f"merged-{digest(self.base, self.compressed)[:8]}"
        return {
            kind: [folders.copy(folder, place / f"{kind}-{number}") for number in range(min(max(self.counts), SERVERS))]
            for kind, folder in (("4-bit", self.exported(0)), ("bf16", folders.plain(self.base, place / "plain")))
        }

    def _many(self, compressed: Path, count: int) -> Path:
        place = self.cache / f"{compressed.name}-{digest(compressed, *self.adapters.values())[:8]}"
        return folders.many(compressed, self.adapters, count, place / f"whole-{count}")

    def told(self) -> dict[str, Any]:
        """What of it is stored beside results."""
        return {
            "recipe": self.compressed.name, "adapters": sorted(self.adapters), "threads": self.threads[0],
            "requests": self.requests, "tokens": self.tokens,
        }  # fmt: skip
