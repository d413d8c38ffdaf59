"""Runs in checkouts of their own: what they may change, what they leave behind, and that stopped means stopped."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from calora.errors import CaloraError
from pipeline import flow as flows
from pipeline import guard, local, offline, ui
from pipeline import serve as serving
from pipeline.__main__ import main, pair
from pipeline.checkout import check_files, checkout, owned, resumable, sweep
from pipeline.experiment import files_of, flat
from pipeline.graph import StageFailed, run_stage, stages, standing, with_needed
from pipeline.process import DVC, Processes, Stopped, environment, workers
from pipeline.repository import check_name, commit_of, experiments, git, uncommitted
from pipeline.saving import save_experiment
from pipeline.settings import RECIPES, ROOT, Settings, changes, write_params
from pipeline.sweep import cells, label_of, name_of
from pipeline.sweep import sweep as run_sweep
from tests.toyproject import DVC_YAML, FILES, left, make_toy, processes, start_run


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = make_toy(tmp_path / "project")
    monkeypatch.setattr(flows, "ROOT", folder)
    monkeypatch.setattr(flows, "show_results", lambda *_: None)  # its stages have no methods to show
    return folder


# Settings


def test_empty_fields_change_nothing_and_filled_ones_their_keys():
    assert changes(Settings()) == {} == changes(Settings(recipes=[]))
    filled = Settings(alpha=0.1, recipes=["q8"], methods=["paper"], other={"train.lr": 0.002})
    expected = {"methods.calora.loss.alpha": 0.1, "recipes": ["q8"], "compare": ["paper"], "train.lr": 0.002}
    assert changes(filled) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", -1), ("alpha", float("nan")), ("alpha", "high"), ("budget", 0), ("steps", 1.5), ("recipes", ["q9"]),
     ("activation", "tanh"), ("methods", ["maybe"]), ("seed", -1), ("no_such_field", 1)],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Settings.model_validate({field: value})


def test_the_form_has_types_bounds_choices_and_help():
    schema = flows.ca_lora.parameters.model_dump()
    fields = schema["definitions"]["Settings"]["properties"]
    assert fields["recipes"]["items"]["enum"] == list(RECIPES)
    assert fields["alpha"]["minimum"] == 0 and fields["alpha"]["type"] == "number"
    assert not [name for name, field in fields.items() if "default" in field and field["default"] is None]
    assert all(field["description"] for field in [*fields.values(), *schema["properties"].values()])


def test_writing_params_keeps_comments_and_refuses_unknown_keys(project):
    assert write_params(project, {"number": 4, "how": "well"}) == {"number": (3, 4)}
    assert (project / "params.yaml").read_text() == FILES["params.yaml"].replace("3", "4")
    with pytest.raises(CaloraError, match=r"no\.such"):
        write_params(project, {"no.such": 1})


def test_the_command_line_has_the_forms_fields(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    told = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in told for name in Settings.model_fields if name != "other")
    assert main(["run", "--alpha", "-3"]) == 1
    assert "alpha" in capsys.readouterr().err


def test_numbers_and_texts_are_the_same_for_every_reader_of_yaml(project):
    from dvc.utils.serialize import load_yaml

    text = "a: 0\nb: 0\nc: 0\nkept: 1e-07  # as it was written\nswitch: on\n"
    (project / "params.yaml").write_text(text)
    changed = {"a": 1e-05, "b": [1e16, {"c": -2.5e-300}], "c": ["yes", "1e-5", "017", "null", "", "word", "2026-01-01"]}
    write_params(project, changed)
    written = (project / "params.yaml").read_text()
    for read in (yaml.safe_load(written), load_yaml(project / "params.yaml")):
        assert {key: read[key] for key in changed} == changed
    assert written.endswith(text[text.index("kept") :])


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1E-05", "1.0e-5", "+1e-5"])
def test_small_numbers_of_the_command_line_are_numbers(text):
    assert pair(f"distill.alpha={text}") == ("distill.alpha", 1e-5)
    assert cells([f"distill.alpha={text},0.5"]) == [{"distill.alpha": 1e-5}, {"distill.alpha": 0.5}]


@pytest.mark.parametrize(
    "arguments",
    [["run", "--set", "k=[0.1"], ["run", "--set", "k"], ["run", "--set", "=1"], ["run", "--set", "k=2026-13-45"],
     ["sweep", "k=[0.1"], ["ui", "--port", "65535"], ["ui", "--port", "0"], ["ui", "--port", "abc"], ["ui", "--port", "-1"],
     ["ui", "--runs", "0"], ["nothing"], ["run", "--speed", "1"]],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(arguments, capsys):
    with contextlib.suppress(SystemExit):
        assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


# Checkouts


def test_a_checkout_leaves_the_working_tree_alone_and_goes_away(project):
    (project / "params.yaml").write_text("number: 5\nhow: well\nrecipes: [a]\n")
    (project / "new file.txt").write_text("new")
    assert sorted(uncommitted(project)) == ["new file.txt", "params.yaml"]
    head = commit_of(project, "HEAD")
    with checkout(project, head, take_along=False) as folder:
        assert (folder / "params.yaml").read_text() == FILES["params.yaml"]
        (folder / "params.yaml").write_text("changed")
    with checkout(project, head, take_along=True) as folder:
        assert (folder / "params.yaml").read_text() == (project / "params.yaml").read_text()
        assert (folder / "new file.txt").read_text() == "new"
    with pytest.raises(ZeroDivisionError), checkout(project, head, take_along=False):
        _ = 1 / 0
    assert "number: 5" in (project / "params.yaml").read_text() and left(project) == []


def test_the_checkout_of_a_killed_run_is_swept_and_a_living_one_is_not(project):
    head = commit_of(project, "HEAD")
    code = (
        "import os, sys; from pathlib import Path; from pipeline.checkout import checkout\n"
        f"with checkout(Path({str(project)!r}), {head!r}, False) as folder:\n"
        "    print(folder, flush=True); os.kill(os.getpid(), 9)"
    )
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    with checkout(project, head, take_along=False) as folder:
        assert not Path(dead).exists()
        sweep(project)
        assert folder.exists()
    assert left(project) == []


def test_checkpoints_that_no_run_went_on_from_go_away_after_two_weeks(project):
    head, old = commit_of(project, "HEAD"), time.time() - 15 * 24 * 3600
    kept = {name: project / ".cache/unfinished" / name for name in ("new", "old", "going on")}
    for name, folder in kept.items():
        (folder / "half").mkdir(parents=True)
        when = time.time() if name == "new" else old
        for path in (folder / "half", folder):
            os.utime(path, (when, when))
    with owned(kept["going on"]), checkout(project, head, take_along=False):
        assert [name for name, folder in kept.items() if folder.exists()] == ["new", "going on"]


def test_the_same_run_twice_is_refused_and_checkpoints_stay_until_it_ends_well(project):
    head = commit_of(project, "HEAD")
    with pytest.raises(KeyError), checkout(project, head, False) as folder, resumable(project, folder):
        (folder / "checkpoints/half").write_text("")
        with (
            checkout(project, head, False) as other,
            pytest.raises(CaloraError, match="going on"),
            resumable(project, other),
        ):
            pass
        raise KeyError
    with checkout(project, head, False) as folder, resumable(project, folder):
        assert (folder / "checkpoints/half").exists()
    with checkout(project, head, False) as folder, resumable(project, folder):
        assert not (folder / "checkpoints/half").exists()


def test_no_repository_and_no_such_commit_are_told(tmp_path, project):
    with pytest.raises(CaloraError, match="git init"):
        commit_of(tmp_path, "HEAD")
    with pytest.raises(CaloraError, match="nowhere"):
        commit_of(project, "nowhere")
    with pytest.raises(CaloraError, match="a commit of"):
        commit_of(project, "--all")


# In any git


SET_BY_USERS = {
    "diff.noprefix": "true", "diff.mnemonicPrefix": "true", "diff.external": "false", "diff.submodule": "log", "diff.context": "0",
    "color.ui": "always", "core.quotePath": "true", "core.safecrlf": "true", "core.autocrlf": "input", "apply.whitespace": "error",
    "status.showUntrackedFiles": "no", "status.renames": "copies", "status.relativePaths": "false", "core.hooksPath": "hooks",
}  # fmt: skip


def change_files(project):
    """Every kind of change; returns what a checkout has to hold, by name."""
    (project / "params.yaml").write_text("number: 5  \nhow: well\n\n\nrecipes: [a]\n")
    git(project, "mv", "stages/report.py", "stages/ein Bericht.py")
    (project / "stages/common.py").unlink()
    (project / "new ä.bin").write_bytes(b"\0\r\n\xff")
    (project / "windows.txt").write_bytes(b"a\r\nb\n")
    (project / "run.sh").write_text("true\n")
    (project / "run.sh").chmod(0o755)
    (project / "results").mkdir()
    (project / "results/of another run.txt").write_text("")
    return {
        name: (project / name).read_bytes() for name in ("params.yaml", "stages/ein Bericht.py", "new ä.bin", "run.sh")
    }


@pytest.mark.parametrize(
    ("below", "settings"),
    [("", {}), ("", SET_BY_USERS), ("a project/of many", SET_BY_USERS)],
    ids=["plain", "set", "below"],
)
def test_changes_are_taken_along_whatever_git_is_set_to_and_wherever_the_project_is(
    tmp_path, below, settings, monkeypatch
):
    project = make_toy(tmp_path / "repository", below)
    (project.parents[1] / "elsewhere.txt" if below else project / "windows.txt").write_text("not ours")
    for key, value in settings.items():
        git(project, "config", key, value)
    if settings:
        (project / "hooks").mkdir()
        (project / "hooks/post-checkout").write_text("#!/bin/sh\nexit 1\n")
        (project / "hooks/post-checkout").chmod(0o755)
        (project / ".git/info" if not below else tmp_path / "repository/.git/info").joinpath("exclude").write_text(
            "hooks\n"
        )
        monkeypatch.setenv("LANG", "de_DE.UTF-8")
        monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
        monkeypatch.setenv("GIT_DIR", "/nowhere")
    held = change_files(project)
    expected = {*held, "stages/report.py", "stages/common.py", "windows.txt"}
    assert set(uncommitted(project)) == expected
    with checkout(project, commit_of(project, "HEAD"), take_along=True) as folder:
        assert {name: (folder / name).read_bytes() for name in held} == held
        assert not (folder / "stages/report.py").exists() and not (folder / "stages/common.py").exists()
        assert os.access(folder / "run.sh", os.X_OK) and not (folder / "results").exists()
        assert (folder / "windows.txt").exists()
    assert set(uncommitted(project)) == expected and left(project) == []


def test_what_runs_write_is_no_change_in_a_folder_of_a_larger_repository(tmp_path):
    project = make_toy(tmp_path / "repository", "below")
    (project / "results").mkdir()
    for name in ("dvc.lock", "results/table.md"):
        (project / name).write_text("")
    assert uncommitted(project) == []


def keep(project, folder, name):
    """An experiment of a checkout, without Prefect."""
    with resumable(project, folder):
        assert Processes().run([*DVC, "repro", "--quiet"], folder, print) == 0
        return save_experiment(project, folder, name, Processes(), print)


def test_a_project_in_a_folder_beside_a_submodule_has_experiments(tmp_path):
    project, library = make_toy(tmp_path / "project", "below"), tmp_path / "library"
    subprocess.run(["git", "init", "--quiet", library], check=True)
    (library / "one.txt").write_text("one")
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    git(library, "add", "--all")
    git(library, *author, "commit", "--quiet", "--message", "one")
    git(project, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(library), "lib")
    git(project, "commit", "--quiet", "--message", "library")
    with checkout(project, commit_of(project, "HEAD"), take_along=False) as folder:
        assert (folder / "lib/one.txt").read_text() == "one"
        (folder / "params.yaml").write_text(FILES["params.yaml"].replace("3", "4"))
        assert keep(project, folder, "with") == "with"
    assert json.loads(files_of(project, "with")("results/summary.json"))["toy"]["a"]["square"] == 16
    assert left(project) == [] and uncommitted(project) == []
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(tmp_path / "project"), str(clone))
    with pytest.raises(CaloraError, match="git submodule update"), checkout(clone / "below", "HEAD", take_along=False):
        pass


def test_a_project_that_is_a_submodule_is_told_so_before_any_stage_runs(tmp_path):
    project, above = make_toy(tmp_path / "project"), tmp_path / "above"
    subprocess.run(["git", "init", "--quiet", above], check=True)
    git(above, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(project), "inner")
    with pytest.raises(CaloraError, match="submodule"), checkout(above / "inner", "HEAD", take_along=False):
        pass
    assert left(above / "inner") == []


def test_an_unknown_author_is_told_so_before_any_stage_runs(project, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    git(project, "config", "--unset", "user.email")
    with pytest.raises(CaloraError, match=r"git config user\.email"), checkout(project, "HEAD", take_along=False):
        pass


# Names


def test_an_experiment_has_a_name_that_git_knows_nothing_by(project):
    git(project, "branch", "topic")
    git(project, "tag", "v1")
    git(project, "fetch", "--quiet", ".", "topic")
    for name in ("HEAD", "main", "workspace", "topic", "v1", "deadbeef", "1234567", "a..b", "end.lock", "FETCH_HEAD"):
        with pytest.raises(CaloraError, match="another name"):
            check_name(project, name)
    check_name(project, "alpha01")


class Saves:
    """`dvc exp save`, without DVC."""

    def run(self, command, folder, say):
        head, name = commit_of(folder, "HEAD"), command[command.index("--name") + 1]
        time.sleep(0.3)
        git(folder, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", head)
        return 0


def test_two_runs_that_end_together_have_two_names(project):
    (project / ".cache").mkdir()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(save_experiment, project, project, "same", Saves(), print) for _ in range(2)]
    assert sorted(one.result() for one in both) == sorted(experiments(project)) == ["same", "same-2"]


# Data of one's own


def test_a_checkout_has_the_users_own_files_and_dvc_the_same_hashes(project):
    (project / "own/deep").mkdir(parents=True)
    (project / "own/README.md").write_text("what belongs here")
    with (project / ".gitignore").open("a") as file:
        file.write("/own/*\n!/own/README.md\n")
    (project / "dvc.yaml").write_text(DVC_YAML.replace("params: [number]", "deps: [own]\n    params: [number]"))
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "own")
    (project / "elsewhere.csv").write_text("c")
    (project / "own/a.csv").write_text("a")
    (project / "own/deep/b.csv").write_text("b")
    (project / "own/linked.csv").symlink_to("../elsewhere.csv")
    assert run_stage("number", project, Processes(), lambda _: None) == "ran"
    with checkout(project, commit_of(project, "HEAD"), take_along=False) as folder:
        assert {path.name for path in (folder / "own").rglob("*.csv")} == {"a.csv", "b.csv", "linked.csv"}
        assert run_stage("number", folder, Processes(), lambda _: None) == "restored"
        locked = [(place / "dvc.lock").read_text() for place in (project, folder)]
        assert locked[0] == locked[1]
    assert (project / "own/deep/b.csv").read_text() == "b"


def test_a_file_that_is_nowhere_or_ignored_is_named_before_any_stage_runs(project):
    with (project / ".gitignore").open("a") as file:
        file.write("mine/\nown/\n")
    git(project, "commit", "--quiet", "--all", "--message", "ignored")
    for name in ("mine/train.csv", "own/train.csv"):
        (project / name).parent.mkdir()
        (project / name).write_text("")
    one = {"source": "files", "train": "own/train.csv", "test": "stages/common.py", "prompt": "{text}/"}
    good = {"tasks": ["one"], "data": {"sets": {"one": one, "unused": {**one, "train": "own/nowhere.csv"}}}}
    wrong = ({"train": "nowhere.csv"}, {"validation": "own/nowhere.csv"}, {"more": ["mine/train.csv"]})
    with checkout(project, commit_of(project, "HEAD"), take_along=False) as folder:
        (folder / "params.yaml").write_text(json.dumps(good))
        check_files(project, folder)
        for change in wrong:
            (folder / "params.yaml").write_text(json.dumps({**good, "data": {"sets": {"one": {**one, **change}}}}))
            with pytest.raises(CaloraError, match=rf"data\.sets\.one\.{next(iter(change))}.*own/"):
                check_files(project, folder)


# Processes


def test_stopping_takes_the_whole_group_and_refuses_what_comes(tmp_path):
    processes, lines = Processes(), []
    stubborn = (
        "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    )

    def work() -> None:
        with pytest.raises(Stopped):
            processes.run([sys.executable, "-c", stubborn], tmp_path, lines.append)

    thread = threading.Thread(target=work)
    thread.start()
    while not lines:
        time.sleep(0.02)
    start = time.monotonic()
    processes.stop()
    thread.join()
    assert time.monotonic() - start < guard.GRACE + 3
    assert gone(int(lines[0]), 2)
    with pytest.raises(Stopped):
        processes.run(["true"], tmp_path, lines.append)


def gone(pid: int, seconds: float) -> bool:
    """Whether a process has ended, or does within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_command_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline.process import Processes\n"
        f"Processes().run(['sh', '-c', 'echo $$; sleep 100'], Path({str(tmp_path)!r}), lambda line: print(line, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(pid, guard.GRACE + 5)


