"""Requests drawn from the server's own description of itself, good ones and bad ones."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode

from crosspatch.deploy.server.openapi import WORDS
from crosspatch.deploy.server.refusals import STATUS
from crosspatch.deploy.server.service import Service
from support.bundles import write_bundle
from support.serving import Running, picture, running

TOKEN = "a-word"
PICTURES = [picture((n, 90, 200 - n), kind) for n in (0, 200) for kind in ("PNG", "JPEG", "BMP")]

for kind in ("image/*", "application/octet-stream", "application/x-www-form-urlencoded"):
    schemathesis.openapi.media_type(kind, st.sampled_from(PICTURES))
schemathesis.openapi.format("binary", st.sampled_from(PICTURES))
CODED = [base64.b64encode(one).decode() for one in PICTURES]
schemathesis.openapi.format("byte", st.sampled_from(CODED))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = write_bundle(tmp_path_factory.mktemp("served") / "b.onnx")
    service = Service(path, engine="onnxruntime", threads=1, workers=2)
    with running(service, batch_api=True, token=TOKEN) as one:
        yield one


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    config = SchemathesisConfig.from_dict(
        {
            "headers": {"Authorization": f"Bearer {TOKEN}", "Host": "localhost"},
        }
    )
    return schemathesis.openapi.from_url(
        f"http://127.0.0.1:{server.port}/openapi.json",
        headers={"Authorization": f"Bearer {TOKEN}"},
        config=config,
    )


OPERATIONS = [
    ("POST", "/predict"), ("POST", "/predict/batch"), ("GET", "/"), ("GET", "/livez"),
    ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/info"),
]  # fmt: skip


def test_every_path_is_described(schema: Any) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert found == set(OPERATIONS)


def test_every_status_that_is_refused_with_is_described(schema: Any) -> None:
    told = {int(one) for one in schema.raw_schema["paths"]["/predict"]["post"]["responses"]}
    assert told == {200, *STATUS.values()} - {404, 405}
    assert set(WORDS) == set(STATUS.values())
    everything = json.dumps(schema.raw_schema)
    assert "HTTPValidationError" not in everything


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation[0] == "POST"  # the others take nothing
    ],
)
def test_drawn_requests_are_answered_as_described(
    server: Running, schema: Any, method: str, path: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]
    seen: list[int] = []

    @settings(
        max_examples=50, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def drawn(case: Any) -> None:
        response = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
        seen.append(response.status_code)
        hasty = response.status_code == 504 and int(case.headers["X-Timeout-Ms"]) < 2000
        case.validate_response(response, excluded_checks=[not_a_server_error] if hasty else [])

    drawn()
    if mode is GenerationMode.POSITIVE:
        assert 200 in seen
    else:
        assert max(seen) >= 400
    assert server.front.held.bytes == 0
    good = requests.post(
        f"http://127.0.0.1:{server.port}/predict",
        PICTURES[0],
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=10,
    )
    assert good.json()["predictions"][0]["class"] == "blue"
