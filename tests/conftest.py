"""Tiny random models, tokenizers and data: nothing is downloaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ["CALORA_DTYPE"] = "bfloat16"  # whatever this processor has: tests of fp32 ask for it
os.environ.update(DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false", PREFECT_LOGGING_LEVEL="WARNING")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from calora.common.files import fingerprint
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import Task, encode_all

ROOT = Path(__file__).resolve().parents[1]
GOOD, BAD = ("good", "fine", "great", "superb"), ("bad", "poor", "dull", "awful")
WORDS = [*GOOD, *BAD, "film", "plot", "a", "the", "was", "is", "Review:", "Sentiment:", "positive", "negative"]
TASK = Task("toy", "Review: {text} Sentiment:", ("negative", "positive"), 32, 4)


# Files that run whole pipelines in processes of their own. They come first: two workers then end together.
SLOW = ("test_dvc", "test_runs", "test_processes", "test_hub", "test_compare", "test_stages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def make_tokenizer(folder: Path, end: bool) -> None:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_model(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, hidden: int = 32, inner: int = 48) -> Path:
    torch.manual_seed(0)
    size = len(WORDS) + 3
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
            )
        )  # fmt: skip
    elif kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=size, d_model=hidden, d_kv=hidden // 4, d_ff=inner, num_layers=2, num_heads=4, pad_token_id=0,
                eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
            )
        )  # fmt: skip
    elif kind == "bart":
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=size, d_model=hidden, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=inner, decoder_ffn_dim=inner, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=None, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_positions=64, n_embd=hidden, n_layer=2, n_head=4, n_inner=inner, bos_token_id=None,
                eos_token_id=1,
            )
        )  # fmt: skip
    else:
        cls = BertForSequenceClassification if kind == "classifier" else BertModel
        model = cls(
            BertConfig(
                vocab_size=size, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, pad_token_id=0,
            )
        )  # fmt: skip
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder, end=kind != "llama")
    return folder


def toy_rows(count: int, seed: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    rows: list[dict[str, object]] = []
    while len(rows) < count:
        label = len(rows) % 2
        words = [pick(("a", "the", "film", "plot", "was", "is")) for _ in range(2 + len(rows) % 5)]
        rows.append({"text": " ".join([*words, pick(GOOD if label else BAD), f"w{seed}{len(rows)}"]), "label": label})
    return rows


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "llama")


@pytest.fixture
def llama32(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "llama32", torch.float32)


@pytest.fixture
def toy(llama: Path):
    """(task, tokenizer, examples, bf16 model)."""
    tokenizer = load_tokenizer(llama)
    return TASK, tokenizer, encode_all(TASK, tokenizer, toy_rows(24, 1)), load_model(llama, torch.bfloat16)


def make_project(folder: Path, kind: str = "llama", answers: bool = True) -> Path:
    """A copy of the pipeline with a tiny base, local task files and a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("calora", "stages", "pipeline"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    published = torch.float32 if kind in ("gpt2", "classifier") else torch.bfloat16
    base = make_model(kind, folder / "sources/base", published)
    small = make_model("bert", folder / "sources/small", torch.float32)
    (folder / "own").mkdir()
    for split, count in (("train", 40), ("validation", 12), ("test", 16)):
        rows = toy_rows(count, len(split))
        if not answers:
            rows = [{"text": r["text"], "label": TASK.answers[int(str(r["label"]))]} for r in rows]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"own/{split}.jsonl").write_text(lines)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["base"] = {"source": "path", "path": str(base), "sha256": fingerprint(base)}
    params["small"] = {"source": "path", "path": str(small), "sha256": fingerprint(small)}
    params |= {"tasks": ["toy"], "recipes": ["q8_up"], "compare": ["clm", "clm_inherited", "clm_lora", "calora"]}
    params["data"]["sizes"] = {"train": 24, "unlabelled": 12, "validation": 12, "test": 16}
    params["data"]["sets"] = {
        "toy": {
            "source": "files", "train": "own/train.jsonl", "validation": "own/validation.jsonl",
            "test": "own/test.jsonl", "label": "label", "labels": [0, 1] if answers else [],
            "prompt": TASK.prompt, "answers": list(TASK.answers) if answers else [], "max_tokens": 32,
            "max_new_tokens": 3,
        }
    }  # fmt: skip
    params["compress"]["calibration"] |= {"texts": 8, "tuning": 8}
    params["teacher"]["written"] |= {"texts": 10, "tokens": 6}
    params["teacher"] |= {"rank": 4, "lora_alpha": 2, "top_k": 5, "targets": ["query", "key"]}
    params["train"] |= {"steps": 6, "warmup": 1, "eval_every": 3, "batch_size": 4, "checkpoint_seconds": 0.001}
    ours = params["methods"]["calora"]["start"]
    ours["bypass"] |= {"rank": 4, "budget": None, "activation": "gelu", "format": "bf16"}
    ours["calibration_texts"] = 12
    params["methods"]["wide"]["start"]["bypass"]["rank"] = 4
    params["evaluate"] |= {"draws": 100}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


def change(folder: Path, key: str, value: object) -> None:
    """Set a dotted key of the project's params.yaml."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    *path, last = key.split(".")
    section = params
    for part in path:
        section = section[part]
    section[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="session")
def prefect_api():
    """A server of Prefect's with an empty database."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):  # a busy machine takes its time
        yield
