"""The device to compute on: an accelerator where there is one, unless CALORA_DEVICE says otherwise."""

from __future__ import annotations

import os

import torch

from calora.errors import CaloraError

DEVICES = ("auto", "cpu", "cuda")


def chosen_device() -> str:
    """CALORA_DEVICE: `auto` (as without it), `cpu` or `cuda`.

    Raises:
        CaloraError: it is none of these, or `cuda` where torch sees no CUDA device.
    """
    chosen = os.environ.get("CALORA_DEVICE") or "auto"
    if chosen not in DEVICES:
        raise CaloraError("device (CALORA_DEVICE)", f"one of {', '.join(DEVICES)}", chosen, "set one of them")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise CaloraError("device (CALORA_DEVICE)", "a CUDA device that torch sees", "none", "set it to auto or cpu")
    return chosen


def accelerated() -> bool:
    """Whether an accelerator computes."""
    return chosen_device() != "cpu" and (torch.cuda.is_available() or torch.accelerator.is_available())


def gpus() -> int:
    """How many CUDA devices may compute."""
    return 0 if chosen_device() == "cpu" else torch.cuda.device_count()
