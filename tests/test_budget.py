"""A budget of bytes for a task's own bypass: it is kept, it mends more than one rank for all, and every part takes its ranks."""

import pytest
import torch
from peft import PeftModel

import calora
from calora.adapters.cards import plain_card
from calora.adapters.codes import HEADER, encode_recovery, stored_bytes
from calora.adapters.fold import fold
from calora.adapters.folder import RECOVERY, read_adapter, write_adapter
from calora.adapters.lora import Adapter, attach_adapter, check_targets, lora_config, set_active, take_adapter
from calora.common.tensors import write_tensors
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.distillation.distill import Pool, distill, trainable
from calora.distillation.loss import Weights
from calora.distillation.training import Checkpoint
from calora.errors import CaloraError
from calora.inheritance.fresh import equal_budget, fresh_adapter
from calora.inheritance.inherit import Bypass, inherit
from calora.inheritance.ranks import share_ranks
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import encode_all
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows
from tests.test_origin import EVERY
from tests.test_strangers import logits
from tests.test_training import SCHEDULE

KINDS = ("bf16", "int8", "int4")
PRUNE = {"prune": {"score": "magnitude", "pattern": "2:4"}}
TWO = {"format": "int2", "group": 32}
MIXED = {"quantize": {"format": "int4", "group": 32, "layers": {"gate_proj": TWO, "up_proj": TWO}, "symmetric": False}}
SHRINK = {"shrink": {"importance": "activation", "compensate": True, "neurons": 0.5}}


class Toy:
    """A compressed base, what it was made of, and a teacher's LoRA."""

    def __init__(self, folder, recipe):
        self.base, self.folder = (
            make_model("llama", folder / "base", torch.float32, hidden=64, inner=128),
            folder / "out",
        )
        self.examples = encode_all(TASK, load_tokenizer(self.base), toy_rows(24, 1))
        model = load_model(self.base, torch.float32)
        save(model, compress(model, recipe, Calibration(self.examples)), self.folder, self.base)
        self.model = calora.load(self.folder)
        meta = {"task": TASK.to_json(), "compressed_fingerprint": self.model.calora_fingerprint, "origin": "here"}
        self.teacher = fresh_adapter(
            load_model(self.base, torch.float32), lora_config(4, 2, ["q_proj", "k_proj"]), meta
        )
        generator = torch.Generator().manual_seed(0)
        self.teacher.lora = {
            key: torch.randn(t.shape, generator=generator) * 0.3 for key, t in self.teacher.lora.items()
        }

    @property
    def data(self):
        return {
            "reference": load_model(self.base, torch.float32), "calibration": self.examples,
            "origin": self.model.calora_origin,
        }  # fmt: skip

    def ranks(self, megabytes, format, activation="gelu", targets=EVERY):
        return share_ranks(
            self.model, self.teacher, targets, activation, budget=megabytes, format=format, **self.data
        )  # fmt: skip

    def adapter(self, rank, activation="gelu"):
        bypass = Bypass(EVERY, rank, activation, "weighted_error")
        return inherit(self.model, self.teacher, bypass=bypass, **self.data)

    def written(self, adapter, folder, kind):
        """The bytes of its bypass on disk."""
        write_adapter(folder, adapter, "base", plain_card(TASK, "base"), torch.bfloat16, None, kind)
        return (folder / RECOVERY).stat().st_size


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("budget"), [MIXED])


@pytest.fixture(scope="module")
def spread(toy_base):
    """An adapter whose ranks differ, with layers that have none."""
    ranks = toy_base.ranks(0.02, "bf16", "identity")
    every = check_targets(toy_base.model, EVERY, 1)
    assert ranks.keys() < every.keys() and len(set(ranks.values())) > 1
    return toy_base.adapter(ranks, "identity")[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 32, 48), (5, 3, 7), (9, 1, 4), (6, 33, 11), (576, 64, 1536), (4, 80, 3)])
