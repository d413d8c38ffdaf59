"""Model families behind one narrow interface: decoder-only, encoder-decoder, classifiers, and encoders without a head.

A family turns examples into a batch, and a batch into (a) the last hidden states of each stack and (b) the
logits at the positions that predict answer tokens. Nothing else of calora knows what kind of model it has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from calora.errors import CaloraError
from calora.models.tasks import Example, Task

IGNORE = -100  # label of a position whose answer is not known (torch's cross-entropy ignores it)

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass. P counts answer positions over all rows, in row order."""

    inputs: dict[str, Tensor]
    positions: tuple[Tensor, Tensor]  # row [P] and column [P] of each state that predicts an answer token
    labels: Tensor  # [P] token ids, IGNORE where the answer is not known
    masks: dict[str, Tensor]  # stack -> [B, T], True at real tokens

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        rows, columns = self.positions
        inputs, masks = ({k: v.to(device) for k, v in each.items()} for each in (self.inputs, self.masks))
        return Batch(inputs, (rows.to(device), columns.to(device)), self.labels.to(device), masks)


@dataclass(frozen=True)
class Output:
    """`hidden`: stack -> last hidden states [B, T, H]; `logits`: [P, V], or [P, k] for k chosen tokens."""

    hidden: dict[str, Tensor]
    logits: Tensor


class Family(Protocol):
    """The interface that a kind of model implements."""

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        """Pad examples into a batch, on the model's device."""

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        """Run the model; the logits are its own, `token_ids` [k] limits them to those tokens."""

    def answer_ids(self, model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
        """Which logits [k] stand for the answers, on the model's device; None where no single one does: they are a row's own, have
        several tokens, or are written.

        Raises:
            CaloraError: the model cannot answer this task.
        """

    def generate(
        self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int, end: int | None = None
    ) -> list[list[int]]:
        """Greedy answers, as token ids without the prompt, each up to and with its first end token.

        Args:
            end: an end token besides the model's own: the tokenizer's, with which the answers of examples end.
        """


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Sequences of ids -> (ids [B, T], mask [B, T])."""
    width = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), width), value)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        span = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, span] = torch.tensor(sequence, dtype=torch.long)
        mask[row, span] = True
    return ids, mask


def _answer_positions(examples: Sequence[Example], starts: Sequence[int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    rows, columns, labels = [], [], []
    for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
        for offset, label in enumerate(example.answer_ids or [IGNORE]):
            rows.append(row)
            columns.append(start + offset)
            labels.append(label)
    return (torch.tensor(rows), torch.tensor(columns)), torch.tensor(labels)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Every token that ends an answer, by generation_config.json and config.json."""
    return _token_ids(model, "eos_token_id")


def pad_token(model: PreTrainedModel) -> int:
    """The token that fills up rows: the configured one, else an end token, else 0."""
    return [*_token_ids(model, "pad_token_id"), *end_tokens(model), 0][0]


def start_token(model: PreTrainedModel) -> int:
    """The token in front of a decoder's answer."""
    return [*_token_ids(model, "decoder_start_token_id"), *_token_ids(model, "bos_token_id"), pad_token(model)][0]


def _token_ids(model: PreTrainedModel, name: str) -> list[int]:
    found: list[int] = []
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config(decoder=True)):
        value = getattr(config, name, None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(found))


class _Stand(nn.Module):
    """Stands for a part of a model during one call; what it does not have itself, it has from that part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)


class _Decoder(_Stand):
    """Keeps the last hidden states [B, T, H] and hands on those at the answer positions, as [1, P, H].

    Gathered before the head: one over all positions would cost more than the blocks, and one over a strided slice
    would copy its whole weight once per row.
    """

    hidden: Tensor

    def __init__(self, part: nn.Module, positions: tuple[Tensor, Tensor]) -> None:
        super().__init__(part)
        self.positions = positions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's output with fewer states."""
        out = self.part(*args, **kwargs)
        self.hidden = out.last_hidden_state
        out["last_hidden_state"] = self.hidden[self.positions].unsqueeze(0)
        return out


