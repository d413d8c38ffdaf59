"""The benchmark of many adapters: that each is another one, that a soak notices a wrong answer, and that its rows add up."""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
from peft import get_peft_model

from benchmarks.device import contexts, decode, folders, many, soak, worker
from benchmarks.device.__main__ import PAGE, PARTS, main
from benchmarks.device.client import load
from benchmarks.device.picture import picture
from benchmarks.recipes import MARKS
from calora.adapters.lora import lora_config
from calora.device import runtime
from calora.device.app import make_app
from calora.device.catalogue import Catalogue
from calora.device.engine import LlamaEngine
from calora.device.limits import Limits
from calora.device.pool import Pool
from calora.models.loading import load_model
from tests.conftest import ROOT
from tests.test_serve import KEY, folder, llama_cpp

__all__ = ["folder"]  # a fixture
KINDS = contexts, decode, many, soak


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Four adapters on the base of `folder`: its two, and a copy of each."""
    _, compressed, adapters = folder
    return folders.many(compressed, adapters, 4, tmp_path_factory.mktemp("many") / "whole")


def test_copies_are_other_adapters_and_folders_are_made_once(whole, tmp_path):
    catalogue = Catalogue.read(whole)
    assert list(catalogue.models) == ["base", "words0", "letters1", "words2", "letters3"]
    contents = {path.read_bytes() for path in (whole / "adapters").iterdir()}
    assert len(contents) == 4
    two = folders.first(whole, 2, tmp_path / "two")
    assert list(Catalogue.read(two).models) == ["base", "words0", "letters1"]
    assert folders.bytes_of(two) < folders.bytes_of(whole)
    bare = Catalogue.read(folders.first(whole, 0, tmp_path / "none"))
    assert list(bare.models) == ["base"] and bare.models["base"].apply == ()
    changed = (two / "manifest.json").stat().st_mtime_ns
    folders.first(whole, 1, tmp_path / "two")
    assert (two / "manifest.json").stat().st_mtime_ns == changed
    copy = folders.copy(bare.folder, tmp_path / "copy")
    assert not os.path.samefile(copy / "base.gguf", bare.base) and Catalogue.read(copy).models == bare.models


def test_a_base_without_adapters_gets_random_ones(folder, tmp_path):
    made = folders.many(folder[1], {}, 2, tmp_path / "random")
    assert list(Catalogue.read(made).models) == ["base", "random0", "random1"]
    plain = Catalogue.read(folders.plain(folder[1].parent / "base", tmp_path / "plain"))
    assert list(plain.models) == ["base"] and plain.loras == {}


def step(token, **tops):
    return token, {token: -0.1, **tops}


@pytest.mark.parametrize(
    ("found", "off"),
    [
        ([step("a", b=-1.0), step("c")], 0.0), ([step("a", b=-1.3), step("c")], 0.3 / 3**0.5), ([step("a", b=-1.0)], None),
        ([step("x", b=-1.0), step("c")], None), ([step("a", b=-1.0), step("d")], None), ([("a", {"a": -0.4}), step("c")], 0.3 / 2**0.5),
        ([("b", {"a": -0.1, "b": -1.0})], 0.0),
    ],
)  # fmt: skip
def test_answers_are_compared_up_to_where_they_part(found, off):
    expected = [step("a", b=-1.0), step("c")]
    assert soak.distance(expected, found) == (float("inf") if off is None else pytest.approx(off))


def test_a_slope_is_of_the_second_half():
    assert soak.slope([(0, 50.0), (100, 90.0), (200, 100.0), (300, 100.2), (400, 100.4)]) == pytest.approx(2.0)


@contextlib.asynccontextmanager
async def serving(catalogue, engine, change=None):
    app = make_app(Pool(catalogue, lambda _: engine, Limits(context=128)), Limits(context=128), KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test/v1", headers=headers
    ) as client:
        yield client
    await engine.close()


class Mixing(LlamaEngine):
    """Now and then it applies another adapter than it was asked for."""

    requests = 0

    def _with(self, body, on):
        self.requests += 1
        return super()._with(
            body, [on[0], self.names[1 + self.requests % (len(self.names) - 1)]] if self.requests % 10 == 0 else on
        )


@llama_cpp
def test_a_soak_notices_an_answer_of_another_adapter(whole):
    asked = soak.prompts(4)

    async def run(kind, expected):
        catalogue = Catalogue.read(whole)  # of which adapters are taken out
        engine = kind(catalogue.base, catalogue.loras, 128, 4, 1)
        async with serving(catalogue, engine) as client:
            found = await soak.Soak(client, asked, expected, lambda: 1.0).run(100)
        answered = {what: count for what, count in found["counts"].items() if what != "changes"}
        assert sum(answered.values()) == 100 and "error" not in answered
        return found

    expected = asyncio.run(soak.fresh(whole, asked, 1))
    assert len(expected) == 5 * 4 and soak.told_apart(expected) > 0.9
    assert all(len(answers) == 1 + soak.COMPANIES for answers in expected.values())
    right, mixed = (asyncio.run(run(kind, expected)) for kind in (LlamaEngine, Mixing))
    assert "wrong" not in right["counts"] and "100, of" in soak.table({"adapters": 4, **right}).grid()
    assert (
        4 <= mixed["counts"]["wrong"] <= 10 and "for [" in mixed["problems"][0]
    )  # ten, but for those that were right by chance


class Coming:
    """A server of which adapters are taken out and brought back; it lies where `wrong` says."""

    def __init__(self, expected, wrong=None):
        self.expected, self.there, self.wrong = expected, {name for name, _ in expected}, wrong
        self.gone = 0

    def __call__(self, request):
        body = json.loads(request.content)
        if request.url.path.endswith("unload_lora_adapter"):
            self.gone += 1
            self.there.discard(body["lora_name"])
            return httpx.Response(200)
        if request.url.path.endswith("load_lora_adapter"):
            self.there.add(body["lora_name"])
            return httpx.Response(200)
        if body["model"] not in self.there and self.wrong != "answers":
            return httpx.Response(404)
        if self.wrong == "fails" and body["model"] == "a":
            return httpx.Response(503, text="busy")
        steps = self.expected[body["model"], int(body["prompt"])][0]
        said = {"tokens": [token for token, _ in steps], "top_logprobs": [tops for _, tops in steps]}
        return httpx.Response(200, json={"choices": [{"logprobs": said}]})


@pytest.mark.parametrize("wrong", [None, "answers", "fails"])
def test_adapters_come_and_go_during_a_soak(wrong, monkeypatch):
    monkeypatch.setattr(soak, "CHANGE", 20)
    monkeypatch.setattr(soak, "ABSENT", 5)
    expected = {(name, number): [[(name, {name: -1.0})]] for name in ("base", "a", "b", "c") for number in range(2)}
    server = Coming(expected, wrong)

    async def run():
        async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://test/v1") as client:
            return await soak.Soak(client, [("0", 1), ("1", 1)], expected, lambda: 1.0).run(400)

    counts = asyncio.run(run())["counts"]
    assert counts["changes"] == 20 and server.gone >= 2
    refused = counts.get("refused, as it should be", 0)
    assert (counts.get("error", 0) > 0) == (wrong is not None) and (refused > 0) == (wrong != "answers")
    assert counts["same"] + refused + counts.get("error", 0) == 400


@llama_cpp
def test_contexts_of_llama_cpp_and_their_adapters(whole):
    """The same logits in a context that switches and in one of its own, and no other adapter's."""
    from benchmarks.device.native import Native, compare

    catalogue = Catalogue.read(whole)
    some = [[catalogue.folder / file for file in model.apply] for model in catalogue.models.values()]
    native = Native(catalogue.base, some, 1)
    found = []
    for number in range(len(some)):
        context = native.context()
        native.switch(context, number)
        native.read(context, range(40, 60))
        found.append(native.logits(context, 50))
    assert min(max(map(abs, map(float.__sub__, *pair))) for pair in itertools.combinations(found, 2)) > 0.1
    single = native.context()
    for number in (0, 1):
        native.switch(single, number)
        native.read(single, range(40, 60))
    native.switch(native.context(), 2)  # another context's
    assert native.logits(single, 50) != found[1]  # it read the first text too
    times = compare(catalogue.base, some, 1)
    assert all(times[name] > 0 for name in ("same_ms", "turns_ms", "own_ms"))
    assert "| 5 |" in contexts.table({"rows": [{"count": 5, **times}]}).grid()
    with pytest.raises(RuntimeError, match="does not load"):
        Native(catalogue.folder / "manifest.json", some, 1)


