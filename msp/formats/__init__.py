"""How weights are stored: integers and plain torch, below the ops."""
