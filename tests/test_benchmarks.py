"""Benchmarks are run by hand and seldom: what can be checked without their models is checked here."""

import json

import pytest
import torch

from benchmarks import references, walks
from calora.models.loading import load_model
from tests.conftest import make_model
from tests.test_compression import EXPERTS, INT8, PRUNE


def test_no_calibration_text_is_held_back(tmp_path, monkeypatch, llama):
    """The first texts that are in no calibration text: neither raw nor in a prompt."""
    files = {
        "c": ["a film", "Review: the plot Sentiment:"],
        "m": ["a film", "was good", "the plot", "was bad", "is a film"],
        "n": ["is great"],
    }
    for name, texts in files.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(references, "BASE", llama)
    monkeypatch.setattr(references, "CALIBRATION", str(tmp_path / "c"))
    monkeypatch.setattr(references, "HELD_BACK", {str(tmp_path / "m"): 2, str(tmp_path / "n"): 1})
    assert len(references.calibration()) == 2
    tokenizer = references.AutoTokenizer.from_pretrained(llama)
    assert references.held_back() == [tokenizer(text).input_ids for text in ("was good", "was bad", "is great")]
    model = load_model(llama, torch.float32)
    assert references.perplexity(model) > 1


@pytest.mark.parametrize("walk_a_step", [False, True])
def test_both_ways_to_walk_make_a_model_that_computes(tmp_path, monkeypatch, toy, walk_a_step):
    base = make_model("llama", tmp_path / "base", hidden=64, inner=64)
    monkeypatch.setattr(walks, "BASE", base)
    recipe = [{"moefy": {**EXPERTS, "router": "analytic"}}, PRUNE, INT8]
    model = walks.compressed([[step] for step in recipe] if walk_a_step else [recipe], toy[2])
    assert bool(model(torch.tensor([[3, 5, 9]])).logits.isfinite().all())
    assert bool(((model.model.layers[0].mlp.up_proj.weight.view(-1, 4) != 0).sum(-1) <= 2).all())
