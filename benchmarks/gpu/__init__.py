"""Benchmarks of the GPU kernels: ``runner`` describes how one is written and run."""
