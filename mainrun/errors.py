"""Every error a user can meet, and the exit code it ends with.

    MainrunError            1   something failed
    ├── UsageError          2   the request cannot be met as written: got, allowed, fix
    │   ├── ConfigError         a field, a preset, sizes that do not fit together
    │   ├── CorpusError         missing, empty, binary or too small a corpus
    │   ├── HubError            a download that failed, or a damaged one
    │   └── RunError            a run directory that mainrun did not make, is locked or cannot be written
    ├── Diverged            3   the loss is not a number any more
    └── Interrupted        75   stopped between two steps; start the same command again to go on
        └── DiskFull            nothing half-written; free some space and start again

A message says what was given, what is allowed and how to fix it. An error of the operating system that names a path is turned into
one of these (inputs.refusal). Everything else is a bug of ours and exits with 1.
"""

import difflib
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

LONGEST_GUESS = 100  # characters of a name that may be misspelt


def nearest(got: str, allowed: Iterable[str]) -> str:
    """A suggestion such as " (did you mean 'lr'?)", or an empty text. Case does not count, nor does the -- of an option."""
    if len(got) > LONGEST_GUESS:  # comparing takes the product of both lengths
        return ""
    plain = {name.lower().lstrip("-"): name for name in allowed}
    match = difflib.get_close_matches(got.lower().lstrip("-"), plain, n=1, cutoff=0.6)
    return f" (did you mean {plain[match[0]]!r}?)" if match else ""


def plain_warnings() -> None:
    """Print every warning, ours or a library's, as one line."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(message))
        print(f"warning: {text}", file=sys.stderr, flush=True)

    warnings.showwarning = show


class MainrunError(Exception):
    exit_code = 1


class UsageError(MainrunError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class CorpusError(UsageError):
    pass


class HubError(UsageError):
    pass


class RunError(UsageError):
    pass


class Diverged(MainrunError):
    exit_code = 3


class Interrupted(MainrunError):
    exit_code = 75


class DiskFull(Interrupted):
    pass
