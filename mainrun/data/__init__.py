"""Corpora, tokenizers, training batches and the scoring of a model on held-out titles."""
