"""Every recipe on every kind of model through every stage, or refused before any work by its true reason.

Compressed, written, loaded packed and dense; a trained LoRA inherited with a bypass, distilled from stored targets, put on the
packed model, scored. docs/families.md is this table: `python -m tests.test_families` writes it.
"""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import calora.plugin  # noqa: F401  # from_pretrained then knows our format
from calora.adapters.folder import write_adapter
from calora.adapters.lora import Adapter, lora_config
from calora.compressed import load
from calora.compression import compress, moefy, walk
from calora.compression.walk import Calibration
from calora.distillation.distill import Pool, distill, finetune
from calora.distillation.loss import Weights
from calora.distillation.targets import Targets, write_targets
from calora.distillation.training import Schedule
from calora.errors import CaloraError
from calora.inheritance.inherit import Bypass, inherit
from calora.models.anatomy import linear_layers, named
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Example, encode_all
from calora.saving import save
from tests.conftest import ROOT, TASK, make_tokenizer, toy_rows

PAGE = ROOT / "docs/families.md"
SCHEDULE = Schedule(steps=1, lr=0.05, warmup=0, clip=1.0, eval_every=1, checkpoint_seconds=60)
TEXTS = [Example([3 + (7 * i + j) % 20 for j in range(4 + 2 * (i % 2))]) for i in range(6)]
COMMON = {"vocab_size": 24, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LLAMA = COMMON | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 24,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "Llama, SmolLM": ("Llama", LLAMA),
    "Mistral": ("Mistral", LLAMA),
    "Qwen2, 2.5": ("Qwen2", LLAMA),
    "Qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "Gemma": ("Gemma", LLAMA | {"head_dim": 8}),
    "Gemma-2": ("Gemma2", LLAMA | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4}),
    "Gemma-3": ("Gemma3Text", LLAMA | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "Granite": ("Granite", LLAMA | {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "Cohere": ("Cohere", LLAMA | {"logit_scale": 0.5}),
    "OLMo-2": ("Olmo2", LLAMA),
    "Phi": ("Phi", LLAMA),
    "Phi-3": ("Phi3", LLAMA),
    "GPT-NeoX": ("GPTNeoX", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
    "OPT": ("OPT", COMMON | {
        "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }),
    "BART": ("Bart", COMMON | {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32, "decoder_start_token_id": 1,
        "scale_embedding": True,
    }),
    "T5": ("T5", T5),
    "T5 1.1, Flan": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mT5": ("MT5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "BERT, MiniLM": ("Bert", LLAMA | {"num_labels": 2, "max_position_embeddings": 32, "initializer_range": 0.2}),
    "GPT-2": ("GPT2", {"vocab_size": 24, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 1}),
    "Mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2Moe", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3-MoE": ("Qwen3Moe", LLAMA | EXPERTS | {"head_dim": 8}),
}  # fmt: skip
HEADS = {"GPT2": "LMHeadModel", "Bert": "ForSequenceClassification"}
ABOVE = """
# Which recipe works on which kind of model

Written by `python -m tests.test_families`; the test takes a tiny random model of each kind through every stage, for each recipe of
params.yaml and two steps that none of them has (`heads` and `layers` of `shrink`). *yes*: compressed, written and loaded back, packed and dense, it computes what it
computed in memory; a LoRA that was trained on the base is inherited with a bypass beside every linear layer, distilled from stored targets by the last
hidden states of each stack and the answers, written, put on the packed model, where it computes what it does on the dense one, and answers.
A number: refused before any work, for the reason below. The recipes have the steps and options of params.yaml, but for sizes.
"""
BELOW = """
## Names of layers

Wherever params.yaml or a call names layers (`targets` of the teacher, of a bypass and of a fresh LoRA; `layers` of `quantize`), a word may stand for them:

| word | layers |
| --- | --- |
| `all-linear` | all linear layers of the blocks, cross-attention too; not the head, not the embeddings |
| `attention` | those of every attention, cross-attention too |
| `query`, `key`, `value` | of every attention; one layer where the three are fused (Phi-3, GPT-NeoX, GPT-2) |
| `feed_forward` | of the feed-forward |
| `feed_forward_in` | those that make its neurons: gate and up, `wi`, `fc1`, `c_fc` |

The model is asked, in `calora/models/anatomy.py` alone; adapters on disk hold names of layers as PEFT writes them. A name is an end of a full name, as for PEFT: `c_proj` is both of GPT-2's, `mlp.c_proj` one of
them. A kind of model that is not in the table works as far as its layers are linear ones in blocks of transformers: where a word finds nothing, the message has the names to write instead.

## Encoder-decoder models

The prompt goes to the encoder, the answer to the decoder. Compression is calibrated with the first half of each text in the encoder and the second in the decoder, so that cross-attention and decoder see real ones. Targets
hold the last hidden states of both stacks; `alpha_encoder` and `alpha` in a method's loss weigh them (the paper's for T5: 0.005 and 0.05). The paper's LoRA is `targets: [query, key]`.

transformers casts what the last layer of T5's feed-forward reads to the dtype of that layer's weight. Where kept values or nf4 codes are stored as bf16 and the model computes in fp32, that rounded the activations
(a relative error of 1e-3 in the logits of the tests' random T5); calora's T5 computes in the dtype of its input, packed as dense.

## GPT-2

Its layers are Conv1D, linear layers with transposed weights. They are opened as linear layers of the same names; what is stored for plain transformers (`shrink` alone) is Conv1D again. LoRAs that were trained with `fan_in_fan_out` are
taken as they are, and a teacher that is trained here has it in its adapter_config.json, so that PEFT puts it on the plain model without a warning.

## Encoders

A classifier, `...ForSequenceClassification` (an encoder like BERT; decoder-only ones too, untested), goes through the whole pipeline as the base. Its head belongs to the base and stays as it is: a task needs as many answers as the head has labels, in their
order, and is scored, not generated. LoRA, bypass and distillation are in the blocks; the weight of its hidden states is `alpha_encoder`. An encoder that was published without a head, as MiniLM, is given one first; a fresh one is random and
stays so, the LoRA learns to feed it:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained("own/classifier")
AutoTokenizer.from_pretrained(folder).save_pretrained("own/classifier")
```

Without a head (`BertModel`) it can be compressed, saved and loaded, and an adapter distilled by its hidden states alone (`Weights(0.0, {"encoder": 1.0}, 0.0, 0.0, 1.0, 1)`, unlabelled texts): a smaller sentence encoder. It answers no task,
so the pipeline refuses it as a base. `taylor` importance needs a language model, `tune` of a recovery a head. Adapters with a head of their own (`modules_to_save`) on a compressed encoder are not there yet: one compressed base serves tasks with the same labels.

## Mixtures of experts, and others

A model whose blocks hold less than 95 % of their weights in linear layers is refused. So are models composed of several (vision and text), masked language models and encoder-decoder classifiers.
Gemma-2 has no SDPA attention in transformers, and computes eagerly.
"""
SHRINK = {"importance": "activation", "compensate": True}
DEEP = ("q8_up", "layers")  # recipes that are tried on two blocks a stack; the others on one, to save time
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers")
WIDTH = 32  # of a group, and of the models


def small(value):
    """A recipe of params.yaml for tiny models: the same steps and options, but for sizes."""
    if isinstance(value, list):
        return [small(item) for item in value]
    if not isinstance(value, dict):
        return value
    sizes = {"group": WIDTH, "experts": 8, "shared": 2, "rank": 2, "steps": 1, "rounds": 1}
    return {key: sizes[key] if key in sizes else small(item) for key, item in value.items()}


READY = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["compress"]
RECIPES = {name: small(steps) for name, steps in READY.items() if name != "calibration"} | {
    "heads": [{"shrink": {**SHRINK, "heads": 0.5}}],
    "layers": [{"shrink": {**SHRINK, "layers": 0.5}}],
}
SEPARATE = ("OPT", "BART", "BERT, MiniLM")  # their blocks hold the layers of the feed-forward themselves
FUSED = ("Phi", "Phi-3", "GPT-NeoX", "GPT-2", *SEPARATE)
EXPERT = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE")
T5S = ("T5", "T5 1.1, Flan", "mT5")
REFUSED = [  # families, recipes, what the message says, what the page says
    (EXPERT, RECIPES, "the others are in mlp.experts", "most of its weights are in experts (3-D tensors), not in linear layers"),
    (("OLMo-2",), ["heads"], "q_norm.weight, which spans all heads", "its norm of queries and keys spans all heads"),
    (FUSED, ["heads"], "no layers called q_proj", "its attention has other layers than q_proj, k_proj, v_proj, o_proj"),
    (T5S, ["heads"], "a position bias by head", "its blocks share one position bias by head"),
    (("Phi-3",), ["sp", "m", "q8_up_m"], "feed-forward of model.layers.0", "gate and up are one layer (gate_up_proj)"),
    (SEPARATE, ["m", "q8_up_m"], "holds itself", "its blocks hold the layers of the feed-forward themselves"),
]  # fmt: skip
CASES = [(name, recipe) for name in FAMILIES for recipe in RECIPES]


def refused(name: str, recipe: str) -> tuple[str, str]:
    """What the message and the page say of why a recipe is refused; nothing where it works."""
    for families, recipes, message, reason in REFUSED:
        if name in families and recipe in recipes:
            return message, reason
    return "", ""


def page() -> str:
    """docs/families.md."""
    reasons = list(dict.fromkeys(refused(*case)[1] for case in CASES))
    reasons.remove("")
    rows = [
        [name, *(str(reasons.index(why) + 1) if (why := refused(name, recipe)[1]) else "yes" for recipe in RECIPES)]
        for name in FAMILIES
    ]
    table = [["family", *RECIPES], ["---"] + [":---:"] * len(RECIPES), *rows]
    return "\n".join(
        [
            *ABOVE.strip().splitlines(),
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
            "",
            *BELOW.strip().splitlines(),
            "",
        ]
    )


def make(name: str, folder: Path, deep: bool = True) -> Path:
    """A random model of the family, whose biases and norms are not those of a fresh one; two blocks a stack, or one."""
    kind, sizes = FAMILIES[name]
    if not deep:
        sizes = {
            key: 1 if key in LAYERS else value[:1] if key == "layer_types" else value for key, value in sizes.items()
        }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    head = HEADS.get(kind, "ForConditionalGeneration" if config.is_encoder_decoder else "ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(folder, end=False)
    return folder


def inputs(model) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 5, 9, 12, 7]])
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {})


def rising():
    """A validation score by which the last step is the best."""
    return itertools.count().__next__


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


class Base:
    """A base with its teacher: a LoRA that took a step, and its targets."""

    def __init__(self, name: str, folder: Path, deep: bool) -> None:
        self.folder = make(name, folder / "base", deep)
        self.model = load_model(self.folder, torch.float32)
        self.whole = folder / "targets"
        make_tokenizer(folder, end=False)
        self.tokenizer = load_tokenizer(folder)  # beside a config.json some kinds make a tokenizer of their own of it

    @functools.cached_property
    def examples(self):
        return encode_all(TASK, self.tokenizer, toy_rows(16, 1)[::5])  # of one length: few passes

    @functools.cached_property
    def teacher(self) -> Adapter:
        model = copy.deepcopy(self.model)
        config = lora_config(2, 2, named(model, ["query", "key"]))
        adapter, _ = finetune(model, config, self.examples, rising(), batch_size=4, schedule=SCHEDULE, seed=0)
        write_targets(self.whole, model, TASK, self.tokenizer, self.examples, 4, 2, "targets")
        return adapter

    def compressed(self, recipe, folder: Path):
        """(a reason) where it is refused, before any work; else the compressed model, saved."""
        model, began = copy.deepcopy(self.model), []
        before = set(model.state_dict())
        original = walk._record
        walk._record = lambda *args: began.append(1) or original(*args)
        try:
            report = compress(model, recipe, Calibration(TEXTS, tuning=TEXTS))
        except CaloraError as error:
            assert not began and set(model.state_dict()) == before, error
            return str(error), None
        finally:
            walk._record = original
        save(model, report, folder, self.folder)
        return "", model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family, and whether it has two blocks a stack -> its base, each made once."""
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name, deep=True: Base(name, folder / f"{name}-{deep}", deep))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A router needs no long training here."""
    monkeypatch.setattr(moefy, "ROUTER_STEPS", 3)


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_recipe_goes_through_every_stage_or_is_refused_before_any_work(bases, tmp_path, name, recipe):
    base, (message, _) = bases(name, recipe in DEEP), refused(name, recipe)
    found, model = base.compressed(RECIPES[recipe], tmp_path / "compressed")
    if message:
        assert message in found
        return
    assert not found
    dense, packed = load(tmp_path / "compressed", dense=True), load(tmp_path / "compressed")
    for opened in (dense, packed):
        torch.testing.assert_close(logits(opened), logits(model), rtol=1e-4, atol=1e-5)
    start, told = inherit(
        dense, base.teacher, bypass=Bypass(["all-linear"], 2, "gelu", "weighted_error"), reference=base.model,
        calibration=base.examples, origin=dense.calora_origin,
    )  # fmt: skip
    assert told.errors.keys() == linear_layers(dense).keys()
    assert all(after <= before + 1e-5 for before, after in told.errors.values())
    start.meta |= {"task": TASK.to_json(), "compressed_fingerprint": dense.calora_fingerprint}
    pool, both = Pool(base.examples, Targets(base.whole)), dense.config.is_encoder_decoder
    weights = Weights(1.0, {"encoder": 0.005, "decoder": 0.05}, 1.0, 1.0)
    made, history = distill(dense, start, pool, None, rising(), weights, batch_size=4, schedule=SCHEDULE, seed=0)
    parts = {"hidden_encoder", "hidden_decoder"} if both else {f"hidden_{next(iter(pool.targets.stacks))}"}
    assert set(history.losses[0]) == {"step", "loss", "task", "kl", *parts}
    write_adapter(tmp_path / "adapter", made, "base", "", torch.float32)
    packed.calora_tokenizer = base.tokenizer
    packed.load_adapter(tmp_path / "adapter", "toy")
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=2e-5)
    assert float((logits(packed) - logits(model)).abs().max()) > 2e-4
    assert set(packed.answer([row["text"] for row in toy_rows(2, 3)])) <= set(TASK.answers)


@pytest.mark.parametrize("name", ["Gemma", "BART"])
def test_a_table_that_scales_its_vectors_loads_in_plain_transformers(bases, tmp_path, name):
    check_plain(bases(name), [{"quantize": {"format": "int8", "embeddings": "int8"}}], tmp_path)


def test_nf4_of_a_model_with_linear_layers_outside_its_blocks_loads_in_plain_transformers(bases, tmp_path):
    """OPT's project_in: bitsandbytes' own format would take it for quantised."""
    check_plain(bases("OPT"), [{"quantize": {"format": "nf4"}}], tmp_path)


@pytest.mark.parametrize("recipe", ["sp", "layers", "m", "q8_up", "nf4"])
def test_a_model_of_conv1d_layers_loads_in_plain_transformers(bases, tmp_path, recipe):
    check_plain(bases("GPT-2"), RECIPES[recipe], tmp_path)
    with pytest.raises(CaloraError, match="linear layers, which are Conv1D in transformers' gpt2"):
        load(tmp_path / "out", dense=True).save_pretrained(tmp_path / "again")


def check_plain(base: Base, recipe, folder: Path) -> None:
    found, model = base.compressed(recipe, folder / "out")
    assert not found
    plain = getattr(transformers, model.config.architectures[0]).from_pretrained(folder / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.test_families`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
