"""`calora chat`: who answers, what is remembered, what Ctrl-C ends, and how it looks on a terminal and through a pipe."""

import asyncio
import io
import re
import signal
import sys

import httpx
import pytest
from rich.console import Console

from calora.__main__ import main
from calora.device.app import make_app
from calora.device.chat import Conversation, chat, completions, given
from calora.device.engine import Refused
from calora.device.screen import Pipe, Terminal, Timing
from calora.device.sources import FolderSource, UrlSource, open_folder
from calora.errors import CaloraError
from calora.evaluation.choice import Choice
from calora.models.tasks import Task
from tests.test_serve import CATALOGUE, KEY, LIMITS, MODELS, PAIRS, Fake, folder, llama_cpp, pool_of

__all__ = ["folder"]  # a fixture
OPTIONS = {"max_tokens": 5}


class Chatty(Fake):
    """Answers a chat with three pieces; `interrupt` is the place of the one at which Ctrl-C is pressed."""

    interrupt = None

    async def _pieces(self):
        yield {"choices": [{"delta": {"role": "assistant", "content": None}}]}
        for place, word in enumerate(self.words):
            if place == self.interrupt:
                self.interrupt = None
                signal.raise_signal(signal.SIGINT)
                await asyncio.sleep(20)
            yield {"choices": [{"delta": {"content": word}}]}
        yield {"choices": []}


class Typed:
    """A screen on which lines are typed; what is shown is kept."""

    def __init__(self, *lines, strict=False):
        self.lines, self.shown, self.strict = list(lines), [], strict

    def read(self, name, columns):
        line = self.lines.pop(0) if self.lines else None
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        self.shown.append(f"{name}>")
        return [line] if isinstance(line, str) else list(line)

    def piece(self, text):
        self.shown.append(text)

    def done(self, timing):
        self.shown.append(timing)

    def choice(self, choice, seconds):
        self.shown.append(choice)

    note = error = piece

    def models(self, models, chosen):
        self.shown.append((list(models), chosen))


def talk(*lines, engine=None, name=None, strict=False):
    """What is shown, and the runtime."""
    engine, screen = engine or Chatty(), Typed(*lines, strict=strict)
    chat(FolderSource(CATALOGUE, engine, 64), OPTIONS, name, screen)
    assert engine.closed  # always
    return screen.shown[1:], engine


def asked_of(engine):
    return [([one["content"] for one in body["messages"]], on) for path, body, on in engine.asked if "chat" in path]


