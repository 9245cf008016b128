"""docs/api-fields.md: the server does with the example of every row what the row says, and no field has no row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from preft.core.request import FinishReason
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.text.tokenizer import Tokenizer
from support.api_fields import Row, rows
from support.fake_parsers import FakeParsers
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.small_tokenizers import byte_level

READS_ALL = (
    "{{ bos_token }}{{ mood }}{{ reasoning_effort }}{{ enable_thinking }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{{ (tools or []) | tojson }}{{ (documents or []) | tojson }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
}
ROWS = rows()


def ids(found: list[Row]) -> list[str]:
    return [f"{row.path.removeprefix('/v1/')}-{row.field}-{row.answer}" for row in found]


def with_answer(answer: str) -> Any:
    found = [row for row in ROWS if row.answer == answer]
    return pytest.mark.parametrize("row", found, ids=ids(found))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Gateways with and without a parser. The generator says "(hm)hello", `<|eot|>`, " world", and keeps requests."""
    tokenizer = Tokenizer.load(byte_level(tmp_path_factory.mktemp("model"), chat_template=READS_ALL))
    tokens = [tokenizer._backend.token_to_id(char) for char in "(hm)helloĠworld"]
    script = Script((*tokens[:9], 2, *tokens[9:]), finish=FinishReason.LENGTH)
    generator = FakeGenerator(lambda request: script)
    catalog = FakeCatalog.of(ann="/ann")
    plain, parsing = (
        create_app(GatewayDeps("base", tokenizer, 4096, generator, catalog, parsers=parsers))
        for parsers in (None, FakeParsers(reads_calls=False))
    )
    with (
        TestClient(plain, base_url="http://localhost") as client,
        TestClient(parsing, base_url="http://localhost") as parser_client,
    ):
        yield SimpleNamespace(client=client, parser_client=parser_client, generator=generator)


def outcome(served: SimpleNamespace, row: Row, **fields: Any) -> tuple[int, str]:
    """The status, and all that a request led to: the core requests and the reply, without times and random ids."""
    served.generator.requests.clear()
    body = {"model": "base", **LEAST[row.path], **fields}
    client = served.parser_client if "reasoning_parser" in row.remark else served.client
    reply = client.post(row.path, json=body)
    said = re.sub(r'("\w*(created|completed)\w*":)[^,}]+', r"\g<1>0", reply.text)
    return reply.status_code, re.sub(r"[0-9a-f]{16,}", "ID", f"{served.generator.requests} {said}")


@with_answer("works")
def test_what_works_is_served_and_changes_something(served: SimpleNamespace, row: Row) -> None:
    status, told = outcome(served, row, **row.beside, **{row.field: row.example})
    assert status == 200, told
    assert told != outcome(served, row, **row.beside)[1]


@with_answer("no effect")
def test_what_has_no_effect_changes_nothing(served: SimpleNamespace, row: Row) -> None:
    without = outcome(served, row, **row.beside)
    assert without[0] == 200
    for value in (row.example, None, 0, "x", [], {"a": [1]}):
        told = outcome(served, row, **row.beside, **{row.field: value})
        assert told == without or (told[0] == 400 and value not in (row.example, None))


@with_answer("refused")
def test_what_is_refused_is_named(served: SimpleNamespace, row: Row) -> None:
    body = {"model": "base", **LEAST[row.path], **row.beside, row.field: row.example}
    reply = served.client.post(row.path, json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["message"], error["param"]) == (row.message, row.field)
    for value in row.neutral:
        assert outcome(served, row, **row.beside, **{row.field: value}) == outcome(served, row, **row.beside)


@pytest.mark.parametrize("path", LEAST)
def test_no_row_is_missing(served: SimpleNamespace, path: str) -> None:
    described = served.client.get("/openapi.json").json()
    body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = described["components"]["schemas"][body.rpartition("/")[2]]["properties"]
    assert {row.field for row in ROWS if row.path == path} == fields.keys()
    one_answer = {(row.field, row.answer): row for row in ROWS if row.path == path}
    assert len(one_answer) == sum(row.path == path for row in ROWS)


def test_pages_link_to_the_tables() -> None:
    assert {row.path for row in ROWS} == LEAST.keys()
    docs = Path(__file__).parents[3] / "docs"
    assert "api-fields.md" in (docs / "http.md").read_text()
