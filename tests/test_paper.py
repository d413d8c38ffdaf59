"""The ablation and the convergence figure, from what experiments say; the experiments themselves are made up here."""

import itertools
import json
import re

import numpy as np
import pytest

from pipeline import paper

RIGHT = {(False, False, False): 0.5, (True, True, True): 0.9}  # share of right answers of two cells; 0.7 in the others


@pytest.fixture
def experiments(monkeypatch):
    """Experiments that `sweep` claims to have run: name -> what of params.yaml they changed."""
    made = {}

    def sweep(root, title, cells, label):
        made.update({f"{title}-{label(cell)}": cell for cell in cells})
        return list(made)

    def files_of(root, name):
        cell = made[name]
        on = tuple(cell.get(key, True) for key in ("inherit.lora", "inherit.bypass", "distill.teacher"))
        right = round(200 * RIGHT.get(on, 0.7))
        answers = {"clm_calora": {"correct": [True] * right + [False] * (200 - right)}}
        curve = [{"step": step, "score": 0.6 + step / 1000} for step in (0, 10, 20)]
        return lambda path: json.dumps(answers if "predictions" in path else {"clm_calora": curve, "clm_lora": curve})

    monkeypatch.setattr(paper, "sweep", sweep)
    monkeypatch.setattr(paper, "files_of", files_of)
    return made


def test_the_ablation_has_eight_cells_with_every_seed_and_their_own_scores(experiments, tmp_path):
    text = paper.ablation(tmp_path, "movies", "q8_up", [0, 1]).read_text(encoding="utf-8")
    cells = {(c["inherit.lora"], c["inherit.bypass"], c["distill.teacher"], c["seed"]) for c in experiments.values()}
    assert cells == set(itertools.product((False, True), (False, True), (False, True), (0, 1)))
    assert (
        "ablation-movies-q8_up-inherit-distil-seed1" in experiments
        and "ablation-movies-q8_up-none-seed0" in experiments
    )
    assert all(c["tasks"] == ["movies"] and c["recipes"] == ["q8_up"] for c in experiments.values())
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


def test_the_interval_covers_items_and_seeds():
    items = np.arange(400) % 10 < 7
    mean, (low, high), each = paper.score_of(np.array([items, items]))
    error = 1.96 * (0.7 * 0.3 / 400) ** 0.5  # the binomial's: equal seeds add nothing
    assert (mean, each) == (0.7, [0.7, 0.7]) and abs(low - 0.7 + error) < 0.01 > abs(high - 0.7 - error)
    mean, (low, high), each = paper.score_of(np.array([np.ones(400, int), np.zeros(400, int)]))
    assert (mean, low, high, each) == (0.5, 0.0, 1.0, [1.0, 0.0])  # seeds that disagree do


def test_the_convergence_figure_is_one_experiment_with_a_panel_a_recipe(experiments, tmp_path):
    (tmp_path / "results").mkdir()
    path = paper.convergence(tmp_path, "movies", ["q8", "up"])
    assert list(experiments.values()) == [{"tasks": ["movies"], "recipes": ["q8", "up"], "train.eval_every": 10}]
    assert path == tmp_path / "results/convergence-movies.png" and path.stat().st_size > 10_000
