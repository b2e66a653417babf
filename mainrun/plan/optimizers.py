"""The optimisers that a config may name, and their state. docs/extending.md says how to add an optimiser."""

from __future__ import annotations

from typing import NamedTuple


class OptimizerSpec(NamedTuple):
    """The properties of an optimiser that are needed without torch."""

    # The state tensors per parameter. Each is proportional to the given power of the gradient.
    # Growth scales the tensors when it scales the gradient, and --dry-run counts their bytes.
    state: dict[str, int]
    # The optimiser of all parameters except matrices inside blocks; "" if no other optimiser is used.
    others: str = ""


OPTIMIZERS = {
    "sgd": OptimizerSpec({"momentum_buffer": 1}),
    "adamw": OptimizerSpec({"exp_avg": 1, "exp_avg_sq": 2}),
    "muon": OptimizerSpec({"momentum_buffer": 1}, others="adamw"),
}


def state_powers() -> dict[str, int]:
    """Return the state tensors of all optimisers. Each is proportional to the returned gradient power."""
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
