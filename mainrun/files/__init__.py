"""Utilities that read user files, hash files, and lock files between processes."""
