"""Triton kernels and their launch functions, one op a file; installed as ``msp.triton_kernels``.

Knows torch and Triton and nothing of ``msp``: group sizes, levels and shapes come as plain integers
and are taken as right, since ``msp.ops`` has checked them.
"""
