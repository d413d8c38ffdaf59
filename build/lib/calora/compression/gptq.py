"""GPTQ (arXiv 2210.17323, algorithm 1): round one input after another, and let those that follow answer for the error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from calora.compression.surgeon import COLUMNS, LAZY, inverse_factor, sweep
from calora.layers.codes import Grid


def gptq(
    weight: Tensor, moment: Tensor, fit: Callable[..., Grid], group: int, keep: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """GPTQ: (values [out, in] on a grid, the grid); where `keep` is False they stay 0.

    Groups of inputs go in the order of their falling mean H_jj, and so do the inputs of each (GPTQModel's `act_group_aware`).
    A group's grid is fitted when its turn comes, to what the errors of the earlier ones have made of its weights: on
    grids that were fitted before, symmetric int4 loses half as much again (docs/compression.md).

    Args:
        fit: (weights [out, group], `importance` of their squared errors [out, group]: H_jj, 0 where cut) -> their grid.
        group: inputs that share a scale: at most 128 (it divides that), or the whole row.
    """
    places, order, ordered = _in_order(moment, group)
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep[:, order]
    size = moment.diagonal()[order]  # [in]
    start, grids = weight[:, order], dict[int, Grid]()

    def decide(column: Tensor, index: int, ahead: Tensor) -> Tensor:
        place = int(places[index // group])
        if index % group == 0:
            now = ahead[:, :group] if group <= COLUMNS else start  # a group that is the row: nothing has changed yet
            own = slice(index, index + group)
            grids[place] = fit(now * kept[:, own], importance=size[own] * kept[:, own])
        return grids[place].column(column) * kept[:, index]

    values = sweep(start, inverse_factor(ordered), decide, group if group <= COLUMNS else LAZY)
    return values[:, order.argsort()], Grid.of_groups([grids[place] for place in range(len(places))])


_orders = WeakTensorKeyDictionary()  # moment -> group -> what `_in_order` made of them, for as long as the moment lives


def _in_order(moment: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the groups [groups] and the inputs [in] in the order in which they go, H [in, in] in that order)."""
    known: dict[int, tuple[Tensor, Tensor, Tensor]] = _orders.setdefault(moment, {})
    if group not in known:
        diagonal = moment.diagonal().view(-1, group)  # [groups, group]
        places = diagonal.mean(1).argsort(descending=True)  # [groups]
        order = (places.unsqueeze(1) * group + diagonal[places].argsort(1, descending=True)).flatten()  # [in]
        known[group] = places, order, moment[order][:, order]
    return known[group]
