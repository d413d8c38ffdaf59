"""The loss: L = w_task L_task + f (sum_stack alpha_stack L_dist + w_kl L_KL) (paper, eq. 6; the rest is ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from calora.common.divergence import divergence
from calora.distillation.targets import Target
from calora.distillation.training import Losses
from calora.errors import CaloraError
from calora.models.families import IGNORE, Batch, Output

Part = tuple[str, float, Tensor, str]  # name, weight, value (a mean), and the kind of items that it is over
ANSWERS, KNOWN = (
    "answers",
    "known",
)  # kinds of items: positions of an answer, and those whose token is known; or a stack


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of the loss; all >= 0.

    The default is L = L_task: a plain fine-tuning. The paper's form is `kl = 0`, `unlabelled_every = 0`.

    Args:
        task: weight of L_task; unlabelled batches have none.
        alpha: stack -> weight of the mean squared distance of the last hidden states.
        kl: weight of KL(teacher || student) over the answer logits.
        labelled, unlabelled: factors of those two on labelled and on unlabelled texts.
        unlabelled_every: every how many steps the batch is unlabelled; 0 is never, 2 every second one, 1 always.
    """

    task: float = 1.0
    alpha: Mapping[str, float] = field(default_factory=dict)
    kl: float = 0.0
    labelled: float = 0.0
    unlabelled: float = 0.0
    unlabelled_every: int = 0

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of the loss looks at the teacher."""
        used = self.labelled > 0 or (self.unlabelled > 0 and self.unlabelled_every > 0)
        return used and (self.kl > 0 or any(weight > 0 for weight in self.alpha.values()))


def task_loss(output: Output, batch: Batch) -> Tensor:
    """L_task: cross-entropy of the right answer's tokens, mean over answer positions."""
    return F.cross_entropy(output.logits.float(), batch.labels)


def hidden_distance(hidden: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """L_dist of one stack: mean over real tokens and features of (f_student - f_teacher)^2 (paper, eq. 6).

    Args:
        hidden: [B, T, H]; mask: [B, T]; target: [N, H], N = number of real tokens, in row order.
    """
    states = hidden[mask]  # [N, H]
    if states.shape != target.shape:
        raise CaloraError(
            "teacher targets", f"hidden states {tuple(states.shape)}", tuple(target.shape), "make the targets again"
        )
    return F.mse_loss(states.float(), target.float())


def items(batch: Batch, kind: str) -> Tensor:
    """True at each item of a kind: a real token of a stack, or a position of an answer."""
    if kind in batch.masks:
        return batch.masks[kind]
    return batch.labels != IGNORE if kind == KNOWN else torch.ones_like(batch.labels, dtype=torch.bool)


def distance_parts(output: Output, batch: Batch, target: Target, weights: Weights) -> list[Part]:
    """Each part that looks at the teacher; `output.logits` is over the whole vocabulary."""
    parts: list[Part] = []
    for stack, weight in weights.alpha.items():
        if weight > 0 and stack in output.hidden:
            mask = batch.masks[stack]
            distance = hidden_distance(output.hidden[stack], mask, target.hidden[stack])
            parts.append((f"hidden_{stack}", weight, distance, stack))
    if weights.kl > 0:
        kl = divergence(output.logits.gather(1, target.token_ids), target.logits)
        parts.append(("kl", weights.kl, kl, ANSWERS))
    return parts


def loss_of(
    output: Output,
    batch: Batch,
    target: Target | None,
    weights: Weights,
    labelled: bool,
    weigh: Callable[[str], float] = lambda _: 1.0,
) -> Losses:
    """The loss of one batch and its parts by name; without a target, or with weights that need none, L = w_task L_task.

    Args:
        weigh: weight of a mean among those of other parts and processes, by the kind of items that it is over (`Parts`).
    """
    parts: list[Part] = []
    if target is not None:
        factor = weights.labelled if labelled else weights.unlabelled
        distances = distance_parts(output, batch, target, weights)
        parts = [(name, factor * weight, value, kind) for name, weight, value, kind in distances]
    if labelled and weights.task > 0:
        parts.append(("task", weights.task, task_loss(output, batch), KNOWN))
    if not parts:
        kind = "labelled" if labelled else "unlabelled"
        raise CaloraError("loss", f"a weight above 0 on {kind} texts", "none", "raise task, alpha or kl")
    losses = {name: value * weigh(kind) for name, _, value, kind in parts}
    return losses | {"loss": torch.stack([weight * losses[name] for name, weight, _, _ in parts]).sum()}