class _Rows(_Stand):
    """Logits of chosen tokens: only their rows of the head are read."""

    def __init__(self, part: nn.Module, token_ids: Tensor) -> None:
        super().__init__(part)
        self.token_ids = token_ids

    def forward(self, states: Tensor) -> Tensor:
        """[1, P, H] -> [1, P, k]."""
        rows = getattr(self.part, "rows", None)  # a packed head unpacks only these rows
        weight = rows(self.token_ids, states.dtype) if rows else self.part.get_parameter("weight")[self.token_ids]
        bias = getattr(self.part, "bias", None)
        return F.linear(states, weight, None if bias is None else bias[self.token_ids])


def _has_rows(head: nn.Module | None) -> bool:
    """Whether row i of the head alone makes logit i: not so with a LoRA on it."""
    return type(head) is nn.Linear or (isinstance(head, nn.Linear) and hasattr(type(head), "rows"))


def _substituted(module: M, path: str, part: nn.Module) -> M:
    """A shallow copy with `part` at `path`. The module itself stays as it is: another thread may be using it."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    name, _, rest = path.partition(".")
    child = module.get_submodule(name)
    copied._modules[name] = _substituted(child, rest, part) if rest else part
    return copied


def _path(model: nn.Module, part: nn.Module) -> str:
    named: Iterator[tuple[str, nn.Module]] = chain(model.named_children(), model.named_modules())
    return next(name for name, module in named if module is part)


def _run(model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> tuple[Any, Tensor, Tensor]:
    """The model's own forward pass, with its head at the answer positions alone.

    So whatever the model does to its logits (Gemma's soft-capping, the scales of Cohere and Granite, BART's bias) is
    done to these.

    Returns:
        The model's output, the last hidden states [B, T, H] of its decoder, and the logits [P, V] or [P, k].
    """
    stand = _Decoder(model.get_decoder(), batch.positions)
    token_ids = None if token_ids is None else token_ids.to(batch.labels.device)
    called, head = _substituted(model, _path(model, stand.part), stand), model.get_output_embeddings()
    # An encoder-decoder may add a bias to each logit of the whole vocabulary (BART).
    if token_ids is not None and _has_rows(head) and not model.config.is_encoder_decoder:
        called, token_ids = _substituted(called, _path(model, head), _Rows(head, token_ids)), None
    out = called(**batch.inputs, use_cache=False)
    return out, stand.hidden, out.logits[0] if token_ids is None else out.logits[0][:, token_ids]


class _Language:
    """A model that says what token comes next."""

    def answer_ids(self, model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
        ids = task.answer_token_ids(tokenizer)
        return None if ids is None else torch.tensor(ids, device=model.device)


class DecoderOnly(_Language):
    """Llama-like models. Padding stands on the right, so causality alone hides it: no attention mask is needed."""

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        sequences = [[*e.prompt_ids, *e.answer_ids[:-1]] for e in examples]
        ids, mask = pad(sequences, pad_token(model))
        positions, labels = _answer_positions(examples, [len(e.prompt_ids) - 1 for e in examples])
        return Batch({"input_ids": ids}, positions, labels, {"decoder": mask}).to(model.device)

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        _, hidden, logits = _run(model, batch, token_ids)
        return Output({"decoder": hidden}, logits)

    def generate(
        self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int, end: int | None = None
    ) -> list[list[int]]:
        ids, mask = pad([e.prompt_ids for e in examples], pad_token(model), left=True)
        return _generate(model, ids, mask, max_new_tokens, end, skip=ids.shape[1])


class EncoderDecoder(_Language):
    """T5-like models: the prompt goes to the encoder, the answer to the decoder."""

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        ids, mask = pad([e.prompt_ids for e in examples], pad_token(model))
        sequences = [[start_token(model), *e.answer_ids[:-1]] for e in examples]
        decoder_ids, decoder_mask = pad(sequences, pad_token(model))
        positions, labels = _answer_positions(examples, [0] * len(examples))
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder_ids}
        return Batch(inputs, positions, labels, {"encoder": mask, "decoder": decoder_mask}).to(model.device)

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        out, hidden, logits = _run(model, batch, token_ids)
        return Output({"encoder": out.encoder_last_hidden_state, "decoder": hidden}, logits)

    def generate(
        self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int, end: int | None = None
    ) -> list[list[int]]:
        ids, mask = pad([e.prompt_ids for e in examples], pad_token(model))
        return _generate(model, ids, mask, max_new_tokens, end, skip=1)


class Classifier:
    """BERT-like models with a classification head: the labels are the vocabulary, in the order of a task's answers."""

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        ids, mask = pad([e.prompt_ids for e in examples], pad_token(model))
        labels = torch.tensor([e.label if e.label >= 0 else IGNORE for e in examples])
        rows = torch.arange(len(examples))
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        return Batch(inputs, (rows, torch.zeros_like(rows)), labels, {"encoder": mask}).to(model.device)

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        out = model(**batch.inputs, output_hidden_states=True)
        return Output({"encoder": out.hidden_states[-1]}, out.logits)

    def answer_ids(self, model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
        labels = model.config.num_labels
        if not task.fixed or len(task.answers) != labels:
            found = f"{len(task.answers) or 'no'} answers" + ", a row's own" * (task.scored and not task.fixed)
            fix = f"give it {labels} answers, in the order of the head's labels, or use another base"
            raise CaloraError(f"task {task.name}, on a classifier", f"{labels} answers, as its head has", found, fix)
        return torch.arange(labels, device=model.device)

    def generate(
        self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int, end: int | None = None
    ) -> list[list[int]]:
        found, fix = f"{type(model).__name__}, which writes none", "use a language model for a generated task"
        raise CaloraError("generate", "a model that writes text", found, fix)


class Encoder(Classifier):
    """BERT-like models without a head: hidden states alone, which can be compressed and distilled; nothing is answered."""

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        hidden = model(**batch.inputs).last_hidden_state
        return Output({"encoder": hidden}, hidden.new_zeros(len(hidden), 0))

    def answer_ids(self, model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
        if task.scored:
            raise CaloraError(
                f"task {task.name}, on {type(model).__name__}",
                "a model with a head",
                "hidden states alone",
                f"put one on it: AutoModelForSequenceClassification.from_pretrained(folder, num_labels={len(task.answers)})"
                ".save_pretrained(another)",
            )
        return torch.arange(0, device=model.device)


def _generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, max_new_tokens: int, end: int | None, skip: int
) -> list[list[int]]:
    ends = end_tokens(model) + ([] if end is None else [end])
    plain: Any = copy.copy(model)  # `generate` reads what an argument leaves open from the model's generation_config
    plain.generation_config = greedy(model, max_new_tokens, ends)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
    out = plain.generate(**inputs, generation_config=plain.generation_config)
    return [_cut(sequence, ends) for sequence in out[:, skip:].tolist()]


def greedy(model: PreTrainedModel, max_new_tokens: int, ends: Sequence[int]) -> GenerationConfig:
    """The highest logit at each position, up to a token of `ends`: nothing else of generation_config.json has a say."""
    start = {"decoder_start_token_id": start_token(model)} if model.config.is_encoder_decoder else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends) or None,
        pad_token_id=pad_token(model),
        **start,
    )


def _cut(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Up to and with the first end token: what follows is padding."""
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: at + 1]


def family_of(model: PreTrainedModel) -> Family:
    """The family of a loaded model, told by its configuration and its head.

    Raises:
        CaloraError: it reads something else than text, is composed of several models, or has another head.
    """
    name, config = type(model).__name__, model.config
    text = model.main_input_name == "input_ids" and not config.sub_configs
    if text and "SequenceClassification" in name and not config.is_encoder_decoder:
        return Classifier()
    if text and model.can_generate() and hasattr(model, "get_decoder"):
        return EncoderDecoder() if config.is_encoder_decoder else DecoderOnly()
    if text and model.base_model is model and not config.is_encoder_decoder:
        return Encoder()
    expected = "a text model with the head of a language model or of a classifier, or a bare encoder"
    heads = "...ForCausalLM, ...ForConditionalGeneration or ...ForSequenceClassification"
    fix = f"set `architectures` in its config.json to {heads}" if text else "use a base that is one text model"
    found = "another head" if text else "several models, or other inputs"
    raise CaloraError(f"model {name}", expected, found, fix)
