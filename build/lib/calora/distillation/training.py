"""The one training loop: teacher, baselines and student differ in their loss and in nothing else.

It is fast on a CPU because the trainable parameters live in one flat buffer (one optimiser call, one norm),
are computed in the model's dtype with fp32 masters, and because batches hold almost no padding.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from calora.common.parallel import average, is_first, total
from calora.common.progress import progress
from calora.common.tensors import read_tensors, write_tensors
from calora.errors import CaloraError

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Args:
        steps: optimiser steps, >= 1.
        lr: peak learning rate; it rises linearly over `warmup` steps, then falls linearly to 0.
        warmup: steps, < steps.
        clip: largest norm of the gradient.
        eval_every: steps between two looks at the validation score; the best one's parameters are kept.
        checkpoint_seconds: seconds between two checkpoints; a kill costs no more work than that.
        accumulation: parts that a step's texts go through in, one after another, >= 1: less memory, the same step.
        gradient_checkpointing: keep the inputs of blocks alone, and compute the rest again in the backward pass.
    """

    steps: int
    lr: float
    warmup: int
    clip: float
    eval_every: int
    checkpoint_seconds: float
    accumulation: int = 1
    gradient_checkpointing: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * (self.steps - step) / max(self.steps - self.warmup, 1)


@dataclass
class History:
    """Curves: one row per step (`loss` and its parts), and one per evaluation (`step`, `score`)."""

    losses: list[dict[str, float]] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> dict[str, float]:
        """The evaluation with the highest score, the earliest of equals."""
        return max(self.scores, key=lambda row: (row["score"], -row["step"]))

    @property
    def rate(self) -> float:
        """Real tokens a second, evaluations left out."""
        return self.tokens / max(self.seconds, 1e-9)

    def latest(self) -> dict[str, str]:
        """The last loss and validation score, to show."""
        shown = {"loss": f"{self.losses[-1]['loss']:.3f}"}
        return shown | ({"validation": f"{self.scores[-1]['score']:.3f}"} if self.scores else {})

    def to_json(self) -> dict[str, Any]:
        """The curves, without the seconds: the same whenever and wherever the run was made."""
        return {"losses": self.losses, "scores": self.scores}


