"""The names and dtypes of a checkpoint's tensors, as transformers loads them into a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from msp.base.finite import MASKS, TABLES
from msp.base.safetensors_files import TensorHeader
from msp.errors import MspError
from msp.formats.storage import FLOATS


def names_as_loaded(
    model: Any, stored: Iterable[str], quantizer: Any = None
) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Each of ``stored``, the names that transformers loads the tensor to, and whether it only renames it.

    A tensor that is split into several has each of their names. Follows ``convert_and_load_state_dict_in_model`` of
    ``transformers.core_model_loading``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    expected = model.state_dict()
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_source = {source: entry for entry in converters for source in entry.source_patterns}
    for own in stored:
        name, source = rename_source_key(own, renamings, converters, model.base_model_prefix, expected)
        if name not in expected:
            plain, _ = rename_source_key(own, [], [], model.base_model_prefix, expected)
            name, source = (plain, None) if plain in expected else (name, source)
        targets = by_source[source].target_patterns if source is not None else [name]
        yield own, tuple(name.replace(targets[0], target) for target in targets), source is None


def check_all_taken(source: str, model: Any, unknown: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the model takes what is stored, except for what transformers leaves out and tables that it computes.

    Args:
        unknown: names of stored tensors, as transformers would load them, that ``model`` does not have.
        shapes: of the stored tensors by such names.

    Raises:
        MspError: names the first of the others, and how many there are.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    computed = tuple(name for name, _ in model.named_buffers())
    left = sorted(
        name
        for name in set(unknown)
        if not any(pattern.search(name) for pattern in ignored)
        and not (name in computed or f"{model.base_model_prefix}.{name}" in computed)
        and not TABLES.search(name)
        and not (MASKS.search(name) and _is_mask(shapes.get(name, ())))
    )
    if left:
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise MspError(
            f"{source}: {left[0]}{more} of the checkpoint {'have' if more else 'has'} no place in a "
            f"{type(model).__name__}: weights that need them (scales of quantised ones, say) would be wrong"
        )


def _is_mask(shape: tuple[int, ...]) -> bool:
    """A square mask, or the scalar that it masks with; the bias of a linear is neither."""
    return not shape or (len(shape) == 4 and shape[-2] == shape[-1])


@dataclass(frozen=True)
class StoredDtypes:
    """The dtype in which each floating tensor of a model is stored; files may mix them (norms in float32, say).

    Attributes:
        by_name: by the model's own names; packed values have the dtype of the weight they were kept of.
        common: the dtype of most weights, counted by element: what the model as a whole is said to be stored in.
        dense_bytes: of all tensors of the dense model as stored: those of its files that it takes, or else its own.
    """

    by_name: Mapping[str, torch.dtype]
    common: torch.dtype
    dense_bytes: int

    @classmethod
    def of_model(cls, model: nn.Module) -> StoredDtypes:
        """Of a model in memory, which is stored as it is."""
        own = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        counts: Counter[torch.dtype] = Counter()
        for names, tensor in _distinct(model):
            if tensor.is_floating_point():
                counts[own[names[0]]] += tensor.numel()
        return cls(own, _most(counts), sum(tensor.nbytes for _, tensor in _distinct(model)))

    @classmethod
    def of_files(
        cls, model: Any, headers: Mapping[str, TensorHeader], *, dequantised: torch.dtype | None = None
    ) -> StoredDtypes:
        """Of a model whose files have ``headers``, under whatever names.

        Args:
            dequantised: the dtype of weights that are quantised in the files and no longer in ``model``.

        Raises:
            MspError: a floating tensor of the model that is stored as something else, unless it is dequantised.
        """
        found: dict[str, torch.dtype] = {}
        expected = model.state_dict(keep_vars=True)
        dense_bytes = 0
        for stored, names, _ in names_as_loaded(model, headers):
            header = headers[stored]
            taken = [name for name in names if name in expected]
            dense_bytes += header.nbytes if taken else 0
            for name in taken:
                if not expected[name].is_floating_point():
                    continue
                dtype = FLOATS.get(header.dtype, dequantised)
                if dtype is None:
                    raise MspError(f"{stored} is stored as {header.dtype}, which is no dtype of an unquantised weight")
                found[name] = torch.promote_types(found.get(name, dtype), dtype)
        common = dequantised or most_common(headers)
        for aliases, tensor in _distinct(model):
            known = next((found[name] for name in aliases if name in found), None)
            for name in aliases:
                if tensor.is_floating_point():
                    is_weight = isinstance(tensor, nn.Parameter)
                    found.setdefault(name, known or (common if is_weight else tensor.dtype))
        dtypes = cls(found, common, dense_bytes)
        return dtypes if dequantised is None else replace(dtypes, dense_bytes=dtypes.nbytes(model))

    def of(self, name: str) -> torch.dtype:
        """Of the tensor ``name``; the values of a packed linear and its dense weight are stored alike."""
        linear, _, kind = name.rpartition(".")
        other = {"values": f"{linear}.weight", "weight": f"{linear}.values"}.get(kind, name)
        return self.by_name.get(name) or self.by_name.get(other, self.common)

    def of_linear(self, name: str) -> torch.dtype:
        return self.of(f"{name}.weight")

    def nbytes(self, model: nn.Module) -> int:
        """Bytes of all tensors of ``model``, dense or packed, as stored; one under several names counts once."""
        return sum(
            tensor.numel() * (self.of(names[0]).itemsize if tensor.is_floating_point() else tensor.element_size())
            for names, tensor in _distinct(model)
        )


FLOAT32 = StoredDtypes({}, torch.float32, 0)


def most_common(headers: Mapping[str, TensorHeader]) -> torch.dtype:
    """The float dtype of most elements in files with ``headers``; float32 if there is none."""
    counts: Counter[torch.dtype] = Counter()
    for header in headers.values():
        if header.dtype in FLOATS:
            counts[FLOATS[header.dtype]] += torch.Size(header.shape).numel()
    return _most(counts)


def _most(counts: Counter[torch.dtype]) -> torch.dtype:
    return counts.most_common(1)[0][0] if counts else torch.float32


def _distinct(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The tensors of the state dict, each once, with all its names."""
    found: dict[tuple[str, int], tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        address = 0 if tensor.is_meta else tensor.data_ptr()
        key = ("address", address) if address else ("object", id(tensor))
        found.setdefault(key, ([], tensor))[0].append(name)
    return list(found.values())
