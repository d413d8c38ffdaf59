"""A model whose blocks stay on disk is compressed to the same bytes as one in memory, in less memory."""

import filecmp
import json

import pytest
import torch

from benchmarks import larger, synthetic
from calora.common.tensors import write_pieces, write_tensors
from calora.compressed import load
from calora.compression import compress
from calora.compression.streamed import open_streamed
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.models.anatomy import stacks
from calora.models.loading import load_model, load_tokenizer
from calora.models.tasks import encode_all
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows

INT8 = {"quantize": {"format": "int8", "embeddings": "int8"}}
RECIPES = {
    "q8_up_m": [
        {"moefy": {"experts": 4, "active": 0.5, "clustering": "coactivation", "router": "learned"}},
        {"prune": {"score": "sparsegpt", "pattern": "2:4"}}, INT8,
    ],
    "nf4": [{"quantize": {"format": "nf4"}}],
    "owl": [{"prune": {"score": "wanda", "pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"}}],
    "sp": [{"shrink": {"heads": 0.5, "importance": "activation", "compensate": True}}],
    "q4_r": [
        {"quantize": {"format": "int4", "group": 32, "symmetric": False, "rounding": "gptq"}},
        {"recover": {"budget": 0.004, "fit": "preserve", "rounds": 2, "format": "int8"}},
    ],
}  # fmt: skip


def sharded(folder, kind="llama"):
    """A tiny base in files of 20 kB, and its examples."""
    base = make_model(kind, folder / "base", hidden=64, inner=64)
    load_model(base, torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    assert len(list(base.glob("*.safetensors"))) > 2
    return base, encode_all(TASK, load_tokenizer(base), toy_rows(8, 1))


def made(base, examples, recipe, folder, streamed, compute):
    model = open_streamed(base, torch.bfloat16) if streamed else load_model(base, torch.bfloat16)
    calibration = Calibration(examples, folder.with_name(f"unfinished-{folder.name}"))
    save(model, compress(model, recipe, calibration, compute), folder, base)
    return model


@pytest.mark.parametrize(
    ("name", "kind", "compute"),
    [
        ("q8_up_m", "llama", torch.float32), ("q8_up_m", "t5", torch.bfloat16), ("nf4", "llama", torch.bfloat16),
        ("owl", "t5", torch.float32), ("sp", "llama", torch.float32), ("q4_r", "llama", torch.bfloat16),
    ],
)  # fmt: skip
def test_a_streamed_model_is_compressed_to_the_same_bytes(name, kind, compute, tmp_path):
    base, examples = sharded(tmp_path, kind)
    for streamed in (False, True):
        model = made(base, examples, RECIPES[name], tmp_path / str(streamed), streamed, compute)
    whole, found = tmp_path / "False", tmp_path / "True"
    assert all(p.is_meta for stack in stacks(model).values() for p in stack.parameters())  # it held none at the end
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in found.iterdir())
    same = [file for file in files if filecmp.cmp(whole / file, found / file, shallow=False)]
    assert set(files) - set(same) <= {"compression.json"}
    reports = [json.loads((folder / "compression.json").read_text()) for folder in (whole, found)]
    assert reports[0].pop("seconds", 0) is not None and reports[1].pop("seconds", 0) is not None
    assert reports[0] == reports[1]


