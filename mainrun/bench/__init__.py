"""Benchmarks of training steps, of whole runs on a GPU, and of the store that shares steps between runs."""
