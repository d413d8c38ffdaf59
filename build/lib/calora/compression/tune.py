"""Tune the recovery of the base as a whole: its factors learn what the uncompressed model says next, on unlabelled texts.

Block by block they were fitted to outputs of layers; here they descend L = KL(p_M || p_C) of the next token, mean over all
positions, M the uncompressed model. No labels, no adapter, nothing else is trained. After RILQ (arXiv 2412.01129), whose
loss looks at the whole model too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.common.batching import epoch_batches, length_batches
from calora.common.divergence import divergence
from calora.common.progress import progress
from calora.compression.options import FIX, whole
from calora.errors import CaloraError
from calora.layers.layout import dense_layer, own_weight
from calora.layers.nf4 import Nf4Linear
from calora.layers.packed import PackedLinear
from calora.models.anatomy import linear_layers
from calora.models.families import Classifier, family_of
from calora.models.moments import as_read
from calora.models.tasks import Example
from calora.recovery.shared import Factors, SharedRecovery, attach_shared, detach_shared, shared_of

SEED = 0  # of the order of the texts
WARM = 0.1  # share of the steps in which the learning rate rises
HELD = 64  # texts, at most, that nothing is learnt from
Group = Mapping[str, nn.Linear]  # the layers that share D, by name
Recoveries = Mapping[str, SharedRecovery]


@dataclass(frozen=True)
class Tuning:
    """How long and how fast.

    Args:
        steps: of AdamW, at least 1.
        lr: highest learning rate, between 0 and 1, of factors that are scaled to a largest value of 1 for each input of
            D and each output of U; it rises over a tenth of the steps, then falls linearly to 0.
        batch_size: texts a step, at least 1.
    """

    steps: int
    lr: float
    batch_size: int

    def __post_init__(self) -> None:
        whole("recover.tune.steps", self.steps, 1)
        whole("recover.tune.batch_size", self.batch_size, 1)
        if not isinstance(self.lr, float) or not 0 < self.lr < 1:
            raise CaloraError("recover.tune.lr", "a number above 0 and below 1", repr(self.lr), FIX)

    def rate(self, step: int) -> float:
        """Share of `lr` at step 0, 1, ..."""
        warm = max(1, round(WARM * self.steps))
        return (step + 1) / warm if step < warm else (self.steps - step) / max(1, self.steps - warm)


def tune(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Sequence[Example],
    tuning: Tuning,
    format: str,
    dtype: torch.dtype,
) -> list[float]:
    """Train the recovery of `model` in place; it is stored as before, and stays as it was if that is no better.

    Args:
        model: compressed, frozen; its layers keep their stored form.
        teacher: the uncompressed model.
        texts: at least 2; one of ten or more is held back, and what is kept is decided on those.
        format, dtype: of the factors, as in `Factors.of`.

    Returns:
        L on the texts that are held back, nats a token, [before, after], both of stored values.

    Raises:
        CaloraError: there is no recovery, or the loss is not finite.
    """
    learnt, held = ([_at_every_position(model, text) for text in part] for part in divided(texts))
    with _dense(model, teacher.dtype):
        return _tune(model, teacher, learnt, held, tuning, partial(_encoded, format=format, dtype=dtype))


def _tune(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Sequence[Example],
    held: Sequence[Example],
    tuning: Tuning,
    encoded: Callable[[Recoveries], dict[str, SharedRecovery]],
) -> list[float]:
    groups = _groups(model)
    stored = [_taken(group) for group in groups]
    before = _measured(model, teacher, held, tuning.batch_size)
    for group, own in zip(groups, stored, strict=True):
        _put(group, _trainable(own))
    _descend(model, teacher, texts, tuning, [_taken(group) for group in groups])
    for group in groups:
        _put(group, encoded(_taken(group)))
    after = _measured(model, teacher, held, tuning.batch_size)
    if not after < before:  # nor if it is NaN
        for group, own in zip(groups, stored, strict=True):
            _put(group, own)
    return [float(f"{value:.6g}") for value in (before, after)]


@contextmanager
def _dense(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Packed layers dense meanwhile, with the same values: they would be unpacked in each pass."""
    packed = {
        name: layer for name, layer in linear_layers(model).items() if isinstance(layer, PackedLinear | Nf4Linear)
    }
    for name, layer in packed.items():
        dense = dense_layer(own_weight(layer, dtype), layer.bias)
        _move(layer, dense)
        model.set_submodule(name, dense)
    try:
        yield
    finally:
        for name, layer in packed.items():
            _move(model.get_submodule(name), layer)
            model.set_submodule(name, layer)


def _move(old: nn.Module, new: nn.Module) -> None:
    """Put the recovery of one layer, if it has one, beside another."""
    recovery = detach_shared(old)
    if recovery is not None:
        attach_shared(new, recovery)


