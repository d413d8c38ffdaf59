"""How sparse the base is, and what its experts cost before anything is trained: on the validation splits of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.experts import energies
from calora.adapters.folder import read_plain_lora
from calora.adapters.lora import attach_adapter, set_active
from calora.adapters.origin import Origin
from calora.common.batching import length_batches
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.evaluation.predict import correct, predict
from calora.evaluation.statistics import paired_difference
from calora.inheritance.inherit import carry_lora
from calora.layers.report import Report
from calora.models.anatomy import feed_forward, stacks
from calora.models.families import family_of
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, encode_all
from stages.common import BASE, teacher
from stages.config import Params, load_params
from stages.splits import read_calibration, read_split, read_task
from stages.tables import interval

DEFAULT = {"experts": 128, "active": 0.3, "clustering": "coactivation", "router": "learned"}
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"active": active} for active in (0.1, 0.2, 0.3, 0.5)),
    *({"experts": experts} for experts in (32, 64, 256)),
    *({"shared": shared} for shared in (8, 16)),
    {"clustering": "parameters"},
    {"router": "analytic"},
)


def neurons_on(model: PreTrainedModel, examples: Sequence[Example], batch_size: int = 32) -> dict[str, float]:
    """Share of the neurons of each feed-forward that are above 0, over all real tokens, by the name of its block."""
    family, handles = family_of(model), []
    counts: dict[str, list[Tensor]] = {}
    masks: dict[str, Tensor] = {}
    for stack, blocks in stacks(model).items():
        for place, block in enumerate(blocks):
            name = f"{stack}.{place}"

            def count(_: Any, args: tuple[Tensor], name: str = name) -> None:
                on = args[0] > 0  # [B, T, neurons]
                counts.setdefault(name, []).append(on[masks[name.split(".")[0]]].float().mean(-1))

            output = model.get_submodule(feed_forward(name, block).output)
            handles.append(output.register_forward_pre_hook(count))
    with torch.no_grad():
        for indices in length_batches([len(e.prompt_ids) for e in examples], batch_size):
            batch = family.collate([examples[i] for i in indices], model)
            masks = batch.masks
            family.forward(model, batch, None)
    for handle in handles:
        handle.remove()
    return {name: float(torch.cat(shares).mean()) for name, shares in counts.items()}


class Scored:
    """The base with each task's LoRA, on the validation split."""

    def __init__(self, params: Params) -> None:
        self.tokenizer, self.batch_size = load_tokenizer(BASE), params.train.eval_batch_size
        self.tasks = {name: read_task(name) for name in params.tasks}
        self.loras = {name: read_plain_lora(teacher(name)) for name in params.tasks}
        self.examples = {
            name: encode_all(task, self.tokenizer, read_split(name, "validation")) for name, task in self.tasks.items()
        }
        self.calibration = read_calibration(self.tokenizer)

    def model(self, options: dict[str, Any] | None) -> tuple[PreTrainedModel, Report | None]:
        """The base, dense or in experts."""
        model = load_model(BASE)
        return model, compress(model, [{"moefy": options}], Calibration(self.calibration)) if options else None

    def hits(self, model: PreTrainedModel, report: Report | None) -> list[bool]:
        """Which texts of all tasks are answered right."""
        origin = Origin(report.kept, report.layers_kept) if report else Origin()
        found: list[bool] = []
        for name, task in self.tasks.items():
            lora, _ = carry_lora(model, self.loras[name], origin)
            attach_adapter(model, lora, name)
            set_active(model, name)
            examples = self.examples[name]
            found += correct(predict(model, task, self.tokenizer, examples, self.batch_size), examples)
        return found


def sweep() -> None:
    """Print the share of neurons that are on, and each kind of experts: points lost, with an interval, and the energy they hold."""
    params = load_params()
    scored = Scored(params)
    dense, _ = scored.model(None)
    for name, share in neurons_on(dense, [e for own in scored.examples.values() for e in own]).items():
        print(f"{name}: {share:.1%} of the neurons are on for a token")
    whole = scored.hits(dense, None)
    print(f"dense: {sum(whole) / len(whole):.4f} of {len(whole)} texts of {', '.join(params.tasks)}", flush=True)
    for variant in VARIANTS:
        model, made = scored.model({**DEFAULT, **variant})
        assert made is not None
        lost = paired_difference(scored.hits(model, made), whole, params.evaluate.draws, params.seed)
        print(f"{variant}: {100 * lost.value:+.1f} points {interval(lost.ci, '+')}; {energies(made)}", flush=True)
