"""The short training of the base's recovery: it brings the model nearer to the uncompressed one, and reads no label."""

import itertools
import math
import shutil
from dataclasses import replace

import pytest
import torch

import stages.base
import stages.compress
from calora.common.files import read_json
from calora.compressed import load
from calora.compression import check_recipe, compress, tune
from calora.compression.tune import Tuning
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.layers.layout import dense_weight
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model
from calora.models.tasks import Example
from calora.recovery.shared import shared_of
from calora.saving import save
from stages.config import load_params
from tests.conftest import change, make_model, make_project
from tests.test_stages import calibration_texts

PRUNE = {"prune": {"score": "magnitude", "pattern": "2:4"}}
INT8 = {"quantize": {"format": "int8", "embeddings": "int8"}}
INT2 = {"quantize": {"format": "int2", "group": 32, "embeddings": "int8"}}
TUNE = {"steps": 30, "lr": 0.01, "batch_size": 8}


def recover(format="int8", tune=TUNE, **more):
    return {"recover": {"rank": 4, "fit": "after", "format": format, "tune": tune, **more}}


def strong(tmp_path, kind="llama", dtype=torch.float32):
    """A model with an opinion: fresh weights give nearly equal logits."""
    folder = make_model(kind, tmp_path / "base", dtype, hidden=32, inner=64)
    model = load_model(folder, dtype)
    for tensor in model.parameters():
        if tensor.ndim == 2:
            tensor.data.mul_(4 if kind == "llama" else 2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return strong(tmp_path)


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [Example(torch.randint(3, 19, (3 + i % 7,), generator=generator).tolist()) for i in range(count)]


def made(base, recipe, learnt=None, checkpoint=None, dtype=torch.float32):
    model = load_model(base, dtype)
    return model, compress(model, recipe, Calibration(texts(16, 0), checkpoint, learnt or texts(64, 1)))


def distance(base, model, dtype=torch.float32):
    """Mean KL of the next token, over texts that were neither learnt from nor measured on, by plain transformers calls."""
    whole, total, positions = load_model(base, dtype), 0.0, 0
    with torch.no_grad():
        for text in texts(16, 2):
            ids = torch.tensor([text.prompt_ids])
            p, q = (each(ids).logits.float().log_softmax(-1) for each in (whole, model))
            total, positions = total + float((p.exp() * (p - q)).sum()), positions + ids.numel()
    return total / positions


@pytest.mark.parametrize("format", ["int8", "native"])
@pytest.mark.parametrize("steps", [[PRUNE, INT8], [INT2]])
def test_it_comes_nearer_to_the_uncompressed_model(base, steps, format):
    plain, _ = made(base, [*steps, recover(format, None)])
    tuned, report = made(base, [*steps, recover(format)])
    before, after = report.tuned["divergence"]
    assert after < 0.8 * before
    assert distance(base, tuned) < 0.8 * distance(base, plain)
    assert report.tuned["texts"] == 64 and report.seconds["tune"] >= 0


def test_the_report_has_the_divergence_of_stored_values(tmp_path, base):
    model, report = made(base, [PRUNE, INT8, recover()])
    save(model, report, tmp_path / "out", base)
    whole, (_, held) = load_model(base, torch.float32), tune.divided(texts(64, 1))
    for loaded in (load(tmp_path / "out"), load(tmp_path / "out", dense=True)):
        total = 0.0
        for text in held:
            ids = torch.tensor([text.prompt_ids])
            p, q = (each(ids).logits[0].detach().log_softmax(-1) for each in (whole, loaded))
            total += float((p.exp() * (p - q)).sum())
        assert total / sum(len(text.prompt_ids) for text in held) == pytest.approx(
            report.tuned["divergence"][1], rel=1e-3
        )


def test_only_the_factors_change_and_inputs_still_share_one(base):
    (plain, one), (tuned, other) = made(base, [PRUNE, INT8, recover(tune=None)]), made(base, [PRUNE, INT8, recover()])
    had, has = plain.state_dict(), tuned.state_dict()
    assert had.keys() == has.keys()
    changed = {name for name in had if not torch.equal(had[name], has[name])}
    assert changed and all(".base_recovery." in name for name in changed)
    assert all(had[name].dtype == has[name].dtype and not has[name].requires_grad for name in had)
    assert not any(parameter.grad is not None for parameter in tuned.parameters())
    sizes = [{name: entry["bytes_after"] for name, entry in report.layers.items()} for report in (one, other)]
    assert sizes[0] == sizes[1]


def test_it_reads_neither_labels_nor_answers(base):
    labelled = [replace(text, answer_ids=[5], label=i % 2, references=("x",)) for i, text in enumerate(texts(64, 1))]
    (first, _), (second, _) = made(base, [PRUNE, recover()]), made(base, [PRUNE, recover()], labelled)
    assert same(first, second)


def same(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_killed_it_starts_anew_and_gives_the_same_bits(tmp_path, base, monkeypatch):
    recipe = [PRUNE, INT8, recover()]
    whole, report = made(base, recipe)
    calls, loss = itertools.count(), tune._loss

    def killed(*args):
        if next(calls) == 12:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            made(base, recipe, checkpoint=tmp_path / "blocks")
    again, resumed = made(base, recipe, checkpoint=tmp_path / "blocks")
    assert same(whole, again) and resumed.tuned == report.tuned


def test_a_tuning_that_makes_it_worse_is_not_kept(base):
    plain, _ = made(base, [PRUNE, INT8, recover(tune=None)])
    spoilt, report = made(base, [PRUNE, INT8, recover(tune=TUNE | {"lr": 0.9, "steps": 5})])
    before, after = report.tuned["divergence"]
    assert after > before and same(plain, spoilt)


def test_bf16_weights_are_tuned_in_the_compute_dtype(tmp_path):
    base = strong(tmp_path, dtype=torch.bfloat16)
    for compute in (torch.bfloat16, torch.float32):
        model = load_model(base, torch.bfloat16)
        report = compress(model, [INT2, recover("native")], Calibration(texts(16, 0), None, texts(64, 1)), compute)
        before, after = report.tuned["divergence"]
        assert after < 0.9 * before
        recovery = shared_of(linear_layers(model)["model.layers.0.mlp.up_proj"])
        assert recovery.down.dtype == recovery.up.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "step",
    [
        {"shrink": {"importance": "activation", "compensate": True, "neurons": 0.5, "layers": 0.5}},
        {"moefy": {"experts": 8, "active": 0.5, "clustering": "coactivation", "router": "analytic"}},
    ],
    ids=["shrink", "moefy"],
)
def test_a_cut_model_is_tuned_to_the_whole_one(base, step):
    _, report = made(base, [step, INT2, recover()])
    before, after = report.tuned["divergence"]
    assert after < 0.9 * before


def test_an_encoder_decoder_is_tuned(tmp_path):
    base = strong(tmp_path, "t5")
    _, report = made(base, [PRUNE, recover()])
    before, after = report.tuned["divergence"]
    assert after < 0.9 * before


def test_few_tokens_have_a_gradient_in_int8(tmp_path):
    """Torch's int8 kernel, which takes up to 16 rows in bf16, has none."""
    base = strong(tmp_path, dtype=torch.bfloat16)
    model, _ = made(base, [INT8, recover(tune=None)], dtype=torch.bfloat16)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    expected = dense_weight(layer, torch.float32).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.05)  # bf16 has 8 bits