def test_a_killed_compression_of_a_streamed_model_goes_on(tmp_path, monkeypatch):
    base, examples = sharded(tmp_path, "t5")
    whole = made(base, examples, RECIPES["q8_up_m"], tmp_path / "whole", True, torch.float32)
    calibration = Calibration(examples, tmp_path / "unfinished")
    names = [f"{stack}.{index}" for stack, blocks in stacks(whole).items() for index in range(len(blocks))]
    from calora.compression import walk

    kept = walk.keep
    monkeypatch.setattr(walk, "keep", lambda path, *rest: kept(path, *rest) if names[3] not in path.name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(open_streamed(base, torch.bfloat16), RECIPES["q8_up_m"], calibration, torch.float32)
    assert len(list((tmp_path / "unfinished").iterdir())) == 3
    monkeypatch.undo()
    model = open_streamed(base, torch.bfloat16)
    save(model, compress(model, RECIPES["q8_up_m"], calibration, torch.float32), tmp_path / "again", base)
    assert filecmp.cmp(tmp_path / "whole/model.safetensors", tmp_path / "again/model.safetensors", shallow=False)


TUNED = [
    INT8,
    {"recover": {"rank": 2, "fit": "after", "format": "int8", "tune": {"steps": 1, "lr": 0.1, "batch_size": 2}}},
]


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (TUNED, "recover.tune"),
        ([{"shrink": {"layers": 0.5, "importance": "activation", "compensate": False}}], "shrink.layers"),
        ([{"shrink": {"neurons": 0.5, "importance": "taylor", "compensate": False}}], "shrink.importance: taylor"),
    ],
)
def test_what_needs_the_whole_model_is_refused_by_its_name(recipe, found, tmp_path):
    base, examples = sharded(tmp_path)
    with pytest.raises(
        CaloraError, match=f"one block at a time, for a streamed model, found {found}. Fix: leave it out"
    ):
        compress(open_streamed(base, torch.bfloat16), recipe, Calibration(examples, tmp_path / "c", examples))
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_streamed_says_why(tmp_path):
    base, examples = sharded(tmp_path)
    with pytest.raises(CaloraError, match="a checkpoint for the blocks of a streamed model, found none"):
        compress(open_streamed(base, torch.bfloat16), [INT8], Calibration(examples))
    shard = sorted(base.glob("*.safetensors"))[0]
    write_tensors(shard, {"transformer.h.0.weight": torch.zeros(2)})
    with pytest.raises(CaloraError, match=r"expected a tensor called model.+ found none"):
        open_streamed(base, torch.bfloat16)
    shard.write_bytes(b"not safetensors")
    with pytest.raises(CaloraError, match="a whole safetensors file"):
        open_streamed(base, torch.bfloat16)


def test_weights_that_are_not_finite_stop_it_before_any_work(tmp_path):
    base, examples = sharded(tmp_path)
    model = load_model(base, torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    model.save_pretrained(base)
    for file in base.glob("model-*.safetensors"):
        file.unlink()
    with pytest.raises(CaloraError, match=r"model.layers.1.mlp.up_proj.weight: expected finite values"):
        compress(open_streamed(base, torch.bfloat16), [INT8], Calibration(examples, tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_pieces_are_written_as_safetensors_writes_the_whole(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kinds = (
        torch.float32,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float16,
    )
    tensors = {
        f"{i}.{name}": torch.randint(0, 2, shape, generator=generator).to(kind)
        for i, kind in enumerate(kinds)
        for name, shape in {"b": (3, 5), "a": (7,), "one": (), "none": (0, 4), "\u00e9": (2, 2)}.items()
    }
    tensors["view"] = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "whole", tensors)
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    names = sorted(tensors, reverse=True)
    parts = ({name: tensors[name]} | {"no part of it": torch.ones(1)} for name in names)
    write_pieces(tmp_path / "pieces", shapes, parts)
    assert filecmp.cmp(tmp_path / "whole", tmp_path / "pieces", shallow=False)
    with pytest.raises(AssertionError, match="no values for"):
        write_pieces(tmp_path / "missing", shapes, [])
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "pieces"}


def test_a_model_larger_than_the_limit_is_compressed_within_it(tmp_path):
    """In a process of its own: its peak above what it held before it opened the model."""
    size = synthetic.Size(hidden=512, inner=512, layers=32, heads=4, groups=2, vocabulary=512)
    synthetic.make(tmp_path / "base", size)
    whole = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) / 1e6
    limit = 60.0  # MB: most of it is what libraries take for themselves
    assert whole > 1.5 * limit
    assert larger.in_a_process("compress, streamed", tmp_path, size) < limit
    assert load(tmp_path / larger.COMPRESSED).config.num_hidden_layers == 32
