"""The inputs of linear layers: statistics over calibration examples, and which layers read the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from calora.common.batching import equal_length_batches, length_batches
from calora.common.progress import progress
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers
from calora.models.families import family_of
from calora.models.tasks import Example

BATCH = 32  # texts that go through the model together
MOMENT_BYTES = 2**30  # second moments held at once; wider models take more passes instead of more memory


def as_read(model: PreTrainedModel, example: Example) -> Example:
    """A text as calibration runs it: an encoder-decoder reads its first half and writes the second.

    With no answer its decoder would see its start token alone: X^T X of rank 1.
    """
    ids = example.prompt_ids
    at = max(1, len(ids) // 2) if model.config.is_encoder_decoder else len(ids)
    return Example(ids[:at], ids[at:])


def real(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The values at real tokens, [tokens, ...], of x [B, T, ...], or [B T, H] as some feed-forwards flatten it."""
    for mask in masks:
        if mask.shape == x.shape[:2]:
            return x[mask]
        if x.ndim == 2 and len(x) == mask.numel():
            return x[mask.flatten()]
    return x.flatten(0, -2)


def batches_of(model: PreTrainedModel, examples: Sequence[Example]) -> list[list[int]]:
    """Indices of calibration texts that go through the model together."""
    # The masks of two stacks may be of one shape, so that no shape says which one counts: then nothing is padded.
    batches = equal_length_batches if model.config.is_encoder_decoder else length_batches
    return batches([len(e.prompt_ids) for e in examples], BATCH)


class Readers:
    """Which layers read one tensor, pass after pass: the first that reads it stands for them all."""

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}  # layer -> the one that stands for it
        self._read: dict[int, tuple[str, Tensor]] = {}  # id of a tensor -> its first reader, in this pass, and itself

    def leads(self, name: str, x: Tensor) -> bool:
        """Whether the layer called `name`, which reads `x`, stands for those that do."""
        self.leader.setdefault(name, self._read.setdefault(id(x), (name, x))[0])
        return self.leader[name] == name

    def next_pass(self) -> None:
        """Let go of the tensors: their ids may be others' from now on."""
        self._read.clear()


def input_square_sums(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Layer name -> sum over tokens of x^2, fp32 [in] (Wanda's ||X_j||^2)."""
    return _accumulate(model, examples, linear_layers(model), lambda x: x.square().sum(0), "input norms")


def input_second_moments(
    model: PreTrainedModel, examples: Sequence[Example], layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer name, X^T X) with fp32 [in, in], a group of layers at a time to bound the memory.

    Args:
        layers: linear layers, or PEFT's around them.
    """
    group: dict[str, Any] = {}
    for name, layer in layers.items():
        group[name] = layer
        if not held_together(group):
            yield from _accumulate(model, examples, group, lambda x: x.T @ x, "input covariance").items()
            group = {}
    if group:
        yield from _accumulate(model, examples, group, lambda x: x.T @ x, "input covariance").items()


def held_together(layers: Mapping[str, Any]) -> bool:
    """Whether the second moments of the inputs of these linear layers may be in memory at once."""
    return bool(sum(4 * layer.in_features**2 for layer in layers.values()) < MOMENT_BYTES)


def read_together(model: PreTrainedModel) -> list[list[str]]:
    """The linear layers of the blocks, by name, those that read the same tensor together, as a pass over two tokens has it."""
    layers = linear_layers(model)
    kept: list[Tensor] = []  # the id of a tensor that has gone may be another's
    read: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            read.setdefault(name, id(args[0]))

        return hook

    _two_tokens(model, [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()])
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(read.get(name, id(layer)), []).append(name)
    return list(groups.values())


def norms_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Each module with a vector of weights (a norm) whose output linear layers of the blocks read -> those layers, by name."""
    layers = linear_layers(model)
    kept: list[Tensor] = []
    made: dict[int, str] = {}  # id of an output -> the norm that it is of
    found: dict[str, list[str]] = {}

    def gives(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(out, Tensor):
                kept.append(out)
                made[id(out)] = name

        return hook

    def reads(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: found.setdefault(made.get(id(args[0]), ""), []).append(name)

    norms = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1
    }
    handles = [module.register_forward_hook(gives(name)) for name, module in norms.items()]
    handles += [layer.register_forward_pre_hook(reads(name)) for name, layer in layers.items()]
    _two_tokens(model, handles)
    found.pop("", None)
    return found


def _two_tokens(model: PreTrainedModel, handles: Sequence[RemovableHandle]) -> None:
    """Run two tokens through the model, for hooks to see; they are removed."""
    try:
        with torch.no_grad():
            family = family_of(model)
            family.forward(model, family.collate([as_read(model, Example([0, 0]))], model), torch.tensor([0]))
    finally:
        for handle in handles:
            handle.remove()


def _accumulate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    layers: Mapping[str, nn.Module],
    statistic: Callable[[Tensor], Tensor],
    title: str,
) -> dict[str, Tensor]:
    if not examples:
        raise CaloraError("calibration", "at least one text", "none", "give some")
    sums: dict[str, Tensor] = {}
    masks: list[Tensor] = []
    readers = Readers()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if readers.leads(name, args[0]):
                value = statistic(real(args[0].detach(), masks).float())  # of x: [tokens, in]
                sums[name] = sums[name].add_(value) if name in sums else value

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        family = family_of(model)
        with torch.no_grad():
            for indices in progress(batches_of(model, examples), title, "batches"):
                batch = family.collate([as_read(model, examples[i]) for i in indices], model)
                masks[:] = batch.masks.values()
                family.forward(model, batch, torch.tensor([0]))
                readers.next_pass()
    finally:
        for handle in handles:
            handle.remove()
    sums = {name: sums[readers.leader[name]] for name in layers if name in readers.leader}
    silent = sorted(set(layers) - set(sums))
    if silent:
        raise CaloraError("calibration", "an input for every linear layer", f"none for {silent[0]}", "check the base")
    for name, value in sums.items():
        if not bool(value.isfinite().all()):
            raise CaloraError(f"inputs of {name}", "finite values", "NaN or Inf", "check the base's weights")
    return sums
