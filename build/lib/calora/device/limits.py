"""What a server takes, and where it listens: the one place of these defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from calora.errors import CaloraError

HOST, PORT = "127.0.0.1", 8080
KEY = "CALORA_API_KEY"  # environment variable


@dataclass(frozen=True)
class Limits:
    """Of requests; all above 0. `about` says what each one is."""

    slots: int = field(default=4, metadata={"about": "requests of one adapter that run together"})
    waiting: int = field(default=64, metadata={"about": "requests that may wait for their turn; more get 503"})
    patience: float = field(default=60.0, metadata={"about": "seconds that a request may wait; then 503"})
    seconds: float = field(default=120.0, metadata={"about": "seconds that it may run; then 503, or its stream ends"})
    tokens: int = field(default=512, metadata={"about": "tokens that it may ask for, and gets where it does not say"})
    body: int = field(default=1_000_000, metadata={"about": "bytes of its body"})
    context: int = field(default=2048, metadata={"about": "tokens of a prompt and its answer"})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise CaloraError(f"--{name}", "more than 0", value, "correct it")

    @staticmethod
    def about() -> dict[str, str]:
        """What each one is, by name."""
        return {one.name: one.metadata["about"] for one in fields(Limits)}
