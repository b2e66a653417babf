"""The optimisers that a config can select. docs/extending.md explains how to add an optimiser."""

from __future__ import annotations

from typing import NamedTuple


class OptimizerSpec(NamedTuple):
    """The properties of an optimiser that mainrun needs before torch is imported."""

    # The names of the state tensors of a parameter. Each name is mapped to a power: the tensor is
    # proportional to this power of the gradient. Growth scales the tensors together with the gradient.
    state: dict[str, int]
    # The name of a second optimiser for all parameters except the matrices inside blocks; "" for none.
    others: str = ""


OPTIMIZERS = {
    "sgd": OptimizerSpec({"momentum_buffer": 1}),
    "adamw": OptimizerSpec({"exp_avg": 1, "exp_avg_sq": 2}),
    "muon": OptimizerSpec({"momentum_buffer": 1}, others="adamw"),
}


def state_powers() -> dict[str, int]:
    """Return the names of all state tensors. Each name is mapped to a power of the gradient."""
    powers: dict[str, int] = {}
    for spec in OPTIMIZERS.values():
        for name, power in spec.state.items():
            if powers.setdefault(name, power) != power:
                raise ValueError(
                    f"two rows of OPTIMIZERS give {name!r} different powers; rename one of the tensors"
                )
    return powers


def state_tensors(optimizer: str, momentum: float) -> int:
    """Return the number of state tensors per parameter. SGD without momentum has no state tensors."""
    if optimizer == "sgd" and not momentum:
        return 0
    return len(OPTIMIZERS[optimizer].state)