# The graph, and the flow


def test_stages_come_from_dvc_in_order(project):
    graph = stages(project)
    assert graph == {"number": [], "square@a": ["number"], "square@b": ["number"], "report": ["square@a", "square@b"]}
    assert list(with_needed(graph, ["square"])) == ["number", "square@a", "square@b"]
    with pytest.raises(CaloraError, match="cube"):
        with_needed(graph, ["cube"])
    assert standing(project) == (graph, set())
    assert run_stage("number", project, Processes(), lambda _: None) == "ran"
    assert standing(project) == (graph, {"number"})


TWO_AT_ONCE = """
import pathlib, sys, time
mine, other = (pathlib.Path(f'{name}.begun') for name in (sys.argv[1], {'a': 'b', 'b': 'a'}[sys.argv[1]]))
mine.touch()
deadline = time.monotonic() + 20
while not other.exists():  # it ends only beside the other
    assert time.monotonic() < deadline, 'alone'
    time.sleep(0.05)
"""


def two_at_once(project, monkeypatch):
    monkeypatch.setenv("CALORA_WORKERS", "2")
    square = project / "stages/square.py"
    square.write_text(TWO_AT_ONCE + square.read_text())
    with (project / ".gitignore").open("a") as file:
        file.write("*.begun\n")
    git(project, "commit", "--quiet", "--all", "--message", "two at once")


