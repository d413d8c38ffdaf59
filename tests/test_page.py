"""The page to try a served folder: its files and their headers, what it is compared with, and using it in a browser as a person does."""

import asyncio
import contextlib
import importlib.util
import re
import socket
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import uvicorn

from calora.device import static
from calora.device.app import make_app
from calora.device.catalogue import Catalogue, Model
from calora.device.engine import Refused
from calora.device.limits import Limits
from calora.device.served import check_reference
from calora.errors import CaloraError
from calora.models.tasks import Task
from tests.conftest import ROOT
from tests.test_serve import KEY, LIMITS, MODELS, MOVIES, Fake, pool_of

PAGE = ROOT / "calora/device/page"
INHERITED = Model(
    "movies-inherited", ("recovery.gguf", "adapters/m.gguf"), MOVIES, "clm_inherited", 90_000_000, 4_000_000
)
SERVED = Catalogue(
    Path("device"), Path("base.gguf"), 128,
    {
        **MODELS, "movies": replace(MODELS["movies"], method="calora", base_bytes=90_000_000, adapter_bytes=5_000_000),
        "movies-inherited": INHERITED,
    },
    "of the compressed base", "of the base",
)  # fmt: skip
FULL = Catalogue(
    Path("full"), Path("base.gguf"), 128,
    {"base": Model("base", (), None, None, 270_000_000), "movies": Model("movies", ("adapters/movies.gguf",), MOVIES, "lora", 270_000_000, 5_000_000)},
    "of the base", "of the base",
)  # fmt: skip


def with_client(test, reference=True, hosts=None, key=KEY, base="http://test"):
    """Run `test(client, engine, engine of the reference)` against the application."""
    engine, other = Fake(), Fake()

    async def run():
        pools = pool_of(engine, LIMITS, SERVED), pool_of(other, LIMITS, FULL) if reference else None
        app = make_app(pools[0], LIMITS, KEY, pools[1], hosts)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base, headers=headers) as client:
            return await asyncio.wait_for(test(client, engine, other), 20)

    return asyncio.run(run())


# Files


def test_the_page_needs_no_key_and_loads_from_nowhere_else():
    async def test(client, *_):
        found = {path: await client.get(path) for path in static.PATHS}
        assert {one.status_code for one in found.values()} == {200}
        assert found["/"].headers["content-type"].startswith("text/html")
        assert found["/page.js"].headers["content-type"].startswith("text/javascript")
        for one in found.values():
            policy = one.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
            assert set(re.findall(r"(?:script|style|connect|img)-src ([^;]*)", policy)) == {"'self'"}
            assert (
                one.headers["x-content-type-options"] == "nosniff" and one.headers["referrer-policy"] == "no-referrer"
            )
            assert "set-cookie" not in one.headers and "access-control-allow-origin" not in one.headers
        assert (await client.head("/")).status_code == 200 and (await client.post("/")).status_code == 405

    with_client(test, key=None)


@pytest.mark.parametrize("path", ["/static.py", "/../static.py", "/page/index.html", "/index.html"])
def test_no_other_file_is_served(path):
    async def test(client, *_):
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers={"Authorization": f"Bearer {KEY}"})).status_code == 404

    with_client(test, key=None)


def test_every_file_is_shipped_and_says_nothing_that_the_policy_forbids():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["calora"]
    assert {f"device/page/{file.name}" for file in PAGE.iterdir()} <= {
        path.relative_to(ROOT / "calora").as_posix() for pattern in shipped for path in (ROOT / "calora").glob(pattern)
    }
    assert {file.suffix for file in PAGE.iterdir()} <= set(static.KINDS)
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.|@import|url\(", text), file
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage|cookie", text), file
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)


# Whom a request means


@pytest.mark.parametrize(
    ("base", "status"),
    [
        ("http://127.0.0.1:8080", 200), ("http://localhost", 200), ("http://LOCALHOST:1", 200), ("http://[::1]:8080", 200),
        ("http://attacker.example:8080", 421), ("http://127.0.0.1.attacker.example", 421), ("http://localhost.:80", 421),
    ],
)  # fmt: skip
def test_another_sites_name_is_refused_on_this_machine(base, status):
    async def test(client, *_):
        return [(await client.get(path)).status_code for path in ("/", "/health", "/v1/models")]

    assert with_client(test, hosts=("127.0.0.1", "localhost", "[::1]"), base=base) == [status] * 3
    assert with_client(test, base=base) == [200] * 3


