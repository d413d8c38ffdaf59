"""`dvc plots` without a network: `python -m pipeline.offline` (part of `make setup`) makes a template with Vega inside it.

DVC's own page loads Vega from the web. Nothing is changed where `plots.html_template` is set already.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import vl_convert

from calora.common.files import write_text
from pipeline.process import DVC, environment
from pipeline.settings import ROOT

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>DVC plots</title>{refresh_tag}
<style>body { font-family: sans-serif } img { max-width: 48em } table { border-spacing: 15px }</style>
<script>%s</script></head>
<body>{plot_divs}</body></html>
"""
TEMPLATE = Path(".cache/plots.html")


def main(root: Path) -> None:
    """Write the template, and name it in .dvc/config.local."""
    key, ours = "plots.html_template", f"../{TEMPLATE}"
    known = subprocess.run([*DVC, "config", key], cwd=root, env=environment(), capture_output=True, text=True)
    if known.stdout.strip() in ("", ours):
        write_text(root / TEMPLATE, PAGE % vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub forgets the default
        subprocess.run([*DVC, "config", "--local", key, ours], cwd=root, env=environment(), check=True)


if __name__ == "__main__":
    main(ROOT)
