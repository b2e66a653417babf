"""Load corpora, fit tokenizers, make training batches, and score models on held-out titles."""
