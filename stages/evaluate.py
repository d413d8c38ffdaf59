"""Put the methods of one task and recipe side by side: intervals, differences, and what was recovered of the gap.

Reads results/<task>/reference.json, results/<task>/<recipe>/scores; writes results/<task>/<recipe>/metrics.json and
models/evaluated/<task>/<recipe> (the same, answers, validation curves).
"""

from __future__ import annotations

from typing import Any

from calora.common.files import whole_directory, write_json
from calora.common.versions import versions
from calora.evaluation.metrics import linear, value_of
from calora.evaluation.statistics import mean_interval, paired_difference, recovered_share
from stages.common import evaluated, results, run
from stages.config import Params
from stages.looks import key_of
from stages.scored import Scored, read_scored


def main(params: Params, name: str, recipe: str) -> None:
    """All methods of `compare`, after those that need no compressed base."""
    methods = read_scored(results(name, "reference.json"), f"run `dvc repro reference@{name}`")
    for method in params.compare:
        made_by = f"run `dvc repro score@{name}-{recipe}-{method}`"
        methods[key_of(method)] = read_scored(results(name, recipe, "scores", f"{method}.json"), made_by)[method]
    metrics = summary(params, methods)
    answers = {
        method: {"answers": one.answers, "correct": one.correct, "items": linear(one.metric, one.pairs, one.items)}
        for method, one in methods.items()
    }
    curves = {method: one.curve for method, one in methods.items() if len(one.curve) > 1}
    with whole_directory(evaluated(name, recipe)) as scratch:
        for file, value in (("metrics", metrics), ("predictions", answers), ("curves", curves)):
            write_json(scratch / f"{file}.json", value)
    write_json(results(name, recipe, "metrics.json"), metrics)


def summary(params: Params, methods: dict[str, Scored]) -> dict[str, Any]:
    """metrics.json: the methods with intervals; each one's difference to the baseline and its share of the gap."""
    ours, baseline, whole = (
        key_of(params.evaluate.ours),
        methods.get(key_of(params.evaluate.baseline)),
        methods["llm_lora"],
    )
    how = (params.evaluate.draws, params.seed, value_of(whole.metric, whole.pairs))
    found: dict[str, Any] = {
        "metric": whole.metric,
        "metrics": list(whole.scores),
        "per_item": not whole.pairs,
        "methods": {
            method: one.summary() | {"ci": mean_interval(one.items, *how).to_json()["ci"]}
            for method, one in methods.items()
        },
        "ours": ours,
        "baseline": key_of(params.evaluate.baseline),
        "test_items": len(whole.correct),
        "versions": versions(),
    }
    if baseline is None:
        return found
    for method in map(key_of, params.compare):
        items = methods[method].items
        if methods[method] is not baseline:
            found["methods"][method] |= {
                "difference": paired_difference(items, baseline.items, *how).to_json(),
                "recovered_share": recovered_share(items, baseline.items, whole.items, *how).to_json(),
            }
    own = found["methods"].get(ours, {})
    return found | {key: own[key] for key in ("difference", "recovered_share") if key in own}


if __name__ == "__main__":
    run(main)
