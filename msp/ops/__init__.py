"""The ops: a plain-torch reference and faster backends behind one function each."""

from msp.formats.packed_weight import CodedWeight, PackedWeight, quantise_values
from msp.ops._dispatch import available_backends, check_environment, force_backend, last_backend
from msp.ops.fisher_diag import fisher_diag_
from msp.ops.fisher_trace import fisher_trace
from msp.ops.linear import nm_linear
from msp.ops.nm_keep import nm_keep
from msp.ops.nm_rank import nm_rank
from msp.ops.nm_select import nm_select
from msp.ops.nm_unpack import nm_unpack
from msp.ops.obs_prune import obs_prune

__all__ = [
    "CodedWeight",
    "PackedWeight",
    "available_backends",
    "check_environment",
    "fisher_diag_",
    "fisher_trace",
    "force_backend",
    "last_backend",
    "nm_keep",
    "nm_linear",
    "nm_rank",
    "nm_select",
    "nm_unpack",
    "obs_prune",
    "quantise_values",
]
