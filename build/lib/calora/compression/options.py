"""Options of a step, checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from torch import Tensor

from calora.errors import CaloraError

T = TypeVar("T")
FIX = "change the recipe"


def parse(kind: type[T], step: str, given: Mapping[str, Any]) -> T:
    """`kind(**given)`, a dataclass that checks itself; unknown and missing keys are a `CaloraError`.

    An option with a default is one that is off unless a recipe names it.
    """
    known = {option.name: option.default for option in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise CaloraError(step, f"options among {', '.join(known)}", unknown[0], FIX)
    missing = [name for name, default in known.items() if default is MISSING and name not in given]
    if missing:
        raise CaloraError(step, f"option {missing[0]}", f"only {', '.join(given) or 'nothing'}", FIX)
    return kind(**given)


def one_of(where: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
        raise CaloraError(where, f"one of {', '.join(map(str, choices))}", repr(value), FIX)


def share(where: str, value: object, zero: bool = False) -> None:
    """Raise unless `value` is a number between 0 and 1, both excluded (or 0 included)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= float(value) < 1 or (value == 0 and not zero):  # type: ignore[arg-type]
        raise CaloraError(where, "a share above 0 and below 1", repr(value), FIX)


def whole(where: str, value: object, least: int) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CaloraError(where, f"a whole number of at least {least}", repr(value), FIX)


@dataclass(frozen=True)
class Plan:
    """What a step finds out of the whole model before any block is changed.

    Args:
        values: layer or block -> the step's own.
        layers_kept: stack -> the layers that remain, where the step cut some.
        sizes: entries that the configuration of the result needs.
        kept: `Change.kept`, of layers that are not in the shape or coordinates of the original from the start.
        taken: what the report says of a checkpoint that was taken.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    layers_kept: Mapping[str, list[int]] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    taken: Mapping[str, Any] = field(default_factory=dict)
