"""A model without its weights: its parts and sizes, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from calora.errors import CaloraError
from calora.models.anatomy import check_known, linear_layers, stacks
from calora.models.families import Classifier, Encoder, family_of
from calora.models.loading import load_tokenizer, model_class
from calora.models.tasks import Task, positions
from calora.models.uniform import uniform

GGUF = ".gguf"


@dataclass(frozen=True)
class Outline:
    """An empty model (on the meta device), and its tokenizer.

    Args:
        model: with the shapes of all tensors and the values of none.
        tokenizer: the folder's own.
    """

    model: PreTrainedModel
    tokenizer: Any

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers of the blocks, by name."""
        return linear_layers(self.model)

    @property
    def parts(self) -> list[str]:
        """Last parts of the layers' names, each once: what `targets` can name."""
        return list(dict.fromkeys(name.rpartition(".")[2] for name in self.layers))

    @property
    def blocks(self) -> int:
        """Transformer blocks, of all stacks."""
        return sum(len(stack) for stack in stacks(self.model).values())

    @property
    def parameters(self) -> int:
        """Numbers in all, a tied table once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def linear(self) -> int:
        """Numbers in the linear layers of the blocks: what is compressed."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return int(self._tables[0].shape[1])

    @property
    def vocabulary(self) -> int:
        """Rows of the input table."""
        return int(self._tables[0].shape[0])

    @property
    def tables(self) -> int:
        """Numbers in the input table and the head; once where they are tied."""
        return sum({id(weight): weight.numel() for weight in self._tables}.values())

    @property
    def _tables(self) -> list[Tensor]:
        ends: list[Any] = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return [end.weight for end in ends if end is not None]  # a classifier's head is no table

    @property
    def kind(self) -> str:
        """How it answers."""
        if isinstance(family_of(self.model), Classifier):
            return f"classifier of {self.model.config.num_labels} labels"
        return "encoder-decoder" if self.model.config.is_encoder_decoder else "decoder-only"

    @property
    def reads(self) -> int | None:
        """Most tokens that it has positions for; None where it names no such number."""
        return positions(self.model.config)

    @property
    def chat(self) -> bool:
        """Whether its tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def check_answers(self, task: Task) -> None:
        """Raise `CaloraError` unless the model can give the answers of a task, and tell them apart."""
        family_of(self.model).answer_ids(self.model, task, self.tokenizer)


def outline(path: Path) -> Outline:
    """The outline of a model folder (its weights may be missing), or of a GGUF file.

    Raises:
        CaloraError: it is no model that calora compresses: the configuration, an encoder, experts.
    """
    model = _of_gguf(path) if path.suffix == GGUF else _of_folder(path)
    family = family_of(model)
    if isinstance(family, Encoder) or (not isinstance(family, Classifier) and model.get_output_embeddings() is None):
        found = f"{type(model).__name__}, which answers nothing"
        fix = "name another base, or give it a classifier's head first (docs/families.md)"
        raise CaloraError(path, "a language model, or an encoder with a head", found, fix)
    model.tie_weights()
    uniform(model)
    check_known(model)
    return Outline(model, _tokenizer(path))


def _of_folder(path: Path) -> PreTrainedModel:
    file = path / "config.json"
    if not file.exists():
        raise CaloraError(path, "a model folder with config.json", "none", "name the folder that save_pretrained wrote")
    config = _read(file, lambda: AutoConfig.from_pretrained(path, local_files_only=True))
    if hasattr(config, "quantization_config"):  # its dense view is what would stand for the base
        del config.quantization_config
    cls: Any = model_class(config, path)
    model: PreTrainedModel = _read(file, lambda: _empty(cls, config))
    return model


def _of_gguf(path: Path) -> PreTrainedModel:
    config = _read(path, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _empty(cls: Any, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = cls(config)
    return model


def _read(file: Path, act: Any) -> Any:
    """What transformers makes of a file; its many kinds of errors are one line."""
    try:
        return act()
    except CaloraError:
        raise
    except Exception as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CaloraError(file, "a model that transformers knows", told, "name a supported base") from None


def _tokenizer(path: Path) -> Any:
    if path.suffix == GGUF:
        return _read(path, lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
    return load_tokenizer(path)
