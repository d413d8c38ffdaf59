"""`calora COMMAND`, or `python -m calora COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported

from calora.common.commands import Act, Parser, run_command
from calora.errors import CaloraError


def main(arguments: list[str] | None = None) -> int:
    """Exit code of a command."""
    parser = Parser(prog="calora", description="Compressed models with CA-LoRA adapters.")
    return run_command(parser, COMMANDS, arguments, "nothing was written")


def export(command: argparse.ArgumentParser) -> Act:
    """A folder for other runtimes: base.gguf and a GGUF LoRA for each adapter (llama.cpp), or dense/ and PEFT folders (vLLM)."""
    command.add_argument("base", help="folder of a compressed model, or of an uncompressed one, to compare with")
    command.add_argument(
        "adapters",
        nargs="*",
        metavar="[NAME=]ADAPTER",
        help="adapter folders; NAMEs for all of them, or none: then their tasks'",
    )
    command.add_argument("--out", required=True, help="the folder to write")
    command.add_argument("--kind", nargs="+", default=["gguf"], help="gguf, peft or both (gguf)")
    command.add_argument("--requantise", metavar="TYPE", help="round what has no exact type of GGUF, such as to Q8_0")
    command.add_argument("--adapter-type", default="BF16", help="of the LoRAs in GGUF: BF16, F16, F32 or Q8_0 (BF16)")
    command.add_argument(
        "--recovery",
        default="beside",
        help="where the base's own recovery goes: beside the adapters, or inside (beside)",
    )
    command.add_argument(
        "--test", nargs="+", default=[], metavar="NAME=FILE", help="jsonl with labelled rows, to score an adapter on"
    )
    command.add_argument(
        "--task", nargs="+", default=[], metavar="NAME=FILE", help="task.json of a plain LoRA, on an uncompressed base"
    )
    command.add_argument("--threads", type=int, help="of llama.cpp, for the score")
    command.add_argument(
        "--add",
        action="store_true",
        help="add the adapters to the export in --out, which keeps its base, kinds and recovery",
    )

    def act(chosen: argparse.Namespace) -> None:
        from calora.common.files import read_json
        from calora.device.export import export
        from calora.models.tasks import Task, read_rows

        named = [_pair("--test", text, "movies=data/movies/test.jsonl") for text in chosen.test]
        tests = {name: read_rows(Path(file), "name a file with rows") for name, file in named}
        files = [_pair("--task", text, "movies=data/movies/task.json") for text in chosen.task]
        tasks = {name: Task.from_json(read_json(Path(file), "name a task.json")) for name, file in files}
        about = export(
            chosen.base, _adapters(chosen.adapters), chosen.out, kinds=chosen.kind, requantise=chosen.requantise,
            adapter_type=chosen.adapter_type, recovery=chosen.recovery, tasks=tasks, tests=tests, threads=chosen.threads,
            add=chosen.add,
        )  # fmt: skip
        size = sum(entry["bytes"] for entry in about["files"].values())
        print(
            f"{chosen.out}: {len(about['files'])} files, {size / 1e6:.1f} MB; README.md says what is exact and what it scored"
        )

    return act


def serve(command: argparse.ArgumentParser) -> Act:
    """Serve an exported folder over HTTP as OpenAI's API: the base and its adapters, of which each request names one."""
    from calora.device.limits import HOST, PORT, Limits

    own = Limits()
    command.add_argument("folder", help="what `calora export` wrote")
    command.add_argument("--host", default=HOST, help=f"address to listen on ({HOST}: this machine alone)")
    command.add_argument("--port", type=int, default=PORT, help=f"0: a free one ({PORT})")
    command.add_argument("--threads", type=int, help="of the processor (llama.cpp's choice)")
    command.add_argument(
        "--memory",
        type=float,
        metavar="MB",
        help="that adapters may take; those asked for last are in memory, others are brought in (no limit)",
    )
    command.add_argument(
        "--allow", nargs="+", default=[], metavar="DIR", help="folders of which adapters may be added, besides FOLDER"
    )
    command.add_argument("--reference", metavar="FOLDER", help="an export of the uncompressed base, to compare with")
    for name, help_text in own.about().items():
        value = getattr(own, name)
        command.add_argument(f"--{name}", type=type(value), default=value, help=f"{help_text} ({value:g})")

    def act(chosen: argparse.Namespace) -> None:
        from calora.device.runtime import installed

        with installed():
            from calora.device.serve import serve
        limits = Limits(**{name: getattr(chosen, name) for name in own.about()})
        allowed = [Path(place) for place in chosen.allow]
        reference = Path(chosen.reference) if chosen.reference else None
        serve(Path(chosen.folder), limits, chosen.host, chosen.port, chosen.threads, chosen.memory, allowed, reference)

    return act


