"""The ablation and the convergence figure, from what experiments say; the experiments themselves are made up here."""

import itertools
import json
import re

import pytest

from pipeline import paper
from stages.config import load_params
from stages.looks import key_of
from stages.resolve import resolve
from tests.conftest import ROOT

RIGHT = {(False, False, False): 0.5, (True, True, True): 0.9}  # share of right answers of two cells; 0.7 in the others


def correct(share):
    """Of 200 items."""
    return [item < round(200 * share) for item in range(200)]


def sweep_into(made):
    """A `sweep` that keeps its cells in `made`, by the names of their experiments, and runs nothing."""

    def sweep(root, title, cells, label):
        made.update({f"{title}-{label(cell)}": cell for cell in cells})
        return list(made)

    return sweep


@pytest.fixture
def experiments(monkeypatch):
    """Experiments that `sweep` claims to have run: name -> what of params.yaml they changed."""
    made = {}

    def files_of(root, name):
        answers = {key_of(method): {"correct": correct(RIGHT.get(on, 0.7))} for on, method in paper.CELLS.items()}
        curve = [{"step": step, "score": 0.6 + step / 1000} for step in (0, 10, 20)]
        return lambda path: json.dumps(answers if "predictions" in path else {"clm_calora": curve, "clm_lora": curve})

    monkeypatch.setattr(paper, "sweep", sweep_into(made))
    monkeypatch.setattr(paper, "files_of", files_of)
    return made


def test_the_ablation_has_eight_cells_with_every_seed_and_their_own_scores(experiments, tmp_path):
    text = paper.ablation(tmp_path, "movies", "q8_up", [0, 1]).read_text(encoding="utf-8")
    assert list(experiments) == ["ablation-movies-q8_up-seed0", "ablation-movies-q8_up-seed1"]
    assert all(c["tasks"] == ["movies"] and c["recipes"] == ["q8_up"] for c in experiments.values())
    assert all(c["compare"] == list(paper.CELLS.values()) for c in experiments.values())
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "0." in line
    ]
    scores = {tuple(value == "yes" for value in row[:3]): float(row[3]) for row in rows}
    assert scores == {on: RIGHT.get(on, 0.7) for on in itertools.product((False, True), repeat=3)}
    # One corner is 0.2 below and one 0.2 above the others: each switch adds (0.2 + 0.2) / 4.
    for switch in ("inherit", "recover", "distil"):
        assert re.search(rf"^{switch} adds \+0\.100 \[\+0\.0\d\d, \+0\.1\d\d\], on average", text, re.M)
    assert (tmp_path / "results/ablation-movies-q8_up.png").stat().st_size > 10_000


def test_each_cell_of_the_ablation_is_the_method_that_it_says():
    methods = resolve(load_params(ROOT / "params.yaml").methods)
    whole = methods["calora"]
    for (inherit, recover, distil), name in paper.CELLS.items():
        start, loss = methods[name]["start"], methods[name]["loss"]
        assert start["lora"] == ("inherited" if inherit else "fresh") and start["budget"] is None
        assert start["bypass"] == (whole["start"]["bypass"] if recover else None)
        assert loss == (whole["loss"] if distil else "labels")


def test_the_convergence_figure_is_one_experiment_with_a_panel_a_recipe(experiments, tmp_path):
    (tmp_path / "results").mkdir()
    path = paper.convergence(tmp_path, "movies", ["q8", "up"])
    assert list(experiments.values()) == [{"tasks": ["movies"], "recipes": ["q8", "up"], "train.eval_every": 10}]
    assert path == tmp_path / "results/convergence-movies.png" and path.stat().st_size > 10_000
