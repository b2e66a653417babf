"""Generate titles with the model of a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mainrun.config import TrainConfig
from mainrun.data.tokenizer import EOS, Tokenizer
from mainrun.errors import RunError, UsageError
from mainrun.growth.state import load_state
from mainrun.plan.plan import Plan
from mainrun.plan.seeds import seed_from
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.train import Model, State, build

# Below this temperature, the most likely token is always chosen, because float32 rounds the temperature to 0.
MIN_TEMPERATURE = 1e-30


def load_model(run: RunDir) -> tuple[Model, Tokenizer]:
    """Load the model from a run's newest checkpoint, with the weights that evaluations use."""
    state, tokenizer = load_scored_state(run)
    return state.model, tokenizer


def load_scored_state(run: RunDir) -> tuple[State, Tokenizer]:
    """Load the state of a run's newest checkpoint. The model has the weights that evaluations use."""
    cfg = run.config()
    tokenizer = Tokenizer.from_json(run.text("tokenizer.json"))
    if run.config_file().get("tokenizer", tokenizer.digest) != tokenizer.digest:
        raise RunError(f"{run.path}/tokenizer.json is not the tokenizer of the training run; {run.fix}")

    def fault(meta: dict[str, Any]) -> str:
        return checkpoint.fault(meta) or _wrong_config(meta, cfg)

    skipped: list[str] = []
    loaded = checkpoint.load_newest(run.checkpoints, fault, skipped.append)
    if loaded is None:
        reasons = "; ".join(skipped) or "it has none"
        raise RunError(
            f"{run.path} has no usable checkpoint ({reasons}); to write one, repeat its `mainrun train` "
            "command"
        )
    for text in skipped:
        warnings.warn(text, stacklevel=4)
    tensors, meta = loaded
    state = State(cfg, _build_model(run, cfg, tokenizer.vocab_size))
    with checkpoint.fit_errors(f"the checkpoint of step {meta['step']} in {run.checkpoints}"):
        load_state(state, tensors, meta["step"], meta["presented"], meta.get("growth"))
    train_tokens = run.config_file().get("plan", {}).get("train_tokens")
    if train_tokens:
        plan = Plan(cfg, train_tokens, (meta.get("growth") or {}).get("fired", ()))
        state.model.set_inputs(plan.at(max(state.step - 1, 0)), "plain")
    elif cfg.routed_layers:
        problem = "lacks the number of training tokens, which the routed blocks need"
        raise RunError(f"{run.path}/config.json {problem}; {run.fix}")
    state.average.swap()
    state.model.eval()
    return state, tokenizer


def _build_model(run: RunDir, cfg: TrainConfig, vocab_size: int) -> Model:
    """Build the model of a run, before the weights of a checkpoint are loaded.

    Only a frozen base comes from the start, because a checkpoint has all weights of other models.
    """
    if not cfg.start:
        return build(cfg, vocab_size)
    if not cfg.base_frozen:
        return build(cfg.model_copy(update={"start": ""}), vocab_size)
    _check_start(run, cfg)
    return build(cfg, vocab_size)


def _check_start(run: RunDir, cfg: TrainConfig) -> None:
    """Raise RunError unless the start of a run has the weights that the run began with."""
    from mainrun.interop.start import start_digest

    try:
        digest = start_digest(cfg)
    except UsageError as e:
        raise RunError(
            f"{run.path} has a frozen base, which it reads from its start: {e}; restore the start"
        ) from None
    if digest != run.config_file().get("start"):
        raise RunError(
            f"the weights of start={cfg.start} have changed since {run.path} began, so they are not its "
            "frozen base; restore them, or train the run again with --fresh"
        )


def _wrong_config(meta: dict[str, Any], cfg: TrainConfig) -> str:
    """Return the reason why a checkpoint does not belong to a config, or an empty string."""
    return "" if meta.get("digest") == cfg.digest else "it belongs to another config"


@torch.inference_mode()
def sample(
    run_dir: Path, prompt: str, *, n: int = 1, max_tokens: int = 40, temperature: float = 0.8, seed: int = 0
) -> list[str]:
    """Return n titles that begin with the prompt."""
    model, tokenizer = load_model(RunDir(run_dir))
    prefix = [EOS]
    if prompt:
        prefix += [int(token) for token in tokenizer.encode([prompt])[:-1]]  # remove the EOS token at the end
    titles = []
    for i in range(n):
        torch.manual_seed(seed_from(seed, "sample", i))
        tokens = list(prefix)
        for _ in range(max_tokens):
            logits = model(torch.tensor([tokens[-model.cfg.block_size :]]))[0, -1].float()
            if not logits.isfinite().any() or logits.isnan().any():
                raise RunError(
                    f"the weights in {run_dir} give no valid probabilities, because the run diverged or the "
                    "weights were changed; train the run again with --fresh"
                )
            token = _choose(logits, temperature)
            if token == EOS:
                break
            tokens.append(token)
        titles.append(tokenizer.decode(tokens[1:]))
    return titles


def _choose(logits: Tensor, temperature: float) -> int:
    """Choose the next token of a title."""
    if temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    # All values are at most 0, so their exponentials cannot overflow.
    scaled = (logits - logits.max()) / temperature
    return int(scaled.softmax(-1).multinomial(1))
