"""A gateway over a scripted generator, for clients that other people wrote: they are used as their documents say.

The gateway's parsers find reasoning in `(...)` and calls in `@name;arguments;`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from preft.core.request import AdapterRef
from support import small_tokenizers
from support.fake_parsers import FakeParsers
from support.sdk_gateway import ScriptedGateway, gateway_in_thread
from support.small_tokenizers import TOOLS_TEMPLATE


class Door:
    """The gateway's HTTP address, what it answers next, and what it was asked."""

    def __init__(self, gateway: ScriptedGateway) -> None:
        self.gateway = gateway
        self.url = f"{gateway.urls['http']}/v1"

    def say(self, *texts: str) -> None:
        """Answers the next requests with these texts; the last one stays."""
        self.gateway.say(*texts)

    def prompts(self) -> list[str]:
        """The prompts so far, as text."""
        decode = self.gateway.deps.tokenizer.decode
        requests = self.gateway.generator.requests
        return [decode(request.prompt_token_ids, skip_special_tokens=False) for request in requests]

    def schemas(self) -> list[str | None]:
        """The JSON schemas that the answers had to follow, as JSON text."""
        forms = [request.sampling.structured_outputs for request in self.gateway.generator.requests]
        return [form.json if form is not None else None for form in forms]

    def adapters(self) -> set[AdapterRef | None]:
        return {request.adapter for request in self.gateway.generator.requests}


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedGateway]:
    folder = small_tokenizers.byte_level(tmp_path_factory.mktemp("model"), chat_template=TOOLS_TEMPLATE)
    with gateway_in_thread(folder, parsers=FakeParsers()) as gateway:
        yield gateway


@pytest.fixture
def door(running: ScriptedGateway) -> Door:
    """Serves the base model `base` and the adapter `ann`."""
    running.reset()
    running.call(running.catalog.add("ann", "/ann"))
    return Door(running)
