"""What a run takes from the store, and what it leaves there for others.

At its start, and at each step where a node is kept, a run looks for the deepest node on its own key chain and goes on from there.
Where there is none it takes the lease on the next node and trains the way to it, or waits while somebody else does. Who trains the
way to a node that this run will not come to is waited for too, as far as both go together: the fork is wanted (wants/KEY), and whoever
has the lease keeps it on the way. Nodes are written by a thread of their own. Whatever is wrong with the store costs steps, never the run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from mainrun.config import TrainConfig, from_dict
from mainrun.core.device import Machine
from mainrun.core.machine_class import versions
from mainrun.errors import MainrunError
from mainrun.growth.controller import FIGURES, taken
from mainrun.plan.plan import Plan
from mainrun.run.stop import StopFlag
from mainrun.store import lineage, planner
from mainrun.store.checkpoint import fitting
from mainrun.store.leases import Fenced, Lease, Leases
from mainrun.store.nodes import Damaged, Node, Refused, Store
from mainrun.store.rundir import FULL, Metrics

if TYPE_CHECKING:
    from mainrun.train import State

POLL = 0.1  # seconds between two looks at a lease
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
CHANCE = random.SystemRandom()  # no generator that a training may draw from


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a row of growth.jsonl: the event, the operation and the step."""
    return row["event"], row["op"], row["step"]


class Other(NamedTuple):
    """Another run that trains steps of this one now."""

    meets: int  # the node that will be there for both
    fork: int  # the last step that both have in common, as far as that is known
    key: str  # of its lease
    run: str


