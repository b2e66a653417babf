"""The functions and classes behind the public names of `mainrun`, for notebooks and scripts."""
