"""Train a run from its last checkpoint, or from step 0, until the run is done or stopped.

For example:

    from mainrun.run.session import train
    summary = train(cfg, Path("runs"))
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.core.pending_losses import NotFinite, StepRow, advice
from mainrun.data.batches import Batches
from mainrun.errors import Diverged, Interrupted, MainrunError
from mainrun.growth.make import make_controller
from mainrun.growth.state import Controller
from mainrun.plan.cost import SAVE_MEMORY, state_bytes
from mainrun.plan.ops import ARCHITECTURE
from mainrun.plan.plan import Plan
from mainrun.run.accounts import Accounts
from mainrun.run.log import NullLog, RunLog
from mainrun.run.progress import QUIET, Progress, short
from mainrun.run.resume import environment, follow_leader, resume
from mainrun.run.sharing import NoSharing, Sharing
from mainrun.run.slow_steps import SlowSteps
from mainrun.run.stop import StopSignal
from mainrun.run.summary import finish, summarize
from mainrun.store import checkpoint
from mainrun.store.nodes import Store
from mainrun.store.rundir import RunDir, check_same_data, check_writable, open_run, write_text
from mainrun.train import Due, Setup, State, loop, score, set_up

Row = dict[str, Any]
STATUS = {Interrupted.exit_code: "interrupted", Diverged.exit_code: "diverged"}


def train(
    cfg: TrainConfig,
    out: Path,
    *,
    fresh: bool = False,
    progress: Progress = QUIET,
    store: Store | None = None,
    keep: Iterable[int] = (),
    until: int = 0,
) -> Row:
    """Train the run of a config to the end, and return the summary of the run.

    Training continues from the last checkpoint of the run, and reuses steps from the store.

    keep: additional steps after which the state is saved in the store.

    until: the step after which to stop. The value 0 means the end of the run.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())  # catch signals even while data is prepared
        started = time.perf_counter()
        check_writable(Path(out))  # report a read-only folder before the data is read, which may take long
        setup = set_up(cfg)
        data_seconds = time.perf_counter() - started
        run_dir = open_run_directory(setup, Path(out), fresh)
        stack.callback(run_dir.release)
        summary = run_dir.summary()
        if summary:
            return summary
        accounts = Accounts()
        accounts.add("data", data_seconds)
        if not setup.device.leads:
            progress = QUIET
        warn_about_memory(setup, progress.note)
        state = setup.start()
        sharing: Sharing | NoSharing = NoSharing()
        if store and setup.device.sharded:
            progress.note("a sharded run neither reads from the store nor writes to it")
        elif store:
            sharing = make_sharing(setup, store, accounts, progress.note, keep, until, fresh)
        session = start_session(setup, run_dir, state, accounts, progress, sharing, stop, until)
        earlier = sum(accounts.spent.values()) - data_seconds
        with ending(run_dir, session):
            session.train()
        if not setup.device.takes_part:
            return {}
        if cfg.token_scores:
            from mainrun.run.token_scores import write_token_scores

            with accounts.clock("evaluation"):
                write_token_scores(setup, session.plan, run_dir, state)
        with state.average.applied(), accounts.clock("guards"):
            env = session.env if setup.device.leads else run_dir.env()
            summary = summarize(setup, session.plan, run_dir, state, accounts, env)
        if not setup.device.leads:
            return {}
        unaccounted = earlier + time.perf_counter() - started - sum(accounts.spent.values())
        accounts.add("overhead", unaccounted)
        return finish(run_dir, state, session.plan, accounts, summary)


# -- the parts of a session


def warn_about_memory(setup: Setup, note: Callable[[str], None]) -> None:
    """Tell the user if the device cannot hold the model. The activations need further memory."""
    device = setup.device
    parts = device.world if device.sharded else 1
    needed = state_bytes(setup.plan, setup.data.tokenizer.vocab_size, parts)
    if 0 < device.memory < needed:
        got = f"the weights, gradients and optimizer state need {short(needed)}B"
        note(f"{got}, but a process has only {short(device.memory)}B of memory; {SAVE_MEMORY}")


def open_run_directory(setup: Setup, out: Path, fresh: bool) -> RunDir:
    """Open the run directory, and check that the data has not changed since the run began."""
    with setup.device.leader_first():  # other processes wait until the directory is ready
        run_dir = open_run(out, setup.cfg, fresh) if setup.device.leads else RunDir(out / setup.cfg.run_id)
    try:
        check_same_data(run_dir, titles(setup))
    except BaseException:
        run_dir.release()
        raise
    return run_dir


def titles(setup: Setup) -> Row:
    """Return the hashes that identify the titles, the tokenizer and the weights that the run starts from."""
    recorded = {"fingerprints": setup.corpus.fingerprints, "tokenizer": setup.data.tokenizer.digest}
    if setup.start_digest:
        recorded["start"] = setup.start_digest
    return recorded


def write_beginning(setup: Setup, run_dir: RunDir) -> None:
    """Write the files that must exist before training: config.json and tokenizer.json."""
    cfg = setup.cfg
    table = {"config": cfg.model_dump(), "digest": cfg.digest, "plan": setup.plan.table(), **titles(setup)}
    # write the config first, because a folder without a config is not recognised as a run
    run_dir.write("config.json", table)
    write_text(run_dir.path / "tokenizer.json", setup.data.tokenizer.to_json())


