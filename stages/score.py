"""Score one method on the test split, its adapter and its compressed base loaded back from disk.

Reads models/compressed/<recipe>, models/<method>/<task>/<recipe>, data/<task>; writes
results/<task>/<recipe>/scores/<method>.json.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from calora.adapters.folder import read_adapter
from calora.common.files import read_json, write_json
from calora.compressed import load
from calora.models.loading import training_attention
from stages.common import adapter, compressed, results, run
from stages.config import Params
from stages.scored import Scored
from stages.scoring import score_test
from stages.splits import read_task


def main(params: Params, name: str, recipe: str, method: str) -> None:
    """Accuracy, bytes and answers of one method; of some with the packed weights too."""
    task, path = read_task(name), adapter(method, name, recipe)
    history = read_json(path / "history.json", f"run `dvc repro distill@{name}-{recipe}-{method}`")
    made = read_adapter(path)
    shipped = path if made.parameters else None
    trained = made.parameters if history["losses"] else 0

    def scored_on(dense: bool) -> Scored:
        """On the dense view of the compressed weights, which is fast, or on the packed ones, which are shipped and smaller."""
        model = load(compressed(recipe), dense=dense, attention=training_attention())
        model.load_adapter(path, method)
        title = method if dense else f"{method}, packed"
        return score_test(model, task, model.calora_tokenizer, params, title, compressed(recipe), shipped, trained)

    dense = params.train.base == "dense"
    scored = replace(scored_on(dense), curve=history["scores"])
    if method in params.evaluate.packed:
        scored = replace(scored, packed=scored_on(dense=False).score if dense else scored.score)
    write_json(results(name, recipe, "scores", f"{method}.json"), {method: asdict(scored)})


if __name__ == "__main__":
    run(main)
