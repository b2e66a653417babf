"""Kernels in C++ and Triton."""
