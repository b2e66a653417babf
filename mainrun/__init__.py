"""Train small language models under a fixed budget, reproducible to the bit.

    import mainrun

    run = mainrun.train("optimized", corpus="file:titles.txt", num_titles=20_000, seed=1)
    run.summary["last"]["full"]
    run.metrics  # a pandas DataFrame

`__all__` lists the public names, and docs/python-api.md explains them. Each name is imported on first use, so
that `import mainrun` is fast. The types of the names are in __init__.pyi.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "CorpusError",
    "Diverged",
    "Interrupted",
    "MainrunError",
    "Run",
    "RunError",
    "Study",
    "TrainConfig",
    "UsageError",
    "__version__",
    "compare",
    "from_dict",
    "load",
    "report",
    "run",
    "runs",
    "study",
    "sweep",
    "train",
]

_MODULES = {
    "ConfigError": "mainrun.errors",
    "CorpusError": "mainrun.errors",
    "Diverged": "mainrun.errors",
    "Interrupted": "mainrun.errors",
    "MainrunError": "mainrun.errors",
    "RunError": "mainrun.errors",
    "UsageError": "mainrun.errors",
    "TrainConfig": "mainrun.config",
    "from_dict": "mainrun.config",
    "load": "mainrun.plan.recipes",
    "Run": "mainrun.api.runs",
    "compare": "mainrun.api.runs",
    "runs": "mainrun.api.runs",
    "Study": "mainrun.api.studies",
    "study": "mainrun.api.studies",
    "sweep": "mainrun.api.studies",
    "report": "mainrun.api.documents",
}
# Two public functions have the names of a module and a package. Each module calls the function that has its
# name, so that `mainrun.train("demo:optimized")` and `from mainrun.train import Model` both work.
_CALLABLE = {"train": "mainrun.api.training", "run": "mainrun.api.runs"}


class _CallableModule(ModuleType):
    @property
    def _function(self) -> Callable[..., object]:
        name = self.__name__.rpartition(".")[2]
        function: Callable[..., object] = getattr(import_module(_CALLABLE[name]), name)
        return function

    @property
    def __signature__(self) -> object:
        import inspect

        return inspect.signature(self._function)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._function(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Make a module callable when the import system binds it to its name."""
        if name in _CALLABLE and type(value) is ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in _CALLABLE:
        if name == "train":  # the memory allocator must be tuned before the module imports torch
            from mainrun.core.hardware import tune_allocator

            tune_allocator()
        return import_module(f"mainrun.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'mainrun' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
