"""Adapters that come and go while a folder is served: which are in memory, that none is lost or mixed up, and that nothing stays behind."""

import asyncio
import contextlib
import importlib.util
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from calora.__main__ import main
from calora.common.files import read_json, write_json
from calora.device.app import make_app
from calora.device.catalogue import Catalogue, Model, NoSuchModel
from calora.device.engine import LlamaEngine, Refused
from calora.device.export import export
from calora.device.folder import read_folder
from calora.device.limits import Limits
from calora.device.pool import Pool
from calora.device.serve import _watch
from calora.errors import CaloraError
from calora.models.tasks import Task
from tests import test_export as exported
from tests.conftest import ROOT
from tests.test_serve import KEY, Fake, until

llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
LIMITS = Limits(slots=2, waiting=200, patience=60, seconds=60, tokens=32, context=64)
TASK = Task("movies", "Review: {text}\nSentiment:", (" bad", " good"), 16, 4)
SIZE = 1000  # bytes of an adapter
MB = SIZE / 1e6


class Runtime(Fake):
    """Knows which LoRAs it has, and that only they are asked for; `bad` are those that it refuses."""

    def __init__(self):
        super().__init__()
        self.loads, self.bad, self.busy, self.alive, self.hold = [], set(), 0, True, None

    def start(self, loras):
        self.has = self.first = set(loras)
        return self

    async def load(self, loras):
        assert not self.busy, "something runs"
        self.has, self.alive = set(), False
        await asyncio.sleep(0)
        if self.hold:
            await self.hold.wait()
        if self.bad & set(loras):
            raise CaloraError("llama.cpp", "files that it can load", "others", "export them again")
        self.has, self.alive = set(loras), True
        self.loads.append(self.has)

    async def _work(self, path, body, on):
        assert self.alive and set(on) <= self.has
        self.busy += 1
        try:
            await asyncio.sleep(0)
            await super()._work(path, body, on)
        finally:
            self.busy -= 1


def file_of(name):
    return f"adapters/{name}.gguf"


def models_of(names):
    found = {name: Model(name, ("recovery.gguf", file_of(name)), TASK) for name in names}
    return {"base": Model("base", ("recovery.gguf",)), **found}


@pytest.fixture
def place(tmp_path):
    """A folder whose files are as large as they should be, and nothing else."""
    (tmp_path / "adapters").mkdir()
    for name in ("base.gguf", "recovery.gguf", *map(file_of, "abcdef")):
        (tmp_path / name).write_bytes(b"x" * SIZE)
    return tmp_path


def pool_of(place, names="abc", memory=None, limits=LIMITS):
    engine = Runtime()
    catalogue = Catalogue(place, place / "base.gguf", 128, models_of(names))
    pool = Pool(catalogue, engine.start, limits, memory)

    return pool, engine


def given(monkeypatch, models=None):
    """What manifest.json has, and what a path is, without a look into the files."""
    monkeypatch.setattr(Catalogue, "listed", lambda self, changed=(): dict(models or self.models))
    monkeypatch.setattr(
        Catalogue, "opened", lambda self, name, path, allowed: Model(name, ("recovery.gguf", path), TASK)
    )


async def ask(pool, name):
    model = pool.catalogue[name]
    async with pool.turn(model):
        return await pool.engine.ask("/v1/completions", {}, model.apply)


def run(test):
    return asyncio.run(asyncio.wait_for(test, 60))


# What is in memory


def test_all_are_in_memory_without_a_limit(place):
    pool, engine = pool_of(place)
    assert engine.first == {"recovery.gguf", *map(file_of, "abc")}
    run(ask(pool, "c"))
    assert not engine.loads


