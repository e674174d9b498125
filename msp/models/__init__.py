"""The structure of any causal LM, how it is loaded, and how it runs one block at a time."""