class Reuse:
    def __init__(
        self,
        store: Store,
        cfg: TrainConfig,
        plan: Plan,
        machine: Machine,
        fingerprints: dict[str, str],
        tokens: str,
        note: Callable[[str], None],
        keep: Iterable[int] = (),
        until: int = 0,
        fresh: bool = False,
    ) -> None:
        self.store, self.cfg, self.machine, self.note = store, cfg, machine, note
        self.journal: Metrics | None = (
            None  # of the run's growth: rows of steps that are taken belong there, too
        )
        self.figures: Callable[[int], dict[str, Any]] = (
            lambda step: {}
        )  # what this run's rows of scores say of its model
        self.begun = lineage.origin(cfg, fingerprints, tokens, versions(), machine.facts)
        self._asked = until, frozenset(keep)
        self.wanted: frozenset[int] = frozenset()  # where others, who wait there, part from this run
        self._lease: Lease | None = None
        self._forks: dict[tuple[str, str], int] = {}  # with whom has which lease
        self.follow(plan)
        self.reads, self.writes = not fresh, True
        self.unscored = (
            False  # the node that was taken stands where this run wants a score and nobody had one
        )
        self.own: set[int] = set()  # steps that this run itself had trained, and lost with a sitting
        self.found_again: Callable[[], None] = lambda: None  # called when some of them were in the store
        self.before = (0, self.keys[0])  # step and key of the node before the rows
        self.rows: list[dict[str, Any]] = []  # since then, every step's
        self._named: set[str] = set()
        self._since = time.perf_counter()
        self._leases = Leases(store.files)
        self._posted: set[str] = set()  # keys that this run has wanted
        self._passed = 0  # nobody can want this step any more, nor one before it
        self._due: list[int] = []  # steps that are kept, and those after `_written` are not in the store yet
        self._written = 0
        self._writer = ThreadPoolExecutor(1, "store")
        self._writing: Future[bool] | None = None
        self._pending: Node | None = None  # what is on its way to the store, as long as `before` is that

    def follow(self, plan: Plan) -> None:
        """The plan, at first or from here on."""
        until, keep = self._asked
        self.plan, self.keys = plan, lineage.chain(lineage.root(self.begun), plan)
        # the first evaluation is after step 1: a node there would save one step
        self.until = min(until or plan.steps, plan.steps)
        self.stops = {*plan.breaks, *plan.eval_steps - {1}, *keep, self.until} & set(range(1, self.until + 1))
        self._steps = {key: step for step, key in enumerate(self.keys[: self.until + 1]) if step}
        self._forks.clear()
        if self._lease and self._lease.key not in self._steps:  # on a node that this run will not come to
            self._free()

    def rows_append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def _far(self, step: int) -> int:
        """How far ahead the plan is certain: to the next evaluation where that may fire an op."""
        later = (s for s in sorted(self.plan.eval_steps) if s > step) if self.plan.undecided else iter(())
        return min(next(later, self.until), self.until)

    # -- taking

    def advance(self, state: State, metrics: Metrics | None, stop: StopFlag) -> bool:
        """Go on from the deepest node there is, and hold the lease on the next one; wait while others train towards it.

        True: the state stands where this run wants a score and nobody had one. Call again when it has it.
        """
        with state.clock("store"):
            self.unscored = False
            if self.machine.leads:
                self._settle(state, metrics, stop)
            step, unscored = self.machine.share(state.step, int(self.unscored))
            self.unscored = bool(unscored)
            if step != state.step:
                node = self.store.node(self.keys[step], rows=False)
                state.load(self.store.load(node), node.step, node.presented, taken(self.plan, node))
        self._since = time.perf_counter()
        return self.unscored

    def _settle(self, state: State, metrics: Metrics | None, stop: StopFlag) -> None:
        waited = False
        while state.step < self.until and not stop.asked:
            try:
                if self.reads and self._take(state, metrics):
                    if self._lease and self._lease.about["step"] <= state.step:
                        self._free()
                    if self.unscored or self.plan.undecided:  # the score comes first, and what it decides
                        return
                    continue
                if self._lease or not self.writes:
                    return
                if other := self._other(state.step):
                    self._want(other)
                    if not waited:
                        self.note(
                            f"waiting for {other.run}, which trains the way to step {other.meets} that both share"
                        )
                        waited = True
                else:
                    self._hold(state.step)
                    if not self.reads:
                        return
                    rival = self._other(state.step)
                    if self._lease and not rival:
                        continue  # the node may have been published between the look and the lease
                    if (
                        rival
                    ):  # it took a lease at the same moment; whichever run goes on first must know the fork
                        self._want(rival)
                    self._free()
            except OSError as e:
                self._stop_writing(
                    f"the store {self.store} cannot be used ({e.strerror or e}); nothing more is kept in it"
                )
                self._free()
                return
            time.sleep(
                POLL * CHANCE.uniform(0.5, 1.5)
            )  # two that make room for each other do not meet for ever

    def _hold(self, step: int) -> None:
        """Take the lease on the next node, if nobody has it."""
        self._passed = step
        target = min(stop for stop in self.stops if stop > step)
        about = {
            "run": self.cfg.run_id,
            "config": self.cfg.model_dump(mode="json"),
            "root": self.keys[0],
            "step": target,
        }
        about |= {
            "scores": self._scores(step, target),
            "geometry": self._geometry,
            "fired": list(self.plan.fired),
        }
        self._lease = self._leases.acquire(self.keys[target], self._beat, **about)

    def _beat(self) -> dict[str, Any]:
        """What the lease says each time: the step up to which all that is kept is there. From then on, what others want is kept too."""
        if self.machine.world == 1:  # the processes of one run must agree where it stops
            with suppress(OSError):
                self.wanted = frozenset(self._steps[key] for key in self.store.wants() & self._steps.keys())
        passed = self._passed  # before `_due`, which grows first
        return {"at": min([passed, *(step - 1 for step in self._due if step > self._written)])}

    def keeps(self, step: int) -> bool:
        """Whether the state after this step is kept. Asked before the step; from then on it is too late to want it."""
        found = step in self.stops or step in self.wanted
        if found:
            self._due = [*(due for due in self._due if due > self._written), step]
        self._passed = step
        return found

    @property
    def _geometry(self) -> list[int]:
        return list(self.cfg.geometry)

    def _scores(self, begin: int, end: int) -> list[int]:
        """Scores that the way there writes."""
        return sorted(step for step in self.plan.eval_steps if begin < step < end)

    def _other(self, step: int) -> Other | None:
        """Who trains towards or through a node further on this chain, the furthest one, and leaves the scores that this run needs."""
        found, far = [], self._far(step)
        for key, holder in self._leases.active().items() if self.reads else ():
            if self._lease and key == self._lease.key:
                continue
            fork, at, scores = min(self._fork(key, holder), far), holder.get("at"), holder.get("scores")
            # it comes through the fork on its way elsewhere, and there is time to say that it is wanted
            meets = self._steps.get(key, 0)
            meets = meets if 0 < meets <= far else fork if isinstance(at, int) and at < fork else 0
            needed = self._scores(step, meets)
            leaves = (
                isinstance(scores, list)
                and holder.get("geometry") == self._geometry
                and all(score in scores for score in needed)
            )
            if meets > step and (leaves or not needed):
                found.append(Other(meets, fork, key, str(holder.get("run"))))
        return max(found, default=None)

    def _fork(self, key: str, holder: dict[str, Any]) -> int:
        """The last step that this run has in common with the holder of a lease; 0: that cannot be told, or it keeps nothing for others."""
        known = (key, str(holder.get("run")))
        if known not in self._forks:
            self._forks[known] = 0
            with suppress(*MISREAD):  # whatever it says: it costs a wait at most
                if (
                    self.machine.world == 1 and holder["root"] == self.keys[0]
                ):  # the same data then, and the same machine
                    theirs = lineage.chain(
                        self.keys[0],
                        Plan(from_dict(holder["config"]), self.plan.train_tokens, holder.get("fired", ())),
                    )
                    if theirs[holder["step"]] == key:
                        self._forks[known] = min(planner.shared(self.keys, theirs), self.until)
        return self._forks[known]

    def _want(self, other: Other) -> None:
        """Say as early as possible where this run will part from the other, unless the other's lease is on that very node."""
        key = self.keys[other.fork]
        if other.fork and key != other.key and key not in self._posted:
            self._posted.add(key)
            with suppress(OSError):  # then it is kept by chance or not at all
                self.store.want(key, self.cfg.run_id)

    def _take(self, state: State, metrics: Metrics | None) -> bool:
        for node, past in self._usable(state.step):
            try:
                tensors = self.store.load(node)
            except Damaged as e:
                self._name(node.key, node.step, e)
                continue
            first = state.step
            with fitting(f"node {node.key[:12]} of the store {self.store}"):
                state.load(tensors, node.step, node.presented, taken(self.plan, node))
            others = [step for step in range(first + 1, node.step + 1) if step not in self.own]
            state.ledger["reused"] += len(others)
            state.ledger["reused_tokens"] += sum(self.plan.segment_at(step - 1).span for step in others)
            state.ledger["wasted"] -= node.step - first - len(others)
            if len(others) < node.step - first:
                self.found_again()
            scored = False
            written = {_identity(row) for row in self.journal.rows()} if self.journal else set()
            for row in self._shown(past, first, written):
                scored |= row["event"] == "eval" and row["step"] == node.step
                if row["event"] == "eval":  # another schedule may have written it, or none
                    row = {k: v for k, v in row.items() if k not in FIGURES} | self.figures(row["step"])
                log = metrics if row["event"] in ("step", "eval") else self.journal
                if log:
                    log.append(row if row["step"] in self.own else row | {"reused": True})
            self.unscored = node.step in self.plan.eval_steps and not scored
            self.before, self.rows, self._pending = (node.step, node.key), [], None
            runs = sorted({part.run for part in past})
            whose = f"trained by {', '.join(runs[:3])}{', ...' if len(runs) > 3 else ''}"
            self.note(
                f"steps {first + 1} to {node.step} of {self.plan.steps} are taken from the store ({whose})"
            )
            return True
        return False

    def _usable(self, step: int) -> Iterator[tuple[Node, list[Node]]]:
        """Nodes further on this chain, the deepest first, each with those that hold the rows on the way to it, the first first."""
        there, states = self.store.node_keys(), None
        for further in range(self._far(step), step, -1):
            if self.keys[further] not in there:
                continue
            states = self.store.states() if states is None else states
            try:
                node = self.store.node(self.keys[further])
                if node.step != further:
                    raise Damaged(f"it says that it is of step {node.step}")
                if node.state not in states:  # evicted
                    continue
                past = list(self.store.history(node, step))[::-1]
            except Damaged as e:
                self._name(self.keys[further], further, e)
                continue
            scored = {row["step"] for row in self._shown(past, step) if row["event"] == "eval"}
            if not (missing := set(self._scores(step, further)) - scored):
                yield node, past
            else:  # trained once more, for a score; where it is taken a node is kept, so that the next one need not
                self.stops |= missing if self.machine.world == 1 else set()

    def _shown(
        self, past: list[Node], since: int, written: Container[tuple[Any, ...]] = ()
    ) -> Iterator[dict[str, Any]]:
        """Rows as this run would have written them itself: its cadence, its scores. `written`: rows that its growth.jsonl has."""
        scored = set()  # a node's score may be among its own rows and, by who began from it and wanted another, the next one's
        for node in past:
            for row in node.rows:
                if row["event"] not in (
                    "step",
                    "eval",
                ):  # of growth: the run may have been stopped after it acted at `since`
                    if row["step"] >= since and _identity(row) not in written:
                        yield row
                    continue
                if row["step"] <= since:
                    continue
                if row["event"] == "step":
                    if row["step"] % self.cfg.log_every == 0 or row["step"] == self.plan.steps:
                        yield row
                elif (
                    row["step"] in self.plan.eval_steps
                    and node.geometry == self._geometry
                    and (row["step"], row["split"]) not in scored
                ):
                    scored.add((row["step"], row["split"]))
                    yield row

    def _name(self, key: str, step: int, why: Exception) -> None:
        if key not in self._named:
            self._named.add(key)
            self.note(f"the store's node of step {step} ({key[:12]}) is passed over: {why}")

    def strangers(self) -> None:
        """Say so where the store has this run's steps from another machine or another version: their bits would be others."""
        same, best = lineage.root(self.begun), None
        try:
            roots = list(self.store.roots())
        except OSError as e:
            self.note(
                f"what the runs in the store {self.store} began with cannot be read ({e.strerror or e})"
            )
            return
        for root, begun in roots:
            if (
                isinstance(begun, dict)
                and begun.get("fields") == self.begun["fields"]
                and begun.get("data") == self.begun["data"]
            ):
                if root == same:
                    return
                found = lineage.differences(self.begun, begun)
                best = found if best is None or len(found) < len(best) else best
        if best:
            differ = "; ".join(best[:4])
            self.note(
                f"the store has this run's beginning, but with other bits, so nothing of it is taken ({differ})"
            )

    # -- leaving

    def publish(self, state: State) -> None:
        """Keep the state of this step, if it is one to keep. The copy is taken now, the rest happens beside the training."""
        if (
            state.step not in {*self.stops, *self._due}
            or self.before[0] == state.step
            or not self.machine.leads
        ):
            return
        with state.clock("store"):
            if self._writing:
                self._writing.result()
            if not self.writes:
                self._free()  # nobody is to wait for what does not come
                return
            self.before, self.rows = self._kept()
            tensors = {name: t.detach().to("cpu", copy=True) for name, t in state.tensors().items()}
            node = Node(
                key=self.keys[state.step], parent=self.before[1], root=self.keys[0], step=state.step, begins=self.before[0],
                presented=state.presented, state="", size=0, geometry=self._geometry, seconds=time.perf_counter() - self._since,
                run=self.cfg.run_id, config=self.cfg.model_dump(mode="json"), made=time.time(), rows_sha256="", rows=tuple(self.rows),
                grown=state.grown,
            )  # fmt: skip
            self.before, self.rows, self._pending = (node.step, node.key), [], node
            lease = self._lease
            if lease and lease.about["step"] <= node.step:
                self._lease = None  # else it is on a node further on, and others wait on the way
            self._writing = self._writer.submit(self._write, node, tensors, lease)

    def _write(self, node: Node, tensors: dict[str, Any], lease: Lease | None) -> bool:
        try:
            self.store.begin(node.root, self.begun)
            if node.begins and not self.store.files.exists(f"nodes/{node.parent}"):
                raise Refused(f"the rows up to step {node.begins} are gone from it")
            self.store.save(node, tensors, lease.check if lease else lambda: None)
            self.store.evict({node.key})
            return True
        except Fenced as e:
            self.note(f"step {node.step} is not kept in the store: {e}")
        except Refused as e:
            self._stop_writing(f"step {node.step} is not kept in the store, nor what comes after: {e}")
        except OSError as e:
            why = (
                f"no space left in the store {self.store}"
                if e.errno in FULL
                else f"the store {self.store} cannot be written ({e})"
            )
            self._stop_writing(f"{why}; nothing more is kept in it")
        except Exception as e:  # a library's own, like safetensors' for a full disk; named, and no run's end
            self._stop_writing(
                f"the store {self.store} cannot be written ({e!r}); nothing more is kept in it"
            )
        finally:
            self._written = node.step
            if lease and (lease.key == node.key or not self.writes):
                lease.release()
        return False

    def _kept(self) -> tuple[tuple[int, str], list[dict[str, Any]]]:
        """The node before the rows, and the rows: while that node is not in the store, the one before it and the rows of both."""
        if self._pending and self._writing and not (self._writing.done() and self._writing.result()):
            return (self._pending.begins, self._pending.parent), [*self._pending.rows, *self.rows]
        return self.before, self.rows

    def _stop_writing(self, why: str) -> None:
        if self.writes:
            self.writes = False
            self.note(why)

    # -- a run's own checkpoints

    def meta(self, step: int) -> dict[str, Any] | None:
        """What a checkpoint must hold so that the next node after it has all its rows, if this process is killed now too."""
        if not self.writes:  # there may be a hole already
            return None
        before, rows = self._kept()
        return {"key": self.keys[step], "before": list(before), "rows": rows}

    def restore(self, meta: dict[str, Any] | None, step: int) -> None:
        if not meta:
            self._stop_writing(
                f"the steps up to {step} were trained without a store: nothing of this run is kept in it"
            )
            return
        if (
            meta["key"] != self.keys[step]
        ):  # its bits are another chain's: nothing of it may go under the keys of this one
            self.reads = False
            self._stop_writing(
                f"the steps up to {step} were trained elsewhere, to other bits: this run neither takes from the store nor adds to it"
            )
            return
        self.before, self.rows = (meta["before"][0], meta["before"][1]), list(meta["rows"])

    def _free(self) -> None:
        if self._lease:
            self._lease.release(unfinished=True)
            self._lease = None

    def close(self) -> None:
        """All that is on its way is written; what was not reached is free for others."""
        self._writer.shutdown()
        self._free()
