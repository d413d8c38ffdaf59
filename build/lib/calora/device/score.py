"""What an export scores against the torch model that it was made of, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from calora.adapters.lora import Adapter, attach_adapter, detach_adapter, set_active
from calora.compressed import load
from calora.device.folder import ADAPTERS, DENSE, PEFT
from calora.device.llama import Llama
from calora.errors import CaloraError
from calora.evaluation.predict import Predictions, correct, predict
from calora.evaluation.statistics import mean_interval, paired_difference
from calora.models.loading import load_model
from calora.models.tasks import Example, Row, Task, encode_all, positions

BATCH = 16  # texts, of torch
PROMPTS = 200  # whose tokens are compared, at most
Hits = dict[str, list[int]]  # adapter -> whether each item is right


def hits_of(predictions: Predictions, examples: Sequence[Example]) -> list[int]:
    """Whether each item is right, as 0 or 1."""
    return [int(hit) for hit in correct(predictions, examples)]


def torch_hits(base: Path, adapters: Mapping[str, Path], examples: Mapping[str, Sequence[Example]]) -> Hits:
    """Of the torch model: the dense view of the compressed base, with its adapter."""
    model, found = load(base, dense=True), Hits()
    for name in examples:
        model.load_adapter(adapters[name], name)
        model.set_adapter(name)
        task = model.calora_tasks[name]
        predictions = predict(model, task, model.calora_tokenizer, examples[name], BATCH, f"{name}: torch")
        found[name] = hits_of(predictions, examples[name])
        model.unload_adapter(name)
    return found


def plain_hits(
    base: Path,
    adapters: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, Sequence[Example]],
) -> Hits:
    """Of an uncompressed base with plain LoRAs, in torch."""
    model, found = load_model(base), Hits()
    for name in examples:
        attach_adapter(model, adapters[name], name)
        set_active(model, name)
        predictions = predict(model, tasks[name], tokenizer, examples[name], BATCH, f"{name}: torch")
        found[name] = hits_of(predictions, examples[name])
        detach_adapter(model, name)
    return found


def peft_hits(
    folder: Path,
    tasks: Mapping[str, Task],
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, Sequence[Example]],
) -> Hits:
    """Of dense/ and peft/NAME, loaded by transformers and PEFT alone."""
    found = Hits()
    for name in examples:
        model: Any = PeftModel.from_pretrained(load_model(folder / DENSE), str(folder / PEFT / name)).get_base_model()
        predictions = predict(model.eval(), tasks[name], tokenizer, examples[name], BATCH, f"{name}: PEFT")
        found[name] = hits_of(predictions, examples[name])
    return found


def llama_hits(
    folder: Path,
    tasks: Mapping[str, Task],
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, Sequence[Example]],
    rows: Mapping[str, Sequence[Row]],
    threads: int | None = None,
) -> tuple[Hits, dict[str, dict[str, int]]]:
    """Of base.gguf and adapters/NAME.gguf in llama.cpp; and of how many prompts both tokenizers make the same ids."""
    found, tokens = Hits(), dict[str, dict[str, int]]()
    longest = max(_longest(tasks[name], examples[name]) for name in examples)
    llama = Llama(folder, context=longest, slots=1, threads=threads)
    for name in examples:
        llama.set_adapter(name)
        found[name] = hits_of(_predict(llama, tasks[name], rows[name], f"{name}: llama.cpp"), examples[name])
        prompts = [tasks[name].render(row) for row in rows[name][:PROMPTS]]
        same = sum(a == b for a, b in zip(llama.tokenize(prompts), tokenizer(prompts).input_ids, strict=True))
        tokens[name] = {"prompts": len(prompts), "same": same}
    llama.close()
    return found, tokens


def _longest(task: Task, examples: Sequence[Example]) -> int:
    """Most tokens that a prompt and its answer may have."""
    answer = max(len(ids) for example in examples for ids in example.choice_ids or [[0]])
    return task.max_tokens + (answer if task.scored else task.max_new_tokens)


def _predict(llama: Llama, task: Task, rows: Sequence[Row], title: str) -> Predictions:
    """As `calora.evaluation.predict`, by llama.cpp, its own tokenizer included."""
    if not task.scored:
        return Predictions(llama.answer(rows, title), [-1] * len(rows))
    choices = llama.choose(rows, title)
    return Predictions([choice.answer for choice in choices], [choice.label for choice in choices])


def compared(ours: Sequence[int], torch: Sequence[int], draws: int, seed: int) -> dict[str, Any]:
    """Accuracy of an export and of the torch model, the difference with its 95 % interval, and how many items changed."""
    difference = paired_difference(ours, torch, draws, seed)
    return {
        "items": len(ours),
        "accuracy": mean_interval(ours, draws, seed).to_json(),
        "torch": round(sum(torch) / len(torch), 4),
        "difference": difference.to_json(),
        "changed": sum(a != b for a, b in zip(ours, torch, strict=True)),
    }


def encoded(
    tasks: Mapping[str, Task], tokenizer: PreTrainedTokenizerBase, config: Any, rows: Mapping[str, Sequence[Row]]
) -> dict[str, list[Example]]:
    """The examples of each adapter's test rows.

    Raises:
        CaloraError: a row has no label or answer.
    """
    found = {name: encode_all(tasks[name], tokenizer, rows[name], positions(config)) for name in rows}
    for name, examples in found.items():
        missing = [place for place, one in enumerate(examples, 1) if one.label < 0 and not one.references]
        if missing:
            raise CaloraError(
                f"tests of {name}, row {missing[0]}", "a label or an answer", "neither", "name a labelled file"
            )
    return found


def adapter_file(name: str) -> str:
    """Relative path of an adapter."""
    return f"{ADAPTERS}/{name}.gguf"