def test_two_stages_of_a_run_work_side_by_side(project, monkeypatch, prefect_api):
    two_at_once(project, monkeypatch)
    side_by_side = flows.ca_lora.with_options(task_runner=ThreadPoolTaskRunner(max_workers=workers()))
    assert side_by_side(name="both", return_state=True).is_completed()
    squares = json.loads(files_of(project, "both")("results/summary.json"))["toy"]
    assert {name: one["square"] for name, one in squares.items()} == {"a": 9, "b": 9}


def test_make_run_works_side_by_side_and_says_how_long_each_stage_took(project, monkeypatch, capfd):
    monkeypatch.setattr(local, "CHECK_PARAMS", ("true",))
    two_at_once(project, monkeypatch)
    assert local.repro(project) == 0
    shown = capfd.readouterr().out
    assert re.findall(r"^(\S+) +ran +\d+\.\d +\d+%$", shown, re.M)[-1] != "" and "square@a | " in shown
    assert sorted(re.findall(r"^(\S+) +ran ", shown, re.M)) == ["number", "report", "square@a", "square@b"]
    assert subprocess.run([*DVC, "status", "--quiet"], cwd=project).returncode == 0
    assert local.repro(project) == 0
    assert " ran " not in capfd.readouterr().out


def test_make_run_keeps_dvcs_exit_code_and_begins_nothing_after_a_failure(project, monkeypatch, capfd):
    monkeypatch.setattr(local, "CHECK_PARAMS", ("true",))
    write_params(project, {"how": "badly"})
    for count in ("1", "2"):
        monkeypatch.setenv("CALORA_WORKERS", count)
        assert local.repro(project) == 255
        shown = capfd.readouterr()
        assert "a cannot be squared" in shown.out + shown.err and "report  " not in shown.out
    write_params(project, {"how": "well"})
    monkeypatch.setenv("CALORA_WORKERS", "1")
    assert local.repro(project) == 0
    shown = capfd.readouterr().out
    assert sorted(re.findall(r"^(\S+) +ran +\d", shown, re.M))[0] == "report"


