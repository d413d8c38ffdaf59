"""Methods as params.yaml writes them, with what they take from one another filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Entry = dict[str, Any]


def resolve(methods: Mapping[str, Entry]) -> dict[str, Entry]:
    """Every method in full: what `like` names is filled in, and `budget` holds the start of the method that it names.

    Raises:
        ValueError: a name is of no method, or methods take from one another in a circle.
    """
    filled = {name: _filled(methods, name, ()) for name in methods}
    for name, entry in filled.items():
        budget = (entry.get("start") or {}).get("budget")
        if budget is None:
            continue
        if budget not in filled:
            raise ValueError(f"methods.{name}.start.budget names '{budget}'; known: {', '.join(filled)}")
        if filled[budget]["start"].get("budget") is not None:
            raise ValueError(f"methods.{name}.start.budget names '{budget}', which has a budget itself")
        if filled[budget]["start"].get("scales"):
            raise ValueError(f"methods.{name}.start.budget names '{budget}', which has scales: no LoRA counts as many")
    starts = {name: entry.get("start") for name, entry in filled.items()}
    for entry in filled.values():
        if (entry.get("start") or {}).get("budget") is not None:
            entry["start"] = {**entry["start"], "budget": starts[entry["start"]["budget"]]}
    return filled


def _filled(methods: Mapping[str, Entry], name: str, above: tuple[str, ...]) -> Entry:
    if name not in methods:
        raise ValueError(f"methods.{above[-1]}.like names '{name}'; known: {', '.join(methods)}")
    if name in above:
        raise ValueError(f"methods.{name}.like leads back to itself: {' -> '.join((*above, name))}")
    if not isinstance(methods[name], Mapping):
        raise ValueError(f"methods.{name} needs a start and a loss, found {methods[name]!r}")
    own = {key: value for key, value in methods[name].items() if key != "like"}
    if "like" not in methods[name]:
        return own
    return merged(_filled(methods, str(methods[name]["like"]), (*above, name)), own)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Entry:
    """`below` with the leaves of `above`."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
