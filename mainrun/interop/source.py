"""The model of a run that is exported, and whether Qwen2 can express it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mainrun.config import TrainConfig
from mainrun.data.tokenizer import Tokenizer
from mainrun.errors import UsageError
from mainrun.store.checkpoint import sha256_tensors
from mainrun.store.rundir import RunDir
from mainrun.train import Model
from mainrun.ui.sample import load_scored_state


@dataclass(frozen=True)
class ExportedModel:
    """The model that is exported, and its run."""

    run: RunDir
    run_cfg: TrainConfig  # the config that the run began with
    model: Model  # with the scored weights, which are averages in a run with EMA or SWA
    tokenizer: Tokenizer
    step: int
    finished: bool  # whether the run is finished
    summary: dict[str, Any] | None  # None if it does not exist, or if it is about other weights
    dtype: torch.dtype  # of the exported weights

    @property
    def cfg(self) -> TrainConfig:
        """The config of the model, which differs from the config of the run if the model grew."""
        return self.model.cfg


def load_source(run: RunDir, dtype: str) -> ExportedModel:
    """Load the model of a run's newest checkpoint."""
    state, tokenizer = load_scored_state(run)
    summary = run.summary()
    finished = summary is not None
    if summary is not None:
        weights = sha256_tensors(iter(state.model.named_parameters()))
        if state.step != summary.get("steps") or weights != summary.get("weights"):
            summary = None
    return ExportedModel(
        run, run.config(), state.model, tokenizer, state.step, finished, summary, getattr(torch, dtype)
    )


def check_expressible(cfg: TrainConfig) -> None:
    """Raise UsageError with all reasons if Qwen2 cannot express the model of a config."""
    reasons = inexpressible(cfg)
    if reasons:
        raise UsageError(
            "Qwen2 cannot express this model: " + "; ".join(reasons) + "; train a run with other values to "
            "export it (`mainrun presets qwen-10m` lists the fields of such a run)"
        )


def inexpressible(cfg: TrainConfig) -> list[str]:
    """Return the fields of a config that a Qwen2 checkpoint cannot express, and the values that it can."""
    required: dict[str, Any] = {
        "norm": "rmsnorm",
        "position": "rope",
        "mlp": "swiglu",
        "bias": False,
        "qkv_bias": True,
        "qk_norm": False,
        "attn_gate": False,
        "layer_scale": 0.0,
        "value_residual": False,
        "value_shortcut": False,
        "x0_shortcut": False,
        "unet": False,
        "rope_share": 1.0,
        "key_shift": False,
        "title_mask": False,
        "softcap": 0.0,
        "experts": 0,
        "unused_ids": 0,
        "members": 1,
        "ngram": 0,
        "case": "kept",
    }
    reasons = []
    for name, value in required.items():
        got = getattr(cfg, name)
        if name == "qkv_bias" and got is None:
            got = cfg.bias
        if got != value:
            reasons.append(f"{name}={_text(got)} (must be {_text(value)})")
    return reasons


def _text(value: Any) -> str:
    """Return a value as it is written after --set."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
