"""What is measured in a process of its own: `calora serve`, and a worker that does what it is told, a line at a time."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from calora.device.limits import KEY


class Process:
    """A process, with what it has started itself; it ends with the block."""

    def __init__(self, *command: str, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], env=os.environ | dict(environment), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def line(self) -> str:
        """The next line that it says; raises `RuntimeError` where it has ended instead."""
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"it ended: {self.process.args!r:.300}")
        return line

    @property
    def memory(self) -> float:
        """MB that it has alone, and its share of what it has with others (PSS)."""
        own = psutil.Process(self.process.pid)
        while True:
            try:
                return sum(float(one.memory_full_info().pss) for one in [own, *own.children(recursive=True)]) / 1e6
            except psutil.NoSuchProcess:  # one that has just ended
                own.status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Served(Process):
    """`calora serve` of a folder."""

    def __init__(self, folder: Path, threads: int, *options: str) -> None:
        self.key = secrets.token_hex()
        command = ("calora", "serve", str(folder), "--port", "0", "--threads", str(threads), *options)
        super().__init__(*command, environment={KEY: self.key})
        found = re.search(r"http://\S+?/v1", self.line())
        assert found
        self.url = found[0]
        self.line()  # the key

    def client(self) -> httpx.AsyncClient:
        """Of its API."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=300, trust_env=False)


class Worker(Process):
    """`benchmarks.device.worker`: what it is, and in which environment."""

    def __init__(self, kind: str, environment: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__("benchmarks.device.worker", kind, json.dumps(options), environment=environment or {})
        self.line()  # it is ready

    def __call__(self, work: str, **options: Any) -> Any:
        """What it found."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([work, options]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())
