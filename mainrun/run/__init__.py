"""One run: its session, log, summary, and what it shares with other runs through the store."""
