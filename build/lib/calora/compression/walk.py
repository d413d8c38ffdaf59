"""Walk through a model once: each block gets all steps, with the inputs that the compressed blocks before it give.

Activations of one block are held at a time: its inputs and its outputs over all calibration texts (as SparseGPT does,
arXiv 2301.00774). A finished block is written to the checkpoint, so that a killed compression goes on after it. Of a
streamed model one block is in memory at a time, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calora.common.progress import progress
from calora.compression.finished import keep, take
from calora.errors import CaloraError
from calora.layers.layout import dense_weight
from calora.models.anatomy import block_layers, stacks
from calora.models.blocks import blocks_of
from calora.models.families import family_of
from calora.models.moments import Readers, as_read, batches_of, real
from calora.models.tasks import Example


@dataclass(frozen=True)
class Calibration:
    """What compression looks at, and where it keeps what it has finished.

    Args:
        examples: tokenised texts.
        checkpoint: folder for finished blocks; None keeps nothing.
        tuning: more of them, for a recovery that is tuned.
    """

    examples: Sequence[Example]
    checkpoint: Path | None = None
    tuning: Sequence[Example] = ()


@dataclass
class Change:
    """What a step makes of one block.

    Args:
        modules: full name -> the module that takes its place.
        notes: full name of a layer -> what the report says of it.
        kept: `<layer>.rows` / `<layer>.columns` -> indices of the outputs / inputs that remain, in their new order.
        earlier: full name of a layer -> step -> notes, of the steps that this one went through itself.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    earlier: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass
class Walked:
    """What became of some blocks.

    Args:
        layers: layer -> step -> notes, with `output_error`, ||(W - W') X|| / ||W X||, where it kept its shape and order.
        blocks: block -> relative error of its output after all steps, on the inputs that the blocks before it give.
        seconds: step -> time, and `walk`: of the passes and the writing between them.
        kept: `Change.kept`, composed over the steps.
    """

    layers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def took(self, what: str, seconds: float) -> None:
        """Count some time."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Compose what remains: indices of indices."""
        for name, indices in kept.items():
            earlier = self.kept.get(name)
            self.kept[name] = indices if earlier is None else earlier[indices.long()]

    def add(self, other: Walked) -> None:
        """Take in what became of other blocks."""
        for name, steps in other.layers.items():
            self.layers.setdefault(name, {}).update(steps)
        self.blocks |= other.blocks
        for what, seconds in other.seconds.items():
            self.took(what, seconds)
        self.keep(other.kept)


Part = tuple[str, Callable[["Block"], Change]]  # a step, and one of the things that it does to each block
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


