"""The parts of a run: the session, the log, the summary, and the sharing of steps through the store."""
