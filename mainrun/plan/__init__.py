"""The plan of a run, worked out before the run starts. Nothing in this folder imports torch."""
