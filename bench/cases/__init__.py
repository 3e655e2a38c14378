"""What is measured: the implementations, one layer, a whole model, and single Triton kernels."""
