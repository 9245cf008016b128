"""What readers of choices do with parsers that are slow, fail, or want single tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from preft.core.errors import EngineFailed
from preft.core.request import FinishReason, TokenLogprob
from preft.gateway.text.choice import ChoiceDelta, ToolCallDelta
from preft.gateway.text.choice_reader import LONGEST_REST, SHARE, SLOW_SECONDS, ChoiceReader, ParserTime
from preft.gateway.text.forced_calls import CallArray, NamedCall
from preft.gateway.text.parsing import Parts


class Parser:
    """Capital letters are reasoning; `!` is an error, and `?` takes long."""

    def __init__(self, *, takes_many: bool = True) -> None:
        self.takes_many = takes_many
        self.pushed: list[tuple[str, tuple[int, ...]]] = []
        self.threads: set[int] = set()

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parts:
        self.pushed.append((text, tuple(token_ids)))
        self.threads.add(threading.get_ident())
        if "!" in text:
            raise ValueError(text)
        if "?" in text:
            end = time.thread_time() + 2 * SLOW_SECONDS
            while time.thread_time() < end:
                pass
        reasoning = "".join(character for character in text if character.isupper())
        return Parts("".join(character for character in text if not character.isupper()), reasoning)

    def parse(self, text: str, token_ids: Sequence[int]) -> Parts:
        return self.push(text, token_ids, finished=True)

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return len(token_ids)


def delta(text: str, token: int = 0, finish: FinishReason | None = None) -> ChoiceDelta:
    return ChoiceDelta(1, text, (token,), (TokenLogprob(token, -1.0, 1),), finish)


async def test_a_stream_keeps_tokens_and_log_probabilities():
    reader = ChoiceReader(Parser(), whole=False, counts_reasoning=True)
    first = await reader.read([delta("ABc", 7)])
    assert (first.text, first.reasoning, first.token_ids, first.logprobs[0].token_id) == ("c", "AB", (7,), 7)
    last = await reader.read([delta("d", 8, FinishReason.STOP)])
    assert (last.text, last.finish_reason, reader.reasoning_tokens) == ("d", FinishReason.STOP, 2)


async def test_a_whole_answer_is_parsed_once_at_its_end():
    parser = Parser()
    reader = ChoiceReader(parser, whole=True)
    first = await reader.read([delta("Ab", 1)])
    assert (first.text, first.token_ids) == ("", (1,))
    last = await reader.read([delta("Cd", 2, FinishReason.LENGTH)])
    assert (last.text, last.reasoning, last.token_ids) == ("bd", "AC", (2,))
    assert parser.pushed == [("AbCd", (1, 2))]


async def test_a_parser_that_fails_ends_a_stream_with_an_error():
    reader = ChoiceReader(Parser(), whole=False)
    with pytest.raises(EngineFailed, match="parser"):
        await reader.read([delta("oh!")])


async def test_a_parser_that_fails_leaves_a_whole_answer_as_content():
    reader = ChoiceReader(Parser(), whole=True)
    await reader.read([delta("AB")])
    last = await reader.read([delta("!", finish=FinishReason.STOP)])
    assert (last.text, last.reasoning, last.finish_reason) == ("AB!", "", FinishReason.STOP)


async def test_a_slow_parser_leaves_the_event_loop_and_takes_several_deltas_at_once():
    parser = Parser()
    reader = ChoiceReader(parser, whole=False)
    texts = [(await reader.read([delta("?", 0)])).text]
    texts += [(await reader.read([delta(str(number), number)])).text for number in range(1, 5)]
    last = await reader.read([delta("e", 5, FinishReason.STOP)])
    assert "".join(texts) + last.text == "?1234e"
    assert parser.pushed == [("?", (0,)), ("1234e", (1, 2, 3, 4, 5))]
    assert len(parser.threads) == 2


async def test_a_parser_may_want_single_tokens_also_when_it_is_slow():
    parser = Parser(takes_many=False)
    reader = ChoiceReader(parser, whole=False)
    assert reader.token_by_token
    first = await reader.read([delta("A?", 1), delta("b", 2)])
    assert (first.text, first.reasoning, first.token_ids) == ("?b", "A", (1, 2))
    last = await reader.read([delta("c", 3), delta("d", 4, FinishReason.STOP)])
    assert last.text == "cd"
    assert parser.pushed == [("A?", (1,)), ("b", (2,)), ("c", (3,)), ("d", (4,))]
    assert len(parser.threads) == 2


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("finish", "is_named", "expected"),
    [
        (FinishReason.STOP, False, FinishReason.TOOL_CALLS),
        (FinishReason.STOP, True, FinishReason.STOP),
        (FinishReason.LENGTH, False, FinishReason.LENGTH),
    ],
)
async def test_the_finish_reason_of_calls(whole, finish, is_named, expected):
    calls = NamedCall("look", lambda name, position: "id")
    reader = ChoiceReader(None, calls, whole=whole, is_named=is_named)
    read = [await reader.read([delta("{")]), await reader.read([delta("}", finish=finish)])]
    assert [each.finish_reason for each in read] == [None, expected]
    assert "".join(call.arguments for each in read for call in each.tool_calls) == "{}"


async def test_reasoning_comes_before_forced_calls():
    calls = CallArray(lambda name, position: "id")
    reader = ChoiceReader(Parser(), calls, whole=False)
    first = await reader.read([delta("HM")])
    last = await reader.read([delta('[{"name": "a", "parameters": {}}]', finish=FinishReason.STOP)])
    assert first.reasoning == "HM"
    assert last.tool_calls == (ToolCallDelta(0, "{}", "id", "a"),)


async def test_without_parallel_calls_there_is_one():
    calls = CallArray(lambda name, position: "id")
    reader = ChoiceReader(None, calls, whole=True, parallel=False)
    call = '{"name": "a", "parameters": {}}'
    last = await reader.read([delta(f"[{call}, {call}]", finish=FinishReason.STOP)])
    assert [call.position for call in last.tool_calls] == [0]


def test_choices_take_turns_and_one_slow_parse_stops_no_other_choice():
    parser_time = ParserTime()
    first, second = parser_time.take(0.01), parser_time.take(0.01)
    assert second - first == pytest.approx(0.01 / SHARE, abs=1e-6)
    slow = parser_time.take(10.0)
    now = time.monotonic()
    assert slow - now > 5.0
    assert parser_time.take(0.001) - now < LONGEST_REST + 0.1
