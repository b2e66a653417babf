"""What no preset needs of a model, or of what is scored."""
