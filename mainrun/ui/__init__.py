"""The commands of the command line, and the functions that they share."""
