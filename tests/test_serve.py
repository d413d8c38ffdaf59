"""Serving an exported folder: whose turn it is, what a request may be, what is streamed, and that no answer is another adapter's."""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from calora.__main__ import main
from calora.compressed import load
from calora.device.app import make_app
from calora.device.catalogue import Catalogue, Model
from calora.device.choose import choose, prompt_ids, softmax
from calora.device.engine import LlamaEngine, Refused
from calora.device.export import export
from calora.device.limits import Limits
from calora.device.pool import Pool
from calora.device.queue import AdapterQueue, Full, Late
from calora.device.serve import _bind
from calora.device.table import classify_table, of_export
from calora.errors import CaloraError
from calora.evaluation.choice import Choice
from calora.models.loading import load_tokenizer
from calora.models.tasks import Task
from tests import test_export as exported
from tests.conftest import ROOT

llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
KEY = "a-key-of-the-tests"
MOVIES = Task("movies", "Review: {text}\nSentiment:", (" bad", " good"), 16, 4)
PAIRS = Task("pairs", "{one} and {two}", ("no", "yes"), 16, 4, likelihood="mean")
ESSAY = Task("essay", "{text}", (), 16, 4)
MODELS = {
    "base": Model("base", ("recovery.gguf",)),
    **{
        task.name: Model(task.name, ("recovery.gguf", f"adapters/{task.name}.gguf"), task)
        for task in (MOVIES, PAIRS, ESSAY)
    },
}
CATALOGUE = Catalogue(Path(), Path("base.gguf"), 128, MODELS)
LIMITS = Limits(slots=2, waiting=3, patience=5, seconds=5, tokens=32, body=4000, context=64)


class Fake:
    """A runtime whose tokens are characters, and which waits at `gate` where it has one."""

    def __init__(self):
        self.asked, self.closed, self.gate, self.error, self.broken = [], 0, None, None, None
        self.words = ["one", " two", " three"]

    async def _work(self, path, body, on):
        self.asked.append((path, dict(body), tuple(on)))
        if self.gate:
            await self.gate.wait()
        if self.error:
            raise self.error

    async def ask(self, path, body, on):
        await self._work(path, body, on)
        if path == "/completion":
            bias = [token for token, _ in body["logit_bias"]]
            top = [{"id": token, "prob": 0.5**place / 2} for place, token in enumerate(sorted(bias))]
            one = {"id": bias[0], "logprob": -bias[0] / 100}
            return {"completion_probabilities": [{"top_probs": top, **one}], "content": "x"}
        found = token_of("one", "top")
        if "chat" in path:
            choice = {"message": {"role": "assistant", "content": "one"}, "logprobs": {"content": [found]}}
            return {"object": "chat.completion", "model": "llama", "choices": [choice]}
        return {
            "object": "text_completion", "model": "llama", "choices": [{"text": "one", "logprobs": {"content": [found]}}]
        }  # fmt: skip

    @contextlib.asynccontextmanager
    async def stream(self, path, body, on):
        await self._work(path, body, on)
        try:
            yield self._pieces()
        finally:
            self.closed += 1

    async def _pieces(self):
        for word in self.words:
            choice = {"text": word, "logprobs": {"content": [token_of(word)]}}
            yield {"object": "text_completion", "model": "llama", "choices": [choice]}
        if self.broken:
            await self.broken()

    alive = True

    async def load(self, loras):
        raise AssertionError("all are in memory")

    async def tokenize(self, text, special=True):
        return [1, *text.encode()] if special else list(text.encode())

    async def healthy(self):
        return self.error is None

    async def close(self):
        self.closed += 1


def token_of(word, *tops):
    def one(text):
        return {"id": 1, "token": text, "logprob": -0.5, "bytes": list(text.encode())}

    return {**one(word), "top_logprobs": [one(word), *map(one, tops)]}


def pool_of(engine, limits, catalogue=CATALOGUE):
    """Everything of a catalogue is in this engine."""
    return Pool(catalogue, lambda _: engine, limits)


def with_client(test, engine=None, limits=LIMITS, key=KEY):
    """Run `test(client, engine)` against the application."""
    engine = engine or Fake()

    async def run():
        transport = httpx.ASGITransport(make_app(pool_of(engine, limits), limits, KEY))
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return await asyncio.wait_for(test(client, engine), 20)

    return asyncio.run(run())