def make_sharing(
    setup: Setup,
    store: Store,
    accounts: Accounts,
    note: Callable[[str], None],
    keep: Iterable[int],
    until: int,
    fresh: bool,
) -> Sharing:
    fingerprints = setup.corpus.fingerprints
    tokens = setup.data.digest
    return Sharing(
        store,
        setup.cfg,
        setup.plan,
        setup.device,
        fingerprints,
        tokens,
        note,
        accounts,
        keep,
        until,
        fresh,
        setup.start_digest,
    )


def start_session(
    setup: Setup,
    run_dir: RunDir,
    state: State,
    accounts: Accounts,
    progress: Progress,
    sharing: Sharing | NoSharing,
    stop: StopSignal,
    until: int,
) -> Session:
    """Start a session from the last checkpoint of the run, or from step 0 if there is no checkpoint."""
    cfg = setup.cfg
    device = setup.device
    journal = None
    if device.leads:
        write_beginning(setup, run_dir)
        if cfg.growth.ops:
            journal = run_dir.log("growth.jsonl")
    growth = make_controller(cfg, setup.plan, device, state, journal, sharing.add_row, accounts.clock)
    env = environment(device)
    log: RunLog | NullLog = NullLog()
    if device.leads:
        log = RunLog(run_dir, progress)
        resume(cfg, run_dir, state, accounts, env, log, sharing, growth)
    if device.world > 1:
        follow_leader(run_dir, state, accounts, device, growth)
    progress.start(cfg, growth.plan.table(), run_dir.metrics())
    if cfg.start:
        progress.note(f"the run starts from the weights of {cfg.start} ({setup.start_digest[:12]})")
    if device.note:
        progress.note(device.note)
    return Session(setup, run_dir, state, accounts, env, log, progress, sharing, growth, stop, until)


@contextmanager
def ending(run_dir: RunDir, session: Session) -> Iterator[None]:
    """Close a session when it ends. If the session fails, write the reason to status.json."""
    try:
        yield
    except BaseException as e:
        if session.device.leads:
            state = STATUS.get(getattr(e, "exit_code", 1), "failed")
            status = {"state": state, "step": session.state.step, "steps": session.plan.steps}
            with suppress(MainrunError):  # an error from this write must not hide `e`
                run_dir.write("status.json", {**status, "why": str(e) or type(e).__name__})
        raise
    finally:
        session.close()


# -- the session itself


