"""Sample the texts that compression is calibrated on, and others that a recovery is tuned on.

Writes data/calibration/texts.jsonl and tuning.jsonl.

They come from the training documents of every embedded corpus, whichever tasks a run has, so that adding a task
never compresses the base anew. A share of them stands in the prompt of its set: raw texts never show a model the end of
a prompt, where the answer is read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from calora.common.files import write_text
from calora.errors import CaloraError
from calora.models.tasks import Task
from stages.common import CALIBRATION, TUNING, run
from stages.config import Params, Scores
from stages.corpora import split_pools, task_of
from stages.files import Rows


def main(params: Params) -> None:
    """The same number of texts from each corpus, and of those in its prompt; which texts they are depends on neither."""
    sets = {name: source for name, source in params.data.sets.items() if isinstance(source, Scores)}
    if not sets:
        raise CaloraError("data.sets", "at least one corpus to calibrate on (source: scores)", "none", "keep one")
    calibration, pools = params.calibration, []
    for name, source in sets.items():
        task = task_of(name, source)
        pools.append((task, [*split_pools(params, source, task)["train"]]))
    generator = random.Random(calibration.seed)
    for path, key, wanted in ((CALIBRATION, "texts", calibration.texts), (TUNING, "tuning", calibration.tuning)):
        texts = sampled(pools, f"compress.calibration.{key}", wanted, calibration.prompts, generator)
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    prompts = round(calibration.prompts * 100)
    print(
        f"{calibration.texts} calibration texts from {', '.join(sets)}, {calibration.tuning} for tuning, {prompts} % as prompts"
    )


def sampled(
    pools: Sequence[tuple[Task, Rows]], key: str, wanted: int, prompts: float, generator: random.Random
) -> list[str]:
    """Texts of all pools, a share of them as prompts; they leave their pools.

    Args:
        key: what a message calls `wanted`.
    """
    texts: list[str] = []
    for turn, (task, pool) in enumerate(pools):
        counts = (wanted, round(prompts * wanted))
        share, rendered = (count // len(pools) + (turn < count % len(pools)) for count in counts)
        if len(pool) < share:
            raise CaloraError(key, f"at most {len(pool)} texts of {task.name}", share, "lower it")
        sample = generator.sample(pool, share)
        raw, prompted = sample[: share - rendered], sample[share - rendered :]
        texts += [*(row["text"] for row in raw), *map(task.render, prompted)]
        taken = {row["text"] for row in sample}
        pool[:] = [row for row in pool if row["text"] not in taken]
    return texts


if __name__ == "__main__":
    run(main)
