"""A run: its options, the opened model, and the answers that allocators and pruners get from it."""