def post(path, body, **options):
    """The answer to one request: (response, engine)."""

    async def test(client, engine):
        return await client.post(path, json=body), engine

    return with_client(test, **options)


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to that")


def text(**options):
    return {"model": "movies", "prompt": "hello", **options}


# Turns


def run_jobs(queue, jobs, seed=0):
    """Run (adapter, arrives after) jobs; the order in which they got their turns. Checks that adapters never mix."""
    order, running, rng = [], [], random.Random(seed)

    async def job(adapter, wait):
        for _ in range(wait):
            await asyncio.sleep(0)
        async with queue.turn(adapter):
            running.append(adapter)
            order.append(adapter)
            assert len(set(running)) == 1 and len(running) <= queue.slots
            for _ in range(rng.randrange(1, 6)):
                await asyncio.sleep(0)
            running.remove(adapter)

    async def all_of_them():
        await asyncio.wait_for(asyncio.gather(*(job(*one) for one in jobs)), 20)

    asyncio.run(all_of_them())
    assert queue.length == queue.running == 0
    return order


def test_a_flood_of_one_adapter_does_not_starve_another():
    order = run_jobs(AdapterQueue(2, 100, 5), [("a", 0)] * 40 + [("b", 1)] * 3 + [("c", 2)])
    assert order.index("b") <= 4 and order.index("c") <= 6
    alone = run_jobs(AdapterQueue(2, 100, 5), [("a", 0)] * 40)
    assert alone == ["a"] * 40


@pytest.mark.parametrize("seed", range(5))
def test_adapters_never_mix_and_everyone_gets_a_turn(seed):
    rng = random.Random(seed)
    jobs = [(rng.choice("abcd"), rng.randrange(60)) for _ in range(120)]
    order = run_jobs(AdapterQueue(3, 200, 5), jobs, seed)
    assert sorted(order) == sorted(adapter for adapter, _ in jobs)


def test_who_waits_may_give_up_at_any_time():
    async def run():
        queue = AdapterQueue(1, 10, 5)

        async def job(adapter):
            async with queue.turn(adapter):
                pass

        async with queue.turn("a"):
            jobs = [asyncio.create_task(job(name)) for name in "babc"]
            await until(lambda: queue.length == 4)
            jobs[0].cancel()
            jobs[1].cancel()
        jobs[2].cancel()  # whose turn has just come, or is about to
        done = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(one) for one in done] == [asyncio.CancelledError] * 3 + [type(None)]
        assert queue.running == queue.length == 0
        await job("a")

    asyncio.run(asyncio.wait_for(run(), 20))


def test_others_go_on_when_the_one_they_stood_back_for_gives_up():
    async def run():
        queue, done = AdapterQueue(2, 10, 5), asyncio.Event()

        async def job(adapter):
            async with queue.turn(adapter):
                done.set()

        async with queue.turn("a"):
            async with queue.turn("a"):
                other, mine = asyncio.create_task(job("b")), asyncio.create_task(job("a"))
                await until(lambda: queue.length == 2)
            await asyncio.sleep(0)
            assert not done.is_set()  # the turn of a is over, b waits
            other.cancel()
            await mine  # while the first still runs
        assert done.is_set()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_queue_is_full_and_a_wait_is_over():
    async def run():
        queue = AdapterQueue(1, 1, 0.05)
        async with queue.turn("a"):
            late = asyncio.create_task(queue.turn("b").__aenter__())
            await until(lambda: queue.length == 1)
            with pytest.raises(Full):
                await queue.turn("a").__aenter__()
            with pytest.raises(Late):
                await late
            assert queue.length == 0
        async with queue.turn("b"):
            assert queue.running == 1

    asyncio.run(run())


