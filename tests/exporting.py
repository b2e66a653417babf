"""Helpers for the tests of exported models: small runs that a Qwen2 checkpoint can express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TINY
from torch import Tensor

from mainrun.config import TrainConfig, from_dict
from mainrun.data import synthetic
from mainrun.run.session import train
from mainrun.store.rundir import RunDir

# the fields that every Qwen2 model has, and a few steps of training
QWEN: dict[str, Any] = TINY | {
    "norm": "rmsnorm", "position": "rope", "rope_theta": 1000.0, "mlp": "swiglu", "bias": False,
    "qkv_bias": True, "d_ff": 48, "optimizer": "adamw", "lr": 0.02, "max_steps": 4,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return from_dict(QWEN | changes)


def trained(out: Path, **changes: Any) -> RunDir:
    """Train a run in the folder `out`."""
    cfg = config(**changes)
    train(cfg, out)
    return RunDir(out / cfg.run_id)


def some_ids(vocab_size: int, length: int = 16) -> Tensor:
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(0))


BASE_SIZE = 344  # rows of the embedding of a base, some of which have no token


def make_base(folder: Path, tied: bool = True) -> Path:
    """Write a random Qwen2 checkpoint with transformers, and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=BASE_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():  # biases are zero and norms are one in a new model
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    library.train_from_iterator(synthetic.titles(300), trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    library.save(str(folder / "tokenizer.json"))
    return folder


def from_base(base: Path, **changes: Any) -> dict[str, Any]:
    """Return the config changes of a run that starts from a base."""
    start = {"start": f"hf:{base}", "tokenizer": f"hf:{base}", "vocab_size": BASE_SIZE, "n_kv_head": 1}
    return start | changes