class Session:
    """A run that the training loop executes, with checkpoints, the store, growth and signal handling."""

    def __init__(
        self,
        setup: Setup,
        run_dir: RunDir,
        state: State,
        accounts: Accounts,
        env: Row,
        log: RunLog | NullLog,
        progress: Progress,
        sharing: Sharing | NoSharing,
        growth: Controller,
        stop: StopSignal,
        until: int,
    ) -> None:
        self.setup = setup
        self.cfg = setup.cfg
        self.device = setup.device
        self.run_dir = run_dir
        self.state = state
        self.accounts = accounts
        self.env = env  # the contents of env.json
        self.run_log = log
        self.progress = progress
        self.sharing = sharing
        self.growth = growth
        self.stop = stop
        self.until = until
        self.batches = Batches(setup.cfg, setup.data.splits["train"])
        self.slow_steps = SlowSteps(self.device.threads, self.device.torch_device.type)
        self._began: float | None = None  # start time of the first step that is not logged yet
        self._compiles = self.device.compile  # whether the next step compiles the model

    @property
    def plan(self) -> Plan:
        return self.growth.plan

    def train(self) -> None:
        """Train to the end of the plan."""
        try:
            loop(self, self.state, self.device)
        except NotFinite as e:
            raise self._diverged(e) from None

    def _diverged(self, e: NotFinite) -> Diverged:
        """Save the state before a NaN or infinite loss, and return an error that explains the divergence."""
        self._log_steps(e.rows)
        kept = "the last checkpoint before this step is kept"
        row = e.row
        if row.step == self.state.step + 1:  # the weights have not been updated yet
            self.state.tokens -= self.plan.segment_at(self.state.step).span * self.cfg.presentations
            self.save()
            kept = "the checkpoint before this step is kept"
        got = f"loss {row.loss} with gradient norm {row.grad_norm} at step {row.step} of {self.plan.steps}"
        return Diverged(f"{got}, lr {row.lr:g}; {advice(row)} ({kept})")

    def close(self) -> None:
        """Finish writing and close all files."""
        self.sharing.close()
        self.progress.close()
        self.run_log.close()
        self.growth.close()

    # -- what is due

    def due(self, step: int) -> Due:
        score = step in self.plan.eval_steps
        keep = self.sharing.keeps(step)
        save = step % self.plan.checkpoint_every == 0 or step == self.plan.steps
        return Due(score, keep, save)

    def stop_reason(self) -> str:
        step = self.state.step
        cause = ""
        fix = "run the same command again to resume"
        if self.until and step >= self.until:
            cause = self.stop.name or "stopped"
            fix = "to continue, run the command without --until or with a later step"
        elif self._any_process_stops():
            cause = self.stop.name or "another process stopped"
        if not cause:
            return ""
        return f"{cause} at step {step} of {self.plan.steps}; everything is saved; {fix}"

    def _any_process_stops(self) -> bool:
        # do not call `any_process` at every step, because it makes all processes wait for each other
        if self.device.world > 1 and self.state.step % self.device.read_every:
            return False
        return self.device.any_process(bool(self.stop.name))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        if self._began is None:
            self._began = time.perf_counter()
            self.slow_steps.start()
        x, y = self.batches.at(step, self.plan.segment_at(step))
        return self.device.put(x), self.device.put(y)

    # -- logging

    def log(self, rows: Sequence[StepRow]) -> None:
        self._log_steps(rows)
        for note in self.growth.look_back():
            self.run_log.note(note)

    def _log_steps(self, rows: Sequence[StepRow]) -> None:
        if not rows or self._began is None:
            return
        seconds = time.perf_counter() - self._began
        self._began = None
        self._account_steps(len(rows), seconds)
        for row in rows:
            self._log_step(row, seconds / len(rows))

    def _account_steps(self, count: int, seconds: float) -> None:
        if self._compiles:
            self._compiles = False
            self.accounts.add("compile", seconds)
            self.growth.compiled(seconds)
            return
        self.accounts.add("steps", seconds)
        warning = self.slow_steps.check(count)
        if warning:
            self.run_log.note(warning)

    def _log_step(self, step: StepRow, seconds: float) -> None:
        plan = self.plan
        row: Row = {"event": "step", "step": step.step, "tokens": plan.tokens(step.step)}
        row |= step.fields() | {"seconds": seconds}
        self.sharing.add_row(row)
        if plan.logs(step.step):
            self.run_log.step(row, plan.steps)

    def evaluate(self) -> None:
        rows = self._score()
        step = self.state.step
        finite = all(math.isfinite(row["loss"]) for row in rows)
        if self.device.any_process(not finite):
            lr = self.plan.at(step - 1).lr
            got = f"the score at step {step} of {self.plan.steps} is not finite after lr {lr:g}"
            fix = "lower lr, lr_aux or weight_decay"
            raise Diverged(f"{got}; {fix} (the last checkpoint before this step is kept)")
        for row in rows:
            self.sharing.add_row(row)
            self.run_log.eval(row, self.plan.steps)

    def _score(self) -> list[Row]:
        """Score the current weights if this process takes part. Otherwise, return an empty list."""
        if not self.device.takes_part:
            return []
        with self.accounts.clock("evaluation"):
            figures = self.growth.figures(self.state.step)
            return [row | figures for row in score(self.setup, self.plan, self.state)]

    # -- sharing and growth

    def settle(self) -> None:
        while self._settle_once():
            pass

    def _settle_once(self) -> bool:
        """Share the state, and decide about growth. Return True if this method must be called again."""
        state = self.state
        self.sharing.publish(state)
        before = state.step
        unscored = self.sharing.advance(state, self.growth, self.run_log.metrics, self.stop)
        moved = state.step != before
        if moved:
            self.growth.restore()
            self.progress.copied([row for row in self.run_log.rows() if row["step"] > before])
        if unscored:
            self.evaluate()
        self.growth.observe_scores(self.run_log.rows() if self.cfg.growth.ops else [])
        if self.growth.decide():
            self.sharing.follow(self.plan)
            return True
        return unscored or (moved and self.plan.undecided is not None)

    def grow(self, release: Callable[[], None]) -> bool:
        op = self.growth.pending_op
        if op is None:
            return False
        if op.name in ARCHITECTURE:
            release()
            self._compiles = self.device.compile
        try:
            self.growth.act(self._score)
        except MainrunError:
            self.save()
            raise
        self.sharing.follow(self.plan)
        return True

    # -- checkpoints

    def save(self) -> None:
        if self.device.takes_part and self.state.step > self.accounts.saved:
            with self.accounts.clock("checkpoints"):
                tensors = self.state.tensors()
                if self.device.leads:
                    checkpoint.save(
                        self.run_dir.checkpoints,
                        self.state.step,
                        tensors,
                        self._checkpoint_meta(),
                        self.run_dir.check,
                    )
        # all processes wait for the leader, because torchrun stops all processes when one of them ends
        self.device.any_process(False)
        self.accounts.saved = self.state.step
        self.progress.saved(self.state.step)

    def _checkpoint_meta(self) -> Row:
        metrics = self.run_log.metrics
        journal = self.growth.journal
        accounts = self.accounts
        return {
            "digest": self.cfg.digest,
            "machine_class": self.device.machine_class,
            "metrics": metrics.mark() if metrics else None,
            "resumed": accounts.resumed,
            "presented": self.state.tokens,
            "spent": accounts.spent,
            "store": self.sharing.checkpoint_meta(self.state.step),
            "ledger": accounts.ledger,
            "growth": self.state.growth_state,
            "journal": journal.mark() if journal else None,
        }
