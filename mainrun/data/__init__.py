"""From a corpus to the batch of a step, and the score of a model on held-out titles."""
