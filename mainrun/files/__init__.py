"""Read and check user files, hash files, and lock files between processes."""
