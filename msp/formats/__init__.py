"""How weights are stored: integers and plain torch, below the ops."""

from msp.formats import int_values as int_values  # ways to write values: importing one registers it