@pytest.mark.parametrize("seed", range(3))
def test_the_least_recently_used_makes_room(place, seed):
    """One request at a time, against a list in which the last one asked for comes first."""
    pool, engine = pool_of(place, "abcdef", 3 * MB)
    assert engine.first == {"recovery.gguf", *map(file_of, "abc")}  # in the order of manifest.json
    rng, recent = random.Random(seed), list("abcdef")

    async def some():
        for _ in range(60):
            name = rng.choice("abcdef")
            was, loads = recent.index(name) < 3, len(engine.loads)
            recent.remove(name)
            recent.insert(0, name)
            await ask(pool, name)
            assert len(engine.loads) == loads + (not was)
            assert engine.has == {"recovery.gguf", *map(file_of, recent[:3])}
            assert [pool.has(pool.catalogue[one]) for one in "abcdef"] == [one in recent[:3] for one in "abcdef"]

    run(some())


def test_the_base_needs_no_room(place):
    pool, engine = pool_of(place, "ab", MB)

    async def some():
        for name in ("b", "base", "b", "base"):
            await ask(pool, name)

    run(some())
    assert len(engine.loads) == 1


def test_those_who_wait_are_brought_in_together(place):
    pool, engine = pool_of(place, "abcdef", 3 * MB)

    async def some():
        engine.gate = asyncio.Event()
        first = asyncio.create_task(ask(pool, "a"))
        await until(lambda: engine.asked)
        others = [asyncio.create_task(ask(pool, name)) for name in "dddefff"]
        await until(lambda: pool.queue.length == 7)
        engine.gate.set()
        await asyncio.gather(first, *others)

    run(some())
    assert engine.loads == [{"recovery.gguf", *map(file_of, "def")}]


@pytest.mark.parametrize("seed", range(3))
def test_many_requests_over_more_than_fits(place, seed):
    """The runtime checks that what is asked is there, and that nothing runs while it changes."""
    pool, engine = pool_of(place, "abcdef", 2 * MB)
    rng = random.Random(seed)

    async def some():
        await asyncio.gather(*(ask(pool, rng.choice(["base", *"abcdef"])) for _ in range(150)))

    run(some())
    assert len(engine.asked) == 150 and all(len(has) <= 3 for has in engine.loads)
    for _, _, on in engine.asked:
        assert on[0] == "recovery.gguf"


def test_a_limit_below_one_adapter_is_refused(place):
    with pytest.raises(CaloraError, match=r"--memory: expected 0\.001 MB or more, for adapter a, found 0\.0009 MB"):
        pool_of(place, memory=0.9 * MB)
    for memory in (0, -1, float("nan")):
        with pytest.raises(CaloraError, match="--memory: expected more than 0"):
            pool_of(place, memory=memory)


def test_a_runtime_that_ended_is_started_again(place):
    pool, engine = pool_of(place)

    async def some():
        engine.alive = False
        assert not pool.has(pool.catalogue["a"])
        await asyncio.gather(*(ask(pool, name) for name in "aabb"))

    run(some())
    assert engine.loads == [engine.first]


def test_a_file_that_was_exchanged_is_not_read(place):
    pool, engine = pool_of(place, "abc", 2 * MB)

    async def some():
        (place / file_of("c")).write_bytes(b"y" * SIZE)
        with pytest.raises(Refused, match="the file that was checked"):
            await ask(pool, "c")
        await ask(pool, "a")
        os.utime(place / "base.gguf", ns=(0, 0))
        engine.alive = False
        with pytest.raises(Refused, match="start the server again"):
            await ask(pool, "a")

    run(some())
    assert not engine.loads


def test_who_gives_up_in_the_middle_of_a_change_keeps_the_turn_to_its_end(place):
    pool, engine = pool_of(place, "abc", MB)

    async def some():
        engine.hold = asyncio.Event()
        first = asyncio.create_task(ask(pool, "b"))
        await until(lambda: pool.changes)
        other = asyncio.create_task(ask(pool, "base"))
        for _ in range(3):
            first.cancel()
            await asyncio.sleep(0.001)
        assert not first.done() and not other.done() and await pool.healthy()
        engine.hold.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        await other
        assert pool.queue.running == pool.queue.length == 0 and not pool.changes

    run(some())


