"""Every error that a user can meet, and the exit code of the command that raises it.

    MainrunError            1   something failed
    ├── UsageError          2   the request is invalid: what was got, what is allowed, how to fix it
    │   ├── ConfigError         a field, a preset, or sizes that do not fit together
    │   ├── CorpusError         a corpus that is missing, empty, binary or too small
    │   ├── HubError            a download that failed or is damaged
    │   └── RunError            a run directory that is foreign, locked, damaged or not writable
    ├── Diverged            3   the loss is NaN or infinite
    └── Interrupted        75   stopped between two steps; run the same command again to resume
        └── DiskFull            no file is half-written; free some space and run the same command again

`mainrun.files.inputs.refusal` turns an OSError that names a path into one of these. Any other exception is a
bug in mainrun; the command exits with 1.
"""

import difflib
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

LONGEST_GUESS = 100  # characters; a longer name gets no suggestion


def nearest(got: str, allowed: Iterable[str]) -> str:
    """Return a suggestion such as " (did you mean 'lr'?)", or an empty text. Case and dashes do not count."""
    if len(got) > LONGEST_GUESS:  # the comparison takes time proportional to the product of both lengths
        return ""
    plain = {name.lower().lstrip("-"): name for name in allowed}
    matches = difflib.get_close_matches(got.lower().lstrip("-"), plain, n=1, cutoff=0.6)
    if not matches:
        return ""
    return f" (did you mean {plain[matches[0]]!r}?)"


def plain_warnings() -> None:
    """Print every warning of mainrun and its libraries as one line on stderr."""

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
