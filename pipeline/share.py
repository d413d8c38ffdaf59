"""Results on more than one machine: through DVC's default remote and a git remote, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from calora.errors import CaloraError
from pipeline.process import DVC, Processes
from pipeline.repository import git


class Sharing:
    """What a run takes from the others, and gives to them.

    Args:
        remote: of git; empty shares nothing.
        folder: the checkout of the run.
    """

    def __init__(self, remote: str, folder: Path, processes: Processes, say: Callable[[str], None]) -> None:
        self.remote, self.folder, self._processes, self._say = remote, folder, processes, say

    def fetch(self) -> None:
        """The names of all experiments, and which inputs of stages gave which outputs.

        Raises:
            CaloraError: the git remote cannot be reached, or DVC has no default remote.
        """
        if not self.remote:
            return
        git(self.folder, "fetch", "--quiet", "--end-of-options", self.remote, "refs/exps/*:refs/exps/*")
        lines: list[str] = []
        if self._processes.run([*DVC, "remote", "default"], self.folder, lines.append) or not lines:
            fix = "dvc remote add --default NAME URL"
            raise CaloraError("share", "a default DVC remote to keep the files in", "none", fix)
        self._run("fetch", "--run-cache")  # what the remote lacks is computed: an error here is none

    def push_stage(self, stage: str) -> None:
        """The outputs of a stage that ran, for those who need them next."""
        if self.remote and self._run("push", "--run-cache", stage):
            self._say(f"{stage}: its outputs could not be pushed; this machine has them")

    def push_experiment(self, name: str) -> None:
        """The experiment, with what it needs."""
        if self.remote and self._run("exp", "push", self.remote, name):
            raise CaloraError(
                f"experiment {name}",
                f"to be pushed to {self.remote}",
                "an error, told above",
                f"dvc exp push {self.remote} {name}",
            )

    def _run(self, *arguments: str) -> int:
        return self._processes.run([*DVC, *arguments], self.folder, self._say)