def test_programs_that_work_side_by_side_share_the_cores(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "CALORA_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    read = [sys.executable, "-c", "import stages, os; print(os.environ['GOMP_SPINCOUNT'])"]
    assert environment()["GOMP_SPINCOUNT"] == "1000" and "OMP_NUM_THREADS" not in environment()
    assert subprocess.run(read, capture_output=True, text=True, cwd=ROOT).stdout == "1000\n"
    monkeypatch.setenv("CALORA_WORKERS", "1000")
    assert environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment()["GOMP_SPINCOUNT"] == "7" and environment()["OMP_NUM_THREADS"] == "3"
    assert subprocess.run(read, capture_output=True, text=True, cwd=ROOT).stdout == "7\n"
    monkeypatch.setenv("CALORA_WORKERS", "many")
    with pytest.raises(CaloraError, match="CALORA_WORKERS"):
        environment()


def run(**options):
    return flows.ca_lora(**options, return_state=True)


def test_a_run_becomes_an_experiment_and_the_same_again_comes_from_the_cache(project, prefect_api):
    state = run(name="first", settings=Settings(other={"number": 7}))
    assert state.is_completed() and set(state.result().values()) == {"Completed"}
    assert (project / "params.yaml").read_text() == FILES["params.yaml"] and git(project, "status", "--porcelain") == ""
    assert list(experiments(project, commit_of(project, "HEAD"))) == ["first"] and left(project) == []
    again = run(name="first", settings=Settings(other={"number": 7}))
    states = again.result()
    assert {states[s] for s in ("number", "square@a", "square@b")} == {"Cached"}
    assert sorted(experiments(project)) == ["first", "first-2"]
    shown = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "show", "--json"], cwd=project, capture_output=True, text=True
    )
    rows = {row["name"]: row for row in json.loads(shown.stdout)[1]["experiments"]}
    assert rows["first"]["revs"][0]["data"]["params"]["params.yaml"]["data"]["number"] == 7