def test_closed_in_the_middle_of_a_change(place):
    pool, engine = pool_of(place, "abc", MB)

    async def some():
        engine.hold = asyncio.Event()
        first = asyncio.create_task(ask(pool, "b"))
        await until(lambda: pool.changes)
        await pool.close()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert engine.closed == 1 and not pool.changes

    run(some())


# Who comes and goes


def test_an_adapter_is_added_and_removed(place, monkeypatch):
    given(monkeypatch)
    pool, engine = pool_of(place, "ab")

    async def some():
        assert (await pool.add("c", file_of("c"))).name == "c"
        await ask(pool, "c")
        await pool.remove("a")
        with pytest.raises(NoSuchModel, match="these are: base, b, c"):
            await ask(pool, "a")
        await pool.add("a", file_of("a"))
        await ask(pool, "a")

    run(some())
    assert engine.loads == [{"recovery.gguf", *map(file_of, names)} for names in ("abc", "bc", "abc")]


def test_a_new_one_is_in_memory_and_another_makes_room(place, monkeypatch):
    given(monkeypatch)
    pool, engine = pool_of(place, "ab", 2 * MB)

    async def some():
        await ask(pool, "a")
        await pool.add("c", file_of("c"))
        assert engine.has == {"recovery.gguf", *map(file_of, "ac")}
        await pool.remove("b")  # which is not in memory
        assert len(engine.loads) == 1
        (place / file_of("d")).write_bytes(b"x" * 3 * SIZE)
        with pytest.raises(CaloraError, match=r"--memory: expected 0\.003 MB or more, for adapter d"):
            await pool.add("d", file_of("d"))
        assert list(pool.catalogue.models) == ["base", "a", "c"] and len(engine.loads) == 1

    run(some())


def test_running_requests_end_and_waiting_ones_are_told(place, monkeypatch):
    given(monkeypatch)
    pool, engine = pool_of(place, "ab")

    async def some():
        engine.gate = asyncio.Event()
        running = [asyncio.create_task(ask(pool, "a")) for _ in range(2)]
        await until(lambda: engine.busy == 2)
        waiting = [asyncio.create_task(ask(pool, name)) for name in "aabb"]
        removal = asyncio.create_task(pool.remove("a"))
        await until(lambda: pool.queue.length == 5)
        with pytest.raises(NoSuchModel):
            await ask(pool, "a")
        assert not removal.done()
        engine.gate.set()
        await removal
        assert all(isinstance(one, dict) for one in await asyncio.gather(*running))
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in told] == [NoSuchModel] * 2 + [dict] * 2
        assert "while the request waited" in str(told[0])

    run(some())
    assert engine.loads == [{"recovery.gguf", file_of("b")}]


def test_two_adds_at_once(place, monkeypatch):
    given(monkeypatch)
    pool, engine = pool_of(place, "a")

    async def some():
        names = ("b", "c", "b")
        told = await asyncio.gather(*(pool.add(name, file_of(name)) for name in names), return_exceptions=True)
        assert [type(one) for one in told] == [Model, Model, CaloraError] and "are served, found b" in str(told[2])
        await asyncio.gather(*(ask(pool, name) for name in "abc"))

    run(some())
    assert engine.has == {"recovery.gguf", *map(file_of, "abc")}


def test_an_add_that_fails_leaves_what_was(place, monkeypatch):
    given(monkeypatch)
    pool, engine = pool_of(place, "ab")
    engine.bad = {file_of("c")}

    async def some():
        for jobs in ([], [asyncio.create_task(ask(pool, name)) for name in "abab"]):
            with pytest.raises(CaloraError, match="files that it can load"):
                await pool.add("c", file_of("c"))
            assert engine.has == engine.first  # before anyone asks
            await asyncio.gather(*jobs)
        assert list(pool.catalogue.models) == ["base", "a", "b"]
        engine.bad.clear()
        await pool.add("c", file_of("c"))

    run(some())
    assert engine.loads == [engine.first, engine.first, {"recovery.gguf", *map(file_of, "abc")}]


