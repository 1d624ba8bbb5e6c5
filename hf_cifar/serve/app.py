"""The HTTP interface: its routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any

import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from hf_cifar.config.serving import API_KEY, ServeConfig
from hf_cifar.errors import UserError
from hf_cifar.serve.metrics import Metrics
from hf_cifar.serve.uploads import FIELD, FORM_TYPE, Refused, images_of, read_body
from hf_cifar.serve.workers import Failed, Late, Overloaded, Workers

logger = logging.getLogger(__name__)
RETRY_SECONDS = "1"
HELD_REQUESTS = 16  # requests of the largest size that may be in memory at once
SMALL_BODY = 2**16  # bytes of a form that is parsed at once; a larger one is in a thread
DISCARD_SECONDS = 2  # of the rest of a refused request
UNREADABLE = b'{"error"'
BODY_READ = "hf_cifar.body_read"  # in the scope of a request


class Score(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class Result(BaseModel):
    """The answer for one image: label and score, or labels of a multi-label model, or an error. A model with
    `reject` in GET /model also answers its word, without a score."""

    label: str | None = None
    score: float | None = None
    labels: list[Score] | None = None
    top_k: list[Score] | None = None
    error: str | None = None


class Answer(BaseModel):
    """The results of a request, in the order of its images. model: the SHA-256 of the
    model's weights, labels and preprocessing.
    """

    model: str
    version: str
    results: list[Result]


class Problem(BaseModel):
    """What is wrong with a request."""

    error: str


UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def problem(status: int, text: str) -> dict[int | str, dict[str, Any]]:
    """Describe an error for OpenAPI."""
    return {status: {"model": Problem, "description": text}}


PROBLEMS = {
    **problem(400, "The request has no image, or is damaged."),
    **problem(401, "The key is missing or wrong."),
    **problem(408, "The request took too long to arrive."),
    **problem(413, "The request is too large."),
    **problem(415, "The content type is neither a form nor an image."),
    **problem(422, "The only image cannot be read."),
    **problem(500, "The model failed."),
    **problem(
        503,
        "The server is overloaded, or a worker died; try again after the seconds in Retry-After.",
    ),
    **problem(504, "The images waited for too long, and were not computed."),
}


class Refusal(JSONResponse):
    """An error before the whole request was read. It reaches a client that is still sending: closing the
    connection at once would discard it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while (message := await receive())["type"] == "http.request" and message[
                    "more_body"
                ]:
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Service:
    """What the routes share. draining: the server is shutting down."""

    def __init__(self, workers: Workers, config: ServeConfig) -> None:
        self.workers, self.config, self.metrics = workers, config, Metrics(workers)
        self.draining = False
        self._held = 0  # bytes of all requests that are in memory

    @contextlib.asynccontextmanager
    async def images(self, request: Request) -> AsyncIterator[list[bytes]]:
        """Read the images of a request, and count their bytes until the block ends.

        Raises: Refused, or Overloaded above the capacity of the workers or of memory.
        """
        size = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                self._held += len(chunk)
                if self._held > HELD_REQUESTS * self.config.max_bytes:
                    raise Overloaded("too many large requests are in memory; try again")
                yield chunk

        declared = request.headers.get("content-length", "")
        is_small = declared.isdigit() and int(declared) <= SMALL_BODY
        try:
            if not is_small:  # reading a small one keeps the connection for the next request
                self.workers.refuse_above_capacity()
            try:
                async with asyncio.timeout(self.config.timeout):
                    body = await read_body(chunks(), declared, self.config.max_bytes)
                request.scope[BODY_READ] = True
            except TimeoutError:
                raise Refused(
                    408,
                    f"the request took more than {self.config.timeout:g} s to arrive",
                    close=True,
                ) from None
            self.workers.refuse_above_capacity()
            content_type, most = request.headers.get("content-type", ""), self.config.max_images
            if is_small:
                images = images_of(body, content_type, most)
            else:
                images = await asyncio.to_thread(images_of, body, content_type, most)
            del body  # of a form, a second copy of its images
            yield images
        finally:
            self._held -= size


def refuse_query(request: Request) -> None:
    """Raises: Refused for parameters in the URL, which would have no effect."""
    if name := next(iter(request.query_params), None):
        raise Refused(
            400,
            f"the URL has the parameter {name!r}; leave it out: the server's options set everything",
        )