def test_a_lock_from_another_machine_does_not_keep_a_run_from_the_cache(project, prefect_api):
    assert run(name="here").is_completed()
    text = files_of(project, "here")("dvc.lock")
    for digest in set(re.findall(r"md5: ([0-9a-f]{32})\n\s+size: \d+\n  \w", text)):  # of outputs: each ends its stage
        text = text.replace(digest, hashlib.md5(digest.encode()).hexdigest())
    (project / "dvc.lock").write_text(text)
    git(project, "add", "dvc.lock")
    git(project, "commit", "--quiet", "--message", "results of another processor")
    states = run(name="there").result()
    assert {states[stage] for stage in ("number", "square@a", "square@b")} == {"Cached"}


def test_a_failed_stage_fails_the_run_and_leaves_other_branches_going(project, prefect_api):
    state = run(name="bad", settings=Settings(other={"how": "badly"}))
    assert state.is_failed()
    with pytest.raises(StageFailed, match=r"square@a: Failed.*report: NotReady"):
        state.result()
    with checkout(project, commit_of(project, "HEAD"), False) as folder:
        write_params(folder, {"how": "badly"})
        assert run_stage("number", folder, Processes(), lambda _: None) == "restored"
        assert run_stage("square@b", folder, Processes(), lambda _: None) == "restored"
    assert left(project) == [] and experiments(project) == {}


