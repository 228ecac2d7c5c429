"""Kernels in C, for CPUs: what torch's libraries have no operator for. Without a compiler perex installs without."""
