"""Which adapters of other people are carried over, distilled from, or refused: every row of docs/adapters.md.

`python -m tests.test_kinds` writes that page.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import calora
from calora.adapters.folder import read_plain_lora, write_adapter
from calora.adapters.lora import Adapter, attach_adapter, set_active
from calora.adapters.standin import stand_in
from calora.adapters.teachers import Whole, attach_teacher, attach_whole, import_adapter, read_whole, write_whole
from calora.distillation.targets import Targets
from calora.errors import CaloraError
from calora.models.anatomy import linear_layers
from calora.models.families import family_of
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all
from tests.conftest import ROOT, WORDS, change, make_project, make_tokenizer
from tests.test_stages import run_all
from tests.test_strangers import CHOSEN, CONFIG, EXAMPLES, WEIGHTS, close, edit, in_peft, logits, rename

PAGE = ROOT / "docs/adapters.md"
TARGETS = ["q_proj", "down_proj"]
CARRIED, TEACHER, REFUSED = "carried", "distilled from", "refused"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Kind:
    """A row of the page, and its test.

    Args:
        outcome: what becomes of it.
        says: the page's last column; of a teacher what `beyond` names, of a refused one a part of the message.
        config: PEFT's configuration.
        after: what is done to PEFT's folder.
        start: how the student's LoRA is made: its own, fitted or fresh; of a teacher.
        entries: of adapter_config.json, written last.
    """

    outcome: str
    says: str
    config: Any = field(default_factory=lambda: lora())
    after: Callable[[Path], None] = lambda folder: None
    start: str = ""
    entries: dict[str, Any] = field(default_factory=dict)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})


def as_mlx(**entries: Any) -> Callable[[Path], None]:
    """PEFT's folder as mlx-lm would have written it: a [in, r], b [r, out], y + scale (x a) b."""

    def change(folder: Path) -> None:
        raw, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        ends = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b", ".lora_magnitude_vector": ".m"}
        made = {}
        for key, tensor in tensors.items():
            end = next(end for end in ends if key.endswith(end))
            made[key.removeprefix(PREFIX).removesuffix(end) + ends[end]] = tensor.T.contiguous()
        save_file(made, folder / "adapters.safetensors")
        (folder / WEIGHTS).unlink()
        scale = {"rank": raw["r"], "scale": raw["lora_alpha"] / raw["r"], "dropout": 0.0}
        config = {"fine_tune_type": "dora" if raw["use_dora"] else "lora", "num_layers": 2, "lora_parameters": scale}
        (folder / CONFIG).write_text(json.dumps({**config, **entries}))

    return change


