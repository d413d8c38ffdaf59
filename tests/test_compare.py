"""Experiments side by side: the table in the terminal, the page of results, and what a run shows in Prefect's UI."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from calora.common.files import write_text
from calora.errors import CaloraError
from pipeline import experiment as reading
from pipeline.compare import compare, overview
from pipeline.experiment import Experiment, Found, differing, read_experiment
from pipeline.page import DETAILED, page
from pipeline.repository import git
from pipeline.seeds import over_seeds
from pipeline.show import REPORTS, SERVED, difference, show_results
from stages.looks import LOOKS as METHODS
from stages.means import over_tasks

PARAMS = {"tasks": ["movies"], "recipes": ["q8_up"], "evaluate": {"ours": "calora"}}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def results(score: float) -> dict[str, dict]:
    """The files of one task and recipe whose CA-LoRA has this accuracy, as `evaluate` and `inherit` write them."""
    methods = {
        name: {"accuracy": score - gap / 100, "ci": [score - gap / 100 - 0.02, score - gap / 100 + 0.02],
               "f1": score - gap / 100, "bytes_on_disk": 100_000_000 + gap * 1_000_000, "adapter_bytes": gap * 1_000_000,
               "trainable_parameters": 1_000_000}
        for gap, name in enumerate(reversed(METHODS))
    }  # fmt: skip
    share = {"value": 0.9, "ci": [0.7, 1.1], "below_noise": False}
    gain = {"value": 0.05, "ci": [0.03, 0.07]}
    methods["llm"]["downloaded_bytes"] = 50_000_000
    methods["clm_calora"] |= {"difference": gain, "recovered_share": share, "packed": 0.79}
    metrics = {
        "test_items": 1500, "methods": methods, "ours": "clm_calora", "baseline": "clm_lora", "difference": gain, "recovered_share": share,
    }  # fmt: skip
    curve = [{"step": step, "score": 0.7 + step / 1000} for step in (0, 40, 80, 120)]
    errors = {f"model.layers.{n}.{kind}": [0.2 + score * n / 100, 0.1] for n in range(30) for kind in LAYERS}
    return {
        "models/evaluated/movies/q8_up/metrics.json": metrics,
        "models/evaluated/movies/q8_up/curves.json": {"clm_lora": curve, "clm_calora": curve},
        "models/evaluated/movies/q8_up/predictions.json": {m: {"correct": [1, 0], "answers": []} for m in METHODS},
        "models/inherited/movies/q8_up/calora/inherit.json": {"errors": errors},
    }


def found_of(score):
    files = {"params.yaml": PARAMS, **results(score)}
    return reading._found(lambda path: json.dumps(files[path]), "movies/q8_up")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with results, and two experiments: `low` and `<high>`."""
    found = {"low": results(0.7), "<high>": results(0.8)}

    def files_of(root, name):
        if name not in found:
            raise CaloraError("commit", "one", name, "another")
        params = {**PARAMS, "distill": {"alpha": 0.01 if name == "low" else 0.1}}
        return lambda path: yaml.safe_dump(params) if path == "params.yaml" else json.dumps(found[name][path])

    monkeypatch.setattr(reading, "files_of", files_of)
    monkeypatch.setattr(reading, "begun_at", lambda root, name: "a commit")
    return tmp_path


def test_the_page_stands_alone_and_tells_the_experiments_apart(project, capsys):
    text = compare(project, ["low", "<high>"]).read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text
    assert not re.findall(r"""(?:src|href)=["']?(?!["']?#)|url\((?!#)""", text)  # nothing but parts of itself
    assert "&lt;high&gt;" in text and "<high>" not in text
    assert re.search(r"<th class=text>distill.alpha</th>", text) and ">0.01<" in text and ">0.1<" in text
    assert ">0.780 to 0.820<" in text and ">0.90 [0.70, 1.10]<" in text
    assert text.count("<figure>") == 2 + 2 * 3 and "prefers-color-scheme: dark" in text and "@media print" in text
    told = capsys.readouterr().out
    assert "low" in told and "<high>" in told and "0.800" in told


def test_several_tasks_have_a_mean():
    one, two = found_of(0.7), found_of(0.8)
    text = page({"a": Experiment({"movies": {"q8_up": one}, "tweets": {"q8_up": two}})})
    assert text.index("mean of 2 tasks") < text.index(">movies") and text.count("<figure>") == 3 * 2 + 2 * 3
    mean = over_tasks([one.metrics, two.metrics])
    own = mean["methods"]["clm_calora"]
    assert (
        own["accuracy"] == pytest.approx(one.metrics["methods"]["clm_calora"]["accuracy"] + 0.05)
        and mean["test_items"] == 3000
    )
    low, high = own["ci"]
    of_one = one.metrics["methods"]["clm_calora"]["ci"]
    assert high - low == pytest.approx((of_one[1] - of_one[0]) / 2**0.5)  # two independent samples
    assert mean["difference"] == {
        "value": 0.05,
        "ci": pytest.approx([0.05 - 0.02 / 2**0.5, 0.05 + 0.02 / 2**0.5], abs=1e-4),
    }
    assert own["adapter_bytes"] == one.metrics["methods"]["clm_calora"]["adapter_bytes"]


def test_a_page_of_many_runs_stays_below_3_mb():
    def run(number):
        found = found_of(0.6 + number / 1000)
        return Experiment({"movies": {"q8_up": found}}, {"distill.alpha": number})

    one, two, three = (page({f"experiment{i}": run(i) for i in range(count)}) for count in (1, 2, 3))
    assert len(one) + DETAILED * (len(three) - len(two)) < 3_000_000
    alike = page({name: run(0) for name in "abc"})  # that start alike: their layers' errors are drawn once
    assert alike.count("<figure>") == 2 + 3 * 2 + 1 and "Errors of the layers: as in a: q8_up." in alike
    many = page({f"experiment{i}": run(i) for i in range(DETAILED + 1)})
    assert many.count("<figure>") == 2 and f"there are {DETAILED + 1}" in many