# What it is compared with


def test_models_say_what_they_are_and_how_large():
    async def test(client, *_):
        listed = {one["id"]: one for one in (await client.get("/v1/models")).json()["data"]}
        assert [*listed][-2:] == ["reference/base", "reference/movies"] and len(listed) == len(SERVED.models) + 2
        assert listed["movies"]["max_tokens"] == 32 and listed["movies"]["max_model_len"] == 64
        assert listed["movies"]["bytes"] == {"base": 90_000_000, "adapter": 5_000_000}
        assert [listed[name].get("method") for name in ("base", "movies", "reference/movies")] == [
            None,
            "calora",
            "lora",
        ]
        assert [listed[name]["compressed"] for name in ("movies", "reference/movies")] == [True, False]
        assert (await client.get("/v1/models/reference/movies")).json() == listed["reference/movies"]
        assert (await client.get("/v1/models/reference/pairs")).status_code == 404

    with_client(test)


def test_the_reference_has_a_runtime_of_its_own():
    async def test(client, engine, other):
        for model, asked, idle, on in (
            ("reference/movies", other, engine, ("adapters/movies.gguf",)),
            ("reference/base", other, engine, ()),
            ("movies", engine, other, MODELS["movies"].apply),
        ):
            for path, body in (
                ("/v1/completions", {"prompt": "x"}), ("/v1/completions", {"prompt": "x", "stream": True}),
                ("/v1/classify", {"input": "x", "task": "movies"}),
            ):  # fmt: skip
                before = len(idle.asked)
                found = await client.post(path, json={"model": model, **body})
                assert found.status_code == 200 and f'"model":"{model}"' in found.text.replace(": ", ":")
                assert asked.asked[-1][2] == on and len(idle.asked) == before

    with_client(test)


def test_a_full_queue_of_one_side_leaves_the_other_free():
    async def test(client, engine, other):
        engine.gate = asyncio.Event()
        some = [
            asyncio.create_task(client.post("/v1/completions", json={"model": "movies", "prompt": "x"}))
            for _ in range(5)
        ]
        while len(engine.asked) < 2:
            await asyncio.sleep(0.001)
        assert (
            await client.post("/v1/completions", json={"model": "reference/movies", "prompt": "x"})
        ).status_code == 200
        assert (await client.get("/health")).json() == {"status": "ok", "running": 2, "waiting": 3}
        other.error = Refused(500, "dead")
        assert (await client.get("/health")).status_code == 503
        engine.gate.set()
        await asyncio.gather(*some)

    with_client(test)


def test_a_base_takes_the_task_of_an_adapter():
    async def test(client, engine, _):
        body = {"model": "base", "input": "x"}
        assert (await client.post("/v1/classify", json=body)).status_code == 400
        assert (await client.post("/v1/classify", json={**body, "task": "essay"})).status_code == 400
        assert (await client.post("/v1/classify", json={**body, "task": "nobody"})).status_code == 404
        assert not engine.asked
        found = (await client.post("/v1/classify", json={**body, "task": "movies"})).json()
        assert found["data"][0]["labels"] == ["bad", "good"] and found["model"] == "base"
        assert {on for *_, on in engine.asked} == {MODELS["base"].apply}

    with_client(test)


@pytest.mark.parametrize("cached", [True, False])
def test_a_prompt_is_read_anew_where_that_is_asked_for(cached):
    async def test(client, engine, _):
        await client.post("/v1/completions", json={"model": "base", "prompt": "x", "cache_prompt": cached})
        await client.post("/v1/classify", json={"model": "movies", "input": "x", "cache_prompt": cached})
        first, *passes = [body["cache_prompt"] for _, body, _ in engine.asked]
        # of an answer of several tokens the passes after the first go on from it
        assert first is cached and passes[0] is cached and len(passes) > 1 and all(passes[1:])

    with_client(test)


