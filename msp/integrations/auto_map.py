"""Where ``load_with_msp.py`` of a packed model finds ``PackedConfig``; models on disk name this module."""

from msp.packed.auto_map import PackedConfig as PackedConfig