# What a request may be


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/base", "/other", "/docs", "/v1/completions"])
def test_nothing_without_the_key(path):
    async def test(client, engine):
        for headers in ({"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}, {"Authorization": ""}):
            found = await client.get(path, headers=headers)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/health", headers={"Authorization": ""})).json()["status"] == "ok"

    with_client(test)


def test_health_tells_of_a_runtime_that_does_not_answer():
    engine = Fake()
    engine.error = Refused(500, "dead")

    async def test(client, engine):
        return (await client.get("/health")).status_code

    assert with_client(test, engine) == 503


def test_models_are_the_base_and_its_adapters():
    async def test(client, engine):
        found = (await client.get("/v1/models")).json()
        assert [one["id"] for one in found["data"]] == ["base", "movies", "pairs", "essay"]
        assert (await client.get("/v1/models/movies")).json()["task"]["answers"] == [" bad", " good"]
        assert (await client.get("/v1/models/other")).status_code == 404
        assert (await client.get("/v1/other")).json()["error"]["message"] == "Not Found"

    with_client(test)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}), ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}), ("/v1/classify", {"input": "x"}),
    ],
)  # fmt: skip
def test_an_unknown_model_is_not_the_base(path, body):
    found, engine = post(path, {"model": "film", **body})
    assert found.status_code == 404 and found.json()["error"]["code"] == "model_not_found"
    assert "base, movies" in found.json()["error"]["message"] and not engine.asked


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", text(lora=[]), "lora"), ("/v1/completions", text(id_slot=1), "id_slot"),
        ("/v1/completions", {"prompt": "x"}, "model"), ("/v1/completions", text(n=2), "n:"),
        ("/v1/completions", text(prompt=""), "prompt"), ("/v1/completions", text(prompt=["a", "b"]), "prompt"),
        ("/v1/completions", text(prompt=[-1]), "prompt"), ("/v1/completions", text(max_tokens=33), "max_tokens may be 32"),
        ("/v1/completions", text(temperature=9), "temperature"), ("/v1/completions", text(stream_options={}), "stream"),
        ("/v1/completions", text(logprobs=21), "logprobs"), ("/v1/chat/completions", text(), "messages"),
        ("/v1/chat/completions", {"model": "base", "messages": []}, "messages"),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "tool", "content": "x"}]}, "role"),
        ("/v1/classify", {"model": "base", "input": "x"}, "an adapter of a classification task"),
        ("/v1/classify", {"model": "essay", "input": "x"}, "answers are written"),
        ("/v1/classify", {"model": "pairs", "input": "x"}, "objects with one, two"),
        ("/v1/classify", {"model": "pairs", "input": [{"one": "x", "two": "y"}, {"one": "x"}]}, "column 'two'"),
        ("/v1/classify", {"model": "movies", "input": []}, "input"),
        ("/v1/classify", {"model": "movies", "input": ["x"] * 257}, "input"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_said_before_any_work(path, body, message):
    found, engine = post(path, body)
    assert found.status_code == 400 and message in found.json()["error"]["message"], found.text
    assert not engine.asked


def test_a_body_that_is_no_json():
    async def test(client, engine):
        return await client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})

    assert with_client(test).status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(chunked):
    async def pieces():
        for _ in range(9):
            yield b" " * 500

    async def test(client, engine):
        content = pieces() if chunked else b" " * 4500
        found = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert found.status_code == 413 and "4000 bytes" in found.json()["error"]["message"]

    with_client(test)


def test_a_slow_body_is_not_waited_for():
    async def run():
        app, sent = make_app(pool_of(Fake(), Limits(seconds=0.05)), Limits(seconds=0.05), KEY), []

        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
        await app(scope("/v1/completions", headers), receive, send)
        return sent[0]["status"]

    assert asyncio.run(asyncio.wait_for(run(), 20)) == 408