def test_the_rate_rises_and_falls():
    rates = [Tuning(100, 1e-3, 16).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[99] == pytest.approx(1 / 90) and rates[9:] == sorted(rates[9:], reverse=True)
    assert all(0 < Tuning(steps, 1e-3, 1).rate(step) <= 1 for steps in (1, 2, 3) for step in range(steps))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (5, "recover.tune: expected steps, lr and batch_size"),
        ({"steps": 10, "lr": 0.01}, "recover.tune: expected option batch_size"),
        (TUNE | {"rate": 1}, "recover.tune: expected options among"),
        (TUNE | {"steps": 0}, "recover.tune.steps"),
        (TUNE | {"lr": 0}, "recover.tune.lr"),
        (TUNE | {"lr": math.nan}, "recover.tune.lr"),
        (TUNE | {"lr": "1e-3"}, "recover.tune.lr"),
        (TUNE | {"batch_size": 1.5}, "recover.tune.batch_size"),
    ],
)
def test_a_wrong_option_is_refused(options, said):
    with pytest.raises(CaloraError, match=said.replace(".", r"\.")):
        check_recipe([PRUNE, recover(tune=options)])


def test_it_is_refused_without_texts_before_any_work(base):
    model = load_model(base, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CaloraError, match=r"recover\.tune: expected 2 texts or more"):
        compress(model, [PRUNE, recover()], Calibration(texts(16, 0)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("count, held", [(2, 1), (9, 1), (10, 1), (19, 2), (64, 6), (1600, 64), (1605, 62)])
def test_texts_are_held_back_from_all_of_them_and_never_learnt_from(count, held):
    learnt, kept = tune.divided(range(count))
    assert len(kept) == held and sorted([*learnt, *kept]) == list(range(count))
    assert max(b - a for a, b in itertools.pairwise([0, *kept, count])) <= max(10, 2 * count / held)


def test_a_budget_for_nothing_is_refused(base):
    tiny = {"recover": {"budget": 1e-9, "fit": "after", "format": "int8", "tune": TUNE}}
    with pytest.raises(CaloraError, match="a recovery of rank 1 or more"):
        made(base, [PRUNE, tiny])


def test_an_infinite_loss_is_an_error(base, monkeypatch):
    monkeypatch.setattr(tune, "_loss", lambda *_: torch.tensor(math.inf))
    with pytest.raises(CaloraError, match=r"recover\.tune: expected a finite loss"):
        made(base, [PRUNE, recover()])


def test_the_stage_gives_it_the_tuning_texts(tmp_path, monkeypatch):
    folder = make_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    change(folder, "compress.q8_up", [PRUNE, INT8, recover(tune=TUNE | {"steps": 2})])
    stages.base.main(load_params())
    calibration_texts(folder)
    with pytest.raises(CaloraError, match=r"tuning\.jsonl"):
        stages.compress.main(load_params(), "q8_up")
    shutil.copy(folder / "own/test.jsonl", folder / "data/calibration/tuning.jsonl")
    stages.compress.main(load_params(), "q8_up")
    told = read_json(folder / "models/compressed/q8_up/compression.json", "")
    assert told["tuned"]["texts"] == 16 and len(told["tuned"]["divergence"]) == 2
    assert read_json(folder / "results/compress/q8_up.json", "")["seconds"].keys() >= {"tune"}
