"""What a run has learnt: its model, and titles from it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from mainrun.data.tokenizer import EOS, Tokenizer
from mainrun.errors import RunError
from mainrun.growth.state import load_state
from mainrun.plan.seeds import seed_from
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.train import GPT, State, build

COLDEST = 1e-30  # below it the likeliest token is chosen, which is the limit: float32 would round the temperature to 0


def load_model(run: RunDir) -> tuple[GPT, Tokenizer]:
    """The scored weights of a run's newest checkpoint."""
    cfg = run.config()
    tokenizer = Tokenizer.from_json(run.text("tokenizer.json"))
    if run.config_file().get("tokenizer", tokenizer.digest) != tokenizer.digest:
        raise RunError(f"{run.path}/tokenizer.json is not the one that the run was trained with; {run.fix}")

    def usable(meta: dict[str, Any]) -> str:
        other = "it belongs to another config" if meta.get("digest") != cfg.digest else ""
        return checkpoint.fault(meta) or other

    passed_over: list[str] = []
    found = checkpoint.load_newest(run.checkpoints, usable, passed_over.append)
    if found is None:
        raise RunError(
            f"{run.path} has no usable checkpoint; train it first: the same `mainrun train` command makes one"
        )
    for text in passed_over:
        warnings.warn(text, stacklevel=3)
    state = State(cfg, build(cfg, tokenizer.vocab_size))
    with checkpoint.fit_errors(f"the checkpoint of step {found[1]['step']} in {run.checkpoints}"):
        load_state(state, found[0], found[1]["step"], found[1]["presented"], found[1].get("growth"))
    state.average.swap()
    return state.model.eval(), tokenizer


@torch.inference_mode()
def sample(
    run_dir: Path, prompt: str, *, n: int = 1, max_tokens: int = 40, temperature: float = 0.8, seed: int = 0
) -> list[str]:
    """n titles that begin with the prompt."""
    model, tokenizer = load_model(RunDir(run_dir))
    given = [EOS, *(int(t) for t in tokenizer.encode([prompt])[:-1])] if prompt else [EOS]
    titles = []
    for i in range(n):
        torch.manual_seed(seed_from(seed, "sample", i))
        ids = list(given)
        for _ in range(max_tokens):
            logits = model(torch.tensor([ids[-model.cfg.block_size :]]))[0, -1].float()
            if not logits.isfinite().any() or logits.isnan().any():
                raise RunError(
                    f"the weights in {run_dir} give no probabilities: they diverged, or were changed; train the run again with --fresh"
                )
            if temperature < COLDEST:
                chosen = int(logits.argmax())
            else:
                scaled = (logits - logits.max()) / temperature  # at most 0: a low temperature cannot overflow
                chosen = int(scaled.softmax(-1).multinomial(1))
            if chosen == EOS:
                break
            ids.append(chosen)
        titles.append(tokenizer.decode(ids[1:]))
    return titles
