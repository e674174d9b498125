"""Triton kernels and their launch functions, one op a file; installed as ``msp.triton_kernels``.

Uses torch and Triton and nothing of ``msp``: group sizes, levels and shapes are plain integers and are not checked
here, since ``msp.ops`` has checked them.
"""
