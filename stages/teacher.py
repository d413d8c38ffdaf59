"""Train (or import) the LoRA on the uncompressed LLM.

Reads models/base, models/brought/<task>, data/<task>; writes models/teacher/<task> (a plain PEFT LoRA; of another adapter
the LoRA that stands in for it, and all of it in whole/).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calora.adapters.cards import plain_card
from calora.adapters.folder import write_adapter
from calora.adapters.lora import Adapter, attach_adapter, check_targets, inject, lora_config, lora_state, set_active
from calora.adapters.places import CONFIG
from calora.adapters.standin import stand_in
from calora.adapters.teachers import WHOLE, Whole, attach_whole, import_adapter, write_whole
from calora.common.parallel import only_first_goes_on, place
from calora.common.versions import FILE, versions
from calora.models.anatomy import named
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import Task, encode_all, positions
from calora.models.uniform import was_conv1d
from stages.common import BASE, brought, run, teacher
from stages.config import Params
from stages.splits import has_labels, read_split, read_task
from stages.training import scorer, train_lora

IMPORTED = "imported.json"  # beside an imported teacher: its scores, and what of it no LoRA carries


def main(params: Params, name: str) -> None:
    """The teacher of one task."""
    task, theirs = read_task(name), brought(name)
    model = load_model(BASE, attention=training_attention())
    if (theirs / CONFIG).exists():
        take_imported(params, task, theirs, model)
    else:
        train_teacher(params, task, model)


def train_teacher(params: Params, task: Task, model: Any) -> None:
    """A LoRA trained on the labelled texts; the best one on validation."""
    check_targets(model, params.teacher.targets, params.teacher.rank)
    names = named(model, params.teacher.targets)
    config = as_peft_has_it(lora_config(params.teacher.rank, params.teacher.lora_alpha, names), model)
    train_lora(params, task, model, load_tokenizer(BASE), config, teacher(task.name), BASE)


def as_peft_has_it(config: Any, model: Any) -> Any:
    """The configuration of a LoRA that PEFT puts on the base itself, whose layers may be Conv1D (GPT-2)."""
    config.fan_in_fan_out = bool(was_conv1d(model))
    return config


def take_imported(params: Params, task: Task, theirs: Path, model: Any) -> None:
    """The user's own adapter, checked against the base, scored on it, and carried over where a LoRA can."""
    tokenizer = load_tokenizer(BASE)
    rows = read_split(task.name, "train")
    adapter = import_adapter(theirs, model, tokenizer, [task.render(row) for row in rows])
    place(model)
    known = has_labels(read_split(task.name, "validation"))
    scores: dict[str, float] = {}

    def score(of: str, what: Any) -> None:
        if known:
            scores[of] = scorer(what, task, tokenizer, params)()

    score("base", model)
    about: dict[str, Any] = {"beyond": [], "validation_accuracy": scores}
    if isinstance(adapter, Whole):
        attach_whole(model, adapter, theirs)
        about["beyond"] = adapter.beyond
        lora = _lora_of(params, task, adapter, model, about)
        if about["lora"] != "fresh":
            alone = with_lora(load_model(BASE, attention=training_attention()), lora, task.name)
            score("lora", alone)
    else:
        lora = adapter
        with_lora(model, lora, task.name)
    score("adapter", model)
    only_first_goes_on()
    as_peft_has_it(lora.config, model)
    card, notes = plain_card(task, str(BASE)), {FILE: versions(), IMPORTED: about}
    write_adapter(teacher(task.name), lora, str(BASE), card, torch.bfloat16, notes)
    if isinstance(adapter, Whole):
        write_whole(teacher(task.name) / WHOLE, adapter)
    print(told(task.name, about))


def with_lora(model: Any, lora: Adapter, name: str) -> Any:
    """The model with a LoRA on it, in use."""
    attach_adapter(model, lora, name)
    set_active(model, name)
    place(model)
    return model


def _lora_of(params: Params, task: Task, whole: Whole, model: Any, about: dict[str, Any]) -> Adapter:
    """The LoRA that the student starts from: the adapter's own, else one fitted to it, else a fresh one.

    Args:
        model: the base with the adapter on it.
        about: takes what became of it.
    """
    lora = whole.lora
    if lora is None:
        rows = read_split(task.name, "train")[: params.teacher.fit.texts]
        examples = encode_all(task, load_tokenizer(BASE), rows, positions(model.config))
        lora, errors = stand_in(model, examples, params.teacher.fit.rank)
        about |= {"lora": "fitted", "errors": errors}
    else:
        about["lora"] = "its own"
    if lora.config is None:
        base = load_model(BASE)
        check_targets(base, params.teacher.targets, params.teacher.rank)
        config = lora_config(params.teacher.rank, params.teacher.lora_alpha, named(base, params.teacher.targets))
        torch.manual_seed(params.seed)
        inject(base, config)
        lora, about["lora"] = Adapter(config, lora_state(base)), "fresh"
    return lora


def told(name: str, about: dict[str, Any]) -> str:
    """One line on an imported adapter: what it gives on the base, and what of it no LoRA carries."""
    scores = about["validation_accuracy"]
    line = f"{name}: no labels to score the adapter by"
    if scores:
        line = f"{name}: the adapter has {scores['adapter']:.3f} on validation, the base alone {scores['base']:.3f}"
    if scores and scores["adapter"] <= scores["base"]:
        line += "; it gains nothing there: is it of this base, and is the prompt that of its training?"
    if not about["beyond"]:
        return line
    line += f"; distilled from, because it has more than a plain LoRA: {', '.join(about['beyond'])}"
    errors = about.get("errors") or {}
    kinds = {"its own": "its LoRA", "fresh": "a fresh LoRA", "fitted": "a LoRA that is fitted to it"}
    line += f". The student starts from {kinds[about['lora']]}"
    line += f", alone {scores['lora']:.3f}" if "lora" in scores else ""
    return line + (f" (left out: {sum(errors.values()) / len(errors):.2f} of a layer's change)" if errors else "")


if __name__ == "__main__":
    run(main, trains=True)
