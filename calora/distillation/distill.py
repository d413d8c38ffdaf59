"""Distil: L = L_task + alpha * L_dist, from stored teacher targets, on labelled and on unlabelled texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from calora.adapters.lora import Adapter, attach_adapter, inject, lora_state, set_active, take_adapter
from calora.common.batching import epoch_batches
from calora.common.parallel import place, share
from calora.distillation.targets import Target, Targets
from calora.distillation.training import Checkpoint, History, Losses, Schedule, train
from calora.errors import CaloraError
from calora.models.families import Batch, Output, family_of
from calora.models.tasks import Example


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of the loss; all >= 0.

    The paper's form is `kl = 0`, `unlabelled_every = 0`.

    Args:
        alpha: stack -> weight of the mean squared distance of the last hidden states.
        kl: weight of KL(teacher || student) over the answer logits.
        labelled, unlabelled: factors of those two on labelled and on unlabelled texts.
        unlabelled_every: every how many steps the batch is unlabelled; 0 is never, 2 every second one.
    """

    alpha: Mapping[str, float]
    kl: float
    labelled: float
    unlabelled: float
    unlabelled_every: int


def task_loss(output: Output, batch: Batch) -> Tensor:
    """L_task: cross-entropy of the right answer's tokens, mean over answer positions."""
    return F.cross_entropy(output.logits.float(), batch.labels)


def hidden_distance(hidden: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """L_dist of one stack: mean over real tokens and features of (f_student - f_teacher)^2 (paper, eq. 6).

    Args:
        hidden: [B, T, H]; mask: [B, T]; target: [N, H], N = number of real tokens, in row order.
    """
    states = hidden[mask]
    if states.shape != target.shape:
        raise CaloraError(
            "teacher targets",
            f"hidden states {tuple(states.shape)}",
            tuple(target.shape),
            "run `dvc repro` from teacher on",
        )
    return F.mse_loss(states.float(), target.float())


def answer_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(teacher || student) over the same k tokens, [P, k] each, mean over positions."""
    return F.kl_div(
        logits.float().log_softmax(-1), target.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )


def distillation_loss(output: Output, batch: Batch, target: Target, weights: Weights, labelled: bool) -> Losses:
    """L = L_task + f (sum_stack alpha_stack L_dist + kl L_KL), f the labelled or the unlabelled factor.

    Unlabelled batches have no L_task. `output.logits` is over the whole vocabulary.
    """
    distances = {
        stack: hidden_distance(output.hidden[stack], batch.masks[stack], target.hidden[stack])
        for stack, weight in weights.alpha.items()
        if weight > 0 and stack in output.hidden
    }
    kl = answer_divergence(output.logits.gather(1, target.token_ids), target.logits)
    distil = weights.kl * kl
    for stack, distance in distances.items():
        distil = distil + weights.alpha[stack] * distance
    losses = {f"hidden_{stack}": distance for stack, distance in distances.items()} | {"kl": kl}
    if not labelled:
        return losses | {"loss": weights.unlabelled * distil}
    task = task_loss(output, batch)
    return losses | {"task": task, "loss": task + weights.labelled * distil}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter on `model`: LoRA, bypass, classification head."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name or ".recovery." in name or ".modules_to_save." in name
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

    def loss_of_step(step: int) -> tuple[Losses, int]:
        chosen = [examples[i] for i in share(batches[step])]
        batch = family.collate(chosen, model)
        return {"loss": task_loss(family.forward(model, batch, None), batch)}, sum(e.tokens for e in chosen)

    history = train(trainable(model), loss_of_step, score, schedule, model.dtype, checkpoint, title)
    return Adapter(config, lora_state(model)), history


def distill(
    model: PreTrainedModel,
    adapter: Adapter,
    labelled: tuple[Sequence[Example], Targets],
    unlabelled: tuple[Sequence[Example], Targets] | None,
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
    """Train the inherited LoRA and its bypass on the compressed model against the stored teacher targets.

    Args:
        model: the compressed model's dense view, changed in place.
        adapter: what `inherit` gave.
        labelled, unlabelled: examples, and the teacher's targets for them; without unlabelled ones every step is
            labelled.
        score: () -> validation score.

    Returns:
        The adapter with the best validation score, and the curves.
    """
    attach_adapter(model, adapter, name)
    set_active(model, name)
    place(model)
    family = family_of(model)
    every = weights.unlabelled_every if unlabelled else 0
    pools = [p for p in (labelled, unlabelled) if p is not None]
    texts = [targets.with_answers(examples) for examples, targets in pools]
    plans = [
        epoch_batches([e.tokens for e in pool], batch_size, schedule.steps, seed + 1000 * i)
        for i, pool in enumerate(texts)
    ]

    def loss_of_step(step: int) -> tuple[Losses, int]:
        pool = 1 if every and step % every == every - 1 else 0
        turn = step // every if pool else step - (step // every if every else 0)
        indices = share(plans[pool][turn])
        chosen = [texts[pool][i] for i in indices]
        batch = family.collate(chosen, model)
        output = family.forward(model, batch, None)
        target = pools[pool][1].read(indices, model.device)
        return distillation_loss(output, batch, target, weights, pool == 0), sum(e.tokens for e in chosen)

    history = train(trainable(model), loss_of_step, score, schedule, model.dtype, checkpoint, title)
    return take_adapter(model, adapter.config, adapter.meta, name), history
