"""What may be in a request: OpenAI's fields as far as they mean something here. Another one is an error, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

INPUTS = 256  # texts in one request
UNUSED = {"user", "metadata", "store"}  # clients send them; they say nothing to a model
Token = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """Of a request; without `cache_prompt` a prompt is read anew, so that times can be compared."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: str
    cache_prompt: bool = True
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


class Part(BaseModel):
    """Of a body."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Part):
    """Of a stream."""

    include_usage: bool = False


class Generation(Body):
    """What both kinds of completion share; what is not given is llama.cpp's default."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: str | list[str] | None = Field(None, max_length=16)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=300)
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    def to_llama(self, tokens: int) -> dict[str, Any]:
        """As llama.cpp reads it.

        Args:
            tokens: to write at most, where the request does not say.
        """
        own = self.model_dump(exclude_none=True, exclude={"model", "stream", "max_completion_tokens", *UNUSED})
        return {"max_tokens": tokens, **own}


class Completion(Generation):
    """POST /v1/completions."""

    prompt: str | list[Token] = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top(self) -> int:
        """How many alternatives of each token are told."""
        return self.logprobs or 0

    def to_llama(self, tokens: int) -> dict[str, Any]:
        """As llama.cpp reads it: `logprobs` is `n_probs`, which has to be 1 for the chosen token's own."""
        own = super().to_llama(tokens)
        top = own.pop("logprobs", None)
        return own if top is None else {**own, "n_probs": max(top, 1)}


class TextPart(Part):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Part):
    """One of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]


class Chat(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top(self) -> int:
        """How many alternatives of each token are told."""
        return self.top_logprobs or 0

    def to_llama(self, tokens: int) -> dict[str, Any]:
        """As llama.cpp reads it."""
        own = super().to_llama(tokens)
        top = own.pop("top_logprobs", None)
        return {**own, "top_logprobs": max(top or 0, 1)} if own.get("logprobs") else own


class Addition(Part):
    """POST /v1/load_lora_adapter, as vLLM has it; without a path it is the adapter of that name in manifest.json."""

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str | None = Field(None, min_length=1, max_length=4096)


class Removal(Part):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: str


class Classification(Body):
    """POST /v1/classify: texts, or rows where the prompt has several columns; `task` names a model whose task it is, if not its own."""

    task: str | None = None
    input: str | dict[str, Any] | Annotated[list[str | dict[str, Any]], Field(min_length=1, max_length=INPUTS)]

    @property
    def inputs(self) -> list[str | dict[str, Any]]:
        """As a list."""
        return self.input if isinstance(self.input, list) else [self.input]
