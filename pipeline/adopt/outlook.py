"""What a run with each recipe would take on this machine: bytes, memory, minutes.

Bytes follow from shapes (within 2 % where a test compares them). Minutes are numbers of texts and products, divided by what a core does in a second; the
constants are those of a run of SmolLM2-135M on two cores. Memory counts what the largest stage holds. Both are good to a factor of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calora.errors import CaloraError
from pipeline.adopt.lengths import Lengths
from stages.resolve import resolve

if TYPE_CHECKING:
    from calora.preview.outline import Outline
    from calora.preview.recipes import Preview
    from calora.preview.speed import Speed

EFFICIENCY = 0.55  # of the speed of a bare product, of a pass through a model
BACKWARD = 2.0  # passes that a backward pass takes
START = 12.0  # seconds of a stage before it works: imports, loading
CORES = 0.45  # exponent: four cores are not four times as fast as one
CALIBRATION_TOKENS = 32  # of a text of the embedded corpora
WALK = 3.0  # passes through the model that a walk over its blocks takes
TUNING = 1.5  # a tuning's loss looks at every position
ONE_BY_ONE = 4.0  # a token that is written alone reads all weights for one product
CLOSED_FORM = 22.0  # of the warm start, in the unit of `Preview.second_order`
LIBRARIES = 0.7e9  # bytes of a process before any model


@dataclass(frozen=True)
class Texts:
    """How many of each split are used, and their tokens: of a prompt, of the longest, of an answer that is written."""

    sizes: dict[str, int]
    tokens: float
    most: int
    written: int = 0


@dataclass(frozen=True)
class Row:
    """A recipe: MB on disk, GB of the largest stage, minutes of compressing and of a whole run; or why it does not fit."""

    name: str
    megabytes: float = 0.0
    memory: float = 0.0
    compress: float = 0.0
    whole: float = 0.0
    refused: str = ""


def texts_of(params: Mapping[str, Any], rows: Mapping[str, int], lengths: Lengths | None) -> Texts:
    """Rows that a run uses; without data those that params.yaml allows, of forty tokens."""
    sizes = rows or params["data"]["sizes"]
    if lengths is None:
        return Texts(dict(sizes), 40.0, 160)
    return Texts(dict(sizes), lengths.mean, lengths.most, lengths.written)


def outlook(params: Mapping[str, Any], outline: Outline, texts: Texts, brought: bool) -> tuple[list[Row], Speed]:
    """A row for each recipe of params.yaml, and the speed that was measured.

    Args:
        brought: whether the user has an adapter: then no teacher is trained.
    """
    from calora.preview.recipes import preview, unit
    from calora.preview.speed import speed

    inner = max(max(layer.weight.shape) for layer in outline.layers.values())
    found = speed(outline.width, inner)
    work = Work(params, outline, texts, found, unit(outline.layers))
    rows = []
    for name, recipe in params["compress"].items():
        if name == "calibration":
            continue
        try:
            made = preview(outline, recipe)
        except CaloraError as error:
            rows.append(Row(name, refused=str(error)))
            continue
        compress = work.compress(made)
        seconds = compress + work.once(brought) + work.methods()
        memory = max(work.memory_compress(made), work.memory_train())
        rows.append(Row(name, made.bytes / 1e6, memory / 1e9, work.minutes(compress), work.minutes(seconds)))
    return rows, found


@dataclass(frozen=True)
class Work:
    """Seconds of one core that the stages take.

    Args:
        unit: multiplications of one look at the second moments.
    """

    params: Mapping[str, Any]
    outline: Outline
    texts: Texts
    speed: Speed
    unit: float

    def minutes(self, seconds: float) -> float:
        """On all cores, minutes."""
        return float(seconds / self.speed.cores**CORES / 60)

    def passes(self, texts: float, tokens: float | None = None) -> float:
        """Texts through the blocks of the model."""
        work = 2 * self.outline.linear * (self.texts.tokens if tokens is None else tokens)
        return texts * work / (EFFICIENCY * self.speed.compute * 1e9)

    def answers(self, texts: float) -> float:
        """Texts that are answered: chosen by the prompt's last token, or written token by token."""
        return self.passes(texts, self.texts.tokens + ONE_BY_ONE * self.texts.written)

    def second_order(self, multiplications: float) -> float:
        """Steps that look at second moments."""
        return 2 * multiplications / (self.speed.fp32 * 1e9)

    def training(self) -> float:
        """The steps of one training, and its looks at validation."""
        train = self.params["train"]
        looks = train["steps"] // train["eval_every"] + 1
        texts = train["steps"] * train["batch_size"] * (1 + BACKWARD)
        return START + self.passes(texts) + self.answers(looks * self.texts.sizes["validation"])

    def compress(self, made: Preview) -> float:
        """The stage `compress`."""
        seconds = START + self.second_order(made.second_order)
        seconds += self.passes(WALK * self.params["compress"]["calibration"]["texts"], CALIBRATION_TOKENS)
        if made.tuned:
            texts = made.tuned.steps * made.tuned.batch_size * (2 + BACKWARD)
            seconds += TUNING * self.passes(texts, CALIBRATION_TOKENS)
        return seconds

    def once(self, brought: bool) -> float:
        """base, teacher, small, reference: what every recipe shares."""
        sizes = self.texts.sizes
        targets = self.passes(sizes["train"] + sizes["unlabelled"])
        return 4 * START + (0 if brought else self.training()) + targets + self.answers(2 * sizes["test"])

    def methods(self) -> float:
        """inherit, distill and score of the methods that are compared."""
        total = 0.0
        resolved, packed = resolve(self.params["methods"]), self.params["evaluate"]["packed"]
        for name in self.params["compare"]:
            method = resolved[name]
            if method["start"].get("bypass"):
                total += self.second_order(CLOSED_FORM * self.unit)
            total += START + (self.training() if method["loss"] else START)
            total += START + self.answers(self.texts.sizes["test"] * (2 if name in packed else 1))
        return total

    def memory_compress(self, made: Preview) -> float:
        """Bytes: the model in bf16, a block in fp32; for a tuning two models as they compute."""
        width = 2 if self.speed.dtype == "bfloat16" else 4
        model = 2 * self.outline.parameters
        inner = max(layer.in_features for layer in self.outline.layers.values())
        block = 4 * (3 * self.outline.linear / self.outline.blocks + 4 * inner**2)
        tuned = 2 * width * self.outline.parameters if made.tuned else 0
        return LIBRARIES + max(model + block, tuned + (model if width == 4 else 0))

    def memory_train(self) -> float:
        """Bytes: the dense model, what its backward pass keeps, the adapter with its optimiser."""
        width = 2 if self.speed.dtype == "bfloat16" else 4
        train = self.params["train"]
        tokens = train["batch_size"] * self.texts.most
        kept: float = 17 * width * tokens * self.outline.width * self.outline.blocks
        adapter = 16 * 0.03 * self.outline.linear
        return float(LIBRARIES + width * self.outline.parameters + kept + adapter)
