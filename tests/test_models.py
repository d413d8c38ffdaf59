"""Every family's logits are the model's own; answers are greedy; the dtype is one that the processor computes in."""

import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from transformers import GenerationConfig, PreTrainedModel

from calora.common.devices import accelerated, gpus
from calora.errors import CaloraError
from calora.models.families import family_of
from calora.models.loading import compute_dtype, load_model, training_attention
from calora.models.tasks import Example
from stages.common import choose

SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
BART = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SIZES = {
    "Llama": LLAMA,
    "Gemma2": {**LLAMA, "final_logit_softcapping": 2.0},
    "Gemma3Text": {**LLAMA, "final_logit_softcapping": 2.0, "bos_token_id": 2},
    "Cohere": {**LLAMA, "logit_scale": 0.25, "bos_token_id": 2},
    "Granite": {**LLAMA, "logits_scaling": 8.0},
    "HyperCLOVAX": {**LLAMA, "logits_scaling": 8.0},
    "RecurrentGemma": {
        **SIZE,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "logits_soft_cap": 2.0,
        "lru_width": 32,
    },
    "Mixtral": {**LLAMA, "num_local_experts": 4, "output_router_logits": True},
    "OPT": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "GPTNeoX": {**SIZE, "intermediate_size": 48},
    "GPT2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    "T5": {**SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "Bart": {**SIZE, **BART, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64},
}
HEADS = {"T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration", "GPT2": "GPT2LMHeadModel"}
EXAMPLES = [Example([5, 6, 7, 8, 9], [11, 1]), Example([12, 13], [14, 15, 1]), Example([3, 4, 17])]
CHOSEN = torch.tensor([11, 14, 3])