def divided(texts: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(What is learnt from, what is held back): evenly from wherever the texts come, which are in the order of that.

    Raises:
        CaloraError: there are fewer than 2.
    """
    if len(texts) < 2:
        raise CaloraError(
            "recover.tune", "2 texts or more, to learn from and to hold back", len(texts), "give it texts"
        )
    every = min(len(texts), max(10, math.ceil(len(texts) / HELD)))
    held = range(every // 2, len(texts), every)
    return [text for i, text in enumerate(texts) if i not in held], [texts[i] for i in held]


def _at_every_position(model: PreTrainedModel, text: Example) -> Example:
    """A text whose every token is followed by an answer token, the last one too: there a prompt is answered."""
    ids = text.prompt_ids
    if isinstance(family_of(model), Classifier):  # one place in each text
        return text
    at = len(as_read(model, text).prompt_ids) if model.config.is_encoder_decoder else 1
    return Example(ids[:at], [*ids[at:], ids[-1]])


def _groups(model: nn.Module) -> list[Group]:
    """The layers with a recovery, by the D that they share."""
    groups: dict[int, dict[str, nn.Linear]] = {}
    for name, layer in linear_layers(model).items():
        recovery = shared_of(layer)
        if recovery is not None:
            groups.setdefault(recovery.down.data_ptr(), {})[name] = layer
    if not groups:
        raise CaloraError("recover.tune", "a recovery of rank 1 or more", "none", "raise the budget")
    return list(groups.values())


def _taken(group: Group) -> dict[str, SharedRecovery]:
    return {name: recovery for name, layer in group.items() if (recovery := shared_of(layer))}


def _put(group: Group, recoveries: Recoveries) -> None:
    for name, recovery in recoveries.items():
        detach_shared(group[name])
        attach_shared(group[name], recovery)


def _trainable(stored: Recoveries) -> dict[str, SharedRecovery]:
    """The same maps in fp32, each input of D and output of U scaled to a largest value of 1.

    A step of AdamW is as long for every value: without the scales it would ruin what meets the largest activations.
    """
    down = next(iter(stored.values())).values()[0]
    inputs = down.abs().amax(0)  # [in]
    shared = {"down": (down / inputs.clamp_min(1e-30)).requires_grad_(), "inputs": inputs}
    made = {}
    for name, recovery in stored.items():
        up = recovery.values()[1]
        outputs = up.abs().amax(1)  # [out]
        own = {"up": (up / outputs.clamp_min(1e-30).unsqueeze(1)).requires_grad_(), "outputs": outputs}
        made[name] = SharedRecovery().restore(shared | own)
    return made


def _encoded(trained: Recoveries, format: str, dtype: torch.dtype) -> dict[str, SharedRecovery]:
    """The maps as they are stored."""
    factors = {name: recovery.values() for name, recovery in trained.items()}
    down = next(iter(factors.values()))[0].detach()
    made = Factors.of(down.T, {name: up.detach().T for name, (_, up) in factors.items()}, format, dtype)
    return {name: SharedRecovery(made, name) for name in trained}


def _descend(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Sequence[Example],
    tuning: Tuning,
    trained: Sequence[Recoveries],
) -> None:
    """Train the factors."""
    tensors = [tensor for group in trained for one in group.values() for tensor in (one.down, one.up)]
    parameters = list({id(tensor): tensor for tensor in tensors}.values())  # D counts once
    optimizer = torch.optim.AdamW(parameters, lr=tuning.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, tuning.rate)
    batches = epoch_batches([text.tokens for text in texts], tuning.batch_size, tuning.steps, SEED)
    bar = progress(batches, "tune", "steps")
    for indices in bar:
        loss = _loss(model, teacher, [texts[i] for i in indices])
        value = loss.item()
        if not math.isfinite(value):
            raise CaloraError("recover.tune", "a finite loss", value, "lower recover.tune.lr")
        # not backward(): other weights may ask for gradients too. An expert that no token chose has none.
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        bar.set_postfix(refresh=False, loss=f"{value:.3f}")


def _loss(model: PreTrainedModel, teacher: PreTrainedModel, texts: Sequence[Example]) -> Tensor:
    """L of a batch."""
    family = family_of(model)
    batch = family.collate(texts, model)
    with torch.no_grad():
        target = family.forward(teacher, batch, None).logits
    return divergence(family.forward(model, batch, None).logits, target)


def _measured(model: PreTrainedModel, teacher: PreTrainedModel, texts: Sequence[Example], batch_size: int) -> float:
    """L, mean over all positions of all texts."""
    total, positions = 0.0, sum(text.tokens for text in texts)
    with torch.no_grad():
        for indices in length_batches([text.tokens for text in texts], batch_size):
            batch = [texts[i] for i in indices]
            total += float(_loss(model, teacher, batch)) * sum(text.tokens for text in batch)
    return total / positions
