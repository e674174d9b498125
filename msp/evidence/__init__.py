"""Statistics and figures of a model: calibration, Fisher traces, losses, decode times."""
