"""What a run has learnt: its model, and titles from it."""

from __future__ import annotations

from pathlib import Path

import torch

from mainrun.errors import RunError
from mainrun.store import checkpoint
from mainrun.store.rundir import RunDir
from mainrun.tokens import EOS, Tokenizer
from mainrun.train import GPT, State, build, mix


def load_model(run: RunDir) -> tuple[GPT, Tokenizer]:
    """The scored weights of a run's newest checkpoint."""
    cfg = run.config()
    if not (run.path / "tokenizer.json").is_file():
        raise RunError(f"{run.path} has no tokenizer.json; restore it, or train the run again with --fresh")
    tokenizer = Tokenizer.from_json((run.path / "tokenizer.json").read_text(encoding="utf-8"))
    found = checkpoint.load_newest(run.checkpoints, lambda meta: "" if meta["digest"] == cfg.digest else "another config's", lambda _: None)
    if found is None:
        raise RunError(f"{run.path} has no usable checkpoint; train it first: the same `mainrun train` command makes one")
    state = State(cfg, build(cfg, tokenizer.vocab_size))
    state.load(found[0], found[1]["step"], found[1]["presented"], found[1].get("growth"))
    state.average.swap()
    return state.model.eval(), tokenizer


@torch.inference_mode()
def sample(run_dir: Path, prompt: str, *, n: int = 1, max_tokens: int = 40, temperature: float = 0.8, seed: int = 0) -> list[str]:
    """n titles that begin with the prompt."""
    model, tokenizer = load_model(RunDir(run_dir))
    given = [EOS, *(int(t) for t in tokenizer.encode([prompt])[:-1])] if prompt else [EOS]
    titles = []
    for i in range(n):
        torch.manual_seed(mix(seed, "sample", i))
        ids = list(given)
        for _ in range(max_tokens):
            logits = model(torch.tensor([ids[-model.cfg.block_size :]]))[0, -1].float()
            if not logits.isfinite().any() or logits.isnan().any():
                raise RunError(f"{run_dir} holds weights that give no probabilities; its run diverged")
            scaled = (logits - logits.max()) / (temperature or 1)  # at most 0: a tiny temperature cannot overflow
            chosen = int(scaled.softmax(-1).multinomial(1) if temperature else logits.argmax())
            if chosen == EOS:
                break
            ids.append(chosen)
        titles.append(tokenizer.decode(ids[1:]))
    return titles
