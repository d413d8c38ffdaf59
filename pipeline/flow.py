"""The flow: a checkout of its own, one task for each DVC stage, and a DVC experiment at the end."""

# No postponed annotations here: Prefect builds its form from the types themselves.
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic import Field

from calora.errors import CaloraError
from pipeline.checkout import check_files, checkout, resumable, sweep
from pipeline.graph import WAITS, StageFailed, TryAgain, in_turn, restore, run_stage, stages, with_needed
from pipeline.process import CHECK_PARAMS, Processes, workers
from pipeline.repository import check_name, commit_of, refuse, uncommitted
from pipeline.saving import save_experiment
from pipeline.settings import NAME, ROOT, Settings, changes, write_params
from pipeline.share import Sharing
from pipeline.show import key_of, show_results

PROGRESS = re.compile(r"(?P<title>.+): (?P<done>\d+) of (?P<all>\d+) (?P<unit>\w+), .* left(?P<rest>.*)")
RUNNER: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=workers())
WORDS = {"ran": "Completed", "restored": "Cached", "unchanged": "Cached"}


def can_help(_: Any, run: Any, state: State) -> bool:
    """Whether trying a stage again can help."""
    try:
        state.result()
    except TryAgain:
        return True
    except Exception:
        return False
    return False


@task(
    task_run_name="{stage}",
    retries=len(WAITS),
    retry_delay_seconds=list(WAITS),
    retry_condition_fn=can_help,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def dvc_stage(stage: str, folder: Path, known: bool, processes: Processes, sharing: Sharing) -> State:
    """One stage of the graph; `known` says that nothing of it changed."""
    if known:
        return Completed(name="Cached", message="unchanged")
    log, bar = get_run_logger(), Bar(stage)

    def say(line: str) -> None:
        log.info(line)
        bar.see(line)

    what = run_stage(stage, folder, processes, say, pull=bool(sharing.remote))
    if what == "ran":
        sharing.push_stage(stage)
    return Completed(name=WORDS[what], message=what)


class Bar:
    """A stage's progress artifact, moved by the lines of its output."""

    def __init__(self, stage: str) -> None:
        self.key = key_of(stage)
        self.artifact: UUID | None = None

    def see(self, line: str) -> None:
        found = PROGRESS.fullmatch(line)
        if not found:
            return
        share = 100 * int(found["done"]) / max(int(found["all"]), 1)
        if self.artifact is None:
            made = create_progress_artifact(share, key=self.key, description=line)
            self.artifact = made if isinstance(made, UUID) else None  # a coroutine only where a loop runs
        else:
            update_progress_artifact(self.artifact, share, description=line)


@contextmanager
def stopping(processes: Processes) -> Iterator[None]:
    """On SIGTERM (a cancelled run) stop every command before Prefect ends the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: Any) -> None:
        processes.stop()
        if callable(before):
            before(number, frame)
        else:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def clean_up(flow: Any, flow_run: Any, state: Any) -> None:
    """What a killed run leaves is removed by the process that watched it."""
    sweep(ROOT)


@flow(name="ca-lora", flow_run_name="{name}", task_runner=RUNNER,
      on_crashed=[clean_up], on_cancellation=[clean_up])  # fmt: skip
def ca_lora(
    name: Annotated[str, Field(pattern=NAME)] = "run",
    settings: Settings = Settings(),  # noqa: B008  # frozen in use
    commit: str = "HEAD",
    changed_files: Literal["refuse", "take along"] = "refuse",
    only: list[str] = [],  # noqa: B006
    share: str = "",
) -> State[Any] | dict[str, str]:
    """Run the pipeline in a checkout of its own, and keep the result as a DVC experiment.

    Args:
        name: Of the experiment, in `dvc exp show`; a number is added where it is taken.
        settings: What this run changes. Empty fields stay as params.yaml has them.
        commit: What the run starts from, and its experiment is listed under: a branch, tag, experiment or hash.
        changed_files: If the working tree has uncommitted changes: refuse to run, or take them along.
        only: Stages to run, with what they need, such as distill; empty for all.
        share: Git remote to share results through, such as origin, with DVC's default remote; empty for none.
    """
    try:
        return run_in_checkout(name, settings, commit, changed_files, only, share)
    except (CaloraError, StageFailed) as error:  # told in a line; a traceback would tell a user nothing
        return Failed(message=str(error), data=error)


def run_in_checkout(
    name: str, settings: Settings, commit: str, changed_files: str, only: list[str], share: str
) -> dict[str, str]:
    """What became of each stage; `ca_lora` has the arguments.

    Raises:
        CaloraError: the run cannot start, or its experiment cannot be pushed.
        StageFailed: some stage failed, after those that do not need it were run.
    """
    log = get_run_logger()
    check_name(ROOT, name)
    parent = commit_of(ROOT, commit)
    changed = changes_for(parent, commit, changed_files)
    processes = Processes()
    with stopping(processes), checkout(ROOT, parent, take_along=bool(changed)) as folder:
        for key, (old, new) in write_params(folder, changes(settings)).items():
            log.info(f"{key}: {old} -> {new}")
        with resumable(ROOT, folder):
            check_params(folder, processes)
            check_files(ROOT, folder)
            sharing = Sharing(share, folder, processes, log.info)
            sharing.fetch()
            graph = with_needed(stages(folder), only)
            states = run_all(graph, restore(folder, graph, processes), folder, processes, sharing)
            failed = [stage for stage, state in states.items() if state.name not in ("Completed", "Cached")]
            if failed:
                raise StageFailed("; ".join(f"{stage}: {states[stage].name}" for stage in failed))
            if not only:
                saved = save_experiment(ROOT, folder, name, processes, log.info)
                sharing.push_experiment(saved)
                show_results(ROOT, folder, parent, saved)
    return {stage: state.name or "" for stage, state in states.items()}


def changes_for(parent: str, commit: str, changed_files: str) -> list[str]:
    """The uncommitted files that a run takes along.

    Raises:
        CaloraError: there are some and the run may not take them along, or they are changes of another commit.
    """
    if changed_files == "take along":
        head = commit_of(ROOT, "HEAD")
        if parent != head:
            fix = "commit the changes, or leave `commit` as HEAD"
            raise CaloraError("take along", f"a run of HEAD ({head[:7]}), whose changes they are", parent[:7], fix)
        return uncommitted(ROOT)
    if commit == "HEAD":
        refuse(uncommitted(ROOT), "commit them, or set `changed_files` to `take along`")
    return []


def check_params(folder: Path, processes: Processes) -> None:
    """Let the checkout's own code check its params.yaml, before any stage runs."""
    lines: list[str] = []
    if processes.run(CHECK_PARAMS, folder, lines.append):
        raise StageFailed(lines[-1] if lines else "params.yaml is wrong")


def run_all(
    graph: dict[str, list[str]], known: set[str], folder: Path, processes: Processes, sharing: Sharing
) -> dict[str, State]:
    """Every stage after those that it needs; one that fails leaves the branches that do not need it going."""
    ended: set[UUID] = set()  # a stage whose need failed ends at once, NotReady

    def start(stage: str, needs: list[PrefectFuture[Any]]) -> PrefectFuture[Any]:
        task: Any = dvc_stage  # Prefect's types take either the arguments or `wait_for`
        future: PrefectFuture[Any] = task.submit(stage, folder, stage in known, processes, sharing, wait_for=needs)
        future.add_done_callback(lambda one: ended.add(one.task_run_id))
        return future

    futures = in_turn(graph, start, lambda future: future.task_run_id in ended)
    for future in futures.values():
        future.wait()
    return {stage: future.state for stage, future in futures.items()}