def tiny(name: str, **options) -> PreTrainedModel:
    """A random model whose logits are of a size at which scales and caps show."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{"eos_token_id": 1, **SIZES[name], **options})
    head = HEADS.get(name, f"{name.removesuffix('Text')}ForCausalLM")
    model = getattr(transformers, head)(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in model.state_dict().values():
        if weight.dim() == 2:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None:
        bias.copy_(torch.randn(bias.shape, generator=generator))
    return model


def own_logits(model, example):
    """What `model(...)` gives at the positions that predict the answer, one example alone."""
    answer = example.answer_ids or [0]
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        prompt, written = torch.tensor([example.prompt_ids]), torch.tensor([[start, *answer[:-1]]])
        return model(input_ids=prompt, decoder_input_ids=written).logits[0]
    ids = torch.tensor([example.prompt_ids + answer[:-1]])
    return model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 :]


@pytest.mark.parametrize("name", SIZES)
def test_logits_are_the_models_own(name):
    model = tiny(name)
    family = family_of(model)
    batch = family.collate(EXAMPLES, model)
    expected = torch.cat([own_logits(model, example) for example in EXAMPLES])
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(family.forward(model, batch, None).logits, expected, rtol=1e-5, atol=1e-5)
    chosen = family.forward(model, batch, CHOSEN).logits
    torch.testing.assert_close(chosen, expected[:, CHOSEN], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_counts_on_every_path(head):
    model = tiny("Llama")
    plain = own_logits(model, EXAMPLES[0])
    config = LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj"], **head}, init_lora_weights=False)
    inject_adapter_in_model(config, model)
    model.eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if ".modules_to_save." in parameter_name:
            parameter.mul_(2)
    expected = own_logits(model, EXAMPLES[0])
    assert float((expected - plain).abs().max()) > 0.1
    family = family_of(model)
    batch = family.collate(EXAMPLES[:1], model)
    torch.testing.assert_close(family.forward(model, batch, None).logits, expected)
    torch.testing.assert_close(family.forward(model, batch, CHOSEN).logits, expected[:, CHOSEN])


def greedy_by_hand(model, prompt, ends, steps):
    """One argmax after the other, each from a forward pass of its own."""
    written = []
    while len(written) < steps and not (written and written[-1] in ends):
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id]
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start + written])).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("name", ["Llama", "T5", "Bart"])
def test_answers_are_greedy_whatever_generation_config_says(name):
    model = tiny(name)
    prompts = [example.prompt_ids for example in EXAMPLES]
    expected = [greedy_by_hand(model, prompt, {1}, 6) for prompt in prompts]
    model.generation_config = GenerationConfig(
        eos_token_id=1, pad_token_id=0, repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1,
        forced_bos_token_id=9, forced_eos_token_id=8, suppress_tokens=expected[0][:1],
    )  # fmt: skip
    before = model.generation_config.to_dict()
    assert family_of(model).generate(model, EXAMPLES, 6) == expected
    assert model.generation_config.to_dict() == before
    model.generation_config = GenerationConfig(eos_token_id=1, do_sample=True, temperature=9.0, top_k=3)
    assert family_of(model).generate(model, EXAMPLES, 6) == expected


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_an_answer_ends_at_any_end_token_and_keeps_no_padding(place):
    model = tiny("Llama")
    written = [greedy_by_hand(model, example.prompt_ids, set(), 6) for example in EXAMPLES]
    end = written[0][1]
    getattr(model, place).eos_token_id = [1, end]
    expected = [greedy_by_hand(model, example.prompt_ids, {1, end}, 6) for example in EXAMPLES]
    assert expected[0][-1] == end and len(expected[0]) < max(map(len, expected))
    assert family_of(model).generate(model, EXAMPLES, 6) == expected


CPUS = [
    ({"avx2": True, "avx512_f": True, "avx512_bw": True}, torch.float32),  # Skylake: bf16 is emulated
    ({"avx2": True, "avx512_bf16": True}, torch.bfloat16),
    ({"avx2": True, "amx_bf16": True}, torch.bfloat16),
    ({"neon": True, "bf16": True}, torch.bfloat16),
    ({"neon": True, "bf16": False}, torch.float32),
]


@pytest.mark.parametrize(("features", "dtype"), CPUS)
def test_the_dtype_is_one_that_the_processor_has_kernels_for(features, dtype, monkeypatch):
    monkeypatch.delenv("CALORA_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert compute_dtype() is dtype
    for name, chosen in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("CALORA_DTYPE", name)
        assert compute_dtype() is chosen
    monkeypatch.setenv("CALORA_DTYPE", "half")
    with pytest.raises(CaloraError, match="CALORA_DTYPE: expected one of bfloat16, float32, found half"):
        compute_dtype()


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.delenv("CALORA_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert compute_dtype() is torch.float32


@pytest.mark.parametrize(("name", "attention"), [("Gemma2", "eager"), ("Llama", "sdpa")])
def test_a_class_without_sdpa_loads_with_eager_attention(name, attention, tmp_path, monkeypatch):
    monkeypatch.setenv("CALORA_DTYPE", "float32")
    tiny(name).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.dtype is torch.float32 and model.config._attn_implementation == attention
    assert load_model(tmp_path, torch.bfloat16, attention="eager").dtype is torch.bfloat16


def test_the_device_is_chosen_in_one_place(monkeypatch):
    monkeypatch.delenv("CALORA_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert accelerated() and gpus() == 3 and training_attention() == "sdpa"
    monkeypatch.setenv("CALORA_DEVICE", "cpu")
    assert not accelerated() and gpus() == 0 and training_attention() == "eager"
    monkeypatch.delenv("CALORA_DTYPE", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert compute_dtype() is torch.bfloat16  # the CPU's
    monkeypatch.setenv("CALORA_DTYPE", "auto")
    assert compute_dtype() is torch.bfloat16
    monkeypatch.setenv("CALORA_DEVICE", "gpu")
    with pytest.raises(CaloraError, match=r"device \(CALORA_DEVICE\): expected one of auto, cpu, cuda, found gpu"):
        accelerated()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CALORA_DEVICE", "cuda")
    with pytest.raises(CaloraError, match="expected a CUDA device that torch sees, found none"):
        accelerated()


def test_params_choose_device_and_dtype_and_the_environment_has_the_last_word(monkeypatch):
    params = SimpleNamespace(device="cpu", dtype="float32")
    for given, expected in ((None, ("cpu", "float32")), ("auto", ("auto", "auto"))):
        for name in ("CALORA_DEVICE", "CALORA_DTYPE"):
            monkeypatch.setenv(name, given or "")
            if given is None:
                monkeypatch.delenv(name)
        choose(params)
        assert (os.environ["CALORA_DEVICE"], os.environ["CALORA_DTYPE"]) == expected
