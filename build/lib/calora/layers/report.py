"""What a compression reports of each tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from calora.common.versions import versions


@dataclass(frozen=True)
class Report:
    """What became of a model.

    Args:
        recipe: the steps, each {name: options}.
        calibration: `texts` (their number) and `sha256` (of their tokens).
        tuned: of a recovery that was tuned: `texts` and `sha256` of what it was given, and `divergence` of those of them that
            were held back, before and after (`compression.tune`), of which the lower one's factors are kept; else empty.
        layers: layer -> how it is stored, `bytes_before`, `bytes_after`, and `steps`: what each step says of it, with
            `output_error`, the relative error of its output, where it kept its shape.
        blocks: block -> relative error of its output after all steps, on the inputs that the blocks before it give.
        untouched: tensor that was left as it was -> bytes.
        layers_kept: stack -> the original's layers that remain, where some were cut.
        kept: `<layer>.rows` / `<layer>.columns` -> what remains of the original's outputs and inputs, in their new order;
            `<layer>.output_scale` / `<layer>.input_scale` -> the factors by which they were scaled (`adapters.origin`).
        taken: of a checkpoint that was taken: where it was, who made it, its bytes, and how much of it is codes; else empty.
        seconds: step -> time; `walk`: passes through the blocks between steps; `all`.
        versions: library -> its version.
    """

    recipe: list[dict[str, dict[str, Any]]]
    calibration: dict[str, Any]
    tuned: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    blocks: dict[str, float]
    untouched: dict[str, int]
    layers_kept: dict[str, list[int]]
    kept: dict[str, Tensor]
    seconds: dict[str, float]
    versions: dict[str, str] = field(default_factory=versions)
    taken: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What compression.json holds of it: all but tensors, and times, which differ from run to run."""
        left = {"kept", "seconds"} | (set() if self.taken else {"taken"})
        return {name: value for name, value in vars(self).items() if name not in left}

    def continues(self, earlier: Report | None) -> Report:
        """This report, of a model that `earlier` had compressed before, about both together."""
        if earlier is None:
            return self
        layers = dict(self.layers)
        for name, entry in earlier.layers.items():
            now = layers.get(name, entry)
            layers[name] = {**now, "bytes_before": entry["bytes_before"], "steps": {**entry["steps"], **now["steps"]}}
        kept = {**earlier.kept, **self.kept}
        for name in set(earlier.kept) & set(self.kept):
            kept[name] = earlier.kept[name][self.kept[name].long()]
        times = {**earlier.seconds, **self.seconds}
        return Report(
            recipe=[*earlier.recipe, *self.recipe],
            calibration=self.calibration,
            tuned=self.tuned,
            layers=layers,
            blocks=self.blocks,
            untouched={
                name: size
                for name, size in self.untouched.items()
                if not name.startswith(tuple(f"{layer}." for layer in layers))
            },
            layers_kept={**earlier.layers_kept, **self.layers_kept},
            kept=kept,
            taken={**earlier.taken, **self.taken},
            seconds={what: earlier.seconds.get(what, 0.0) + self.seconds.get(what, 0.0) for what in times},
        )
