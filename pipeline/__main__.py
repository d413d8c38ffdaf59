"""`python -m pipeline COMMAND`: the pipeline here (repro), runs in checkouts of their own (run, ui), and what they gave (compare)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from calora.common.commands import Act, Parser, run_command
from calora.errors import CaloraError
from pipeline import local
from pipeline.server import alone
from pipeline.settings import ROOT, Settings, checked
from pipeline.values import value_of


def within(least: int, most: int) -> Callable[[str], int]:
    """Type of an option: a whole number between two."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, found {text!r}")
        return int(text)

    return number


def main(arguments: list[str]) -> int:
    """Exit code of a command."""
    parser = Parser(prog="python -m pipeline", description=__doc__)
    return run_command(parser, COMMANDS, arguments, "the same command goes on from the last checkpoint")


def repro(_: argparse.ArgumentParser) -> Act:
    """`dvc repro` in this folder, then the table of methods."""
    return lambda _: local.repro(ROOT)


def smoke(_: argparse.ArgumentParser) -> Act:
    """The same stages and real input on a few hundred texts, in .smoke."""
    return lambda _: local.smoke()


def adopt(command: argparse.ArgumentParser) -> Act:
    """Your own base, LoRA and data: looked at, put into own/, written into params.yaml; any of the three may be left out."""
    command.add_argument("--base", metavar="X", help="a model folder, a GGUF file, or a hub id (owner/name@revision)")
    command.add_argument("--adapter", metavar="Y", help="a PEFT folder or a hub id; without it a LoRA is trained")
    command.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, a folder of them, or a hub id: jsonl, json, csv, tsv, parquet",
    )
    command.add_argument("--validation", metavar="FILE", help="split off the training rows where there is none")
    command.add_argument("--test", metavar="FILE", help="the same")
    command.add_argument("--subset", help="of a hub dataset")
    command.add_argument(
        "--prompt", help='with columns in braces, such as "Review: {text}\\nSentiment:"; else proposed'
    )
    command.add_argument(
        "--answers", nargs="+", default=[], metavar="WORD", help='in the order of the labels: "no,yes"'
    )
    command.add_argument("--label", metavar="COLUMN", help="of the label or the answer")
    command.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME",
        help='of csv and tsv files without a line of names: "label,text"',
    )
    command.add_argument("--name", help="of the task; else that of the data")
    command.add_argument("--chat", action="store_true", help="put the prompt into the base's chat template")
    command.add_argument("--copy", action="store_true", help="copy files into own/; else they are linked")
    command.add_argument("--dry-run", action="store_true", help="tell what would change, and write nothing")

    def act(chosen: argparse.Namespace) -> None:
        from pipeline.adopt import Wanted, adopt

        answers, columns = split_words(chosen.answers), split_words(chosen.columns)
        apart = ("act", "dry_run", "data", "answers", "columns")
        given = {key: value for key, value in vars(chosen).items() if key not in apart}
        adopt(ROOT, Wanted(data=tuple(chosen.data), answers=answers, columns=columns, **given), chosen.dry_run)

    return act


def split_words(given: list[str]) -> tuple[str, ...]:
    """Words of the command line, one by one or in one with commas."""
    return tuple(given[0].split(",") if len(given) == 1 else given)


def run(command: argparse.ArgumentParser) -> Act:
    """A run in a checkout of its own, which ends as a DVC experiment: what the Prefect UI starts, without a server."""
    command.add_argument("--name", default="run", help="of the experiment; a number is added where it is taken")
    command.add_argument("--commit", default="HEAD", help="what the run starts from (HEAD)")
    command.add_argument(
        "--take-along", action="store_true", help="take uncommitted changes along; else they are refused"
    )
    command.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages, with what they need")
    command.add_argument(
        "--share", default="", metavar="REMOTE", help="git remote to share results through, with DVC's default remote"
    )
    add_settings(command)

    def act(chosen: argparse.Namespace) -> int:
        settings = settings_of(chosen)
        changed = "take along" if chosen.take_along else "refuse"
        alone()
        from pipeline.flow import ca_lora

        state = ca_lora(chosen.name, settings, chosen.commit, changed, chosen.only, chosen.share, return_state=True)
        return 0 if state.is_completed() else 1

    return act


def ui(command: argparse.ArgumentParser) -> Act:
    """The Prefect server and the deployment, on this machine only, until Ctrl-C."""
    command.add_argument(
        "--port", type=within(1, 65534), default=4200, help="of the server; results have the next one (4200)"
    )
    command.add_argument("--runs", type=within(1, 1000), default=2, help="that work at the same time (2)")

    def act(chosen: argparse.Namespace) -> int:
        from pipeline.ui import serve_ui

        return serve_ui(chosen.port, chosen.runs)

    return act