def test_uncommitted_changes_are_refused_or_taken_along(project, prefect_api):
    (project / "params.yaml").write_text(FILES["params.yaml"].replace("3", "9"))
    state = run(name="dirty")
    with pytest.raises(CaloraError, match=r"params\.yaml"):
        state.result()
    assert run(name="dirty", changed_files="take along").is_completed()
    assert json.loads(files_of(project, "dirty")("results/summary.json"))["toy"]["a"]["square"] == 81


def test_a_run_takes_no_changes_along_that_are_not_its_commits_and_no_name_of_gits(project, prefect_api):
    first = commit_of(project, "HEAD")
    (project / "params.yaml").write_text(FILES["params.yaml"].replace("3", "9"))
    git(project, "commit", "--quiet", "--all", "--message", "later")
    (project / "params.yaml").write_text(FILES["params.yaml"].replace("3", "10"))
    with pytest.raises(CaloraError, match="take along"):
        run(name="mixed", commit=first, changed_files="take along").result()
    with pytest.raises(CaloraError, match="another name"):
        run(name="HEAD", commit=first).result()
    assert experiments(project) == {} and left(project) == []


@pytest.mark.parametrize(
    ("said", "again"),
    [("error: download of x==1: expected the package index to answer with it, found no route. Fix: connect", True),
     ("error: hub model x: expected an answer, found a timeout. Fix: check repo, revision, network and login", True),
     ("ERROR: Unable to acquire lock. Most likely another DVC process is running", True),
     ("error: download of x==1: expected SHA-256 ab, found cd. Fix: check version and sha256", False),
     ("error: params.yaml: expected an answer among a, b, found c. Fix: correct it", False)],
)  # fmt: skip
def test_a_lock_and_a_broken_network_are_tried_again_in_any_stage_and_mistakes_are_not(project, said, again):
    class Fails:
        def run(self, command, folder, say):
            say(said)
            say("ERROR: failed to reproduce 'calibration': failed to run: python -m stages.calibration, exited with 1")
            return 255

    with pytest.raises(StageFailed) as failed:
        run_stage("calibration", project, Fails(), lambda _: None)
    assert flows.can_help(None, None, Failed(data=failed.value)) is again and failed.value.code == 255


def test_what_runs_themselves_wrote_is_no_change_and_stays_behind(project, prefect_api):
    (project / "results").mkdir(exist_ok=True)
    (project / "results/of another run.txt").write_text("")
    assert run(name="clean").is_completed()
    place = experiments(project)["clean"]
    assert "of another run" not in git(project, "ls-tree", "-r", "--name-only", place)
    assert "results/summary.json" in git(project, "ls-tree", "-r", "--name-only", place)


def test_a_stopped_run_is_gone_in_time_and_started_again_goes_on(project, prefect_api):
    stops = {"prefect server": signal.SIGKILL, "flow.ca_lora": signal.SIGTERM}
    for number, (victim, stop) in enumerate(stops.items(), 1):
        process = start_run(project, "slow", {"how": "slowly", "number": number})
        deadline = time.monotonic() + 90
        while len(list((project / ".cache/unfinished").glob("*/half"))) < number and time.monotonic() < deadline:
            time.sleep(0.1)
        assert time.monotonic() < deadline
        (found,) = [pid for pid, line in processes(project).items() if victim in line and "guard.py" not in line]
        start = time.monotonic()
        os.kill(found, stop)
        process.wait(20)
        while processes(project) and time.monotonic() < start + 20:
            time.sleep(0.1)
        assert time.monotonic() - start < 10, processes(project)
        assert git(project, "status", "--porcelain") == ""
    state = run(name="slow", settings=Settings(other={"how": "slowly", "number": number}))
    assert state.is_completed() and left(project) == []


