"""Log probabilities in the two shapes of OpenAI's APIs.

JSON has no -inf: as in vLLM, -9999 stands for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from preft.core.request import PromptLogprobs, TokenLogprob
from preft.gateway.text.tokenizer import Tokenizer

_FLOOR = -9999.0


class LogprobFormat:
    """`top` alternatives per token. With `as_ids` a token shows as `token_id:<id>`, as in vLLM."""

    def __init__(self, tokenizer: Tokenizer, *, top: int, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._as_ids = as_ids

    def completion(
        self, entries: Iterable[TokenLogprob], offset: int, first: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """The completions shape, and the text offset behind `entries`. `offset` is the first entry's, in characters.

        Offsets add up the tokens' own texts. `top_logprobs` holds the sampled token and the most likely tokens. The
        token `first`, if any, stands before the entries and has no values: a prompt's first token is given.
        """
        tokens: list[str] = []
        offsets: list[int] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        if first is not None:
            tokens.append(self._text(first))
            offsets.append(offset)
            values.append(None)
            tops.append(None)
            offset += len(tokens[0])
        for entry in entries:
            token = self._text(entry.token_id)
            tokens.append(token)
            offsets.append(offset)
            values.append(max(entry.logprob, _FLOOR))
            offset += len(token)
            top = {token: max(entry.logprob, _FLOOR)}
            for token_id, logprob in entry.top[: self._top]:
                top.setdefault(self._text(token_id), max(logprob, _FLOOR))
            tops.append(top)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}, offset

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The chat shape: each token's text, UTF-8 bytes and most likely alternatives."""
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(*alternative) for alternative in entry.top[: self._top]],
            }
            for entry in entries
        ]
        return {"content": content}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._text(token_id), "logprob": max(logprob, _FLOOR), "bytes": list(raw)}

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)


def prompt_json(logprobs: PromptLogprobs, tokenizer: Tokenizer) -> str:
    """vLLM's `prompt_logprobs` as JSON text: null for the first token, then an object by token id for each token.

    The text is written directly, because a dictionary for each of a million values would take 400 MB.
    """
    texts: dict[int, str] = {}

    def entry(token_id: int, logprob: float, rank: int) -> str:
        if token_id not in texts:
            texts[token_id] = quote(tokenizer.token_text(token_id))
        value = max(logprob, _FLOOR)
        return f'"{token_id}":{{"logprob":{value!r},"rank":{rank},"decoded_token":{texts[token_id]}}}'

    rows = ["null"]
    for row in logprobs:
        entries = [entry(row.token_id, row.logprob, row.rank)]
        for rank, (token_id, logprob) in enumerate(row.top, start=1):
            if token_id != row.token_id:
                entries.append(entry(token_id, logprob, rank))
        rows.append("{" + ",".join(entries) + "}")
    return f"[{','.join(rows)}]"
