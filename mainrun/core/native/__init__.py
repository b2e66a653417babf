"""Kernels in C++ for a CPU and in Triton for a GPU."""
