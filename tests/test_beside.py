"""What is beside the layers of a packed model: the base's recovery, a LoRA and a bypass as one part, against each computed apart."""

import copy
import functools
import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import calora.plugin  # noqa: F401  # from_pretrained then knows our format
from calora.adapters.lora import Adapter, attach_adapter, detach_adapter, lora_config, set_active, sides_of
from calora.compressed import load
from calora.compression import compress
from calora.compression.walk import Calibration
from calora.errors import CaloraError
from calora.layers.layout import dense_weight
from calora.models.anatomy import linear_layers
from calora.models.loading import load_model, load_tokenizer
from calora.models.moments import read_together
from calora.models.tasks import encode_all
from calora.recovery.bypass import ACTIVATIONS
from calora.recovery.shared import shared_of
from calora.saving import save
from tests.conftest import TASK, make_model, toy_rows

INT8 = {"quantize": {"format": "int8"}}
RECOVER = {"recover": {"rank": 4, "fit": "after", "format": "int8"}}
RECIPES = {
    "none": [INT8],
    "recovery": [INT8, RECOVER],
    "int4": [{"quantize": {"format": "int4", "group": 32, "symmetric": False}}, RECOVER],
    "experts": [{"moefy": {"experts": 8, "shared": 2, "active": 0.5, "clustering": "parameters", "router": "learned"}}, INT8],
}  # fmt: skip
IDS = torch.tensor([[3, 5, 9, 12, 7]])
# fp32 rounds at 2^-24, bf16 at 2^-8; a sum of a few products is rounded once here, one after another there
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(recipe, kind of model, dtype) -> the folder of a compressed base; each is made once."""
    folder = tmp_path_factory.mktemp("bases")

    @functools.cache
    def get(recipe, kind="llama", dtype=torch.bfloat16):
        name = f"{recipe}-{kind}-{dtype}"
        base = make_model(kind, folder / name, dtype, hidden=32, inner=64)
        model, tokenizer = load_model(base, dtype), load_tokenizer(base)
        report = compress(model, RECIPES[recipe], Calibration(encode_all(TASK, tokenizer, toy_rows(8, 1))))
        save(model, report, folder / f"{name}-out", base)
        return folder / f"{name}-out"

    return get


def some(model, seed=0, rank=3, activation="gelu", skip=()):
    """An adapter of random values: a LoRA on every layer and a bypass, but for the layers whose names end in one of `skip`."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    layers = {name: layer for name, layer in linear_layers(model).items() if not name.endswith(tuple(skip) or "?")}
    lora, recovery = {}, {}
    for name, layer in layers.items():
        lora |= {f"{name}.lora_A.weight": values(4, layer.in_features)}
        lora |= {f"{name}.lora_B.weight": values(layer.out_features, 4)}
        if rank:
            recovery |= {
                f"{name}.down": values(layer.in_features, rank),
                f"{name}.up": values(rank, layer.out_features),
            }
    config = lora_config(4, 6, [name.rsplit(".", 1)[-1] for name in layers])
    return Adapter(config, lora, recovery, {"activation": activation})


def outputs(model):
    """Logits of five tokens, and of one."""
    more = {"decoder_input_ids": IDS[:, :2]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return torch.cat([model(input_ids=ids, **more).logits[0] for ids in (IDS, IDS[:, :1])])


def put_on(model, adapter, name="own"):
    attach_adapter(model, adapter, name)
    set_active(model, name)
    return model


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_layer_adds_what_its_parts_add(bases, recipe, activation, dtype, rows):
    model = load(bases(recipe, dtype=dtype))
    adapter = some(model, activation=activation)
    put_on(model, adapter)
    torch.manual_seed(0)
    for name, layer in linear_layers(model).items():
        x = torch.randn(1, rows, layer.in_features, dtype=dtype)
        a, b = (adapter.lora[f"{name}.lora_{side}.weight"] for side in "AB")
        down, up = (adapter.recovery[f"{name}.{part}"] for part in ("down", "up"))
        wide = x.float()
        own = F.linear(wide, dense_weight(layer, torch.float32))  # the base's recovery is in it
        expected = own + 1.5 * (wide @ a.T) @ b.T + ACTIVATIONS[activation](wide @ down) @ up  # alpha / r = 1.5
        for kept in (torch.no_grad(), torch.enable_grad()):
            with kept:
                found = layer(x)
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.float() / expected.abs().max(), expected / expected.abs().max(), **CLOSE[dtype]
            )


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("recipe", ["none", "recovery"])
def test_adapters_are_swapped_in_any_order(bases, recipe, kind):
    base = bases(recipe, kind)
    model = load(base)
    made = {
        "one": some(model),
        "two": some(model, seed=1, rank=0),
        "three": some(model, seed=2, rank=2, activation="identity", skip=("k_proj", "up_proj", "k", "wi")),
        "empty": Adapter(None, {}),
    }
    expected = {name: outputs(put_on(load(base), adapter)) for name, adapter in made.items()}
    expected[None] = outputs(load(base))
    assert torch.equal(expected.pop("empty"), expected[None])
    assert len({float(logits.float().sum()) for logits in expected.values()}) == len(expected)
    for name, adapter in made.items():
        attach_adapter(model, adapter, name)
        assert torch.equal(outputs(model), expected[None])
    for order in itertools.permutations(expected):
        for name in order:
            set_active(model, name)
            assert torch.equal(outputs(model), expected[name]), (order, name)
    set_active(model, "one")
    detach_adapter(model, "two")
    assert torch.equal(outputs(model), expected["one"])
    detach_adapter(model, "one")
    assert torch.equal(outputs(model), expected[None])


