"""The facts about routed blocks that mainrun needs before torch is imported. See mainrun/core/routing.py."""

from __future__ import annotations

import math

# the letters of `block_pattern`
LETTERS = {"D": "dense", "M": "Mixture-of-Depths", "S": "surprise pairs", "T": "temporal surprise"}

# the scheduled values of routed blocks, with the letters of the blocks that use each value
INPUTS = {
    "capacity": "MST",
    "sharpness": "ST",
    "prior_loss": "ST",
    "student_loss": "MST",
    "router_loss": "M",
    "router_z_loss": "M",
    "lr_router": "MST",
    "lr_prior": "ST",
    "lr_student": "MST",
}

# the losses of routers, with the letters of the blocks that have each loss
LOSSES = {"prior": "ST", "student": "MST", "router": "M", "z": "M"}

# the statistics of a router, each of which is a mean over the tokens of a batch
STATS = ("g", "selected", "student_accuracy", "score", "S_CE", "S_CU", "D_st", "D_ch")


def selected_tokens(capacity: float, tokens: int) -> int:
    """Return the number of tokens that a routed block selects from a row of `tokens` tokens."""
    # without 1e-9, rounding would make 0.29 * 100 smaller than 29
    return max(1, math.floor(capacity * tokens + 1e-9))
