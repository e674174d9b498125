"""Packed models: the module, the checkpoint, its files and its card."""
