"""The OpenAPI document, and the server held against it by schemathesis."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server_samples import RepeatingEngine, served

PATHS = [
    "/health", "/version", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/responses",
    "/v1/completions", "/v1/embeddings", "/classify", "/tokenize", "/detokenize", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
]  # fmt: skip

WITH_BODY = PATHS[5:]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def url(tiny_tokenizer, tmp_path_factory):
    with served(RepeatingEngine(tiny_tokenizer), home=tmp_path_factory.mktemp("home")) as server:
        yield server.url


def test_the_document_describes_every_route_and_field(url):
    document = httpx.get(f"{url}/openapi.json").json()
    assert list(document["paths"]) == PATHS
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request"):
            assert schema["additionalProperties"] is False, name
            undescribed = [field for field, about in schema["properties"].items() if "description" not in about]
            assert undescribed in ([], ["lora_name"]), name
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation.get("summary")
            assert "422" not in operation["responses"]


def test_there_are_no_pages_from_elsewhere(url):
    assert httpx.get(f"{url}/docs").status_code == 404
    assert httpx.get(f"{url}/redoc").status_code == 404


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, GenerationMode.POSITIVE) for path in PATHS]
    + [(path, GenerationMode.NEGATIVE) for path in PATHS if path in WITH_BODY],
)
def test_the_server_keeps_to_its_document(url, path, mode):
    [operation] = schemathesis.openapi.from_url(f"{url}/openapi.json")[path].values()

    @settings(max_examples=12, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(checks=CHECKS)

    check()
