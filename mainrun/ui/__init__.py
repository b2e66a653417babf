"""The `mainrun` commands, and the functions that several commands share."""