def test_what_a_bypass_costs_is_what_it_takes_on_disk(tmp_path, kind, shape):
    inputs, rank, outputs = shape
    name = "model.layers.10.self_attn.q_proj"
    tensors = {f"{name}.down": torch.randn(inputs, rank), f"{name}.up": torch.randn(rank, outputs)}
    stored = encode_recovery(tensors, kind, torch.bfloat16)
    write_tensors(tmp_path / "one.safetensors", stored)
    said, found = (
        stored_bytes(name, inputs, outputs, rank, kind) + HEADER,
        (tmp_path / "one.safetensors").stat().st_size,
    )
    assert found <= said < found + 150  # the header is told to within some digits
    assert stored_bytes(name, inputs, outputs, 0, kind) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_a_budget_is_kept_and_mends_more_than_one_rank_of_the_same_bytes(toy_base, tmp_path, kind, activation):
    even, told = toy_base.adapter(16, activation)
    budget = toy_base.written(even, tmp_path / "even", kind)
    ranks = toy_base.ranks(budget / 1e6, kind, activation)
    shared, tells = toy_base.adapter(ranks, activation)
    assert len(set(ranks.values())) > 1 and (activation == "identity" or not any(rank % 2 for rank in ranks.values()))
    assert 0.95 * budget < toy_base.written(shared, tmp_path / "shared", kind) <= budget
    assert told.errors.keys() == tells.errors.keys() == check_targets(toy_base.model, EVERY, 1).keys()
    lost = [sum(after**2 for _, after in report.errors.values()) for report in (told, tells)]
    assert lost[1] < 0.5 * lost[0]
    assert all(tells.errors[name][0] == tells.errors[name][1] for name in tells.errors.keys() - ranks.keys())


def test_a_budget_is_shared_out_alike_each_time(toy_base):
    assert toy_base.ranks(0.03, "int4") == toy_base.ranks(0.03, "int4")
    small, large = toy_base.ranks(0.01, "int8"), toy_base.ranks(0.03, "int8")
    assert sum(small.values()) < sum(large.values()) and small.keys() <= large.keys()


def test_more_than_enough_is_every_direction_that_mends_anything(toy_base):
    ranks = toy_base.ranks(10, "bf16", "identity")
    _, report = toy_base.adapter(ranks, "identity")
    assert all(after < 1e-3 * before for before, after in report.errors.values())
    whole = load_model(toy_base.base, torch.float32)
    data = {"reference": load_model(toy_base.base, torch.float32), "calibration": toy_base.examples}
    assert share_ranks(whole, None, EVERY, "gelu", budget=1, format="int8", **data) == {}  # nothing was lost


def test_cut_layers_have_ranks_of_their_own_width(tmp_path):
    toy = Toy(tmp_path, [SHRINK, PRUNE])
    ranks = toy.ranks(10, "int8", "identity")
    adapter, report = toy.adapter(ranks, "identity")
    assert all(after < 1e-3 * before for before, after in report.errors.values())
    toy.written(adapter, tmp_path / "toy", "int8")
    toy.model.load_adapter(tmp_path / "toy", "toy")