def test_an_input_is_read_once(bases, monkeypatch):
    model, calls = load(bases("recovery")), []
    put_on(model, some(model))
    groups = [list(group.layers) for group in sides_of(model).groups]
    assert groups == read_together(model) and len(groups) == 4 * model.config.num_hidden_layers
    for group in sides_of(model).groups:
        assert len({id(layer.beside.hidden) for layer in group.layers.values()}) == 1
    hidden = next(iter(sides_of(model).groups[0].layers.values())).beside.hidden
    read = type(hidden).read
    monkeypatch.setattr(type(hidden), "read", lambda self, x: calls.append(1) or read(self, x))
    outputs(model)
    assert len(calls) == 2 * len(groups)  # five tokens, then one


def test_from_pretrained_unpacks_its_factors_once(bases):
    folder = bases("recovery")
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = {name.rpartition(".")[2]: layer for name, layer in linear_layers(model).items() if ".layers.0." in name}
    query, key = (shared_of(layers[name]) for name in ("q_proj", "k_proj"))
    assert query.down.dtype == query.up.dtype == torch.bfloat16 and query.inputs is None and query.outputs is None
    assert query.down is key.down and query.reading is key.reading is not shared_of(layers["o_proj"]).reading
    torch.testing.assert_close(outputs(model), outputs(load(folder)), **CLOSE[torch.bfloat16])


def test_which_layers_read_one_input(bases):
    groups = {tuple(name.rpartition(".")[2] for name in group) for group in read_together(load(bases("none")))}
    assert groups == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    groups = read_together(load(bases("none", "t5")))
    crossed = next(group for group in groups if any("EncDecAttention.k" in name for name in group))
    assert len(crossed) == 4  # keys and values of both blocks of the decoder


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_writes_what_the_dense_view_writes(bases, kind):
    written = []
    for dense in (False, True):
        model = load(bases("recovery", kind, torch.float32), dense=dense)
        put_on(model, some(model))
        written.append(model.generate(input_ids=IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist())
    assert written[0] == written[1]


def test_what_is_taken_off_is_freed(bases):
    model = load(bases("recovery"))
    adapter = some(model)
    put_on(model, adapter)
    tensors = [weakref.ref(part.down) for parts in sides_of(model).adapters["own"].values() for part in parts]
    tensors += [weakref.ref(layer.beside.hidden.down) for layer in linear_layers(model).values()]
    assert all(tensor() is not None for tensor in tensors)
    detach_adapter(model, "own")
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)
    for layer in linear_layers(model).values():
        recovery = shared_of(layer)
        for tensor in (recovery.down, recovery.up):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no adapter's columns are left beside it


def test_two_threads_have_their_own_products(bases):
    model = load(bases("recovery"))
    put_on(model, some(model))
    ids = [torch.randint(3, 20, (1, 5 + i)) for i in range(2)]

    def logits(i):
        with torch.no_grad():
            return model(input_ids=ids[i]).logits

    expected, wrong = [logits(i) for i in range(2)], []

    def run(i):
        for _ in range(50):
            if not torch.equal(logits(i), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_has_its_own_adapters_and_another_dtype_takes_them_along(bases):
    model = load(bases("recovery"))
    put_on(model, some(model))
    expected = outputs(model)
    copied = copy.deepcopy(model)
    set_active(model, None)
    assert torch.equal(outputs(copied), expected)
    wide = copied.to(torch.float32)
    assert {part.down.dtype for parts in sides_of(wide).adapters["own"].values() for part in parts} == {torch.float32}
    torch.testing.assert_close(outputs(wide), expected.float(), **CLOSE[torch.bfloat16])


def test_an_adapter_whose_tensors_are_not_those_it_names_is_refused(bases):
    model = load(bases("none"))
    before, adapter = outputs(model), some(model)
    for lora in (
        {key: value for key, value in adapter.lora.items() if "layers.1" not in key},
        {**adapter.lora, "model.norm.weight": torch.ones(32)},
    ):
        with pytest.raises(CaloraError, match="tensors for the layers that its target_modules name"):
            attach_adapter(model, Adapter(adapter.config, lora), "own")
    assert not sides_of(model).adapters and torch.equal(outputs(model), before)
