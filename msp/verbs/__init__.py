"""The functions that the command line and the Python interface both call."""
