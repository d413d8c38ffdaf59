"""params.yaml as typed, checked values. Defaults live in params.yaml alone: every key must be there, no other may be.

This file checks and never computes, so it is no dependency of a stage; the values that it reads are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from calora.errors import CaloraError
from calora.models.tasks import Likelihood
from stages.resolve import resolve
from stages.tasks import filled

PARAMS = Path("params.yaml")
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


def _plain(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9_-]+", name):  # DVC and PEFT read a dot as nesting
        raise ValueError(f"a name of letters, digits, _ and - alone ({name!r} is none)")
    return name


Name = Annotated[str, AfterValidator(_plain)]


# Folders of models/ that are no method's.
TAKEN = (
    "base",
    "small",
    "small_lora",
    "teacher",
    "targets",
    "labels",
    "compressed",
    "taken",
    "brought",
    "methods",
    "written",
    "inherited",
    "evaluated",
    "export",
)


class Section(BaseModel):
    """A section of params.yaml: no unknown key, no missing one, no silent conversion between kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PyPI(Section):
    """A file inside a package of the Python Package Index, by exact version and hash."""

    source: Literal["pypi"]
    package: str
    version: str
    sha256: Sha256
    member: str


class Part(Section):
    """A file inside a package, by exact version and hash."""

    package: str
    version: str
    sha256: Sha256
    member: str


class Parts(Section):
    """A file in several packages: `member` is its name, `sha256` its hash; `parts` are joined in their order."""

    source: Literal["pypi"]
    member: str
    sha256: Sha256
    parts: Annotated[list[Part], Field(min_length=1)]


class Hub(Section):
    """A model repository of the Hugging Face hub, at one commit; `sha256` is the fingerprint of its weights."""

    source: Literal["hub"]
    repo: str
    revision: Commit
    sha256: Sha256


class Folder(Section):
    """A model folder or a GGUF file on this machine; `sha256` is the fingerprint of its weights, of a GGUF file its hash."""

    source: Literal["path"]
    path: str
    sha256: Sha256


def _kind(given: Any) -> str:
    """The tag of a model's source."""
    source = given.get("source") if isinstance(given, dict) else getattr(given, "source", None)
    return "joined" if source == "pypi" and isinstance(given, dict) and "parts" in given else str(source)


ModelSource = Annotated[
    Annotated[PyPI, Tag("pypi")]
    | Annotated[Parts, Tag("joined")]
    | Annotated[Hub, Tag("hub")]
    | Annotated[Folder, Tag("path")],
    Discriminator(_kind, custom_error_type="source", custom_error_message="a source among pypi, hub and path"),
]


class Archive(Section):
    """A package that holds an archive of corpora."""

    package: str
    version: str
    sha256: Sha256
    member: str


