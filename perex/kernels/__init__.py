"""Kernels: the hot loops behind factors, and the choice between ways to compute the same number."""