def test_a_reference_is_of_the_same_base():
    check_reference(SERVED, FULL)
    with pytest.raises(CaloraError, match="--reference full: expected an export of the base that device was made of"):
        check_reference(SERVED, replace(FULL, uncompressed="another"))


# In a browser


class Slow(Fake):
    """A runtime that takes its time over each word, and counts its work as llama.cpp does."""

    def __init__(self, words=("one", " two", " three"), pause=0.0):
        super().__init__()
        self.words, self.pause = list(words), pause

    async def _pieces(self):
        for number, word in enumerate(self.words):
            await asyncio.sleep(self.pause)
            last = number == len(self.words) - 1
            end = {"timings": {"predicted_n": len(self.words), "predicted_per_second": 12.34}} if last else {}
            said = {"text": word, "delta": {"content": word}, "finish_reason": "length" if last else None}
            yield {"object": "text_completion", "choices": [said], **end}
        if self.broken:
            await self.broken()


class Site:
    """The application on a port of this machine, in a thread."""

    def __init__(self, served=SERVED, reference=FULL, engine=None, other=None, limits=LIMITS, key=KEY, port=0):
        self.engine, self.other, self.key = engine or Slow(), other or Slow(), key
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        other = pool_of(self.other, limits, reference) if reference else None
        app = make_app(pool_of(self.engine, limits, served), limits, key, other, ("127.0.0.1",))
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.socket]))
        self.thread.start()

    def url(self, key=True):
        return f"http://127.0.0.1:{self.port}/{f'#key={self.key}' if key else ''}"

    def end(self):
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def driver():
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed")
    from benchmarks.chromium import BROWSER, DRIVER, chromium

    if missing := [path for path in (BROWSER, DRIVER) if not Path(path).exists()]:
        pytest.skip(f"{missing[0]} is not installed")
    made = chromium(1000, 900)
    yield made
    made.quit()


@pytest.fixture
def sites():
    """Makes sites that end with the test."""
    some = []

    def make(**options):
        some.append(Site(**options))
        return some[-1]

    yield make
    for one in some:
        one.end()


class Person:
    """Who uses the page: looks by labels and texts, types and presses keys."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get("about:blank")  # an address that differs by its fragment alone is not loaded again
        driver.get(url)

    def find(self, css):
        return [one for one in self.driver.find_elements("css selector", css) if one.is_displayed()]

    def see(self, text, css="body", seconds=15):
        """Wait until a text stands somewhere."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # it is just being replaced
                if any(text in one.text for one in self.find(css)):
                    return
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in {[one.text for one in self.find(css)]}")

    def type(self, text):
        self.driver.switch_to.active_element.send_keys(text)

    def press(self, *keys):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        chain = ActionChains(self.driver)
        named = [getattr(Keys, key.upper(), key) for key in keys]
        for key in named[:-1]:
            chain.key_down(key)
        chain.send_keys(named[-1])
        for key in named[:-1]:
            chain.key_up(key)
        chain.perform()

    def choose(self, label):
        self.see(label, "option")
        next(one for one in self.find("option") if one.text == label).click()

    @property
    def columns(self):
        return {one.text.splitlines()[0]: one.text for one in self.find(".column")}

    @property
    def focused(self):
        return self.driver.switch_to.active_element.get_attribute("id")


def quiet(driver):
    """The console has said nothing: no error of a script, nothing that the policy refused."""
    return [one["message"] for one in driver.get_log("browser") if "status of" not in one["message"]] == []


