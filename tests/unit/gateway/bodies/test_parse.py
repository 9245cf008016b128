from __future__ import annotations

import json

import pytest

from preft.core.errors import InvalidRequest
from preft.core.request import PARAMETERS
from preft.core.structured import StructuredOutputs
from preft.gateway.bodies.parse import parse_body, parse_json
from preft.gateway.bodies.schemas import ChatBody, CompletionBody

COMPLETION = {"model": "base", "prompt": "hi"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def completion(**changes):
    return parse_body(CompletionBody, {**COMPLETION, **changes})


def chat(**changes):
    return parse_body(ChatBody, {**CHAT, **changes})


def refused(parse, **changes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**changes)
    return caught.value


BAD_VALUES = [
    ("temperature", "hot", -0.1, 2.1, True),
    ("top_p", 0, 1.1, "1"),
    ("top_k", -2, 1.5, True),
    ("min_p", -0.1, 1.1),
    ("repetition_penalty", 0, -1, 5e-324, 1e308),
    ("presence_penalty", -2.1, 2.1),
    ("frequency_penalty", -2.1, 2.1),
    ("seed", 2**63, -(2**63) - 1, 1.5, -1, 1e19, float("inf")),
    ("n", 0, -1, 129, 1.5, "1", True, 1e300),
    ("max_tokens", 0, -5, "16", 1.5, True),
    ("min_tokens", -1),
    ("ignore_eos", "yes", 1),
    ("stop", "", [""], [1], ["x"] * 17, {"a": 1}),
    ("stop_token_ids", 5, [1.5], ["1"], [1] * 1025),
    ("logit_bias", [], {str(i): 1 for i in range(1025)}, {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, {"1": True}),
    ("stream", 1, "true"),
    ("return_token_ids", 1),
    ("skip_special_tokens", "no"),
    ("include_stop_str_in_output", 0),
    ("model", "", 5, ["base"]),
]


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_clients_may_set_each_sampling_parameter(kind):
    assert set(PARAMETERS) - set(kind.model_fields) == {"eos_token_ids"}


@pytest.mark.parametrize("parse", [completion, chat])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, *values in BAD_VALUES for value in values])
def test_a_wrong_type_or_range_names_the_parameter(parse, name, value):
    error = refused(parse, **{name: value})
    assert error.param is not None
    assert error.param.split("[")[0] == name
    assert name in str(error)


@pytest.mark.parametrize(
    "value", ["", [], [""], ["a", ""], [[]], [[1], []], 5, {"a": 1}, [1, "a"], ["a", [1]], [1.5], [True]]
)
def test_prompts_that_are_refused(value):
    assert refused(completion, prompt=value).param == "prompt"


