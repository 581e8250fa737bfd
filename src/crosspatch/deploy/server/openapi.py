# SPDX-License-Identifier: Apache-2.0
"""What /openapi.json says beyond what FastAPI finds by itself: bodies, answers, every error."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.refusals import STATUS

WORDS = {
    400: "The request makes no sense: parameters, form, JSON or framing",
    401: "The token is missing or wrong",
    403: "A page of another address sent this",
    404: "There is nothing at this path",
    405: "The path does not take this method",
    408: "The request did not arrive in time",
    413: "The body is too large; the connection is closed",
    415: "The type or encoding of the body is not read",
    421: "The request names another host",
    422: "This is no picture that can be read, or it has too many pixels",
    431: "The headers are too large; the connection is closed",
    500: "A fault of the server, or the process that decoded the picture ended",
    503: "Too much to do, or shutting down: try again after Retry-After seconds",
    504: "The deadline passed before the answer was ready",
}
ALWAYS = (400, 408, 421, 431, 500)
"""What every path can answer."""
ASKING = (403, 413, 415, 422, 503, 504)
"""What a path that takes pictures can answer besides."""


class _Exact(BaseModel):
    """No further entries."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Problem(_Exact):
    """What went wrong."""

    code: str = Field(json_schema_extra={"enum": [*sorted(STATUS)]})
    message: str
    hint: str
    request_id: str


class Error(_Exact):
    """Every error has this shape."""

    error: Problem


class Share(_Exact):
    """A class and its probability."""

    name: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


class Picture(_Exact):
    """The picture as it was sent, upright."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    format: str


class Timing(_Exact):
    """Milliseconds; total: from the request's head to its answer."""

    queue: float = Field(ge=0)
    decode: float = Field(ge=0)
    compute: float = Field(ge=0)
    total: float = Field(ge=0)


class Prediction(_Exact):
    """What the model says of one picture."""

    request_id: str
    bundle: str = Field(description="sha256 of the bundle that answered")
    predictions: list[Share] = Field(description="the most probable classes, best first")
    labels: list[Share] = Field([], description="only where a picture may have several labels")
    confidence: float = Field(ge=0, le=1)
    abstain: bool = Field(description="the confidence is below the threshold: not sure")
    threshold: float = Field(ge=0, le=1)
    image: Picture
    timing_ms: Timing
    batch: int = Field(ge=1, description="pictures that were computed together")
    seen: str = Field("", description="what the model saw, as a data URL; with seen=1")
    patches: list[list[float]] = Field([], description="scores of the patches; with explain=1")


class Several(_Exact):
    """Answers in the order of the pictures; one that could not be read has an error."""

    request_id: str
    answers: list[Prediction | Error]


class State(_Exact):
    """Yes; no is an error."""

    ok: bool


class Limited(_Exact):
    """What a request may have at most; `bytes` of its body."""

    bytes: int
    pixels: int
    side: int
    formats: list[str]


class Served(_Exact):
    """What is served."""

    bundle: str
    architecture: str
    precision: str
    engine: str
    threads: int
    classes: list[str]
    task: str
    thresholds: list[float]
    threshold: float
    preprocess: dict[str, Any]
    explains: bool
    batch_api: bool
    limits: Limited
    version: str


_RETRY = {
    "Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}
}  # fmt: skip


def errors(*statuses: int, token: bool) -> dict[int | str, dict[str, Any]]:
    """What FastAPI is told of these statuses, and of those that every path can answer."""
    found = sorted({*ALWAYS, *statuses} | ({401} if token else set()))
    return {
        status: {"model": Error, "description": WORDS[status]}
        | ({"headers": _RETRY} if status == 503 else {})
        for status in found
    }


def one_body(explains: bool) -> dict[str, Any]:
    """The body of /predict, in every form that is read. explains: whether explain may be 1."""
    number = {"type": "integer", "minimum": 0}
    beside = {
        "top_k": number | {"minimum": 1, "maximum": 100_000},
        "explain": number | {"maximum": int(explains)},
        "seen": number | {"maximum": 1},
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"image": {"type": "string", "format": "binary"}, **beside}
    base64 = {"type": "string", "format": "byte", "contentEncoding": "base64", "minLength": 1}
    coded = {"image": base64, **beside}
    closed = {"type": "object", "required": ["image"], "additionalProperties": False}
    return {
        "requestBody": {
            "required": True,
            "description": "A picture file as it is; a form or JSON where that cannot be sent.",
            "content": {
                "image/*": binary,
                "application/octet-stream": binary,
                "application/x-www-form-urlencoded": binary
                | {"x-note": "what curl --data-binary says; read as a picture file"},
                "multipart/form-data": {"schema": closed | {"properties": form}},
                "application/json": {"schema": closed | {"properties": coded}},
            },
        }
    }


def many_body(limits: Limits) -> dict[str, Any]:
    """The body of /predict/batch."""
    picture = {"type": "string", "format": "binary"}
    pictures = {"type": "array", "minItems": 1, "maxItems": limits.batch, "items": picture}
    return {
        "requestBody": {
            "required": True,
            "description": f"Up to {limits.batch} picture files.",
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image"],
                        "properties": {"image": pictures},
                        "additionalProperties": False,
                    }
                }
            },
        }
    }


def finished(made: dict[str, Any], token: bool, explains: bool) -> dict[str, Any]:
    """FastAPI's description with the token that is needed, if one is, and with what this bundle
    cannot do."""
    for one in made["paths"]["/predict"]["post"]["parameters"]:
        if one["name"] == "explain":
            one["schema"]["maximum"] = int(explains)
    if token:
        schemes = made.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["token"] = {"type": "http", "scheme": "bearer"}
        for path, operations in made["paths"].items():
            if path not in OPEN:
                for operation in operations.values():
                    operation["security"] = [{"token": []}]
    return made


OPEN = ("/", "/livez", "/readyz")
"""Paths that need no token."""
