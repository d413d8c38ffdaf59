"""Let the teacher write the texts of a method that has none of the task (`texts: written`), and store its outputs for them.

Reads models/methods/<method>/texts.json, models/base, models/teacher/<task>, data/<task>/task.json; writes
models/written/<task>/<method>: texts.jsonl and targets/; of any other method a note.

A stage for each method, so that one which is added trains none of the others again.
"""

from __future__ import annotations

from calora.common.files import whole_directory, write_json
from stages.common import run, written
from stages.config import Params
from stages.splits import texts_of


def main(params: Params, name: str, method: str) -> None:
    """The texts of one method for one task."""
    if texts_of(method) == "written":
        from stages.writing import write  # takes seconds to import, and most methods need none of it

        write(params, name, method)
        return
    with whole_directory(written(name, method)) as scratch:
        write_json(scratch / "none.json", {"reason": f"{method} learns from texts of the task"})


if __name__ == "__main__":
    run(main)
