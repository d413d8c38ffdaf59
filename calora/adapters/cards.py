"""The README.md of an adapter folder (a model card)."""

from __future__ import annotations

from calora.models.tasks import Task


def plain_card(task: Task, base: str) -> str:
    """The card of a plain LoRA."""
    return f"""---
library_name: peft
base_model: {base}
tags: [lora]
---

# LoRA for `{task.name}`

A plain PEFT LoRA. Prompt: `{task.prompt!r}`; answers: {list(task.answers) or "generated"}.
"""


def calora_card(task: Task, base: str, origin: str, whole: float, lora_alone: float) -> str:
    """The card of a CA-LoRA adapter, with its validation accuracy as a whole and without the recovery part."""
    return f"""---
library_name: peft
base_model: {base}
tags: [lora, ca-lora, compression]
---

# CA-LoRA adapter for `{task.name}`

For the compressed base `{base}` and no other: `calora.json` holds its fingerprint. Inherited from `{origin}`.

| loaded with | validation accuracy |
|---|---|
| `calora` (LoRA and recovery part) | {whole:.4f} |
| plain PEFT (LoRA part alone) | {lora_alone:.4f} |

```python
import calora

model = calora.load("{base}")
model.load_adapter("<this folder>", "{task.name}")
model.set_adapter("{task.name}")
print(model.answer(["..."]))
```

Prompt: `{task.prompt!r}`; answers: {list(task.answers) or "generated"}. Method: arXiv 2307.07705.
"""
