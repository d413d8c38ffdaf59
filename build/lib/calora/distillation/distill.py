"""Fine-tune a fresh LoRA on labels; distil an adapter from stored teacher targets, on labelled and unlabelled texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from calora.adapters.lora import (
    ADAPTED,
    Adapter,
    attach_adapter,
    detach_adapter,
    inject,
    lora_state,
    set_active,
    sides_of,
    take_adapter,
)
from calora.adapters.scales import scales_of
from calora.common.batching import epoch_batches
from calora.common.parallel import place
from calora.distillation.loss import KNOWN, Weights, loss_of, task_loss
from calora.distillation.parts import Parts, recomputing
from calora.distillation.targets import Targets
from calora.distillation.training import Checkpoint, History, Losses, Schedule, train
from calora.errors import CaloraError
from calora.models.families import family_of
from calora.models.tasks import Example


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter on `model`: LoRA, bypass, scales, classification head."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in (*ADAPTED, ".modules_to_save."))
    ]


def finetune(
    model: PreTrainedModel,
    config: LoraConfig,
    examples: Sequence[Example],
    score: Callable[[], float],
    *,
    batch_size: int,
    schedule: Schedule,
    seed: int,
    checkpoint: Checkpoint | None = None,
    title: str = "LoRA",
) -> tuple[Adapter, History]:
    """Train a fresh LoRA on labelled examples alone: the teacher, and the baselines.

    Args:
        model: a frozen model, changed in place.
        config: the PEFT configuration.
        score: () -> validation score.
    """
    torch.manual_seed(seed)
    inject(model, config)
    place(model)
    family = family_of(model)
    batches = epoch_batches([e.tokens for e in examples], batch_size, schedule.steps, seed)

    def losses_of_step(step: int) -> Iterator[tuple[Losses, int]]:
        parts = Parts(model, examples, batches[step], schedule.accumulation)
        for batch, tokens in zip(parts.batches, parts.tokens, strict=True):
            yield {"loss": task_loss(family.forward(model, batch, None), batch) * parts.weight(batch, KNOWN)}, tokens

    with recomputing(model, schedule.gradient_checkpointing):
        history = train(trainable(model), losses_of_step, score, schedule, model.dtype, checkpoint, title)
    return Adapter(config, lora_state(model)), history


@dataclass(frozen=True)
class Pool:
    """Texts to learn from: examples, and the teacher's targets for them, where the loss looks at the teacher."""

    examples: Sequence[Example]
    targets: Targets | None = None

    def answered(self) -> list[Example]:
        """The examples; where no answer is known, with the teacher's own."""
        return list(self.examples) if self.targets is None else self.targets.with_answers(self.examples)

    def take(self, places: Sequence[int]) -> Pool:
        """Some of the texts, in the order of `places`."""
        answered = self.answered()
        return Pool([answered[place] for place in places], self.targets and self.targets.take(places))


def distill(
    model: PreTrainedModel,
    adapter: Adapter,
    labelled: Pool | None,
    unlabelled: Pool | None,
    score: Callable[[], float],
    weights: Weights,
    *,
    batch_size: int,
    schedule: Schedule,
    seed: int,
    checkpoint: Checkpoint | None = None,
    name: str = "default",
    title: str = "CA-LoRA",
) -> tuple[Adapter, History]:
    """Train an adapter on the compressed model, all of its parts, on the right answers and the teacher's targets.

    Args:
        model: the compressed model's dense view, or packed as `load(trainable=True)` opens it, changed in place.
        adapter: what the training starts from, such as `inherit` gives.
        labelled, unlabelled: texts; without unlabelled ones every step is labelled, without labelled ones none is.
        score: () -> validation score.
        weights: of the loss; by default L = L_task.

    Returns:
        The adapter with the best validation score, and the curves.

    Raises:
        CaloraError: there are neither labelled texts nor unlabelled ones that the loss looks at, or the model is packed.
    """
    if sides_of(model):
        expected, fix = "a model that can be trained on", "open it with dense=True or trainable=True"
        raise CaloraError("distill", expected, "packed layers", fix)
    every = weights.unlabelled_every if unlabelled and weights.needs_teacher else 0
    if labelled is None and not every:
        expected = "labelled texts, or unlabelled ones and a loss that looks at the teacher there"
        raise CaloraError("distill", expected, "neither", "give it texts with labels, or raise unlabelled_every")
    attach_adapter(model, adapter, name)
    if not all(layer.trains_scales for _, layer, scales in scales_of(model) if scales.of(name) is not None):
        detach_adapter(model, name)
        found = "packed layers, which pass no gradient on to their scales"
        raise CaloraError(
            "distill", "the dense view of the model, for scales", found, "load it with dense=True or trainable=True"
        )
    set_active(model, name)
    place(model)
    family = family_of(model)
    every = every if labelled else 1
    pools = [pool or Pool([]) for pool in (labelled, unlabelled)]
    texts = [pool.answered() for pool in pools]
    plans = [
        epoch_batches([e.tokens for e in pool], batch_size, schedule.steps, seed + 1000 * i) if used else []
        for i, (pool, used) in enumerate(zip(texts, (labelled, unlabelled), strict=True))
    ]

    def losses_of_step(step: int) -> Iterator[tuple[Losses, int]]:
        pool = 1 if every and step % every == every - 1 else 0
        turn = step // every if pool else step - (step // every if every else 0)
        parts = Parts(model, texts[pool], plans[pool][turn], schedule.accumulation)
        targets = pools[pool].targets if weights.needs_teacher else None
        for batch, indices, tokens in zip(parts.batches, parts.indices, parts.tokens, strict=True):
            output = family.forward(model, batch, None)
            target = targets.read(indices, model.device) if targets else None
            yield loss_of(output, batch, target, weights, pool == 0, partial(parts.weight, batch)), tokens

    with recomputing(model, schedule.gradient_checkpointing):
        history = train(trainable(model), losses_of_step, score, schedule, model.dtype, checkpoint, title)
    return take_adapter(model, adapter.config, adapter.meta, name), history
