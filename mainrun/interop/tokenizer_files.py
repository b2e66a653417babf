"""Write the tokenizer of a run as the files that `transformers` and `sentencepiece` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mainrun.data.tokenizer import EOS, PAD, SPECIALS, UNK, Tokenizer
from mainrun.store.rundir import to_json

# The class that uses tokenizer.json as it is. Without it, transformers would choose the class of Qwen2, which
# replaces the normaliser and the pre-tokenizer.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def write_tokenizer(tokenizer: Tokenizer, block_size: int, folder: Path) -> None:
    """Write the files of a tokenizer to a folder."""
    if tokenizer.kind == "unigram":
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        return
    (folder / "tokenizer.json").write_bytes(tokenizer.model)
    config: dict[str, Any] = {
        "tokenizer_class": TOKENIZER_CLASS,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a special token inside a text is text
        **_special_tokens(tokenizer),
    }
    (folder / "tokenizer_config.json").write_text(to_json(config), encoding="utf-8")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the special tokens, as far as the vocabulary has a text for them."""
    if tokenizer.kind == "bpe":
        eos = SPECIALS[EOS]
        return {"bos_token": eos, "eos_token": eos, "pad_token": SPECIALS[PAD], "unk_token": SPECIALS[UNK]}
    texts = _texts_of(json.loads(tokenizer.model))
    eos = texts[file_id(tokenizer, EOS)]
    return {"eos_token": eos, "pad_token": texts.get(file_id(tokenizer, PAD), eos)}


def _texts_of(table: dict[str, Any]) -> dict[int, str]:
    """Return the text of each token of a tokenizer.json."""
    texts = {number: text for text, number in table["model"]["vocab"].items()}
    for token in table.get("added_tokens") or []:
        texts[token["id"]] = token["content"]
    return texts


def file_id(tokenizer: Tokenizer, token: int) -> int:
    """Return the id of a token in the exported files, which differs only for a foreign vocabulary."""
    order = file_order(tokenizer)
    if order is None:
        return token
    return int(order.tolist().index(token))


def file_order(tokenizer: Tokenizer) -> Any:
    """Return an array with the run's id for each id of the exported files, or None if the ids are equal."""
    if tokenizer.kind != "hf":
        return None
    raise NotImplementedError
