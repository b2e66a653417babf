"""Benchmarks of a training step, of whole runs on a GPU, and of sharing steps between runs."""
