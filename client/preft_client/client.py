"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from preft_client.adapters import POLL_SECONDS, WAIT_SECONDS, Adapters
from preft_client.errors import ConnectionFailed
from preft_client.forms import form_of, read_form
from preft_client.parameters import Message, Parameters, Prompt, asked_chat, asked_prompt
from preft_client.results import Generation, Parsed, Worker
from preft_client.running import Gateways
from preft_client.settings import TLS, Settings
from preft_client.streams import Stream

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Form = TypeVar("Form", bound=BaseModel)


class Client:
    """A cluster behind one or more gateways, over HTTP or gRPC. Threads may share it.

    `url` begins with http://, https://, grpc:// or grpcs://; several addresses are gateways of one cluster. Absent
    `url` and `api_key` come from PREFT_URL and PREFT_API_KEY. `timeout` limits each call as a whole and
    `connect_timeout` each connection, in seconds. `retries` counts further rounds over all gateways, before the first
    token alone. All calls raise PreftError.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        retries: int = 2,
        tls: TLS | None = None,
    ) -> None:
        self._gateways = Gateways(Settings.of(url, api_key, timeout, connect_timeout, retries, tls))
        self.adapters = Adapters(self._gateways)

    def generate(
        self, prompt: Prompt, *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> Generation:
        """Continues a text or token ids under `model`: the base model's name, an adapter's, or `NAME@VERSION`."""
        with self.stream(prompt, model=model, timeout=timeout, **parameters) as stream:
            return stream.read()

    def stream(
        self, prompt: Prompt, *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> Stream:
        """As `generate`, while it runs."""
        return Stream(self._gateways, asked_prompt(model, prompt, parameters), timeout)

    def chat(
        self, messages: Sequence[Message], *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> Generation:
        """Answers a chat, rendered by the base model's chat template."""
        with self.stream_chat(messages, model=model, timeout=timeout, **parameters) as stream:
            return stream.read()

    def stream_chat(
        self, messages: Sequence[Message], *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> Stream:
        """As `chat`, while it runs."""
        return Stream(self._gateways, asked_chat(model, messages, parameters), timeout)

    def parse(
        self,
        messages: Sequence[Message],
        form: type[Form],
        *,
        model: str,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Parsed[Form]:
        """Answers a chat in the form of a pydantic model.

        Raises InvalidRequest from a server without structured output, and BadReply if the answer was cut off.
        """
        parameters["response_format"] = form_of(form)
        return read_form(form, self.chat(messages, model=model, timeout=timeout, **parameters))

    def workers(self, *, timeout: float | None = None) -> tuple[Worker, ...]:
        """The cluster's workers, as one gateway sees them. HTTP only."""
        return self._gateways.result(lambda wire: wire.workers(), timeout)

    def ready(self, *, timeout: float | None = None) -> bool:
        """Whether a request would be served now."""
        return self._gateways.result(lambda wire: wire.ready(), timeout)

    def wait_ready(self, *, timeout: float = WAIT_SECONDS) -> None:
        """Returns once `ready`. Raises DeadlineExceeded, or ConnectionFailed if no gateway answers until the end."""
        attempts = self._gateways.attempts(timeout, repeatable=True)
        while True:
            left = attempts.seconds_left()
            try:
                if self.ready(timeout=left):
                    return
            except ConnectionFailed:
                if attempts.deadline - time.monotonic() < POLL_SECONDS:
                    raise
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Closes the connections. Running streams end."""
        self._gateways.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