@pytest.mark.parametrize(
    ("value", "prompts"),
    [("hi", ("hi",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_prompts_in_four_forms(value, prompts):
    assert completion(prompt=value).prompt == prompts


def test_too_many_prompts():
    assert refused(completion, prompt=["a"] * 1025).param == "prompt"


def test_too_many_messages():
    error = refused(chat, messages=CHAT["messages"] * 65_537)
    assert (error.param, str(error)) == ("messages", "messages: holds 65537 items, the limit is 65536.")
    assert len(chat(messages=CHAT["messages"] * 65_536).messages) == 65_536


def test_as_many_tokens_as_are_allowed():
    body = completion(stop_token_ids=[1] * 1024, logit_bias={str(i): 1 for i in range(1024)})
    assert (len(body.stop_token_ids), len(body.logit_bias)) == (1024, 1024)


def test_an_error_does_not_show_what_may_be_as_large_as_the_body():
    for value, shown in ([1] * 100, "a list"), ({"a": 1}, "an object"), ("x" * 100, repr("x" * 100)[:77] + "..."):
        assert str(refused(completion, temperature=value)).endswith(f", got {shown}.")


def test_what_is_missing_is_named():
    with pytest.raises(InvalidRequest) as caught:
        parse_body(CompletionBody, {"model": "base"})
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        parse_body(ChatBody, {"messages": CHAT["messages"]})
    assert caught.value.param == "model"


@pytest.mark.parametrize("parse", [completion, chat])
def test_an_unknown_parameter_is_named(parse):
    error = refused(parse, temprature=1)
    assert error.param == "temprature"
    assert "Unknown parameter" in str(error)


@pytest.mark.parametrize(
    ("parse", "name", "value"),
    [
        (completion, "suffix", "end"),
        (completion, "prompt_embeds", "AAAA"),
        (completion, "best_of", 2),
        (completion, "guided_json", {}),
        (completion, "use_beam_search", True),
        (completion, "logits_processors", ["x"]),
        (chat, "functions", [{"name": "f"}]),
        (chat, "modalities", ["text", "audio"]),
        (chat, "audio", {"voice": "x"}),
        (completion, "detokenize", False),
    ],
)
def test_what_is_not_supported_says_so(parse, name, value):
    error = refused(parse, **{name: value})
    assert error.param == name
    assert "supported" in str(error)


def test_neutral_values_and_metadata_are_accepted():
    metadata = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x"}
    assert completion(echo=False, suffix="", use_beam_search=False, **metadata) == completion()
    assert completion(n=2, best_of=2).n == 2
    neutral = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}
    assert chat(**neutral, **metadata).model_copy(update={"tool_choice": None}) == chat()


WHOLE = ("max_tokens", "min_tokens", "n", "top_k", "seed")


@pytest.mark.parametrize("parse", [completion, chat])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_is_an_integer_however_it_is_written(parse, name):
    value = getattr(parse(**{name: 16.0}), name)
    assert (value, type(value)) == (16, int)
    assert refused(parse, **{name: 16.5}).param == name


def test_whole_numbers_of_one_api_and_in_lists():
    body = completion(logprobs=2.0, stop_token_ids=[3.0, 4], best_of=1.0, prompt=[1.0, 2])
    assert (body.logprobs, body.stop_token_ids, body.best_of, body.prompt) == (2, [3, 4], 1, ((1, 2),))
    assert completion(prompt=[[1, 2.0], [3]]).prompt == ((1, 2), (3,))
    assert all(type(token_id) is int for token_id in completion(prompt=[1.0]).prompt[0])
    assert chat(max_completion_tokens=5.0, logprobs=True, top_logprobs=2.0).wanted_logprobs == 2
    assert refused(completion, stop_token_ids=[3.5]).param == "stop_token_ids[0]"
    assert refused(completion, prompt=[1.5]).param == refused(completion, prompt=[[1], [True]]).param == "prompt"


def test_every_integer_field_takes_whole_numbers():
    """Also one that is added later."""
    for kind in (CompletionBody, ChatBody):
        schema = kind.model_json_schema()["properties"]
        integers = {
            name
            for name, field in schema.items()
            if any(form.get("type") == "integer" for form in (field, *field.get("anyOf", ())))
        }
        assert integers >= set(WHOLE)
        for name in integers:
            more = {"n": 4.0, "best_of": 4.0} if name == "best_of" else {name: 4.0, "logprobs": True}
            more = more if kind is ChatBody or name == "best_of" else {name: 4.0}
            value = getattr((chat if kind is ChatBody else completion)(**more), name)
            assert (name, value, type(value)) == (name, 4, int)


CALL = b'{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": %s}}]}'
INFINITE = [
    (b'"chat_template_kwargs": {"a": {"b": [1, -1e999]}}', "chat_template_kwargs.a.b[1]"),
    (b'"documents": [{}, {"score": 1e999}]', "documents[1].score"),
    (
        b'"tools": [{"function": {"name": "f", "parameters": {"maximum": 1e999}}}]',
        "tools[0].function.parameters.maximum",
    ),
    (b'"messages": [{"role": "user", "content": "x", "metadata": [1e999]}]', "messages[0].metadata[0]"),
    (b'"messages": [%s]' % CALL % b'{"x": 1e999}', "messages[0].tool_calls[0].function.arguments.x"),
    (b'"messages": [%s]' % CALL % b'"{\\"x\\": 1e999}"', "messages[0].tool_calls[0]"),
    (b'"metadata": {"a": 1e999}', "metadata.a"),
    (b'"user": 1e999', "user"),
    (b'"tool_choice": 1e999', "tool_choice"),
    (b'"mm_processor_kwargs": {"a": 1e999}', "mm_processor_kwargs.a"),
    (b'"temperature": 1e999', "temperature"),
    (b'"stop_token_ids": [1e999]', "stop_token_ids[0]"),
    (b'"logit_bias": {"1": 1e999}', "logit_bias.1"),
    (b'"response_format": {"a": 1e999}', "response_format.a"),
]


@pytest.mark.parametrize(("field", "param"), INFINITE)
def test_a_number_that_overflows_names_its_field(field, param):
    given = {**CHAT, **parse_json(b"{%s}" % field)}
    with pytest.raises(InvalidRequest) as caught:
        parse_body(ChatBody, given)
    assert caught.value.param == param


def test_a_prompts_number_that_overflows_names_the_prompt():
    assert refused(completion, **parse_json(b'{"prompt": [1, 1e999]}')).param == "prompt"
    assert refused(completion, **parse_json(b'{"prompt": [[1], [1e999]]}')).param == "prompt"


def test_null_means_absent():
    names = (
        "temperature",
        "max_tokens",
        "stop",
        "logit_bias",
        "seed",
        "stream_options",
        "response_format",
        "echo",
        "n",
    )
    assert completion(**dict.fromkeys(names)) == completion()
    assert refused(completion, prompt=None).param == "prompt"


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "ä"]}}}
FORMS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": None}}},
        {"json": json.dumps(SCHEMA)},
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
        {"json": json.dumps(SCHEMA), "disable_additional_properties": True},
    ),
    (
        {"response_format": {"type": "structural_tag", "structures": [{"begin": "a"}], "triggers": ["a"]}},
        {"structural_tag": '{"structures": [{"begin": "a"}], "triggers": ["a"]}'},
    ),
    ({"structured_outputs": {"json": SCHEMA}}, {"json": json.dumps(SCHEMA)}),
    ({"structured_outputs": {"json": "{}", "whitespace_pattern": " ?"}}, {"json": "{}", "whitespace_pattern": " ?"}),
    ({"structured_outputs": {"regex": "", "choice": None}}, {"regex": ""}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
    ({"structured_outputs": {"grammar": "start: A"}, "response_format": {"type": "text"}}, {"grammar": "start: A"}),
    ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
    ({"structured_outputs": {"structural_tag": "{}"}}, {"structural_tag": "{}"}),
]


