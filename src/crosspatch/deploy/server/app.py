# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: paths and what they answer.

There are no documentation pages that load from elsewhere, no address is fetched, no model taken in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BeforeValidator

import crosspatch
from crosspatch.deploy.server import asking, openapi
from crosspatch.deploy.server.asking import MOST, TOP, Exchange
from crosspatch.deploy.server.errors import error_object, internal, render
from crosspatch.deploy.server.forms import form_pictures
from crosspatch.deploy.server.front import Front
from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.logs import Log
from crosspatch.deploy.server.metrics import Metrics
from crosspatch.deploy.server.refusals import Refused
from crosspatch.deploy.server.service import Ask, Service


def _digits(value: Any) -> Any:
    """Digits alone: Python would read `1_0` and ` 1` as numbers, too."""
    if isinstance(value, str) and not re.fullmatch("[0-9]{1,9}", value):
        raise ValueError("digits alone")
    return value


Number = BeforeValidator(_digits)
TopK = Annotated[int, Query(ge=1, le=MOST, description="how many classes"), Number]
Switch = Annotated[int, Query(ge=0, le=1), Number]
Patience = Annotated[
    int,
    Header(alias="X-Timeout-Ms", ge=1, le=60_000, description="after this the answer is of no use"),
    Number,
]


def create_app(
    service: Service,
    page: bytes,
    *,
    token: str | None = None,
    batch_api: bool = False,
    local: bool = True,
    limits: Limits | None = None,
    metrics: Metrics | None = None,
    log: Log | None = None,
) -> Front:
    """The application around a service that is started.

    page: the document at /; token: what `Authorization: Bearer` must say for everything but the
    page, /livez and /readyz; batch_api: whether there is /predict/batch; local: answer only to
    names of this computer; metrics: what the service's `observe` fills; log: None for silence.
    """
    limits, metrics = limits or Limits(), metrics or Metrics()
    metrics.model(service)
    app = FastAPI(
        title="crosspatch", version=crosspatch.__version__, openapi_url=None, docs_url=None,
        redoc_url=None, swagger_ui_oauth2_redirect_url=None, redirect_slashes=False,
    )  # fmt: skip
    routes = {
        "/predict": "POST", "/": "GET", "/livez": "GET", "/readyz": "GET", "/metrics": "GET",
        "/info": "GET", "/openapi.json": "GET",
    }  # fmt: skip
    if batch_api:
        routes = {"/predict": "POST", "/predict/batch": "POST"} | routes
    front = Front(
        app, service, routes, limits=limits, token=token, local=local, metrics=metrics,
        log=log or Log(None),
    )  # fmt: skip
    _errors(app)
    _predict(app, front)  # first: paths are tried in this order
    _states(app, front)
    _documents(app, front, page, batch_api)
    if batch_api:
        _batch(app, front)
    made = openapi.finished(app.openapi(), token is not None, service.explains)
    described = json.dumps(made).encode()

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> Response:
        return Response(described, media_type="application/json")

    return front