class Block:
    """One transformer block with its calibration inputs.

    Args:
        dtype: in which its values will be stored; it may compute in another.
    """

    def __init__(self, name: str, model: nn.Module, recorded: Recorded, dtype: torch.dtype) -> None:
        self.name, self.model, self.recorded, self.dtype = name, model, recorded, dtype
        self.index = int(name.rpartition(".")[2])
        self.before: list[Tensor] = []  # its outputs as it was found, once a pass has seen them
        self._moments: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._held = False

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        return self.model.get_submodule(self.name)

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Full name -> linear layer, as it is by now."""
        return block_layers(self.name, self.module)

    def put(self, modules: Mapping[str, nn.Module]) -> None:
        """Replace some modules; inputs are measured anew when they are asked for, unless they are held."""
        for name, module in modules.items():
            self.model.set_submodule(name, module)
        if not self._held:
            self._moments, self._largest = {}, {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inputs stay as they were measured, whatever is put in the place of layers; it is put back at the end."""
        self.moments()
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def run(self, watch: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None) -> Iterator[Tensor]:
        """Yield the block's output [B, T, H] batch by batch.

        `watch` sees the inputs of linear layers: those at real tokens, [tokens, in], and the tensor that they are from.
        """
        masks: list[Tensor] = []

        def hook(see: Callable[[Tensor, Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, args: see(real(args[0].detach(), masks), args[0])

        module, layers = self.module, self.layers
        handles = [layers[name].register_forward_pre_hook(hook(see)) for name, see in (watch or {}).items()]
        try:
            calls = self.recorded.calls[self.index]
            for batch, hidden in enumerate(list(self.recorded.hidden)):
                masks[:] = self.recorded.masks[batch]
                args, options = calls[batch]
                with torch.no_grad():
                    out = module(hidden, *args, **options)
                yield out if isinstance(out, Tensor) else out[0]
        finally:
            for handle in handles:
                handle.remove()

    def moments(self) -> dict[str, Tensor]:
        """Layer -> X^T X, fp32 [in, in], over all calibration tokens, with the block as it is by now.

        Layers that read the same input (queries, keys and values) have the same tensor: `groups` finds them by it.
        """
        if not self._moments:
            sums, readers = dict[str, Tensor](), Readers()

            def watch(name: str) -> Callable[[Tensor, Tensor], None]:
                def see(x: Tensor, source: Tensor) -> None:  # x: [tokens, in], of source: [B, T, in]
                    if not readers.leads(name, source):
                        return
                    x = x.float()
                    most = x.abs().amax(0)  # [in]
                    self._largest[name] = torch.maximum(self._largest[name], most) if name in sums else most
                    sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x  # [in, in]

                return see

            names, first = list(self.layers), not self.before
            for out in self.run({name: watch(name) for name in names}):
                if first:
                    self.before.append(out)
                readers.next_pass()
            for name in names:
                check_finite(f"inputs of {name}", sums.get(readers.leader.get(name, "")))
            self._moments = {name: sums[readers.leader[name]] for name in names}
            self._largest = {name: self._largest[readers.leader[name]] for name in names}
        return self._moments

    def groups(self) -> list[dict[str, nn.Linear]]:
        """The layers, those that read the same input together."""
        found: dict[int, dict[str, nn.Linear]] = {}
        layers = self.layers
        for name, moment in self.moments().items():
            found.setdefault(id(moment), {})[name] = layers[name]
        return list(found.values())

    def largest(self) -> dict[str, Tensor]:
        """Layer -> largest |x| of each input, fp32 [in]."""
        self.moments()
        return self._largest

    def inputs(self, *names: str) -> list[Tensor]:
        """All inputs of some linear layers, each [tokens, in], with the block as it is by now."""
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


def each_block(model: PreTrainedModel, parts: Sequence[Part], calibration: Calibration, dtype: torch.dtype) -> Walked:
    """Apply all parts to one block, then to the next, and say what became of each.

    Args:
        dtype: in which values will be stored.
    """
    found, blocks = Walked(), blocks_of(model)
    names = [f"{stack}.{index}" for stack, blocks in stacks(model).items() for index in range(len(blocks))]
    recorded, recorded_for = None, ""
    for name in progress(names, "compress", "blocks"):
        stack, _, index = name.rpartition(".")
        path = calibration.checkpoint / f"{name}.safetensors" if calibration.checkpoint else None
        if path and path.exists() and recorded_for != stack:
            kept, told = take(path, model)
            blocks.finish(name, path)
            found.add(Walked(told["layers"], told["blocks"], told["seconds"], kept))
            continue
        start = time.monotonic()
        if recorded is None or stack != recorded_for:
            with blocks.passing():
                recorded, recorded_for = _record(model, stack, calibration.examples), stack
            for earlier in (f"{stack}.{place}" for place in range(int(index))):
                with blocks.present(earlier):
                    recorded.hidden = list(Block(earlier, model, recorded, dtype).run())
        with blocks.present(name):
            made, modules = _compress(Block(name, model, recorded, dtype), parts)
            if path:
                told = {"layers": made.layers, "blocks": made.blocks, "seconds": made.seconds}
                keep(path, model, modules, made.kept, told)
            blocks.finish(name, path)
        made.took("walk", time.monotonic() - start - sum(made.seconds.values()))
        found.add(made)
    return found


def _compress(block: Block, parts: Sequence[Part]) -> tuple[Walked, list[str]]:
    """Apply all parts to one block, and put its new outputs in the place of its inputs; also the modules that are new."""
    made, modules = Walked(), dict[str, None]()
    block.moments()
    for step, change in parts:
        start = time.monotonic()
        done = change(block)
        errors = _errors(block, done)
        block.put(done.modules)
        modules |= dict.fromkeys(done.modules)
        for name, earlier in done.earlier.items():
            made.layers.setdefault(name, {}).update(earlier)
        for name in sorted({*done.modules, *done.notes}):
            made.layers.setdefault(name, {}).setdefault(step, {}).update(
                done.notes.get(name, {}) | errors.get(name, {})
            )
        made.keep(done.kept)
        made.took(step, time.monotonic() - start)
    squares = [0.0, 0.0]
    for batch, after in enumerate(block.run()):  # [B, T, H]
        had, has = (real(x, block.recorded.masks[batch]).float() for x in (block.before[batch], after))
        check_finite(f"outputs of {block.name}", has)
        squares[0] += float((has - had).square().sum())
        squares[1] += float(had.square().sum())
        block.before[batch] = after
    block.recorded.hidden = block.before
    made.blocks[block.name] = round((squares[0] / max(squares[1], 1e-30)) ** 0.5, 6)
    return made, list(modules)


def _errors(block: Block, done: Change) -> dict[str, dict[str, float]]:
    """Layer -> the error of its output, where it kept its shape and the order of its inputs and outputs."""
    errors = {}
    for name, layer in block.layers.items():
        new = done.modules.get(name)
        moved = f"{name}.rows" in done.kept or f"{name}.columns" in done.kept
        if isinstance(new, nn.Linear) and not moved:
            errors[name] = {"output_error": output_error(layer, new, block.moments()[name])}
    return errors


def output_error(old: nn.Module, new: nn.Module, moment: Tensor) -> float:
    """||(W - W') X^T||_F / ||W X^T||_F, from X^T X [in, in]."""
    before = dense_weight(old, torch.float32)
    error = before - dense_weight(new, torch.float32)
    lost, whole = float(((error @ moment) * error).sum()), float(((before @ moment) * before).sum())
    return round(math.sqrt(max(lost, 0.0) / max(whole, 1e-30)), 6)


def _record(model: PreTrainedModel, stack: str, examples: Sequence[Example]) -> Recorded:
    """Run the model once, and keep what the blocks of a stack are called with."""
    blocks = stacks(model)[stack]
    recorded = Recorded([], [], [[] for _ in blocks])

    def watch(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if index == 0:
                recorded.hidden.append(args[0].detach())
            recorded.calls[index].append((args[1:], options))

        return hook

    handles = [block.register_forward_pre_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    family = family_of(model)
    try:
        with torch.no_grad():
            for indices in batches_of(model, examples):
                batch = family.collate([as_read(model, examples[i]) for i in indices], model)
                recorded.masks.append(list(batch.masks.values()))
                family.forward(model, batch, torch.tensor([0]))
    finally:
        for handle in handles:
            handle.remove()
    return recorded
