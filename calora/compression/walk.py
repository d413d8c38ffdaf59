"""Walk through a model block by block, each with the inputs that the already compressed blocks give it.

Activations of one block are held at a time: its inputs and its outputs over all calibration texts (as SparseGPT does,
arXiv 2301.00774). A finished block is written to the checkpoint, so that a killed compression goes on after it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.common.artifacts import write_tensors
from calora.common.batching import length_batches
from calora.common.progress import progress
from calora.errors import CaloraError
from calora.layers.layout import dense_weight, restore, store
from calora.models.anatomy import linear_layers, stacks
from calora.models.families import family_of
from calora.models.tasks import Example

BATCH = 32  # calibration texts that go through a block together


@dataclass(frozen=True)
class Calibration:
    """What a step looks at, and where it keeps what it has finished.

    Args:
        examples: tokenised texts.
        checkpoint: folder for finished blocks; None keeps nothing.
    """

    examples: Sequence[Example]
    checkpoint: Path | None = None


@dataclass
class Change:
    """What a step makes of one block.

    Args:
        modules: full name -> the module that takes its place.
        notes: full name of a layer -> what the report says of it.
        kept: `<layer>.rows` / `<layer>.columns` -> indices of the outputs / inputs that remain, in their new order.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Recorded:
    """What a stack of blocks is called with, batch by batch.

    Args:
        hidden: hidden states that enter the next block, [B, T, H].
        masks: of the batch's stacks, [B, T], True at real tokens.
        calls: block -> all else that it is called with.
    """

    hidden: list[Tensor]
    masks: list[list[Tensor]]
    calls: list[list[Call]]


