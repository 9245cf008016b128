"""From settings to keys, limits and records, and the refusal to serve strangers without keys."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from preft.cluster.access import open_access
from preft.cluster.adapters import tenant_source_limits
from preft.cluster.console import Console, first_question
from preft.cluster.process import Stop
from preft.cluster.serving import open_gateway
from preft.cluster.stores import open_limits
from preft.core.errors import ConfigError, InvalidAdapter, Unauthenticated
from preft.core.request import GenerateRequest, Sampling
from preft.core.settings import Settings, load_settings
from preft.gateway.access.caller import Caller
from preft.gateway.api_call import ApiCall
from preft.gateway.text.choice import TextOptions
from preft.state.memory_limits import MemoryLimits
from preft.state.redis_limits import RedisLimits
from support.api_keys import bearer, write_keys
from support.fakes import FakeCatalog, FakeStore
from support.lora_folders import write_base


def settings_for(folder: Path, **overrides: Any) -> Settings:
    given = {"model": str(write_base(folder / "base")), "state_dir": str(folder / "state"), "port": 0}
    return load_settings(None, given | overrides)


async def test_without_keys_no_gateway_listens_for_strangers(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, host="0.0.0.0")
    async with AsyncExitStack() as stack:
        with pytest.raises(ConfigError, match=r"^api_keys: other machines reach 0\.0\.0\.0"):
            await open_gateway(stack, settings, FakeStore(), "", Stop(), Console(StringIO()))


async def test_what_the_settings_dont_name_isnt_there(tmp_path: Path) -> None:
    async with open_access(settings_for(tmp_path), FakeCatalog(), CollectorRegistry()) as opened:
        assert (opened.access, opened.accounts) == (None, None)


async def test_a_broken_file_ends_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    for content in None, "k: {", "k: {sha256: short}":
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=str(path)):
            async with open_access(settings_for(tmp_path, api_keys=str(path)), FakeCatalog(), CollectorRegistry()):
                pass


async def test_the_keys_are_followed(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.yaml", a={})
    async with open_access(settings_for(tmp_path, api_keys=str(path)), FakeCatalog(), CollectorRegistry()) as opened:
        assert opened.access is not None
        assert opened.access.caller(bearer("a")["authorization"]).key is not None
        write_keys(path, b={})
        async with asyncio.timeout(30):
            while True:
                try:
                    opened.access.caller(bearer("b")["authorization"])
                    break
                except Unauthenticated:
                    await asyncio.sleep(0.05)
        with pytest.raises(Unauthenticated):
            opened.access.caller(bearer("a")["authorization"])


async def test_records_need_no_keys(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    settings = settings_for(tmp_path, usage_log=str(log))
    catalog = FakeCatalog()
    async with open_access(settings, catalog, CollectorRegistry()) as opened:
        assert opened.access is None
        assert opened.accounts is not None
        request = GenerateRequest("r", (1, 2), Sampling(max_tokens=3))
        account = opened.accounts.open(ApiCall("id", "base", (request,), 1, TextOptions(), 5), Caller(catalog))
        await account.begin()
        account.end(200, "ok", 3, 1)
    [line] = log.read_text().splitlines()
    record = json.loads(line)
    assert (record["request_id"], record["tenant"], record["key"]) == ("id", "", "")
    assert (record["prompt_tokens"], record["generated_tokens"], record["cached_tokens"]) == (2, 3, 1)


@pytest.mark.parametrize(
    ("state", "kind"), [(None, MemoryLimits), ("/tmp/x.sqlite", MemoryLimits), ("redis://127.0.0.1:1/0", RedisLimits)]
)
async def test_gateways_count_together_in_redis(tmp_path: Path, state: str | None, kind: type) -> None:
    counter = open_limits(settings_for(tmp_path, state=state))
    assert type(counter) is kind
    await counter.close()


def test_tenants_may_read_what_the_setting_names_alone(tmp_path: Path) -> None:
    named = {"adapters": {"bob": str(tmp_path / "bob")}, "adapter_dir": str(tmp_path / "many")}
    for sources, fine in ((None, False), ([str(tmp_path / "public")], True)):
        rules = tenant_source_limits(settings_for(tmp_path, adapter_sources=sources, **named)).rules
        for refused in named["adapter_dir"], str(tmp_path / "bob"), str(tmp_path):
            with pytest.raises(InvalidAdapter):
                rules.check_path(refused)
        if fine:
            rules.check_path(str(tmp_path / "public" / "x"))


def test_the_first_question_shows_a_key() -> None:
    shown = first_question("127.0.0.1:80", "m", is_chat=False, max_model_len=9, needs_key=True)
    assert '-H "Authorization: Bearer $PREFT_API_KEY"' in shown
