"""The README.md of an exported folder: what is in it, what is exact, what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from calora.device.folder import BASE, DENSE, PEFT, is_compressed

NAMES = {"gguf": "llama.cpp", "peft": "transformers and PEFT"}


def export_card(about: Mapping[str, Any]) -> str:
    """The card of a folder whose manifest.json says `about`."""
    title = f"# {'A compressed' if is_compressed(about) else 'An uncompressed'} model and its adapters"
    parts = [title, _files(about), _adapters(about), _exactness(about), _scores(about), _use(about)]
    data = ModelCardData(tags=["calora", "lora", "compression", *(["gguf"] if about["base"] else [])])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def _files(about: Mapping[str, Any]) -> str:
    rows = [f"| `{name}` | {entry['bytes'] / 1e6:.1f} |" for name, entry in about["files"].items()]
    return "\n".join(["| file | MB |", "|---|---:|", *rows])


def _adapters(about: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {one['task']['name']} | {one['method'] or ''} |" for name, one in about["adapters"].items()]
    return "\n".join(["| adapter | task | method |", "|---|---|---|", *rows]) if rows else ""


def _exactness(about: Mapping[str, Any]) -> str:
    base = about["base"]
    if not base:
        return ""
    types = ", ".join(f"{count} {name}" for name, count in base["types"].items())
    if not base["rounded"]:
        return f"Every weight of `{BASE}` is the model's, to the bit ({types})."
    rows = [
        f"| `{layer}` | {one['was']} | {one['type']} | {one['error']:.4f} |" for layer, one in base["rounded"].items()
    ]
    told = f"**{len(rows)} tensors of `{BASE}` were rounded** ({types}), as was asked; the others are the model's, to the bit."
    return "\n".join([told, "", "| layer | was | is | relative error |", "|---|---|---|---:|", *rows])


def _scores(about: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in about["adapters"].items():
        for kind, score in entry["scores"].items():
            low, high = score["difference"]["ci"]
            rows.append(
                f"| {name} | {NAMES[kind]} | {score['items']} | {score['accuracy']['value']:.4f} | {score['torch']:.4f} "
                f"| {score['difference']['value']:+.4f} [{low:+.4f}, {high:+.4f}] | {score['changed']} |"
            )
            if score.get("tokens"):
                same = score["tokens"]
                rows[-1] += f" {same['same']} of {same['prompts']} |"
            else:
                rows[-1] += " |"
    missing = [name for name, entry in about["adapters"].items() if not entry["scores"]]
    told = f"Not scored (no test rows were given): {', '.join(missing)}." if missing else ""
    if not rows:
        return told
    head = "| adapter | runtime | test items | accuracy | torch | difference, 95 % | items that changed | prompts with the same tokens |"
    return "\n".join([head, "|---|---|---:|---:|---:|---|---:|---|", *rows, *(["", told] if told else [])])


def _use(about: Mapping[str, Any]) -> str:
    lines = []
    if about["base"]:
        first = next(iter(about["adapters"].values()), about["base"])
        loras = " ".join(f"--lora {file}" for file in first["apply"])
        lines += ["With llama.cpp (all of `apply` in manifest.json, and no other LoRA):", "", "```console"]
        lines += [f"$ llama-server --model {BASE} {loras} --host 127.0.0.1", "```"]
    if any(entry["peft"] for entry in about["adapters"].values()):
        pairs = " ".join(f"{name}={PEFT}/{name}" for name in about["adapters"])
        rank = max(entry["peft"]["rank"] for entry in about["adapters"].values())
        lines += ["", "With vLLM:", "", "```console"]
        lines += [f"$ vllm serve {DENSE} --enable-lora --max-lora-rank {_allowed(rank)} --lora-modules {pairs}", "```"]
    return "\n".join(lines)


def _allowed(rank: int) -> int:
    """The next rank that vLLM has room for."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