def test_the_adapter_changes_in_the_middle_of_the_conversation():
    shown, engine = talk("hello", "/model essay", "and then?", "/reset", "new", "/quit", "never")
    said = "one two three"
    base, essay = MODELS["base"].apply, MODELS["essay"].apply
    assert asked_of(engine) == [(["hello"], base), (["hello", said, "and then?"], essay), (["new"], essay)]
    assert shown[:5] == ["base>", "one", " two", " three", shown[4]] and shown[4].first > 0 and shown[4].rate > 0
    assert shown[5:7] == ["base>", "essay>"] and engine.asked[0][1]["max_tokens"] == 5
    roles = [one["role"] for one in engine.asked[1][1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_an_adapter_that_chooses_tells_probabilities():
    shown, engine = talk("x", ("a", "b"), '{"one": "a", "two": "b"}', "/model base", "y", name="pairs", strict=False)
    assert "an object" in shown[1]  # a text for two columns
    first, second = shown[3], shown[5]
    assert isinstance(first, Choice) and first == second and first.answers == ["no", "yes"]
    assert asked_of(engine) == [(["y"], MODELS["base"].apply)]  # what was classified was not said
    assert {on for path, _, on in engine.asked if path == "/completion"} == {MODELS["pairs"].apply}


@pytest.mark.parametrize(
    ("task", "lines", "found"),
    [
        (PAIRS, ["a", "b"], {"one": "a", "two": "b"}), (MODELS["movies"].task, ['{"text": 1}'], '{"text": 1}'),
        (Task("l", "{text}", ("{ends}",), 9, 9), ['{"text": "a", "ends": ["b", "c"]}'], {"text": "a", "ends": ["b", "c"]}),
        (PAIRS, ["[1]"], None), (Task("l", "{text}", ("{ends}",), 9, 9), ["a"], None),
    ],
)  # fmt: skip
def test_a_row_is_typed_or_json(task, lines, found):
    if found is None:
        with pytest.raises(CaloraError, match=r"an object: \{"):
            given(task, lines)
    else:
        assert given(task, lines) == found


@pytest.fixture
def _ctrl_c():
    """As in a program of its own: other tests serve in this process, which takes the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize(("place", "said"), [(0, None), (2, "one two")])
def test_ctrl_c_ends_the_answer_and_not_the_program(place, said):
    engine = Chatty()
    engine.interrupt = place
    shown, _ = talk("first", "^C", "second", engine=engine)
    assert "\nended" in shown and shown[-4:-1] == ["one", " two", " three"]
    before = ["first", said] if said else []
    assert asked_of(engine)[-1][0] == [*before, "second"] and engine.closed == 3  # two streams, and all


def test_mistakes_are_said_and_it_goes_on():
    engine = Chatty()
    engine.error = Refused(400, "exceeds the context")
    shown, _ = talk("hello", "/model film", "/film", "/model", "/models", "", " /x", engine=engine)
    assert "exceeds the context" in shown[1] and "one of base, movies" in shown[3] and "/help" in shown[5]
    assert "/help" in shown[7] and shown[9] == (["base", "movies", "pairs", "essay"], "base")
    assert asked_of(engine)[-1][0] == [" /x"]  # what was refused was not said
    for lines in (["hello"], ["/model film"], ["^C"]):
        with pytest.raises((CaloraError, KeyboardInterrupt)):
            talk(*lines, engine=engine, strict=True)
    with pytest.raises(CaloraError, match="one of base, movies"):
        talk(name="film")


def test_tab_completes_commands_and_names():
    talk = Conversation(None, {})
    talk.models = dict.fromkeys(("base", "movies"))
    assert completions(talk, "/mod") == ["/model base", "/model movies", "/models"]
    assert completions(talk, "/model m") == ["/model movies"] and completions(talk, "x") == []


# Looks


def terminal(monkeypatch, *lines, **options):
    typed, asked = list(lines), []

    def read(prompt):
        asked.append(re.sub(r"[\001\002]|\033\[[\d;]*m", "", prompt))
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", read)
    console = Console(file=io.StringIO(), force_terminal=True, width=60, highlight=False, **options)
    return Terminal(lambda typed: [], console), asked


def test_a_terminal_asks_for_each_column(monkeypatch):
    screen, asked = terminal(monkeypatch, "a", "b", "/models", "{}", "", "text")
    assert screen.read("pairs", ["one", "two"]) == ["a", "b"] and asked == ["pairs one> ", "pairs two> "]
    assert [screen.read("pairs", ["one", "two"]) for _ in range(3)] == [["/models"], ["{}"], [""]]
    assert screen.read("movies", ["text"]) == ["text"] and asked[-1] == "movies> "


def test_a_terminal_shows_the_likeliest_answers_and_obeys_no_model(monkeypatch):
    screen, _ = terminal(monkeypatch, no_color=True)
    answers = [f"a{place}" for place in range(12)]
    screen.choice(Choice("a11", [place / 66 for place in range(12)], answers, 7), 0.0123)
    screen.piece("[bold]\033]0;title\007 é\n")
    screen.done(Timing(0.126, 91.2))
    screen.models({"base": None, "pairs": PAIRS, "own": Task("l", "{a}", ("{b}", "{c}"), 9, 9)}, "pairs")
    shown = re.sub(r"\033\[[\d;]*m", "", screen.console.file.getvalue())
    lines = [line.rstrip() for line in shown.splitlines()]
    assert re.match(r"a11\s+16\.7 %\s+█", lines[0]) and lines[9].split()[0] == "a2"
    assert lines[10] == "2 more; 7 tokens read, 12 ms" and lines[11] == "[bold]]0;title é"
    assert lines[13] == "first token after 126 ms, 91 tokens/s"
    assert lines[14:] == ["   base   chats", ">  pairs  chooses: no, yes", "   own    chooses among a row's"]


def test_through_a_pipe_a_line_is_a_text_and_nothing_else_is_written(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\r\n\n/model pairs\n/models\n/help\n/reset\n"))
    chat(FolderSource(CATALOGUE, Chatty(), 64), OPTIONS)
    assert capsys.readouterr().out.splitlines() == [
        "one two three", "base\tchats", "movies\tchooses: bad, good", "pairs\tchooses: no, yes", "essay\tchats"
    ]  # fmt: skip
    Pipe().choice(Choice("yes", [0.25, 0.75], ["no", "yes"], 3), 1.0)
    assert capsys.readouterr().out == "yes\t0.7500\n"


# A server


def test_a_running_server_is_talked_with(monkeypatch):
    monkeypatch.setenv("CALORA_API_KEY", KEY)
    engine = Chatty()
    transport = httpx.ASGITransport(make_app(pool_of(engine, LIMITS), LIMITS, KEY))
    screen = Typed("hello", "/model movies", "x", "/model base", "and?", "/model essay", "y")
    chat(UrlSource("http://test/v1", transport), OPTIONS, None, screen)
    assert screen.shown[2:5] == ["one", " two", " three"] and isinstance(screen.shown[8], Choice)
    assert screen.shown[8].answers == ["bad", "good"]
    assert [prompts for prompts, _ in asked_of(engine)][1] == ["hello", "one two three", "and?"]
    engine.error = Refused(400, "exceeds the context")
    screen = Typed("hello")
    chat(UrlSource("http://test/v1", transport), OPTIONS, None, screen)
    assert "exceeds the context" in screen.shown[-1]


def test_no_server_and_a_wrong_key_are_said(monkeypatch, capsys):
    monkeypatch.delenv("CALORA_API_KEY", raising=False)
    transport = httpx.ASGITransport(make_app(pool_of(Fake(), LIMITS), LIMITS, KEY))
    with pytest.raises(CaloraError, match="CALORA_API_KEY: expected the key"):
        chat(UrlSource("http://test/v1", transport), OPTIONS, None, Typed())
    with pytest.raises(CaloraError, match="a running `calora serve`"):
        chat(
            UrlSource("http://test/v2", httpx.ASGITransport(make_app(pool_of(Fake(), LIMITS), LIMITS, ""))),
            {},
            None,
            Typed(),
        )
    for command, said in (
        (["--url", "http://127.0.0.1:9/v1"], "calora serve FOLDER"), (["--url", "nothing"], "calora serve FOLDER"),
        ([], "a folder or --url"), (["here", "--url", "x"], "a folder or --url"), (["nowhere"], "no such file"),
    ):  # fmt: skip
        assert main(["chat", *command]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and said in told, told


@llama_cpp
def test_a_real_folder_is_talked_with(folder):
    screen = Typed("a good film", "/model letters", "a good film", "/model base", "x " * 400)
    chat(open_folder(folder[0], 1), {"max_tokens": 4, "temperature": 0.0}, None, screen)
    choice = next(one for one in screen.shown if isinstance(one, Choice))
    assert choice.answers == ["a", "b", "c"] and sum(choice.probabilities) == pytest.approx(1)
    assert any(isinstance(one, Timing) for one in screen.shown) and "context" in screen.shown[-1]
