"""The demo checkpoint's tokenizer: byte-level BPE with Qwen2's special tokens, built from the words below.

Nothing is trained. Every word becomes one token through a chain of merges (" m", " mo", " mov", ...), so the
vocabulary is the same everywhere; any other text falls apart into pieces of words and bytes, and comes back exactly.
"""

from __future__ import annotations

import json
from typing import Any

WORDS = """
a about after again all along an and animal around at background ball beach behind before begins between big bird black
blue boat bright brown building by camera car cat child clear close cloud cold color cook dance dark dog door down early
enters falls far fast field first flowers follows food forest frame from game garden girl goes grass green ground hand
has he her high holds horse house in inside into is it jumps kitchen lake large leaves left light long looks man many
mountain moves music near next night no of off on one open orange over park passes people person picks plays purple rain
red rides right river road room round runs sand scene sea second shows side sings sits sky slowly small snow someone
something space square stands starts stops street sun swims table talks tall tall then there they through to together
towards train tree turns two under up video walks wall water waves white wide wind window with woman yellow yes young
an are assistant bottom change circle comes cross diamond everything flashes four heart helpful how last left colour
does happens moves ring shape shapes this star stays thing things three top triangle turn twice way what where which why
moment
"""
# What stands at the start of a line, without a space before it: roles of the chat template, questions, answers.
STARTS = """
system user assistant You What Which Where How Is Who Why When A An The
One Two Three Four Red Green Blue Yellow Purple Orange White Black Circle Square Triangle Star Ring Cross Diamond Heart
Top Bottom Left Right Up Down Yes No
"""
PUNCTUATION = ".,:?!"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")  # ids follow those of all other tokens
EOS, PAD = "<|im_end|>", "<|endoftext|>"

# Qwen2's pre-tokenisation: contractions, words with the space before them, single digits, punctuation, blank.
# Source: tokenizer.json of the published Qwen2 models.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML. Content is a string, or transformers' list of {"type": "text" | "image" | "video"} items.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}{% else %}<{{ item['type'] }}>\n{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges by rank) without the special tokens; bytes come first, in the order of their characters."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    spaced = ("Ġ" + word for word in WORDS.split())  # Ġ is a space, as byte-level BPE writes it
    for word in dict.fromkeys([*spaced, *STARTS.split()]):
        token = word[0]
        for letter in word[1:]:
            longer = token + letter
            if longer not in tokens:
                tokens[longer] = len(tokens)
                merges.append((token, letter))
            token = longer
    return tokens, merges


def special_ids() -> dict[str, int]:
    """Special token -> id."""
    first = len(vocabulary()[0])
    return {token: first + i for i, token in enumerate(SPECIAL)}


def size() -> int:
    """Number of tokens, special ones included."""
    return len(vocabulary()[0]) + len(SPECIAL)


def readable_ids() -> list[int]:
    """Ids of the tokens that are whole words or punctuation: what the demo prefers to say."""
    tokens, _ = vocabulary()
    return sorted(tokens[token] for token in [*("Ġ" + word for word in set(WORDS.split())), *PUNCTUATION])


def tokenizer_files() -> dict[str, str]:
    """File name -> content of tokenizer.json and tokenizer_config.json, as a published Qwen2 checkpoint has them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": PAD,
        "unk_token": None,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def make_tokenizer() -> Any:
    """The tokenizer itself, transformers' fast one, without a file and without the chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(tokenizer_files()["tokenizer.json"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
