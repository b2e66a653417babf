"""Reading the files of users, hashing files, and locks between processes."""
