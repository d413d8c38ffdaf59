"""The T5 that the benchmark trains: gaps, vocabulary, both trainings, sparsity, and the table."""

import base64
import random

import numpy as np
import pytest
import torch

from benchmarks.recipes import Results
from benchmarks.t5 import project, report, train
from benchmarks.t5.experts import neurons_on
from benchmarks.t5.texts import mixed, pieces, texts_of, tokenizer_of, with_gaps
from calora.common.files import fingerprint
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, Task

TASK = Task("toy", "Review: {text}\nSentiment:", (" negative", " positive"), 128, 4)
GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "dull")
ROWS = [
    {"text": f"the {noun} was {word} and {other}", "label": label}
    for label, words in enumerate((BAD, GOOD)) for noun in ("plot", "film", "cast") for word in words for other in words
]  # fmt: skip
SETS = {"toy": (TASK, ROWS)}
TINY = train.Shape(
    width=16, neurons=32, blocks=1, heads=2, vocabulary=180, sample=50, piece=20, pieces=4, texts=8, most=(("toy", 40),)
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(SETS, 180, 50, 0)


@pytest.mark.parametrize("length", [7, 20, 140])
def test_gaps_and_what_is_between_them_are_the_text(length):
    ids, first = list(range(10, 10 + length)), 999
    example = with_gaps(ids, first, random.Random(3))
    (*prompt, end), (*answer, also) = example.prompt_ids, example.answer_ids
    assert end == also == 1
    gaps: dict[int, list[int]] = {}
    for token in answer:
        if token > 900:
            gaps[token] = []
        else:
            gaps[list(gaps)[-1]].append(token)
    assert [token for place in prompt for token in gaps.get(place, [place])] == ids
    assert list(gaps) == list(range(first, first - len(gaps), -1)) and all(gaps.values())
    taken = sum(map(len, gaps.values()))
    assert taken == max(round(0.15 * length), 1) and len(gaps) == max(round(taken / 3), 1)
    assert with_gaps(ids, first, random.Random(4)) != example or length < 140


def test_the_vocabulary_is_laid_out_as_that_of_t5(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    size = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [size - 1, size - 100]
    assert tokenizer("a film\nwas  good").input_ids == tokenizer(" a film was good ".strip()).input_ids
    assert tokenizer.decode(tokenizer("the film was good").input_ids, skip_special_tokens=True) == "the film was good"


def test_pieces_hold_every_text_once_and_tasks_their_labels(tokenizer):
    texts = texts_of(SETS)
    assert len(texts) == len(set(texts)) == len({row["text"] for row in ROWS})
    cut = pieces(tokenizer, texts, 5, 0)
    tokens = [token for ids in tokenizer(texts).input_ids for token in ids]
    assert {len(piece) for piece in cut} == {5} and len(cut) == len(tokens) // 5
    assert pieces(tokenizer, texts, 5, 0) == cut != pieces(tokenizer, texts, 5, 1)
    examples = mixed({"toy": (TASK, [{"text": "none", "label": None}, *ROWS])}, tokenizer, {"toy": 4})
    assert len(examples) == 4
    assert examples[0].answer_ids == tokenizer(" negative").input_ids and examples[0].answer_ids[-1] == 1
    assert examples[0].prompt_ids == tokenizer(f"Review: {ROWS[0]['text']}\nSentiment:").input_ids


def test_a_base_is_trained_and_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(train, "training_rows", lambda params: SETS)
    monkeypatch.setattr(train, "steps_in", lambda minutes, losses: round(minutes))
    train.base(None, tmp_path / "t5", 40, 0.25, TINY, 0)
    learned = load_model(tmp_path / "t5", torch.float32)
    assert learned.config.dense_act_fn == "relu" and learned.config.tie_word_embeddings
    assert len(load_tokenizer(tmp_path / "t5")) == learned.config.vocab_size
    start, gapped = (
        load_model(tmp_path / "checkpoints" / name, torch.float32) for name in ("start", "span_corruption")
    )
    examples = mixed(SETS, load_tokenizer(tmp_path / "t5"), {"toy": 99})

    def loss(model):
        family = train.family_of(model)
        batch = family.collate(examples, model)
        with torch.no_grad():
            return float(train.task_loss(family.forward(model, batch, None), batch))

    assert loss(learned) < loss(gapped) < loss(start)
    before = fingerprint(tmp_path / "t5")
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it was trained already"))
    train.base(None, tmp_path / "t5", 40, 0.25, TINY, 0)
    assert fingerprint(tmp_path / "t5") == before
    assert f"fingerprint {before}" in capsys.readouterr().out


def test_steps_follow_from_minutes():
    weight = torch.nn.Parameter(torch.zeros(1))

    def losses(step):
        end = train.time.process_time() + 0.01
        while train.time.process_time() < end:
            pass
        yield {"loss": weight.sum()}, 1

    assert 200 < train.steps_in(0.1, losses) < 620


def test_neurons_that_are_on_are_counted_at_real_tokens():
    model = train.fresh(TINY, 60, 0).float().eval()
    examples = [Example([5, 6, 7], [8, 1]), Example([9, 3, 4, 5, 6, 1], [7, 1])]
    found = neurons_on(model, examples, batch_size=2)
    assert list(found) == ["encoder.block.0", "decoder.block.0"]
    for stack in ("encoder", "decoder"):
        counts = [neurons_on(model, [one])[f"{stack}.block.0"] for one in examples]  # without any padding
        lengths = [len(one.prompt_ids if stack == "encoder" else one.answer_ids) for one in examples]
        assert found[f"{stack}.block.0"] == pytest.approx(np.average(counts, weights=lengths), abs=1e-6)
    model.encoder.block[0].layer[-1].DenseReluDense.wi.weight.data.zero_()
    assert neurons_on(model, examples)["encoder.block.0"] == 0


def test_the_project_is_ours_with_another_base(monkeypatch, tmp_path):
    monkeypatch.setattr(project, "MODEL", tmp_path / "t5")
    params = project.params()
    assert params.tasks == project.TASKS and set(params.recipes) == {"q8", "up", "sp", "m", "q8_up_m"}
    assert "movies" not in params.data.sets and set(project.MIXED) <= set(params.data.sets)
    assert params.compressions["m"] == [{"moefy": project.EXPERTS}]
    assert params.compressions["q8_up_m"][1:] == [project.PRUNE, project.INT8]


def test_losses_are_paired_with_the_teacher():
    def stored(right):
        bits = np.packbits([1] * right + [0] * (100 - right))
        return {
            "items": 100,
            "hits": base64.b64encode(bits.tobytes()).decode(),
            "bytes_on_disk": 2e7,
            "adapter_bytes": 1,
        }

    run = {
        "": {"llm_lora": stored(80), "llm": stored(60)},
        "m": {"clm_inherited": stored(79), "clm_calora": stored(81)},
    }
    found = Results({"runs": {"0": {task: run for task in project.TASKS}}, "sizes": {"m": {}}}, tuple(project.TASKS))
    rows = {(row[0], row[1]): row for row in report.lost_table(found).rows}
    lost = rows["m", "+ inherited LoRA"]
    assert lost[3:-2] == ["0.790"] * 4 and lost[-1].startswith("-0.010 [")
    assert rows["m", "+ CA-LoRA"][-1].startswith("+0.010 [") and rows["uncompressed", "LLM + LoRA (teacher)"][-1] == ""
    assert "| uncompressed | LLM |" in report.lost_table(found).grid()


def test_the_page_has_a_place_for_the_table():
    page = report.PAGE.read_text(encoding="utf-8")
    assert all(page.count(f"<!-- {end}: recipes of benchmarks.t5 -->") == 1 for end in ("start", "end"))
