"""Growth changes a model while it trains."""
