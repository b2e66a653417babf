"""Files that users write, hashes of files, and locks between processes."""