def test_a_worker_measures_transformers_and_peft(folder, tmp_path):
    base = folder[1].parent / "base"
    model = get_peft_model(load_model(base, torch.bfloat16), lora_config(4, 8, ["q_proj"]))
    model.save_pretrained(tmp_path)
    made = worker.Peft(str(base), [str(tmp_path)], 3, 1)
    try:
        assert made.names == ["a0", "a1", "a2"] and made.decode() > 0
        found = made.load(3, 2, mixed=True)
        assert 0 < found["switch_ms"] < found["p50_ms"] <= found["max_ms"]
    finally:
        torch.set_num_threads(1)


@llama_cpp
def test_a_worker_measures_llama_cpp(whole):
    made = worker.Llama(str(whole), 1)
    assert made.on[-1] == "adapters/letters3.gguf" and made.decode() > 0
    made.runner.run(made.engine.close())
    made.runner.close()


def test_a_load_is_of_all_clients_together(folder):
    events = ["x", "y", "z"]

    async def answer(request):
        await asyncio.sleep(0.01)
        lines = [f"data: {json.dumps({'choices': [{'text': text}]})}\n\n" for text in events]
        return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))

    async def run():
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test") as client:
            start = time.perf_counter()
            found = await load(4, 40, 3, lambda _: (client, "a"))
            return found, time.perf_counter() - start

    found, seconds = asyncio.run(run())
    assert found["requests_per_second"] == pytest.approx(40 / seconds, rel=0.2)
    assert 10 <= found["p50_ms"] <= found["p95_ms"] <= found["max_ms"]


