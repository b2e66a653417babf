"""Scripts that run the search methods of other libraries. Each runs in the environment of its library."""
