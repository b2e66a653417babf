"""Run directories, checkpoints and the store of shared states."""
