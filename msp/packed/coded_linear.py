"""The module of a weight whose values are coded, and which module a storage has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from msp.errors import MspError
from msp.formats.storage import Storage
from msp.ops import CodedWeight, PackedWeight, nm_linear
from msp.packed.sparse_linear import SparseLinear


class CodedLinear(SparseLinear):
    """``SparseLinear`` of a weight whose values are not floats: the reference multiplies by it.

    All parts are buffers, which keep their dtypes whatever the model is cast to. Nothing of it can be trained but the
    bias. ``dtype`` is the model's: casts change it, and files have it in the guard.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        storage: Storage,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._begin(in_features, out_features, storage, bias, device, dtype)
        self._dtype = dtype or torch.get_default_dtype()

    @classmethod
    def from_coded(cls, packed: CodedWeight, bias: Tensor | None, dtype: torch.dtype) -> CodedLinear:
        """A module that shares memory with ``packed`` and, where given, ``bias``; in a model of ``dtype``.

        Raises:
            MspError: the parts of ``packed`` do not fit.
        """
        packed.check()
        rows, columns = packed.shape
        module = cls(columns, rows, packed.storage, bias is not None, device="meta", dtype=dtype)
        for name, part in packed.parts.items():
            setattr(module, name, part)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @property
    def parts(self) -> dict[str, Tensor]:
        names = self.storage.packed_parts(self.out_features, self.in_features)
        return {name: getattr(self, name) for name in names}

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def packed(self) -> CodedWeight:
        """The weight as the ops take it; shares memory with the module."""
        return CodedWeight(self.parts, self.storage, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        return self.packed.unpack(self.dtype)

    def settle(self) -> None:
        """Leave the weight as it is: no device has a layout for it."""

    def set_values(self, values: Tensor) -> None:
        raise MspError(f"a linear in {self.storage} takes no other values: they would be rounded")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        before = self.parts
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in before.items():
            if getattr(self, name).dtype != part.dtype:  # a cast is of what the model computes in, not of its files
                setattr(self, name, part.to(getattr(self, name).device))
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nm_linear(x, self.packed, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, storage={self.storage}, bias={self.bias is not None}"


def new_linear(
    storage: Storage, shape: tuple[int, int], bias: bool, *, device: torch.device | str, dtype: torch.dtype
) -> SparseLinear:
    """A module for a weight of ``shape`` in ``storage``, into which a state dict is to be loaded."""
    rows, columns = shape
    if storage.is_coded:
        return CodedLinear(columns, rows, storage, bias, device=device, dtype=dtype)
    assert storage.support is not None
    return SparseLinear(columns, rows, storage.support, bias, device=device, dtype=dtype)


def linear_of(packed: PackedWeight | CodedWeight, bias: Tensor | None, like: nn.Module) -> SparseLinear:
    """A module of ``packed``, in the dtype of the linear ``like``, which had the weight before."""
    if not isinstance(packed, CodedWeight):
        return SparseLinear.from_packed(packed, bias)
    dtype = like.dtype if isinstance(like, SparseLinear) else like.weight.dtype
    assert isinstance(dtype, torch.dtype)
    return CodedLinear.from_coded(packed, bias, dtype)
