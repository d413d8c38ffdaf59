"""Train the adapter that a method starts from, by the loss of the method; without a loss it stays as it is.

Reads models/methods/<method>/loss.json, models/inherited/<task>/<recipe>/<method>, models/compressed/<recipe>,
models/targets/<task>, data/<task>; writes models/<method>/<task>/<recipe> and results/<task>/<recipe>/curves/<method>.
"""

from __future__ import annotations

from pathlib import Path

import torch

from calora.adapters.cards import calora_card
from calora.adapters.folder import read_adapter, write_adapter
from calora.adapters.lora import Adapter, attach_adapter, set_active
from calora.common.files import read_json, whole_directory, write_text
from calora.common.parallel import only_first_goes_on, place
from calora.compressed import Compressed, load
from calora.distillation.distill import Pool, distill
from calora.distillation.loss import Weights
from calora.distillation.targets import Targets
from calora.distillation.training import Checkpoint, History
from calora.models.loading import training_attention
from calora.models.tasks import Task, encode_all, positions
from calora.recovery.bypass import activate
from stages.common import METHODS, adapter, compressed, inherited, results, run, targets
from stages.config import Params
from stages.splits import read_split, read_task
from stages.training import Score, checkpoint, run_key, schedule, scorer


def main(params: Params, name: str, recipe: str, method: str) -> None:
    """The adapter of one method for one task on one compressed base."""
    task, source = read_task(name), inherited(name, recipe, method)
    model = load(compressed(recipe), dense=True, attention=training_attention())
    start, score = read_adapter(source), scorer(model, task, model.calora_tokenizer, params)
    loss = read_json(METHODS / method / "loss.json", "run `dvc repro methods`")
    out, saved = adapter(method, name, recipe), None
    if loss.pop("steps"):
        inputs = [source, compressed(recipe), targets(name)]
        saved = checkpoint(out, run_key(params, name, inputs, (loss, str(model.dtype))))
        made, history = trained(params, task, model, start, weights(loss), score, saved, str(out))
    else:
        attach_adapter(model, start, "default")
        set_active(model, "default")
        place(model)
        made, history = start, History(scores=[{"step": 0, "score": score()}])
    activate(model, None)
    best = history.best["score"]
    scores = {"validation_accuracy": best, "validation_accuracy_lora_alone": score() if start.recovery else best}
    only_first_goes_on()
    made.meta |= {"metrics": scores}
    base = str(compressed(recipe))
    card = calora_card(task, base, start.meta["origin"], *scores.values())
    write_curves(results(name, recipe, "curves", method), history)
    write_adapter(out, made, base, card, torch.bfloat16, {"history.json": history.to_json()})
    if saved:
        saved.clear()


def trained(
    params: Params,
    task: Task,
    model: Compressed,
    start: Adapter,
    loss: Weights,
    score: Score,
    saved: Checkpoint,
    title: str,
) -> tuple[Adapter, History]:
    """The adapter after all steps, at its best validation score."""

    limit = positions(model.config)

    def pool(split: str) -> Pool | None:
        rows = read_split(task.name, split)
        told = Targets(targets(task.name) / split) if rows and loss.needs_teacher else None
        return Pool(encode_all(task, model.calora_tokenizer, rows, limit), told) if rows else None

    labelled = pool("train")
    assert labelled is not None  # read_split raises on an empty training split
    return distill(
        model, start, labelled, pool("unlabelled") if loss.needs_teacher else None, score, loss,
        batch_size=params.train.batch_size, schedule=schedule(params), seed=params.seed, checkpoint=saved, title=title,
    )  # fmt: skip


def weights(loss: dict[str, float]) -> Weights:
    """The weights of the loss, as loss.json has them."""
    alpha = {"decoder": loss["alpha"], "encoder": loss["alpha_encoder"]}
    return Weights(loss["task"], alpha, loss["kl"], loss["labelled"], loss["unlabelled"], int(loss["unlabelled_every"]))


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
