"""Benchmarks of training steps, of whole runs on a GPU, and of sharing training steps between runs."""
