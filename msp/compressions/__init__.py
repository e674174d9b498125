"""What can be done to a unit: N:M sparsity is the first compression."""
