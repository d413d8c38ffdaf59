"""The stages of the pipeline: each reads, calls calora, writes. `python -m stages.<name>`."""

import logging
import os
import sys
from pathlib import Path

# Threads of OpenMP that wait for others give way soon: two programs on the same cores would else each be ten times slower.
SHARE_CORES = {"GOMP_SPINCOUNT": "1000"}

# Before the libraries are imported: they read these once, and tell of things that no user of the pipeline can change.
for _name, _value in SHARE_CORES.items():
    os.environ.setdefault(_name, _value)
# bitsandbytes, which PEFT imports, would compile functions that no stage calls: 4 of the 13 s of a stage's imports.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HOME", str(Path(".cache/huggingface").absolute()))  # nothing outside of the project
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in a log they are one endless line,
    os.environ.setdefault("TQDM_DISABLE", "1")  # as are those of transformers' conversions; ours say so themselves
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
