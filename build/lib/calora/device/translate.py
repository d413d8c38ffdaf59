"""llama.cpp's answers as OpenAI's clients read them: the model's name, and log-probabilities in the shape of each route."""

from __future__ import annotations

from typing import Any

KEPT = ("token", "logprob", "bytes")


class Translator:
    """Of the one answer, or the pieces, of one request.

    Args:
        model: its name here.
        top: how many alternatives of each token the request asked for; llama.cpp tells one at least.
    """

    def __init__(self, model: str, top: int) -> None:
        self.model, self.top, self.offset = model, top, 0

    def __call__(self, said: dict[str, Any]) -> dict[str, Any]:
        """An answer or a piece."""
        written = said.get("object") == "text_completion"
        for choice in said.get("choices", []):
            if (found := choice.get("logprobs")) is not None:
                tokens = found.get("content") or []
                choice["logprobs"] = self._written(tokens) if written else {"content": self._chat(tokens)}
        return {**said, "model": self.model}

    def _chat(self, tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        def plain(one: dict[str, Any]) -> dict[str, Any]:
            return {key: one[key] for key in KEPT if key in one}

        return [
            {**plain(one), "top_logprobs": [plain(other) for other in one["top_logprobs"][: self.top]]}
            for one in tokens
        ]

    def _written(self, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        """The older shape; offsets are of the answer's text."""
        offsets = []
        for one in tokens:
            offsets.append(self.offset)
            self.offset += len(one["token"])
        tops = [{other["token"]: other["logprob"] for other in one["top_logprobs"][: self.top]} for one in tokens]
        return {
            "tokens": [one["token"] for one in tokens],
            "token_logprobs": [one["logprob"] for one in tokens],
            "top_logprobs": tops if self.top else None,
            "text_offset": offsets,
        }
