"""Text sources, and the calibration, fitness and test tokens that are drawn from them."""
