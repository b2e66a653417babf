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
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal

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

from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs
from mainrun.plan.op_files import from_text, read
from mainrun.plan.ops import Schedule, walk

MIN_COVERAGE = 0.97  # an official score that covers less of val is shown with its coverage and never compared
TASK = {
    "seed": 1337,
    "epochs": 7,
    "max_steps": 0,
    "val_frac": 0.1,
    "num_titles": 100_000,
}  # the public task's fixed numbers


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
    dtype: Literal["float32", "bfloat16"] = static(
        "float32", "bfloat16: weights stay float32, matmuls autocast"
    )
    threads: int = static(0, "CPU threads (they change the bits); 0: one per core", ge=0, le=1024)
    compile: Literal["auto", "on", "off"] = static(
        "auto", "torch.compile (on a CPU with a C++ compiler); auto: for long enough runs"
    )
    attention: Literal["auto", "plain", "sdpa"] = static(
        "auto", "how attention is computed; auto: the faster, by device, dtype and length"
    )

    # -- corpus
    corpus: str = static("synthetic", "synthetic | hn | hn-2025 | file:PATH[#COLUMN] | mix:PATH.toml")
    num_titles: int = static(
        TASK["num_titles"], "how many titles are taken from the corpus", ge=2, le=100_000_000
    )
    shuffle: bool = static(True, "true: permutation by the task's seed; false: the corpus' own order")
    val_frac: float = static(TASK["val_frac"], "share of the titles, at the end, held out as val", gt=0, lt=1)
    dev_frac: float = static(
        0.0, "share of train, at its end, held out as dev (what a search may look at)", ge=0, lt=1
    )

    # -- tokens
    tokenizer: Literal["bpe", "unigram"] = static(
        "bpe", "byte-level BPE or unigram with byte fallback; both lossless"
    )
    tokenizer_fit: Literal["train", "train+val"] = static(
        "train", "the titles that the vocabulary is fitted on"
    )
    vocab_size: int = static(
        16_000, "size of the vocabulary, special tokens and bytes included", ge=300, le=1_000_000
    )
    block_size: int = static(128, "tokens of context", ge=2, le=65_536)
    batch_size: int = scheduled(64, "rows in a step, over all micro-batches and processes", ge=1, le=65_536)
    grad_accum: int = scheduled(1, "micro-batches that a step is cut into: a memory setting", ge=1, le=65_536)
    epochs: int = scheduled(TASK["epochs"], "passes over train; decides the number of steps", ge=1, le=10_000)
    max_steps: int = scheduled(
        0, "end after so many steps, the schedule with them; 0: after the epochs", ge=0, le=1_000_000_000
    )
    order: Literal["sequential", "shuffle_titles"] = static(
        "sequential",
        "sequential: one fixed stream, read from its start each epoch; shuffle_titles: a new order of titles each epoch",
    )

    # -- model
    n_layer: int = static(6, "blocks", ge=1, le=1024)
    n_head: int = static(8, "attention heads", ge=1, le=1024)
    n_kv_head: int = static(0, "heads of keys and values, a divisor of n_head; 0: n_head", ge=0, le=1024)
    d_model: int = static(512, "width", ge=2, le=65_536)
    d_ff: int = static(
        0, "hidden width of the MLP; 0: 4 d_model (swiglu: 8/3, rounded up to 64)", ge=0, le=1_048_576
    )
    norm: Literal["layernorm", "rmsnorm"] = static("layernorm", "what stands before attention, MLP and head")
    position: Literal["learned", "rope"] = static("learned", "learned: a table, zero at first; rope: rotary")
    rope_theta: float = static(10_000.0, "base of the rotary wavelengths", gt=1, le=1e9)
    mlp: Literal["gelu", "relu2", "swiglu"] = static("gelu", "activation of the MLP; swiglu is gated")
    bias: bool = static(True, "biases in linear layers and LayerNorm (the head never has one)")
    qkv_bias: bool | None = static(None, "biases of q, k and v; unset: as bias")
    qk_norm: bool = static(False, "RMS norm of q and k in each head, with one gain a channel")
    attn_gate: bool = static(
        False, "each head's output times 2 sigmoid of a linear of its input, zero at first"
    )
    layer_scale: float = static(0.0, "first gain of each branch's output channels; 0: no gains", ge=0, le=10)
    value_residual: bool = static(
        False, "mix each layer's values with the first layer's, learned share, half at first"
    )
    title_mask: bool = static(False, "attention stays inside a title")
    tie_head: bool = static(True, "the head is the token embedding")
    softcap: float = static(0.0, "logits become c tanh(logits / c); 0: off", ge=0, le=1000)
    init_std: float = static(0.02, "standard deviation of first linear and embedding weights", gt=0, le=1)
    init_depth_scaled: bool = static(False, "branch outputs start smaller by sqrt(2 n_layer)")
    head_dim: int = static(0, "width of a head; 0: d_model / n_head", ge=0, le=65_536)
    experts: int = static(0, "experts of each MLP; 0: one dense MLP", ge=0, le=65_536)
    top_k: int = static(2, "experts a token goes through", ge=1, le=65_536)
    router_weights: Literal["renormalised", "softmax"] = static(
        "renormalised",
        "renormalised: softmax over the chosen k; softmax: over all, then top-k, not renormalised",
    )
    attn_lora_rank: int = static(0, "low-rank terms on q, k, v, o; 0: none", ge=0, le=65_536)
    embed_lora_rank: int = static(
        0, "low-rank term on the token embedding (where the head is tied: at both ends)", ge=0, le=65_536
    )
    lora_alpha: float = static(16.0, "scale of the low-rank terms is alpha / rank", gt=0, le=1e6)
    frozen: tuple[Layer, ...] = static((), "layers that do not train", strict=False)
    unused_ids: int = static(
        0, "ids at the end of the vocabulary that no text uses yet: their logits are -inf", ge=0, le=1_000_000
    )

    # -- optimiser
    optimizer: Literal["sgd", "adamw", "muon"] = static("sgd", "muon: matrices by Muon, the rest by AdamW")
    lr: float = scheduled(6e-3, "peak learning rate (muon: of the matrices)", gt=0, le=1000)
    lr_aux: float = scheduled(0.0, "peak rate of embeddings, head, gains and biases; 0: as lr", ge=0, le=1000)
    momentum: float = static(0.0, "of SGD and of Muon (Nesterov)", ge=0, lt=1)
    beta1: float = static(0.9, "AdamW's", ge=0, lt=1)
    beta2: float = static(0.999, "AdamW's", ge=0, lt=1)
    eps: float = static(1e-8, "AdamW's", gt=0, le=1)
    weight_decay: float = scheduled(0.0, "of matrices and embeddings; decoupled except for SGD", ge=0, le=100)
    wd_schedule: Literal["constant", "linear", "cosine"] = scheduled(
        "constant", "how weight decay moves to 0 over the run"
    )
    clip: float = static(1.0, "largest gradient norm; 0: no clipping", ge=0, le=1e6)

    # -- schedule
    schedule: Literal["constant", "cosine", "wsd"] = scheduled(
        "cosine", "after the warm-up; wsd: constant, then decay"
    )
    warmup_frac: float = scheduled(0.0, "share of the steps that the rate climbs from 0", ge=0, le=1)
    warmup_iters: int = scheduled(0, "the same in steps; 0: by warmup_frac", ge=0, le=1_000_000_000)
    decay_frac: float = scheduled(0.2, "wsd: share of the steps, at the end, that the rate falls", ge=0, le=1)
    decay_shape: Literal["linear", "cosine", "sqrt"] = scheduled(
        "linear", "wsd: how it falls; sqrt: 1 - sqrt(progress)"
    )
    min_lr_frac: float = scheduled(0.0, "share of the peak rate that is left at the end", ge=0, le=1)

    # -- regularisation
    dropout: float = scheduled(0.0, "of the embedding, and of the two below where they are unset", ge=0, lt=1)
    attn_dropout: float | None = scheduled(None, "of the attention weights; unset: as dropout", ge=0, lt=1)
    resid_dropout: float | None = scheduled(None, "of each branch's output; unset: as dropout", ge=0, lt=1)
    rdrop: float = scheduled(
        0.0, "weight of R-Drop: two passes, symmetric KL between them; 0: one pass", ge=0, le=100
    )
    label_smoothing: float = scheduled(
        0.0, "share of the target's mass spread over the vocabulary", ge=0, lt=1
    )
    ema: float = scheduled(0.0, "decay of the averaged weights that are scored; 0: off", ge=0, lt=1)
    swa: float = scheduled(
        0.0, "share of the steps, at the end, averaged evenly and scored; 0: off", ge=0, le=1
    )

    # -- growth
    growth: Annotated[Schedule, PlainSerializer(Schedule.data), WithJsonSchema({"type": "object"})] = (
        scheduled(
            Schedule(),
            "what changes on the way: { ops = [{ name, value, trigger }, ...] }, or a JSON, YAML or TOML file of it",
        )
    )

    # -- evaluation and checkpoints
    eval_per_epoch: int = inert(
        3, "evaluations in an epoch, besides the first and the last step", ge=0, le=10_000
    )
    eval_interval: int = inert(
        0, "the same as steps between two evaluations; 0: by eval_per_epoch", ge=0, le=1_000_000_000
    )
    official_geometry: str = inert(
        "", "BxT spans of the official score, fixed for the run; empty: batch_size x block_size"
    )
    log_every: int = inert(1, "steps between two rows of the training loss", ge=1, le=1_000_000)
    checkpoint_every: int = inert(
        0, "steps between two checkpoints; 0: once an epoch", ge=0, le=1_000_000_000
    )

    @field_validator("growth", mode="plain")
    @classmethod
    def _grows(cls, value: Any, info: ValidationInfo) -> Schedule:
        """All that is wrong with a schedule at once: how it is written, and where its ops lead from the fields above it."""
        found, faults = (value, []) if isinstance(value, Schedule) else read(value)
        names = list(cls.model_fields)
        if found.ops and len(info.data) == names.index(
            "growth"
        ):  # else what is wrong there must be mended first
            with suppress(ValidationError):
                faults = faults + walk(cls(**info.data), found.ops)[1]
        if faults:
            raise ValueError(
                "\n".join(f"growth: {text}" for _, text in sorted(faults, key=lambda fault: fault[0]))
            )
        return found

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        def refuse(got: str, fix: str) -> None:
            raise ValueError(f"{got}; {fix}")

        if not self.head_dim and self.d_model % self.n_head:
            near = [
                h
                for h in range(1, self.d_model + 1)
                if self.d_model % h == 0 and (self.d_model // h) % 2 == 0
            ]
            near = sorted(near, key=lambda h: (abs(h - self.n_head), h))[:3]
            width = 2 * self.n_head * max(1, round(self.d_model / (2 * self.n_head)))
            fix = (
                f"set n_head to one of {sorted(near)}, or d_model={width}" if near else f"set d_model={width}"
            )
            refuse(f"n_head={self.n_head} does not divide d_model={self.d_model}", fix)
        if self.n_kv_head and self.n_head % self.n_kv_head:
            refuse(
                f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}",
                "set n_kv_head to a divisor, or 0",
            )
        if self.position == "rope" and self.head_width % 2:
            got, fix = (
                (f"head_dim = {self.head_dim}", "change it")
                if self.head_dim
                else (f"d_model/n_head = {self.head_width}", "change d_model or n_head")
            )
            refuse(f"position=rope needs an even head width, got {got}", fix)
        if self.experts and self.top_k > self.experts:
            refuse(
                f"top_k={self.top_k} of experts={self.experts}",
                "lower top_k, or set experts=0 for a dense MLP",
            )
        if self.frozen != tuple(sorted({layer for layer in self.frozen if layer < self.n_layer})):
            refuse(
                f"frozen={list(self.frozen)} of n_layer={self.n_layer}",
                f"write some of 0..{self.n_layer - 1}, each once, in order",
            )
        if self.max_steps and self.growth.ops:
            refuse(
                f"max_steps={self.max_steps} with growth",
                "set max_steps=0: a schedule of growth is laid out over the epochs",
            )
        if self.batch_size % self.grad_accum:
            refuse(
                f"grad_accum={self.grad_accum} does not divide batch_size={self.batch_size}",
                "set a divisor: it cuts the batch",
            )
        if self.ema and self.swa:
            refuse(
                f"ema={self.ema} and swa={self.swa} are both on",
                "set one of them to 0: one average is scored",
            )
        if self.rdrop and not any(self.dropouts):
            refuse(
                f"rdrop={self.rdrop} without any dropout",
                "set dropout > 0: R-Drop compares two dropout masks",
            )
        if self.unused_ids and (self.rdrop or self.label_smoothing):
            got = f"unused_ids={self.unused_ids} with " + (
                f"rdrop={self.rdrop}" if self.rdrop else f"label_smoothing={self.label_smoothing}"
            )
            refuse(got, "set one of them to 0: what has no chance cannot be given a share")
        if self.warmup_frac + (self.decay_frac if self.schedule == "wsd" else 0) > 1:
            refuse(
                f"warmup_frac={self.warmup_frac} and decay_frac={self.decay_frac} overlap",
                "their sum may be at most 1",
            )
        rows, length = self.geometry
        if rows < 1 or not 1 <= length <= self.block_size:
            fix = f"write ROWSxTOKENS, like 64x128, tokens at most block_size={self.block_size}"
            refuse(f"official_geometry={self.official_geometry!r}", fix)
        kind, _, place = self.corpus.partition(":")
        if kind not in ("synthetic", "hn", "hn-2025", "file", "mix") or bool(place) != (
            kind in ("file", "mix")
        ):
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
    def segment_configs(self) -> tuple[TrainConfig, ...]:
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
        return self.d_ff or (
            -(-8 * self.d_model // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.d_model
        )

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
    return hashlib.sha256(
        json.dumps({k: v for k, v in fields.items() if k != "preset"}, sort_keys=True).encode()
    ).hexdigest()


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