@pytest.mark.parametrize("seed", range(3))
def test_requests_while_adapters_come_and_go(place, monkeypatch, seed):
    given(monkeypatch)
    pool, _ = pool_of(place, "abcd", 2 * MB)
    rng = random.Random(seed)

    async def client():
        for _ in range(40):
            name = rng.choice("abcdef")
            try:
                await ask(pool, name)
            except NoSuchModel:
                assert name in "ef"
            await asyncio.sleep(0)

    async def operator():
        for _ in range(15):
            for name in "ef":
                await pool.add(name, file_of(name))
            await asyncio.gather(pool.remove("e"), pool.remove("f"))

    async def some():
        await asyncio.gather(operator(), *(client() for _ in range(5)))

    run(some())
    assert pool.queue.running == pool.queue.length == 0 and set(pool.catalogue.models) == {"base", *"abcd"}


def test_the_folder_is_followed(place, monkeypatch):
    listed = models_of("abc")
    given(monkeypatch, listed)
    pool, engine = pool_of(place, "abc")

    async def some():
        assert not await pool.follow()
        await pool.add("x", file_of("f"))
        del listed["a"]
        listed.update(models_of("d"))
        (place / file_of("c")).write_bytes(b"y" * SIZE)
        assert await pool.follow()
        assert set(pool.catalogue.models) == {"base", *"bcdx"}
        assert engine.has == {"recovery.gguf", *map(file_of, "bcdf")} and len(engine.loads) == 2
        await ask(pool, "c")
        await pool.remove("b")
        assert not await pool.follow()  # who was removed stays away
        assert "b" not in pool.catalogue.models

    run(some())


# Over HTTP, with real files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(compressed base, adapters by name, an export with two of them): a recovery, all in fp32."""
    place = tmp_path_factory.mktemp("pool")
    prune = {"prune": {"score": "magnitude", "pattern": "2:4"}}
    compressed = exported.make_compressed(
        place, [prune, exported.RECOVER], intermediate_size=128, dtype=torch.float32
    )  # fmt: skip
    adapters = {
        name: exported.make_adapter(place / name, compressed, size=0.1 + 0.1 * number)
        for number, name in enumerate("abcd")
    }
    export(compressed, {name: adapters[name] for name in "ab"}, place / "out", adapter_type="F32")
    return compressed, adapters, place / "out"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "served")


def add(made, folder, *names):
    return export(made[0], {name: made[1][name] for name in names}, folder, adapter_type="F32", add=True)


def test_export_adds_and_leaves_the_rest(made, folder, tmp_path):
    before = {path: path.stat().st_ino for path in folder.rglob("*.gguf")}
    add(made, folder, "c")
    about = add(made, folder, "d")
    assert {path: path.stat().st_ino for path in before} == before
    whole = export(made[0], made[1], tmp_path / "whole", adapter_type="F32")
    assert about == whole == read_folder(folder)  # as if all had been exported at once
    assert (folder / "README.md").read_text() == (tmp_path / "whole/README.md").read_text()
    assert {path.relative_to(folder) for path in folder.rglob("*")} == {
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")
    }
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_what_cannot_be_added_to_an_export(made, folder, tmp_path, capsys):
    compressed, adapters, _ = made
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def command(adapter, out, base=compressed):
        return ["export", str(base), str(adapter), "--add", "--out", str(out)]

    other = exported.make_compressed(tmp_path / "other", [exported.INT8])
    foreign = exported.make_adapter(tmp_path / "foreign", other)
    for arguments, message in (
        (command(f"a={adapters['c']}", folder), "names that it does not have, found a"),
        (command(f"x={foreign}", folder, other), "an export of"),
        (command(adapters["c"], tmp_path / "none"), "no such file"),
    ):
        assert main(arguments) == 1
        told = capsys.readouterr().err
        assert message in told.splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    write_json(folder / "manifest.json", {k: v for k, v in read_folder(folder).items() if k != "recovery"})
    assert main(command(f"c={adapters['c']}", folder)) == 1
    assert "recovery: expected one of beside, inside" in capsys.readouterr().err