def test_the_api_starts_a_run_and_refuses_impossible_values_by_name(project, prefect_api):
    from prefect.client.base import PrefectHttpxSyncClient
    from prefect.settings import PREFECT_API_URL

    deployment = flows.ca_lora.to_deployment("local").apply()
    start = f"{PREFECT_API_URL.value()}/deployments/{deployment}/create_flow_run"
    form = flows.ca_lora.parameters.model_dump()["properties"]
    defaults = {name: field["default"] for name, field in form.items()}  # what the form sends if nothing is filled in
    # Prefect's client tries again where the database is busy (503).
    with PrefectHttpxSyncClient(raise_on_all_errors=False, enable_csrf_support=False, timeout=30) as client:
        for settings, named in (({"alpha": -1}, "alpha"), ({"recipes": ["q9"]}, "recipes"), ({"speed": 1}, "speed")):
            refused = client.post(start, json={"parameters": {"settings": settings}})
            assert refused.status_code == 409 and named in refused.text
        assert client.post(start, json={"parameters": defaults}).status_code == 201
        taken = client.post(start, json={"parameters": {"name": "alpha01", "settings": {"alpha": 0.1}}})
    assert taken.status_code == 201 and taken.json()["parameters"]["settings"] == {"alpha": 0.1}


def test_a_schedule_set_in_the_ui_makes_runs_and_outlives_a_restart(project, prefect_api):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.schedules import CronSchedule

    flows.ca_lora.to_deployment("local").apply()
    deployment = flows.ca_lora.to_deployment("local", **serving.as_it_was()).apply()  # as `make ui` serves it
    with get_client(sync_client=True) as client:
        place = f"/deployments/{deployment}"
        cron = [{"schedule": CronSchedule(cron="0 3 * * *").model_dump(mode="json"), "active": True}]
        client.request("POST", f"{place}/schedules", json=cron)
        client.pause_deployment(deployment)
        assert flows.ca_lora.to_deployment("local", **serving.as_it_was()).apply() == deployment
        again = client.read_deployment(deployment)
        assert again.paused and [(one.schedule.cron, one.active) for one in again.schedules] == [("0 3 * * *", True)]
        client.resume_deployment(deployment)
        client.request("POST", f"{place}/schedule", json={"min_runs": 2})  # what the server's scheduler does
        wanted = {"deployments": {"id": {"any_": [str(deployment)]}}}
        runs = client.request("POST", "/flow_runs/filter", json=wanted).json()
    due = [run["expected_start_time"] for run in runs if run["auto_scheduled"]]
    assert len(due) >= 2 and all("T03:00:00" in when for when in due)


