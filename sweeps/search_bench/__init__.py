"""The benchmark of search methods on recorded tables."""
