"""The stages of the pipeline: each reads, calls calora, writes. `python -m stages.<name>`."""

import logging
import os
import sys
from pathlib import Path

# Before the libraries are imported: they read these once, and tell of things that no user of the pipeline can change.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HOME", str(Path(".cache/huggingface").absolute()))  # nothing outside of the project
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in a log they are one endless line
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
