"""Share training steps between runs through the store, so that no step is trained twice.

A node is a training state in the store. At the start and after each node, a run looks for the latest stored
node among its own later steps, and continues from that node. If the store has no such node, the run takes a
lease on its next node and trains up to that node. If another run already holds the lease, the run waits until
the node is written.

Two runs that train towards different nodes may share steps up to a fork. In that case, one run trains the
shared steps while the other run waits. The waiting run requests a node at the fork by creating the file
wants/KEY, and the training run then writes the node. A background thread writes the nodes. If the store
cannot be used, the run continues without the store, and some steps may be trained twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from mainrun.config import TrainConfig, from_dict, mixture_of
from mainrun.core.device import Device
from mainrun.core.machine_class import versions
from mainrun.errors import MainrunError
from mainrun.files.inputs import NO_SPACE
from mainrun.growth.state import FIGURES, Controller, growth_state_at, load_state
from mainrun.plan.plan import Plan
from mainrun.run.accounts import Accounts
from mainrun.run.stop import StopSignal
from mainrun.store import lineage, planner
from mainrun.store.checkpoint import fit_errors
from mainrun.store.leases import Fenced, Lease, Leases
from mainrun.store.nodes import Damaged, Node, Refused, Store
from mainrun.store.rundir import RowLog
from mainrun.train import State

Row = dict[str, Any]
POLL = 0.1  # seconds between two checks of a lease
# the errors that may be raised by reading the invalid lease or config of another run
MISREAD = (
    MainrunError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    AssertionError,
)
CHANCE = random.SystemRandom()  # a random generator that does not influence training
LOSSES = ("step", "eval")  # the events in metrics.jsonl; all other events are in growth.jsonl


def row_identity(row: Row) -> tuple[Any, ...]:
    """Return the event, the operation and the step, which identify a row of growth.jsonl."""
    return row["event"], row["op"], row["step"]


class OtherRun(NamedTuple):
    """Another run that is training steps which this run needs."""

    meets: int  # step of the next node that both runs will reach
    fork: int  # last step that both runs are known to share
    key: str  # key of the other run's lease
    run: str


class Course:
    """The store keys of a run's steps, and the steps after which the run saves its state in the store."""

    def __init__(
        self, cfg: TrainConfig, begun: dict[str, Any], plan: Plan, keep: Iterable[int], until: int
    ) -> None:
        self.cfg = cfg
        self.begun = begun  # the values that determine the first key
        self.geometry = list(cfg.geometry)
        self._keep = frozenset(keep)
        self._until = until
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Recompute the keys after growth has changed the plan."""
        self.plan = plan
        self.keys = lineage.chain(lineage.root(self.begun), plan)
        self.until = min(self._until or plan.steps, plan.steps)
        # exclude step 1: it is always scored, but a node after step 1 would save only one step
        stops = {*plan.breaks, *plan.eval_steps - {1}, *self._keep, self.until}
        # A run must train its first steps itself if no other run has logged the gradient norms of the layers.
        # After these steps, the run can continue from any node.
        stops.add(plan.cfg.grad_norm_steps)
        self.stops = stops & set(range(1, self.until + 1))
        self.steps = {key: step for step, key in enumerate(self.keys[: self.until + 1]) if step}

    def certain_until(self, step: int) -> int:
        """Return the last step that growth can no longer affect.

        Growth decides about undecided operations only at scored steps.
        """
        if not self.plan.undecided:
            return self.until
        later = [score for score in self.plan.eval_steps if score > step]
        return min([self.until, *later])

    def scores_between(self, begin: int, end: int) -> list[int]:
        """Return the steps after `begin` and before `end` at which the model is scored."""
        return sorted(step for step in self.plan.eval_steps if begin < step < end)


class NodeReader:
    """Find the stored nodes from which a run can continue, and the log rows up to these nodes."""

    def __init__(self, store: Store, course: Course, note: Callable[[str], None]) -> None:
        self.store = store
        self.course = course
        self.note = note
        self.extra_stops: set[int] = set()  # steps whose scores are missing in the store
        self._reported: set[str] = set()

    def usable(self, step: int) -> Iterator[tuple[Node, list[Node]]]:
        """Yield the usable nodes after a step, latest first, each with the list of nodes that lead to it."""
        course = self.course
        keys = self.store.node_keys()
        states: Container[str] | None = None
        for target in range(course.certain_until(step), step, -1):
            key = course.keys[target]
            if key not in keys:
                continue
            if states is None:
                states = self.store.states()
            path = self._path(key, target, step, states)
            if not path:
                continue
            rows = list(self.rows_for_run(path, step))
            steps_with_norms = {row["step"] for row in rows if "grad_norms" in row}
            if not course.plan.steps_with_norms(step, target) <= steps_with_norms:
                continue
            scored = {row["step"] for row in rows if row["event"] == "eval"}
            missing = set(course.scores_between(step, target)) - scored
            if not missing:
                yield path[-1], path
            else:
                # this run must compute the missing scores, so it also saves nodes at these steps
                self.extra_stops |= missing

    def _path(self, key: str, target: int, step: int, states: Container[str]) -> list[Node]:
        """Return the nodes from `step` to `target` in order, or an empty list if they cannot be used."""
        try:
            node = self.store.node(key)
            if node.step != target:
                raise Damaged(f"the node contains step {node.step}")
            if node.state not in states:  # the state was evicted from the store
                return []
            return list(self.store.history(node, step))[::-1]
        except Damaged as e:
            self.report(key, target, e)
            return []

    def rows_for_run(
        self, path: list[Node], since: int, written: Container[tuple[Any, ...]] = ()
    ) -> Iterator[Row]:
        """Yield the rows that this run would have logged if it had trained the steps after `since` itself.

        path: the nodes that contain the rows.

        written: the identities of the rows that are already in growth.jsonl.
        """
        course = self.course
        # two nodes may contain the same score, because a run that continues from a node may score it again
        scored: set[tuple[int, str]] = set()
        for node in path:
            for row in node.rows:
                step = row["step"]
                if row["event"] not in LOSSES:
                    # the run may have stopped after step `since` but before the growth operations there
                    if step >= since and row_identity(row) not in written:
                        yield row
                    continue
                if step <= since:
                    continue
                if row["event"] == "step":
                    if "grad_norms" in row and step > course.cfg.grad_norm_steps:
                        row = {name: value for name, value in row.items() if name != "grad_norms"}
                    if course.plan.logs(step):
                        yield row
                    continue
                score = (step, row["split"])
                if (
                    step in course.plan.eval_steps
                    and node.geometry == course.geometry
                    and mixture_of(node.config) == course.cfg.mixture
                    and score not in scored
                ):
                    scored.add(score)
                    yield row

    def report(self, key: str, step: int, why: Exception) -> None:
        """Tell the user once that a node is damaged."""
        if key not in self._reported:
            self._reported.add(key)
            self.note(f"the store's node of step {step} ({key[:12]}) is skipped: {why}")


class LeaseHolder:
    """Hold the lease on the next node of a run, and read the leases of other runs."""

    def __init__(self, store: Store, course: Course, device: Device) -> None:
        self.store = store
        self.course = course
        self.device = device
        self.leases = Leases(store.files)
        self.lease: Lease | None = None
        self.wanted: frozenset[int] = frozenset()  # steps whose state other runs are waiting for
        self.passed = 0  # the step up to which other runs can no longer request nodes
        self.due: list[int] = []  # steps of nodes to save; nodes after the step `written` are not saved yet
        self.written = 0
        self._requested: set[str] = set()  # keys that this run has requested from other runs
        self._forks: dict[tuple[str, str], int] = {}  # maps a lease to the last shared step

    def follow(self) -> None:
        """Clear the known forks, and release the lease if the changed plan no longer needs the lease."""
        self._forks.clear()
        if self.lease and self.lease.key not in self.course.steps:
            self.free()

    def acquire(self, step: int) -> None:
        """Take the lease on the next node, unless another run holds this lease."""
        course = self.course
        self.passed = step
        target = min(stop for stop in course.stops if stop > step)
        about: Row = {"run": course.cfg.run_id, "config": course.cfg.model_dump(mode="json")}
        about |= {"root": course.keys[0], "step": target, "scores": course.scores_between(step, target)}
        about |= {"geometry": course.geometry, "fired": list(course.plan.fired)}
        self.lease = self.leases.acquire(course.keys[target], self.beat, **about)

    def beat(self) -> Row:
        """Return the heartbeat data for the lease file: the step up to which all nodes have been written."""
        if self.device.world == 1:  # several processes would have to agree on the states to save
            with suppress(OSError):
                keys = self.store.wants() & self.course.steps.keys()
                self.wanted = frozenset(self.course.steps[key] for key in keys)
        passed = self.passed  # read `passed` before `due`, because `keeps` updates `due` before `passed`
        unwritten = [step - 1 for step in self.due if step > self.written]
        return {"at": min([passed, *unwritten])}

    def keeps(self, step: int) -> bool:
        """Return whether the state after `step` must be saved in the store.

        After this call, other runs can no longer request a node at this step.
        """
        kept = step in self.course.stops or step in self.wanted
        if kept:
            self.due = [*(due for due in self.due if due > self.written), step]
        self.passed = step
        return kept

    def other_run(self, step: int) -> OtherRun | None:
        """Return the run that will train the most steps and compute all necessary scores for this run."""
        others = []
        limit = self.course.certain_until(step)
        for key, holder in self.leases.active().items():
            if self.lease and key == self.lease.key:
                continue
            fork = min(self.fork(key, holder), limit)
            meets = self._meeting(key, holder, fork, limit)
            if meets > step and self._logs_needed_rows(holder, step, meets):
                others.append(OtherRun(meets, fork, key, str(holder.get("run"))))
        return max(others, default=None)

    def _meeting(self, key: str, holder: Row, fork: int, limit: int) -> int:
        """Return the step of the next node that another run will save for this run, or 0 if there is none."""
        target = self.course.steps.get(key, 0)
        if 0 < target <= limit:
            return target
        # the other run trains towards another node, but may not have passed the fork yet
        at = holder.get("at")
        return fork if isinstance(at, int) and at < fork else 0

    def _logs_needed_rows(self, holder: Row, step: int, meets: int) -> bool:
        """Return whether another run logs all rows that this run needs before the step `meets`."""
        return self._logs_needed_norms(holder, step, meets) and self._logs_needed_scores(holder, step, meets)

    def _logs_needed_norms(self, holder: Row, step: int, meets: int) -> bool:
        needed = self.course.plan.steps_with_norms(step, meets)
        config = holder.get("config")
        logged = config.get("grad_norm_steps") if isinstance(config, dict) else None
        return not needed or (isinstance(logged, int) and logged >= max(needed))

    def _logs_needed_scores(self, holder: Row, step: int, meets: int) -> bool:
        needed = self.course.scores_between(step, meets)
        if not needed:
            return True
        scores = holder.get("scores")
        if holder.get("geometry") != self.course.geometry:
            return False
        if mixture_of(holder.get("config")) != self.course.cfg.mixture:
            return False
        return isinstance(scores, list) and all(score in scores for score in needed)

    def fork(self, key: str, holder: Row) -> int:
        """Return the last step that this run shares with the holder of a lease, or 0 if it is unknown."""
        known = (key, str(holder.get("run")))
        if known not in self._forks:
            self._forks[known] = 0
            with suppress(*MISREAD):  # the fork stays 0 if the lease is invalid
                self._forks[known] = self._shared_steps(key, holder)
        return self._forks[known]

    def _shared_steps(self, key: str, holder: Row) -> int:
        course = self.course
        same_start = holder["root"] == course.keys[0]  # equal first keys imply equal data and machines
        if self.device.world > 1 or not same_start:
            return 0
        plan = Plan(from_dict(holder["config"]), course.plan.train_tokens, holder.get("fired", ()))
        theirs = lineage.chain(course.keys[0], plan)
        if theirs[holder["step"]] != key:
            return 0
        return min(planner.shared_steps(course.keys, theirs), course.until)

    def want(self, other: OtherRun) -> None:
        """Ask another run to save a node at the fork, unless it is already training up to that node."""
        key = self.course.keys[other.fork]
        if not other.fork or key == other.key or key in self._requested:
            return
        self._requested.add(key)
        with suppress(OSError):  # without the request, the other run may not save the node
            self.store.want(key, self.course.cfg.run_id)

    def free(self) -> None:
        """Release the lease, so that no other run waits for this run."""
        if self.lease:
            self.lease.release(unfinished=True)
            self.lease = None


class NodeWriter:
    """Write the nodes of a run in the background."""

    def __init__(
        self, store: Store, course: Course, holder: LeaseHolder, note: Callable[[str], None]
    ) -> None:
        self.store = store
        self.course = course
        self.holder = holder
        self.note = note
        self.on = True
        self.before = (0, course.keys[0])  # step and key of the last node
        self.rows: list[Row] = []  # all log rows since the last node
        self.since = time.perf_counter()  # the time at which training continued after the last node
        self._thread = ThreadPoolExecutor(1, "store")
        self._writing: Future[bool] | None = None
        self._pending: Node | None = None  # the node that is being written

    def due(self, step: int) -> bool:
        """Return whether the state after `step` must be written to the store now."""
        kept = step in self.course.stops or step in self.holder.due
        return kept and step != self.before[0]

    def publish(self, state: State) -> None:
        """Copy the state and write the copy as a node in the background."""
        if self._writing:
            self._writing.result()
        if not self.on:
            self.holder.free()  # other runs must not wait for a node that will never be written
            return
        self.before, self.rows = self.unwritten()
        tensors = {name: t.detach().to("cpu", copy=True) for name, t in state.tensors().items()}
        course = self.course
        node = Node(
            key=course.keys[state.step],
            parent=self.before[1],
            root=course.keys[0],
            step=state.step,
            begins=self.before[0],
            tokens_processed=state.tokens,
            state="",
            size=0,
            geometry=course.geometry,
            seconds=time.perf_counter() - self.since,
            run=course.cfg.run_id,
            config=course.cfg.model_dump(mode="json"),
            made=time.time(),
            rows_sha256="",
            rows=tuple(self.rows),
            growth_state=state.growth_state,
        )
        self.continue_from(node)
        self._pending = node
        lease = self.holder.lease
        if lease and lease.info["step"] <= node.step:
            self.holder.lease = None  # `_write` releases the lease
        self._writing = self._thread.submit(self._write, node, tensors, lease)

    def continue_from(self, node: Node) -> None:
        """Start collecting the log rows that follow a node."""
        self.before = (node.step, node.key)
        self.rows = []
        self._pending = None

    def _write(self, node: Node, tensors: dict[str, Any], lease: Lease | None) -> bool:
        """Write a node. Return whether the node is now in the store."""
        try:
            self.store.begin(node.root, self.course.begun)
            if node.begins and not self.store.files.exists(f"nodes/{node.parent}"):
                raise Refused(f"the log rows up to step {node.begins} are no longer in the store")
            self.store.save(node, tensors, lease.check if lease else lambda: None)
            self.store.evict({node.key})
            return True
        except Fenced as e:
            self.note(f"step {node.step} is not saved in the store: {e}")
        except Refused as e:
            self.stop(f"step {node.step} and later steps are not saved in the store: {e}")
        except OSError as e:
            problem = f"the store {self.store} cannot be written ({e})"
            if e.errno in NO_SPACE:
                problem = f"no space left in the store {self.store}"
            self.stop(f"{problem}; no more steps are saved in it")
        except Exception as e:  # errors from libraries such as safetensors must not end the run
            self.stop(f"the store {self.store} cannot be written ({e!r}); no more steps are saved in it")
        finally:
            self.holder.written = node.step
            if lease and (lease.key == node.key or not self.on):
                lease.release()
        return False

    def unwritten(self) -> tuple[tuple[int, str], list[Row]]:
        """Return the step and the key of the last stored node, and all log rows since this node."""
        written = self._writing is not None and self._writing.done() and self._writing.result()
        if not self._pending or not self._writing or written:
            return self.before, self.rows
        return (self._pending.begins, self._pending.parent), [*self._pending.rows, *self.rows]

    def stop(self, why: str) -> None:
        """Stop writing nodes, and tell the user why."""
        if self.on:
            self.on = False
            self.note(why)

    def close(self) -> None:
        """Wait until all nodes are written."""
        self._thread.shutdown()


class Sharing:
    """Manage how a run uses the store: reuse nodes, wait for other runs, and write nodes."""

    def __init__(
        self,
        store: Store,
        cfg: TrainConfig,
        plan: Plan,
        device: Device,
        fingerprints: dict[str, str],
        tokens: str,
        note: Callable[[str], None],
        accounts: Accounts,
        keep: Iterable[int] = (),
        until: int = 0,
        fresh: bool = False,
        start: str = "",
    ) -> None:
        begun = lineage.origin(cfg, fingerprints, tokens, versions(), device.machine_class, start)
        self.store = store
        self.device = device
        self.note = note
        self.accounts = accounts
        self.course = Course(cfg, begun, plan, keep, until)
        self.reader = NodeReader(store, self.course, note)
        self.holder = LeaseHolder(store, self.course, device)
        self.writer = NodeWriter(store, self.course, self.holder, note)
        self.reads = not fresh
        self.unscored = False  # whether the reused node lacks a score that this run needs
        self.lost_steps: set[int] = set()  # steps that this run trained but lost when a session ended
        self.on_lost_steps_recovered: Callable[[], None] = lambda: None

    def begin(self, lost_steps: set[int], on_lost_steps_recovered: Callable[[], None]) -> None:
        """Start a session.

        lost_steps: the steps that this run trained but lost when a session ended.

        on_lost_steps_recovered: a function to call after lost steps were recovered from the store.
        """
        self.lost_steps = lost_steps
        self.on_lost_steps_recovered = on_lost_steps_recovered

    def follow(self, plan: Plan) -> None:
        """Update the keys and the lease after growth has changed the plan."""
        self.course.follow(plan)
        self.holder.follow()

    def add_row(self, row: Row) -> None:
        """Add a log row to the next node."""
        self.writer.rows.append(row)

    def keeps(self, step: int) -> bool:
        """Return whether to save the state after `step` in the store. Call this method before the step."""
        return self.holder.keeps(step)

    # -- reusing nodes

    def advance(self, state: State, growth: Controller, log: RowLog | None, stop: StopSignal) -> bool:
        """Continue from the latest usable node. Then take the lease on the next node, or wait for other runs.

        Return True if the state lacks a score that this run needs. The caller then computes the score and
        calls this method again.
        """
        with self.accounts.clock("store"):
            self.unscored = False
            if self.device.leads:
                self._advance_leader(state, growth, log, stop)
            step, unscored = self.device.broadcast(state.step, int(self.unscored))
            self.unscored = bool(unscored)
            if step != state.step:
                node = self.store.node(self.course.keys[step], rows=False)
                self._load(state, node, self.store.load(node))
        self.writer.since = time.perf_counter()
        return self.unscored

    def _load(self, state: State, node: Node, tensors: dict[str, Any]) -> None:
        growth = growth_state_at(self.course.plan, node.step, node.growth_state)
        load_state(state, tensors, node.step, node.tokens_processed, growth)

    def _advance_leader(self, state: State, growth: Controller, log: RowLog | None, stop: StopSignal) -> None:
        waiting = ""
        while state.step < self.course.until and not stop.name:
            try:
                if self.reads and self._reuse(state, growth, log):
                    lease = self.holder.lease
                    if lease and lease.info["step"] <= state.step:
                        self.holder.free()
                    if self.unscored or self.course.plan.undecided:
                        return  # the caller must first score the state and decide about growth
                    continue
                if self.holder.lease or not self.writer.on:
                    return
                other = self._other_run(state.step)
                if other:
                    self.holder.want(other)
                    if not waiting:
                        waiting = (
                            f"waiting for {other.run}, which trains the shared steps up to step {other.meets}"
                        )
                        self.note(waiting)
                elif self._take_lease(state.step):
                    if not self.reads:
                        return
                    continue  # another run may have published the node in the meantime
            except OSError as e:
                reason = e.strerror or e
                self.writer.stop(
                    f"the store {self.store} cannot be used ({reason}); no more steps are saved in it"
                )
                self.holder.free()
                return
            # the pause is random, so that two runs do not release their leases for each other forever
            time.sleep(POLL * CHANCE.uniform(0.5, 1.5))

    def _other_run(self, step: int) -> OtherRun | None:
        return self.holder.other_run(step) if self.reads else None

    def _take_lease(self, step: int) -> bool:
        """Take the lease on the next node.

        Return False if another run holds this lease or a conflicting lease.
        """
        self.holder.acquire(step)
        if not self.reads:
            return True
        rival = self._other_run(step)
        if self.holder.lease and not rival:
            return True
        if rival:  # the run that continues first must write a node at the fork
            self.holder.want(rival)
        self.holder.free()
        return False

    def _reuse(self, state: State, growth: Controller, log: RowLog | None) -> bool:
        """Continue from the latest usable node. Return False if no node is usable."""
        usable = self.reader.usable(state.step)
        for node, path in usable:
            try:
                tensors = self.store.load(node)
            except Damaged as e:
                self.reader.report(node.key, node.step, e)
                continue
            first = state.step
            with fit_errors(f"node {node.key[:12]} of the store {self.store}"):
                self._load(state, node, tensors)
            self._add_scores_as_stops()
            self._account(first, node.step)
            scored = self._copy_rows(path, first, node.step, growth, log)
            self.unscored = node.step in self.course.plan.eval_steps and not scored
            self.writer.continue_from(node)
            self._note_reuse(path, first, node.step)
            return True
        self._add_scores_as_stops()
        return False

    def _add_scores_as_stops(self) -> None:
        if self.device.world == 1:  # several processes would have to agree on the states to save
            self.course.stops |= self.reader.extra_stops
        self.reader.extra_stops.clear()

    def _account(self, first: int, last: int) -> None:
        """Count reused steps. A lost step that is found in the store no longer counts as wasted."""
        plan = self.course.plan
        ledger = self.accounts.ledger
        reused = [step for step in range(first + 1, last + 1) if step not in self.lost_steps]
        recovered = last - first - len(reused)
        ledger["reused"] += len(reused)
        ledger["reused_tokens"] += sum(plan.segment_at(step - 1).span for step in reused)
        ledger["wasted"] -= recovered
        if recovered:
            self.on_lost_steps_recovered()

    def _copy_rows(
        self, path: list[Node], first: int, last: int, growth: Controller, log: RowLog | None
    ) -> bool:
        """Copy the rows of reused steps to the logs of this run. Return whether the last step has a score."""
        scored = False
        journal = growth.journal
        written = {row_identity(row) for row in journal.rows()} if journal else set()
        for row in self.reader.rows_for_run(path, first, written):
            if row["event"] == "eval":
                scored = scored or row["step"] == last
                # recompute the growth figures, because the other run may have a different growth schedule
                row = {key: value for key, value in row.items() if key not in FIGURES}
                row |= growth.figures(row["step"])
            target = log if row["event"] in LOSSES else journal
            if target:
                own = row["step"] in self.lost_steps
                target.append(row if own else row | {"reused": True})
        return scored

    def _note_reuse(self, path: list[Node], first: int, last: int) -> None:
        runs = sorted({node.run for node in path})
        more = ", ..." if len(runs) > 3 else ""
        trained_by = f"trained by {', '.join(runs[:3])}{more}"
        steps = f"steps {first + 1} to {last} of {self.course.plan.steps}"
        self.note(f"{steps} are reused from the store ({trained_by})")

    def report_other_versions(self) -> None:
        """Tell the user if the store has steps of this run that another machine class or version trained."""
        begun = self.course.begun
        root = lineage.root(begun)
        closest: list[str] | None = None
        try:
            roots: list[tuple[str, Any]] = list(self.store.roots())
        except OSError as e:
            problem = f"cannot be searched for other versions of this run ({e.strerror or e})"
            self.note(f"the store {self.store} {problem}")
            return
        for other_root, other in roots:
            if not isinstance(other, dict):
                continue
            if other.get("fields") != begun["fields"] or other.get("data") != begun["data"]:
                continue
            if other_root == root:
                return
            differences = lineage.differences(begun, other)
            if closest is None or len(differences) < len(closest):
                closest = differences
        if closest:
            reasons = "; ".join(closest[:4])
            self.note(
                f"the store has this run's first steps only from a different environment, "
                f"so they are not reused ({reasons})"
            )

    # -- writing nodes

    def publish(self, state: State) -> None:
        """Write the state to the store if a node is due at this step."""
        if not self.device.leads or not self.writer.due(state.step):
            return
        with self.accounts.clock("store"):
            self.writer.publish(state)

    # -- the checkpoints of the run

    def checkpoint_meta(self, step: int) -> Row | None:
        """Return the data to checkpoint for the next node, or None if no more nodes will be written."""
        if not self.writer.on:  # after an error, log rows may be missing
            return None
        before, rows = self.writer.unwritten()
        return {"key": self.course.keys[step], "before": list(before), "rows": rows}

    def restore(self, meta: Row | None, step: int) -> None:
        """Restore the data that `checkpoint_meta` returned when the checkpoint was saved."""
        if not meta:
            steps = f"the steps up to {step} were trained without a store"
            self.writer.stop(f"{steps}, so no steps of this run are saved in the store")
            return
        if meta["key"] != self.course.keys[step]:
            # the state comes from a different environment, so it must not be stored with the keys of this run
            self.reads = False
            steps = f"the steps up to {step} were trained in a different environment"
            self.writer.stop(f"{steps}, so this run neither reads from the store nor writes to it")
            return
        self.writer.before = (meta["before"][0], meta["before"][1])
        self.writer.rows = list(meta["rows"])

    def close(self) -> None:
        """Wait until all nodes are written, and release the lease on the next node."""
        self.writer.close()
        self.holder.free()


class NoSharing:
    """The replacement for `Sharing` in a run without a store."""

    def begin(self, lost_steps: set[int], on_lost_steps_recovered: Callable[[], None]) -> None: ...

    def follow(self, plan: Plan) -> None: ...

    def add_row(self, row: Row) -> None: ...

    def keeps(self, step: int) -> bool:
        return False

    def advance(self, state: State, growth: Controller, log: RowLog | None, stop: StopSignal) -> bool:
        return False

    def report_other_versions(self) -> None: ...

    def publish(self, state: State) -> None: ...

    def checkpoint_meta(self, step: int) -> Row | None:
        return None

    def restore(self, meta: Row | None, step: int) -> None: ...

    def close(self) -> None: ...