class Prompted(Section):
    """What every data set says of its task; of `likelihood` and `metrics` see `calora.models.tasks.Task`, which has their defaults."""

    prompt: str
    answers: list[str]
    max_tokens: Positive
    max_new_tokens: Positive
    likelihood: Likelihood | None = None
    metrics: Annotated[list[Literal["accuracy", "f1", "macro_f1", "matthews", "em"]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _a_choice(self) -> Self:
        if len(self.answers) == 1 and "{" not in self.answers[0]:
            expected = (
                "two answers or more, one with the column that holds a list of them, or none (a generated answer)"
            )
            raise ValueError(expected)
        return self

    def has_labels(self, split: str) -> bool:
        """Whether the texts of a split have labels, some at least."""
        return True


Value = str | int | bool
Names = Annotated[list[str], Field(min_length=1)]  # the first of them that there is


class LabelColumns(Section):
    """The label's column where the files name it differently; it is as in train where it is left out.

    `train: null`: the training texts have no labels.
    """

    train: str | None
    validation: str | None = None
    test: str | None = None


class Columned(Prompted):
    """Rows with named columns in splits of their own; validation and test may be null: then they are split off train.

    `label` names the column of the label or of the answer (a list: the first that there is; null: there are no labels);
    `labels` are its values, in the order of `answers` (a list in it: values that mean the same). `columns` says under which names files have
    columns of the prompt and the answers that they call otherwise. `missing` are values of the label that stand for none,
    `incomplete` is what becomes of a row without one of the texts.
    """

    label: str | Names | LabelColumns | None
    labels: list[Value | Annotated[list[Value], Field(min_length=1)]]
    columns: dict[str, Names] = {}
    missing: list[Value] = []
    incomplete: Literal["refuse", "leave_out"] = "refuse"

    def labels_of(self, split: str) -> list[str]:
        """The names that the label's column may have in the file of a split; none where its texts have no labels."""
        label = self.label
        if isinstance(label, LabelColumns):
            label = getattr(label, split) or label.train
        return [label] if isinstance(label, str) else label or []

    def has_labels(self, split: str) -> bool:
        """Whether the file of a split has a column of labels."""
        return bool(self.labels_of(split))

    @model_validator(mode="after")
    def _a_label_each(self) -> Self:
        listed = len(self.answers) == 1  # as many answers as a row has
        if isinstance(self.label, LabelColumns) and self.label.train is self.label.test is None:
            raise ValueError("a column of labels in the test file, or `label: null` where no file has any")
        brought = bool(self.answers) and all("{" in answer for answer in self.answers)
        if not self.labels and (self.label is None or brought):  # a row's own: the label is the right one's text
            return self
        if len(self.labels) != len(self.answers) and not listed:
            raise ValueError(f"as many labels as answers ({len(self.labels)} labels, {len(self.answers)} answers)")
        return self


class Scores(Prompted):
    """Lines `id, score, text`, split by document; the label is the sign of the score."""

    source: Literal["scores"]
    archive: str
    member: str
    neutral: Weight


class Files(Columned):
    """Files inside own/ (jsonl, json, csv, tsv, each as .gz too, and parquet), one a split; of a list the first that there is.

    `header` names the columns of csv and tsv files that have no line of names.
    """

    source: Literal["files"]
    header: Names | None = None
    train: str | Names
    validation: str | Names | None
    test: str | Names | None


class HubData(Columned):
    """A dataset repository of the Hugging Face hub, at one commit; train, validation and test are names of its splits."""

    source: Literal["hub"]
    repo: str
    revision: Commit
    subset: str | None
    train: str
    validation: str | None
    test: str | None


# `like` names an entry of stages/tasks.yaml, which says the rest (`stages.tasks`).
DataSet = Annotated[Scores | Files | HubData, Field(discriminator="source"), BeforeValidator(filled)]
ANY_SET: TypeAdapter[Scores | Files | HubData] = TypeAdapter(DataSet)


class Split(Section):
    """Shares of the documents."""

    validation: Annotated[float, Field(gt=0, lt=0.5)]
    test: Annotated[float, Field(gt=0, lt=0.5)]


class Sizes(Section):
    """Most rows of each split."""

    train: Positive
    unlabelled: Annotated[int, Field(ge=0)]
    validation: Positive
    test: Positive


class Data(Section):
    """Where the tasks' rows come from."""

    split: Split
    sizes: Sizes
    archives: dict[str, Archive]
    sets: dict[Name, DataSet]

    @model_validator(mode="after")
    def _known_archives(self) -> Self:
        if "calibration" in self.sets:
            raise ValueError("another name than 'calibration' for a data set (data/calibration is taken)")
        for name, source in self.sets.items():
            if isinstance(source, Scores) and source.archive not in self.archives:
                known = ", ".join(self.archives)
                raise ValueError(f"an archive among {known} for the data set '{name}' ('{source.archive}' is none)")
        return self


def without_unread(raw: Any) -> Any:
    """params.yaml without the wrong entries of data.sets that neither a task of this run nor the calibration reads."""
    match raw:
        case {"tasks": list(tasks), "data": {"sets": dict(sets)} as data}:
            read = {name: entry for name, entry in sets.items() if name in tasks or _is_right(entry)}
            return {**raw, "data": {**data, "sets": read}}
    return raw


def _is_right(entry: Any) -> bool:
    if isinstance(entry, Mapping) and entry.get("source") == "scores":
        return True  # the calibration reads it: a mistake in it has to be named
    try:
        ANY_SET.validate_python(entry)
    except ValidationError:
        return False
    return True


class Imported(Section):
    """An adapter in a folder inside own/; `sha256`, the fingerprint of its weights, may be left out."""

    path: str
    sha256: Sha256 | None = None


class ImportedHub(Section):
    """An adapter of a repository of the Hugging Face hub, at one commit, perhaps in a folder of it."""

    repo: str
    revision: Commit
    folder: str | None = None
    sha256: Sha256 | None = None


def _place_of(entry: Any) -> str:
    hub = "repo" in entry if isinstance(entry, dict) else isinstance(entry, ImportedHub)
    return "[hub]" if hub else "[own]"


class Written(Section):
    """The texts that the teacher writes for a method with `texts: written`."""

    texts: Positive
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tokens: Positive
    by: Literal["base", "teacher"]
    leads: dict[str, str]


class Fit(Section):
    """The LoRA that stands in for an adapter of another kind."""

    rank: Positive
    texts: Positive


AnyImported = Annotated[
    Annotated[Imported, Tag("[own]")] | Annotated[ImportedHub, Tag("[hub]")], Discriminator(_place_of)
]


class Teacher(Section):
    """The LoRA on the uncompressed LLM."""

    adapters: dict[str, AnyImported]
    fit: Fit
    written: Written
    rank: Positive
    lora_alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[list[str], Field(min_length=1)]
    top_k: Positive


class Train(Section):
    """The schedule of every training."""

    steps: Positive
    batch_size: Positive
    lr: Annotated[float, Field(gt=0, lt=1)]
    warmup: Annotated[int, Field(ge=0)]
    clip: Annotated[float, Field(gt=0)]
    eval_every: Positive
    eval_batch_size: Positive
    checkpoint_seconds: Annotated[float, Field(gt=0, le=60)]
    base: Literal["dense", "packed"]
    gradient_checkpointing: bool
    accumulation: Positive

    @model_validator(mode="after")
    def _warmup_ends(self) -> Train:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be below steps ({self.steps}), found {self.warmup}")
        return self


class Calibration(Section):
    """The sample of unlabelled texts that compression looks at."""

    texts: Positive
    tuning: Annotated[int, Field(ge=0)]
    prompts: Annotated[float, Field(ge=0, le=1)]
    seed: int


class Lora(Section):
    """The shape of a fresh LoRA."""

    targets: Annotated[list[str], Field(min_length=1)]
    rank: Positive
    lora_alpha: Annotated[float, Field(gt=0)]


class Bypass(Section):
    """The recovery bypass and its start."""

    targets: Annotated[list[str], Field(min_length=1)]
    rank: Positive | None
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    activation: Literal["gelu", "relu", "silu", "identity"]
    start: Literal["weighted_error", "zero"]
    format: Literal["bf16", "int8", "int4"]

    @model_validator(mode="after")
    def _one_size(self) -> Bypass:
        if (self.rank is None) == (self.budget is None):
            raise ValueError(f"either a rank or a budget, and null for the other ({self.rank} and {self.budget})")
        if self.budget is not None and self.start == "zero":
            raise ValueError("a budget goes with `start: weighted_error`, by which it is shared out: give a rank")
        return self

    @model_validator(mode="after")
    def _even(self) -> Bypass:
        if self.rank and self.start == "weighted_error" and self.activation != "identity" and self.rank % 2:
            raise ValueError(f"rank must be even for the warm start with {self.activation}, found {self.rank}")
        return self


class Start(Section):
    """What an adapter is before any step."""

    lora: Literal["inherited", "fresh", "none"] | Lora
    budget: Start | str | None
    bypass: Bypass | None
    scales: bool
    calibration_texts: Positive

    @model_validator(mode="after")
    def _one_shape(self) -> Start:
        if self.budget is not None and (self.lora != "fresh" or self.scales):
            raise ValueError("budget goes with `lora: fresh` and `scales: false`")
        return self


class Loss(Section):
    """The weights of the loss: L = task L_task + factor (alpha L_hidden + kl L_kl)."""

    task: Weight
    alpha: Weight
    alpha_encoder: Weight
    kl: Weight
    labelled: Weight
    unlabelled: Weight
    unlabelled_every: Annotated[int, Field(ge=0)]
    labels: int | Literal["all"]  # last: its check looks at the others

    @field_validator("labels", mode="plain")
    @classmethod
    def _something_to_learn_from(cls, labels: Any, info: ValidationInfo) -> Any:
        if labels != "all" and (not isinstance(labels, int) or isinstance(labels, bool) or labels < 0):
            raise ValueError("all, or a number of labels, 0 or more")
        others = info.data  # without those that are wrong: they have an error of their own
        unlabelled = all(others.get(name, 1) for name in ("unlabelled", "unlabelled_every"))
        teacher = any(others.get(name, 1) for name in ("alpha", "alpha_encoder", "kl"))
        if labels == 0 and not (unlabelled and teacher):
            expected = "labels, or a loss that looks at the teacher on unlabelled texts (unlabelled_every; alpha, kl)"
            raise ValueError(expected)
        return labels


class Method(Section):
    """A way to adapt a compressed model; without a loss no step is taken."""

    start: Start
    loss: Loss | Literal["labels"] | None
    texts: Literal["task", "written"]

    @model_validator(mode="after")
    def _no_label_of_a_written_text(self) -> Self:
        if self.texts == "written" and not (
            self.loss is None or (isinstance(self.loss, Loss) and self.loss.labels == 0)
        ):
            raise ValueError(
                "`texts: written` goes with `loss: {labels: 0}` or `loss: null`: such texts have no labels"
            )
        return self


class Evaluate(Section):
    """How the test set is scored."""

    batch_size: Positive
    draws: Annotated[int, Field(ge=100)]
    ours: str
    baseline: str
    packed: list[str]


class Export(Section):
    """Folders for other runtimes."""

    recipes: list[str]
    kinds: Annotated[list[Literal["gguf", "peft"]], Field(min_length=1)]
    adapter_type: Literal["BF16", "F16", "F32", "Q8_0"]
    recovery: Literal["beside", "inside"]
    requantise: Literal["Q8_0", "Q5_0", "Q4_0", "BF16", "F16", "F32"] | None


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "bfloat16", "float32"]
    tasks: Annotated[list[str], Field(min_length=1)]
    recipes: Annotated[list[str], Field(min_length=1)]
    compare: Annotated[list[str], Field(min_length=1)]
    base: ModelSource
    small: ModelSource
    data: Data
    teacher: Teacher
    train: Train
    compress: dict[Name, Any]
    methods: dict[Name, Any]
    evaluate: Evaluate
    export: Export

    @model_validator(mode="before")
    @classmethod
    def _others_wrong_sets(cls, raw: Any) -> Any:
        return without_unread(raw)

    @property
    def calibration(self) -> Calibration:
        """compress.calibration."""
        return Calibration.model_validate(self.compress["calibration"])

    @property
    def compressions(self) -> dict[str, Any]:
        """The recipes of `compress`, by name."""
        return {name: recipe for name, recipe in self.compress.items() if name != "calibration"}

    @model_validator(mode="after")
    def _names_exist(self) -> Params:
        if "calibration" not in self.compress:
            raise ValueError("compress.calibration is missing")
        _checked(Calibration, self.compress["calibration"], "compress.calibration")
        for kind, wanted, known in (
            ("tasks", self.tasks, list(self.data.sets)),
            ("recipes", self.recipes, list(self.compressions)),
            ("compare", self.compare, list(self.methods)),
            ("export.recipes", self.export.recipes, self.recipes),
            ("evaluate.packed", self.evaluate.packed, list(self.methods)),
            ("evaluate", [self.evaluate.ours, self.evaluate.baseline], list(self.methods)),
        ):
            for name in wanted:
                if name not in known:
                    raise ValueError(f"{kind} names '{name}'; known: {', '.join(known)}")
            if len(set(wanted)) < len(wanted):
                raise ValueError(f"{kind} names one entry twice: {', '.join(wanted)}")
        if self.export.recipes and self.evaluate.ours not in self.compare:
            raise ValueError(f"export.recipes needs the adapters of evaluate.ours, '{self.evaluate.ours}', in compare")
        for name, entry in resolve(self.methods).items():
            if name in TAKEN:
                raise ValueError(
                    f"methods.{name}: models/{name} is a folder of the pipeline's own: choose another name"
                )
            _check_method(name, entry)
        self._check_unlabelled()
        stages = Counter(map("-".join, product(self.tasks, self.recipes, self.compare)))  # as DVC names them
        name, times = stages.most_common(1)[0]
        if times > 1:
            raise ValueError(f"tasks, recipes and compare make two stages '{name}': write a name with _ instead of -")
        return self

    def _check_unlabelled(self) -> None:
        """Raise ValueError where a task without labels to learn from has no adapter, or a method that asks for labels."""
        asks = [name for name, entry in resolve(self.methods).items() if asks_for_labels(entry)]
        for task in self.tasks:
            if self.data.sets[task].has_labels("train"):
                continue
            if task not in self.teacher.adapters:
                raise ValueError(
                    f"data.sets.{task} has no labels to train a teacher on: name an adapter in teacher.adapters.{task}"
                )
            if wrong := [name for name in self.compare if name in asks]:
                fit = ", ".join(name for name in self.methods if name not in asks)
                raise ValueError(
                    f"compare names {', '.join(wrong)}, which learn from labels, and data.sets.{task} has none to learn from: name some of {fit}"
                )


def asks_for_labels(entry: Mapping[str, Any]) -> bool:
    """Whether a resolved method learns from labels of the task's texts."""
    loss = entry["loss"]
    return loss == "labels" or (isinstance(loss, Mapping) and loss["labels"] != 0)


def _check_method(name: str, entry: dict[str, Any]) -> None:
    """Raise ValueError unless a resolved method is whole and its values are in their ranges."""
    start = entry.get("start")
    plain = (
        {**start, "budget": None if start.get("budget") is None else "another"} if isinstance(start, dict) else start
    )
    _checked(Method, {**entry, "start": plain}, f"methods.{name}")


def _checked(kind: type[Section], value: object, where: str) -> None:
    """Raise ValueError, which names the first wrong key, unless the value is whole and in its ranges."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *(str(part) for part in first["loc"] if part not in ("Lora", "Loss"))])
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place}: {said}, found {first['input']!r:.80}") from None


def load_params(path: Path = PARAMS) -> Params:
    """Read and check params.yaml; the first mistake found is raised as a `CaloraError` that names its key."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CaloraError(path, "the pipeline's parameters", "no such file", "run from the project's folder") from None
    except yaml.YAMLError as error:
        raise CaloraError(path, "valid YAML", " ".join(str(error).split()), "mend the line") from None
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise _told_shortly(error, path) from None


def _told_shortly(error: ValidationError, path: Path) -> CaloraError:
    first = error.errors()[0]
    key = ".".join(
        str(part)
        for part in first["loc"]
        if part not in ("pypi", "joined", "hub", "path", "scores", "files", "[key]", "[own]", "[hub]")
    )
    found = "nothing" if first["type"] == "missing" else repr(first["input"])
    if first["type"] == "extra_forbidden":
        return CaloraError(f"{path}: {key}", "no such key", found[:80], "remove it, or correct its spelling")
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        return CaloraError(f"{path}: {key}" if key else path, expected, "this value", "mend it in params.yaml")
    if first["type"] == "missing":
        return CaloraError(f"{path}: {key}", "a value", "nothing", "add the key; the README's params.yaml has it")
    return CaloraError(f"{path}: {key}", expected, found[:80], "mend it in params.yaml")
