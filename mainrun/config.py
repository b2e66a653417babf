"""The configuration of a run: a flat, immutable set of fields whose values are checked.

Every field belongs to one of three classes, which define what the field can influence:

    static      A static field influences the whole run. Examples are the number of layers and the seed.
    scheduled   Two runs that differ only in scheduled fields may share steps. Examples are lr and dropout.
    inert       An inert field influences no training step. Examples are the preset's name and log_every.

The fields `ngram` and `ngram_weight` are scheduled, because they change the scores and no training step.

This module does not import torch, because importing torch would slow down the start of the command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

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

from mainrun.data import foreign, sources
from mainrun.errors import ConfigError, nearest
from mainrun.files import inputs
from mainrun.files.hashing import sha256_json
from mainrun.plan.op_files import from_text, read
from mainrun.plan.ops import Fault, Schedule, walk
from mainrun.plan.optimizers import OPTIMIZERS
from mainrun.plan.routing import LETTERS

MAX_BATCH_SIZE = 65_536  # the largest batch_size
MIN_COVERAGE = 0.97  # official scores are comparable only if they cover this fraction of val
# the values that the public task prescribes
TASK = {"seed": 1337, "epochs": 7, "max_steps": 0, "val_frac": 0.1, "num_titles": 100_000}


def _field(kind: str, default: Any, doc: str, **bounds: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"class": kind}, **bounds)


def static(default: Any, doc: str, **bounds: Any) -> Any:
    return _field("static", default, doc, **bounds)


def scheduled(default: Any, doc: str, **bounds: Any) -> Any:
    return _field("scheduled", default, doc, **bounds)


def inert(default: Any, doc: str, **bounds: Any) -> Any:
    return _field("inert", default, doc, **bounds)


Layer = Annotated[int, Field(strict=True, ge=0)]
Growth = Annotated[Schedule, PlainSerializer(Schedule.data), WithJsonSchema({"type": "object"})]


if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


class TrainConfig(BaseModel):
    """All settings of a run. The name of a field is also its key in `--set` options and TOML files."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # -- run
    preset: str = inert("custom", "name of the preset that this config came from; first part of the run id")
    seed: int = static(
        TASK["seed"], "seed of the initial weights, the data order and dropout", ge=0, lt=2**32
    )
    device: Literal["auto", "cpu", "cuda"] = static("auto", "auto: cuda if it is available, else cpu")
    dtype: Literal["float32", "bfloat16"] = static(
        "float32", "type of matrix products; with bfloat16 the weights stay in float32"
    )
    threads: int = static(0, "number of CPU threads, which affects rounding; 0: one per core", ge=0, le=1024)
    compile: Literal["auto", "on", "off"] = static(
        "auto",
        "use torch.compile (on a CPU it needs a C++ compiler); auto: only for runs that are long enough",
    )
    shard: bool = static(
        False, "divide the model, its gradients and its optimizer state among the processes (FSDP2)"
    )
    attention: Literal["auto", "plain", "sdpa"] = static(
        "auto", "implementation of attention; auto: the faster one for the device, dtype and context length"
    )

    # -- corpus
    corpus: str = static(
        "synthetic",
        "synthetic | hn | hn-2025 | file:PATH[#COLUMN] | hub:OWNER/NAME@COMMIT[/GLOB]#COLUMN | mix:PATH.toml",
    )
    num_titles: int = static(
        TASK["num_titles"], "number of titles to use from the corpus", ge=2, le=100_000_000
    )
    shuffle: bool = static(
        True, "true: shuffle the titles with the seed of the task; false: keep the order of the corpus"
    )
    val_frac: float = static(
        TASK["val_frac"], "fraction of the titles, at the end, that is held out as val", gt=0, lt=1
    )
    dev_frac: float = static(
        0.0, "fraction of train, at its end, that is held out as dev for hyperparameter searches", ge=0, lt=1
    )
    documents: bool = static(
        False, "keep the line breaks and the blanks of each text; false: each text becomes one line"
    )

    # -- tokens
    tokenizer: str = static(
        "bpe",
        "bpe: byte-level BPE; unigram: a unigram model that falls back to bytes; "
        "hf:DIR: the tokenizer.json of a checkpoint; all are lossless",
    )
    tokenizer_fit: Literal["train", "train+val"] = static("train", "titles that the vocabulary is fitted on")
    case: Literal["kept", "marked"] = static(
        "kept", "marked: write the capitals of words as signs, and the words in lower case; lossless"
    )
    vocab_size: int = static(
        16_000,
        "size of the vocabulary, including special tokens and bytes; for hf:DIR, the rows of the checkpoint",
        ge=300,
        le=1_000_000,
    )
    block_size: int = static(128, "context length in tokens", ge=2, le=65_536)
    batch_size: int = scheduled(
        64, "sequences in a step, over all micro-batches and processes", ge=1, le=MAX_BATCH_SIZE
    )
    grad_accum: int = scheduled(
        1, "number of micro-batches that a step is split into, to save memory", ge=1, le=65_536
    )
    epochs: int = scheduled(
        TASK["epochs"], "passes over train; they determine the number of steps", ge=1, le=10_000
    )
    max_steps: int = scheduled(
        0,
        "end the run, and its schedules, after this many steps; 0: after all epochs",
        ge=0,
        le=1_000_000_000,
    )
    order: Literal["sequential", "shuffle_titles"] = static(
        "sequential",
        "sequential: read the same stream from its start in each epoch; "
        "shuffle_titles: use a new order of the titles in each epoch",
    )

    # -- model
    start: str = static(
        "", "weights to start from: hf:DIR (a Qwen2 checkpoint) or run:DIR (a run); empty: random weights"
    )
    members: int = static(
        1,
        "models that are trained on the same batches, each with its own initial weights and dropout; "
        "the mean of their probabilities is scored",
        ge=1,
        le=64,
    )
    n_layer: int = static(6, "number of blocks", ge=1, le=1024)
    n_head: int = static(8, "number of attention heads", ge=1, le=1024)
    n_kv_head: int = static(0, "number of key/value heads, a divisor of n_head; 0: n_head", ge=0, le=1024)
    d_model: int = static(512, "width of the model", ge=2, le=65_536)
    d_ff: int = static(
        0,
        "hidden width of the MLP; 0: 4 * d_model (swiglu: 8/3 * d_model, rounded up to 64)",
        ge=0,
        le=1_048_576,
    )
    norm: Literal["layernorm", "rmsnorm"] = static(
        "layernorm", "normalisation before attention, the MLP and the head"
    )
    position: Literal["learned", "rope"] = static(
        "learned", "learned: a table that starts at zero; rope: rotary position embedding"
    )
    rope_theta: float = static(10_000.0, "base of the rotary wavelengths", gt=1, le=1e9)
    rope_share: float = static(
        1.0,
        "rope: share of a head's channels that are rotated, rounded to an even number of at least 2 channels",
        gt=0,
        le=1,
    )
    key_shift: bool = static(
        False,
        "take the channels of the keys that are not rotated from the previous token, within a title if "
        "title_mask is on",
    )
    mlp: Literal["gelu", "relu2", "swiglu"] = static("gelu", "activation of the MLP; swiglu is gated")
    bias: bool = static(True, "biases in linear layers and LayerNorm (the head never has one)")
    qkv_bias: bool | None = static(None, "biases of the q, k and v projections; unset: same as bias")
    qk_norm: bool = static(False, "RMSNorm of q and k in each head, with a gain per channel")
    attn_gate: bool = static(
        False, "multiply each head's output by 2 * sigmoid(linear(input)), a factor of 1 at first"
    )
    layer_scale: float = static(
        0.0, "initial gain of each branch's output channels; 0: no gains", ge=0, le=10
    )
    value_residual: bool = static(
        False, "mix the values of each layer with those of the first layer; the learned ratio starts at 1/2"
    )
    value_shortcut: bool = static(
        False, "add a projection of the token embedding to the values, times a gate per head, 0 at first"
    )
    x0_shortcut: bool = static(
        False,
        "each block gets a * x + b * x0, where x0 is the input of the first block; at first, a = 1 and b = 0",
    )
    unet: bool = static(
        False,
        "add the output of layer i of the first half, times a learned weight that is 0 at first, to the "
        "input of layer n_layer - 1 - i",
    )
    title_mask: bool = static(False, "restrict attention to tokens of the same title")
    tie_head: bool = static(True, "use the token embedding as the weights of the head")
    softcap: float = static(0.0, "replace the logits by c * tanh(logits / c); 0: off", ge=0, le=1000)
    init: Literal["normal", "kaiming"] = static(
        "normal",
        "standard deviation of the initial matrices of attention and MLPs; normal: init_std; "
        "kaiming: sqrt(2 / inputs)",
    )
    init_std: float = static(
        0.02,
        "standard deviation of the initial linear and embedding weights, except those that init=kaiming sets",
        gt=0,
        le=1,
    )
    init_depth_scaled: bool = static(
        False, "divide the initial weights of branch outputs by sqrt(2 * n_layer)"
    )
    head_dim: int = static(0, "width of a head; 0: d_model / n_head", ge=0, le=65_536)
    experts: int = static(0, "experts in each MLP; 0: one dense MLP", ge=0, le=65_536)
    top_k: int = static(2, "experts that each token is sent to", ge=1, le=65_536)
    router_weights: Literal["renormalised", "softmax"] = static(
        "renormalised",
        "renormalised: softmax over the chosen experts; softmax: over all experts, not renormalised",
    )
    block_pattern: str = static(
        "D",
        "kind of each layer, repeated over the layers: D dense, M Mixture-of-Depths, S surprise pairs, "
        "T temporal surprise",
    )
    capacity: float = scheduled(0.5, "fraction of a row's tokens that a routed block processes", gt=0, le=1)
    gate: Literal["soft", "straight"] = static(
        "soft",
        "soft: the gate scales the change that a routed block makes; "
        "straight: the gate is 1 in the forward pass and has a gradient",
    )
    route: Literal["auto", "own", "student"] = static(
        "auto",
        "score that selects tokens in evaluation: of the router (own) or of its student; "
        "auto: own for M and S, student for T",
    )
    prior_factor: float = static(
        0.0625, "hidden width of the predictor in S and T, as a fraction of d_model", gt=0, le=4
    )
    sharpness: float = scheduled(0.3, "sharpness of the surprise of S and T after the warm-up", gt=0, le=1000)
    sharpness_end: float = scheduled(6.0, "sharpness of the surprise at the last step", gt=0, le=1000)
    prior_loss: float = scheduled(0.05, "weight of the predictor's loss in S and T", ge=0, le=100)
    student_loss: float = scheduled(0.01, "weight of the student's loss in routed blocks", ge=0, le=100)
    router_loss: float = scheduled(
        0.01, "weight of the cross entropy of M's scores with the selection", ge=0, le=100
    )
    router_z_loss: float = scheduled(0.0001, "weight of the mean square of M's scores", ge=0, le=100)
    attn_lora_rank: int = static(0, "rank of the low-rank terms on q, k, v and o; 0: none", ge=0, le=65_536)
    mlp_lora_rank: int = static(
        0, "rank of the low-rank terms on gate, up and down of each MLP; 0: none", ge=0, le=65_536
    )
    embed_lora_rank: int = static(
        0, "rank of the low-rank term on the token embedding, and on a tied head; 0: none", ge=0, le=65_536
    )
    lora_alpha: float = static(16.0, "low-rank terms are scaled by lora_alpha / rank", gt=0, le=1e6)
    base_frozen: bool = static(False, "train only the low-rank terms and the routers")
    frozen: tuple[Layer, ...] = static((), "layers whose weights are not trained", strict=False)
    unused_ids: int = static(
        0, "ids at the end of the vocabulary that no text uses yet; their logits are -inf", ge=0, le=1_000_000
    )

    # -- optimizer
    optimizer: OptimizerName = static("sgd", "muon: Muon for matrices, AdamW for everything else")
    lr: float = scheduled(6e-3, "peak learning rate (muon: of the matrices only)", gt=0, le=1000)
    lr_aux: float = scheduled(
        0.0, "peak learning rate of the embeddings, head, gains and biases; 0: same as lr", ge=0, le=1000
    )
    lr_router: float = scheduled(
        0.0, "peak learning rate of the routers of M, S and T; 0: same as lr_aux", ge=0, le=1000
    )
    lr_prior: float = scheduled(
        0.0, "peak learning rate of the predictors of S and T; 0: same as lr_aux", ge=0, le=1000
    )
    lr_student: float = scheduled(
        0.0, "peak learning rate of the students of routed blocks; 0: same as lr_aux", ge=0, le=1000
    )
    lr_lora: float = scheduled(
        0.0,
        "peak learning rate of the low-rank terms; 0: the rate of the weights that they are added to",
        ge=0,
        le=1000,
    )
    momentum: float = static(0.0, "momentum of SGD and of Muon (Nesterov)", ge=0, lt=1)
    beta1: float = static(0.9, "beta1 of AdamW", ge=0, lt=1)
    beta2: float = static(0.999, "beta2 of AdamW", ge=0, lt=1)
    eps: float = static(1e-8, "epsilon of AdamW", gt=0, le=1)
    weight_decay: float = scheduled(
        0.0, "weight decay of the matrices inside blocks; decoupled except for SGD", ge=0, le=100
    )
    weight_decay_aux: float | None = scheduled(
        None, "weight decay of embeddings, head and routers; unset: same as weight_decay", ge=0, le=100
    )
    wd_schedule: Literal["constant", "linear", "cosine"] = scheduled(
        "constant", "shape of the decrease of both weight decays to 0 over the run"
    )
    cautious_decay: bool = static(
        False, "decay a weight only where the update also moves it towards zero (not with SGD)"
    )
    clip: float = static(1.0, "maximum norm of the gradient; 0: no clipping", ge=0, le=1e6)

    # -- schedule
    schedule: Literal["constant", "cosine", "wsd"] = scheduled(
        "cosine", "learning rate after the warm-up; wsd: constant, then a decay"
    )
    warmup_frac: float = scheduled(
        0.0, "fraction of the steps in which the learning rate rises from 0", ge=0, le=1
    )
    warmup_iters: int = scheduled(0, "number of warm-up steps; 0: use warmup_frac", ge=0, le=1_000_000_000)
    decay_frac: float = scheduled(
        0.2, "wsd: fraction of the steps, at the end, in which the learning rate falls", ge=0, le=1
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = scheduled(
        "linear", "wsd: shape of the decay; sqrt: 1 - sqrt(progress)"
    )
    min_lr_frac: float = scheduled(
        0.0, "final learning rate as a fraction of the peak learning rate", ge=0, le=1
    )

    # -- regularisation
    dropout: float = scheduled(
        0.0, "dropout of the embedding; also the default of attn_dropout and resid_dropout", ge=0, lt=1
    )
    attn_dropout: float | None = scheduled(
        None, "dropout of the attention weights; unset: same as dropout", ge=0, lt=1
    )
    resid_dropout: float | None = scheduled(
        None, "dropout of each branch's output; unset: same as dropout", ge=0, lt=1
    )
    stochastic_depth: float = scheduled(
        0.0,
        "fraction of the rows for which a branch of the last layer is left out in training; "
        "layer i of n, counted from 1, has i / n of it",
        ge=0,
        lt=1,
    )
    rdrop: float = scheduled(
        0.0, "weight of R-Drop, the symmetric KL divergence of two passes; 0: one pass", ge=0, le=100
    )
    label_smoothing: float = scheduled(
        0.0, "probability mass that is moved from the target to the whole vocabulary", ge=0, lt=1
    )
    ema: float = scheduled(
        0.0, "decay of the moving average of the weights, which is then scored; 0: off", ge=0, lt=1
    )
    swa: float = scheduled(
        0.0, "fraction of the steps, at the end, whose weights are averaged and scored; 0: off", ge=0, le=1
    )
    ngram: int = scheduled(
        0,
        "score a mixture with an n-gram model of train, which predicts a token from the ngram - 1 tokens "
        "before it; 0: off",
        ge=0,
        le=20,
    )
    ngram_weight: float = scheduled(0.3, "share of the n-gram model in the mixture", gt=0, lt=1)

    # -- growth
    growth: Growth = scheduled(
        Schedule(),
        "changes during the run: { ops = [{ name, value, trigger }, ...] }, or a JSON, YAML or TOML file",
    )

    # -- evaluation and checkpoints
    eval_per_epoch: int = inert(
        3, "evaluations per epoch, in addition to the first and the last step", ge=0, le=10_000
    )
    eval_interval: int = inert(
        0, "steps between two evaluations; 0: use eval_per_epoch", ge=0, le=1_000_000_000
    )
    official_geometry: str = inert(
        "", "batch shape of the official score as ROWSxTOKENS; empty: batch_size x block_size"
    )
    log_every: int = inert(1, "steps between two rows of the training loss", ge=1, le=1_000_000)
    grad_norm_steps: int = inert(
        0, "number of first steps whose rows have the gradient norm of each layer", ge=0, le=1_000_000
    )
    checkpoint_every: int = inert(
        0, "steps between two checkpoints; 0: one checkpoint per epoch", ge=0, le=1_000_000_000
    )
    token_scores: bool = inert(
        False,
        "write the log-probability of each held-out token at the end of the run, for `mainrun ensemble`",
    )

    # -- validation
    @field_validator("growth", mode="plain")
    @classmethod
    def _check_growth(cls, value: Any, info: ValidationInfo) -> Schedule:
        """Read a growth schedule. Report syntax errors together with ops that cannot be applied."""
        faults: list[Fault] = []
        schedule = value
        if not isinstance(value, Schedule):
            schedule, faults = read(value)
        fields_before = list(cls.model_fields).index("growth")
        # ops cannot be checked if another field of the config is invalid
        if schedule.ops and len(info.data) == fields_before:
            faults = faults + cls._faults_of_ops(schedule, info.data)
        if faults:
            faults.sort(key=lambda fault: fault[0])
            raise ValueError("\n".join(f"growth: {text}" for _, text in faults))
        return schedule

    @classmethod
    def _faults_of_ops(cls, schedule: Schedule, fields: dict[str, Any]) -> list[Fault]:
        try:
            start = cls(**fields)
        except ValidationError:  # _check_combinations reports this error
            return []
        return walk(start, schedule.ops)[1]

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        self._check_heads()
        self._check_rotation()
        self._check_layers()
        self._check_pattern()
        self._check_low_rank()
        self._check_batch()
        self._check_regularisation()
        self._check_decay()
        self._check_warmup()
        self._check_geometry()
        self._check_corpus()
        self._check_tokenizer()
        self._check_start()
        self._check_shard()
        self._check_members()
        self._check_ngram()
        return self

    def _check_heads(self) -> None:
        if not self.head_dim and self.d_model % self.n_head:
            raise ValueError(
                f"n_head={self.n_head} does not divide d_model={self.d_model}; {self._fix_of_heads()}"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}; "
                "set n_kv_head to 0 or to a divisor of n_head"
            )
        if self.position == "rope" and self.head_width % 2:
            if self.head_dim:
                got = f"head_dim = {self.head_dim}; change head_dim"
            else:
                got = f"d_model/n_head = {self.head_width}; change d_model or n_head"
            raise ValueError(f"position=rope needs an even head width, got {got}")

    def _check_rotation(self) -> None:
        if self.rope_share < 1 and self.position != "rope":
            raise ValueError(
                f"rope_share={self.rope_share} needs position=rope, but position={self.position} rotates no "
                "channels; set position=rope or rope_share=1"
            )
        if not self.key_shift or self.rotated_channels < self.head_width:
            return
        fix = "set rope_share=0.5"
        if self.position != "rope":
            fix = "set position=rope and rope_share=0.5"
        if self.head_width < 4:
            fix = "make the heads wider with head_dim=4 and rope_share=0.5"
        raise ValueError(
            f"key_shift=true needs channels that are not rotated, but position={self.position} with "
            f"rope_share={self.rope_share} leaves none of the {self.head_width} channels of a head; "
            f"{fix}, or set key_shift=false"
        )

    def _fix_of_heads(self) -> str:
        """Suggest values of n_head that fit d_model, and a value of d_model that fits n_head."""
        width = 2 * self.n_head * max(1, round(self.d_model / (2 * self.n_head)))
        fitting = [n for n in range(1, self.d_model // 2 + 1) if self.d_model % (2 * n) == 0]
        if not fitting:
            return f"set d_model={width}"
        fitting.sort(key=lambda n: (abs(n - self.n_head), n))
        return f"set n_head to one of {sorted(fitting[:3])}, or d_model={width}"

    def _check_layers(self) -> None:
        if self.unet and self.n_layer < 2:
            raise ValueError(
                f"unet=true needs two layers to connect, but n_layer={self.n_layer}; "
                "set n_layer to 2 or more, or unet=false"
            )
        if self.experts and self.top_k > self.experts:
            raise ValueError(
                f"top_k={self.top_k} is larger than experts={self.experts}; "
                "lower top_k, or set experts=0 for a dense MLP"
            )
        allowed = sorted({layer for layer in self.frozen if layer < self.n_layer})
        if list(self.frozen) != allowed:
            raise ValueError(
                f"frozen={list(self.frozen)} is not allowed with n_layer={self.n_layer}; "
                f"list different layers of 0..{self.n_layer - 1} in ascending order"
            )

    def _check_pattern(self) -> None:
        pattern = self.block_pattern
        got = f"block_pattern={inputs.shown(pattern, 80)}"
        unknown = sorted({letter for letter in pattern if letter not in LETTERS})
        if unknown:
            known = ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())
            raise ValueError(f"{got} contains {unknown[0]!r}; use the letters {known}")
        if not 1 <= len(pattern) <= self.n_layer:
            raise ValueError(
                f"{got} has {len(pattern)} letters for n_layer={self.n_layer} layers; "
                "write at most one letter per layer, because the pattern is repeated over the layers"
            )
        if pattern[0] != "D":
            raise ValueError(f"{got} makes the first layer {pattern[0]!r}; begin the pattern with D")
        letters = self.letters
        for layer in self.routed_layers:
            if letters[layer] == "S" and letters[layer - 1] != "D":
                raise ValueError(
                    f"{got} puts S in layer {layer} after {letters[layer - 1]!r} (layers: {letters}); "
                    "put a D before each S, because S measures the change made by the preceding D block"
                )

    def _check_low_rank(self) -> None:
        if self.mlp_lora_rank and self.experts:
            raise ValueError(
                f"mlp_lora_rank={self.mlp_lora_rank} cannot be combined with experts={self.experts}, because "
                "experts have no low-rank terms; set one of them to 0"
            )
        if self.base_frozen and not self._has_adapters():
            raise ValueError(
                f"base_frozen=true with frozen={list(self.frozen)} leaves nothing to train; set "
                "attn_lora_rank, mlp_lora_rank or embed_lora_rank, use a block_pattern with M, S or T, "
                "unfreeze a layer that has one of these, or set base_frozen=false"
            )

    def _has_adapters(self) -> bool:
        """Whether a part of the model trains if the base is frozen: a low-rank term or a router."""
        if self.embed_lora_rank:
            return True
        if self.attn_lora_rank or self.mlp_lora_rank or self.experts:
            return len(self.frozen) < self.n_layer
        return any(layer not in self.frozen for layer in self.routed_layers)

    def _check_batch(self) -> None:
        if self.max_steps and self.growth.ops:
            raise ValueError(
                f"max_steps={self.max_steps} cannot be combined with a growth schedule, "
                "because a growth schedule spans all epochs; set max_steps=0"
            )
        if self.batch_size % self.grad_accum:
            raise ValueError(
                f"grad_accum={self.grad_accum} does not divide batch_size={self.batch_size}; "
                "set grad_accum to a divisor of batch_size"
            )

    def _check_regularisation(self) -> None:
        if self.ema and self.swa:
            raise ValueError(
                f"ema={self.ema} and swa={self.swa} are both on, but only one average can be scored; "
                "set one of them to 0"
            )
        if self.rdrop and not any((*self.dropouts, self.stochastic_depth)):
            raise ValueError(
                f"rdrop={self.rdrop} needs dropout, because R-Drop compares dropout masks; "
                "set dropout > 0 or stochastic_depth > 0"
            )
        for name in ("rdrop", "label_smoothing"):
            value = getattr(self, name)
            if self.unused_ids and value:
                raise ValueError(
                    f"unused_ids={self.unused_ids} and {name}={value} cannot be combined, because unused "
                    "ids have probability 0 and the loss would be infinite; set one of them to 0"
                )

    def _check_decay(self) -> None:
        if self.cautious_decay and not OPTIMIZERS[self.optimizer].cautious:
            able = [name for name, spec in OPTIMIZERS.items() if spec.cautious]
            raise ValueError(
                f"cautious_decay=true and optimizer={self.optimizer} cannot be combined, because only "
                f"{' and '.join(able)} can decay a part of the weights; "
                f"use optimizer={' or '.join(able)}, or cautious_decay=false"
            )

    def _check_warmup(self) -> None:
        if self.schedule == "wsd" and self.warmup_frac + self.decay_frac > 1:
            raise ValueError(
                f"warmup_frac={self.warmup_frac} and decay_frac={self.decay_frac} overlap; "
                "their sum must be at most 1"
            )

    def _check_geometry(self) -> None:
        rows, length = self.geometry
        if rows < 1 or not 1 <= length <= self.block_size:
            raise ValueError(
                f"official_geometry={self.official_geometry!r} is not allowed; "
                f"write ROWSxTOKENS, such as 64x128, with at most block_size={self.block_size} tokens"
            )

    def _check_tokenizer(self) -> None:
        kind, _, folder = self.tokenizer.partition(":")
        if self.case == "marked" and kind == "hf":
            raise ValueError(
                f"case=marked cannot be combined with tokenizer={inputs.shown(self.tokenizer)}, because the "
                "tokenizer of a checkpoint has no signs for capitals; set case=kept, or tokenizer to bpe or "
                "unigram"
            )
        if self.tokenizer in ("bpe", "unigram") or (kind == "hf" and folder):
            return
        raise ValueError(
            f"tokenizer={inputs.shown(self.tokenizer)} is not a tokenizer; use bpe, unigram or hf:DIR, "
            "where DIR contains a tokenizer.json"
        )

    def _check_start(self) -> None:
        kind, _, folder = self.start.partition(":")
        if self.start and not (kind in ("hf", "run") and folder):
            raise ValueError(
                f"start={inputs.shown(self.start)} is not a start; use hf:DIR (a Qwen2 checkpoint), "
                "run:DIR (the folder of a run), or leave it empty to start from random weights"
            )
        if kind == "hf" and not self.tokenizer.startswith("hf:"):
            raise ValueError(
                f"start={inputs.shown(self.start)} needs the tokenizer of a checkpoint, but "
                f"tokenizer={self.tokenizer}; set tokenizer=hf:DIR to the folder of the checkpoint"
            )

    def _check_shard(self) -> None:
        if not self.shard:
            return
        if not OPTIMIZERS[self.optimizer].elementwise:
            raise ValueError(
                f"shard=true and optimizer={self.optimizer} cannot be combined, because {self.optimizer} "
                "needs whole matrices and each process has only a part; use optimizer=adamw or shard=false"
            )
        if self.growth.ops:
            raise ValueError(
                "shard=true and a growth schedule cannot be combined, because growth replaces whole weights; "
                "remove the growth schedule, or set shard=false"
            )
        if self.experts:
            raise ValueError(
                f"shard=true and experts={self.experts} cannot be combined; set experts=0 or shard=false"
            )
        if self.compile == "on":
            raise ValueError("shard=true and compile=on cannot be combined; set compile=off or shard=false")

    def _check_members(self) -> None:
        """Refuse what only a single model supports."""
        if self.members == 1:
            return
        single = {
            "a growth schedule": (bool(self.growth.ops), "remove the growth schedule"),
            "shard=true": (self.shard, "set shard=false"),
            f"start={inputs.shown(self.start)}": (bool(self.start), "leave start empty"),
            f"block_pattern={self.block_pattern}": (bool(self.routed_layers), "set block_pattern=D"),
            "low-rank terms": (self.has_low_rank, "set all fields that end with lora_rank to 0"),
            "base_frozen=true": (self.base_frozen, "set base_frozen=false"),
        }
        for what, (is_set, fix) in single.items():
            if is_set:
                raise ValueError(
                    f"members={self.members} and {what} cannot be combined; set members=1, or {fix}"
                )

    def _check_ngram(self) -> None:
        if not self.ngram:
            return
        if self.growth.ops:
            raise ValueError(
                f"ngram={self.ngram} and a growth schedule cannot be combined; "
                "set ngram=0, or remove the growth schedule"
            )
        if self.shard:
            raise ValueError(
                f"ngram={self.ngram} and shard=true cannot be combined; set ngram=0 or shard=false"
            )
        if self.routed_layers:
            raise ValueError(
                f"ngram={self.ngram} and block_pattern={self.block_pattern} cannot be combined; "
                "set ngram=0 or block_pattern=D"
            )

    def _check_corpus(self) -> None:
        if not sources.is_source(self.corpus):
            allowed = ", ".join(sources.syntaxes())
            raise ValueError(f"corpus={self.corpus!r} is not a corpus; use {allowed} or {sources.MIX}")
        if self.documents and not sources.has_documents(self.corpus):
            raise ValueError(
                f"documents=true cannot be combined with corpus={self.corpus}, which consists of titles; "
                "set documents=false, or use a corpus of the form file:, hub: or mix:"
            )

    # -- derived values
    def changed(self, **fields: Any) -> Self:
        """Return a copy of the config with changed fields and without a growth schedule.

        Raise ValueError if a value is invalid.
        """
        try:
            return type(self)(**self.model_dump(exclude={"growth"}) | fields)
        except ValidationError as e:
            raise ValueError("; ".join(_explain(error) for error in e.errors())) from None

    @property
    def segment_configs(self) -> tuple[TrainConfig, ...]:
        """The configs of all segments. The first segment starts at step 0. Each op starts a new segment."""
        applied, _ = walk(self, self.growth.ops)
        return (self, *(op.cfg for op in applied))

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_head

    @property
    def rotated_channels(self) -> int:
        """The number of channels of a head that `position=rope` rotates."""
        return max(2, 2 * round(self.rope_share * self.head_width / 2))

    @property
    def skips(self) -> int:
        """The number of layers in the first half that feed a layer of the second half."""
        return self.n_layer // 2 if self.unet else 0

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def ff_width(self) -> int:
        if self.d_ff:
            return self.d_ff
        if self.mlp == "swiglu":
            return -(-8 * self.d_model // 3 // 64) * 64
        return 4 * self.d_model

    @property
    def letters(self) -> str:
        """The kind of each layer, as one letter per layer."""
        repeats = -(-self.n_layer // len(self.block_pattern))
        return (self.block_pattern * repeats)[: self.n_layer]

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers whose blocks have a router."""
        return tuple(layer for layer, letter in enumerate(self.letters) if letter != "D")

    @property
    def has_low_rank(self) -> bool:
        """Whether the model has low-rank terms."""
        return bool(self.attn_lora_rank or self.mlp_lora_rank or self.embed_lora_rank)

    @property
    def prior_width(self) -> int:
        """The hidden width of the predictors of S and T, which is even."""
        width = math.ceil(self.d_model * self.prior_factor - 1e-9)
        return max(2, width + width % 2)

    @property
    def dropouts(self) -> tuple[float, float, float]:
        """The dropout rates of the embedding, the attention weights and the branch outputs."""
        attention = self.attn_dropout
        if attention is None:
            attention = self.dropout
        residual = self.resid_dropout
        if residual is None:
            residual = self.dropout
        return self.dropout, attention, residual

    @property
    def passes(self) -> int:
        """The number of forward passes that each token makes through a model in a training step."""
        return 2 if self.rdrop else 1

    @property
    def presentations(self) -> int:
        """The number of times that a training step presents each token: once per pass of each member."""
        return self.passes * self.members

    @property
    def geometry(self) -> tuple[int, int]:
        """The batch shape of the official score: (rows, tokens), or (0, 0) if the field cannot be parsed."""
        if not self.official_geometry:
            return self.batch_size, self.block_size
        rows, _, length = self.official_geometry.partition("x")
        if rows.isdecimal() and length.isdecimal():
            return int(rows), int(length)
        return 0, 0

    @property
    def mixture(self) -> tuple[float, ...]:
        """The order and the weight of the n-gram model that is mixed into the scores."""
        return (self.ngram, self.ngram_weight) if self.ngram else ()

    @property
    def digest(self) -> str:
        """The SHA-256 hash of all fields except `preset`."""
        return digest_of(self.model_dump())

    @property
    def run_id(self) -> str:
        return f"{self.preset.replace(':', '-')}-{self.digest[:8]}"

    @classmethod
    def class_of(cls, field: str) -> str:
        """Return the class of a field: "static", "scheduled" or "inert"."""
        extra = cls.model_fields[field].json_schema_extra
        assert isinstance(extra, dict)
        return str(extra["class"])


def mixture_of(fields: Any) -> tuple[Any, ...]:
    """Return the property `mixture` of a config that is given as a dict, possibly by another version."""
    if not isinstance(fields, dict) or not fields.get("ngram"):
        return ()
    return fields["ngram"], fields.get("ngram_weight")


def digest_of(fields: dict[str, Any]) -> str:
    """Return the digest of a config that is given as a dict, possibly by another version of mainrun."""
    hashed = {name: value for name, value in fields.items() if name != "preset"}
    return sha256_json(hashed)


def from_dict(fields: dict[str, Any]) -> TrainConfig:
    """Build a config from a dict of fields. Raise ConfigError if a field is invalid."""
    fields = fields | {"preset": str(fields.get("preset", "custom"))}
    growth = fields.get("growth")
    if isinstance(growth, str):
        fields["growth"] = from_text(growth)
    tokenizer = fields.get("tokenizer")
    if isinstance(tokenizer, str) and tokenizer.startswith(foreign.PREFIX) and "vocab_size" not in fields:
        folder = foreign.folder_of(tokenizer)
        fields["vocab_size"] = foreign.read_checkpoint(folder).rows
    try:
        return TrainConfig(**fields)
    except ValidationError as e:
        raise ConfigError("\n".join(inputs.first_ten(_explained(e), "faults"))) from None


# -- messages


def _explained(e: ValidationError) -> Iterator[str]:
    """Yield each fault once. Only the first ten faults have suggestions, which are slow to compute."""
    seen: set[str] = set()
    for error in e.errors():
        text = _explain(error, suggest=len(seen) < 10)
        if text not in seen:
            seen.add(text)
            yield text


def _explain(error: Any, suggest: bool = True) -> str:
    """Return the message for one pydantic error."""
    name = str(error["loc"][0]) if error["loc"] else ""
    kind = error["type"]
    if kind == "extra_forbidden":
        suggestion = _suggestion(name) if suggest else ""
        return (
            f"unknown field {inputs.shown(name, 80)}{suggestion}; `mainrun presets --fields` lists all fields"
        )
    if kind == "value_error":  # a validator of TrainConfig wrote the whole message
        return str(error["ctx"]["error"])
    problem = error["msg"].lower()
    if kind.startswith("bool"):
        problem = "write true or false"
    doc = TrainConfig.model_fields[name].description
    return f"{name}={inputs.shown(error['input'])} is not allowed: {problem} ({name}: {doc})"


def _suggestion(name: str) -> str:
    """Suggest a field with a similar name, or a field whose description contains the name."""
    similar = nearest(name, TrainConfig.model_fields)
    if similar:
        return similar
    words = name.lower().replace("_", " ")
    for field, info in TrainConfig.model_fields.items():
        if words in str(info.description):
            return f" (did you mean {field!r}: {info.description}?)"
    return ""
