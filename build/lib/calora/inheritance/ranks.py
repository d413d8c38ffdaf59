"""The ranks of a bypass within a budget of bytes: its directions stand where they mend most of what compression lost."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from itertools import pairwise

from torch import Tensor
from transformers import PreTrainedModel

from calora.adapters.codes import HEADER, stored_bytes
from calora.adapters.lora import Adapter, check_targets
from calora.adapters.origin import Origin
from calora.errors import CaloraError
from calora.inheritance.inherit import WHOLE, Bypass, moments_of, needed, taught, weighted_error
from calora.models.anatomy import linear_layers
from calora.models.tasks import Example
from calora.recovery.budget import Spectrum, share_out
from calora.recovery.warmstart import correction_rank, weighted_size


def share_ranks(
    model: PreTrainedModel,
    teacher: Adapter | None,
    targets: Sequence[str],
    activation: str,
    *,
    budget: float,
    format: str,
    reference: PreTrainedModel | None,
    calibration: Sequence[Example],
    moments: MutableMapping[str, Tensor] | None = None,
    origin: Origin = WHOLE,
) -> dict[str, int]:
    """Layer -> rank of its bypass, of the layers that get one: `rank` of a `Bypass` with a warm start.

    A direction's gain is what it takes off (in + out) ||E X||^2 / ||W X||^2, E = W - W_c [out, in], X as in `inherit`; those
    that mend most a byte come first. The widths are in it because bytes are: without them the narrowest layers, whose
    directions cost least, take most of a small budget (docs/method.md has the figures). A direction is a rank of a linear
    bypass, and two of any other.

    Args:
        model: the compressed model (packed or its dense view).
        teacher: the LoRA that is on the reference; None for none.
        targets, activation: of the bypass.
        budget: MB (10^6 bytes) of recovery.safetensors, above 0.
        format: how it will be stored: `bf16`, `int8` or `int4`.
        reference: the uncompressed model; it is left as it was.
        calibration: examples of the task.
        moments: what another look at them found, as in `inherit`.
        origin: where the compressed model's layers come from.

    Raises:
        CaloraError: an argument is outside its range or not there, or the budget is too small for any direction.
    """
    if not (budget > 0 and math.isfinite(budget)):
        raise CaloraError("bypass.budget", "MB above 0", budget, "give such a budget, or a rank")
    Bypass(targets, 2, activation, "weighted_error")  # it checks the activation
    layers, step = check_targets(model, targets, 1), 2 // correction_rank(2, activation)
    whole, spectra = needed(reference, calibration, "a budget"), dict[str, Spectrum]()
    reference_layers = linear_layers(whole)
    with taught(whole, teacher):
        for key, moment in moments_of(whole, sorted(layers), origin, calibration, "spectra", moments):
            widths = layers[key].in_features, layers[key].out_features
            sizes = (stored_bytes(key, *widths, rank, format) for rank in range(0, min(widths) + 1, step))
            moment, weight, error = weighted_error(reference_layers, key, layers[key], origin, moment)
            costs = [more - less for less, more in pairwise(sizes)]
            spectra[key] = Spectrum.of(error, moment, weighted_size(weight, moment) ** 2 / sum(widths), costs)
    least = min((one.bytes[0] + HEADER for one in spectra.values() if one.runs()), default=0)
    if least > budget * 1e6:
        raise CaloraError("bypass.budget", f"{least / 1e6} MB or more, for one direction", budget, "raise it")
    return {key: step * count for key, count in share_out(spectra, budget * 1e6 - HEADER).items() if count}