def named(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: rename(folder, change)


def with_tensors(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """More tensors, by name with _ for dots."""
    return lambda folder: save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


def in_fp16(folder: Path) -> None:
    save_file({key: value.half() for key, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def with_more_tokens(*words: str) -> Callable[[Path], None]:
    """Two tokens more in the embeddings, which are the base's else, and the tokenizer beside them."""

    def change(folder: Path) -> None:
        table = load_model(folder.parent / "base", torch.float32).get_input_embeddings().weight.detach()
        more = {f"{PREFIX}model.embed_tokens.weight": torch.cat([table, torch.ones(2, table.shape[1])])}
        with_tensors(**more)(folder)
        if words:
            tokenizer = load_tokenizer(folder.parent / "base")
            tokenizer.add_tokens(list(words))
            tokenizer.save_pretrained(folder)

    return change


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def below(folder: Path) -> None:
    (folder / "default").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "default" / name)


UNSLOTH = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORM = torch.linspace(0.5, 1.5, 32)
KINDS = {
    "LoRA of any rank, dropout, bf16": Kind(CARRIED, "dropout is for training", lora(r=7, lora_dropout=0.3)),
    "LoRA in fp16 or fp32": Kind(CARRIED, "read as it is, stored in bf16", after=in_fp16),
    "rank-stabilised LoRA": Kind(CARRIED, "exactly", lora(use_rslora=True)),
    "ranks and alphas by pattern": Kind(
        CARRIED, "PEFT's own lookup", lora(rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"down_proj": 32}),
    ),
    "all-linear": Kind(CARRIED, "exactly", lora(target_modules="all-linear")),
    "PiSSA, OLoRA": Kind(
        CARRIED, "at twice the rank: what they took from the base is added", lora(init_lora_weights="pissa"),
    ),
    "unsloth": Kind(
        CARRIED, "targets by its regular expression, its own entries ignored", lora(target_modules=UNSLOTH),
        entries={"unsloth_fixed": True},
    ),
    "axolotl, FSDP": Kind(
        CARRIED, "wrappers in the names of tensors are read over",
        after=named(lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.")),
    ),
    "LLaMA-Factory, DeepSpeed": Kind(
        CARRIED, "the same", lora(target_modules=ALL), named(lambda key: key.replace(PREFIX, f"{PREFIX}module.", 1)),
    ),
    "names without PEFT's prefix, or with the adapter's name": Kind(
        CARRIED, "the same", after=named(lambda key: key.removeprefix(PREFIX).replace(".weight", ".default.weight")),
    ),
    "TRL, with a tokenizer of more tokens": Kind(
        CARRIED, "if it reads the task's texts as the base's does; the further rows are left out",
        after=with_more_tokens("<a>", "<b>"),
    ),
    "mlx-lm, LoRA": Kind(CARRIED, "its `scale` as it stands, whatever the rank", after=as_mlx()),
    "mlx-lm, before `num_layers`": Kind(
        CARRIED, "where alpha is the rank, which changes nothing",
        after=as_mlx(num_layers=None, lora_layers=2, lora_parameters={"rank": 4, "alpha": 4, "scale": 2.0}),
    ),
    "DoRA": Kind(TEACHER, "DoRA", lora(use_dora=True), start="fitted"),
    "mlx-lm, DoRA": Kind(TEACHER, "DoRA", lora(use_dora=True), as_mlx(), "fitted"),
    "(IA)3": Kind(
        TEACHER, "(IA)3", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        start="fitted",
    ),
    "VeRA": Kind(TEACHER, "VeRA", VeraConfig(r=8, target_modules=["q_proj", "o_proj"]), start="fitted"),
    "VeRA without its projections": Kind(
        TEACHER, "VeRA", VeraConfig(r=8, target_modules=["q_proj", "o_proj"], save_projection=False), start="fitted",
    ),
    "AdaLoRA": Kind(
        TEACHER, "AdaLoRA", AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=TARGETS), start="fitted",
    ),
    "AdaLoRA with its ranks allocated": Kind(
        TEACHER,
        "AdaLoRA",
        AdaLoraConfig(init_r=6, target_r=4, tinit=1, tfinal=2, total_step=8, target_modules=TARGETS),
        start="fitted",
    ),
    "LoHa": Kind(TEACHER, "LoHa", LoHaConfig(r=2, target_modules=TARGETS), start="fitted"),
    "LoKr": Kind(TEACHER, "LoKr", LoKrConfig(r=2, target_modules=TARGETS), start="fitted"),
    "modules_to_save: norms": Kind(
        TEACHER, "layers that are trained whole", lora(modules_to_save=["norm", "input_layernorm"]), start="its own",
    ),
    "modules_to_save: embeddings, head": Kind(
        TEACHER, "layers that are trained whole", lora(modules_to_save=["embed_tokens", "lm_head"]), start="its own",
    ),
    "the same in the tensors alone": Kind(
        TEACHER, "layers that are trained whole", after=with_tensors(**{f"{PREFIX}model.norm.weight": NORM}),
        start="its own",
    ),
    "trained tokens (trainable_token_indices)": Kind(
        TEACHER, "trained tokens", lora(trainable_token_indices=[3, 5]), start="its own",
    ),
    "LoRA on the head": Kind(
        TEACHER, "LoRA on the output head", lora(target_modules=["q_proj", "lm_head"]), start="its own",
    ),
    "LoRA on the embeddings alone": Kind(
        TEACHER, "LoRA on embeddings", lora(target_modules=["embed_tokens"]), start="fresh",
    ),
    "lora_bias": Kind(TEACHER, "a bias of the LoRA's own", lora(lora_bias=True), start="its own"),
    "bias: lora_only": Kind(TEACHER, "biases of the base, trained (bias)", lora(bias="lora_only"), start="its own"),
    "OFT, BOFT, HRA, ...": Kind(REFUSED, "found OFT.*merge", OFTConfig(oft_block_size=4, target_modules=TARGETS)),
    "prompt and prefix tuning": Kind(REFUSED, "found PROMPT_TUNING.*train a LoRA", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    "PiSSA in some steps, CorDA, LoRA-GA, LoftQ": Kind(
        REFUSED, "counts from a base that it has changed", entries={"init_lora_weights": "corda"},
    ),
    "PiSSA with more than a LoRA": Kind(
        REFUSED, "counts from a base that it has changed", lora(init_lora_weights="pissa", modules_to_save=["norm"])
    ),
    "aLoRA": Kind(REFUSED, "aLoRA", lora(alora_invocation_tokens=[3, 5])),
    "replicated layers, Megatron, QALoRA, ...": Kind(REFUSED, "replicated layers", entries={"layer_replication": [[0, 2]]}),
    "a classifier's head (SEQ_CLS)": Kind(REFUSED, "a head of its own", entries={"task_type": "SEQ_CLS"}),
    "more tokens, no tokenizer": Kind(REFUSED, "tokens, the base's.*resize_token_embeddings", after=with_more_tokens()),
    "more tokens, which the task's texts use": Kind(
        REFUSED, "in tokens of the base.*resize_token_embeddings", after=with_more_tokens("oo", "il"),
    ),
    "DoRA that the configuration denies": Kind(REFUSED, "use_dora: true", lora(use_dora=True), entries={"use_dora": False}),
    "mlx-lm, full": Kind(REFUSED, "trained whole", after=as_mlx(fine_tune_type="full")),
    "mlx-lm, on embeddings or experts": Kind(
        REFUSED, "LoRA on embeddings, and on a head",
        after=lambda folder: (
            as_mlx()(folder), rename_mlx(folder, lambda key: key.replace("layers.0.self_attn.q_proj", "embed_tokens")),
        ),
    ),
    "mlx-lm, scale and alpha before `num_layers`": Kind(
        REFUSED, "a scale alone",
        after=as_mlx(num_layers=None, lora_layers=2, lora_parameters={"rank": 4, "alpha": 16, "scale": 2.0}),
    ),
    "pickles (adapter_model.bin)": Kind(REFUSED, "only pickles", after=pickled),
    "a folder of several adapters": Kind(REFUSED, "there is one in .*default", after=below),
    "an adapter of CA-LoRA": Kind(REFUSED, "parts for its own base", entries={"calora": "more"}),
}  # fmt: skip
REASONS = {  # of what is refused, for the page: the message says more
    "OFT, BOFT, HRA, ...": "they multiply the weights: merge it into the base, and name that base",
    "prompt and prefix tuning": "virtual tokens have no place in a text's states: train a LoRA",
    "PiSSA in some steps, CorDA, LoRA-GA, LoftQ": "counts from a base that was changed: PEFT converts it",
    "PiSSA with more than a LoRA": "the same",
    "aLoRA": "acts from an invocation on",
    "replicated layers, Megatron, QALoRA, ...": "another model, or layers that are not linear ones",
    "a classifier's head (SEQ_CLS)": "the base has no such head: train it to write the label",
    "more tokens, no tokenizer": "nobody can tell whether the task's texts use them",
    "more tokens, which the task's texts use": "the base does not know them: name one that does",
    "DoRA that the configuration denies": "PEFT would leave the magnitudes out in silence",
    "mlx-lm, full": "a base, not an adapter",
    "mlx-lm, on embeddings or experts": "mlx-lm's acts on a head tied to them too, PEFT's does not",
    "mlx-lm, scale and alpha before `num_layers`": "some releases multiplied them, some did not",
    "pickles (adapter_model.bin)": "save it as safetensors",
    "a folder of several adapters": "name the one",
    "an adapter of CA-LoRA": "it is of its own compressed base",
}
STARTS = {
    "its own": "the LoRA in it, exactly",
    "fitted": "a LoRA that is fitted to the change of each layer",
    "fresh": "a fresh LoRA of `teacher.rank`",
}


def rename_mlx(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapters.safetensors"
    save_file({change(key): value for key, value in load_file(file).items()}, file)


def page() -> str:
    """docs/adapters.md."""
    rows = []
    for name, kind in KINDS.items():
        says = kind.says
        if kind.outcome == TEACHER:
            says = STARTS[kind.start]
        rows.append([name, kind.outcome, REASONS.get(name, says)])
    table = [["adapter", "is", "how, or why not"], ["---"] * 3, *rows]
    return "\n".join(
        [
            "# Which adapters of other people are taken",
            "",
            "Written by `python -m tests.test_kinds`; every row is a test on a tiny random model. `teacher.adapters` names a folder inside own/ or a",
            "hub repository at a commit: `{path: own/my-lora}` or `{repo: us/lora, revision: <commit>, folder: null}`. It is scored on the base before",
            "anything is trained; the line that says so is in the log of `teacher`, the figures in models/teacher/<task>/imported.json.",
            "",
            "- *carried*: it is a plain LoRA on the linear layers of the blocks, and computes on the base what PEFT computes in eval mode.",
            "- *distilled from*: PEFT computes it on the uncompressed base, and its outputs are the targets. A LoRA is what is trained on the compressed",
            "  one; the last column says from which it starts. A fitted one is the best of rank `teacher.fit.rank` for the inputs of `teacher.fit.texts`",
            "  training texts, exact where the change has no higher rank; what it leaves out is printed. What a LoRA has no place for (norms, a head) is",
            "  named, and has to be learnt from the targets: with `loss: null` (`clm_inherited`, `calora_free`) it is not there.",
            "- *refused*: by name and in one line, before any work.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
        ]
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the base; its blocks have biases, and its embeddings are large enough to show."""
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
            attention_bias=True, mlp_bias=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3)
    model.save_pretrained(folder / "base")
    make_tokenizer(folder / "base", end=False)
    return folder


def made(kind: Kind, home: Path, folder: Path) -> Path:
    """A folder as PEFT writes it, of random values, and what is done to it."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(home / "base", torch.float32), kind.config)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    if getattr(kind.config, "tfinal", 0):
        allocate(model, kind.config.total_step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    (folder / "base").symlink_to(home / "base")
    return folder


def allocate(model: Any, steps: int) -> None:
    """AdaLoRA's own pruning of ranks, by the gradients of a few steps."""
    for step in range(steps):
        ids = torch.randint(3, 18, (4, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    ranks = {sum(kept) for kept in model.peft_config["default"].rank_pattern.values()}
    assert len(ranks) > 1  # layers differ in what they kept


def prepared(kind: Kind, home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(the folder as it is brought, PEFT's own form of it)."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "base").symlink_to(home / "base")
    theirs, folder = made(kind, home, tmp_path / "theirs"), made(kind, home, tmp_path / "brought")
    kind.after(folder)
    if kind.entries:
        edit(folder, **kind.entries)
    return folder, theirs


def brought(name: str, home: Path, tmp_path: Path) -> tuple[Any, Any, Path, Path]:
    folder, theirs = prepared(KINDS[name], home, tmp_path)
    model, tokenizer = load_model(home / "base", torch.float32), load_tokenizer(home / "base")
    return import_adapter(folder, model, tokenizer, ["Review: a good film Sentiment:"]), model, folder, theirs


def of(outcome: str) -> list[str]:
    return [name for name, kind in KINDS.items() if kind.outcome == outcome]


@pytest.mark.parametrize("name", of(CARRIED))
def test_it_is_carried_as_peft_computes_it(home, tmp_path, name):
    adapter, model, folder, theirs = brought(name, home, tmp_path)
    assert isinstance(adapter, Adapter)
    before = logits(model)
    attach_adapter(model, adapter, "own")
    set_active(model, "own")
    whole, chosen = in_peft(load_model(home / "base", torch.float32), folder if "fp16" in name else theirs)
    assert float((whole - before).abs().max()) > 0.005
    close(logits(model), whole)
    close(logits(model, CHOSEN), chosen)


@pytest.mark.parametrize("name", of(TEACHER))
def test_it_is_a_teacher_as_peft_computes_it(home, tmp_path, name):
    whole, model, folder, theirs = brought(name, home, tmp_path)
    kind = KINDS[name]
    assert isinstance(whole, Whole) and kind.says in whole.beyond
    before = logits(model)
    write_whole(tmp_path / "stored", whole)
    stored = read_whole(tmp_path / "stored")
    assert stored.beyond == whole.beyond and stored.parameters == whole.parameters > 0
    attach_whole(model, stored)
    expected = folder if "tensors alone" in name else theirs
    found, chosen = in_peft(load_model(home / "base", torch.float32), expected)
    assert float((found - before).abs().max()) > 0.005
    close(logits(model), found)
    close(logits(model, CHOSEN), chosen)
    start = whole.lora if whole.lora is not None else stand_in(model, EXAMPLES, 8)[0]
    assert kind.start == ("fitted" if whole.lora is None else "its own" if whole.lora.config else "fresh")
    if start.config is not None:
        plain = load_model(home / "base", torch.float32)
        attach_adapter(plain, start, "own")
        assert start.lora_layers and set(start.lora_layers) <= set(linear_layers(plain))
    if kind.start == "its own":
        factors = {
            key.removeprefix(PREFIX): value for key, value in load_file(theirs / WEIGHTS).items() if "lora_" in key
        }
        assert start.lora and all(torch.equal(tensor, factors[key]) for key, tensor in start.lora.items())


@pytest.mark.parametrize("name", of(REFUSED))
def test_it_is_refused_in_one_line_and_the_base_stays(home, tmp_path, name):
    folder, _ = prepared(KINDS[name], home, tmp_path)
    model, tokenizer = load_model(home / "base", torch.float32), load_tokenizer(home / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CaloraError, match=re.compile(KINDS[name].says)) as caught:
        import_adapter(folder, model, tokenizer, ["Review: a good film Sentiment:"])
    assert "\n" not in str(caught.value) and "Fix: " in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_fitted_lora_is_the_best_of_its_rank(home, tmp_path):
    """Against the singular values of (W' - W) C^(1/2), and exact where the change has no higher rank."""
    whole, model, _, theirs = brought("DoRA", home, tmp_path)
    attach_whole(model, whole)
    inputs: dict[str, list[torch.Tensor]] = {}
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda _, args: inputs.setdefault("x", []).append(args[0].flatten(0, -2)))
    texts = [calora.models.tasks.Example([3 + (5 * i + j * j) % 15 for j in range(9)]) for i in range(12)]
    for rank in (2, 32):
        inputs.clear()
        made, errors = stand_in(model, texts, rank)
        x = torch.cat(inputs["x"])
        weight = {
            key: value for key, value in load_file(theirs / WEIGHTS).items() if "layers.0.self_attn.q_proj" in key
        }
        a, b, m = (
            next(value for key, value in weight.items() if part in key) for part in ("lora_A", "lora_B", "magnitude")
        )
        own = layer.get_base_layer().weight
        moved = own + 2 * b @ a  # alpha / r = 2
        delta = m[:, None] / moved.norm(dim=1, keepdim=True) * moved - own
        sizes = torch.linalg.svdvals((x @ delta.T).double())
        left = float((sizes[rank:].square().sum() / sizes.square().sum()).sqrt())
        assert errors["model.layers.0.self_attn.q_proj"] == pytest.approx(left, abs=1e-4)
        fit = (
            made.lora["model.layers.0.self_attn.q_proj.lora_B.weight"]
            @ made.lora["model.layers.0.self_attn.q_proj.lora_A.weight"]
        )
        assert float((x @ (delta - fit).T).norm() / (x @ delta.T).norm()) == pytest.approx(left, abs=1e-4)


def test_a_teacher_that_is_not_whole_is_refused(home, tmp_path):
    """PEFT itself would leave out what is missing, and take what is of another shape for nothing."""
    for name, spoil, said in (
        ("(IA)3", lambda t, key: t.pop(key), "a tensor .*ia3_l.*found none"),
        ("DoRA", lambda t, key: t.update({key: torch.ones(3)}), "found \\(3,\\)"),
        ("AdaLoRA", lambda t, key: t[key].fill_(float("nan")), "finite"),
    ):
        folder, _ = prepared(KINDS[name], home, tmp_path / name)
        tensors = load_file(folder / WEIGHTS)
        spoil(tensors, sorted(tensors)[0])
        save_file(tensors, folder / WEIGHTS)
        model = load_model(home / "base", torch.float32)
        with pytest.raises(CaloraError, match=said):
            attach_whole(model, import_adapter(folder, model))


def test_the_teacher_s_folder_says_which_it_is(home, tmp_path):
    whole, model, _, theirs = brought("VeRA", home, tmp_path)
    attach_whole(model, whole)
    write_adapter(tmp_path / "teacher", stand_in(model, EXAMPLES, 2)[0], "base", "", torch.float32)
    write_whole(tmp_path / "teacher/whole", whole)
    again = load_model(home / "base", torch.float32)
    assert attach_teacher(again, tmp_path / "teacher", "toy") == whole.parameters
    close(logits(again), in_peft(load_model(home / "base", torch.float32), theirs)[0])


def test_a_teacher_of_another_kind_goes_through_the_stages(tmp_path, monkeypatch, capsys):
    """Scored on the base as PEFT computes it, distilled from, and a LoRA fitted to it is what is trained."""
    folder = make_project(tmp_path / "p")
    kind = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    torch.manual_seed(0)
    theirs = get_peft_model(load_model(folder / "sources/base", torch.float32), kind)
    with torch.no_grad():
        for _, parameter in sorted(theirs.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    theirs.save_pretrained(folder / "own/ia3")
    for key, value in {
        "teacher.adapters": {"toy": {"path": "own/ia3"}}, "compare": ["clm_inherited", "clm_lora", "calora"],
        "teacher.fit.rank": 3,
    }.items():  # fmt: skip
        change(folder, key, value)
    before = Path.cwd()
    try:
        run_all(folder)
    finally:
        os.chdir(before)
    said = capsys.readouterr().out
    assert "toy: the adapter has" in said and "more than a plain LoRA: (IA)3. The student starts from a LoRA" in said
    about = json.loads((folder / "models/teacher/toy/imported.json").read_text())
    assert (
        about["beyond"] == ["(IA)3"]
        and len(about["errors"]) == 6
        and set(about["validation_accuracy"]) == {"base", "adapter", "lora"}
    )
    fitted, trained = (read_plain_lora(folder / "models" / part) for part in ("teacher/toy", "calora/toy/q8_up"))
    assert {tensor.shape[0] for key, tensor in fitted.lora.items() if ".lora_A." in key} == {3}
    assert fitted.lora_layers == trained.lora_layers
    methods = json.loads((folder / "results/toy/q8_up/metrics.json").read_text())["methods"]
    assert methods["llm_lora"]["trainable_parameters"] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    model = load_model(folder / "models/base", torch.bfloat16)
    attach_teacher(model, folder / "models/teacher/toy", "toy")
    task, tokenizer = read_task_of(folder), load_tokenizer(folder / "models/base")
    rows = [json.loads(line) for line in (folder / "data/toy/train.jsonl").read_text().splitlines()]
    examples = encode_all(task, tokenizer, rows[:4])
    stored = Targets(folder / "models/targets/toy/train").read(range(4), torch.device("cpu"))
    batch = family_of(model).collate(examples, model)
    found = family_of(model).forward(model, batch, torch.tensor(task.answer_token_ids(tokenizer)))
    torch.testing.assert_close(found.logits.bfloat16(), stored.logits, rtol=0.02, atol=0.02)  # bf16, other padding


def read_task_of(folder: Path) -> Task:
    return Task.from_json(json.loads((folder / "data/toy/task.json").read_text()))


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.test_kinds`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