def test_compare_a_text(driver, sites):
    site = sites()
    person = Person(driver, site.url())
    person.see("Compare", "#run")
    assert driver.current_url == site.url(key=False)  # the key has gone from the address
    assert list(person.columns) == ["Uncompressed + LoRA", "Compressed", "Inherited LoRA", "CA-LoRA"]
    assert "95.0 MB" in person.columns["CA-LoRA"] and "275.0 MB" in person.columns["Uncompressed + LoRA"]
    person.press("control", "enter")
    person.see("type or paste one first", "#text-said")
    assert person.find("textarea[aria-invalid=true][aria-describedby=text-said]")
    assert person.focused == "text-text" and not site.engine.asked
    person.type("a fine <b>film</b>")
    person.press("control", "enter")
    person.see("done in", "#status")
    for text in person.columns.values():
        assert re.search(r"bad\n\d+\.\d %\ngood\n\d+\.\d %", text) and "tokens/s" in text and "tokens read" in text
    prompts = {bytes(body["prompt"][1:]) for _, body, _ in site.engine.asked}
    assert b"</b>\nSentiment:" in prompts  # the end of the prompt, in as many tokens as the task reads
    assert site.engine.asked[0][2] == MODELS["base"].apply
    assert quiet(driver)


def test_answers_are_streamed_as_text_and_escape_ends_them(driver, sites):
    words = ["<img src=x onerror=alert(1)>", *[" word"] * 1000]
    site = sites(engine=Slow(words, 0.05), other=Slow(["a", " b"]), limits=replace(LIMITS, seconds=60))
    person = Person(driver, site.url())
    person.choose("no task: answer a message")
    person.find("textarea")[0].send_keys("hello")
    person.press("control", "enter")
    person.see("word word word", ".column[data-state=busy]")
    assert (
        "12.3 tokens/s" in person.columns["Uncompressed"] and "as many as asked for" in person.columns["Uncompressed"]
    )
    assert "<img src=x onerror=alert(1)>" in person.columns["Compressed"] and not driver.find_elements(
        "css selector", "main img"
    )
    assert site.engine.closed == 0
    person.press("escape")
    person.see("stopped", "#status")
    deadline = time.monotonic() + 10
    while site.engine.closed == 0:  # the server has let go of it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "word word" in person.columns["Compressed"] and "stopped" in person.columns["Compressed"]
    assert quiet(driver)


def test_nothing_is_lost_on_reload(driver, sites):
    site = sites()
    person = Person(driver, site.url())
    person.choose("pairs")
    one, two = person.find("textarea")
    one.send_keys("first\nline")
    two.send_keys("second")
    next(label for label in person.find("#models label") if label.text == "Uncompressed").click()
    driver.refresh()
    person.see("Compare", "#run")
    assert [field.get_attribute("value") for field in person.find("textarea")] == ["first\nline", "second"]
    assert list(person.columns) == ["Compressed", "adapter"]
    person.find("#run")[0].click()
    person.see("done in", "#status")
    assert driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]


def test_a_wrong_key_and_a_server_that_has_gone_are_said(driver, sites):
    site = sites()
    person = Person(driver, site.url(key=False))
    person.see("Paste the key", "#entry")
    person.type("not the key")
    person.press("enter")
    person.see("not the key", "#entry-said")
    person.type(KEY)
    person.press("enter")
    person.see("Compare", "#run")
    person.type("some text")
    site.end()
    person.press("control", "enter")
    person.see("Is calora serve still running?", "#trouble")
    again = sites(key="another-key-of-the-tests", port=site.port)
    person.press("control", "enter")
    person.see("prints a new one whenever it starts", "#entry-said")
    person.type(again.key)
    person.press("enter")
    person.see("Compare", "#run")
    assert person.find("textarea")[0].get_attribute("value") == "some text" and not person.find("#entry, #trouble")


def test_what_a_model_cannot_do_is_said_in_its_column_or_at_the_text(driver, sites):
    engine, other = Slow(), Slow()
    engine.error = Refused(
        400, "request (900 tokens) exceeds the available context size (64 tokens), try increasing it"
    )
    site = sites(
        engine=engine,
        other=other,
        limits=Limits(slots=1, waiting=1, patience=0.2, seconds=0.3, tokens=64, body=3000, context=64),
    )
    person = Person(driver, site.url())
    person.choose("no task: continue a text")
    person.find("textarea")[0].send_keys("hello")
    person.press("control", "enter")
    person.see("it has 900 tokens, and the server reads 64 at most", "#text-said")
    assert "one two three" in person.columns["Uncompressed"]
    engine.error, engine.gate = None, asyncio.Event()
    person.press("control", "enter")
    person.see("It took longer than the server lets a request run", ".column[data-state=trouble]")
    person.see("1 of 2 gave no answer", "#status")

    async def fail():
        raise Refused(500, "something broke")

    engine.gate, engine.broken = None, fail
    person.press("control", "enter")
    person.see("one two three\nllama.cpp: something broke", ".column[data-state=trouble]")
    driver.execute_script("document.querySelector('textarea').value = 'long '.repeat(1000)")
    person.press("control", "enter")
    person.see("The text is too long for one request", "#text-said")
    person.find("textarea")[0].send_keys("!")
    assert not person.find("#text-said")


