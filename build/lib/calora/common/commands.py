"""The frame of a command line: a command a name, and one line for a mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from calora.errors import CaloraError

Act = Callable[[argparse.Namespace], Any]  # what a command does; its exit code, or None
Add = Callable[[argparse.ArgumentParser], Act]  # adds a command's options; its docstring is their help


class Parser(argparse.ArgumentParser):
    """One line for a mistake."""

    def error(self, message: str) -> NoReturn:
        """End with it."""
        self.exit(2, f"error: {message}. Fix: {self.prog} --help\n")


def run_command(parser: Parser, known: Mapping[str, Add], arguments: list[str] | None, interrupted: str) -> int:
    """Exit code of the command that the arguments name; a user's mistake is said in one line.

    Args:
        known: name -> command.
        arguments: None for those of this process.
        interrupted: what is said after Ctrl-C.
    """
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add in known.items():
        help_text = (add.__doc__ or "").strip()
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(act=add(command))
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.act(chosen) or 0)
    except CaloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
