"""Read and check user files, compute hashes, and lock files."""
