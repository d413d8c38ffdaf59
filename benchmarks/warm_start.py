"""Which inputs should weigh the compression error? Validation accuracy before any training, on movies and q8_up.

`python -m benchmarks.warm_start` after `make run`. The inputs come from the compressed or from the uncompressed model, each
with the teacher's LoRA in place; the correction is linear, of rank 16 (what a GELU bypass of rank 32 holds) or 32.
All validation documents are scored, not only those that the runs look at.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from calora.adapters.folder import read_plain_lora
from calora.adapters.lora import attach_adapter, set_active
from calora.compressed import load
from calora.evaluation.predict import score
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from calora.models.moments import input_second_moments
from calora.models.tasks import encode_all
from calora.recovery.warmstart import best_linear_correction
from stages.common import BASE, compressed, teacher
from stages.config import load_params
from stages.corpora import split_pools
from stages.splits import read_split, read_task

TASK, RECIPE, TEXTS = "movies", "q8_up", 128


def with_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the teacher's LoRA switched on."""
    attach_adapter(model, read_plain_lora(teacher(TASK)), "teacher")
    set_active(model, "teacher")
    return model


def main() -> None:
    """One line a variant."""
    params, task, tokenizer = load_params(), read_task(TASK), load_tokenizer(BASE)
    rows = [row for row in split_pools(params, params.data.sets[TASK], task)["validation"] if row["label"] is not None]
    validation = encode_all(task, tokenizer, rows)
    texts = encode_all(task, tokenizer, read_split(TASK, "train"))[:TEXTS]
    uncompressed = with_teacher(load_model(BASE, attention="eager"))
    model = with_teacher(load(compressed(RECIPE), dense=True, attention="eager"))
    layers, whole = linear_layers(model), linear_layers(uncompressed)
    weights = {key: layer.weight.detach().clone() for key, layer in layers.items()}

    def measured() -> float:
        return score(model, task, tokenizer, validation, 32)

    print(f"{len(validation)} validation texts; inherited LoRA alone: {measured():.3f}", flush=True)
    moments = {
        "compressed": dict(input_second_moments(model, texts, layers)),
        "uncompressed": dict(input_second_moments(uncompressed, texts, whole)),
    }
    for rank in (16, 32):
        for source, moment in moments.items():
            for key, layer in layers.items():
                error = whole[key].weight.float() - weights[key].float()
                p, q = best_linear_correction(error, moment[key], rank)
                layer.weight.data.copy_(weights[key].float() + (p @ q).T)
            print(f"inputs of the {source} model, rank {rank}: {measured():.3f}", flush=True)


if __name__ == "__main__":
    main()