class MasterWeights:
    """Flat fp32 masters of the trainable parameters; parameters and gradients are views into flat buffers.

    The model computes in its own dtype; the optimiser sees one fp32 tensor. Where the model is fp32, the
    parameters are views of the masters themselves.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise CaloraError("training", "trainable parameters", "none", "check the target modules")
        device = self.parameters[0].device
        self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.working = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.working_grad = torch.zeros_like(self.working)
        self.master.grad = torch.zeros_like(self.master)
        self.fresh = True  # whether nothing was collected since the last step
        offset = 0
        for p in self.parameters:
            span = slice(offset, offset + p.numel())
            p.data = self.working[span].view(p.shape)
            p.requires_grad_(True)
            p.grad = self.working_grad[span].view(p.shape)
            offset += p.numel()
        self.optimizer = torch.optim.AdamW(
            [self.master], lr=0.0, weight_decay=0.0, fused=device.type in ("cpu", "cuda")
        )

    def collect(self) -> None:
        """Add the gradients that `backward` left to those of the step, in fp32."""
        assert self.master.grad is not None
        if self.fresh:
            self.master.grad.copy_(self.working_grad)
        else:
            self.master.grad.add_(self.working_grad)
        self.fresh = False
        self.working_grad.zero_()

    def step(self, rate: float, clip: float, where: str = "training") -> None:
        """One AdamW step on the gradients that were collected.

        Raises:
            CaloraError: the gradient is not finite; the parameters are as before.
        """
        assert self.master.grad is not None
        average(self.master.grad)
        self.fresh = True
        norm = float(nn.utils.clip_grad_norm_([self.master], clip))
        if not math.isfinite(norm):
            raise CaloraError(where, "a finite gradient", f"one of norm {norm}", "lower the learning rate")
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.publish()

    def publish(self) -> None:
        """Copy the masters to the parameters that the model computes with."""
        if self.working is not self.master:
            self.working.copy_(self.master)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments, for a checkpoint."""
        state = self.optimizer.state.get(self.master, {})
        return {"master": self.master.detach(), **{f"adam.{name}": value for name, value in state.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.master.data.copy_(state["master"])
        self.optimizer.state[self.master] = {
            name.removeprefix("adam."): value.to(self.master.device)
            for name, value in state.items()
            if name.startswith("adam.")
        }
        self.publish()

    def finish(self, best: Tensor) -> None:
        """Leave the model with the parameters `best`, frozen and without gradients."""
        self.master.data.copy_(best)
        self.publish()
        for parameter in self.parameters:
            parameter.grad = None
            parameter.requires_grad_(False)


class Checkpoint:
    """Where a run saves itself so that a kill loses little. A checkpoint of another run (another key) is ignored."""

    def __init__(self, directory: Path, key: str) -> None:
        self.path = directory / "checkpoint.safetensors"
        self.key = key

    def save(self, step: int, history: History, tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint, whole or not at all."""
        about = {"key": self.key, "step": str(step), "history": json.dumps(asdict(history))}
        write_tensors(self.path, tensors, about)

    def read(self) -> tuple[int, History, dict[str, Tensor]] | None:
        """The last checkpoint of this very run, or None."""
        if not self.path.exists():
            return None
        try:
            tensors = read_tensors(self.path, "the run starts anew")
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata()
        except CaloraError:
            return None
        if about.get("key") != self.key:
            return None
        return int(about["step"]), History(**json.loads(about["history"])), tensors

    def clear(self) -> None:
        """Remove it: the run is finished and saved."""
        self.path.unlink(missing_ok=True)


def train(
    parameters: Iterable[nn.Parameter],
    losses_of_step: Callable[[int], Iterable[tuple[Losses, int]]],
    score: Callable[[], float],
    schedule: Schedule,
    dtype: torch.dtype,
    checkpoint: Checkpoint | None = None,
    title: str = "train",
) -> History:
    """Train `parameters` in place; they end at the values that had the best validation score.

    Args:
        losses_of_step: step -> of each part of its batch (losses by name, of which `loss` is minimised; real tokens
            read). They must depend on nothing but the step and the parameters: so a resumed run equals an uninterrupted
            one bit for bit. Losses are summed over parts, and averaged over processes: `Parts` weighs them.
        score: the validation score of the parameters as they are, higher is better.
        dtype: in which the model computes; masters and moments are fp32.

    Raises:
        CaloraError: the loss or its gradient is not finite.
    """
    weights = MasterWeights(parameters, dtype)
    history, start, best = History(), 0, weights.master.detach().clone()
    last_save = time.monotonic()

    def keep(done: int) -> None:
        nonlocal last_save
        due = time.monotonic() - last_save >= schedule.checkpoint_seconds or done == schedule.steps
        if checkpoint and is_first() and due:
            checkpoint.save(done, history, {**weights.state(), "best": best})
            last_save = time.monotonic()

    saved = checkpoint.read() if checkpoint else None
    if saved:
        start, history, tensors = saved
        best = tensors.pop("best")
        weights.restore(tensors)
        print(f"{title}: resumes after step {start} of {schedule.steps}", flush=True)
    elif schedule.eval_every:
        history.scores.append({"step": 0, "score": score()})
        keep(0)
    bar = progress(range(start, schedule.steps), title if is_first() else None, "steps", schedule.steps, start)
    for step in bar:
        clock, done, where = time.monotonic(), step + 1, f"{title}, step {step}"
        row, tokens = _averaged(*_collected(losses_of_step(step), weights))
        if not math.isfinite(row["loss"]):
            raise CaloraError(where, "a finite loss", row["loss"], "lower the learning rate")
        weights.step(schedule.rate(step), schedule.clip, where)
        history.losses.append({"step": done, **row})
        history.tokens += tokens
        history.seconds += time.monotonic() - clock
        if done == schedule.steps or (schedule.eval_every and done % schedule.eval_every == 0):
            history.scores.append({"step": done, "score": score()})
            if history.best["step"] == done:
                best = weights.master.detach().clone()
        bar.set_postfix(refresh=False, **history.latest())
        keep(done)
    weights.finish(best)
    if is_first():
        print(f"{title}: {history.tokens} tokens in {history.seconds:.0f} s, {history.rate:.0f} tokens/s", flush=True)
    return history


def _collected(parts: Iterable[tuple[Losses, int]], weights: MasterWeights) -> tuple[Losses, int]:
    """The sums of the losses and tokens of a step's parts, each part's gradients collected before the next is computed."""
    sums: Losses = {}
    count = 0
    for losses, tokens in parts:
        losses["loss"].backward()
        weights.collect()
        sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        count += tokens
    return sums, count


def _averaged(losses: Losses, tokens: int) -> tuple[dict[str, float], int]:
    """The losses' means over the processes, and the sum of their tokens."""
    means = average(torch.stack([value.detach().float() for value in losses.values()])).tolist()
    return dict(zip(losses, means, strict=True)), round(total(tokens))
