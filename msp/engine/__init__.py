"""The evolutionary engine: population, operators, fitness and checkpoints. Knows levels, not models."""