def test_a_switch_is_what_the_other_adapter_takes_longer():
    """A server that waits 20 ms whenever the model is another one than the last one's."""
    last = [""]

    async def answer(request):
        model = json.loads(request.content)["model"]
        await asyncio.sleep(0.005 + 0.02 * (model != last[0]))
        last[0] = model
        return httpx.Response(200, text='data: {"choices": [{"text": "x"}]}\n\ndata: [DONE]\n\n')

    async def run():
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test") as client:
            return await many._switch(SimpleNamespace(requests=10), [(client, "a"), (client, "b")])

    assert asyncio.run(run()) == pytest.approx(20, abs=5)


def test_more_servers_are_computed_from_those_that_ran():
    run = {4: {"memory_mb": 400.0, "files_mb": 40.0, "alone_1": {}}, 1: {"memory_mb": 120.0, "files_mb": 10.0}}
    found = many.computed(run, 16)
    assert found["memory_mb"] == 1600 and found["files_mb"] == 160 and found["computed"]


def test_tables_of_rows():
    rate = {"requests_per_second": 2.0, "p95_ms": 300.0}
    rows = [
        {"what": many.OURS, "count": 4, "threads": 2, "memory_mb": 1500.0, "files_mb": 10.0, "switch_ms": 3.0, **dict.fromkeys(("alone_1", "mixed_1", "alone_4", "mixed_4"), rate)},
        {"what": many.MERGED["bf16"], "count": 16, "threads": 2, "memory_mb": 9000.0, "files_mb": 10.0, "computed": True},
        {"what": many.PEFT, "count": 4, "threads": 2, "memory_mb": 900.0, "switch_ms": 2.0, "alone_1": rate, "mixed_1": rate},
    ]  # fmt: skip
    grid = many.table({"rows": rows}).rows
    assert grid[0][1:6] == ["4", "2", "1,500", "10", "3.0"] and grid[0][-1] == "300"
    assert grid[1][3] == "9,000, computed" and grid[1][5] == "0" and grid[2][4] == "" and grid[2][8] == ""
    rates = [[decode.PEFT, 2, "", [10.0, 20.0]], ["llama.cpp", 2, "1000", [90.0, 50.0, 40.0]]]
    assert decode.table({"rows": rates}).rows[1] == ["llama.cpp", "2", "1000", "90", "50", "4.5"]


def test_the_picture_has_what_was_measured():
    """A bar for each model, the best of its rows; a line for each way to have N tasks, without markers where it was computed."""
    rates = [[decode.PEFT, 2, "", [10.0]], [decode.PEFT, 1, "", [8.0]], ["llama.cpp", 2, "1000", [50.0, 40.0]]]
    rows = [
        {"what": what, "count": count, "memory_mb": 100.0 * count, **({"computed": True} if count == 16 else {})}
        for what in (many.OURS, *many.MERGED.values(), many.PEFT)
        for count in (1, 16)
    ]
    speed, memory = picture({"decode": {"rows": rates}, "many": {"rows": rows}}).axes
    assert [bar.get_width() for bar in speed.patches] == [50, 10]
    assert [text.get_text() for text in speed.texts] == ["50 (5.0x)", "10 (1.0x)"]
    lines = [list(line.get_xdata()) for line in memory.lines]
    assert lines == [[1, 16], [1]] * 4 and len(memory.get_legend().texts) == 4


def test_every_part_has_its_place_in_the_docs(capsys):
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    for part in PARTS:
        assert all(page.count(MARKS.format(f"{end}: {part}", "benchmarks.device")) == 1 for end in ("start", "end"))
    with pytest.raises(SystemExit):
        main(["everything"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize(("given", "expected"), [(None, "1000"), ("7", "7")])
def test_threads_sleep_early_unless_somebody_says_otherwise(monkeypatch, given, expected):
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    runtime.library()
    assert os.environ["GOMP_SPINCOUNT"] == expected
