"""Export a compressed base with our adapter for other runtimes, loaded back and scored on the test split.

Reads models/compressed/<recipe>, models/<ours>/<task>/<recipe>, results/<task>/<recipe>/scores/<ours>.json, data/<task>;
writes models/export/<task>/<recipe>.
"""

from __future__ import annotations

from calora.device.export import export
from stages.common import adapter, compressed, exported, results, run
from stages.config import Params
from stages.scored import read_scored
from stages.splits import read_checked


def main(params: Params, name: str, recipe: str) -> None:
    """One folder; the torch model's answers are those of the score stage."""
    ours = params.evaluate.ours
    path = results(name, recipe, "scores", f"{ours}.json")
    scored = read_scored(path, f"run `dvc repro score@{name}-{recipe}-{ours}`")[ours]
    about = export(
        compressed(recipe), {name: adapter(ours, name, recipe)}, exported(name, recipe), kinds=params.export.kinds,
        requantise=params.export.requantise, adapter_type=params.export.adapter_type, recovery=params.export.recovery,
        tests={name: read_checked(name, "test")}, hits={name: scored.correct}, draws=params.evaluate.draws, seed=params.seed,
    )  # fmt: skip
    for kind, score in about["adapters"][name]["scores"].items():
        low, high = score["difference"]["ci"]
        difference = f"{score['difference']['value']:+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"{kind}: {score['accuracy']['value']:.4f}, torch {score['torch']:.4f}, difference {difference}")


if __name__ == "__main__":
    run(main)
