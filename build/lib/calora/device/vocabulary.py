"""The tokenizer of a model folder as GGUF has it: byte-level BPE, and the chat template."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from calora.common.files import read_json
from calora.errors import CaloraError
from calora.models.loading import load_tokenizer

GPT2 = "gpt-2"
DIGITS = "smollm"  # GPT-2's, and each digit by itself
SPLITS = {  # regular expression of tokenizer.json -> llama.cpp's name of it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
ENDS = ("eos", "eot", "eom")  # llama.cpp ends at each of these, and at those whose usual names it knows
FIX = "serve it with calora.load, or export `peft` and `dense` for a runtime that takes its tokenizer"


def add_vocabulary(writer: gguf.GGUFWriter, directory: Path, rows: int) -> None:
    """Tokens, merges, special tokens and chat template.

    Args:
        rows: of the embedding table; there may be more than tokens.

    Raises:
        CaloraError: the tokenizer is none that llama.cpp has.
    """
    path = directory / "tokenizer.json"
    about = read_json(path, FIX)
    model = about.get("model", {})
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or (about.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        raise CaloraError(path, "a byte-level BPE tokenizer", model.get("type"), FIX)
    tokens = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in about.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= rows:
        raise CaloraError(path, f"tokens below {rows}, the rows of the table", max(tokens), FIX)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pretokenizer(path, about.get("pre_tokenizer")))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([kinds.get(index, TokenType.UNUSED) for index in range(rows)])
    _add_special(writer, directory)


def pretokenizer(path: Path, about: Any) -> str:
    """llama.cpp's name of how a text is split before BPE.

    Raises:
        CaloraError: it has none for that.
    """
    parts = about.get("pretokenizers", [about]) if isinstance(about, dict) else []
    kinds = [part.get("type") for part in parts]
    plainly = bool(parts) and not parts[-1].get("add_prefix_space")
    if plainly and kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return GPT2
    if (
        plainly
        and kinds == ["Digits", "ByteLevel"]
        and parts[0].get("individual_digits")
        and parts[1].get("use_regex", True)
    ):
        return DIGITS
    if plainly and kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        split = SPLITS.get(parts[0].get("pattern", {}).get("Regex", ""))
        if split and parts[0].get("behavior") == "Isolated":
            return split
    found = " then ".join(map(str, kinds)) or "none"
    raise CaloraError(path, "a pre_tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2", found, FIX)


def _add_special(writer: gguf.GGUFWriter, directory: Path) -> None:
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # of odd templates, which are measured below
    special, tokenizer = gguf.SpecialVocab(directory, load_merges=True), load_tokenizer(directory)
    special.special_token_ids |= dict(zip(ENDS, _ends(directory, tokenizer), strict=False))
    ids = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _ends(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer in torch, the tokenizer's own first."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for file in (directory / "generation_config.json", directory / "config.json"):
        value = read_json(file, FIX).get("eos_token_id") if file.exists() else None
        found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(found))
