"""The optimisers that a config may name, and the state that each keeps. To add one, see docs/extending.md."""

from __future__ import annotations

from typing import NamedTuple


class OptimizerSpec(NamedTuple):
    """What is known about an optimiser without torch."""

    # Tensors that it keeps per parameter, and the power of the gradient that each grows with.
    # Growth scales them with the gradient; --dry-run counts their bytes.
    state: dict[str, int]
    # The optimiser of everything but the matrices inside blocks; "" if it takes all parameters itself.
    others: str = ""


OPTIMIZERS = {
    "sgd": OptimizerSpec({"momentum_buffer": 1}),
    "adamw": OptimizerSpec({"exp_avg": 1, "exp_avg_sq": 2}),
    "muon": OptimizerSpec({"momentum_buffer": 1}, others="adamw"),
}


def state_powers() -> dict[str, int]:
    """Return the state tensors of all optimisers, with the power of the gradient that each grows with."""
    powers: dict[str, int] = {}
    for spec in OPTIMIZERS.values():
        powers |= spec.state
    return powers


def state_tensors(optimizer: str, momentum: float) -> int:
    """Return how many state tensors an optimiser keeps per parameter. SGD without momentum keeps none."""
    if optimizer == "sgd" and not momentum:
        return 0
    return len(OPTIMIZERS[optimizer].state)
