"""The web application of `calora serve`: OpenAI's routes over one base and its adapters.

Every request becomes one of llama.cpp's with the LoRAs of its model, in its adapter's turn (`calora.device.queue`).
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from calora.device.bodies import Addition, Chat, Classification, Completion, Removal
from calora.device.catalogue import Model, NoSuchModel
from calora.device.choose import choose, scored_task
from calora.device.engine import Refused
from calora.device.guard import Guard, problem
from calora.device.limits import Limits
from calora.device.pool import Pool
from calora.device.queue import Full, Late
from calora.device.served import REFERENCE, Models, OutOfTime, Served
from calora.device.static import PATHS, add_page
from calora.device.translate import Translator
from calora.errors import CaloraError
from calora.evaluation.choice import Choice, as_row
from calora.models.tasks import Row

T = TypeVar("T")
GONE = 499  # nobody reads it
AHEAD = 64  # pieces that a stream may be ahead of its reader


def make_app(
    pool: Pool, limits: Limits, key: str, reference: Pool | None = None, hosts: Collection[str] | None = None
) -> Guard:
    """The application.

    Args:
        pool: the models, and what runs them.
        limits: of requests.
        key: without which a request gets 401.
        reference: what they are compared with.
        hosts: names of this server that a request may use; None: any.
    """
    others = [Served(reference, limits, REFERENCE)] if reference else []
    models = Models(Served(pool, limits), *others)
    app = FastAPI(title="calora", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app, limits)
    add_page(app)
    started = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        pools = [served.pool for served in models.served]
        well = all([await one.healthy() for one in pools])
        body = {
            "status": "ok" if well else "llama.cpp does not answer",
            "running": sum(one.queue.running for one in pools),
            "waiting": sum(one.queue.length for one in pools),
        }
        return JSONResponse(body, 200 if well else 503)

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [served.described(model, started) for served, model in models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        served, model = models[name]
        return served.described(model, started)

    @app.post("/v1/load_lora_adapter")
    async def add(body: Addition) -> dict[str, Any]:
        added = await pool.add(body.lora_name, body.lora_path)
        return models.served[0].described(added, started)

    @app.post("/v1/unload_lora_adapter")
    async def remove(body: Removal) -> dict[str, Any]:
        await pool.remove(body.lora_name)
        return {"id": body.lora_name, "object": "model", "deleted": True}

    @app.post("/v1/completions")
    async def completions(request: Request, body: Completion) -> Response:
        return await generate(request, body, "/v1/completions")

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: Chat) -> Response:
        if body.max_completion_tokens is not None:
            body.max_tokens = body.max_completion_tokens
        return await generate(request, body, "/v1/chat/completions")

    async def generate(request: Request, body: Completion | Chat, path: str) -> Response:
        served, chosen = models[body.model]
        if (body.max_tokens or 0) > limits.tokens:
            return problem(400, f"max_tokens may be {limits.tokens}, and is {body.max_tokens}")
        if body.stream_options and not body.stream:
            return problem(400, "stream_options are for `stream: true`")
        translate = Translator(body.model, body.top)
        asked = body.to_llama(limits.tokens)
        if body.stream:
            return await stream(request, served, chosen, path, asked, translate)

        async def answer() -> dict[str, Any]:
            async with served.turn(chosen):
                return await served.engine.ask(path, asked, chosen.apply)

        return JSONResponse(translate(await _while_there(request, answer())))

    async def stream(
        request: Request, served: Served, chosen: Model, path: str, asked: dict[str, Any], translate: Translator
    ) -> Response:
        """What is refused is refused before the first byte; the turn ends with the stream, or when the client has gone."""
        events: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(AHEAD)

        async def produce() -> None:  # in a task of its own: a turn is left where it was entered
            try:
                async with served.turn(chosen), served.engine.stream(path, asked, chosen.apply) as pieces:
                    async for piece in pieces:
                        await events.put(piece)
            except Exception as error:
                await events.put(error)
            else:
                await events.put(None)

        producer = asyncio.create_task(produce())
        try:
            first = await _while_there(request, events.get())
            if isinstance(first, Exception):
                raise first
        except BaseException:
            producer.cancel()
            raise
        return Stream(_sent(first, events, translate, limits), producer)

    @app.post("/v1/classify")
    async def classify(request: Request, body: Classification) -> dict[str, Any]:
        served, chosen = models[body.model]
        task = scored_task(chosen if body.task is None else models[body.task][1])
        asked = replace(chosen, task=task)
        rows = [as_row(task, one) for one in body.inputs]
        for row in rows:  # before any work
            task.render(row)
            task.choices(row)
        some = asyncio.Semaphore(limits.slots)  # a long list leaves the queue to others

        async def one(row: Row) -> Choice:
            async with some, served.turn(chosen):
                return await choose(served.engine, asked, row, limits.context, body.cache_prompt)

        choices = await _while_there(request, _all([one(row) for row in rows]))
        return _classified(choices, body.model)

    return Guard(app, key, limits.body, limits.seconds, PATHS, hosts)


class Stream(StreamingResponse):
    """Server-sent events of a task that ends with them."""

    def __init__(self, body: AsyncIterator[str], producer: asyncio.Task[None]) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.producer = producer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.producer.cancel()


async def _sent(
    first: dict[str, Any] | None,
    events: asyncio.Queue[dict[str, Any] | Exception | None],
    translate: Translator,
    limits: Limits,
) -> AsyncIterator[str]:
    """A stream as it is sent; where it fails on the way its last event is the error, and [DONE] does not come."""
    event: dict[str, Any] | Exception | None = first
    while event is not None:
        if isinstance(event, Exception):
            failed = _told(event, limits) or problem(500, "something went wrong here")
            yield f"data: {bytes(failed.body).decode()}\n\n"
            return
        yield f"data: {json.dumps(translate(event), ensure_ascii=False)}\n\n"
        event = await events.get()
    yield "data: [DONE]\n\n"


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which ends early when the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(GONE, "The client has gone")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results; the first error ends the others, and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _add_errors(app: FastAPI, limits: Limits) -> None:
    async def told(_: Request, error: Exception) -> JSONResponse:
        found = _told(error, limits)
        assert found is not None  # of all kinds below
        return found

    for kind in (HTTPException, RequestValidationError, NoSuchModel, CaloraError, Full, Late, OutOfTime, Refused):
        app.add_exception_handler(kind, told)


def _told(error: Exception, limits: Limits) -> JSONResponse | None:
    """An error as a response; None for a mistake of ours."""
    match error:
        case HTTPException():
            return problem(error.status_code, str(error.detail))
        case RequestValidationError():
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:]) or "body"
            return problem(400, f"{where}: {first['msg']}", "invalid_body")
        case NoSuchModel():
            return problem(404, str(error), "model_not_found")
        case CaloraError():
            return problem(400, str(error))
        case Full():
            return problem(503, f"{limits.waiting} requests wait already", "queue_full", retry=True)
        case Late():
            return problem(503, f"No turn within {limits.patience:g} s", "queue_timeout", retry=True)
        case OutOfTime():
            return problem(503, f"Not done within {limits.seconds:g} s: ask for fewer tokens", "timeout")
        case Refused():
            return problem(error.status if 400 <= error.status < 500 else 503, f"llama.cpp: {error}")
    return None


def _classified(choices: Sequence[Choice], model: str) -> dict[str, Any]:
    """As vLLM answers, with the names of the answers."""
    tokens = sum(choice.tokens for choice in choices)
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [
            {
                "index": index, "label": choice.answer, "probs": choice.probabilities, "labels": choice.answers,
                "num_classes": len(choice.answers),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }  # fmt: skip