def compare(command: argparse.ArgumentParser) -> Act:
    """The working tree and the experiments under this commit, or those named, side by side; writes results/report.html."""
    command.add_argument("experiments", nargs="*", help="names of `dvc exp list`, commits, or `workspace`")

    def act(chosen: argparse.Namespace) -> None:
        from pipeline.compare import compare
        from pipeline.experiment import WORKSPACE
        from pipeline.repository import commit_of, experiments

        compare(ROOT, chosen.experiments or [WORKSPACE, *experiments(ROOT, commit_of(ROOT, "HEAD"))])

    return act


def sweep(command: argparse.ArgumentParser) -> Act:
    """Every combination of some values as an experiment, those that there are already skipped, and then the comparison."""
    command.add_argument(
        "values",
        nargs="+",
        metavar="KEY=VALUE,VALUE",
        help="a key of params.yaml or a field of `run`, such as alpha=0.01,0.05 recipes=q8_up,nf4",
    )
    command.add_argument("--name", default="sweep", help="first part of the experiments' names (sweep)")

    def act(chosen: argparse.Namespace) -> None:
        from pipeline.sweep import cells, sweep

        wanted = cells(chosen.values)
        alone()
        from pipeline.compare import compare

        compare(ROOT, sweep(ROOT, chosen.name, wanted))

    return act


def ablation(command: argparse.ArgumentParser) -> Act:
    """The eight cells of inherit x recover x distil, with some seeds, as experiments; then their table and plot."""
    command.add_argument("--task", default="movies")
    command.add_argument("--recipe", default="q3")
    command.add_argument("--seeds", type=within(0, 2**31 - 1), nargs="+", default=[0, 1, 2])

    def act(chosen: argparse.Namespace) -> None:
        alone()
        from pipeline.paper import ablation

        print(ablation(ROOT, chosen.task, chosen.recipe, chosen.seeds).read_text(encoding="utf-8"))

    return act


def convergence(command: argparse.ArgumentParser) -> Act:
    """Validation accuracy against step, of CA-LoRA and a fresh LoRA on four compressed models, as an experiment and a plot."""
    command.add_argument("--task", default="movies")
    command.add_argument("--recipes", nargs="+", default=["q4", "q3", "q2", "q8_up"])

    def act(chosen: argparse.Namespace) -> None:
        alone()
        from pipeline.paper import convergence

        print(convergence(ROOT, chosen.task, chosen.recipes))

    return act


def labels(command: argparse.ArgumentParser) -> Act:
    """Accuracy against the number of labels, and against steps, of CA-LoRA and what it is compared with; as experiments, a table and a plot."""
    command.add_argument("--task", default="movies")
    command.add_argument("--recipe", default="q3")
    command.add_argument("--counts", type=within(0, 2**31 - 1), nargs="+", default=[0, 100, 400, 1600])
    command.add_argument("--seeds", type=within(0, 2**31 - 1), nargs="+", default=[0])

    def act(chosen: argparse.Namespace) -> None:
        alone()
        from pipeline.labels import labels

        print(labels(ROOT, chosen.task, chosen.recipe, chosen.counts, chosen.seeds).read_text(encoding="utf-8"))

    return act


COMMANDS = {
    "repro": repro, "smoke": smoke, "adopt": adopt, "run": run, "ui": ui, "compare": compare, "sweep": sweep, "ablation": ablation,
    "convergence": convergence, "labels": labels,
}  # fmt: skip


def add_settings(command: argparse.ArgumentParser) -> None:
    """An option for each field of the form."""
    for name, field in Settings.model_fields.items():
        if name == "other":
            continue
        option, several = f"--{name.replace('_', '-')}", name in ("tasks", "recipes", "methods")
        command.add_argument(option, nargs="+" if several else None, help=field.description)
    command.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="any other key of params.yaml, such as train.lr=0.002"
    )


def settings_of(chosen: argparse.Namespace) -> Settings:
    """The checked fields; raises `CaloraError` with the name of the first that is wrong."""
    values = {name: getattr(chosen, name) for name in Settings.model_fields if name != "other"}
    other = dict(pair(text) for text in chosen.set)
    filled = {name: value for name, value in values.items() if value is not None}
    return checked({**filled, "other": other}, "python -m pipeline run --help")


def pair(text: str) -> tuple[str, Any]:
    """`key=value`, the value as YAML."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise CaloraError("--set", "KEY=VALUE", repr(text), "such as train.lr=0.002")
    return key, value_of(value, f"--set {key}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
