"""Train small language models under a fixed budget, reproducible to the bit.

`__all__` lists the public names. Each name is imported on first use, so that `import mainrun` is fast.
To train from Python, use `mainrun.run.session.train`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mainrun.config import TrainConfig, from_dict
    from mainrun.errors import Diverged, Interrupted, MainrunError, UsageError
    from mainrun.plan.recipes import load

__version__ = "0.1.0"

__all__ = [
    "Diverged",
    "Interrupted",
    "MainrunError",
    "TrainConfig",
    "UsageError",
    "__version__",
    "from_dict",
    "load",
]

_MODULES = {
    "TrainConfig": "mainrun.config",
    "from_dict": "mainrun.config",
    "load": "mainrun.plan.recipes",
    "Diverged": "mainrun.errors",
    "Interrupted": "mainrun.errors",
    "MainrunError": "mainrun.errors",
    "UsageError": "mainrun.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mainrun' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