def real(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The values at real tokens, [tokens, ...], of x [B, T, ...]: padding is no input."""
    for mask in masks:
        if mask.shape == x.shape[:2]:
            return x[mask]
    return x.flatten(0, -2)


class Block:
    """One transformer block with its calibration inputs.

    Args:
        layers: full name -> linear layer of the block.
    """

    def __init__(
        self, name: str, module: nn.Module, layers: dict[str, nn.Linear], recorded: Recorded, index: int
    ) -> None:
        self.name, self.module, self.layers = name, module, layers
        self.recorded, self.index = recorded, index
        self._moments: dict[str, Tensor] | None = None
        self._largest: dict[str, Tensor] = {}

    def run(self, watch: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None) -> Iterator[Tensor]:
        """Yield the block's output [B, T, H] batch by batch.

        `watch` sees the inputs of linear layers: those at real tokens, [tokens, in], and the tensor that they are from.
        """
        masks: list[Tensor] = []

        def hook(see: Callable[[Tensor, Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, args: see(real(args[0].detach(), masks), args[0])

        handles = [self.layers[name].register_forward_pre_hook(hook(see)) for name, see in (watch or {}).items()]
        try:
            calls = self.recorded.calls[self.index]
            for batch, hidden in enumerate(list(self.recorded.hidden)):
                masks[:] = self.recorded.masks[batch]
                args, options = calls[batch]
                with torch.no_grad():
                    out = self.module(hidden, *args, **options)
                yield out if isinstance(out, Tensor) else out[0]
        finally:
            for handle in handles:
                handle.remove()

    def moments(self) -> dict[str, Tensor]:
        """Layer -> X^T X, fp32 [in, in], over all calibration tokens, before anything in the block changed.

        Layers that read the same input (queries, keys and values) have the same tensor: `groups` tells them.
        """
        if self._moments is None:
            sums: dict[str, Tensor] = {}
            readers: dict[int, tuple[str, Tensor]] = {}  # id of an input -> the first layer that read it, in this pass
            leader: dict[str, str] = {}

            def watch(name: str) -> Callable[[Tensor, Tensor], None]:
                def see(x: Tensor, source: Tensor) -> None:
                    leader.setdefault(name, readers.setdefault(id(source), (name, source))[0])
                    if leader[name] != name:
                        return
                    x = x.float()
                    most = x.abs().amax(0)
                    self._largest[name] = torch.maximum(self._largest[name], most) if name in sums else most
                    sums[name] = torch.addmm(sums[name], x.T, x) if name in sums else x.T @ x

                return see

            self.before = []
            for out in self.run({name: watch(name) for name in self.layers}):
                self.before.append(out)
                readers.clear()
            for name in self.layers:
                check_finite(f"inputs of {name}", sums.get(leader.get(name, "")))
            self._moments = {name: sums[leader[name]] for name in self.layers}
            self._largest = {name: self._largest[leader[name]] for name in self.layers}
        return self._moments

    def groups(self) -> list[dict[str, nn.Linear]]:
        """The layers, those that read the same input together."""
        found: dict[int, dict[str, nn.Linear]] = {}
        for name, moment in self.moments().items():
            found.setdefault(id(moment), {})[name] = self.layers[name]
        return list(found.values())

    def largest(self) -> dict[str, Tensor]:
        """Layer -> largest |x| of each input, fp32 [in]."""
        self.moments()
        return self._largest

    def inputs(self, *names: str) -> list[Tensor]:
        """All inputs of some linear layers, each [tokens, in], before anything in the block changed."""
        seen: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str) -> Callable[[Tensor, Tensor], None]:
            return lambda x, _: seen[name].append(x)

        for _ in self.run({name: keep(name) for name in names}):
            pass
        return [torch.cat(parts) for parts in seen.values()]


def check_finite(name: str, tensor: Tensor | None) -> None:
    """Raise unless the tensor is there and holds neither NaN nor Inf."""
    if tensor is None:
        raise CaloraError(name, "calibration inputs", "none", "leave this base: calora does not know its blocks")
    if not bool(tensor.isfinite().all()):
        raise CaloraError(name, "finite values", "NaN or Inf", "check the base's weights; nothing was written")


def each_block(
    model: PreTrainedModel, calibration: Calibration, title: str, change: Callable[[Block], Change]
) -> dict[str, Any]:
    """Apply `change` to one block after another, and report what became of each.

    Returns:
        `layers` (name -> notes, with the relative error of the layer's output, ||(W - W') X|| / ||W X||, where its
        shape stayed), `blocks` (name -> relative error of the block's output), and `kept` (tensors).
    """
    report: dict[str, Any] = {"layers": {}, "blocks": {}, "kept": {}}
    total = sum(len(stack) for stack in stacks(model).values())
    bar = progress(range(total), title, "blocks")
    turn = iter(bar)
    for stack_name, stack in stacks(model).items():
        recorded: Recorded | None = None
        for index, module in enumerate(stack):
            name = f"{stack_name}.{index}"
            next(turn)
            done = _finished(calibration.checkpoint, f"{title}-{name}")
            if done is None:
                if recorded is None:
                    recorded = _record(model, stack, calibration.examples)
                    for earlier in range(index):
                        recorded.hidden = list(Block("", stack[earlier], {}, recorded, earlier).run())
                # Asked for anew: a table of all layers would keep every one that was replaced.
                own = {key: layer for key, layer in linear_layers(model).items() if key.startswith(f"{name}.")}
                done = _change(model, Block(name, module, own, recorded, index), change)
                if calibration.checkpoint:
                    _keep(calibration.checkpoint / f"{title}-{name}.safetensors", model, done)
            else:
                _take(model, done)
                if recorded is not None:
                    recorded.hidden = list(Block(name, stack[index], {}, recorded, index).run())
            for part in ("layers", "blocks", "kept"):
                report[part] |= done[part]
    for _ in turn:  # lets the bar end
        pass
    return report


def _change(model: PreTrainedModel, block: Block, change: Callable[[Block], Change]) -> dict[str, Any]:
    moments = block.moments()
    before = block.before
    made = change(block)
    errors = {}
    for name, layer in block.layers.items():
        new = made.modules.get(name)
        if isinstance(new, nn.Linear) and (new.in_features, new.out_features) == (
            layer.in_features,
            layer.out_features,
        ):
            errors[name] = output_error(layer, new, moments[name])
    for name, new in made.modules.items():
        model.set_submodule(name, new)
    squares = [0.0, 0.0]
    now = Block(block.name, model.get_submodule(block.name), {}, block.recorded, block.index)
    for batch, after in enumerate(now.run()):
        had, has = (real(x, block.recorded.masks[batch]).float() for x in (before[batch], after))
        check_finite(f"outputs of {block.name}", has)
        squares[0] += float((has - had).square().sum())
        squares[1] += float(had.square().sum())
        before[batch] = after
    block.recorded.hidden = before
    notes = {
        name: {**made.notes.get(name, {}), **({"output_error": errors[name]} if name in errors else {})}
        for name in sorted({*made.notes, *errors})
    }
    return {
        "layers": notes,
        "blocks": {block.name: round((squares[0] / max(squares[1], 1e-30)) ** 0.5, 6)},
        "kept": made.kept,
        "modules": list(made.modules),
    }


def output_error(old: nn.Module, new: nn.Module, moment: Tensor) -> float:
    """||(W - W') X^T||_F / ||W X^T||_F, from X^T X."""
    before = dense_weight(old, torch.float32)
    error = before - dense_weight(new, torch.float32)
    lost, whole = float(((error @ moment) * error).sum()), float(((before @ moment) * before).sum())
    return round(math.sqrt(max(lost, 0.0) / max(whole, 1e-30)), 6)


def _record(model: PreTrainedModel, stack: nn.ModuleList, examples: Sequence[Example]) -> Recorded:
    """Run the model once, and keep what the blocks of a stack are called with."""
    recorded = Recorded([], [], [[] for _ in stack])

    def watch(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if index == 0:
                recorded.hidden.append(args[0].detach())
            recorded.calls[index].append((args[1:], options))

        return hook

    handles = [block.register_forward_pre_hook(watch(i), with_kwargs=True) for i, block in enumerate(stack)]
    family = family_of(model)
    try:
        with torch.no_grad():
            for indices in length_batches([len(e.prompt_ids) for e in examples], BATCH):
                batch = family.collate([Example(examples[i].prompt_ids) for i in indices], model)
                recorded.masks.append(list(batch.masks.values()))
                family.forward(model, batch, torch.tensor([0]))
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _keep(path: Path, model: PreTrainedModel, done: dict[str, Any]) -> None:
    """Write a finished block: its new modules and its part of the report."""
    tensors, entries = {f"kept|{key}": value for key, value in done["kept"].items()}, {}
    for name in done["modules"]:
        entries[name], own = store(model.get_submodule(name))
        tensors |= {f"{name}|{key}": value for key, value in own.items()}
    told = {"entries": entries, "layers": done["layers"], "blocks": done["blocks"]}
    write_tensors(path, tensors, {"done": json.dumps(told)})


def _finished(folder: Path | None, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.safetensors" if folder else None
    if path is None or not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        told: dict[str, Any] = json.loads(file.metadata()["done"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    own: dict[str, dict[str, Tensor]] = {name: {} for name in [*told["entries"], "kept"]}
    for key, tensor in tensors.items():
        owner, _, part = key.partition("|")
        own[owner][part] = tensor
    return {**told, "kept": own.pop("kept"), "tensors": own}


def _take(model: PreTrainedModel, done: dict[str, Any]) -> None:
    for name, entry in done["entries"].items():
        model.set_submodule(name, restore(model.get_submodule(name), entry, done["tensors"][name]))
