"""The files of an adapter folder, whoever wrote it. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from calora.common.files import check_tensors
from calora.errors import CaloraError

CONFIG, LORA, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"  # MLX: mlx-lm's weights
TOKENIZER = (  # what trainers put beside them
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt",
)  # fmt: skip


def adapter_files(directory: Path) -> tuple[Path, Path]:
    """The configuration and the weights.

    Raises:
        CaloraError: one is missing or broken; the message names folders below that hold an adapter.
    """
    config = directory / CONFIG
    if not config.exists():
        below = sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG}"))
        found = f"none; there is one in {' and in '.join(below[:3])}" if below else "no such file"
        raise CaloraError(config, "the configuration of an adapter", found, "name the folder that PEFT or mlx-lm wrote")
    weights = directory / (MLX if is_mlx(directory) else LORA)
    check_tensors(weights, "name a folder that PEFT or mlx-lm wrote")
    return config, weights


def is_mlx(directory: Path) -> bool:
    """Whether mlx-lm wrote the folder."""
    return (directory / MLX).exists() and not (directory / LORA).exists()
