"""MoEfication of a ReLU T5: `python -m benchmarks.t5 COMMAND`, of train, repro, experts, neurons and report in this order (docs/t5.md).

own/sst2, own/qqp and own/mnli hold the official files of these tasks (docs/tasks.md); what else of the eleven is in own/ is read too, as text.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from benchmarks.t5 import report
from benchmarks.t5.project import FOLDER, MODEL, make, params
from calora.common.commands import Act, Parser, run_command
from pipeline import local
from pipeline.settings import ROOT


def train(command: argparse.ArgumentParser) -> Act:
    """Train the base and write it to own/t5."""
    command.add_argument("--minutes", type=float, default=25.0, help="of processor time, as one thread has it (25)")
    command.add_argument(
        "--share", type=float, default=0.35, help="of it for span corruption, the rest for the tasks (0.35)"
    )
    command.add_argument("--seed", type=int, default=0)

    def act(chosen: argparse.Namespace) -> None:
        from benchmarks.t5.train import Shape, base

        base(params(), MODEL, chosen.minutes, chosen.share, Shape(), chosen.seed)

    return act


def repro(_: argparse.ArgumentParser) -> Act:
    """The pipeline in .t5: a LoRA for each task, five recipes, and the LoRAs carried over."""
    return lambda _: local.repro(make())


def experts(_: argparse.ArgumentParser) -> Act:
    """Which neurons are on, and what other numbers and kinds of experts cost before anything is trained."""

    def act(_: argparse.Namespace) -> None:
        from benchmarks.t5.experts import sweep

        with contextlib.chdir(FOLDER):
            sweep()

    return act


def write(_: argparse.ArgumentParser) -> Act:
    """Merge the run of .t5 into docs/t5.json, and write the tables of docs/t5.md."""
    return lambda _: report.write()


if __name__ == "__main__":
    os.chdir(ROOT)
    commands = {"train": train, "repro": repro, "experts": experts, "report": write}
    parser = Parser(prog="python -m benchmarks.t5", description=__doc__)
    sys.exit(run_command(parser, commands, None, "the same command goes on from the last checkpoint"))
