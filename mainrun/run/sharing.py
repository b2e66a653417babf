"""What a run reads from the store and what it leaves there, so that no training step is done twice.

At its start, and wherever it keeps a node, a run looks for the deepest node on its own key chain and
continues from there. If there is none, it takes the lease on its next node and trains up to it, or waits
while another run does. If another run is training a shared prefix, this run waits for it up to the fork,
even if the other run's own target lies elsewhere: it asks for a node at the fork (wants/KEY), and the other
run keeps one on its way. A background thread writes the nodes. A fault of the store costs steps, never the
run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from mainrun.config import TrainConfig, from_dict
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
POLL = 0.1  # seconds between two looks at a lease
# what reading another run's lease or config may raise, whatever it contains
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
CHANCE = random.SystemRandom()  # separate from every generator that training draws from
LOSSES = ("step", "eval")  # the events of metrics.jsonl; all others belong to growth.jsonl


def row_identity(row: Row) -> tuple[Any, ...]:
    """Return what identifies a row of growth.jsonl: the event, the operation and the step."""
    return row["event"], row["op"], row["step"]


class OtherRun(NamedTuple):
    """Another run that is training steps of this run."""

    meets: int  # the step of the node that both will reach
    fork: int  # the last step that both share, as far as is known
    key: str  # the key of its lease
    run: str


class Course:
    """The keys of a run's steps, and the steps at which it keeps nodes."""

    def __init__(
        self, cfg: TrainConfig, begun: dict[str, Any], plan: Plan, keep: Iterable[int], until: int
    ) -> None:
        self.cfg = cfg
        self.begun = begun  # everything that the first key is a hash of
        self.geometry = list(cfg.geometry)
        self._keep = frozenset(keep)
        self._until = until
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Continue on a plan that growth has changed."""
        self.plan = plan
        self.keys = lineage.chain(lineage.root(self.begun), plan)
        self.until = min(self._until or plan.steps, plan.steps)
        # the first score comes after step 1: a node there would save one step
        stops = {*plan.breaks, *plan.eval_steps - {1}, *self._keep, self.until}
        self.stops = stops & set(range(1, self.until + 1))
        self.steps = {key: step for step, key in enumerate(self.keys[: self.until + 1]) if step}

    def certain_until(self, step: int) -> int:
        """Return the step up to which the plan is certain: the next score, if that may fire an operation."""
        if not self.plan.undecided:
            return self.until
        later = [score for score in self.plan.eval_steps if score > step]
        return min([self.until, *later])

    def scores_between(self, begin: int, end: int) -> list[int]:
        """Return the steps between two others after which the run is scored."""
        return sorted(step for step in self.plan.eval_steps if begin < step < end)


class NodeReader:
    """Finds nodes of the store on a run's course, and the rows on the way to them."""

    def __init__(self, store: Store, course: Course, note: Callable[[str], None]) -> None:
        self.store = store
        self.course = course
        self.note = note
        self.extra_stops: set[int] = set()  # scores that no node on the way has
        self._reported: set[str] = set()

    def usable(self, step: int) -> Iterator[tuple[Node, list[Node]]]:
        """Yield later nodes, the deepest first, each with the nodes that hold the rows up to it, in order."""
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
            scored = {row["step"] for row in self.rows_for_run(path, step) if row["event"] == "eval"}
            missing = set(course.scores_between(step, target)) - scored
            if not missing:
                yield path[-1], path
            else:
                # trained again for the sake of a score; a node there spares the next run that work
                self.extra_stops |= missing

    def _path(self, key: str, target: int, step: int, states: Container[str]) -> list[Node]:
        """Return the nodes from `step` to a target, in order; empty if they cannot be used."""
        try:
            node = self.store.node(key)
            if node.step != target:
                raise Damaged(f"it says that it is of step {node.step}")
            if node.state not in states:  # evicted
                return []
            return list(self.store.history(node, step))[::-1]
        except Damaged as e:
            self.report(key, target, e)
            return []

    def rows_for_run(
        self, path: list[Node], since: int, written: Container[tuple[Any, ...]] = ()
    ) -> Iterator[Row]:
        """Yield rows as this run would have written them: its log interval, its scores.

        written: the rows that its growth.jsonl already has.
        """
        course = self.course
        # a score may stand twice: with its own node, and with the next one of a run that began there
        scored: set[tuple[int, str]] = set()
        for node in path:
            for row in node.rows:
                step = row["step"]
                if row["event"] not in LOSSES:
                    # of growth: the run may have stopped after an operation acted at `since`
                    if step >= since and row_identity(row) not in written:
                        yield row
                    continue
                if step <= since:
                    continue
                if row["event"] == "step":
                    if step % course.cfg.log_every == 0 or step == course.plan.steps:
                        yield row
                    continue
                score = (step, row["split"])
                if (
                    step in course.plan.eval_steps
                    and node.geometry == course.geometry
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
    """The lease on a run's next node, and what the leases of other runs say."""

    def __init__(self, store: Store, course: Course, device: Device) -> None:
        self.store = store
        self.course = course
        self.device = device
        self.leases = Leases(store.files)
        self.lease: Lease | None = None
        self.wanted: frozenset[int] = frozenset()  # steps at which waiting runs part from this one
        self.passed = 0  # it is too late to ask for a node at this step or before it
        self.due: list[int] = []  # steps that are kept; those after `written` are not in the store yet
        self.written = 0
        self._requested: set[str] = set()  # keys that this run has asked other runs for
        self._forks: dict[tuple[str, str], int] = {}  # by key and run of another lease

    def follow(self) -> None:
        """Forget what depended on the course before growth changed it."""
        self._forks.clear()
        if self.lease and self.lease.key not in self.course.steps:
            self.free()

    def acquire(self, step: int) -> None:
        """Take the lease on the next node, unless another run has it."""
        course = self.course
        self.passed = step
        target = min(stop for stop in course.stops if stop > step)
        about: Row = {"run": course.cfg.run_id, "config": course.cfg.model_dump(mode="json")}
        about |= {"root": course.keys[0], "step": target, "scores": course.scores_between(step, target)}
        about |= {"geometry": course.geometry, "fired": list(course.plan.fired)}
        self.lease = self.leases.acquire(course.keys[target], self.beat, **about)

    def beat(self) -> Row:
        """Return what the lease announces at each heartbeat: the step up to which kept nodes are written."""
        if self.device.world == 1:  # the processes of one run would have to agree on the steps they keep
            with suppress(OSError):
                keys = self.store.wants() & self.course.steps.keys()
                self.wanted = frozenset(self.course.steps[key] for key in keys)
        passed = self.passed  # read before `due`, which grows first
        unwritten = [step - 1 for step in self.due if step > self.written]
        return {"at": min([passed, *unwritten])}

    def keeps(self, step: int) -> bool:
        """Return whether the state after a step is kept.

        Once it was asked, the step can no longer be wanted.
        """
        kept = step in self.course.stops or step in self.wanted
        if kept:
            self.due = [*(due for due in self.due if due > self.written), step]
        self.passed = step
        return kept

    def other_run(self, step: int) -> OtherRun | None:
        """Return the run that trains this run's steps the furthest and takes the scores that it needs."""
        others = []
        limit = self.course.certain_until(step)
        for key, holder in self.leases.active().items():
            if self.lease and key == self.lease.key:
                continue
            fork = min(self.fork(key, holder), limit)
            meets = self._meeting(key, holder, fork, limit)
            if meets > step and self._leaves_scores(holder, step, meets):
                others.append(OtherRun(meets, fork, key, str(holder.get("run"))))
        return max(others, default=None)

    def _meeting(self, key: str, holder: Row, fork: int, limit: int) -> int:
        """Return the step of the node that another run will leave on this course; 0 if there is none."""
        target = self.course.steps.get(key, 0)
        if 0 < target <= limit:
            return target
        # the other run passes the fork on its way elsewhere, and can still be asked for a node there
        at = holder.get("at")
        return fork if isinstance(at, int) and at < fork else 0

    def _leaves_scores(self, holder: Row, step: int, meets: int) -> bool:
        """Whether another run takes all scores that this run needs up to where they meet."""
        needed = self.course.scores_between(step, meets)
        if not needed:
            return True
        scores = holder.get("scores")
        same_spans = holder.get("geometry") == self.course.geometry
        return isinstance(scores, list) and same_spans and all(score in scores for score in needed)

    def fork(self, key: str, holder: Row) -> int:
        """Return the last step shared with the holder of a lease; 0 if it is unknown or not kept."""
        known = (key, str(holder.get("run")))
        if known not in self._forks:
            self._forks[known] = 0
            with suppress(*MISREAD):  # a lease that cannot be understood costs at most a wait
                self._forks[known] = self._shared_steps(key, holder)
        return self._forks[known]

    def _shared_steps(self, key: str, holder: Row) -> int:
        course = self.course
        same_start = holder["root"] == course.keys[0]  # then data and machine are the same, too
        if self.device.world > 1 or not same_start:
            return 0
        plan = Plan(from_dict(holder["config"]), course.plan.train_tokens, holder.get("fired", ()))
        theirs = lineage.chain(course.keys[0], plan)
        if theirs[holder["step"]] != key:
            return 0
        return min(planner.shared_steps(course.keys, theirs), course.until)

    def want(self, other: OtherRun) -> None:
        """Ask for a node where the two runs part, unless the other's lease is on that very node."""
        key = self.course.keys[other.fork]
        if not other.fork or key == other.key or key in self._requested:
            return
        self._requested.add(key)
        with suppress(OSError):  # then the node is kept by chance, or not at all
            self.store.want(key, self.course.cfg.run_id)

    def free(self) -> None:
        """Give the lease up, so that other runs need not wait for it."""
        if self.lease:
            self.lease.release(unfinished=True)
            self.lease = None


class NodeWriter:
    """Writes the nodes of a run in the background."""

    def __init__(
        self, store: Store, course: Course, holder: LeaseHolder, note: Callable[[str], None]
    ) -> None:
        self.store = store
        self.course = course
        self.holder = holder
        self.note = note
        self.on = True
        self.before = (0, course.keys[0])  # step and key of the last node
        self.rows: list[Row] = []  # every row since that node
        self.since = time.perf_counter()  # when training began after it
        self._thread = ThreadPoolExecutor(1, "store")
        self._writing: Future[bool] | None = None
        self._pending: Node | None = None  # the node that is being written

    def due(self, step: int) -> bool:
        """Return whether the state after a step must be written now."""
        kept = step in self.course.stops or step in self.holder.due
        return kept and step != self.before[0]

    def publish(self, state: State) -> None:
        """Copy the state and write it as a node in the background."""
        if self._writing:
            self._writing.result()
        if not self.on:
            self.holder.free()  # other runs must not wait for a node that will not come
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
            self.holder.lease = None  # the writer releases it; a lease on a later node stays
        self._writing = self._thread.submit(self._write, node, tensors, lease)

    def continue_from(self, node: Node) -> None:
        """Collect rows from a node on."""
        self.before = (node.step, node.key)
        self.rows = []
        self._pending = None

    def _write(self, node: Node, tensors: dict[str, Any], lease: Lease | None) -> bool:
        """Write a node. Return whether it is in the store."""
        try:
            self.store.begin(node.root, self.course.begun)
            if node.begins and not self.store.files.exists(f"nodes/{node.parent}"):
                raise Refused(f"the rows up to step {node.begins} are no longer in it")
            self.store.save(node, tensors, lease.check if lease else lambda: None)
            self.store.evict({node.key})
            return True
        except Fenced as e:
            self.note(f"step {node.step} is not kept in the store: {e}")
        except Refused as e:
            self.stop(f"step {node.step} and later steps are not kept in the store: {e}")
        except OSError as e:
            problem = f"the store {self.store} cannot be written ({e})"
            if e.errno in NO_SPACE:
                problem = f"no space left in the store {self.store}"
            self.stop(f"{problem}; nothing more is kept in it")
        except Exception as e:  # of a library, such as safetensors on a full disk: reported, and not fatal
            self.stop(f"the store {self.store} cannot be written ({e!r}); nothing more is kept in it")
        finally:
            self.holder.written = node.step
            if lease and (lease.key == node.key or not self.on):
                lease.release()
        return False

    def unwritten(self) -> tuple[tuple[int, str], list[Row]]:
        """Return the last node that is in the store, and every row since then."""
        written = self._writing is not None and self._writing.done() and self._writing.result()
        if not self._pending or not self._writing or written:
            return self.before, self.rows
        return (self._pending.begins, self._pending.parent), [*self._pending.rows, *self.rows]

    def stop(self, why: str) -> None:
        """Write no more nodes, and tell the user why."""
        if self.on:
            self.on = False
            self.note(why)

    def close(self) -> None:
        """Wait until everything is written."""
        self._thread.shutdown()


class Sharing:
    """One run's use of the store: it reuses nodes, waits for other runs, and leaves nodes of its own."""

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
    ) -> None:
        begun = lineage.origin(cfg, fingerprints, tokens, versions(), device.machine_class)
        self.store = store
        self.device = device
        self.note = note
        self.accounts = accounts
        self.course = Course(cfg, begun, plan, keep, until)
        self.reader = NodeReader(store, self.course, note)
        self.holder = LeaseHolder(store, self.course, device)
        self.writer = NodeWriter(store, self.course, self.holder, note)
        self.reads = not fresh
        self.unscored = False  # the node that was reused lacks the score that this run wants there
        self.lost_steps: set[int] = set()  # steps that this run trained and lost with a session
        self.on_lost_steps_recovered: Callable[[], None] = lambda: None

    def begin(self, lost_steps: set[int], on_lost_steps_recovered: Callable[[], None]) -> None:
        """Start a session. The callback runs when lost steps were read back from the store."""
        self.lost_steps = lost_steps
        self.on_lost_steps_recovered = on_lost_steps_recovered

    def follow(self, plan: Plan) -> None:
        """Continue on a plan that growth has changed."""
        self.course.follow(plan)
        self.holder.follow()

    def add_row(self, row: Row) -> None:
        """Remember a row for the next node."""
        self.writer.rows.append(row)

    def keeps(self, step: int) -> bool:
        """Return whether the state after a step is kept. To be asked before the step."""
        return self.holder.keeps(step)

    # -- reusing

    def advance(self, state: State, growth: Controller, log: RowLog | None, stop: StopSignal) -> bool:
        """Continue from the deepest node, hold the lease on the next one, and wait while other runs train it.

        Return True if the state lacks a score that this run wants; score it and call again.
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
                        return  # the score comes first, and what it decides
                    continue
                if self.holder.lease or not self.writer.on:
                    return
                other = self._other_run(state.step)
                if other:
                    self.holder.want(other)
                    if not waiting:
                        waiting = (
                            f"waiting for {other.run}, which trains the shared steps up to {other.meets}"
                        )
                        self.note(waiting)
                elif self._take_lease(state.step):
                    if not self.reads:
                        return
                    continue  # the node may have been published just before the lease was taken
            except OSError as e:
                reason = e.strerror or e
                self.writer.stop(
                    f"the store {self.store} cannot be used ({reason}); nothing more is kept in it"
                )
                self.holder.free()
                return
            # a random pause, so that two runs that make room for each other do not do so forever
            time.sleep(POLL * CHANCE.uniform(0.5, 1.5))

    def _other_run(self, step: int) -> OtherRun | None:
        return self.holder.other_run(step) if self.reads else None

    def _take_lease(self, step: int) -> bool:
        """Take the lease on the next node.

        Return False if another run has it, or took a conflicting one just now.
        """
        self.holder.acquire(step)
        if not self.reads:
            return True
        rival = self._other_run(step)
        if self.holder.lease and not rival:
            return True
        if rival:  # whichever of the two continues first must know about the fork
            self.holder.want(rival)
        self.holder.free()
        return False

    def _reuse(self, state: State, growth: Controller, log: RowLog | None) -> bool:
        """Continue from the deepest usable node. Return False if there is none."""
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
        if self.device.world == 1:  # the processes of one run would have to agree on the steps they keep
            self.course.stops |= self.reader.extra_stops
        self.reader.extra_stops.clear()

    def _account(self, first: int, last: int) -> None:
        """Count the steps that were reused. Lost steps that are found again are no longer wasted."""
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
        """Write the rows of reused steps to this run's logs. Return whether the last step has a score."""
        scored = False
        journal = growth.journal
        written = {row_identity(row) for row in journal.rows()} if journal else set()
        for row in self.reader.rows_for_run(path, first, written):
            if row["event"] == "eval":
                scored = scored or row["step"] == last
                # another schedule of growth may have written the row, or none
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
        """Tell the user if the store has this run's steps with the bits of another machine or version."""
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
                f"the store has this run's first steps with other bits, so they are not reused ({reasons})"
            )

    # -- leaving nodes

    def publish(self, state: State) -> None:
        """Keep the state of this step, if it is one to keep."""
        if not self.device.leads or not self.writer.due(state.step):
            return
        with self.accounts.clock("store"):
            self.writer.publish(state)

    # -- a run's own checkpoints

    def checkpoint_meta(self, step: int) -> Row | None:
        """Return what a checkpoint must hold so that the node after it gets all its rows."""
        if not self.writer.on:  # rows may be missing already
            return None
        before, rows = self.writer.unwritten()
        return {"key": self.course.keys[step], "before": list(before), "rows": rows}

    def restore(self, meta: Row | None, step: int) -> None:
        """Continue from a checkpoint's meta."""
        if not meta:
            steps = f"the steps up to {step} were trained without a store"
            self.writer.stop(f"{steps}: nothing of this run is kept in it")
            return
        if meta["key"] != self.course.keys[step]:
            # other bits: nothing of this run may be stored under the keys of its chain
            self.reads = False
            steps = f"the steps up to {step} were trained elsewhere and have other bits"
            self.writer.stop(f"{steps}: this run neither reads from the store nor adds to it")
            return
        self.writer.before = (meta["before"][0], meta["before"][1])
        self.writer.rows = list(meta["rows"])

    def close(self) -> None:
        """Finish writing, and free the node that was not reached for other runs."""
        self.writer.close()
        self.holder.free()


class NoSharing:
    """A run without a store."""

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
