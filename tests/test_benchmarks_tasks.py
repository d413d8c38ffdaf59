"""The benchmark of the paper's tasks: runs from params.yaml alone, seeds and tasks that come together, and its table."""

import json

import pytest

from benchmarks import tasks
from benchmarks.recipes import MARKS
from calora.errors import CaloraError
from stages.config import load_params
from stages.looks import key_of
from stages.resolve import merged
from tests.conftest import ROOT, change
from tests.test_tasks import folder as folder  # params.yaml and own/


def test_each_task_is_a_change_of_params_alone(folder):
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    for task, own in tasks.TASKS.items():
        wanted = tasks.changes(task, {"train": "train.jsonl", "test": "dev.jsonl.gz"}, 3, "q3")
        for key in ("seed", "tasks", "recipes", "compare"):
            change(folder, key, wanted[key])
        change(folder, "data.sets", wanted["data"]["sets"] | {"movies": {}})
        params = load_params()
        source = params.data.sets[task]
        assert (source.max_tokens, source.train, params.seed) == (own["max_tokens"], [f"own/{task}/train.jsonl"], 3)
        assert wanted["data"]["sizes"]["test"] == own["test"] <= 1000
        assert merged(wanted, tasks.TINY)["data"]["sizes"]["train"] == 24


def test_the_validation_file_is_the_test_set(tmp_path):
    for name in ("train_part.jsonl", "dev_matched.jsonl", "test.jsonl", "README.md"):
        (tmp_path / name).write_text("{}\n")
    found = tasks.official(tmp_path)
    assert {split: path.name for split, path in found.items()} == {
        "train": "train_part.jsonl",
        "test": "dev_matched.jsonl",
    }
    (tmp_path / "dev_matched.jsonl").unlink()
    with pytest.raises(CaloraError, match=r"a file called validation \(or dev\), found test\.jsonl, train_part\.jsonl"):
        tasks.official(tmp_path)


@pytest.mark.parametrize("items", [[1.0, 0.0, 1.0] * 5, [0.5, 1.0, 0.0]])
def test_items_go_to_disk_and_back(items):
    assert tasks.items_of(json.loads(json.dumps(tasks.stored(items)))).tolist() == items


def run_of(gain, count=40):
    """A run's items by method: a fresh LoRA is right on half of them, CA-LoRA on more by `gain`, the teacher on all."""
    right = {
        key_of(tasks.BASELINE): count // 2,
        key_of(tasks.OURS): count // 2 + round(gain * count),
        tasks.TEACHER: count,
    }
    return {method: tasks.stored([1.0] * n + [0.0] * (count - n)) for method, n in right.items()}


def test_tasks_and_seeds_come_together():
    data = {"0": {"rte": {"metric": "accuracy", "recipes": {"q3": run_of(0.2)}}, "squad": {"metric": "f1", "recipes": {"q3": run_of(0.1)}}},
            "1": {"rte": {"metric": "accuracy", "recipes": {"q3": run_of(0.1), "q2": run_of(0.0)}}}}  # fmt: skip
    rte, squad, mean = tasks.table(data, "q3").rows
    assert (
        rte[:3] == ["rte", "accuracy", "40"]
        and squad[:3] == ["squad", "F1", "40"]
        and mean[:3] == ["mean of 2", "", "80"]
    )
    ours = 3 + tasks.COLUMNS.index(key_of(tasks.OURS))
    assert [row[ours] for row in (rte, squad, mean)] == ["0.650", "0.600", "0.625"] and rte[3] == ""
    assert [row[-3].split()[0] for row in (rte, squad, mean)] == ["+0.150", "+0.100", "+0.125"]
    assert [row[-2].split()[0] for row in (rte, squad, mean)] == ["-0.350", "-0.400", "-0.375"]
    assert [row[-1] for row in (rte, squad, mean)] == ["0, 1", "0", ""]
    assert tasks.table(data, "q2").rows[0][-1] == "1" and not tasks.table({}, "q3").rows


def test_a_run_is_merged_by_its_items(tmp_path):
    place = tmp_path / "models/evaluated/rte/q3"
    place.mkdir(parents=True)
    (place / "metrics.json").write_text('{"metric": "accuracy"}')
    (place / "predictions.json").write_text('{"clm_calora": {"items": [1.0, 0.0], "answers": ["a", "b"]}}')
    data = {"0": {"rte": {"metric": "accuracy", "recipes": {"q2": {}}}}}
    tasks.merge(data, "rte", "q3", 0, tmp_path)
    assert set(data["0"]["rte"]["recipes"]) == {"q2", "q3"}
    assert tasks.rows(data, "rte", "q3", "clm_calora")["0"].tolist() == [1, 0]


def test_the_page_has_a_place_for_the_table():
    page = (ROOT / tasks.PAGE).read_text(encoding="utf-8")
    assert all(page.count(MARKS.format(f"{end}: {tasks.NAME}", "benchmarks.tasks")) == 1 for end in ("start", "end"))
