"""The optimizers that a config can select. docs/extending.md explains how to add an optimizer."""

from __future__ import annotations

from typing import NamedTuple


class OptimizerSpec(NamedTuple):
    """The properties of an optimizer that mainrun needs before torch is imported."""

    # Maps the name of each state tensor to an exponent. The tensor is proportional to the gradient raised to
    # this exponent. Growth operations use the exponent to scale the tensor together with the gradient.
    state: dict[str, int]
    # The optimizer that trains all parameters except the matrices inside blocks. If the name is empty, one
    # optimizer trains all parameters.
    others: str = ""
    # Whether the optimizer updates each number of a tensor on its own. Otherwise, the optimizer needs whole
    # tensors, and a sharded run cannot use it.
    elementwise: bool = True
    # Whether the optimizer supports `cautious_decay`.
    cautious: bool = False


OPTIMIZERS = {
    "sgd": OptimizerSpec({"momentum_buffer": 1}),
    "adamw": OptimizerSpec({"exp_avg": 1, "exp_avg_sq": 2}, cautious=True),
    "muon": OptimizerSpec({"momentum_buffer": 1}, others="adamw", elementwise=False, cautious=True),
}


def state_powers() -> dict[str, int]:
    """Return a dict that maps the name of each state tensor to its exponent; see `OptimizerSpec`."""
    powers: dict[str, int] = {}
    for spec in OPTIMIZERS.values():
        for name, power in spec.state.items():
            if powers.setdefault(name, power) != power:
                raise ValueError(
                    f"two rows of OPTIMIZERS give {name!r} different exponents; rename one of the tensors"
                )
    return powers


def state_tensors(optimizer: str, momentum: float) -> int:
    """Return the number of state tensors per parameter. SGD without momentum has no state tensors."""
    if optimizer == "sgd" and not momentum:
        return 0
    return len(OPTIMIZERS[optimizer].state)
