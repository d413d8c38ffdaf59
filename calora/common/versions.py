"""Which libraries made an artifact."""

from __future__ import annotations

from importlib.metadata import version

from calora import __version__

LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Library -> its version, calora's own included: every artifact records them."""
    return {"calora": __version__, **{name: version(name) for name in LIBRARIES}}
