"""The routes, and the way to them: watch, gate, body limit, router.

FastAPI holds the routes and the OpenAPI document. Bodies are read by `read_body` and not by FastAPI, in one strict pass
that neither depth nor half of a surrogate pair can surprise; the document is made from the same models. There is no
documentation page: FastAPI's loads scripts from another host.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from skymoe import __version__
from skymoe.serve.chat import Chat
from skymoe.serve.completions import Completion
from skymoe.serve.errors import ApiError, answer_api_error, answer_defect, answer_http_error, read_json_body
from skymoe.serve.generation import check_tokens
from skymoe.serve.limits import BodyLimit
from skymoe.serve.openapi import document, gets, posts
from skymoe.serve.protocol.chat import ChatAnswer, ChatRequest
from skymoe.serve.protocol.common import Answer, ModelCard, ModelList
from skymoe.serve.protocol.completions import CompletionAnswer, CompletionRequest
from skymoe.serve.protocol.examples import CHATS, COMPLETIONS, TEXTS, TOKENS
from skymoe.serve.protocol.state import Health, Stats, Version
from skymoe.serve.protocol.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizeText,
)
from skymoe.serve.safety import OPEN, STATIC, Gate, Key
from skymoe.serve.service import Service
from skymoe.serve.sse import Work
from skymoe.serve.static_files import INDEX, answer_file, read_page
from skymoe.serve.watch import Watch

_QUEUED = frozenset({"/v1/completions", "/v1/chat/completions"})
_REQUESTS = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def make_app(service: Service, *, key: Key | None) -> ASGIApp:
    """The whole application, for uvicorn."""
    app = FastAPI(
        title="skymoe", version=__version__, description="OpenAI's interface to one model.", docs_url=None,
        redoc_url=None, openapi_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Exception, answer_defect)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_models(app, service)
    _add_state(app, service)
    _add_page(app)
    _add_document(app, service, key)
    routes = frozenset(route.path for route in app.routes)  # type: ignore[attr-defined]
    inside = BodyLimit(app, limits=service.config.limits, admission=service.admission, queued=_QUEUED)
    return Watch(Gate(inside, key=key, host=service.config.host), metrics=service.metrics, routes=routes)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", **posts(CompletionAnswer, CompletionRequest, COMPLETIONS, streams=True))
    async def completions(request: Request) -> Response:
        """Continue a prompt."""
        return Work(Completion(service, read_json_body(CompletionRequest, request)).answer)

    @app.post("/v1/chat/completions", **posts(ChatAnswer, ChatRequest, CHATS, streams=True))
    async def chat_completions(request: Request) -> Response:
        """Answer in a conversation."""
        return Work(Chat(service, read_json_body(ChatRequest, request)).answer)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", **posts(TokenizeAnswer, TokenizeRequest, TEXTS))
    async def tokenize(request: Request) -> Response:
        """Cut text, or a conversation, into tokens."""
        asked = read_json_body(TokenizeRequest, request).root
        info = service.info()
        service.check_model(asked.model)
        if isinstance(asked, TokenizeText):
            ids = await service.texts.tokenize(asked.prompt, special=asked.add_special_tokens)
        else:
            ids = await service.texts.chat(asked.messages, open_answer=asked.add_generation_prompt)
        names = await service.texts.names(ids) if asked.return_token_strs else None
        return _json(TokenizeAnswer(count=len(ids), max_model_len=info.max_model_len, tokens=ids, token_strs=names))

    @app.post("/detokenize", **posts(DetokenizeAnswer, DetokenizeRequest, TOKENS))
    async def detokenize(request: Request) -> Response:
        """Make text of tokens."""
        asked = read_json_body(DetokenizeRequest, request)
        info = service.info()
        service.check_model(asked.model)
        check_tokens(asked.tokens, info)
        return _json(DetokenizeAnswer(prompt=await service.texts.decode(asked.tokens)))


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> ModelCard:
        return ModelCard(id=service.name, created=service.created, max_model_len=service.info().max_model_len)

    @app.get("/v1/models", **gets(ModelList))
    async def models() -> Response:
        """The model."""
        return _json(ModelList(data=[card()]))

    @app.get("/v1/models/{model:path}", **gets(ModelCard, more={404: "There is no such model."}))
    async def model(model: str) -> Response:
        """The model, by its name."""
        service.check_model(model)
        return _json(card())


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", **gets(Health))
    async def health() -> Response:
        """Whether the server lives: 200 also while the model loads."""
        return _json(service.health(), 503 if service.engine.died.done() else 200)

    @app.get("/ready", **gets(Health))
    async def ready() -> Response:
        """Whether requests are answered now."""
        state = service.health()
        return _json(state, 200 if state.status == "ok" else 503)

    @app.get("/version", **gets(Version))
    async def version() -> Response:
        """Of skymoe."""
        return _json(Version(version=__version__))

    @app.get("/stats", **gets(Stats))
    async def stats() -> Response:
        """What the engine is doing, for the page."""
        return _json(await service.stats())

    @app.get("/metrics", **gets(None, media="text/plain"))
    async def metrics() -> Response:
        """Prometheus metrics."""
        found = await service.engine_stats()
        text = service.metrics.expose(service.engine.info, found)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    files = read_page()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return answer_file(files, INDEX)

    @app.get(STATIC + "{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return answer_file(files, name)


def _add_document(app: FastAPI, service: Service, key: Key | None) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        vocab_size = None if service.engine.info is None else service.engine.info.vocab_size
        made = document(app, _REQUESTS, vocab_size=vocab_size, models=[service.name], with_key=key is not None)
        for path in OPEN & made["paths"].keys():
            made["paths"][path]["get"]["security"] = []
        return made


def _json(answer: Answer, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")
