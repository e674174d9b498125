"""``nm_linear``, one op for a weight in any layout and on any device.

The package is not called like the op, because ``msp.ops.nm_linear`` is the function, which ``op`` has. ``rows``,
``tiles``, ``group``, ``fragments`` and ``dense`` have the reference and the backends of each layout, ``plan`` and
``thresholds`` say which kernel serves how many tokens.
"""

from msp.ops.linear.dense import DENSE
from msp.ops.linear.fragments import FRAGMENTS, is_compliant
from msp.ops.linear.group import group_op
from msp.ops.linear.layout import Layout, Size
from msp.ops.linear.op import nm_linear
from msp.ops.linear.rows import ROWS
from msp.ops.linear.tiles import TILES

# The layouts in which a module may hold a weight; the first that serves is the fastest.
LAYOUTS: tuple[Layout, ...] = (DENSE, TILES, ROWS)

__all__ = ["DENSE", "FRAGMENTS", "LAYOUTS", "ROWS", "TILES", "Layout", "Size", "group_op", "is_compliant", "nm_linear"]