def scope(path, headers):
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("stream", [False, True])
def test_the_recovery_is_always_on(model, stream):
    for path, body in (
        ("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    ):  # fmt: skip
        found, engine = post(path, {"model": model, "stream": stream, **body})
        ((asked, _, on),) = engine.asked
        assert found.status_code == 200 and asked == path and on == MODELS[model].apply


def test_what_is_asked_of_llama_cpp():
    _, engine = post("/v1/completions", text(temperature=0, stop=["a"], user="me", logprobs=0, logit_bias={"5": -100}))
    assert engine.asked[0][1] == {
        "prompt": "hello", "max_tokens": 32, "cache_prompt": True, "temperature": 0.0, "stop": ["a"], "n_probs": 1, "n": 1,
        "logit_bias": {"5": -100.0},
    }  # fmt: skip
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    _, engine = post(
        "/v1/chat/completions", {"model": "base", "messages": messages, "max_completion_tokens": 7, "logprobs": True}
    )
    assert engine.asked[0][1] == {
        "messages": messages, "max_tokens": 7, "cache_prompt": True, "logprobs": True, "top_logprobs": 1, "n": 1
    }  # fmt: skip


# Answers


def test_answers_bear_the_name_of_the_model_and_log_probabilities():
    found = post("/v1/completions", text(logprobs=2))[0].json()
    assert found["model"] == "movies"
    assert found["choices"][0]["logprobs"] == {
        "tokens": ["one"], "token_logprobs": [-0.5], "top_logprobs": [{"one": -0.5, "top": -0.5}], "text_offset": [0]
    }  # fmt: skip
    assert post("/v1/completions", text(logprobs=0))[0].json()["choices"][0]["logprobs"]["top_logprobs"] is None
    chat = {"model": "base", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    ((one,),) = [c["logprobs"]["content"] for c in post("/v1/chat/completions", chat)[0].json()["choices"]]
    plain = {"token": "one", "logprob": -0.5, "bytes": [111, 110, 101]}
    assert one == {**plain, "top_logprobs": [plain]}


def test_a_stream_is_server_sent_events():
    found, engine = post("/v1/completions", text(stream=True, logprobs=1))
    assert found.headers["content-type"].startswith("text/event-stream") and engine.closed == 1
    *pieces, last, nothing = found.text.split("\n\n")
    assert last == "data: [DONE]" and nothing == ""
    read = [json.loads(piece.removeprefix("data: ")) for piece in pieces]
    assert [one["choices"][0]["text"] for one in read] == engine.words and read[0]["model"] == "movies"
    assert [one["choices"][0]["logprobs"]["text_offset"] for one in read] == [[0], [3], [7]]


def test_a_stream_that_fails_says_so():
    engine = Fake()
    engine.error = Refused(400, "the prompt is too long")
    found, _ = post("/v1/completions", text(stream=True), engine=engine)
    assert found.status_code == 400 and "the prompt is too long" in found.json()["error"]["message"]

    async def fail():
        raise Refused(500, "broken")

    async def hang():
        await asyncio.sleep(60)

    for how, message in ((fail, "broken"), (hang, "0.1 s")):
        engine = Fake()
        engine.broken = how
        found, _ = post("/v1/completions", text(stream=True), engine=engine, limits=Limits(seconds=0.1))
        *_, last, _ = found.text.split("\n\n")
        assert message in json.loads(last.removeprefix("data: "))["error"]["message"] and engine.closed == 1


def test_out_of_time_and_then_the_next():
    async def test(client, engine):
        engine.gate = asyncio.Event()
        found = await client.post("/v1/completions", json=text())
        assert found.status_code == 503 and "0.1 s" in found.json()["error"]["message"]
        engine.gate = None
        assert (await client.post("/v1/completions", json={**text(), "model": "base"})).status_code == 200

    with_client(test, limits=Limits(seconds=0.1))


def test_a_full_queue_is_said_and_empties():
    async def test(client, engine):
        engine.gate = asyncio.Event()
        some = [asyncio.create_task(client.post("/v1/completions", json=text())) for _ in range(5)]
        await until(lambda: len(engine.asked) == 2)
        await asyncio.sleep(0.02)
        full = await client.post("/v1/completions", json={**text(), "stream": True})
        assert full.status_code == 503 and full.headers["retry-after"] and full.json()["error"]["code"] == "queue_full"
        assert (await client.get("/health")).json() == {"status": "ok", "running": 2, "waiting": 3}
        engine.gate.set()
        assert [found.status_code for found in await asyncio.gather(*some)] == [200] * 5

    with_client(test)


def test_a_turn_that_does_not_come_is_said():
    async def test(client, engine):
        engine.gate = asyncio.Event()
        first = asyncio.create_task(client.post("/v1/completions", json=text()))
        await until(lambda: engine.asked)
        late = await client.post("/v1/completions", json={**text(), "model": "base"})
        assert late.status_code == 503 and late.json()["error"]["code"] == "queue_timeout"
        engine.gate.set()
        assert (await first).status_code == 200

    with_client(test, limits=Limits(patience=0.05))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_has_gone_leaves_its_place(stream, queued):
    async def run():
        engine = Fake()
        app = make_app(pool_of(engine, Limits(slots=1)), Limits(slots=1), KEY)
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            gate = engine.gate = asyncio.Event()
            first = asyncio.create_task(client.post("/v1/completions", json=text())) if queued else None
            await until(lambda: not queued or engine.asked)
            gone, body, sent = asyncio.Event(), json.dumps(text(stream=stream)).encode(), []
            messages = [{"type": "http.request", "body": body}]

            async def receive():
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            raw = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
            call = asyncio.create_task(app(scope("/v1/completions", raw), receive, send))

            async def busy():
                await asyncio.sleep(0)  # the rest never lets others run
                return (await client.get("/health")).json()

            for _ in range(1000):
                now = await busy()
                if (now["running"], now["waiting"]) == (1, int(queued)):
                    break
            else:
                raise AssertionError(now)
            gone.set()
            await call
            now = await busy()
            assert (now["running"], now["waiting"]) == (int(queued), 0)
            gate.set()
            if first:
                assert (await first).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_reader_who_leaves_a_stream_ends_it():
    async def run():
        engine = Fake()
        engine.words = ["x"] * 100_000
        app = make_app(pool_of(engine, Limits()), Limits(), KEY)
        messages, started = [{"type": "http.request", "body": json.dumps(text(stream=True)).encode()}], asyncio.Event()

        async def receive():
            if messages:
                return messages.pop()
            await started.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                started.set()
            await asyncio.sleep(0)

        raw = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
        await app(scope("/v1/completions", raw), receive, send)
        await until(lambda: engine.closed == 1)

    asyncio.run(asyncio.wait_for(run(), 20))


# Choosing among answers


def test_classify_answers_as_vllm_does():
    asked = [{"one": "a", "two": "b"}, {"one": "c", "two": "d"}]
    found, engine = post("/v1/classify", {"model": "pairs", "input": asked})
    data = found.json()["data"]
    # the fake says exp(-id / 100) of each token; the task counts their mean
    expected = softmax([-sum(word.encode()) / len(word) / 100 for word in ("no", "yes")])
    for index, one in enumerate(data):
        assert one["index"] == index and one["labels"] == ["no", "yes"] and one["num_classes"] == 2
        assert one["probs"] == pytest.approx(expected) and one["label"] == "no"
    assert found.json()["usage"]["prompt_tokens"] == 2 * len("?a and b")
    assert {on for *_, on in engine.asked} == {MODELS["pairs"].apply}
    prompts = [body["prompt"] for _, body, _ in engine.asked if body["prompt"][1] == ord("a")]
    assert sorted(map(len, prompts)) == [8, 8, 9, 9, 10]  # "no" and "yes", token by token


def test_many_texts_leave_the_queue_to_others():
    async def test(client, engine):
        found = await client.post("/v1/classify", json={"model": "movies", "input": ["x"] * 50})
        assert len(found.json()["data"]) == 50

    with_client(test)  # with 3 places to wait


def test_one_token_answers_take_one_pass():
    task = Task("letters", "{text}", ("b", "a"), 16, 4)
    engine = Fake()
    found = asyncio.run(choose(engine, Model("letters", (), task), {"text": "x"}, 64))
    assert found.answer == "a" and found.probabilities == pytest.approx([1 / 3, 2 / 3]) and len(engine.asked) == 1


@pytest.mark.parametrize("length", [3, 16, 17, 60])
def test_a_long_prompt_is_cut_as_torch_cuts_it(llama, length):
    tokenizer = load_tokenizer(llama)
    engine = Fake()

    async def tokenize(text, special=True):
        return tokenizer(text, add_special_tokens=special).input_ids

    engine.tokenize = tokenize
    task = Task("toy", "Review: {text} Sentiment:", ("good", "bad"), 16, 4)
    row = {"text": " ".join(["film", "plot", "was", "good"] * length)[: 5 * length]}
    assert asyncio.run(prompt_ids(engine, task.render(row), 16)) == task.encode(tokenizer, row).prompt_ids


# A table


class Chooser:
    """A model that always chooses the second answer, and remembers what it was asked."""

    def __init__(self, task):
        self.task, self.asked, self.broken = task, [], None

    def choose(self, rows):
        if self.broken and len(self.asked) >= self.broken:
            raise KeyboardInterrupt
        self.asked += rows
        return [Choice.of(self.task.choices(row), [0.25, 0.75], 1) for row in rows]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """(file, out, a function that classifies it, the model)."""
    monkeypatch.setattr("calora.device.table.CHUNK", 4)
    file, out, model = tmp_path / "in.csv", tmp_path / "out.csv", Chooser(MOVIES)
    file.write_text("id,review\n" + "".join(f'{number},"text, {number}"\n' for number in range(10)))

    def run(task=MOVIES, columns=None, identity=("base",)):
        columns = {"text": "review"} if columns is None else columns
        return classify_table(task, identity, lambda: model, file, out, columns)

    return file, out, run, model


def test_a_table_gets_labels(table):
    _, out, run, model = table
    assert run() == {"good": 10} and len(model.asked) == 10
    lines = out.read_text().splitlines()
    assert lines[0] == "id,review,label,probability" and lines[3] == '2,"text, 2",good,0.75'
    assert [one.name for one in out.parent.glob(".*")] == []


def test_a_table_goes_on_where_it_was_stopped(table):
    _, out, run, model = table
    model.broken = 4
    with pytest.raises(KeyboardInterrupt):
        run()
    (partial,) = out.parent.glob(".out.csv.*.partial")
    assert len(partial.read_text().splitlines()) == 4 and not out.exists()
    with partial.open("a") as stream:
        stream.write('{"label": "go')  # a line that was cut
    model.broken = None
    run()
    assert len(out.read_text().splitlines()) == 11 and not partial.exists()
    assert [row["text"] for row in model.asked] == [f"text, {number}" for number in range(10)]


def test_another_base_starts_a_table_anew(table):
    _, _, run, model = table
    model.broken = 4
    with pytest.raises(KeyboardInterrupt):
        run()
    model.broken = None
    run(identity=("another",))
    assert len(model.asked) == 14


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {"columns": {}}, "--column text=HEADER"), (None, {"columns": {"film": "review"}}, "columns of the prompt"),
        (None, {"task": ESSAY}, "written ones"), ("id,review\n", {}, "a header and a row"),
        ("id,review\n1,good\n2\n", {}, "row 2: expected 2 fields"), ("id,review\n1,good\n2,\n", {}, "row 2"),
        ("id,id\n1,2\n", {}, "twice"), (b"id,review\n1,\xff\n", {}, "UTF-8"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_said_before_any_work(table, content, options, message):
    file, out, run, model = table
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CaloraError, match=re.escape(message)) as told:
        run(**options)
    assert not model.asked and not out.exists() and "\n" not in str(told.value)


def test_the_adapter_of_a_folder_is_named_or_the_only_one(monkeypatch):
    monkeypatch.setattr(Catalogue, "read", classmethod(lambda *_: CATALOGUE))
    monkeypatch.setattr("calora.device.table.sha256", str)
    name, task, identity = of_export(Path("out"), "pairs")
    assert (name, task) == ("pairs", PAIRS)
    assert identity == ["out/base.gguf", "out/recovery.gguf", "out/adapters/pairs.gguf"]
    for adapter, said in (("film", "one of movies, pairs"), (None, "movies, pairs"), ("essay", "answers are written")):
        with pytest.raises(CaloraError, match=re.escape(said)):
            of_export(Path("out"), adapter)
    only = replace(CATALOGUE, models={name: MODELS[name] for name in ("base", "movies", "essay")})
    monkeypatch.setattr(Catalogue, "read", classmethod(lambda *_: only))
    assert of_export(Path("out"), None)[0] == "movies"


# Real folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(exported folder, compressed base, adapters): a recovery, an adapter of long answers and one of single tokens; all in fp32."""
    place = tmp_path_factory.mktemp("served")
    prune = {"prune": {"score": "magnitude", "pattern": "2:4"}}
    compressed = exported.make_compressed(
        place, [prune, exported.RECOVER], intermediate_size=128, dtype=torch.float32
    )  # fmt: skip
    letters = Task("letters", "Review: {text}\nSentiment:", ("a", "b", "c"), 64, 4).to_json()
    adapters = {
        "words": exported.make_adapter(place / "words", compressed, size=0.15),
        "letters": exported.make_adapter(place / "letters", compressed, size=0.25, task=letters),
    }
    export(compressed, adapters, place / "out", adapter_type="F32")
    return place / "out", compressed, adapters


@pytest.fixture
def copied(folder, tmp_path):
    import shutil

    return shutil.copytree(folder[0], tmp_path / "copy")


def test_a_folder_is_read(folder):
    found = Catalogue.read(folder[0])
    assert list(found.models) == ["base", "words", "letters"] and found.context == 256
    assert found.models["base"].apply == ("recovery.gguf",)
    assert found.models["words"].apply == ("recovery.gguf", "adapters/words.gguf")


def test_a_truncated_file_ends_the_start_in_one_line(copied, capsys):
    path = copied / "base.gguf"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["serve", str(copied), "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "base.gguf" in told and "bytes" in told


def test_an_adapter_of_another_base_ends_the_start_in_one_line(copied, tmp_path, capsys):
    from calora.common.files import read_json, sha256, write_json

    other = exported.make_compressed(tmp_path, [exported.INT8])
    export(other, {"words": exported.make_adapter(tmp_path / "adapter", other)}, tmp_path / "other")
    path = copied / "adapters/words.gguf"
    path.write_bytes((tmp_path / "other/adapters/words.gguf").read_bytes())
    about = read_json(copied / "manifest.json", "")
    about["files"]["adapters/words.gguf"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(copied / "manifest.json", about)
    capsys.readouterr()
    assert main(["serve", str(copied), "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "its compressed base" in told


def test_other_mistakes_at_the_start(copied, monkeypatch, capsys, tmp_path):
    def told(*options, folder=copied):
        assert main(["serve", str(folder), "--port", "0", *options]) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "no such file" in told(folder=tmp_path)
    assert "--slots: expected more than 0" in told("--slots", "0")
    monkeypatch.setenv("CALORA_API_KEY", "short")
    assert "16 printable characters" in told()
    monkeypatch.delenv("CALORA_API_KEY")
    assert "a port" in told("--port", "99999")
    assert "an address that is free" in told("--host", "256.0.0.1")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert "pip install 'calora[device]'" in told()


def test_serving_needs_no_torch():
    code = "import calora.device.serve, calora.device.llama, calora.device.table, calora.runtimes, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


TEXTS = [{"text": "a good film, the plot was great"}, {"text": "a good film, the plot was dull"}, {"text": "great"}]


def engine_of(catalogue, slots=2):
    return LlamaEngine(catalogue.base, catalogue.loras, catalogue.context, slots, 1)


@llama_cpp
@pytest.mark.parametrize("name", ["words", "letters"])
def test_choices_are_as_probable_as_in_torch(folder, name):
    out, compressed, adapters = folder
    catalogue = Catalogue.read(out)
    ours, tokenizer = load(compressed, dense=True, dtype=torch.float32), load_tokenizer(compressed)
    ours.load_adapter(adapters[name], name)
    ours.set_adapter(name)
    task = catalogue.models[name].task

    async def run():
        engine = engine_of(catalogue)
        found = [await choose(engine, catalogue.models[name], row, 256) for row in TEXTS]
        await engine.close()
        return found

    for row, choice in zip(TEXTS, asyncio.run(run()), strict=True):
        prompt, sums = tokenizer(task.render(row)).input_ids, []
        for answer in task.answers:
            ids = tokenizer(answer, add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = ours(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)))
        # fp32 on both sides, in another order: 2e-3 a log-probability (docs/device.md), of up to eight tokens
        got = [math.log(one) for one in choice.probabilities]
        assert got == pytest.approx([math.log(one) for one in softmax(sums)], abs=2e-3 * 8)


@llama_cpp
@pytest.mark.parametrize("slots", [1, 2])
def test_no_answer_is_another_adapters(folder, slots):
    """llama.cpp's traps: LoRAs are on when they are loaded, and what another one left in a cache is used again."""
    catalogue = Catalogue.read(folder[0])
    on = {"nothing": (), **{name: model.apply for name, model in catalogue.models.items()}}
    prompts = (
        "Review: a good film, the plot was great, again and again",
        "All in all it is dull, and I did not see its end",
    )

    async def said(engine, name, prompt, cache=True):
        body = {"prompt": prompt, "n_probs": 1, "temperature": 0.0, "cache_prompt": cache, "n_predict": 1}
        found = await engine.ask("/completion", {**body, "logit_bias": [[70, 100.0]]}, on[name])
        return found["completion_probabilities"][0]["logprob"]

    async def run():
        engine, bare = engine_of(catalogue, slots), LlamaEngine(catalogue.base, {}, 256, 1, 1)
        fresh = {(name, prompt): await said(engine, name, prompt, cache=False) for name in on for prompt in prompts}
        for prompt in prompts:
            assert fresh["nothing", prompt] == pytest.approx(await said(bare, "nothing", prompt), abs=1e-4)
            values = sorted(fresh[name, prompt] for name in on)
            assert min(b - a for a, b in itertools.pairwise(values)) > 0.01  # they can be told apart
        rng = random.Random(0)
        for _ in range(100):
            one = rng.choice(list(fresh))
            assert await said(engine, *one) == pytest.approx(fresh[one], abs=1e-3), one
        await engine.close()
        await bare.close()

    asyncio.run(run())


@llama_cpp
def test_a_prompt_that_is_too_long_is_refused(folder):
    catalogue = Catalogue.read(folder[0])

    async def run():
        engine = engine_of(catalogue)
        for work in (
            engine.ask("/v1/completions", {"prompt": "x " * 400, "max_tokens": 1}, ()),
            engine.stream("/v1/completions", {"prompt": "x " * 400, "max_tokens": 1}, ()).__aenter__(),
        ):
            with pytest.raises(Refused, match="context") as told:
                await work
            assert told.value.status == 400
        for _ in range(110):  # more than llama.cpp answers on one connection
            assert await engine.tokenize("x")
        engine.client.base_url = "http://127.0.0.1:9"
        with pytest.raises(Refused, match="does not answer") as told:
            await engine.tokenize("x")
        assert told.value.status == 503 and not await engine.healthy()
        await engine.close()
        assert not await engine_is_up(engine)

    asyncio.run(run())


async def engine_is_up(engine):
    with contextlib.suppress(RuntimeError):
        return await engine.healthy()
    return False


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """An export of the base that was compressed."""
    out = tmp_path_factory.mktemp("reference") / "full"
    export(folder[1].parent / "base", [], out)
    return out


def test_a_reference_of_another_base_ends_the_start_in_one_line(folder, tmp_path, capsys):
    export(exported.make_base(tmp_path / "base"), [], tmp_path / "other")
    capsys.readouterr()
    assert main(["serve", str(folder[0]), "--port", "0", "--reference", str(tmp_path / "other")]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "an export of the base that" in told and "leave out --reference" in told


@llama_cpp
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_cleanly(folder, reference, number):
    command = [
        sys.executable,
        "-m",
        "calora",
        "serve",
        str(folder[0]),
        "--port",
        "0",
        "--threads",
        "1",
        "--context",
        "128",
        "--reference",
        str(reference),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "CALORA_API_KEY"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/v1", server.stdout.readline())[0]
            key = server.stdout.readline().removeprefix("API key: ").strip()
            assert server.stdout.readline() == f"to try it: {address.removesuffix('v1')}#key={key}\n"
            with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
                check_answers(client, address)
                taken = main(["serve", str(folder[0]), "--port", address.split(":")[2].removesuffix("/v1")])
                assert taken == 1
            server.send_signal(number)
            assert server.wait(30) == 0 and server.stdout.read() == "ended\n"
        finally:
            server.kill()


def check_answers(client, address):
    body = {"model": "words", "prompt": "Review: great\nSentiment:", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    whole = client.post(f"{address}/completions", json=body).json()
    assert whole["usage"]["completion_tokens"] == 5 and len(whole["choices"][0]["logprobs"]["tokens"]) == 5
    events = client.post(f"{address}/completions", json={**body, "stream": True}).text.split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events if event and event != "data: [DONE]"]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
    chat = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    assert client.post(f"{address}/chat/completions", json=chat).json()["object"] == "chat.completion"
    data = client.post(f"{address}/classify", json={"model": "letters", "input": ["a good film", "dull"]}).json()[
        "data"
    ]
    assert all(sum(one["probs"]) == pytest.approx(1) and one["labels"] == ["a", "b", "c"] for one in data)
    assert client.post(f"{address}/completions", json={**body, "model": "other"}).status_code == 404
    full = client.post(f"{address}/completions", json={**body, "model": "reference/base"}).json()
    assert full["model"] == "reference/base" and full["choices"][0]["logprobs"] != whole["choices"][0]["logprobs"]
    assert client.get(address.removesuffix("v1")).text.startswith("<!doctype html>")
    assert client.get(address, headers={"Host": "elsewhere.example"}).status_code == 421


def test_who_reads_the_address_may_come_at_once():
    """The server itself starts later, and a connection waits for it."""
    with _bind("127.0.0.1", 0) as bound, socket.create_connection(bound.getsockname(), 5):
        pass
