"""Store the teacher's outputs for every training text, from the adapter as it was stored and in its dtype.

Reads models/base, models/teacher/<task>, data/<task>; writes models/targets/<task>.
"""

from __future__ import annotations

from calora.adapters.teachers import attach_teacher
from calora.common.files import digest
from calora.common.parallel import place
from calora.distillation.targets import write_targets
from calora.models.loading import load_model, load_tokenizer, training_attention
from calora.models.tasks import encode_all, positions
from stages.common import BASE, data, run, targets, teacher
from stages.config import Params
from stages.gathering import gathered
from stages.splits import read_split, read_task


def main(params: Params, name: str) -> None:
    """The teacher's outputs of one task."""
    task, batch, top_k = read_task(name), params.train.eval_batch_size, params.teacher.top_k
    model, tokenizer = load_model(BASE, attention=training_attention()), load_tokenizer(BASE)
    attach_teacher(model, teacher(name), name)
    place(model)
    with gathered(targets(name), digest(BASE, teacher(name), data(name)), batch, top_k, str(model.dtype)) as folder:
        for split in ("train", "unlabelled"):
            examples = encode_all(task, tokenizer, read_split(name, split), positions(model.config))
            if examples:
                title = f"{name}: targets of {split}"
                write_targets(folder / split, model, task, tokenizer, examples, batch, top_k, title)


if __name__ == "__main__":
    run(main)
