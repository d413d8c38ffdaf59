"""Write each method of params.yaml in full. Writes models/methods/<method>: start.json, loss.json and texts.json; and
models/starts/<method>.json, the start of each that is compared, with the texts that it knows.

Apart, so that another weight of a loss makes no start again; and a stage of its own, so that what a method takes
from another (`like`, `budget`) is seen by DVC: it compares what is written here.
"""

from __future__ import annotations

from calora.common.files import whole_directory, write_json
from stages.common import METHODS, STARTS, run
from stages.config import Params
from stages.resolve import resolve

LABELS = {
    "task": 1.0, "alpha": 0.0, "alpha_encoder": 0.0, "kl": 0.0, "labelled": 0.0, "unlabelled": 0.0, "unlabelled_every": 0,
    "labels": "all",
}  # fmt: skip


def main(params: Params) -> None:
    """All entries, whichever a run compares, and the starts of those that it does."""
    methods = resolve(params.methods)
    with whole_directory(STARTS) as scratch:
        for name in params.compare:
            write_json(scratch / f"{name}.json", {key: methods[name][key] for key in ("start", "texts")})
    with whole_directory(METHODS) as scratch:
        for name, entry in methods.items():
            write_json(scratch / name / "start.json", entry["start"])
            loss = LABELS if entry["loss"] == "labels" else entry["loss"]
            write_json(scratch / name / "loss.json", {"steps": loss is not None, **(loss or {})})
            write_json(scratch / name / "texts.json", {"texts": entry["texts"]})


if __name__ == "__main__":
    run(main)
