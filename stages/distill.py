"""Train the adapter that a method starts from, by the loss of the method; without a loss it stays as it is.

Reads models/methods/<method>, models/inherited/<task>/<recipe>/<method>, models/compressed/<recipe>, models/targets/<task>,
models/written/<task>/<method>, data/<task>; writes models/<method>/<task>/<recipe> and results/<task>/<recipe>/curves/<method>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calora.adapters.cards import calora_card
from calora.adapters.codes import rounded
from calora.adapters.folder import read_adapter, write_adapter
from calora.adapters.lora import Adapter, attach_adapter, detach_adapter, lora_alone, set_active
from calora.common.files import read_json, whole_directory, write_text
from calora.common.parallel import only_first_goes_on, place
from calora.compressed import Compressed, load
from calora.distillation.distill import Pool, distill
from calora.distillation.labels import joined, with_labels
from calora.distillation.loss import Weights
from calora.distillation.targets import Targets
from calora.distillation.training import History
from calora.errors import CaloraError
from calora.models.loading import training_attention
from calora.models.tasks import AGREEMENT, Row, Task, encode_all, positions
from stages.common import METHODS, adapter, compressed, inherited, results, run, targets, written
from stages.config import Params, Start
from stages.splits import TARGETS, has_labels, read_split, read_task, read_written, texts_of
from stages.training import checkpoint, run_key, schedule, scorer

MADE_BY = "run `dvc repro methods`"


def main(params: Params, name: str, recipe: str, method: str) -> None:
    """The adapter of one method for one task on one compressed base."""
    task, source = read_task(name), inherited(name, recipe) / method
    packed = params.train.base == "packed"
    model = load(compressed(recipe), dense=not packed, trainable=packed, attention=training_attention())
    start, score = read_adapter(source), scorer(model, task, model.calora_tokenizer, params)
    loss = read_json(METHODS / method / "loss.json", MADE_BY)
    out, saved, kind = adapter(method, name, recipe), None, format_of(method)
    if loss.pop("steps"):
        inputs = [source, compressed(recipe), targets(name), written(name, method)]
        saved = checkpoint(out, run_key(params, name, inputs, (loss, str(model.dtype))))
        made, history = distill(
            model, start, *pools(params, task, model, loss, method), score, weights(loss), batch_size=params.train.batch_size,
            schedule=schedule(params), seed=params.seed, checkpoint=saved, title=str(out),
        )  # fmt: skip
    else:
        put_on(model, start)
        made, history = start, History(scores=[{"step": 0, "score": score()}])
    best = history.best["score"]
    if made.recovery and kind != "bf16":  # what is stored is another function than what was trained
        detach_adapter(model, "default")
        put_on(model, replace(made, recovery=rounded(made.recovery, kind, torch.bfloat16)))
        best = score()
    lora_alone(model)
    alone = score() if start.recovery or start.scales else best
    metric = task.metrics[0] if has_labels(read_split(name, "validation")) else AGREEMENT
    measured = f"validation_{metric}"
    scores = {measured: best, f"{measured}_lora_alone": alone}
    only_first_goes_on()
    made.meta |= {"metrics": scores}
    base = str(compressed(recipe))
    card = calora_card(task, base, start.meta["origin"], metric, best, alone if made.config else None)
    write_curves(results(name, recipe, "curves", method), history, metric)
    write_adapter(out, made, base, card, torch.bfloat16, {"history.json": history.to_json()}, kind)
    if saved:
        saved.clear()


def format_of(method: str) -> str:
    """How the method's bypass is stored."""
    start = Start.model_validate(read_json(METHODS / method / "start.json", MADE_BY))
    return "bf16" if start.bypass is None else start.bypass.format


def put_on(model: Compressed, made: Adapter) -> None:
    """The adapter on the model, in use."""
    attach_adapter(model, made, "default")
    set_active(model, "default")
    place(model)


def pools(
    params: Params, task: Task, model: Compressed, loss: dict[str, Any], method: str
) -> tuple[Pool | None, Pool | None]:
    """The texts that the method learns from with their labels, and those without; its loss says of how many it knows them."""
    told, limit = weights(loss).needs_teacher, positions(model.config)

    def pool(rows: Sequence[Row], stored: Path) -> Pool | None:
        theirs = Targets(stored) if rows and told else None
        return Pool(encode_all(task, model.calora_tokenizer, rows, limit), theirs) if rows else None

    if texts_of(method) == "written":
        return None, pool(read_written(task.name, method), written(task.name, method) / TARGETS)
    labelled, unlabelled = (
        pool(read_split(task.name, split), targets(task.name) / split) if told or split == "train" else None
        for split in ("train", "unlabelled")
    )
    assert labelled is not None  # read_split raises on an empty training split
    if not has_labels(read_split(task.name, "train")):
        return None, joined(labelled, unlabelled)
    if loss["labels"] == "all":
        return labelled, unlabelled
    try:
        return with_labels(labelled, unlabelled, loss["labels"], params.seed)
    except CaloraError as error:
        error.args = (f"methods.{method}.loss in params.yaml: {error}",)
        raise


def weights(loss: dict[str, Any]) -> Weights:
    """The weights of the loss, as loss.json has them."""
    alpha = {"decoder": loss["alpha"], "encoder": loss["alpha_encoder"]}
    return Weights(loss["task"], alpha, loss["kl"], loss["labelled"], loss["unlabelled"], int(loss["unlabelled_every"]))


def write_curves(directory: Path, history: History, metric: str) -> None:
    """Loss and the validation metric against step, one tab-separated file a metric, as dvclive lays them out.

    dvclive itself refuses a repository without a commit, and loses the first part of a resumed run.
    """
    rows: dict[str, list[tuple[int, float]]] = {}
    for losses in history.losses:
        for key in losses.keys() - {"step"}:
            rows.setdefault(f"train/{key}", []).append((int(losses["step"]), losses[key]))
    rows[f"validation/{metric}"] = [(int(score["step"]), score["score"]) for score in history.scores]
    with whole_directory(directory) as scratch:
        for metric, points in rows.items():
            name = metric.rsplit("/", 1)[-1]
            text = f"step\t{name}\n" + "".join(f"{step}\t{value}\n" for step, value in points)
            write_text(scratch / f"{metric}.tsv", text)


if __name__ == "__main__":
    run(main, trains=True)
