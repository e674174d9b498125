"""NaN and infinity are told by the name of the tensor, or of the block, that has them first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msp.base.readable import dtype_name
from msp.errors import MspError

# Tables that models of earlier versions stored, and compute today.
TABLES = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
MASKS = re.compile(r"(^|\.)((cross)?att(n|ention)\.(masked_)?bias|causal_mask)$")

WIDER = "take bfloat16 or float32 (dtype, --dtype)"


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; True for what has no data here or no floats. One read, no temporary."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


def check_finite(tensors: Iterable[tuple[str, Tensor]], before: Callable[[str], Tensor | None] | None = None) -> None:
    """Check that every tensor is finite.

    Args:
        before: the tensor of a name as it is stored, where it was cast since.

    Raises:
        MspError: names the first that is not, and how many of its values are not; or the dtype that would hold them.
    """
    for name, tensor in tensors:
        if is_finite(tensor):
            continue
        count = int((~torch.isfinite(tensor.detach().float())).sum())
        stored = before(name) if before is not None else None
        if stored is not None and stored.dtype != tensor.dtype and is_finite(stored):
            dtype = dtype_name(tensor.dtype)
            raise MspError(f"{name}: {count} of its {tensor.numel()} values overflow in {dtype}: {WIDER}")
        raise MspError(f"{name}: {count} of its {tensor.numel()} values are NaN or infinite")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that are stored; not masks and tables, which may be infinite and are computed anew."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in saved and not MASKS.search(name) and not TABLES.search(name):
            yield name, buffer


def check_figures(figures: Mapping[str, float], model: Any, tokens: Tensor, *, streamed: bool = False) -> None:
    """Check that figures of ``model`` are finite.

    Args:
        figures: by name.
        tokens: int64 ``[B, T]``, to find out on where the first value is that is not.
        streamed: whether the model is not in memory as a whole, so that this cannot be found out.

    Raises:
        MspError: names the figure, and the block whose output is the first that is not finite.
    """
    wrong = ", ".join(f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value))
    if wrong:
        dtype = _dtype(model)
        where = f"a forward in {dtype} overflows{_hint(dtype)}" if streamed else first_not_finite(model, tokens)
        raise MspError(f"{wrong}: {where}")


@torch.inference_mode()
def first_not_finite(model: Any, tokens: Tensor) -> str:
    """What is the first of a forward on ``tokens`` that is not finite, in words that end a message."""
    found: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            if not found and isinstance(tensor, Tensor) and not is_finite(tensor):
                found.append(name)

        return hook

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    watched = [
        (f"{name}.{index}", block)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
        for index, block in enumerate(module)
    ]
    embeddings = model.get_input_embeddings()
    handles = [module.register_forward_hook(note(name)) for name, module in watched]
    if embeddings is not None:
        handles.append(embeddings.register_forward_hook(note("the embeddings")))
    try:
        device = next(model.parameters()).device
        logits = model(input_ids=tokens.to(device), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not found and is_finite(logits):
        return "predictions are finite on the first tokens, but further off than a number can say on all of them"
    dtype = _dtype(model)
    return f"the output of {found[0] if found else 'the head'} is not finite in {dtype}{_hint(dtype)}"


def _dtype(model: Any) -> str:
    return dtype_name(next(model.parameters()).dtype)


def _hint(dtype: str) -> str:
    return f": {WIDER}" if dtype == "float16" else ""