def classify(command: argparse.ArgumentParser) -> Act:
    """Answer every row of a CSV file with an adapter; started again, it goes on where it ended."""
    from calora.runtimes import RUNTIMES

    command.add_argument("file", help="CSV with a header")
    command.add_argument("--folder", required=True, help="a compressed model, or what `calora export` wrote")
    command.add_argument("--adapter", help="its folder; of an export its name, where more than one chooses answers")
    command.add_argument(
        "--runtime", choices=RUNTIMES, default="auto",
        help="torch, llama (llama.cpp, the one for an export), or auto: the faster one, which is measured once (auto)",
    )  # fmt: skip
    command.add_argument("--out", help="CSV to write (FILE.classified.csv)")
    command.add_argument(
        "--column", nargs="+", default=[], metavar="NAME=HEADER", help="where a column of the prompt has another header"
    )
    command.add_argument("--threads", type=int, help="of the processor (llama.cpp's choice)")

    def act(chosen: argparse.Namespace) -> int:
        from calora.device.table import classify_table
        from calora.runtimes import load, named

        folder, file = Path(chosen.folder), Path(chosen.file)
        out = Path(chosen.out) if chosen.out else file.with_suffix(".classified.csv")
        columns = dict(_pair("--column", text, "text=review") for text in chosen.column)
        try:
            adapter, task, identity = named(folder, chosen.adapter)
            opened = partial(load, folder, adapter, runtime=chosen.runtime, threads=chosen.threads)
            counts = classify_table(task, [*identity, chosen.runtime], opened, file, out, columns)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            return 130
        print(f"{out}: {', '.join(f'{count} {answer}' for answer, count in counts.items())}")
        return 0

    return act


def chat(command: argparse.ArgumentParser) -> Act:
    """Talk with an exported folder on the terminal, and change its adapter on the way; through a pipe a line is a text."""
    from calora.device.limits import Limits

    tokens = Limits().tokens
    command.add_argument("folder", nargs="?", help="what `calora export` wrote")
    command.add_argument(
        "--url", help="of a running `calora serve`, with /v1, instead of a folder; its key in CALORA_API_KEY"
    )
    command.add_argument("--adapter", help="to begin with (the base)")
    command.add_argument("--tokens", type=int, default=tokens, help=f"that an answer has at most ({tokens})")
    command.add_argument("--temperature", type=float, help="0: always the likeliest token (llama.cpp's default)")
    command.add_argument("--threads", type=int, help="of the processor (llama.cpp's choice)")

    def act(chosen: argparse.Namespace) -> int:
        from calora.device.runtime import installed

        with installed():
            from calora.device.chat import chat
            from calora.device.sources import Source, UrlSource, open_folder
        if bool(chosen.folder) == bool(chosen.url):
            raise CaloraError("chat", "a folder or --url", "both" if chosen.url else "neither", "name one of them")
        source: Source = UrlSource(chosen.url) if chosen.url else open_folder(Path(chosen.folder), chosen.threads)
        options = {"max_tokens": chosen.tokens, "temperature": chosen.temperature}
        try:
            chat(source, {name: value for name, value in options.items() if value is not None}, chosen.adapter)
        except KeyboardInterrupt:
            return 130
        return 0

    return act


def _adapters(texts: Sequence[str]) -> dict[str, str] | list[str]:
    """NAME=FOLDER of each, or the folders."""
    if not any("=" in text and not Path(text).exists() for text in texts):
        return list(texts)
    return dict(_pair("adapters", text, "movies=models/calora/movies/q3") for text in texts)


def _pair(where: str, text: str, such_as: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise CaloraError(where, "NAME=PATH", repr(text), f"such as {such_as}")
    return name, value


COMMANDS = {"export": export, "serve": serve, "classify": classify, "chat": chat}

if __name__ == "__main__":
    sys.exit(main())
