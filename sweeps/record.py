"""Optuna's database of a study, for people and their dashboards: SQLite in the study's folder, or PostgreSQL. No Optuna until it is opened.

Nothing is read back from it but how far it was written, so a study loses nothing with it. A server that goes away is waited for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mainrun.errors import DiskFull, MainrunError, RunError, UsageError
from sweeps.study import Study, without_password

if TYPE_CHECKING:
    from sweeps.driver import Trial
    from sweeps.ledger import Ledger

LOCKED = 60.0  # seconds that another process may hold a SQLite file
OURS = {"studies", "version_info", "alembic_version"}  # of Optuna's tables


def opened(url: str, file: Path) -> Any:
    """Open Optuna's storage at a URL, or in the file if the URL is empty. Tables of other programs are refused."""
    import optuna
    from sqlalchemy import create_engine, inspect

    name = without_password(url) or str(file)
    server = url.startswith("postgresql")
    url = (
        url.replace("postgresql://", "postgresql+psycopg://", 1) or f"sqlite:///{file.absolute()}"
    )  # SQLAlchemy's own choice changes
    how: dict[str, Any] = (
        {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
        if server
        else {"connect_args": {"timeout": 1}}
    )
    try:
        engine = create_engine(url, **how)
    except ImportError as e:
        raise UsageError(
            f"{name} needs {e.name or 'a driver'}, which is not installed; pip install 'mainrun[postgres]'"
        ) from None
    try:
        inspector = inspect(engine)
        tables = set(inspector.get_table_names())
        usable = not tables or tables >= OURS or _is_unfinished(inspector, tables)
    finally:
        engine.dispose()
    if not usable:
        few = ", ".join(sorted(tables)[:4])
        raise UsageError(
            f"{name} is a database of something else (tables {few}); make a new one for studies, or give another --storage"
        )
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=how)
    except RuntimeError as e:  # Optuna's word on a schema of another version
        raise UsageError(
            f"{name} cannot be used: {' '.join(str(e).split())} Or make a new database, or give another --storage"
        ) from None


def _is_unfinished(inspector: Any, tables: set[str]) -> bool:
    """Whether Optuna was stopped while it made its tables. It makes the missing ones when it opens the database again."""
    from optuna.storages._rdb.models import BaseModel

    known = BaseModel.metadata.tables
    if not tables <= known.keys():
        return False
    return all(
        {column["name"] for column in inspector.get_columns(name)} == set(known[name].columns.keys())
        for name in tables
    )


def why(e: Exception) -> str:
    """SQLAlchemy's errors and Optuna's in a line."""
    from optuna.exceptions import StorageInternalError

    return re.sub(
        r"^\([\w.]+\) ", "", str(e.__cause__ if isinstance(e, StorageInternalError) else e).splitlines()[0]
    )


class Record:
    """A trial when it is over, in the order of their numbers, each once."""

    def __init__(self, study: Study, folder: Path, note: Callable[[str], None]) -> None:
        self.study, self.note = study, note
        self.file = folder / "study.db"
        self.name = without_password(study.storage) or str(self.file)
        self.server, self.unsure = study.storage.startswith("postgresql"), False
        self.storage, self.optuna = self._patiently(self._open, opening=True)
        self.written = self._patiently(self._count)
        known = self._patiently(lambda: self.optuna.user_attrs.get("digest"))
        if known is None and not self.written:
            self._patiently(lambda: self.optuna.set_user_attr("digest", study.digest))
        elif known != study.digest:
            raise UsageError(
                f"{self.name} holds another study called {study.name!r}; give this one another --as NAME, or another --storage"
            )

    def _open(self) -> tuple[Any, Any]:
        import optuna

        storage = opened(self.study.storage, self.file)
        return storage, optuna.create_study(study_name=self.study.name, storage=storage, load_if_exists=True)

    @property
    def _id(self) -> int:
        return int(self.storage.get_study_id_from_name(self.study.name))

    def _count(self) -> int:
        return int(self.storage.get_n_trials(self._id))

    def _patiently(self, work: Callable[[], Any], opening: bool = False) -> Any:
        """A server that goes away comes back, and a file is locked for a moment: the study waits, while its workers train on."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

        pause, began, said = 0.2, time.monotonic(), False
        while True:
            try:
                found = work()
            except (StorageInternalError, SQLAlchemyError) as e:
                cause = e.__cause__ if isinstance(e, StorageInternalError) else e
                reason = why(e)
                self.unsure = True
                away = self.server and not opening and isinstance(cause, OperationalError | InterfaceError)
                locked = "is locked" in reason and time.monotonic() - began < LOCKED
                if not away and not locked:
                    raise self._error(reason) from e
                if not said:
                    self.note(f"the storage {self.name} does not answer ({reason}); waiting for it")
                    said = True
                time.sleep(pause)
                pause = min(5.0, 2 * pause)
            except (LookupError, ValueError, AssertionError) as e:  # rows that Optuna did not write
                what = f"{self.name} holds rows that Optuna cannot read ({type(e).__name__}: {' '.join(str(e).split())[:200]})"
                raise RunError(f"{what}; restore it, or give this study another --as NAME") from e
            else:
                if said:
                    self.note("the storage answers again")
                return found

    def _error(self, said: str) -> MainrunError:
        again = "start the same command again, nothing is lost"
        if "disk is full" in said:
            return DiskFull(f"no space left to write {self.name} ({said}); free some and {again}")
        if "is locked" in said:
            return UsageError(
                f"{self.name} was locked by another process for {LOCKED:g} s; end what holds it and {again}"
            )
        return UsageError(
            f"the storage {self.name} cannot be used ({said}); mend that and {again}, or give another --storage"
        )

    def write(self, trials: Sequence[Trial], spent: Callable[[Trial], Ledger]) -> None:
        while self.written < len(trials) and (trial := trials[self.written]).over:
            self._patiently(partial(self._add, trial, spent))

    def _add(self, trial: Trial, spent: Callable[[Trial], Ledger]) -> None:
        from optuna.trial import TrialState, create_trial

        from sweeps.sampling import distribution

        if self.unsure:  # an answer that did not come: what was sent may stand there all the same
            self.written, self.unsure = self._count(), False
            if self.written > trial.number:
                return
        states = {
            "done": TrialState.COMPLETE,
            "pruned": TrialState.PRUNED,
            "diverged": TrialState.FAIL,
            "failed": TrialState.FAIL,
        }
        found = create_trial(
            state=states[trial.state],
            value=trial.scores[trial.rung] if trial.state == "done" else None,
            params=trial.values,
            distributions={name: distribution(self.study.space[name]) for name in trial.values},
            intermediate_values=dict(trial.scores),
            user_attrs={
                "number": trial.number, "why": trial.why, "run": trial.run, "ledger": asdict(spent(trial)),
            },
        )  # fmt: skip
        self.storage.create_new_trial(
            self._id, template_trial=found
        )  # Optuna's study would keep a copy in memory
        self.written += 1
