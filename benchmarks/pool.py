"""What many adapters cost a running `calora serve`: memory, and how long it takes to add, remove and bring in one of them.

    python -m benchmarks.pool device --adapter movies --counts 1 8 64 --swaps 50

The folder is an export. Its adapter is served under as many names, from copies of its file, which lie in a temporary
folder; the memory is the proportional set size of the server and of llama.cpp's process (Linux), after each adapter
answered once. It may be base + bytes of the files + 10 %. Times are seconds of a clock, of one client without other load;
of an add also of the processor, in which llama.cpp started.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from calora.common.files import read_json, write_json
from calora.device.folder import ADAPTERS, MANIFEST

KEY = "a-key-of-the-benchmark"
TEXT = "Review: a film that was long and dull, but its end is good\nSentiment:"


def copies(folder: Path, adapter: str, count: int, out: Path) -> list[str]:
    """An export with so many copies of an adapter; their names."""
    about = read_json(folder / MANIFEST, "name an export")
    entry = about["adapters"][adapter]
    own = entry["file"]
    names = [f"copy{number:02d}" for number in range(count)]
    shutil.rmtree(out, ignore_errors=True)
    (out / ADAPTERS).mkdir(parents=True)
    files = {about["base"]["file"], *about["base"]["apply"]}
    for file in files:
        os.link(folder / file, out / file) if same_disk(folder, out) else shutil.copy(folder / file, out / file)
    listed = {file: about["files"][file] for file in files}
    adapters = {}
    for name in names:
        file = f"{ADAPTERS}/{name}.gguf"
        shutil.copy(folder / own, out / file)
        listed[file] = about["files"][own]
        adapters[name] = {**entry, "file": file, "apply": [file if one == own else one for one in entry["apply"]]}
    write_json(out / MANIFEST, {**about, "files": listed, "adapters": adapters})
    return names


def same_disk(one: Path, other: Path) -> bool:
    """Whether a file of the one can have a second name in the other."""
    return one.stat().st_dev == other.stat().st_dev


@contextmanager
def server(folder: Path, *options: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """A client of `calora serve`, and its process."""
    command = [sys.executable, "-m", "calora", "serve", str(folder), "--port", "0", *options]
    environment = {**os.environ, "CALORA_API_KEY": KEY}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            said = re.search(r"http://\S+/v1", process.stdout.readline())
            assert said, "the server did not start"
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=said[0], headers=headers, timeout=600) as client:
                yield client, process
        finally:
            process.terminate()
            process.communicate()


def ask(client: httpx.Client, model: str) -> float:
    """Seconds of a request for one token."""
    start = time.perf_counter()
    client.post("/completions", json={"model": model, "prompt": TEXT, "max_tokens": 1}).raise_for_status()
    return time.perf_counter() - start


def change(client: httpx.Client, act: str, name: str) -> float:
    """Seconds of adding or removing an adapter that manifest.json lists."""
    start = time.perf_counter()
    client.post(f"/{act}_lora_adapter", json={"lora_name": name}).raise_for_status()
    return time.perf_counter() - start


def child_of(process: subprocess.Popen[str]) -> int:
    """llama.cpp's process."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def processor(pid: int) -> float:
    """Seconds that a process computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: subprocess.Popen[str]) -> tuple[float, float]:
    """MB of the server, and of its llama.cpp."""
    return own_memory(process.pid), own_memory(child_of(process))


def own_memory(pid: int) -> float:
    """MB of one process, what it shares with others divided among them."""
    found = re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
    assert found
    return int(found[1]) / 1e3


def measure(folder: Path, adapter: str, counts: list[int], swaps: int, options: list[str], scratch: Path) -> None:
    """Print a line a figure."""
    size = read_json(folder / MANIFEST, "name an export")["files"][f"{ADAPTERS}/{adapter}.gguf"]["bytes"] / 1e6
    alone = 0.0
    for count in [0, *counts]:
        names = copies(folder, adapter, count, scratch / "some")
        start = time.perf_counter()
        with server(scratch / "some", *options) as (client, process):
            started = time.perf_counter() - start
            for name in [*names, "base"]:
                ask(client, name)
            own, llama = memory(process)
            alone = alone or own + llama
            print(f"{count} adapters: start {started:.2f} s, {own:.1f} + {llama:.1f} MB", flush=True)
            if count:
                allowed = (alone + count * size) * 1.1
                print(f"  {own + llama - alone:.1f} MB for {count * size:.1f} of files; allowed in all {allowed:.1f}")
                told = [(change(client, "unload", name), change(client, "load", name)) for name in names[:3]]
                removing, adding = (statistics.median(times) for times in zip(*told, strict=True))
                computed = processor(child_of(process))
                print(f"  add {adding:.2f} s ({computed:.2f} of the processor), remove {removing:.2f} s", flush=True)
    names = copies(folder, adapter, 3, scratch / "some")
    with server(scratch / "some", "--memory", f"{2.5 * size:.3f}", *options) as (client, process):
        there = statistics.median(ask(client, names[0]) for _ in range(5))
        brought, used = list[float](), list[float]()
        for number in range(swaps):  # always the one that is not there
            brought.append(ask(client, names[(2 + number) % 3]))
            used.append(sum(memory(process)))
        print(f"a request: {there:.3f} s; with an adapter that is brought in: {statistics.median(brought):.2f} s")
        tenth = max(1, swaps // 10)
        print(f"MB after {tenth} swaps: {used[tenth - 1]:.1f}, after {swaps}: {used[-1]:.1f}, most {max(used):.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=["--threads", "1"], help="of `calora serve`")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(chosen.folder, chosen.adapter, chosen.counts, chosen.swaps, chosen.options, Path(scratch))
