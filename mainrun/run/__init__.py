"""The parts of a run: its session, its log, its summary, and the sharing of steps through the store."""
