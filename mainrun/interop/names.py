"""The names of tensors in Qwen2 checkpoints. This module does not import torch.

For example, a checkpoint contains the tensor `model.layers.3.self_attn.q_proj.weight`, which mainrun calls
`blocks.3.attn.q.weight`. The shapes are equal on both sides.
"""

from __future__ import annotations

import re

OUTSIDE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# the parts of a block, without the `.weight` or `.bias` at the end
IN_BLOCK = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
OUR_NAMES = {theirs: ours for ours, theirs in (OUTSIDE | IN_BLOCK).items()}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
THEIR_BLOCK = re.compile(r"model\.layers\.(0|[1-9]\d*)\.(.+)\.(weight|bias)")


def checkpoint_name(name: str) -> str:
    """Return the name in a checkpoint of one of our tensors, or "" if a checkpoint has no such tensor."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    match = BLOCK.fullmatch(name)
    if not match or match[2] not in IN_BLOCK:
        return ""
    return f"model.layers.{match[1]}.{IN_BLOCK[match[2]]}.{match[3]}"


def our_name(name: str) -> str:
    """Return our name of a tensor in a checkpoint, or "" if we have no such tensor."""
    if name in OUTSIDE.values():
        return OUR_NAMES[name]
    match = THEIR_BLOCK.fullmatch(name)
    if not match or match[2] not in IN_BLOCK.values():
        return ""
    return f"blocks.{match[1]}.{OUR_NAMES[match[2]]}.{match[3]}"
