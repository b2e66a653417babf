"""Kernels in C++ (CPU) and Triton (GPU)."""
