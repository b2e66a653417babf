"""What a run is: one flat, frozen, bounded config, and the plan that it resolves to.

Every field has a class, and the class says what the field can touch:

    static      the trajectory from step 0 on (model, data, seed, threads, ...)
    scheduled   the trajectory from the first step at which its resolved value differs (lr, dropout, batch, ...)
    inert       nothing of the trajectory: names, cadence of logs, evaluations and checkpoints

No torch in here: the command line reads this file before it knows whether there is anything to train.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mainrun import inputs
from mainrun.errors import ConfigError, nearest
from mainrun.growth.schedule import ARCHITECTURE, Op, Schedule, from_text, read, walk

PRESETS = Path(__file__).parent / "presets"
MIN_COVERAGE = 0.97  # an official score that covers less of val is shown with its coverage and never compared
TASK = {"seed": 1337, "epochs": 7, "max_steps": 0, "val_frac": 0.1, "num_titles": 100_000}  # the public task's fixed numbers


def _field(kind: str, default: Any, doc: str, **bounds: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"class": kind}, **bounds)


def static(default: Any, doc: str, **bounds: Any) -> Any:
    return _field("static", default, doc, **bounds)


def scheduled(default: Any, doc: str, **bounds: Any) -> Any:
    return _field("scheduled", default, doc, **bounds)


def inert(default: Any, doc: str, **bounds: Any) -> Any:
    return _field("inert", default, doc, **bounds)


Layer = Annotated[int, Field(strict=True, ge=0)]


class TrainConfig(BaseModel):
    """Everything that decides a run. The name of a field is its `--set` key, its TOML key and its column in a table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # -- run
    preset: str = inert("custom", "the preset that this config came from; first half of the run id")
    seed: int = static(TASK["seed"], "seed of the weights, of the data order and of dropout", ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = static("auto", "auto: cuda where there is one, else cpu")
    dtype: Literal["float32", "bfloat16"] = static("float32", "bfloat16: weights stay float32, matmuls autocast")
    threads: int = static(0, "CPU threads (they change the bits); 0: one per core", ge=0, le=1024)
    compile: Literal["auto", "on", "off"] = static("auto", "torch.compile (on a CPU with a C++ compiler); auto: for long enough runs")
    attention: Literal["auto", "plain", "sdpa"] = static("auto", "how attention is computed; auto: the faster, by device, dtype and length")

    # -- corpus
    corpus: str = static("synthetic", "synthetic | hn | hn-2025 | file:PATH[#COLUMN] | mix:PATH.toml")
    num_titles: int = static(TASK["num_titles"], "how many titles are taken from the corpus", ge=2, le=100_000_000)
    shuffle: bool = static(True, "true: permutation by the task's seed; false: the corpus' own order")
    val_frac: float = static(TASK["val_frac"], "share of the titles, at the end, held out as val", gt=0, lt=1)
    dev_frac: float = static(0.0, "share of train, at its end, held out as dev (what a search may look at)", ge=0, lt=1)

    # -- tokens
    tokenizer: Literal["bpe", "unigram"] = static("bpe", "byte-level BPE or unigram with byte fallback; both lossless")
    tokenizer_fit: Literal["train", "train+val"] = static("train", "the titles that the vocabulary is fitted on")
    vocab_size: int = static(16_000, "size of the vocabulary, special tokens and bytes included", ge=300, le=1_000_000)
    block_size: int = static(128, "tokens of context", ge=2, le=65_536)
    batch_size: int = scheduled(64, "rows in a step, over all micro-batches and processes", ge=1, le=65_536)
    grad_accum: int = scheduled(1, "micro-batches that a step is cut into: a memory setting", ge=1, le=65_536)
    epochs: int = scheduled(TASK["epochs"], "passes over train; decides the number of steps", ge=1, le=10_000)
    max_steps: int = scheduled(0, "end after so many steps, the schedule with them; 0: after the epochs", ge=0, le=1_000_000_000)
    order: Literal["sequential", "shuffle_titles"] = static(
        "sequential", "sequential: one fixed stream, read from its start each epoch; shuffle_titles: a new order of titles each epoch"
    )

    # -- model
    n_layer: int = static(6, "blocks", ge=1, le=1024)
    n_head: int = static(8, "attention heads", ge=1, le=1024)
    n_kv_head: int = static(0, "heads of keys and values, a divisor of n_head; 0: n_head", ge=0, le=1024)
    d_model: int = static(512, "width", ge=2, le=65_536)
    d_ff: int = static(0, "hidden width of the MLP; 0: 4 d_model (swiglu: 8/3, rounded up to 64)", ge=0, le=1_048_576)
    norm: Literal["layernorm", "rmsnorm"] = static("layernorm", "what stands before attention, MLP and head")
    position: Literal["learned", "rope"] = static("learned", "learned: a table, zero at first; rope: rotary")
    rope_theta: float = static(10_000.0, "base of the rotary wavelengths", gt=1, le=1e9)
    mlp: Literal["gelu", "relu2", "swiglu"] = static("gelu", "activation of the MLP; swiglu is gated")
    bias: bool = static(True, "biases in linear layers and LayerNorm (the head never has one)")
    qkv_bias: bool | None = static(None, "biases of q, k and v; unset: as bias")
    qk_norm: bool = static(False, "RMS norm of q and k in each head, with one gain a channel")
    attn_gate: bool = static(False, "each head's output times 2 sigmoid of a linear of its input, zero at first")
    layer_scale: float = static(0.0, "first gain of each branch's output channels; 0: no gains", ge=0, le=10)
    value_residual: bool = static(False, "mix each layer's values with the first layer's, learned share, half at first")
    title_mask: bool = static(False, "attention stays inside a title")
    tie_head: bool = static(True, "the head is the token embedding")
    softcap: float = static(0.0, "logits become c tanh(logits / c); 0: off", ge=0, le=1000)
    init_std: float = static(0.02, "standard deviation of first linear and embedding weights", gt=0, le=1)
    init_depth_scaled: bool = static(False, "branch outputs start smaller by sqrt(2 n_layer)")
    head_dim: int = static(0, "width of a head; 0: d_model / n_head", ge=0, le=65_536)
    experts: int = static(0, "experts of each MLP; 0: one dense MLP", ge=0, le=65_536)
    top_k: int = static(2, "experts a token goes through", ge=1, le=65_536)
    router_weights: Literal["renormalised", "softmax"] = static(
        "renormalised", "renormalised: softmax over the chosen k; softmax: over all, then top-k, not renormalised"
    )
    attn_lora_rank: int = static(0, "low-rank terms on q, k, v, o; 0: none", ge=0, le=65_536)
    embed_lora_rank: int = static(0, "low-rank term on the token embedding (where the head is tied: at both ends)", ge=0, le=65_536)
    lora_alpha: float = static(16.0, "scale of the low-rank terms is alpha / rank", gt=0, le=1e6)
    frozen: tuple[Layer, ...] = static((), "layers that do not train", strict=False)
    unused_ids: int = static(0, "ids at the end of the vocabulary that no text uses yet: their logits are -inf", ge=0, le=1_000_000)

    # -- optimiser
    optimizer: Literal["sgd", "adamw", "muon"] = static("sgd", "muon: matrices by Muon, the rest by AdamW")
    lr: float = scheduled(6e-3, "peak learning rate (muon: of the matrices)", gt=0, le=1000)
    lr_aux: float = scheduled(0.0, "peak rate of embeddings, head, gains and biases; 0: as lr", ge=0, le=1000)
    momentum: float = static(0.0, "of SGD and of Muon (Nesterov)", ge=0, lt=1)
    beta1: float = static(0.9, "AdamW's", ge=0, lt=1)
    beta2: float = static(0.999, "AdamW's", ge=0, lt=1)
    eps: float = static(1e-8, "AdamW's", gt=0, le=1)
    weight_decay: float = scheduled(0.0, "of matrices and embeddings; decoupled except for SGD", ge=0, le=100)
    wd_schedule: Literal["constant", "linear", "cosine"] = scheduled("constant", "how weight decay moves to 0 over the run")
    clip: float = static(1.0, "largest gradient norm; 0: no clipping", ge=0, le=1e6)

    # -- schedule
    schedule: Literal["constant", "cosine", "wsd"] = scheduled("cosine", "after the warm-up; wsd: constant, then decay")
    warmup_frac: float = scheduled(0.0, "share of the steps that the rate climbs from 0", ge=0, le=1)
    warmup_iters: int = scheduled(0, "the same in steps; 0: by warmup_frac", ge=0, le=1_000_000_000)
    decay_frac: float = scheduled(0.2, "wsd: share of the steps, at the end, that the rate falls", ge=0, le=1)
    decay_shape: Literal["linear", "cosine", "sqrt"] = scheduled("linear", "wsd: how it falls; sqrt: 1 - sqrt(progress)")
    min_lr_frac: float = scheduled(0.0, "share of the peak rate that is left at the end", ge=0, le=1)

    # -- regularisation
    dropout: float = scheduled(0.0, "of the embedding, and of the two below where they are unset", ge=0, lt=1)
    attn_dropout: float | None = scheduled(None, "of the attention weights; unset: as dropout", ge=0, lt=1)
    resid_dropout: float | None = scheduled(None, "of each branch's output; unset: as dropout", ge=0, lt=1)
    rdrop: float = scheduled(0.0, "weight of R-Drop: two passes, symmetric KL between them; 0: one pass", ge=0, le=100)
    label_smoothing: float = scheduled(0.0, "share of the target's mass spread over the vocabulary", ge=0, lt=1)
    ema: float = scheduled(0.0, "decay of the averaged weights that are scored; 0: off", ge=0, lt=1)
    swa: float = scheduled(0.0, "share of the steps, at the end, averaged evenly and scored; 0: off", ge=0, le=1)

    # -- growth
    growth: Annotated[Schedule, PlainSerializer(Schedule.data), WithJsonSchema({"type": "object"})] = scheduled(
        Schedule(), "what changes on the way: { ops = [{ name, value, trigger }, ...] }, or a JSON, YAML or TOML file of it"
    )

    # -- evaluation and checkpoints
    eval_per_epoch: int = inert(3, "evaluations in an epoch, besides the first and the last step", ge=0, le=10_000)
    eval_interval: int = inert(0, "the same as steps between two evaluations; 0: by eval_per_epoch", ge=0, le=1_000_000_000)
    official_geometry: str = inert("", "BxT spans of the official score, fixed for the run; empty: batch_size x block_size")
    log_every: int = inert(1, "steps between two rows of the training loss", ge=1, le=1_000_000)
    checkpoint_every: int = inert(0, "steps between two checkpoints; 0: once an epoch", ge=0, le=1_000_000_000)

    @field_validator("growth", mode="plain")
    @classmethod
    def _grows(cls, value: Any, info: ValidationInfo) -> Schedule:
        """All that is wrong with a schedule at once: how it is written, and where its ops lead from the fields above it."""
        found, faults = (value, []) if isinstance(value, Schedule) else read(value)
        names = list(cls.model_fields)
        if found.ops and len(info.data) == names.index("growth"):  # else what is wrong there must be mended first
            with suppress(ValidationError):
                faults = faults + walk(cls(**info.data), found.ops)[1]
        if faults:
            raise ValueError("\n".join(f"growth: {text}" for _, text in sorted(faults, key=lambda fault: fault[0])))
        return found

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        def refuse(got: str, fix: str) -> None:
            raise ValueError(f"{got}; {fix}")

        if not self.head_dim and self.d_model % self.n_head:
            near = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0 and (self.d_model // h) % 2 == 0]
            near = sorted(near, key=lambda h: (abs(h - self.n_head), h))[:3]
            width = 2 * self.n_head * max(1, round(self.d_model / (2 * self.n_head)))
            fix = f"set n_head to one of {sorted(near)}, or d_model={width}" if near else f"set d_model={width}"
            refuse(f"n_head={self.n_head} does not divide d_model={self.d_model}", fix)
        if self.n_kv_head and self.n_head % self.n_kv_head:
            refuse(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}", "set n_kv_head to a divisor, or 0")
        if self.position == "rope" and self.head_width % 2:
            got, fix = (
                (f"head_dim = {self.head_dim}", "change it")
                if self.head_dim
                else (f"d_model/n_head = {self.head_width}", "change d_model or n_head")
            )
            refuse(f"position=rope needs an even head width, got {got}", fix)
        if self.experts and self.top_k > self.experts:
            refuse(f"top_k={self.top_k} of experts={self.experts}", "lower top_k, or set experts=0 for a dense MLP")
        if self.frozen != tuple(sorted({layer for layer in self.frozen if layer < self.n_layer})):
            refuse(f"frozen={list(self.frozen)} of n_layer={self.n_layer}", f"write some of 0..{self.n_layer - 1}, each once, in order")
        if self.max_steps and self.growth.ops:
            refuse(f"max_steps={self.max_steps} with growth", "set max_steps=0: a schedule of growth is laid out over the epochs")
        if self.batch_size % self.grad_accum:
            refuse(f"grad_accum={self.grad_accum} does not divide batch_size={self.batch_size}", "set a divisor: it cuts the batch")
        if self.ema and self.swa:
            refuse(f"ema={self.ema} and swa={self.swa} are both on", "set one of them to 0: one average is scored")
        if self.rdrop and not any(self.dropouts):
            refuse(f"rdrop={self.rdrop} without any dropout", "set dropout > 0: R-Drop compares two dropout masks")
        if self.unused_ids and (self.rdrop or self.label_smoothing):
            got = f"unused_ids={self.unused_ids} with " + (
                f"rdrop={self.rdrop}" if self.rdrop else f"label_smoothing={self.label_smoothing}"
            )
            refuse(got, "set one of them to 0: what has no chance cannot be given a share")
        if self.warmup_frac + (self.decay_frac if self.schedule == "wsd" else 0) > 1:
            refuse(f"warmup_frac={self.warmup_frac} and decay_frac={self.decay_frac} overlap", "their sum may be at most 1")
        rows, length = self.geometry
        if rows < 1 or not 1 <= length <= self.block_size:
            fix = f"write ROWSxTOKENS, like 64x128, tokens at most block_size={self.block_size}"
            refuse(f"official_geometry={self.official_geometry!r}", fix)
        kind, _, place = self.corpus.partition(":")
        if kind not in ("synthetic", "hn", "hn-2025", "file", "mix") or bool(place) != (kind in ("file", "mix")):
            refuse(f"corpus={self.corpus!r}", "use synthetic, hn, hn-2025, file:PATH or mix:PATH.toml")
        return self

    # -- what follows from the fields
    def changed(self, **fields: Any) -> TrainConfig:
        """With other values, and without growth. ValueError: why there is no such config."""
        try:
            return TrainConfig(**self.model_dump(exclude={"growth"}) | fields)
        except ValidationError as e:
            raise ValueError("; ".join(_explain(error) for error in e.errors())) from None

    @property
    def phases(self) -> tuple[TrainConfig, ...]:
        """The config in force from the start, and from each op on."""
        return (self, *(phase.cfg for phase in walk(self, self.growth.ops)[0]))

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def ff_width(self) -> int:
        return self.d_ff or (-(-8 * self.d_model // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.d_model)

    @property
    def dropouts(self) -> tuple[float, float, float]:
        """Embedding, attention, residual."""
        other = (self.dropout if p is None else p for p in (self.attn_dropout, self.resid_dropout))
        return (self.dropout, *other)  # type: ignore[return-value]

    @property
    def passes(self) -> int:
        """How often a step shows each of its tokens to the model."""
        return 2 if self.rdrop else 1

    @property
    def geometry(self) -> tuple[int, int]:
        """Rows and tokens of one span of the official score."""
        if not self.official_geometry:
            return self.batch_size, self.block_size
        rows, _, length = self.official_geometry.partition("x")
        return (int(rows), int(length)) if rows.isdecimal() and length.isdecimal() else (0, 0)

    @property
    def digest(self) -> str:
        """sha256 of every field but the preset's name: what a run computes, whatever it is called."""
        return digest_of(self.model_dump())

    @property
    def run_id(self) -> str:
        return f"{self.preset.replace(':', '-')}-{self.digest[:8]}"

    @classmethod
    def class_of(cls, field: str) -> str:
        extra = cls.model_fields[field].json_schema_extra
        return str(extra["class"]) if isinstance(extra, dict) else ""


# -- the plan: fractions become integer steps, once


class StepInputs(NamedTuple):
    """Everything scheduled that enters one step. Two runs are the same as long as these are (and the statics)."""

    lr: float
    lr_aux: float
    weight_decay: float
    dropout: float
    attn_dropout: float
    resid_dropout: float
    batch_size: int
    grad_accum: int
    rdrop: float
    label_smoothing: float
    average: float  # share of the new weights in the scored average; 1: no average


class Stretch(NamedTuple):
    """Steps of one phase: the config in force, and where it takes over in the tokens."""

    cfg: TrainConfig
    first: int = 0
    tokens: int = 0  # trained before it
    epoch: int = 0
    start: int = 0  # in the stream of the epoch: where the step before it stopped reading
    climbs: int = 0  # the step that the rate's schedule counts from: that of the last reset_lr_schedule
    op: Op | None = None  # what began it, as it is carried out

    @property
    def span(self) -> int:
        return self.cfg.batch_size * self.cfg.block_size

    def place(self, step: int, train_tokens: int) -> tuple[int, int]:
        """The epoch of a step, and where its tokens begin: a pointer that goes back to 0 where span + 1 tokens do not fit any more."""
        epoch, start = self._pointer(step, train_tokens)
        return epoch, start if start + self.span < train_tokens else 0

    def after(self, step: int, train_tokens: int) -> tuple[int, int]:
        """Epoch and pointer where this phase leaves them before a step. What fits there, the size of that step decides."""
        epoch, start = self._pointer(step - 1, train_tokens)
        return epoch, start + self.span

    def _pointer(self, step: int, train_tokens: int) -> tuple[int, int]:
        # An epoch of whole spans has its last one in the plan, but no last target for it. The sequential stream begins anew there; a
        # shuffled epoch reads its start again, and the next one comes when the plan says.
        readable = train_tokens if self.cfg.order == "shuffle_titles" and train_tokens % self.span == 0 else train_tokens - 1
        ahead, here = step - self.first, max(0, readable - self.start) // self.span  # `here`: steps of the epoch that is under way
        if ahead < here:
            return self.epoch, self.start + ahead * self.span
        later, ahead = divmod(ahead - here, readable // self.span)
        return self.epoch + 1 + later, ahead * self.span


class Plan:
    """A config on a number of training tokens: which steps, and what enters each. Steps count from 0 here.

    fired: after how many steps each op so far has fired; ~step where it was passed over then. Ops that wait for an evaluation are known by
    that alone: without it the plan goes on as if the first of them (`undecided`) never fired. With `(*plan.fired, step)` it is the plan
    from that decision on; what was before it stays as it was planned then.
    """

    def __init__(self, cfg: TrainConfig, train_tokens: int, fired: Iterable[int] = ()) -> None:
        for phase in cfg.phases:
            span = phase.batch_size * phase.block_size
            if train_tokens <= span:
                raise ConfigError(
                    f"train has {train_tokens:,} tokens, but one step takes batch_size*block_size+1 = {span + 1:,}; "
                    "lower batch_size or block_size, or raise num_titles"
                )
        self.cfg = cfg
        self.train_tokens = train_tokens
        self.steps_per_epoch = train_tokens // (cfg.batch_size * cfg.block_size)
        self.undecided: Op | None = None
        told = tuple(fired)
        self.before, self.since = self._decided(told)
        self.fired: tuple[int, ...] = ()  # as far as that is known
        self.stretches = self._walk(told)
        self._firsts = [stretch.first for stretch in self.stretches]
        self._dropouts = [tuple(map(_in_256ths, stretch.cfg.dropouts)) for stretch in self.stretches]
        last = self.stretches[-1]
        whole = last.first + (self.budget - last.tokens) // last.span
        self.steps = min(cfg.max_steps or whole, whole)
        self._rates = [self._rate(stretch) for stretch in self.stretches]
        self.warmup_steps, self.decay_start = self._rates[0]
        self.swa_start = self.steps - round(cfg.swa * self.steps) if cfg.swa else self.steps
        self.checkpoint_every = cfg.checkpoint_every or self.steps_per_epoch

    @property
    def budget(self) -> int:
        """Tokens of the run."""
        return self.cfg.epochs * self.steps_per_epoch * self.cfg.batch_size * self.cfg.block_size

    def _decided(self, fired: tuple[int, ...]) -> tuple[Plan | None, int]:
        """The plan before the last of the decisions that only the run could take, and after how many steps it was taken."""
        for i in range(len(fired) - 1, -1, -1):
            if fired[i] < 0 or not self.cfg.growth.ops[i].trigger.static:
                return Plan(self.cfg, self.train_tokens, fired[:i]), max(fired[i], ~fired[i])
        return None, 0

    def _walk(self, fired: tuple[int, ...]) -> list[Stretch]:
        """Where each phase begins. An op waits for the one before it."""
        found, foreseen = [Stretch(self.cfg)], True
        passed = [i for i, first in enumerate(fired) if first < 0]
        phases, faults = walk(self.cfg, [op for i, op in enumerate(self.cfg.growth.ops) if i not in passed])
        if passed and faults:
            raise ConfigError(f"growth: ops[{passed[-1]}] was passed over, and without it the schedule cannot go on: {faults[0][1]}")
        begun = {phase.op.place: phase for phase in phases}
        for i in range(len(self.cfg.growth.ops)):
            if i in passed:
                self.fired = (*self.fired, fired[i])
                continue
            (op, cfg), before = begun[i], found[-1]
            if i >= len(fired) and not op.trigger.static:
                self.undecided = op
                break
            first = fired[i] if i < len(fired) else self._due(op, before)
            assert first >= before.first, f"ops[{i}] fired before the one before it: {fired}"
            tokens = before.tokens + (first - before.first) * before.span
            climbs = first if op.name == "reset_lr_schedule" else before.climbs
            stretch = Stretch(cfg, first, tokens, *before.after(first, self.train_tokens), climbs, op)
            if i >= len(fired) and tokens + stretch.span > self.budget:
                if not foreseen:  # what waited for an evaluation came too late for it
                    break
                steps = before.first + (self.budget - before.tokens) // before.span
                raise ConfigError(
                    f"growth: ops[{i}] {op.name!r} would fire after step {first}, with less than a step left to train "
                    f"(without it the run has {steps} steps); give it an earlier trigger"
                )
            found.append(stretch)
            self.fired = (*self.fired, first)
            foreseen &= op.trigger.static and not passed
        return found

    def _due(self, op: Op, before: Stretch) -> int:
        """After how many steps an op fires that needs no evaluation."""
        trigger = op.trigger
        asked = [trigger.tokens, trigger.budget_frac and trigger.budget_frac * self.budget]
        firsts = [before.first + round((tokens - before.tokens) / before.span) for tokens in asked if tokens]
        return max(before.first, min([trigger.step, *firsts] if trigger.step else firsts))

    def _rate(self, stretch: Stretch) -> tuple[int, int]:
        """Where the rate has climbed, and where it begins to fall."""
        cfg, left = stretch.cfg, self.steps - stretch.climbs
        climb = cfg.warmup_iters or round(cfg.warmup_frac * left)
        fall = round(cfg.decay_frac * left) if cfg.schedule == "wsd" else left
        return stretch.climbs + climb, stretch.climbs + max(climb, left - fall)  # both fractions may have been rounded up

    def stretch(self, step: int) -> Stretch:
        return self.stretches[self._phase(step)]

    def _phase(self, step: int) -> int:
        return bisect_right(self._firsts, step) - 1

    def tokens(self, done: int) -> int:
        """Trained after so many steps."""
        stretch = self.stretch(done)
        return stretch.tokens + (done - stretch.first) * stretch.span

    @cached_property
    def grown(self) -> dict[int, bytes]:
        """What the ops of the architecture do, by the step before which they do it: it enters that step, beside what `at` says."""
        found: dict[int, bytes] = {}
        for stretch in self.stretches:
            if stretch.op and stretch.op.name in ARCHITECTURE:
                effect = json.dumps(stretch.op.effect(), sort_keys=True).encode()
                found[stretch.first] = found.get(stretch.first, b"") + effect
        return found

    @cached_property
    def eval_steps(self) -> frozenset[int]:
        """Steps (counted from 1) after which val and dev are scored."""
        found = {1, self.steps}
        # counted anew where the interval changes, or an epoch comes to have another number of steps; no other op moves them
        paces = [(s.cfg.eval_interval, 0 if s.cfg.eval_interval else s.span) for s in self.stretches]
        parts = [s for s, before, now in zip(self.stretches, [None, *paces], paces, strict=False) if before != now]
        for stretch, end in zip(parts, [*(later.first for later in parts[1:]), self.steps], strict=True):
            every = stretch.cfg.eval_interval
            if not every and self.cfg.eval_per_epoch:
                every = max(1, self.train_tokens // stretch.span // self.cfg.eval_per_epoch)
            if every:
                found |= set(range(stretch.first + every, end + 1, every))
        if self.before:
            return frozenset(step for step in found if step > self.since) | {s for s in self.before.eval_steps if s <= self.since}
        return frozenset(found)

    @cached_property
    def breaks(self) -> list[int]:
        """Steps after which another config may well part from this one: the end of its warm-up, its ops, the start of its decay."""
        # the first step of a decay still has the peak rate, the first of an average the weights as they are
        falls = [fall + 1 for _, fall in self._rates] if self.cfg.schedule != "constant" else []
        steps = {*(climbed for climbed, _ in self._rates), *falls, self.swa_start + 1, *self._firsts}
        past = [step for step in self.before.breaks if step <= self.since] if self.before else []
        return past + sorted(step for step in steps if self.since < step < self.steps)

    def lr_factor(self, step: int) -> float:
        cfg, low, phase = self.cfg, self.cfg.min_lr_frac, self._phase(step)
        begun, (climbed, falls) = self.stretches[phase].climbs, self._rates[phase]
        if step < climbed:
            return (step - begun + 1) / (climbed - begun)
        if cfg.schedule == "constant" or step < falls:
            return 1.0
        progress = (step - falls) / (self.steps - falls)
        shape = "cosine" if cfg.schedule == "cosine" else cfg.decay_shape
        return low + (1 - low) * FALL[shape](progress)

    def average(self, step: int) -> float:
        if step >= self.swa_start:
            return 1 / (step - self.swa_start + 1)
        # a young average follows the weights closely, else the random start would be in it for ever
        return 1 - min(self.cfg.ema, (1 + step) / (10 + step)) if self.cfg.ema else 1.0

    def at(self, step: int) -> StepInputs:
        if self.before and step < self.since:
            return self.before.at(step)
        phase, factor = self._phase(step), self.lr_factor(step)
        cfg = self.stretches[phase].cfg
        fall = 1.0 if cfg.wd_schedule == "constant" else FALL[cfg.wd_schedule](step / self.steps)
        embedding, attention, residual = self._dropouts[phase]
        return StepInputs(
            lr=cfg.lr * factor,
            lr_aux=(cfg.lr_aux or cfg.lr) * factor,
            weight_decay=cfg.weight_decay * fall,
            dropout=embedding,
            attn_dropout=attention,
            resid_dropout=residual,
            batch_size=cfg.batch_size,
            grad_accum=cfg.grad_accum,
            rdrop=cfg.rdrop,
            label_smoothing=cfg.label_smoothing,
            average=self.average(step),
        )

    def table(self) -> dict[str, Any]:
        """The resolved numbers, as config.json and --dry-run show them."""
        cfg = self.cfg
        growth = [f"{stretch.op} after step {stretch.first}" for stretch in self.stretches if stretch.op]
        growth += [f"then {self.undecided} at {self.undecided.trigger}"] if self.undecided else []
        return {
            "train_tokens": self.train_tokens,
            "tokens_per_step": cfg.batch_size * cfg.block_size,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "decay_start": self.decay_start,
            "swa_start": self.swa_start if cfg.swa else None,
            "growth": ", ".join(growth) or None,
            "evaluations": len(self.eval_steps),
            "checkpoint_every": self.checkpoint_every,
            "official_geometry": list(cfg.geometry),
            "d_ff": cfg.ff_width,
            "n_kv_head": cfg.kv_heads,
            "first_step": self.at(0)._asdict(),
            "last_step": self.at(self.steps - 1)._asdict(),
        }


def _in_256ths(p: float) -> float:
    """The rate that is used: one random byte decides, so it is a whole 256th, and never none where one was asked for."""
    return min(max(round(256 * p), p > 0), 255) / 256


# from 1 at progress 0 to 0 at progress 1
FALL = {"linear": lambda t: 1 - t, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)), "sqrt": lambda t: 1 - math.sqrt(t)}


# -- presets and --set


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def load(preset: str, sets: Iterable[str] = ()) -> list[TrainConfig]:
    """The configs of a preset: one, or one a step where the file is a ladder (`[[steps]]`); `--set` goes on top of all.

    preset: a built-in name, a TOML file, or either with `:step` for one step of a ladder.
    """
    overrides = dict(parse_set(s) for s in sets)
    if "preset" in overrides:
        raise ConfigError(f"--set preset={overrides['preset']}: a preset is chosen by --preset, and its name is its file's")
    return [_build(fields | overrides, label) for label, fields in _expand(preset)]


def _expand(preset: str, above: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(label, fields) of a preset, bases resolved."""
    path, step = _find(preset)
    if preset in above:
        raise ConfigError(f"preset {preset!r} is its own base ({' -> '.join((*above, preset))}); remove one of the base keys")
    try:
        text = inputs.read_text(path)
    except inputs.BadInput as e:
        raise ConfigError(f"preset file {path} {e}") from None
    try:
        data = inputs.parse_toml(text)
    except inputs.BadInput as e:
        raise ConfigError(f"preset file {path} is not valid TOML: {e}") from None

    def base_of(table: dict[str, Any]) -> dict[str, Any]:
        base = table.pop("base", None)
        if base is None:
            return {}
        found = _expand(str(base), (*above, preset))
        if len(found) != 1:
            raise ConfigError(f"base = {base!r} in {path.name} is a ladder; name one step, like {base}:{found[0][0].split(':')[-1]}")
        return found[0][1]

    data.pop("about", None)
    _named(path.stem, f"preset file {path}")
    steps, scale = data.pop("steps", None), data.pop("scale", {})
    if not isinstance(scale, dict):
        raise ConfigError(f"scale = {scale!r} in {path.name} is not a table; write [scale] and a field = value in each line below it")
    if steps is not None and not (isinstance(steps, list) and steps and all(isinstance(entry, dict) for entry in steps)):
        raise ConfigError(f"steps = {steps!r} in {path.name} is not a list of tables; write [[steps]] before the fields of each step")
    for table in (data, scale, *(steps or ())):
        if "preset" in table:
            raise ConfigError(f"preset = {table['preset']!r} in {path.name} sets nothing: a preset's name is its file's; remove it")
    fields = base_of(data) | data
    if steps is None:
        if step:
            raise ConfigError(f"preset {path.stem!r} has no steps, got {preset!r}; write --preset {preset.removesuffix(':' + step)}")
        return [(path.stem, fields | scale)]
    ladder = []
    for i, entry in enumerate(steps):
        entry = dict(entry)
        name = _named(str(entry.pop("name", i)), f"step {i + 1} of {path.name}")
        entry.pop("about", None)
        fields = (base_of(entry) if "base" in entry else fields) | entry
        ladder.append((f"{path.stem}:{name}", fields | scale))
    labels = [label for label, _ in ladder]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"two steps of {path.name} are called {twice.split(':', 1)[1]!r}; give each a name of its own")
    if not step:
        return ladder
    for label, found in ladder:
        if label.split(":", 1)[1] == step:
            return [(label, found)]
    names = [label.split(":", 1)[1] for label, _ in ladder]
    raise ConfigError(f"preset {path.stem!r} has no step {step!r}{nearest(step, names)}; its steps: {', '.join(names)}")


def _named(name: str, what: str) -> str:
    """Names become part of a run's folder, so they hold nothing that leads elsewhere."""
    if not re.fullmatch(r"\w[\w .+-]{0,79}", name):
        raise ConfigError(f"{what} is called {name!r}; write at most 80 letters, digits and . + - _ or blanks, a letter or digit first")
    return name


def _find(preset: str) -> tuple[Path, str]:
    """The file and the step that a preset's name means."""
    name, colon, step = preset.partition(":")
    if colon and preset.endswith(":"):
        raise ConfigError(f"preset {preset!r} names no step; write {preset[:-1]}:STEP, or {preset[:-1]} for all of it")
    if name in preset_names():
        return PRESETS / f"{name}.toml", step
    for text, part in ((preset, ""), (preset.rpartition(":")[0], preset.rpartition(":")[2])):
        if text.endswith(".toml"):
            why = inputs.not_a_file(Path(text))
            if why:
                got = inputs.shortened(text, 120)
                raise ConfigError(f"preset file {got} {why}; give a TOML file or one of: {', '.join(preset_names())}")
            return Path(text), part
    known = preset_names()
    got = inputs.shown(preset, 80)
    raise ConfigError(f"unknown preset {got}{nearest(name, known)}; allowed: {', '.join(known)}, or a file ending in .toml")


def parse_set(text: str) -> tuple[str, Any]:
    """`key=value`, the value a TOML literal, or else a plain string; `none` unsets."""
    key, eq, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not eq or not key:
        raise ConfigError(f"--set got {inputs.shown(text)}; write key=value, like --set lr=0.01")
    if raw.lower() == "none":
        return key, None
    try:
        return key, inputs.toml_value(raw)
    except inputs.BadInput as e:
        got = inputs.shortened(f"{key}={raw}", 120)
        raise ConfigError(f"--set {got} cannot be used: {e}") from None


def _build(fields: dict[str, Any], label: str) -> TrainConfig:
    if isinstance(growth := fields.get("growth"), str):
        fields = fields | {"growth": from_text(growth)}
    try:
        return TrainConfig(**(fields | {"preset": label}))
    except ValidationError as e:
        raise ConfigError("\n".join(inputs.first_ten(_explained(e), "faults"))) from None


def _explained(e: ValidationError) -> Iterator[str]:
    """Each fault once. A name is compared with those of the fields only as long as a person reads on."""
    seen: set[str] = set()
    for error in e.errors():
        text = _explain(error, guess=len(seen) < 10)
        if text not in seen:
            seen.add(text)
            yield text


def digest_of(fields: dict[str, Any]) -> str:
    """The digest of a config as a dict, of another version too."""
    return hashlib.sha256(json.dumps({k: v for k, v in fields.items() if k != "preset"}, sort_keys=True).encode()).hexdigest()


def from_dict(fields: dict[str, Any]) -> TrainConfig:
    """A config as config.json holds it."""
    return _build(fields, str(fields.get("preset", "custom")))


def _explain(error: Any, guess: bool = True) -> str:
    """One pydantic error as got / allowed / fix; `guess` says which field was meant."""
    name = str(error["loc"][0]) if error["loc"] else ""
    got, kind = error["input"], error["type"]
    if kind == "extra_forbidden":
        meant = _meant(name) if guess else ""
        return f"unknown field {inputs.shown(name, 80)}{meant}; `mainrun presets --fields` lists all"
    if kind == "value_error":  # from _fits_together or growth, already whole
        return str(error["ctx"]["error"])
    doc = TrainConfig.model_fields[name].description
    if kind.startswith("bool"):
        return f"{name}={inputs.shown(got)} is not allowed: write true or false ({name}: {doc})"
    return f"{name}={inputs.shown(got)} is not allowed: {error['msg'].lower()} ({name}: {doc})"


def _meant(name: str) -> str:
    """The field of a like name, or of a description that has these words."""
    close = nearest(name, TrainConfig.model_fields)
    if close:
        return close
    words = name.lower().replace("_", " ")
    for field, info in TrainConfig.model_fields.items():
        if words in str(info.description):
            return f" (did you mean {field!r}: {info.description}?)"
    return ""