@pytest.mark.parametrize(
    ("budget", "format", "activation", "targets", "said"),
    [
        (1e-5, "int8", "gelu", EVERY, r"bypass\.budget: expected 0\.000\d+ MB or more, for one direction, found 1e-05"),
        (0, "int8", "gelu", EVERY, r"bypass\.budget: expected MB above 0"),
        (float("nan"), "int8", "gelu", EVERY, r"bypass\.budget"),
        (1, "int2", "gelu", EVERY, "format of the bypass"),
        (1, "int8", "tanh", EVERY, r"bypass\.activation"),
        (1, "int8", "gelu", ["c_attn"], "targets"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(toy_base, budget, format, activation, targets, said):
    with pytest.raises(CaloraError, match=said):
        toy_base.ranks(budget, format, activation, targets)


def test_a_budget_asks_for_what_it_looks_at(toy_base):
    with pytest.raises(CaloraError, match="reference: expected the uncompressed model, for a budget"):
        share_ranks(toy_base.model, None, EVERY, "gelu", budget=1, format="int8", reference=None, calibration=[])


def test_ranks_by_layer_are_checked(toy_base):
    for ranks, said in (
        ({"model.layers.0.self_attn.q_proj": 65}, "rank: expected 1 to 64, the width of .*q_proj, found 65"),
        ({"model.layers.0.self_attn.q_proj": 0}, "rank: expected 1 to 64"),
        ({"model.layers.9.self_attn.q_proj": 4}, "layers that the targets name, found model.layers.9"),
    ):
        with pytest.raises(CaloraError, match=said):
            inherit(toy_base.model, toy_base.teacher, bypass=Bypass(EVERY, ranks, "gelu", "zero"))
    with pytest.raises(CaloraError, match="even"):
        Bypass(EVERY, {"a": 4, "b": 3}, "gelu", "weighted_error")


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_differ_go_to_disk_and_back(toy_base, spread, tmp_path, kind):
    toy_base.written(spread, tmp_path / "toy", kind)
    read, model = read_adapter(tmp_path / "toy"), calora.load(toy_base.folder, dense=True)
    assert {name: t.shape for name, t in read.recovery.items()} == {n: t.shape for n, t in spread.recovery.items()}
    before = logits(model)
    model.load_adapter(tmp_path / "toy", "toy")
    assert not torch.equal(logits(model), before) and model.answer(["a good film"])
    taken = take_adapter(model, read.config, read.meta, "toy")
    assert taken.recovery.keys() == read.recovery.keys()
    model.unload_adapter("toy")
    assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="calora"):
        base = calora.load(toy_base.folder, dense=True)
        theirs = PeftModel.from_pretrained(base, tmp_path / "toy", autocast_adapter_dtype=False)
    model.load_adapter(tmp_path / "toy", "toy")
    calora.recovery.bypass.activate(model, None)
    assert torch.equal(logits(theirs), logits(model))


def test_ranks_that_differ_fold_into_one_plain_lora(toy_base, spread, tmp_path):
    whole, plain = load_model(toy_base.base, torch.float32), load_model(toy_base.base, torch.float32)
    attach_adapter(whole, spread, "toy")
    set_active(whole, "toy")
    write_adapter(tmp_path / "folded", fold(spread), "base", "", torch.float32)
    plain = PeftModel.from_pretrained(plain, tmp_path / "folded")
    torch.testing.assert_close(logits(plain), logits(whole), rtol=1e-4, atol=1e-4)  # fp32 sums in another order


def test_an_equal_budget_follows_the_ranks(toy_base, spread):
    model = calora.load(toy_base.folder)
    config = equal_budget(spread, linear_layers(model))
    fresh = fresh_adapter(model, config)
    sizes = dict.fromkeys({*spread.lora_layers, *spread.bypass_layers}, 0)
    for key, tensor in [*spread.lora.items(), *spread.recovery.items()]:
        sizes[key.partition(".lora_")[0] if ".lora_" in key else key.rpartition(".")[0]] += tensor.numel()
    found = dict.fromkeys(fresh.lora_layers, 0)
    for key, tensor in fresh.lora.items():
        found[key.partition(".lora_")[0]] += tensor.numel()
    assert found == sizes and fresh.parameters == spread.parameters
    attach_adapter(model, fresh, "fresh")


def test_a_layer_whose_factors_differ_in_rank_is_refused(toy_base, spread):
    model, name = calora.load(toy_base.folder), min(spread.bypass_layers)
    wrong = {**spread.recovery, f"{name}.up": torch.ones(1, 64)}
    with pytest.raises(CaloraError, match=f"bypass of {name}: expected down"):
        attach_adapter(model, Adapter(spread.config, spread.lora, wrong, spread.meta), "toy")


def test_a_killed_training_of_such_an_adapter_resumes_to_the_same_bits(toy_base, spread, tmp_path):
    def trained(checkpoint=None, stop_at=None):
        model, seen = calora.load(toy_base.folder, dense=True), []

        def score():
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(1)
            return float(sum(parameter.abs().sum() for parameter in trainable(model)))

        labelled = Pool(toy_base.examples)
        return distill(
            model, spread, labelled, None, score, Weights(), batch_size=4, schedule=SCHEDULE, seed=0, checkpoint=checkpoint
        )[0]  # fmt: skip

    saved = Checkpoint(tmp_path / "c", "key")
    with pytest.raises(KeyboardInterrupt):
        trained(saved, stop_at=2)
    resumed, whole = trained(saved), trained()
    assert whole.recovery.keys() == spread.recovery.keys()
    for name, tensor in whole.recovery.items():
        assert torch.equal(resumed.recovery[name], tensor) and tensor.shape == spread.recovery[name].shape
