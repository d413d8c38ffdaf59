"""Train the inherited adapter and its bypass against the teacher's stored targets.

Reads models/inherited/<task>/<recipe>, models/compressed/<recipe>, models/targets/<task>, data/<task>; writes
models/calora/<task>/<recipe> and results/<task>/<recipe>/curves.
"""

from __future__ import annotations

from pathlib import Path

import torch

from calora.adapters.cards import calora_card
from calora.adapters.folder import read_adapter, write_adapter
from calora.common.artifacts import fingerprint, whole_directory, write_text
from calora.common.parallel import only_first_goes_on
from calora.compressed import load
from calora.distillation.distill import Weights, distill
from calora.distillation.targets import Targets
from calora.distillation.training import History
from calora.models.tasks import Example, encode_all
from calora.recovery.bypass import activate
from stages.common import adapter, compressed, results, run, targets
from stages.config import Params
from stages.splits import read_split, read_task
from stages.training import checkpoint, run_key, schedule, scorer


def main(params: Params, name: str, recipe: str) -> None:
    """The CA-LoRA adapter of one task and one recipe."""
    task = read_task(name)
    model = load(compressed(recipe), dense=True, attention="eager")
    source = adapter("inherited", name, recipe)
    inherited = read_adapter(source)
    tokenizer = model.calora_tokenizer

    def pool(split: str) -> tuple[list[Example], Targets] | None:
        rows = read_split(name, split)
        return (encode_all(task, tokenizer, rows), Targets(targets(name) / split)) if rows else None

    labelled = pool("train")
    assert labelled is not None  # read_split raises on an empty training split
    score = scorer(model, task, tokenizer, params)
    out, base = adapter("calora", name, recipe), str(compressed(recipe))
    inputs = (model.calora_fingerprint, fingerprint(source), params.distill.model_dump_json())
    saved = checkpoint(out, run_key(params, name, *inputs))
    trained, history = distill(
        model, inherited, labelled, pool("unlabelled"), score, weights(params),
        batch_size=params.train.batch_size, schedule=schedule(params), seed=params.seed,
        checkpoint=saved, title=str(out),
    )  # fmt: skip
    only_first_goes_on()
    activate(model, None)
    best, alone = history.best["score"], score()
    trained.meta |= {"metrics": {"validation_accuracy": best, "validation_accuracy_lora_alone": alone}}
    card = calora_card(task, base, inherited.meta["origin"], best, alone)
    write_curves(results(name, recipe, "curves"), history)
    write_adapter(out, trained, base, card, torch.bfloat16, {"history.json": history.to_json()})
    saved.clear()


def weights(params: Params) -> Weights:
    """The weights of the loss; without the teacher L = L_task."""
    d = params.distill
    if not d.teacher:
        return Weights({}, 0.0, 0.0, 0.0, 0)
    return Weights({"decoder": d.alpha, "encoder": d.alpha_encoder}, d.kl, d.labelled, d.unlabelled, d.unlabelled_every)


def write_curves(directory: Path, history: History) -> None:
    """Loss and validation accuracy against step, one tab-separated file a metric, as dvclive lays them out.

    dvclive itself refuses a repository without a commit, and loses the first part of a resumed run.
    """
    rows: dict[str, list[tuple[int, float]]] = {}
    for losses in history.losses:
        for key in losses.keys() - {"step"}:
            rows.setdefault(f"train/{key}", []).append((int(losses["step"]), losses[key]))
    rows["validation/accuracy"] = [(int(score["step"]), score["score"]) for score in history.scores]
    with whole_directory(directory) as scratch:
        for metric, points in rows.items():
            name = metric.rsplit("/", 1)[-1]
            text = f"step\t{name}\n" + "".join(f"{step}\t{value}\n" for step, value in points)
            write_text(scratch / f"{metric}.tsv", text)


if __name__ == "__main__":
    run(main, trains=True)