def test_an_export_that_is_stopped_leaves_the_folder_as_it_was(made, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("calora.device.export.export_card", lambda about: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add(made, folder, "c")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_two_that_add_at_once_both_add(made, folder):
    """The second one waits for the first, and extends what that left."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: add(made, folder, name), "cd"))
    assert set(read_folder(folder)["adapters"]) == set("abcd")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_plain_folders_are_added_too(made, tmp_path):
    compressed, adapters, _ = made
    options = {"kinds": ["gguf", "peft"], "recovery": "inside"}
    export(compressed, {"a": adapters["a"]}, tmp_path / "out", **options)
    about = export(compressed, {"b": adapters["b"]}, tmp_path / "out", add=True)
    assert about == export(compressed, {name: adapters[name] for name in "ab"}, tmp_path / "out", **options)


def served(folder, test, start=None, limits=LIMITS, **options):
    """Run `test(client, pool)` against the application over a folder."""

    async def run():
        catalogue = Catalogue.read(folder)
        pool = Pool(catalogue, start or Runtime().start, limits, **options)
        headers = {"Authorization": f"Bearer {KEY}"}
        transport = httpx.ASGITransport(make_app(pool, limits, KEY))
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://test/v1", headers=headers, timeout=120
            ) as client:
                return await asyncio.wait_for(test(client, pool), 120)
        finally:
            await pool.close()

    return asyncio.run(run())


async def load(client, name, path=None):
    return await client.post("/load_lora_adapter", json={"lora_name": name, **({"lora_path": path} if path else {})})


async def unload(client, name):
    return await client.post("/unload_lora_adapter", json={"lora_name": name})


async def models(client):
    return {one["id"]: one["resident"] for one in (await client.get("/models")).json()["data"]}


def test_adapters_over_http(made, folder):
    async def test(client, pool):
        add(made, folder, "c")
        found = await load(client, "c")
        assert found.status_code == 200 and found.json()["resident"] and found.json()["task"]["name"] == "toy"
        assert await models(client) == {"base": True, "a": True, "b": False, "c": True}
        assert (await unload(client, "c")).json() == {"id": "c", "object": "model", "deleted": True}
        assert (await client.get("/models/c")).status_code == 404
        for model in "ab":
            asked = {"model": model, "prompt": "x"}
            assert (await client.post("/completions", json=asked)).status_code == 200
        assert await models(client) == {"base": True, "a": True, "b": True}

    size = (folder / file_of("a")).stat().st_size
    served(folder, test, memory=2.5 * size / 1e6)


def broken(folder, made, tmp_path):
    """Files that are none for this folder."""
    other = exported.make_compressed(tmp_path / "other", [exported.INT8])
    export(other, {"x": exported.make_adapter(tmp_path / "foreign", other)}, tmp_path / "elsewhere")
    good = (folder / file_of("a")).read_bytes()
    (folder / "short.gguf").write_bytes(good[:-100])
    shutil.copy(tmp_path / "elsewhere" / file_of("x"), folder / "foreign.gguf")
    shutil.copy(folder / file_of("a"), tmp_path / "outside.gguf")
    (folder / "link.gguf").symlink_to(tmp_path / "outside.gguf")


def test_what_cannot_be_added(made, folder, tmp_path):
    broken(folder, made, tmp_path)
    outside = str(tmp_path / "outside.gguf")

    async def test(client, pool):
        before = await models(client), dict(pool.stamps), pool.loaded
        for name, path, status, message in (
            ("c", None, 404, "manifest.json has no adapter 'c'; it has base, a, b"),
            ("a", None, 400, "another name than those that are served, found a"),
            ("base", file_of("a"), 400, "another name than those that are served, found base"),
            ("x y", file_of("a"), 400, "letters, digits, _ and -"),
            ("x", "../outside.gguf", 400, "a file in"),
            ("x", outside, 400, "a file in"),
            ("x", "link.gguf", 400, "a file in"),
            ("x", "adapters/none.gguf", 404, "There is no file"),
            ("x", "adapters", 404, "There is no file"),
            ("x", "a\0b", 404, "There is no file"),
            ("x", "y" * 3000, 404, "There is no file"),
            ("x", "base.gguf", 400, "an adapter that `calora export` wrote"),
            ("x", "README.md", 400, "a whole GGUF file"),
            ("x", "short.gguf", 400, "a whole GGUF file"),
            ("x", "foreign.gguf", 400, "its compressed base"),
        ):
            found = await load(client, name, path)
            assert found.status_code == status and message in found.json()["error"]["message"], found.text
        for path, body, status in (
            ("/load_lora_adapter", {}, 400), ("/load_lora_adapter", {"lora_name": "x", "scale": 1}, 400),
            ("/unload_lora_adapter", {"lora_name": "x"}, 404), ("/unload_lora_adapter", {"lora_name": "base"}, 400),
            ("/unload_lora_adapter", {"lora_name": None}, 400),
        ):  # fmt: skip
            assert (await client.post(path, json=body)).status_code == status
        assert (await models(client), dict(pool.stamps), pool.loaded) == before and not pool.engine.loads
        pool.allowed = [tmp_path]
        assert (await load(client, "x", outside)).status_code == 200
        assert pool.catalogue["x"].apply == ("recovery.gguf", outside)

    served(folder, test)


def test_a_truncated_adapter_of_the_manifest_is_not_added(made, folder):
    async def test(client, pool):
        add(made, folder, "c")
        path = folder / file_of("c")
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert "SHA-256" in (await load(client, "c")).json()["error"]["message"]
        path.write_bytes(path.read_bytes()[:-100])
        assert "bytes, found" in (await load(client, "c")).json()["error"]["message"]
        assert "c" not in await models(client)

    served(folder, test)


def test_the_server_looks_at_the_folder(made, folder, monkeypatch, capsys):
    monkeypatch.setattr("calora.device.serve.LOOK", 0.01)

    async def test(client, pool):
        watch = asyncio.create_task(_watch(pool))
        await asyncio.sleep(0)
        add(made, folder, "c")
        await soon(lambda: "c" in pool.catalogue.models)
        about = read_json(folder / "manifest.json", "")
        write_json(folder / "manifest.json", {**about, "compressed_fingerprint": "f"})
        await soon(lambda: "start the server again" in capsys.readouterr().err)
        del about["adapters"]["a"]
        write_json(folder / "manifest.json", about)
        await soon(lambda: "a" not in pool.catalogue.models and not pool.changes)
        watch.cancel()
        assert await models(client) == {"base": True, "b": True, "c": True}

    served(folder, test)


async def soon(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


# With llama.cpp


def llama(folder, limits=LIMITS):
    def start(loras):
        return LlamaEngine(folder / "base.gguf", loras, limits.context, limits.slots, 1)

    return start


PROMPTS = ("Review: a good film", "All in all it is dull", "again and again")


async def said(client, name, prompt):
    body = {"model": name, "prompt": prompt, "max_tokens": 3, "temperature": 0, "logprobs": 0}
    found = await client.post("/completions", json=body)
    if found.status_code != 200:
        return found.status_code
    choice = found.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@llama_cpp
def test_no_answer_is_lost_or_anothers_while_adapters_come_and_go(made, folder, tmp_path):
    """Against a server that has all of them from its start."""
    shutil.copytree(folder, tmp_path / "whole")
    add(made, tmp_path / "whole", "c", "d")
    names = ("base", *"abcd")

    async def fresh(client, pool):
        return {(name, prompt): await said(client, name, prompt) for name in names for prompt in PROMPTS}

    right = served(tmp_path / "whole", fresh, llama(tmp_path / "whole"))
    for prompt in PROMPTS:  # they can be told apart
        for one, two in itertools.combinations([right[name, prompt] for name in names], 2):
            assert one[0] != two[0] or max(abs(a - b) for a, b in zip(one[1], two[1], strict=True)) > 0.01

    async def test(client, pool):
        add(made, folder, "c", "d")
        rng, counts = random.Random(0), {200: 0, 404: 0}

        async def ask_on(number):
            while not done.is_set() or counts[200] < 30:
                name, prompt = rng.choice(names), rng.choice(PROMPTS)
                got = await said(client, name, prompt)
                if got == 404:
                    assert name in "cd"
                    counts[404] += 1
                    continue
                assert got[0] == right[name, prompt][0] and got[1] == pytest.approx(right[name, prompt][1], abs=1e-3)
                counts[200] += 1

        async def come_and_go():
            for _ in range(2):
                for act in (load, unload):
                    told = await asyncio.gather(act(client, "c"), act(client, "d"))
                    assert [one.status_code for one in told] == [200, 200]
                    await asyncio.sleep(0.1)
            done.set()

        done, before = asyncio.Event(), left_behind()
        await asyncio.gather(come_and_go(), *map(ask_on, range(4)))
        assert counts[404] and left_behind() == before

    size = (folder / file_of("a")).stat().st_size
    served(folder, test, llama(folder), memory=2.5 * size / 1e6)


def left_behind():
    """Threads, open files and children of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return (
        [thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")], len(os.listdir("/proc/self/fd")) if children.exists() else 0,
        len(children.read_text().split()) if children.exists() else 0,
    )  # fmt: skip


@llama_cpp
def test_an_adapter_that_llama_cpp_refuses_leaves_what_was(made, folder):
    about = read_json(folder / "manifest.json", "")
    (folder / "bad.gguf").write_bytes(with_wrong_name((folder / file_of("a")).read_bytes()))

    async def test(client, pool):
        before = await said(client, "a", PROMPTS[0])
        found = await load(client, "bad", "bad.gguf")
        assert found.status_code == 400 and "files that it can load" in found.json()["error"]["message"]
        assert await models(client) == {"base": True, "a": True, "b": True}
        assert await said(client, "a", PROMPTS[0]) == before
        pool.engine.worker.process.kill()
        await until(lambda: not pool.engine.alive)
        assert (await client.get("http://test/health")).status_code == 503
        assert not (await models(client))["a"]
        assert await said(client, "a", PROMPTS[0]) == before  # another one was started
        assert (await client.get("http://test/health")).status_code == 200

    assert about["files"]
    served(folder, test, llama(folder))


def with_wrong_name(content):
    """A GGUF file with a tensor that the base has not."""
    return content.replace(b"blk.0.attn_q", b"blk.7.attn_q")


@llama_cpp
def test_closing_in_a_change_leaves_no_process_and_no_port(folder):
    async def test(client, pool):
        await said(client, "a", PROMPTS[0])
        old, port = pool.engine.worker, pool.engine.client.base_url.port
        first = asyncio.create_task(unload(client, "b"))
        await soon(lambda: pool.engine.worker is not old)
        new = pool.engine.worker
        assert new.alive and not old.alive
        await pool.close()
        assert not new.alive
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)
        with contextlib.suppress(asyncio.CancelledError):
            await first

    served(folder, test, llama(folder))


@llama_cpp
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_in_a_change_leaves_no_process(folder, number):
    command = [sys.executable, "-m", "calora", "serve", str(folder), "--port", "0", "--threads", "1", "--context", "64"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = re.search(r"http://\S+/v1", server.stdout.readline())[0]
            key = server.stdout.readline().removeprefix("API key: ").strip()
            old = children(server.pid)
            change = threading.Thread(target=removal, args=(address, key))
            change.start()
            while not (new := children(server.pid)) - old:
                time.sleep(0.001)
            server.send_signal(number)
            assert server.wait(30) == (0 if number == signal.SIGTERM else -number)
        finally:
            server.kill()
    change.join()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in old | new):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def removal(address, key):
    with contextlib.suppress(httpx.HTTPError):
        headers = {"Authorization": f"Bearer {key}"}
        httpx.post(f"{address}/unload_lora_adapter", json={"lora_name": "b"}, headers=headers, timeout=60)


def children(pid):
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
