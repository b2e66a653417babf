"""Small Qwen2 checkpoints that `transformers` writes, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ROWS = 320
MERGES = [("t", "h"), ("Ġ", "a"), ("i", "n"), ("th", "e"), ("e", "r"), ("o", "n"), ("Ġ", "s"), ("r", "e")]
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
# the fields of a run that trains in a second on such a checkpoint
TRAINED = {
    "num_titles": 120,
    "block_size": 16,
    "batch_size": 8,
    "epochs": 1,
    "threads": 1,
    "device": "cpu",
    "dtype": "float32",
    "eval_per_epoch": 1,
    "checkpoint_every": 5,
}


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer.json whose token <|endoftext|> follows the learned tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in MERGES:
        vocabulary[a + b] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 0, **changes: Any
) -> Path:
    """Write a checkpoint with random weights. No bias and no gain has its usual value of 0 or 1."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def edit_config(folder: Path, *removed: str, **changes: Any) -> None:
    """Change and remove keys of config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    for key in removed:
        del config[key]
    path.write_text(json.dumps(config))
