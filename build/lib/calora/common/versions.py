"""Which libraries made an artifact."""

from __future__ import annotations

from importlib.metadata import version

from calora import __version__

FILE = "versions.json"  # beside weights that have no other place to say it
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Library -> its version, calora's own included: every artifact records them."""
    return {"calora": __version__, **{name: version(name) for name in LIBRARIES}}
