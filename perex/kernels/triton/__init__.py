"""Fused kernels for GPUs, in Triton: nothing is written but partial sums. Imported when first used, not with perex."""