def test_runs_that_ended_with_the_server_are_not_running_for_ever(project, prefect_api, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling, Completed, Running, Scheduled

    monkeypatch.setattr(serving, "ROOT", project)
    states = {state.name: state for state in (Running(), Cancelling(), Completed(), Scheduled())}
    with get_client(sync_client=True) as client:
        place = f"/deployments/{flows.ca_lora.to_deployment('local').apply()}/create_flow_run"
        runs = {name: client.request("POST", place, json={}).json()["id"] for name in states}
        for name, state in states.items():
            client.set_flow_run_state(runs[name], state, force=True)
        serving.end_orphans()
        now = {name: client.read_flow_run(run).state.name for name, run in runs.items()}
    assert now == {"Running": "Crashed", "Cancelling": "Cancelled", "Completed": "Completed", "Scheduled": "Scheduled"}


def test_a_second_server_is_refused_and_so_is_a_port_that_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(ui, "LOG", tmp_path / ".prefect/server.log")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(CaloraError, match=f"port {port}.*PORT="):
            ui.serve_ui(port, 1)
    (tmp_path / ".prefect").mkdir()
    with owned(tmp_path / ".prefect/ui"), pytest.raises(CaloraError, match=r"another that is running here"):
        ui.serve_ui(port, 1)


def test_the_docs_call_of_the_api_is_this_deployment():
    text = (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    assert "/api/deployments/name/ca-lora/local" in text and "/create_flow_run" in text
    body = json.loads(re.search(r"-d '(\{.*\})'", text)[1])
    assert Settings.model_validate(body["parameters"].pop("settings"))
    assert body["parameters"].keys() <= flows.ca_lora.parameters.model_dump()["properties"].keys()


def test_make_lists_every_target_and_never_removes_own_files(tmp_path):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    plain = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    listed = subprocess.run(
        ["make", "--silent", "help"], env=plain, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()
    assert [line.split()[0] for line in listed.splitlines()] == targets == re.findall(r"^([a-z]+):", text, re.M)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("own/data.csv", "data/movies/train.jsonl", "models/base/x", "results/movies/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    (tmp_path / "data/movies/linked").symlink_to(tmp_path / "own")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["Makefile", "data.csv"]


def test_dvc_plots_need_no_network(project):
    offline.main(project)
    (project / "loss.json").write_text(json.dumps([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]))
    shown = [sys.executable, "-m", "dvc", "plots", "show", "-x", "step", "-y", "loss", "loss.json"]
    subprocess.run(shown, cwd=project, check=True, capture_output=True)
    page = (project / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "vegaEmbed(" in page and not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=.?http", page)


# Sweeps and comparisons


def test_a_sweep_has_every_combination_under_names_of_their_own():
    found = cells(["methods.calora.loss.alpha=0.01,0.05", "recipes=q8,nf4"])
    assert len(found) == 4 and found[0] == {"methods.calora.loss.alpha": 0.01, "recipes": ["q8"]}
    assert label_of(found[0]) == "alpha0.01-recipesq8"
    assert cells(["alpha=0.01,0.05", "recipes=q8,nf4"]) == found  # by the form's name
    assert len({name_of("sweep", cell, commit) for cell in found for commit in ("a", "b")}) == 8
    for bad in ("alpha", "alpha=", "=1"):
        with pytest.raises(CaloraError, match="sweep"):
            cells([bad])


def test_a_sweep_runs_what_is_no_experiment_yet_and_all_of_it_at_one_commit(project, prefect_api, monkeypatch):
    began = []
    flow = flows.ca_lora

    def note(name, settings, commit, **more):
        began.append((settings.other["number"], commit))
        (project / "later.txt").write_text(name)  # somebody goes on working, and commits
        git(project, "add", "later.txt")
        git(project, "commit", "--quiet", "--message", "meanwhile")
        return flow(name, settings, commit, **more)

    monkeypatch.setattr(flows, "ca_lora", note)
    first = commit_of(project, "HEAD")
    run_sweep(project, "sweep", cells(["number=4"]))
    assert began == [(4, first)]
    git(project, "reset", "--quiet", "--hard", first)
    names = run_sweep(project, "sweep", cells(["number=4,5"]))
    assert began[1:] == [(5, first)] and list(experiments(project, first)) == names
    squares = [json.loads(files_of(project, name)("results/summary.json"))["toy"]["a"]["square"] for name in names]
    assert squares == [16, 25]
    (project / "params.yaml").write_text("number: 1\n")
    with pytest.raises(CaloraError, match=r"params.yaml.*commit them"):
        run_sweep(project, "sweep", cells(["number=7"]))


def test_parameters_are_compared_leaf_by_leaf():
    assert flat({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}


# More than one machine


def test_what_one_machine_pushed_no_other_computes(project, tmp_path, prefect_api, monkeypatch):
    git(project, "init", "--bare", "--quiet", str(tmp_path / "git"))
    git(project, "remote", "add", "origin", str(tmp_path / "git"))
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run(
        [*dvc, "remote", "add", "--quiet", "--default", "files", str(tmp_path / "files")], cwd=project, check=True
    )
    git(project, "commit", "--quiet", "--all", "--message", "remote")
    git(project, "push", "--quiet", "origin", "HEAD")
    other = tmp_path / "other"
    git(project, "clone", "--quiet", str(tmp_path / "git"), str(other))
    for key, value in (("user.name", "other"), ("user.email", "o@example.org")):
        git(other, "config", key, value)
    assert set(run(name="here", settings=Settings(other={"number": 4}), share="origin").result().values()) == {
        "Completed"
    }
    monkeypatch.setattr(flows, "ROOT", other)
    states = run(name="there", settings=Settings(other={"number": 4}), share="origin").result()
    assert {states[stage] for stage in ("number", "square@a", "square@b")} == {"Cached"}
    assert sorted(experiments(other)) == ["here", "there"]
    assert run(name="here", settings=Settings(other={"number": 6}), share="origin").is_completed()
    assert sorted(experiments(other)) == ["here", "here-2", "there"]
    seen = git(project, "ls-remote", "origin", "refs/exps/*")
    assert len(seen.splitlines()) == 3


def test_sharing_needs_remotes(project, prefect_api):
    with pytest.raises(CaloraError, match="nowhere"):
        run(name="first", share="nowhere").result()
    git(project, "remote", "add", "origin", str(project))
    with pytest.raises(CaloraError, match="dvc remote add"):
        run(name="first", share="origin").result()
    assert left(project) == []
