"""Which step works on which kind of model: each goes to disk and back, or is refused before any work by its true reason.

docs/families.md is this table: `python -m tests.test_families` writes it.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import transformers

import calora.plugin  # noqa: F401  # from_pretrained then knows our format
from calora.compressed import load
from calora.compression import compress, walk
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.models.loading import load_model
from calora.models.tasks import Example
from calora.saving import save
from tests.conftest import ROOT, make_tokenizer

PAGE = ROOT / "docs/families.md"
TEXTS = [Example([3 + (7 * i + j) % 20 for j in range(4 + i % 3)]) for i in range(6)]
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
    "Llama": ("Llama", LLAMA),
    "Mistral": ("Mistral", LLAMA),
    "Qwen2": ("Qwen2", LLAMA),
    "Qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "Gemma": ("Gemma", LLAMA | {"head_dim": 8}),
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
    "T5, gated": ("T5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "GPT-2": ("GPT2", {"vocab_size": 24, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 1}),
    "Mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2Moe", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3-MoE": ("Qwen3Moe", LLAMA | EXPERTS | {"head_dim": 8}),
}  # fmt: skip
SHRINK = {"importance": "activation", "compensate": True}
STEPS = {
    "int8": {"quantize": {"format": "int8"}},
    "int4": {"quantize": {"format": "int4", "group": 32}},
    "int2": {"quantize": {"format": "int2", "group": 32}},
    "nf4": {"quantize": {"format": "nf4"}},
    "embeddings int8": {"quantize": {"format": "int8", "embeddings": "int8"}},
    "2:4": {"prune": {"score": "wanda", "pattern": "2:4"}},
    "neurons": {"shrink": {**SHRINK, "neurons": 0.5}},
    "heads": {"shrink": {**SHRINK, "heads": 0.5}},
    "layers": {"shrink": {**SHRINK, "layers": 0.5}},
    "moefy": {"moefy": {"experts": 8, "active": 0.5, "clustering": "coactivation", "router": "analytic"}},
    "2:4, recover": {
        "prune": {"score": "wanda", "pattern": "2:4"},
        "recover": {"rank": 2, "fit": "alternate", "rounds": 2, "format": "int8"},
    },
}
SEPARATE = ("OPT", "BART")  # their blocks hold the layers of the feed-forward themselves
FUSED = ("Phi", "GPT-NeoX", *SEPARATE)
EXPERT = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE")
REFUSED = [  # families, steps, what the message says, what the page says
    (("GPT-2",), STEPS, "0%; the others are in mlp.c_fc (Conv1D)", "its weights are in Conv1D, not in linear layers"),
    (EXPERT, STEPS, "the others are in mlp.experts", "most of its weights are in experts (3-D tensors), not in linear layers"),
    (("OLMo-2",), ["heads"], "q_norm.weight, which spans all heads", "its norm of queries and keys spans all heads"),
    (("Phi-3", *FUSED), ["heads"], "no layers called q_proj", "its attention has other layers than q_proj, k_proj, v_proj, o_proj"),
    (("T5", "T5, gated"), ["heads"], "a position bias by head", "its blocks share one position bias by head"),
    (("Phi-3",), ["neurons", "moefy"], "feed-forward of model.layers.0", "gate and up are one layer (gate_up_proj)"),
    (SEPARATE, ["moefy"], "holds itself", "its blocks hold the layers of the feed-forward themselves"),
]  # fmt: skip
CASES = [(name, step) for name in FAMILIES for step in STEPS]


def refused(name: str, step: str) -> tuple[str, str]:
    """What the message and the page say of why a step is refused; nothing where it works."""
    for families, steps, message, reason in REFUSED:
        if name in families and step in steps:
            return message, reason
    return "", ""


def page() -> str:
    """docs/families.md."""
    reasons = list(dict.fromkeys(refused(*case)[1] for case in CASES))
    reasons.remove("")
    rows = [
        [name, *(str(reasons.index(why) + 1) if (why := refused(name, step)[1]) else "yes" for step in STEPS)]
        for name in FAMILIES
    ]
    table = [["family", *STEPS], ["---"] + [":---:"] * len(STEPS), *rows]
    return "\n".join(
        [
            "# Which step works on which kind of model",
            "",
            "Written by `python -m tests.test_families`; the test tries every cell with a tiny random model. *yes*: compressed, written and",
            "loaded back, packed and dense, it computes what it computed in memory. A number: refused before any work, for the reason below.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
            "",
        ]
    )


def make(name: str, folder: Path) -> Path:
    """A random model of the family, whose biases and norms are not those of a fresh one."""
    kind, sizes = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    head = {"GPT2": "LMHeadModel"}.get(kind, "ForConditionalGeneration" if config.is_encoder_decoder else "ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(folder, end=False)
    return folder


def inputs(model) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 5, 9, 12, 7]])
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {})


def outcome(base: Path, step: dict, folder: Path) -> str:
    """Compress, save and load, in both forms; the reason if it is refused."""
    model = load_model(base, torch.float32)
    before = copy.deepcopy(model.state_dict())
    began = []
    original = walk._record
    walk._record = lambda *args: began.append(1) or original(*args)
    try:
        report = compress(model, [{name: options} for name, options in step.items()], Calibration(TEXTS))
    except CaloraError as error:
        assert not began and model.state_dict().keys() == before.keys(), error
        return str(error)
    finally:
        walk._record = original
    with torch.no_grad():
        expected = model(**inputs(model)).logits
        save(model, report, folder, base)
        for dense in (True, False):
            torch.testing.assert_close(
                load(folder, dense=dense)(**inputs(model)).logits, expected, rtol=1e-4, atol=1e-5
            )
    return ""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family -> folder of its base, each made once."""
    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp(name.replace(", ", "-"))))


@pytest.mark.parametrize(("name", "step"), CASES)
def test_a_step_works_or_is_refused_before_any_work(bases, tmp_path, name, step):
    found, (message, _) = outcome(bases(name), STEPS[step], tmp_path / "out"), refused(name, step)
    assert message in found if message else not found


@pytest.mark.parametrize("name", ["Gemma", "BART"])
def test_a_table_that_scales_its_vectors_loads_in_plain_transformers(bases, tmp_path, name):
    assert not outcome(bases(name), STEPS["embeddings int8"], tmp_path / "out")
    ours = load(tmp_path / "out")
    plain = getattr(transformers, ours.config.architectures[0]).from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(plain(**inputs(plain)).logits, ours(**inputs(ours)).logits, rtol=1e-4, atol=1e-5)


def test_nf4_of_a_model_with_linear_layers_outside_its_blocks_loads_in_plain_transformers(bases, tmp_path):
    """OPT's project_in: bitsandbytes' own format would take it for quantised."""
    assert not outcome(bases("OPT"), STEPS["nf4"], tmp_path / "out")
    plain, ours = (
        transformers.OPTForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32),
        load(tmp_path / "out"),
    )
    torch.testing.assert_close(plain(**inputs(plain)).logits, ours(**inputs(ours)).logits, rtol=1e-4, atol=1e-5)


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.test_families`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
