"""The parts of ``make gpu-check``; ``__main__`` describes them."""