def test_the_overview_has_a_line_for_each_with_the_parameters_that_differ(project):
    chosen = differing({name: read_experiment(project, name) for name in ("low", "<high>")})
    assert [one.params for one in chosen.values()] == [{"distill.alpha": 0.01}, {"distill.alpha": 0.1}]
    console = Console(width=400, record=True)
    console.print(overview(chosen))
    lines = console.export_text().splitlines()
    assert lines[0].split()[-1] == "distill.alpha"
    assert lines[1].split()[:3] == ["low", "movies", "q8_up"] and lines[2].split()[-1] == "0.1" and "+0.050" in lines[1]


def seeded(ours, fresh, commit="one", **params):
    """An experiment of 100 test items, so many of them right."""
    correct = {name: [1] * right + [0] * (100 - right) for name, right in (("clm_calora", ours), ("clm_lora", fresh))}
    found = found_of(0.8)
    return Experiment({"movies": {"q8_up": Found(found.metrics, found.curves, {}, correct)}}, params, commit)


def test_runs_that_differ_by_their_seed_alone_are_taken_together(project, capsys):
    runs = {
        "a": seeded(80, 70, seed=0, alpha=0.1, recipes=["q8_up"]),
        "b": seeded(90, 70, seed=1, alpha=0.1, recipes=["q8_up", "q8"]),
        "c": seeded(90, 60, seed=0, alpha=0.3, recipes=["q8_up"]),  # alone with its alpha
    }
    table = over_seeds(runs)
    (row,) = table.rows
    assert table.header[:4] == ["task", "recipe", "alpha", "seeds"] and len(row) == len(table.header)
    assert row[:4] == ["movies", "q8_up", "0.1", "0, 1"] and row[-1].startswith("+0.150 [")
    assert row[4:6] == ["0.700 (+ LoRA (equal budget))", "0.850 (+ CA-LoRA)"]
    assert "Means over seeds" in page(runs)
    two = {name: replace(one, found={**one.found, "tweets": one.found["movies"]}) for name, one in runs.items()}
    *_, mean = over_seeds(two).rows
    assert mean[:4] == ["mean of 2 tasks", "q8_up", "0.1", "0, 1"] and mean[-1].startswith("+0.150 [")
    assert over_seeds({"c": runs["c"], "b": seeded(90, 70, seed=0, alpha=0.2)}) is None
    assert over_seeds({"a": runs["a"], "b": seeded(90, 70, "another", seed=1, alpha=0.1)}) is None  # of other code
    assert over_seeds({"a": runs["a"], "again": seeded(10, 70, seed=0, alpha=0.1)}) is None  # one seed, twice
    assert "Means over seeds" not in compare(project, ["low", "<high>"]).read_text(encoding="utf-8")


def test_a_run_shows_tables_pictures_and_its_report(project, tmp_path, prefect_api, monkeypatch):
    from prefect.client.orchestration import get_client

    monkeypatch.setenv(SERVED, "http://127.0.0.1:1")
    root, folder = tmp_path / "root", tmp_path / "checkout"
    write_text(folder / "results/table.md", "| table |")
    write_text(folder / "results/summary.json", json.dumps({"movies": {"q8_up": {"clm_calora": 0.86}}}))
    write_text(folder / "results/plots/movies-bytes.png", "")
    write_text(folder / "results/movies/q8_up/curves/calora/train/loss.tsv", "step\tloss\n1\t0.6\n2\t0.4\n")
    for path, content in {"params.yaml": PARAMS, **results(0.8)}.items():
        write_text(folder / path, json.dumps(content))
    root.mkdir()
    git(root, "init", "--quiet")
    monkeypatch.setattr(
        reading, "files_of", lambda place, name: lambda path: (place / path).read_text(encoding="utf-8")
    )
    show_results(root, folder, "0" * 40, "mine")
    with get_client(sync_client=True) as client:
        shown = {one["key"]: one for one in client.request("POST", "/artifacts/filter", json={}).json()}
    assert shown["methods"]["data"] == "| table |" and shown["methods"]["type"] == "markdown"
    (row,) = json.loads(shown["difference"]["data"])
    assert row["metric"] == "clm_calora" and row["after"] == 0.86
    assert {shown[key]["type"] for key in ("movies-bytes", "movies-q8-up-calora-loss")} == {"image"}
    assert "http://127.0.0.1:1/mine/report.html" in shown["report"]["data"]
    kept = root / REPORTS / "mine"
    assert "<table>" in (kept / "report.html").read_text(encoding="utf-8")
    assert (kept / "plots/movies-q8_up-calora-loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_experiment_without_results_is_named(project):
    with pytest.raises(CaloraError, match=r"no such.*dvc exp list"):
        read_experiment(project, "no such")


def test_the_difference_to_the_parent_has_every_metric():
    after = {"movies": {"q8": {"clm_calora": 0.8567, "share": "below noise"}}}
    before = {"movies": {"q8": {"clm_calora": 0.85}}}
    first, second = difference(before, after)
    assert first == {
        "task": "movies",
        "recipe": "q8",
        "metric": "clm_calora",
        "before": 0.85,
        "after": 0.8567,
        "change": 0.0067,
    }
    assert (second["before"], second["change"]) == ("", "")
