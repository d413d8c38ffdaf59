"""llama.cpp on an exported folder, in this process: what its answers are, to score an export. The package is xllamacpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from calora.common.progress import progress
from calora.device.runtime import ONLY, start
from calora.errors import CaloraError
from calora.evaluation.predict import Predictions
from calora.models.tasks import Example, Task

SECONDS = 600  # that an answer may take


class Llama:
    """A base with its adapters, of which each call names those that are on.

    Args:
        base: base.gguf.
        adapters: GGUF LoRAs by name.
        context: most tokens of a prompt and its answer.
        threads: of the processor; by default as many as llama.cpp takes.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], context: int, threads: int | None = None) -> None:
        self.names = list(adapters)
        self.server, self.key = start(base, adapters, context, 1, threads)

    def complete(self, prompt: str | Sequence[int], on: Sequence[str], tokens: int, **options: Any) -> dict[str, Any]:
        """What llama.cpp writes after a prompt (a text or token ids), greedily: `content`, and `tokens` with their ids.

        Args:
            on: names of the adapters to apply.
            tokens: most tokens to write.
            options: of llama.cpp's own /completion.

        Raises:
            CaloraError: llama.cpp refuses it.
        """
        # Always a list of all: without one a slot goes on with what another adapter left in its cache.
        scales = [{"id": index, "scale": float(name in on)} for index, name in enumerate(self.names)]
        asked = {"temperature": 0.0, "cache_prompt": False, "return_tokens": True, "lora": scales, "n_predict": tokens}
        text = prompt if isinstance(prompt, str) else list(prompt)
        return self.ask("/completion", {"prompt": text, **asked, **options})

    def tokenize(self, text: str) -> list[int]:
        """The ids that llama.cpp makes of a text, special tokens around it included."""
        wanted = {"content": text, "add_special": True, "parse_special": True}
        found: list[int] = self.ask("/tokenize", wanted)["tokens"]
        return found

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of llama.cpp's server in this process, on localhost."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
        except HTTPError as error:
            said = error.read(200).decode(errors="replace")
            raise CaloraError(
                "llama.cpp", "an answer", said, "shorten the prompt, or export the folder again"
            ) from None
        return found

    def predict(
        self, task: Task, answer_ids: Sequence[int], examples: Sequence[Example], on: Sequence[str], title: str | None
    ) -> Predictions:
        """Answer every example: by the highest of the answers' logits (scored), or by greedy generation.

        Args:
            answer_ids: the token of each answer; empty for a generated task.
        """
        predictions = Predictions([], [])
        only = {"logit_bias": [[token, ONLY] for token in answer_ids]} if task.scored else {}
        for example in progress(examples, title, "texts"):
            said = self.complete(example.prompt_ids, on, 1 if task.scored else task.max_new_tokens, **only)
            label = list(answer_ids).index(said["tokens"][0]) if task.scored else -1
            predictions.labels.append(label)
            predictions.answers.append((task.answers[label] if task.scored else said["content"]).strip())
        return predictions
