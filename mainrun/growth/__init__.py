"""How a model grows while it trains: what is asked, whether it can be, and what it does."""
