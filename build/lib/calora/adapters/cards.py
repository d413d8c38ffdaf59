"""The README.md of an adapter folder (a model card)."""

from __future__ import annotations

import json

from huggingface_hub import ModelCard, ModelCardData

from calora.models.tasks import Task


def plain_card(task: Task, base: str) -> str:
    """The card of a plain LoRA."""
    return _card(base, ["lora"], f"# LoRA for {_code(task.name)}\n\nA plain PEFT LoRA.\n\n{_described(task)}")


def calora_card(task: Task, base: str, origin: str, metric: str, whole: float, lora_alone: float | None) -> str:
    """The card of a CA-LoRA adapter, with its validation score as a whole and that of its LoRA alone, if it has one."""
    rows = [("`calora` (all of it)", whole)]
    rows += [] if lora_alone is None else [("plain PEFT (LoRA part alone)", lora_alone)]
    table = "\n".join(f"| {loader} | {score:.4f} |" for loader, score in rows)
    body = f"""# CA-LoRA adapter for {_code(task.name)}

For the compressed base {_code(base)} and no other: `calora.json` holds its fingerprint. Inherited from {_code(origin)}.

| loaded with | validation {metric} |
|---|---|
{table}

```python
import calora

model = calora.load({json.dumps(base)})
model.load_adapter("<this folder>", {json.dumps(task.name)})
model.set_adapter({json.dumps(task.name)})
print(model.answer(["..."]))
```

{_described(task)} Method: arXiv 2307.07705.
"""
    return _card(base, ["lora", "ca-lora", "compression"], body)


def _card(base: str, tags: list[str], body: str) -> str:
    data = ModelCardData(library_name="peft", base_model=base, tags=tags)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body.rstrip()}\n"))


def _described(task: Task) -> str:
    answers = ", ".join(map(_code, map(repr, task.answers)))
    return f"Prompt: {_code(repr(task.prompt))}; answers: {answers or 'generated'}."


def _code(text: str) -> str:
    """Text as inline code, whatever backticks it holds."""
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
