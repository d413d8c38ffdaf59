"""lm-evaluation-harness on a compressed model with its adapter, as its model `calora`.

`python -m calora.lm_eval --model_args path=models/compressed/q3,adapter=models/calora/movies/q3 --tasks ...` is the
harness's own command line, all of its options included. In a program: `register()`, then
`lm_eval.simple_evaluate(model="calora", ...)`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from calora.compressed import Compressed, load
from calora.errors import CaloraError

NAME = "calora"


def opened(path: str, adapter: str | None = None, dense: bool = False, device: str | None = None) -> Compressed:
    """A compressed model as it is scored: packed, with one active adapter or none.

    Args:
        path: folder of the compressed model.
        adapter: folder of an adapter for it.
        dense: compute with the dense view: the same values, faster for many tokens, in more memory.
        device: a GPU if there is one, else `cpu`.

    Raises:
        CaloraError: one of the folders is not what it should be, or they are not of each other.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(path, dense=dense, device=place)
    if adapter is not None:
        model.load_adapter(adapter, "adapter")
        model.set_adapter("adapter")
    return model


def register() -> type:
    """Make `calora` one of the harness's models; returns its class.

    It is the harness's own model of transformers, given an open one: tokens, truncation, batches, sums and stop texts are
    the harness's.

    Raises:
        CaloraError: the harness is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        fix = "pip install 'lm_eval>=0.4.9' (the extra `lm_eval`)"
        raise CaloraError("calora.lm_eval", "lm-evaluation-harness", error, fix) from None
    if NAME in model_registry:
        known: type = model_registry.get(NAME)
        return known

    class Harnessed(HFLM):  # type: ignore[misc]  # the harness may not be installed
        """`path`, `adapter`, `dense`, `device` as in `opened`; all else is `HFLM`'s."""

        def __init__(
            self, path: str, adapter: str | None = None, dense: bool = False, device: str | None = None, **more: Any
        ) -> None:
            model = opened(path, adapter, dense, device)
            super().__init__(pretrained=model, tokenizer=model.calora_tokenizer, **more)

    made: type = model_registry.register(NAME)(Harnessed)
    return made


def main(arguments: list[str]) -> int:
    """The harness's command line, with `--model calora` unless another is named; a user's mistake is one line."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        named = any(word in ("--model", "-M") or word.startswith("--model=") for word in arguments)
        commands = arguments[:1] if arguments and not arguments[0].startswith("-") else ["run"]
        rest = arguments[1:] if arguments and not arguments[0].startswith("-") else arguments
        default = ["--model", NAME] if commands == ["run"] and not named else []
        sys.argv = ["lm_eval", *commands, *default, *rest]
        cli_evaluate()
    except CaloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
