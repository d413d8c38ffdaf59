"""The stages of the pipeline: each reads, calls calora, writes. `python -m stages.<name>`."""

import logging
import os

# Before the libraries are imported: they read these once, and tell of things that no user of the pipeline can change.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