def create_app(service: Service) -> FastAPI:
    """Build the routes of a server."""
    app = FastAPI(title="hf_cifar", docs_url=None, redoc_url=None)
    workers, config = service.workers, service.config
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_cifar"), autoescape=True, undefined=jinja2.StrictUndefined
    )

    @app.post("/predict", responses={200: {"model": Answer}, **PROBLEMS}, openapi_extra=UPLOAD)
    async def predict(request: Request) -> Response:
        """Classify the images of a form, or one image sent as the body."""
        refuse_query(request)
        async with service.images(request) as images:
            about, (values, results) = await workers.ask(images)
        unreadable = sum(result.startswith(UNREADABLE) for result in results)
        service.metrics.count_images(len(results) - unreadable, unreadable, values["batches"])
        request.scope["hf_cifar.images"] = len(results)
        if len(results) == unreadable == 1:
            return Response(results[0], 422, media_type="application/json")
        head = f'{{"model": "{about["model"]}", "version": {json.dumps(about["version"])}, "results": ['
        return Response(
            b"".join((head.encode(), b", ".join(results), b"]}")),
            media_type="application/json",
            headers={"x-model": about["model"]},
        )

    @app.post(
        "/explain", responses={200: {"content": {"image/png": {}}}, **PROBLEMS}, openapi_extra=UPLOAD,
        response_class=Response,
    )  # fmt: skip
    async def explain(request: Request) -> Response:
        """Return a heat map (Grad-CAM) of the predicted class of one image, as PNG."""
        refuse_query(request)
        async with service.images(request) as images:
            if len(images) != 1:
                raise Refused(
                    400,
                    f"a heat map needs one image, but the request has {len(images)}; send one image",
                )
            about, (_, (result,)) = await workers.ask(images, "explain")
        if result.startswith(UNREADABLE):
            return Response(result, 422, media_type="application/json")
        return Response(result, media_type="image/png", headers={"x-model": about["model"]})

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """Show labels, preprocessing, metrics and hash of the model, and the limits of the server."""
        limits = ("max_bytes", "max_images", "max_frames", "max_queue", "timeout")
        return {
            **workers.about,
            "limits": {name: getattr(config, name) for name in limits},
        }

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """Report that the server is running; restart it if this fails."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz", responses=problem(503, "The server is shutting down, or no worker is running.")
    )
    async def readyz() -> Response:
        """Report whether the server can take requests."""
        if service.draining:
            return JSONResponse({"error": "the server is shutting down"}, 503)
        if not workers.alive:
            return JSONResponse({"error": "no worker is running"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Show metrics in Prometheus' text format."""
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.post(
        "/admin/reload",
        responses={
            401: PROBLEMS[401],
            **problem(403, "This server has no key."),
            **problem(409, "The new model cannot be loaded; the old one stays."),
        },
    )
    async def reload() -> Response:
        """Reload the model without losing a request."""
        if config.api_key is None:
            raise Refused(403, f"reloading by HTTP needs a key; set {API_KEY}, or send SIGHUP")
        try:
            about = await workers.reload()
        except UserError as error:
            return JSONResponse(
                {"error": f"the model was not reloaded, and the old one stays in use: {error}"}, 409
            )
        return JSONResponse({"model": about["model"], "version": about["version"]})

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page("serve.html", about=workers.about, needs_key=config.api_key is not None)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        url = str(request.base_url).rstrip("/")
        return _page("serve_docs.html", schema=app.openapi(), url=url, config=config)

    def _page(name: str, **values: Any) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob:; "
            "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        html = pages.get_template(name).render(nonce=nonce, **values)
        return HTMLResponse(html, headers={"content-security-policy": policy})

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return (Refusal if error.close else JSONResponse)({"error": str(error)}, error.status)

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        answer = JSONResponse if request.scope.get(BODY_READ) else Refusal
        return answer({"error": str(error)}, 503, headers={"retry-after": RETRY_SECONDS})

    @app.exception_handler(Late)
    async def late(_: Request, error: Late) -> Response:
        return JSONResponse({"error": str(error)}, 504)

    @app.exception_handler(Failed)
    async def failed(_: Request, error: Failed) -> Response:
        return JSONResponse({"error": str(error)}, 500)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, error: ClientDisconnect) -> Response:
        return JSONResponse({"error": "the client closed the connection"}, 400)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return JSONResponse({"error": "the server failed; its log says why"}, 500)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    return app
