"""Exchange models with Hugging Face: import, export, push and evaluation of Qwen2 checkpoints."""
