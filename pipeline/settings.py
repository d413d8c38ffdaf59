"""What a run can change: the fields of the form, of the command line and of the REST call, and the keys that they set."""

# No postponed annotations here: Prefect builds its form from the types themselves.
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    model_serializer,
)
from pydantic.json_schema import SkipJsonSchema

from calora.errors import CaloraError
from pipeline.values import editor, quoted

ROOT = Path(__file__).resolve().parents[1]
_PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
TASKS = tuple(_PARAMS["data"]["sets"])
RECIPES = tuple(name for name in _PARAMS["compress"] if name != "calibration")
METHODS = tuple(_PARAMS["methods"])
NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$"

Empty = SkipJsonSchema[None]  # may be left out, and the form shows nothing of it
TaskName = Annotated[Literal[TASKS], WithJsonSchema({"type": "string", "enum": list(TASKS)})]  # type: ignore[valid-type]
RecipeName = Annotated[Literal[RECIPES], WithJsonSchema({"type": "string", "enum": list(RECIPES)})]  # type: ignore[valid-type]
MethodName = Annotated[Literal[METHODS], WithJsonSchema({"type": "string", "enum": list(METHODS)})]  # type: ignore[valid-type]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Weight = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Size = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Activation = Literal["gelu", "relu", "silu", "identity"]


def without_nulls(schema: dict[str, Any]) -> None:
    """No field has null for a default: the form would send it, and it would be refused."""
    for field in schema["properties"].values():
        if field.get("default", "") is None:
            del field["default"]


class Settings(BaseModel):
    """A field that is left empty stays as params.yaml has it."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=without_nulls)

    tasks: list[TaskName] | Empty = Field(None, description="Tasks to carry over.")
    recipes: list[RecipeName] | Empty = Field(None, description="Ways to compress.")
    methods: list[MethodName] | Empty = Field(None, description="Ways to adapt a compressed model, side by side.")
    alpha: Weight | Empty = Field(
        None, description="CA-LoRA: weight of the distance of the last hidden states, 0 to 1000."
    )
    budget: Size | Empty = Field(None, description="CA-LoRA: MB of the bypass on disk, above 0 to 1000.")
    lora_rank: Count | Empty = Field(None, description="Rank of the teacher's LoRA.")
    activation: Activation | Empty = Field(
        None, description="CA-LoRA: activation of the bypass; identity: a linear one."
    )
    steps: Count | Empty = Field(None, description="Optimiser steps of every training.")
    seed: Seed | Empty = Field(None, description="Of batches, initial weights and bootstrap.")
    other: dict[str, Any] = Field({}, description='Any other key of params.yaml, such as {"train.lr": 0.002}.')

    @model_serializer(mode="wrap")
    def _filled(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only the fields that are filled in."""
        return {name: value for name, value in serialise(self).items() if value is not None}


PREFECT = {  # its state inside the project, nothing sent home
    "PREFECT_HOME": str(ROOT / ".prefect"), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}  # fmt: skip
KEYS = {
    "tasks": "tasks", "recipes": "recipes", "methods": "compare", "alpha": "methods.calora.loss.alpha",
    "budget": "methods.calora.start.bypass.budget", "activation": "methods.calora.start.bypass.activation",
    "lora_rank": "teacher.rank", "steps": "train.steps", "seed": "seed",
}  # fmt: skip


def checked(values: dict[str, Any], fix: str, names: Mapping[str, str] | None = None) -> Settings:
    """The fields, checked.

    Raises:
        CaloraError: a value is impossible; it names the first such field (as `names` calls it), and `fix`.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = (names or {}).get(str(first["loc"][0])) or ".".join(str(part) for part in first["loc"])
        raise CaloraError(where, first["msg"], json.dumps(first["input"]), fix) from None


def changes(settings: Settings) -> dict[str, Any]:
    """Key of params.yaml, with dots -> its value in this run."""
    values = settings.model_dump(exclude={"other"})
    return {KEYS[name]: value for name, value in values.items() if value not in (None, [])} | settings.other


def write_params(folder: Path, changed: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Set keys in params.yaml, whose comments stay; return those that really changed, with their old and new values.

    Raises:
        CaloraError: params.yaml has no such key.
    """
    yaml, path = editor(), folder / "params.yaml"
    document = yaml.load(path.read_text(encoding="utf-8"))
    done: dict[str, tuple[Any, Any]] = {}
    for key, value in changed.items():
        *parents, last = key.split(".")
        section = document
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            raise CaloraError(f"params.yaml: {key}", "a key that is there", "none", "correct its spelling")
        if section[last] != value:
            done[key] = (section[last], value)
            section[last] = quoted(value)
    if done:
        text = io.StringIO()
        yaml.dump(document, text)
        path.write_text(text.getvalue(), encoding="utf-8")
    return done