def _errors(app: FastAPI) -> None:
    """What is raised inside becomes the one shape of errors."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        exchange: Exchange = request.scope["exchange"]
        exchange.code = error.code
        headers, body = render(error, exchange.id)
        made = Response(body, error.status)
        made.raw_headers = headers
        return made

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        names = ", ".join(sorted({str(one["loc"][-1]) for one in error.errors()}))
        return await refused(
            request,
            Refused("bad_request", f"out of range or no number: {names}", "see /openapi.json"),
        )

    async def fault(request: Request, error: Exception) -> Response:
        return await refused(request, internal())  # the front tells the log what it was

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, fault)


def _states(app: FastAPI, front: Front) -> None:
    service = front.service
    secret = front.token is not None

    def why() -> str | None:
        return "the server is shutting down" if front.draining else service.problem

    @app.get("/livez", response_model=openapi.State, responses=openapi.errors(token=False))
    async def alive() -> Response:
        """The process turns its loop."""
        return JSONResponse({"ok": True})

    @app.get("/readyz", response_model=openapi.State, responses=openapi.errors(503, token=False))
    async def ready() -> Response:
        """The model is loaded and answers as it should, and there is room for more."""
        problem = why()
        if problem is not None:
            code = "draining" if front.draining else "not_ready"
            raise Refused(code, f"not ready: {problem}", "ask again in a second", 1)
        return JSONResponse({"ok": True})

    @app.get(
        "/metrics",
        response_class=Response,
        responses=openapi.errors(token=secret)
        | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """For Prometheus."""
        text = front.metrics.text(service, why() is None, front.held.bytes)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


def _documents(app: FastAPI, front: Front, page: bytes, batch_api: bool) -> None:
    served = json.dumps(_info(front, batch_api)).encode()
    policy = page_policy(page)
    html = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}

    @app.get(
        "/", response_class=HTMLResponse, responses=openapi.errors(token=False) | html
    )  # fmt: skip
    async def home() -> Response:
        """The page."""
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get(
        "/info",
        response_model=openapi.Served,
        responses=openapi.errors(token=front.token is not None),
    )
    async def info() -> Response:
        """What is served: classes, preprocessing, limits."""
        return Response(served, media_type="application/json")


def page_policy(page: bytes) -> str:
    """A content security policy that allows the page its own scripts and styles, by their sha256,
    pictures that it holds itself, and this server."""
    allowed = {}
    for kind in ("script", "style"):
        found = re.findall(rf"<{kind}\b[^>]*>(.*?)</{kind}>".encode(), page, re.S)
        hashes = [base64.b64encode(hashlib.sha256(one).digest()).decode() for one in found]
        allowed[kind] = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _info(front: Front, batch_api: bool) -> dict[str, Any]:
    service, info = front.service, front.service.info
    return {
        "bundle": service.bundle.hash,
        "architecture": info.architecture,
        "precision": service.engine.setting.precision,
        "engine": service.engine.setting.engine,
        "threads": service.engine.setting.threads,
        "classes": list(info.classes),
        "task": info.task,
        "thresholds": list(info.thresholds),
        "threshold": service.threshold,
        "preprocess": info.preprocess.to_dict(),
        "explains": service.explains,
        "batch_api": batch_api,
        "limits": {
            "bytes": front.limits.body,
            "pixels": service.limits.pixels,
            "side": service.limits.side,
            "formats": list(service.limits.formats),
        },
        "version": crosspatch.__version__,
    }


def _known(request: Request, *names: str) -> None:
    """Raises Refused for parameters that there are not, and for one that comes twice."""
    given = [name for name, _ in request.query_params.multi_items()]
    if len(set(given)) != len(given) or not set(given) <= set(names):
        raise Refused(
            "bad_request",
            "a parameter that there is not, or one twice",
            f"the parameters are {', '.join(names)}; addresses are never fetched",
        )


def _asked(service: Service, explain: int) -> None:
    if explain and not service.explains:
        raise Refused(
            "bad_request",
            "this bundle cannot say which patches decided",
            "leave explain out, or export the run with crosspatch export RUN --explain",
        )


def _predict(app: FastAPI, front: Front) -> None:
    service, limits = front.service, front.limits

    @app.post(
        "/predict",
        response_model=openapi.Prediction,
        responses=openapi.errors(*openapi.ASKING, token=front.token is not None),
        openapi_extra=openapi.one_body(service.explains),
    )
    async def predict(
        request: Request,
        top_k: TopK = TOP,
        explain: Switch = 0,
        seen: Switch = 0,
        timeout: Patience = limits.timeout_ms,
    ) -> Response:
        """Name the class of one picture."""
        _known(request, "top_k", "explain", "seen")
        exchange: Exchange = request.scope["exchange"]
        body, beside = asking.picture_of(exchange, limits)
        chosen = {"top_k": top_k, "explain": explain, "seen": seen} | beside
        _asked(service, chosen["explain"])
        until = asking.deadline(exchange, timeout)
        given = Ask(body, chosen["top_k"], bool(chosen["explain"]), bool(chosen["seen"]), until)
        try:
            answer = await asking.ask(service, exchange, given)
        except Refused as refused:
            exchange.told = asking.told_refused(refused, body)
            raise
        exchange.told = asking.told(answer)
        made = asking.prediction(answer, exchange, service.bundle.hash)
        return Response(json.dumps(made, allow_nan=False), media_type="application/json")


def _batch(app: FastAPI, front: Front) -> None:
    service, limits = front.service, front.limits

    @app.post(
        "/predict/batch",
        response_model=openapi.Several,
        responses=openapi.errors(*openapi.ASKING, token=front.token is not None),
        openapi_extra=openapi.many_body(limits),
    )
    async def predict_batch(
        request: Request, top_k: TopK = TOP, timeout: Patience = limits.timeout_ms
    ) -> Response:
        """Name the classes of several pictures; one that cannot be read fails alone."""
        _known(request, "top_k")
        exchange: Exchange = request.scope["exchange"]
        kind = exchange.head.fields[b"content-type"]
        pictures = form_pictures(kind, exchange.body, limits.batch) if exchange.body else []
        if not pictures:
            raise Refused("empty", "there is no picture in the request", "curl -F image=@one.jpg")
        until = asking.deadline(exchange, timeout)
        asks = [Ask(one, top_k, deadline=until) for one in pictures]
        found = await asking.ask_all(service, exchange, asks)
        rows = [
            {"error": error_object(one, exchange.id)}
            if isinstance(one, Refused)
            else asking.prediction(one, exchange, service.bundle.hash)
            for one in found
        ]
        exchange.told = asking.told_all(found)
        made = {"request_id": exchange.id, "answers": rows}
        return Response(json.dumps(made, allow_nan=False), media_type="application/json")
