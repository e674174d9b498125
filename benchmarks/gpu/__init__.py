"""Benchmarks of the GPU kernels: ``runner`` says how one is written and run."""
