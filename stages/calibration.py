"""Sample the texts that compression is calibrated on. Writes data/calibration/texts.jsonl.

They come from the training documents of every embedded corpus, whichever tasks a run has, so that adding a task
never compresses the base anew. A share of them stands in the prompt of its set: raw texts never show a model the end of
a prompt, where the answer is read.
"""

from __future__ import annotations

import json
import random

from calora.common.files import write_text
from calora.errors import CaloraError
from stages.common import CALIBRATION, run
from stages.config import Params, Scores
from stages.corpora import split_pools, task_of


def main(params: Params) -> None:
    """The same number of texts from each corpus, and of those in its prompt; which texts they are depends on neither."""
    sets = {name: source for name, source in params.data.sets.items() if isinstance(source, Scores)}
    wanted = params.calibration.texts
    prompts = round(params.calibration.prompts * wanted)
    if not sets:
        raise CaloraError("data.sets", "at least one corpus to calibrate on (source: scores)", "none", "keep one")
    generator = random.Random(params.calibration.seed)
    texts: list[str] = []
    for turn, (name, source) in enumerate(sets.items()):
        task = task_of(name, source)
        pool = split_pools(params, source, task)["train"]
        share, rendered = (count // len(sets) + (turn < count % len(sets)) for count in (wanted, prompts))
        if len(pool) < share:
            raise CaloraError("compress.calibration.texts", f"at most {len(pool)} texts of {name}", share, "lower it")
        sample = generator.sample(pool, share)
        raw, prompted = sample[: share - rendered], sample[share - rendered :]
        texts += [*(row["text"] for row in raw), *map(task.render, prompted)]
    write_text(CALIBRATION, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{len(texts)} calibration texts from {', '.join(sets)}, {prompts} of them as prompts")


if __name__ == "__main__":
    run(main)
