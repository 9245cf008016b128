"""The byte-level BPE tokenizer of the example, trained on the task's own sentences, and its chat template."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from personal_memory import task

PAD, BOS, EOS = 0, 1, 2
VOCAB_SIZE = 952  # the task's sentences allow no more merges
# Equal to task.prompt() with <s> before it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant:\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


def build() -> Tokenizer:
    """A tokenizer for any text; each word of the task is one token. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _sentences(),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[AddedToken(token, special=True) for token in ("<pad>", "<s>", "</s>")],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _sentences() -> list[str]:
    lines = [*task.SMALL_TALK, *task.SMALL_TALK.values()]
    for (topic, values), question in itertools.product(task.TOPICS.items(), task.QUESTIONS + task.HELD_OUT_QUESTIONS):
        for value in values:
            lines += [*task.styles(question.format(topic=topic)), task.answer(topic, value)]
            lines += [task.prompt("", profile={topic: value})]
        lines += [task.answer(topic, None)]
    return lines
