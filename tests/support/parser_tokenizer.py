"""A model folder whose tokenizer has the marks of several model families' tool calls and reasoning as tokens."""

# ruff: noqa: RUF001 (DeepSeek's marks have wide bars)

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|eos|>", "[TOOL_CALLS]", "<|python_tag|>")
MARKS = (  # added, but not special, in Qwen's and DeepSeek's tokenizers
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.id }}] {{ call.function.name }}"
    "({{ call.function.arguments | tojson }}){% endfor %}"
    "{% if m.tool_call_id is defined %}[{{ m.tool_call_id }}]{% endif %}\n{% endfor %}"
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_TEXT = [
    'the weather in Paris {"city": "Paris", "days": 3} get_weather "arguments": "name": "parameters":',
    "let me think about it, hello world [get_weather(city='Paris', days=3)] <function=get_weather> <parameter=city>",
]


def parser_model(folder: Path, marks: tuple[str, ...] = MARKS) -> Path:
    """Writes the folder and returns it. The end of sequence has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    sizes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder
