"""Mixed Sparsity Pruning: N:M sparsity with a different N for every layer."""

__version__ = "0.1.0"
