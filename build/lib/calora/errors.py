"""The one exception that calora raises for a mistake that its user can mend, and what other libraries' errors say."""

from __future__ import annotations


class CaloraError(Exception):
    """A user's mistake, told in one line: where it is, what was expected, what was found, how to mend it."""

    def __init__(self, where: object, expected: object, found: object, fix: str) -> None:
        self.told = str(where), str(expected), str(found), fix
        super().__init__(f"{where}: expected {expected}, found {found}. Fix: {fix}")


def first_line(error: Exception) -> str:
    """What a library's error says first, short enough for one line; its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
