"""The HTTP API on a real cluster: the official client, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from e2e.conftest import Served
from support.http import post
from support.models import make_lora, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture
def client(llama: Served) -> Any:
    with openai.OpenAI(base_url=f"{llama.cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completions_with_the_official_client(llama: Served, client: openai.OpenAI) -> None:
    prompt = list(range(10, 60))
    whole = client.completions.create(model="alice", prompt=prompt, max_tokens=12, temperature=0)
    pieces = list(
        client.completions.create(
            model="alice",
            prompt=prompt,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    again = pieces[-1].usage
    assert whole.usage is not None
    assert again is not None
    assert (again.prompt_tokens, again.completion_tokens) == (50, whole.usage.completion_tokens)
    assert again.prompt_tokens_details is not None
    assert again.prompt_tokens_details.cached_tokens == 32  # a whole block, from the prefix cache
    base = client.completions.create(model=llama.name, prompt=prompt, max_tokens=12, temperature=0)
    assert base.choices[0].text != whole.choices[0].text


def test_chat_with_the_official_client(llama: Served, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="bob", messages=messages, max_tokens=12, temperature=0, logprobs=True)
    pieces = list(
        client.chat.completions.create(model="bob", messages=messages, max_tokens=12, temperature=0, stream=True)
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.choices[0].logprobs is not None


class Order(BaseModel):
    kind: Literal["tea", "coffee"]
    cups: Literal[1, 2, 3]
    sweet: bool


def test_an_agent_step_with_the_official_client(llama: Served, client: openai.OpenAI) -> None:
    """A named function under an adapter, whole and streamed."""
    messages: Any = [{"role": "user", "content": "order"}]
    tools = [openai.pydantic_function_tool(Order, name="order")]
    asked: dict[str, Any] = {
        "model": "alice",
        "messages": messages,
        "tools": tools,
        "tool_choice": {"type": "function", "function": {"name": "order"}},
        "max_tokens": 300,
        "temperature": 0,
    }
    whole = client.chat.completions.parse(**asked)
    [call] = whole.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Order)
    with client.chat.completions.stream(**asked) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function == call.function
    base = client.chat.completions.parse(**{**asked, "model": llama.name})
    assert base.choices[0].message.tool_calls is not None


def test_responses_and_anthropics_messages_are_the_chats_answers(llama: Served, client: openai.OpenAI) -> None:
    """Token for token, under each adapter and without one; the answers of two adapters differ."""
    user: Any = [{"role": "user", "content": "hello"}]
    messages: Any = [{"role": "system", "content": "be brief"}, *user]
    texts: dict[str, str | None] = {}
    with anthropic.Anthropic(base_url=llama.cluster.url, api_key="none", max_retries=0) as other:
        for model in (llama.name, "alice", "loreft"):
            chat = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0)
            texts[model] = chat.choices[0].message.content
            asked: Any = {"model": model, "instructions": "be brief", "max_output_tokens": 12, "temperature": 0}
            reply = client.responses.create(input="hello", **asked)
            assert reply.output_text == texts[model]
            with client.responses.stream(input=user, **asked) as stream:
                deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            assert "".join(deltas) == texts[model]
            greedy: Any = {"max_tokens": 12, "system": "be brief", "extra_body": {"temperature": 0}}
            message = other.messages.create(model=model, messages=user, **greedy)
            assert [block.text for block in message.content if block.type == "text"] == [texts[model]]
            with other.messages.stream(model=model, messages=user, **greedy) as events:
                assert "".join(events.text_stream) == texts[model]
            assert chat.usage is not None
            assert reply.usage is not None
            assert reply.usage.output_tokens == message.usage.output_tokens == chat.usage.completion_tokens
    assert len(set(texts.values())) == len(texts)


def test_models_lists_base_and_adapters(llama: Served, client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {llama.name, "alice", "bob", "carol"}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [5] * 2048}, 400, None),
        ({"prompt": [99999]}, 400, "prompt"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"no_such_thing": 1}, 400, "no_such_thing"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"n": 0}, 400, "n"),
    ],
)
def test_bad_requests_name_the_parameter(llama: Served, change: dict[str, Any], status: int, param: str | None) -> None:
    body = {"model": "alice", "prompt": [5, 6, 7], "max_tokens": 4, **change}
    response = post(llama.cluster.url, "/v1/completions", body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    if param is not None:
        assert error["param"] == param or param in error["message"]


def test_malformed_json(llama: Served) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{llama.cluster.url}/v1/completions", content=b'{"model": ', headers=headers)
    assert response.status_code == 400
    assert "error" in response.json()


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def _pickled(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")


def _changed_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[0]
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, path)

    return spoil


def _rank(rank: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "r": rank}))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        _no_config,
        _no_weights,
        _truncated,
        _pickled,
        _changed_tensor(lambda tensor: torch.full_like(tensor, float("nan"))),
        _changed_tensor(lambda tensor: tensor[:, :-1]),
        _rank(64),
        _rank(0),
    ],
    ids=["no config", "no weights", "truncated", "pickle", "nan", "wrong shape", "rank too high", "rank 0"],
)
def test_a_broken_adapter_is_refused_in_one_sentence(
    llama: Served, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(llama.adapters["alice"], folder)
    spoil(folder)
    body = {"lora_name": "broken", "lora_path": str(folder)}
    response = post(llama.cluster.url, "/v1/load_lora_adapter", body)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert len(message) > 10
    assert "\n" not in message
    asked = post(llama.cluster.url, "/v1/completions", {"model": "broken", "prompt": [5], "max_tokens": 1})
    assert asked.status_code == 404


def test_an_adapter_of_another_base_is_refused(llama: Served, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", hidden=64, heads=2, kv_heads=1)
    make_lora(tmp_path / "wrong", other, rank=4)
    body = {"lora_name": "wrong", "lora_path": str(tmp_path / "wrong")}
    assert post(llama.cluster.url, "/v1/load_lora_adapter", body).status_code == 400
