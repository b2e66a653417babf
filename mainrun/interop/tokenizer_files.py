"""Write the tokenizer of a run as the files that `transformers` and `sentencepiece` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.data.tokenizer import EOS, PAD, SPECIALS, UNK, Tokenizer
from mainrun.store.rundir import to_json

if TYPE_CHECKING:
    import numpy as np

# The class that uses the exported file as it is.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# For a Qwen2 model, AutoTokenizer of transformers 5 ignores tokenizer_class and chooses Qwen2Tokenizer, which
# replaces the normaliser and the pre-tokenizer. An entry in auto_map turns this choice off. transformers
# knows the class, so it loads no code for the entry unless the caller sets trust_remote_code.
AUTO_MAP = {"AutoTokenizer": [None, TOKENIZER_CLASS]}


def write_tokenizer(tokenizer: Tokenizer, block_size: int, folder: Path) -> None:
    """Write the files of a tokenizer to a folder."""
    name = "tokenizer.model" if tokenizer.kind == "unigram" else "tokenizer.json"
    (folder / name).write_bytes(tokenizer.model)
    config: dict[str, Any] = {
        "tokenizer_class": TOKENIZER_CLASS,
        "auto_map": AUTO_MAP,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.kind == "hf":
        config |= _special_tokens(tokenizer)
    else:
        eos = SPECIALS[EOS]
        config |= {"bos_token": eos, "eos_token": eos, "pad_token": SPECIALS[PAD], "unk_token": SPECIALS[UNK]}
        config["split_special_tokens"] = True  # a special token inside a text is text
    (folder / "tokenizer_config.json").write_text(to_json(config), encoding="utf-8")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the special tokens of a foreign vocabulary, in which <pad> may have no text."""
    table = json.loads(tokenizer.model)
    texts = {number: text for text, number in table["model"]["vocab"].items()}
    for token in table.get("added_tokens") or []:
        texts[token["id"]] = token["content"]
    eos = texts[tokenizer.special_ids[EOS]]
    return {"eos_token": eos, "pad_token": texts.get(tokenizer.special_ids[PAD], eos)}


def file_order(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return an array with the run's id for each id of the exported files, or None if the ids are equal."""
    if tokenizer.kind != "hf":
        return None
    from mainrun.data.foreign import permutation

    return permutation(tokenizer.special_ids, tokenizer.vocab_size)[1]
