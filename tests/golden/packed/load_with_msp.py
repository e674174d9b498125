"""Imports msp, which this packed model needs. transformers runs this file with trust_remote_code=True."""

try:
    from msp.integrations.auto_map import PackedConfig
except ImportError as error:
    raise ImportError("this model is packed by msp: pip install mixed-sparsity-pruning") from error
