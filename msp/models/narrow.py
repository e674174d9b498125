"""Weights that keep the 16 bits of their files on a CPU, while everything is computed in float32.

If 16-bit weights are widened to fp32, half of the memory holds zeros. Here a matrix keeps its stored dtype, and a
product widens a few MiB of its rows at a time, which stay in the cache. Every fp16 or bf16 value is also an fp32 value,
so the products are those of an fp32 model. All other tensors (norms, biases, tables) are small and in fp32.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from msp.models.text_forward import Changes, changed_by

NARROW = (torch.float16, torch.bfloat16)
# The bytes of fp32 rows that are made at a time.
WIDENED_BYTES = 8 << 20


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in the dtype of ``x``, or in the dtype of autocast within an autocast context.

    Args:
        x: ``[..., K]``.
        weight: ``[R, K]``, in the dtype of ``x`` or, if that is fp32, in 16 bits.
        bias: ``[R]``, in the dtype of ``x``.

    Returns:
        ``[..., R]``.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return product_of_rows(x, len(weight), lambda rows: weight[rows], bias)


def product_of_rows(x: Tensor, rows: int, take: Callable[[slice], Tensor], bias: Tensor | None = None) -> Tensor:
    """``product`` with a weight of ``rows`` rows; ``take`` returns some of its rows at a time, in any dtype."""
    dtype = x.dtype
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        bias = None if bias is None else bias.to(dtype)
    parts = list(_row_ranges(rows, x.shape[-1]))
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    y = flat.new_empty(len(flat), rows)
    for part in parts:
        weight = _cast(take(part), dtype).t()
        if bias is None:
            torch.mm(flat, weight, out=y[:, part])
        else:
            torch.addmm(bias[part], flat, weight, out=y[:, part])
    return y.view(*x.shape[:-1], rows)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype or weight.is_meta:
        return weight.to(dtype)
    if weight.dtype == torch.float16 and dtype == torch.bfloat16:
        # torch casts fp16 to bf16 value by value, which is five times slower than two casts with fp32 between them
        weight = scratch("wide", weight, torch.float32).copy_(weight)
    return scratch("cast", weight, dtype).copy_(weight)


_scratch = threading.local()


def scratch(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Temporary memory of the shape of ``like``: the next call with ``name`` from this thread returns the same memory.

    If each product widened its rows into new memory, that memory would lie between longer-lived tensors and leave holes
    in the heap. The C library would then need twice as much memory for the activations of a backward.
    """
    held: dict[str, Tensor] = _scratch.__dict__
    key = f"{name} {dtype} {like.device}"
    if key not in held or held[key].numel() < like.numel():
        with torch.inference_mode(False):  # so that code outside inference mode can write to it too
            held[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
    return held[key][: like.numel()].view(like.shape)


def _row_ranges(rows: int, columns: int) -> Iterator[slice]:
    some = max(1, WIDENED_BYTES // (4 * max(columns, 1)))
    for start in range(0, rows, some):
        yield slice(start, min(start + some, rows))


class _Product(torch.autograd.Function):
    """The product that keeps the narrow weight for the backward; autograd alone would keep the wide weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product_of_rows(x, len(weight), lambda rows: weight[rows])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad_y,) = gradients
        x, weight = ctx.saved_tensors
        flat = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = flat.new_zeros(len(flat), weight.shape[1])
            for rows in _row_ranges(*weight.shape):
                grad_x.addmm_(flat[:, rows], _cast(weight[rows], flat.dtype))
            grad_x = grad_x.view(*grad_y.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            grad_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return grad_x, grad_weight


class _Narrow(nn.Module):
    """A module with a narrow weight; it becomes the plain module again if it is cast as a whole (``model.half()``)."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _Narrow:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = self.get_parameter("weight")
        if weight.dtype not in NARROW or fn(weight.new_empty(0, dtype=torch.float32)).dtype != torch.float32:
            self.__class__ = PLAIN[type(self)]  # type: ignore[assignment]
        return self


class NarrowLinear(_Narrow, nn.Linear):
    """An ``nn.Linear`` with a weight in 16 bits, for inputs and a bias in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


class NarrowConv1D(_Narrow, Conv1D):
    """A ``Conv1D`` with a weight in 16 bits, for inputs and a bias in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.t(), self.bias)


class NarrowEmbedding(_Narrow, nn.Embedding):
    """An ``nn.Embedding`` with a weight in 16 bits that returns fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


PLAIN: Mapping[type[nn.Module], type[nn.Module]] = {
    NarrowLinear: nn.Linear,
    NarrowConv1D: Conv1D,
    NarrowEmbedding: nn.Embedding,
}
_NARROW_OF = {plain: narrow for narrow, plain in PLAIN.items()}
LINEARS = (nn.Linear, Conv1D, NarrowLinear, NarrowConv1D)
"""The classes of modules that compute ``x W^T + b`` and nothing else."""


@contextmanager
def narrow_weights(dtype: torch.dtype | None) -> Iterator[None]:
    """Within the context, fp32 weights of new modules are made in ``dtype``; None changes nothing.

    Only plain linears and embeddings on the meta device are changed: transformers makes a model there before it loads
    the weights. Subclasses keep fp32, because their code may use the weight in any way.
    """
    if dtype is None:
        yield
        return

    def narrowed(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if name != "weight" or type(module) not in _NARROW_OF or parameter is None or not parameter.is_meta:
            return None
        if getattr(module, "max_norm", None) is not None or parameter.dtype != torch.float32:
            return None
        return nn.Parameter(parameter.to(dtype), parameter.requires_grad)

    hook: Callable[..., None] = narrowed  # type: ignore[assignment]  # torch uses the returned parameter
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def compute_in_fp32(model: nn.Module) -> None:
    """Make ``model``, built with ``narrow_weights``, compute in fp32; its weights are widened if it cannot.

    A model cannot compute in fp32 with narrow weights if it reads weights without calling their linears, or casts to
    the dtype of a weight. A forward of a few tokens tests this.
    """
    found = [
        module
        for module in model.modules()
        if type(module) in _NARROW_OF and module.get_parameter("weight").dtype in NARROW
    ]
    for module in found:
        module.__class__ = _NARROW_OF[type(module)]
    if found and not _computes_in_fp32(model):
        widen(model)


def widen(model: nn.Module) -> None:
    """Convert the narrow weights of ``model`` to fp32, and its modules to their plain classes."""
    for module in model.modules():
        if type(module) in PLAIN:
            weight = module.get_parameter("weight")
            weight.data = weight.data.float()  # in place, because several modules may share one parameter
            module.__class__ = PLAIN[type(module)]


def computed_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that ``model`` computes in: fp32 if its weights are narrow, else the dtype of its first parameter."""
    if any(type(module) in PLAIN for module in model.modules()):
        return torch.float32
    return next(model.parameters()).dtype


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in ``found`` whether an op outside narrow modules returns values of 16 bits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = 0
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.inside and not func.is_view:
            self.found |= any(isinstance(leaf, Tensor) and leaf.dtype in NARROW for leaf in tree_leaves(output))
        return output

    def enter(self, *_: Any) -> None:
        self.inside += 1

    def leave(self, *_: Any) -> None:
        self.inside -= 1


def _computes_in_fp32(model: nn.Module) -> bool:
    """Whether a forward of a few tokens makes no values of 16 bits outside narrow modules.

    The forward runs on a copy of the model that shares its tensors.
    """
    watch = _Watch()
    try:
        # a first forward may set attributes of the model, so it runs on a copy
        tensors = [*model.parameters(), *model.buffers()]
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        for module in twin.modules():
            if type(module) in PLAIN:
                module.register_forward_pre_hook(watch.enter)
                module.register_forward_hook(watch.leave, always_call=True)
        with watch:
            changes = Changes(changed_by(twin))
    except Exception:  # any error that the model's own code raises if dtypes differ
        return False
    changes.undo(model)
    return not watch.found
