"""What is asked of a model: which layers a word means, which form they are in, and whether calora knows the model at all."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

import calora
import calora.plugin  # from_pretrained then knows our format
from calora.adapters.foreign import import_lora
from calora.adapters.lora import Adapter, attach_adapter, check_targets, lora_config, set_active
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.distillation.distill import Pool, distill, finetune
from calora.distillation.loss import Weights
from calora.distillation.targets import Targets, write_targets
from calora.distillation.training import Schedule
from calora.errors import CaloraError
from calora.evaluation.predict import predict
from calora.inheritance.inherit import Bypass, inherit
from calora.models.anatomy import linear_layers, named
from calora.models.families import Encoder, family_of
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, Task, encode_all
from calora.models.uniform import conv1d_layers
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows
from tests.test_families import make

TEXTS = [Example([3, 5, 9, 12, 7]), Example([4, 6, 8, 13, 2])]
SCHEDULE = Schedule(steps=2, lr=0.05, warmup=0, clip=1.0, eval_every=2, checkpoint_seconds=60)
UP = [{"prune": {"score": "magnitude", "pattern": "2:4"}}]

QKVO, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
WORDS = {  # family -> ends of names of attention, of feed-forward, of what it reads with, of queries and keys
    "Llama, SmolLM": (QKVO, MLP, MLP[:2], QKVO[:2]),
    "Gemma-3": (QKVO, MLP, MLP[:2], QKVO[:2]),
    "Phi": (["q_proj", "k_proj", "v_proj", "dense"], ["fc1", "fc2"], ["fc1"], QKVO[:2]),
    "Phi-3": (["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"], ["gate_up_proj"], ["qkv_proj"]),
    "GPT-NeoX": (["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"], ["dense_h_to_4h"], ["query_key_value"]),
    "OPT": (["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"], ["fc1"], QKVO[:2]),
    "BART": (["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"], ["fc1"], QKVO[:2]),
    "T5": (["q", "k", "v", "o"], ["wi", "wo"], ["wi"], ["q", "k"]),
    "mT5": (["q", "k", "v", "o"], ["wi_0", "wi_1", "wo"], ["wi_0", "wi_1"], ["q", "k"]),
    "GPT-2": (["c_attn", "attn.c_proj"], ["c_fc", "mlp.c_proj"], ["c_fc"], ["c_attn"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Family -> its tiny model, in fp32."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = load_model(make(name, tmp_path_factory.mktemp("base")), torch.float32)
        return made[name]

    return model


@pytest.mark.parametrize("name", WORDS)
def test_words_mean_the_same_layers_in_every_family(opened, name):
    model, (attention, feed_forward, reads, query_and_key) = opened(name), WORDS[name]
    every = linear_layers(model)
    for words, ends in ((["attention"], attention), (["feed_forward"], feed_forward), (["feed_forward_in"], reads)):
        assert sorted(named(model, words)) == sorted(ends)
    assert sorted(named(model, ["query", "key"])) == sorted(query_and_key)
    assert check_targets(model, ["all-linear"], 1).keys() == every.keys()
    both = [check_targets(model, [word], 1).keys() for word in ("attention", "feed_forward")]
    assert both[0] | both[1] == every.keys() and not both[0] & both[1]
    assert named(model, ["fc1", "any"]) == ["fc1", "any"]  # names stay; whoever uses them looks whether they are there
    crossed = {layer for layer in both[0] if "EncDecAttention" in layer or "encoder_attn" in layer}
    assert len(crossed) == (8 if model.config.is_encoder_decoder else 0)


def test_a_word_for_layers_whose_short_names_are_others_too_becomes_full_names(opened):
    model = opened("BERT, MiniLM")
    ends = named(model, ["feed_forward"])
    assert ends[0] == "intermediate.dense" and sorted(ends[1:]) == [
        f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)
    ]
    assert named(model, ["attention"]) == ["query", "key", "value", "attention.output.dense"]
    assert named(model, ["all-linear"]) == ["query", "key", "value", "output.dense", "intermediate.dense"]  # no pooler


def test_an_unknown_layer_is_told_by_what_to_set():
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "lru_width": 32}
    model = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(**sizes, num_attention_heads=4, block_types=["recurrent"])
    )
    with pytest.raises(
        CaloraError, match=r"the word 'query', found none that calora knows .*name them: down_proj.*linear_x"
    ):
        check_targets(model, ["query"], 1)
    assert len(check_targets(model, ["all-linear"], 1)) == len(linear_layers(model)) > 3


SMALL = {"vocab_size": 24, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
SMALL |= {f"{end}_{size}": n for end in ("encoder", "decoder") for size, n in (("attention_heads", 4), ("ffn_dim", 32))}
BERT = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), "found another head. Fix: set `architectures`"),
        (lambda: transformers.BartForSequenceClassification(transformers.BartConfig(**SMALL)), "found another head"),
        (
            lambda: transformers.CLIPModel(transformers.CLIPConfig(
                text_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4},
                vision_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4},
            )),
            "found several models, or other inputs. Fix: use a base that is one text model",
        ),
    ],
)  # fmt: skip
def test_a_model_of_another_kind_is_refused_before_any_work(model, told, monkeypatch):
    monkeypatch.setattr("calora.compression.walk._record", lambda *_: pytest.fail("work began"))
    with pytest.raises(CaloraError, match=told):
        compress(model(), UP, Calibration(TEXTS))


def test_conv1d_layers_become_linear_ones_that_compute_the_same(tmp_path):
    folder = make("GPT-2", tmp_path)
    plain = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder, torch.float32)
    assert len(conv1d_layers(plain)) == len(linear_layers(ours)) == 8 and not conv1d_layers(ours)
    ids = torch.tensor([[3, 5, 9, 12]])
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_a_lora_on_conv1d_layers_is_taken_as_peft_computes_it(tmp_path, fan_in_fan_out):
    folder = make("GPT-2", tmp_path / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn", "mlp.c_proj"],
        init_lora_weights=False,
        fan_in_fan_out=fan_in_fan_out,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        theirs = get_peft_model(
            transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32), config
        ).eval()
    theirs.save_pretrained(tmp_path / "lora")
    ours = load_model(folder, torch.float32)
    attach_adapter(ours, import_lora(tmp_path / "lora", ours), "own")
    set_active(ours, "own")
    ids = torch.tensor([[3, 5, 9, 12]])
    torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["2:4", "nf4"])
@pytest.mark.parametrize("name", ["T5", "T5 1.1, Flan", "mT5"])
def test_the_feed_forward_of_t5_computes_in_the_dtype_of_its_input(tmp_path, name, format):
    """transformers casts what `wo` reads to the dtype of its weight, and codes and kept values are stored as bf16."""
    model = load_model(make(name, tmp_path / "base"), torch.bfloat16)
    step = UP if format == "2:4" else [{"quantize": {"format": "nf4"}}]
    seen = []
    layers = [layer for key, layer in linear_layers(model).items() if key.endswith(".wo")]
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype)) for layer in layers]
    report = compress(model, step, Calibration(TEXTS), torch.float32)
    for hook in hooks:
        hook.remove()
    save(model, report, tmp_path / "out", tmp_path / "base")
    inputs = {"input_ids": TEXTS[0].prompt_ids, "decoder_input_ids": [0, 4, 6]}
    inputs = {key: torch.tensor([ids]) for key, ids in inputs.items()}
    packed, dense = (calora.load(tmp_path / "out", dense=dense, dtype=torch.float32) for dense in (False, True))
    for key, layer in linear_layers(packed).items():
        if key.endswith(".wo"):
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    torch.testing.assert_close(packed(**inputs).logits, dense(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert set(seen) == {torch.float32}  # of transformers' own cast: bf16


def test_the_feed_forward_of_t5_is_transformers_own(tmp_path):
    for name in ("T5", "mT5"):
        folder = make(name, tmp_path / name)
        ours = load_model(folder, torch.float32)
        plain = getattr(transformers, ours.config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
        inputs = {key: torch.tensor([[3, 5, 9]]) for key in ("input_ids", "decoder_input_ids")}
        torch.testing.assert_close(ours(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def classifier(tmp_path):
    """(folder, model, tokenizer, examples)."""
    folder = make_model("classifier", tmp_path / "classifier", torch.float32)
    tokenizer = load_tokenizer(folder)
    return folder, load_model(folder, torch.float32), tokenizer, encode_all(TASK, tokenizer, toy_rows(8, 1))


def padded(examples):
    width = max(len(e.prompt_ids) for e in examples)
    ids = torch.tensor([e.prompt_ids + [0] * (width - len(e.prompt_ids)) for e in examples])
    mask = torch.tensor([[1] * len(e.prompt_ids) + [0] * (width - len(e.prompt_ids)) for e in examples])
    return {"input_ids": ids, "attention_mask": mask}


def test_a_compressed_classifier_is_plain_transformers_own(classifier, tmp_path):
    """Labels, logits, targets and the distilled adapter of a compressed BERT, against transformers and PEFT."""
    folder, model, tokenizer, examples = classifier
    teacher_model = load_model(folder, torch.float32)
    counted = itertools.count().__next__
    teacher, _ = finetune(
        teacher_model, lora_config(2, 2, named(teacher_model, ["query", "key"])), examples, counted, batch_size=4,
        schedule=SCHEDULE, seed=0,
    )  # fmt: skip
    write_targets(tmp_path / "targets", teacher_model, TASK, tokenizer, examples, 3, 1, "targets")
    targets = Targets(tmp_path / "targets")
    stored = targets.read(range(8), torch.device("cpu"))
    with torch.no_grad():
        expected = teacher_model(**padded(examples), output_hidden_states=True)
    assert torch.equal(stored.token_ids, torch.tensor([[0, 1]] * 8)) and targets.stacks == ["encoder"]
    torch.testing.assert_close(stored.logits.float(), expected.logits, rtol=1e-2, atol=1e-3)  # kept in bf16
    states = expected.hidden_states[-1][padded(examples)["attention_mask"].bool()]
    torch.testing.assert_close(stored.hidden["encoder"].float(), states, rtol=1e-2, atol=1e-2)

    report = compress(model, [*UP, {"quantize": {"format": "int8"}}], Calibration(examples))
    save(model, report, tmp_path / "out", folder)
    dense, packed = calora.load(tmp_path / "out", dense=True), calora.load(tmp_path / "out")
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = plain(**padded(examples)).logits
        torch.testing.assert_close(packed(**padded(examples)).logits, theirs, rtol=1e-4, atol=1e-5)
    assert predict(packed, TASK, tokenizer, examples, 3).labels == theirs.argmax(-1).tolist()

    start, _ = inherit(
        dense, teacher, lora="fresh", bypass=Bypass(["all-linear"], 2, "gelu", "weighted_error"), calibration=examples,
        reference=load_model(folder, torch.float32),
    )  # fmt: skip
    weights = Weights(0.0, {"encoder": 2.0}, 3.0, 1.0)
    attach_adapter(dense, start, "look")
    set_active(dense, "look")
    with torch.no_grad():
        out = dense(**padded(examples), output_hidden_states=True)
    target = stored.logits.float()
    kl = F.kl_div(out.logits.log_softmax(-1), target.softmax(-1), reduction="batchmean")
    distance = F.mse_loss(
        out.hidden_states[-1][padded(examples)["attention_mask"].bool()], stored.hidden["encoder"].float()
    )
    fresh = calora.load(tmp_path / "out", dense=True)
    made, history = distill(
        fresh,
        start,
        Pool(examples, targets),
        None,
        counted,
        weights,
        batch_size=8,
        schedule=replace(SCHEDULE, lr=2e-3),
        seed=0,
    )
    assert history.losses[0]["loss"] == pytest.approx(float(2 * distance + 3 * kl), rel=1e-3)
    assert history.losses[-1]["loss"] < history.losses[0]["loss"]
    assert made.lora_layers and made.bypass_layers


def test_a_classifier_takes_tasks_with_its_labels_alone(classifier):
    _, model, tokenizer, examples = classifier
    three = Task("three", TASK.prompt, ("positive", "negative", "dull"), 32, 4)
    with pytest.raises(
        CaloraError, match="task three, on a classifier: expected 2 answers, as its head has, found 3 answers"
    ):
        predict(model, three, tokenizer, examples, 4)
    free = Task("free", TASK.prompt, (), 32, 4)
    with pytest.raises(CaloraError, match="expected 2 answers, as its head has, found no answers"):
        predict(model, free, tokenizer, examples, 4)
    taylor = [{"shrink": {"neurons": 0.5, "importance": "taylor", "compensate": True}}]
    with pytest.raises(CaloraError, match=r"shrink\.importance \(taylor\): expected a language model"):
        compress(model, taylor, Calibration(examples))


def test_a_bare_encoder_is_compressed_and_distilled_by_its_hidden_states(tmp_path):
    """As all-MiniLM is published: hidden states alone, for sentence embeddings."""
    folder = make_model("bert", tmp_path / "minilm", torch.float32)
    base, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    examples = [Example(e.prompt_ids) for e in encode_all(TASK, tokenizer, toy_rows(8, 1))]
    assert isinstance(family_of(base), Encoder)
    model = load_model(folder, torch.float32)
    report = compress(model, [*UP, {"quantize": {"format": "int8"}}], Calibration(examples))
    save(model, report, tmp_path / "out", folder)
    packed, dense = calora.load(tmp_path / "out"), calora.load(tmp_path / "out", dense=True)
    plain = transformers.BertModel.from_pretrained(tmp_path / "out", dtype=torch.float32)

    def states(one):
        with torch.no_grad():
            return one(**padded(examples)).last_hidden_state[padded(examples)["attention_mask"].bool()]

    torch.testing.assert_close(states(packed), states(plain), rtol=1e-4, atol=1e-5)
    free = Task("embed", "{text}", (), 32, 4)
    write_targets(tmp_path / "targets", base, free, tokenizer, examples, 4, 1, "targets")
    start, _ = inherit(dense, Adapter(None, {}), lora="none", bypass=Bypass(["all-linear"], 4, "gelu", "zero"))
    unlabelled = Pool(examples, Targets(tmp_path / "targets"))
    weights = Weights(0.0, {"encoder": 1.0}, 0.0, 0.0, 1.0, 1)
    before = float(F.mse_loss(states(dense), states(base)))
    _, history = distill(
        dense,
        start,
        None,
        unlabelled,
        itertools.count().__next__,
        weights,
        batch_size=8,
        schedule=replace(SCHEDULE, lr=2e-3),
        seed=0,
    )
    assert history.losses[0]["hidden_encoder"] == pytest.approx(before, rel=0.1)  # targets are kept in bf16
    assert float(F.mse_loss(states(dense), states(base))) < before
    with pytest.raises(CaloraError, match="a model that writes text"):
        predict(packed, free, tokenizer, examples, 4)
    with pytest.raises(CaloraError, match=r"a model with a head.*AutoModelForSequenceClassification"):
        predict(packed, TASK, tokenizer, examples, 4)
    tuned = [
        *UP,
        {"recover": {"rank": 2, "fit": "after", "format": "int8", "tune": {"steps": 1, "lr": 0.1, "batch_size": 2}}},
    ]
    with pytest.raises(CaloraError, match=r"recover\.tune: expected a model with a head"):
        compress(base, tuned, Calibration(examples, tuning=examples))