def test_prompts_and_fields_are_those_of_the_task(driver, sites):
    Person(driver, sites().url())

    def of_the_page(work, *values):
        script = f"const [...v] = arguments, done = v.pop(); import('/models.js').then((m) => done({work}))"
        return driver.execute_async_script(script, *values)

    row = {"one": "a {two} $& b", "two": "{{c}}", "ends": ["x", "y"]}
    for template in ("{one}{two}", "{{{one}}} and }}{{ {two}", "\\{one} $1 {one}"):
        task = Task("t", template, (), 16, 4)
        assert of_the_page("m.fill(v[0], v[1])", template, row) == task.render(row)
    listed = Task("listed", "{one}: {two}", (" {ends}",), 16, 4)
    choices = Task("choices", "{one}", ("{choice_1}", "{choice_2}"), 16, 4)
    models = [
        {"id": name, "compressed": True, "reference": False, "method": "calora", "task": task.to_json()}
        for name, task in (("a", listed), ("b", choices), ("c", replace(choices, prompt="Q: {one}")))
    ]
    found = of_the_page("m.choicesOf(v[0])", models)
    assert [one["label"] for one in found][:3] == ["listed", "choices (b)", "choices (c)"]
    fields = [[(field["label"], field["listed"]) for field in one["fields"]] for one in found[:2]]
    assert fields[0] == [("One", False), ("Two", False), ("Ends, one a line", True)]
    assert fields[1] == [("One", False), ("Choice 1", False), ("Choice 2", False)]


def test_a_base_alone_can_be_tried(driver, sites):
    base = {"base": replace(MODELS["base"], base_bytes=90_000_000)}
    person = Person(driver, sites(served=replace(SERVED, models=base), reference=None).url())
    person.see("a base without adapters", "#hint")
    assert list(person.columns) == ["Compressed"]
    assert [one.text for one in person.find("option")] == ["no task: continue a text", "no task: answer a message"]
    person.type("Once")
    person.press("control", "enter")
    person.see("one two three", ".column[data-state=done]")


def test_everything_is_reached_and_named_without_a_mouse(driver, sites):
    """In the order of the page, each with a name; 360 pixels are wide enough, and what is written can be read."""
    person = Person(driver, sites().url())
    person.see("Compare", "#run")
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    )
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    reached = set()
    for _ in range(12):
        person.press("tab")
        one = driver.switch_to.active_element
        if one.tag_name != "body":
            reached.add(one.id)
            assert one.accessible_name, one.get_attribute("outerHTML")
    assert len(reached) == 1 + 1 + 5 + 1  # the task, the text, the models, the button
    for scheme in ("light", "dark"):
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        assert min(contrasts(driver).values()) >= 4.5, contrasts(driver)
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrasts(driver):
    """WCAG's contrast of each colour that something is written in, against what it stands on."""
    style = "getComputedStyle(document.documentElement).getPropertyValue"
    found = {name: driver.execute_script(f"return {style}('--{name}')").strip() for name in
             ("ground", "raised", "ink", "quiet", "accent", "on-accent", "trouble")}  # fmt: skip

    def light(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one, other):
        high, low = sorted((light(found[one]), light(found[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    pairs = [(ink, ground) for ink in ("ink", "quiet", "trouble") for ground in ("ground", "raised")]
    return {pair: contrast(*pair) for pair in [*pairs, ("on-accent", "accent")]}
