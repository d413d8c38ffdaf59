"""Model families behind one narrow interface: decoder-only, encoder-decoder, and encoder classifiers.

A family turns examples into a batch, and a batch into (a) the last hidden states of each stack and (b) the
logits at the positions that predict answer tokens. Nothing else of calora knows what kind of model it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from calora.errors import CaloraError
from calora.models.tasks import Example

IGNORE = -100  # label of a position whose answer is not known (torch's cross-entropy ignores it)


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

    stacks: tuple[str, ...]

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        """Pad examples into a batch, on the model's device."""

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        """Run the model; `token_ids` [k] limits the logits to those tokens."""

    def generate(self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, as token ids without the prompt."""


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


def _token_id(model: PreTrainedModel, *names: str) -> int:
    for name in names:
        value = getattr(model.config, name, None)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            return int(value)
    return 0


def head_logits(head: nn.Module, states: Tensor, token_ids: Tensor | None) -> Tensor:
    """Logits [P, V] of states [P, H], or [P, k] of the chosen tokens: only their rows of the head are read."""
    if token_ids is None:
        logits: Tensor = head(states)
        return logits
    rows = getattr(head, "rows", None)  # a packed head unpacks only these rows
    weight = rows(token_ids, states.dtype) if rows else head.get_parameter("weight")[token_ids]
    bias = getattr(head, "bias", None)
    return F.linear(states, weight, None if bias is None else bias[token_ids])


class DecoderOnly:
    """Llama-like models. Padding stands on the right, so causality alone hides it: no attention mask is needed."""

    stacks: tuple[str, ...] = ("decoder",)

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        sequences = [[*e.prompt_ids, *e.answer_ids[:-1]] for e in examples]
        ids, mask = pad(sequences, _token_id(model, "pad_token_id", "eos_token_id"))
        positions, labels = _answer_positions(examples, [len(e.prompt_ids) - 1 for e in examples])
        return Batch({"input_ids": ids}, positions, labels, {"decoder": mask}).to(model.device)

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        decoder = model.get_decoder()
        hidden = decoder(**batch.inputs, use_cache=False).last_hidden_state
        # Gathered first: a head over a strided slice would copy its whole weight once per row.
        states = hidden[batch.positions]
        return Output({"decoder": hidden}, head_logits(model.get_output_embeddings(), states, token_ids))

    def generate(self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        ids, mask = pad([e.prompt_ids for e in examples], _token_id(model, "pad_token_id", "eos_token_id"), left=True)
        return _generate(model, ids, mask, max_new_tokens, skip=ids.shape[1])


class EncoderDecoder:
    """T5-like models: the prompt goes to the encoder, the answer to the decoder."""

    stacks: tuple[str, ...] = ("encoder", "decoder")

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        ids, mask = pad([e.prompt_ids for e in examples], _token_id(model, "pad_token_id"))
        start = _token_id(model, "decoder_start_token_id", "pad_token_id")
        decoder_ids, decoder_mask = pad(
            [[start, *e.answer_ids[:-1]] for e in examples], _token_id(model, "pad_token_id")
        )
        positions, labels = _answer_positions(examples, [0] * len(examples))
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder_ids}
        return Batch(inputs, positions, labels, {"encoder": mask, "decoder": decoder_mask}).to(model.device)

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        out = model(**batch.inputs, output_hidden_states=True, use_cache=False)
        logits = out.logits[batch.positions]
        hidden = {"encoder": out.encoder_last_hidden_state, "decoder": out.decoder_hidden_states[-1]}
        return Output(hidden, logits if token_ids is None else logits[:, token_ids])

    def generate(self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        ids, mask = pad([e.prompt_ids for e in examples], _token_id(model, "pad_token_id"))
        return _generate(model, ids, mask, max_new_tokens, skip=1)


class Classifier:
    """BERT-like models with a classification head: the labels are the vocabulary."""

    stacks: tuple[str, ...] = ("encoder",)

    def collate(self, examples: Sequence[Example], model: PreTrainedModel) -> Batch:
        ids, mask = pad([e.prompt_ids for e in examples], _token_id(model, "pad_token_id"))
        labels = torch.tensor([e.label if e.label >= 0 else IGNORE for e in examples])
        rows = torch.arange(len(examples))
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        return Batch(inputs, (rows, torch.zeros_like(rows)), labels, {"encoder": mask}).to(model.device)

    def forward(self, model: PreTrainedModel, batch: Batch, token_ids: Tensor | None) -> Output:
        out = model(**batch.inputs, output_hidden_states=True)
        return Output({"encoder": out.hidden_states[-1]}, out.logits)

    def generate(self, model: PreTrainedModel, examples: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        raise CaloraError("a classifier", "a scored task", "a generated one", "use a language model for it")


def _generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, max_new_tokens: int, skip: int) -> list[list[int]]:
    generate: Any = model.generate
    out = generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=_token_id(model, "pad_token_id", "eos_token_id"),
    )
    sequences: list[list[int]] = out[:, skip:].tolist()
    return sequences


def family_of(model: PreTrainedModel) -> Family:
    """The family of a loaded model, told by its configuration and its head."""
    if "SequenceClassification" in type(model).__name__:
        return Classifier()
    return EncoderDecoder() if model.config.is_encoder_decoder else DecoderOnly()