@pytest.mark.parametrize("parse", [completion, chat])
@pytest.mark.parametrize(("given", "wanted"), FORMS)
def test_forms_of_output(parse, given, wanted):
    assert parse(**given).wanted_outputs == (StructuredOutputs(**wanted) if wanted is not None else None)


BAD_FORMS = [
    ("response_format", {}, "response_format.type"),
    ("response_format", {"type": "yaml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        "response_format.json_schema.name",
    ),
    ("response_format", {"type": "json_object", "extra": 1}, "response_format.extra"),
    ("structured_outputs", {}, "structured_outputs"),
    ("structured_outputs", {"regex": "a", "json_object": True}, "structured_outputs"),
    ("structured_outputs", {"json_object": False}, "structured_outputs"),
    ("structured_outputs", {"choice": []}, "structured_outputs"),
    ("structured_outputs", {"choice": [1]}, "structured_outputs.choice[0]"),
    ("structured_outputs", {"json": "{"}, "structured_outputs"),
    ("structured_outputs", {"regex": 5}, "structured_outputs.regex"),
    ("structured_outputs", {"regex": "a" * 70_000}, "structured_outputs"),
    ("structured_outputs", {"_backend": "x", "regex": "a"}, "structured_outputs._backend"),
]


@pytest.mark.parametrize("parse", [completion, chat])
@pytest.mark.parametrize(("name", "value", "param"), BAD_FORMS)
def test_a_bad_form_names_its_field(parse, name, value, param):
    assert refused(parse, **{name: value}).param == param


def test_two_forms_exclude_each_other():
    forms = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    assert refused(chat, **forms).param == "structured_outputs"


def test_stream_options_need_a_stream():
    assert refused(completion, stream_options={"include_usage": True}).param == "stream_options"
    assert completion(stream=True, stream_options={"include_usage": True}).include_usage
    assert not completion(stream=True, stream_options={"continuous_usage_stats": True}).continuous_usage
    assert refused(completion, stream=True, stream_options={"usage": True}).param == "stream_options.usage"


def test_logprobs_of_both_apis():
    assert completion().wanted_logprobs is None
    assert completion(logprobs=0).wanted_logprobs == 0
    assert refused(completion, logprobs=21).param == "logprobs"
    assert refused(completion, logprobs=True).param == "logprobs"
    assert chat(logprobs=True).wanted_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).wanted_logprobs == 3
    assert chat(logprobs=False).wanted_logprobs is None
    assert refused(chat, top_logprobs=3).param == "top_logprobs"
    assert refused(chat, logprobs=1).param == "logprobs"


def test_max_completion_tokens_wins():
    assert chat(max_tokens=5, max_completion_tokens=7).wanted_tokens == 7
    assert refused(chat, max_completion_tokens=0).param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[1]"),
        ({"role": "user"}, "messages[1].content"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"role": "function", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content"),
        ({"role": "user", "content": "x", "mood": 1}, "messages[1].mood"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0]"),
    ],
)
def test_messages_that_are_refused(message, param):
    assert refused(chat, messages=[CHAT["messages"][0], message]).param == param


def test_messages_that_are_accepted():
    reply = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "audio": None}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = chat(messages=[{"role": "user", "content": parts, "name": "ann"}, reply])
    assert [message.said.texts for message in body.messages] == [("one", "two"), ("x",)]
    assert refused(chat, messages=[]).param == "messages"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b"\xff",
        b"[" * 10_000,
        b'{"a": 1, "a": 1}',
        b'{"m": [{"a": 1, "\\u0061": 2}]}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": "\\udfff\\ud800"}',
        b'{"a":' * 5000,
        b"nul",
        b"{} {}",
        b'{"a": %s}' % (b"9" * 5000),
        b'{"a": 01}',
        b"{'a': 1}",
        b'{"a": 1,}',
        b"\x00",
    ],
)
def test_a_body_that_is_no_json_object(data):
    with pytest.raises(InvalidRequest):
        parse_json(data)
