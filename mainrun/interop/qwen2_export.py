"""Write the model of a run as a Qwen2 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mainrun.core.parameters import is_base
from mainrun.data.tokenizer import EOS, PAD
from mainrun.errors import UsageError
from mainrun.interop.card import checkpoint_card
from mainrun.interop.names import checkpoint_name
from mainrun.interop.routing_files import write_routing
from mainrun.interop.source import ExportedModel
from mainrun.interop.tokenizer_files import file_order, write_tokenizer
from mainrun.store.rundir import to_json
from mainrun.train import Model

RMS_NORM_EPS = 1e-6  # the epsilon of RMSNorm in mainrun and in Qwen2
SHARD = "5GB"  # the largest size of a file of weights
ROWS = ("embed.weight", "head.weight")  # the tensors with a row for each token


def write_checkpoint(source: ExportedModel, folder: Path) -> None:
    """Write a Qwen2 checkpoint: config.json, the weights, the tokenizer, the routers and README.md."""
    from huggingface_hub import save_torch_state_dict

    (folder / "config.json").write_text(to_json(checkpoint_config(source)), encoding="utf-8")
    tensors = checkpoint_tensors(source)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(source.dtype)
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD)
    write_tokenizer(source.tokenizer, source.cfg.block_size, folder)
    write_routing(source.model, folder)
    (folder / "README.md").write_text(checkpoint_card(source), encoding="utf-8")


def checkpoint_tensors(source: ExportedModel, merge: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a Qwen2 checkpoint.

    Routers are left out. Low-rank terms are added to the weights that they belong to, or left out without
    `merge`. The rows of the embedding and of the head have the order of the exported tokenizer.
    """
    order = file_order(source.tokenizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter in source.model.named_parameters():
        if not is_base(name):
            continue
        target = checkpoint_name(name)
        if not target:
            raise UsageError(f"a Qwen2 checkpoint has no tensor for {name}; this model cannot be exported")
        tensor = merged_weight(source.model, name) if merge else parameter.detach()
        if order is not None and name in ROWS:
            tensor = tensor[order]
        tensors[target] = tensor
    return tensors


@torch.no_grad()
def merged_weight(model: Model, name: str) -> Tensor:
    """Return a parameter of the model, with its low-rank term added if it has one."""
    part, _, kind = name.rpartition(".")
    module: Any = model.get_submodule(part)
    if kind == "weight" and hasattr(module, "lora_a"):
        return module.effective_weight()
    return getattr(module, kind).detach()


def checkpoint_config(source: ExportedModel) -> dict[str, Any]:
    """Return the content of config.json, for transformers 4 and transformers 5."""
    cfg = source.cfg
    dtype = str(source.dtype).removeprefix("torch.")
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "dtype": dtype,
        "eos_token_id": source.tokenizer.special_ids[EOS],
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.ff_width,
        "max_position_embeddings": cfg.block_size,
        "max_window_layers": cfg.n_layer,
        "model_type": "qwen2",
        "num_attention_heads": cfg.n_head,
        "num_hidden_layers": cfg.n_layer,
        "num_key_value_heads": cfg.kv_heads,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},
        "rope_theta": cfg.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": cfg.tie_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": source.model.embed.num_embeddings,
    }
    if cfg.head_dim:
        config["head_dim"] = cfg.head_dim
    # with one of mainrun's own vocabularies, each text begins after <eos>
    config["bos_token_id"] = config["eos_token_id"]
    if source.tokenizer.kind != "hf":
        config["pad_token_id"] = PAD
    return dict(sorted(config.items()))
