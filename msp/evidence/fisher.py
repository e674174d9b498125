"""The sensitivity of the loss to each linear: Fisher traces and diagonals, computed by hooks without ``.grad``.

A linear has inputs x ``[T, K]`` and gradients g ``[T, R]`` of its outputs. The weight's gradient over one sequence is
``g^T x``. The fisher ops square and sum this product and never hold it for the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from msp import ops
from msp.errors import MspError, UsageError
from msp.models.structure import Linear

ProgressCallback = Callable[[int, int], object]
Consume = Callable[[Linear, Tensor, Tensor], None]

# Share of the free device memory that `fisher_diagonals` may fill with accumulators.
RESIDENT_SHARE = 0.5


def adding_to(traces: dict[str, float]) -> Consume:
    """A function that adds a linear's ``fisher_trace`` to its entry in ``traces``."""

    def consume(linear: Linear, x: Tensor, g: Tensor) -> None:
        traces[linear.name] += float(ops.fisher_trace(x, g))

    return consume


def fisher_traces(
    model: nn.Module,
    linears: Sequence[Linear],
    windows: Tensor,
    *,
    progress: ProgressCallback | None = None,
) -> dict[str, float]:
    """``S_l = (1/S) sum_s ||dL_s/dW_l||_F^2``: the trace of the empirical Fisher matrix per linear.

    L_s is the mean next-token cross-entropy of sequence s, one squared gradient per sequence
    (arXiv 2503.11164; DESIGN section 6). Costs a forward, a backward to the activations and the op;
    memory beyond that backward is the inputs of ``linears`` for one sequence.

    Args:
        model: a causal LM; its mode, ``requires_grad`` flags and ``.grad`` are not changed.
        linears: the linears to measure; nothing else is hooked. A linear that the model never calls has trace 0.
        windows: integer token ids ``[S, T]``, T >= 2.
        progress: called as ``progress(done, total)`` after each sequence.

    Raises:
        UsageError: ``windows`` is empty, not ``[S, T]`` or not integers.
        MspError: the loss or a gradient is NaN or infinite; the message names the sequence or the linear.
    """
    traces = {linear.name: 0.0 for linear in linears}

    scale = _each_sequence(model, linears, windows, adding_to(traces), progress)
    return {name: trace * scale for name, trace in traces.items()}


def fisher_diagonals(
    model: nn.Module,
    linears: Sequence[Linear],
    windows: Tensor,
    *,
    progress: ProgressCallback | None = None,
) -> dict[str, Tensor]:
    """``F_l = (1/S) sum_s (dL_s/dW_l)^2`` per linear: fp32 ``[R, K]`` in host memory.

    The arguments, errors and the loss are those of ``fisher_traces``. On an accelerator, the accumulators that fit
    into half of the free device memory stay on the device; the others are added up on the host.
    """
    totals = {linear.name: torch.zeros(linear.shape, device=home) for linear, home in _homes(linears)}

    def consume(linear: Linear, x: Tensor, g: Tensor) -> None:
        total = totals[linear.name]
        if total.device == x.device:
            ops.fisher_diag_(total, x, g)
        else:
            total += ops.fisher_diag_(torch.zeros(linear.shape, device=x.device), x, g).to(total.device)

    scale = _each_sequence(model, linears, windows, consume, progress)
    return {name: total.mul_(scale).cpu() for name, total in totals.items()}


def _homes(linears: Sequence[Linear]) -> Iterator[tuple[Linear, torch.device]]:
    """Yield each linear with the device of its accumulator."""
    room: dict[torch.device, float] = {}
    for linear in linears:
        device = linear.weight.device
        if device not in room:
            room[device] = _free_memory(device) * RESIDENT_SHARE
        needed = 4 * linear.weight.numel()
        if needed <= room[device]:
            room[device] -= needed
            yield linear, device
        else:
            yield linear, torch.device("cpu")


def _free_memory(device: torch.device) -> float:
    if device.type == "cpu":
        return float("inf")
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0.0


def _each_sequence(
    model: nn.Module,
    linears: Sequence[Linear],
    windows: Tensor,
    consume: Consume,
    progress: ProgressCallback | None,
) -> float:
    """Pass (x, g) of every linear and sequence to ``consume``; return the factor that scales a sum of squares.

    The backward starts from the *sum* of the cross-entropy over tokens, because the gradients of the mean are T times
    smaller and underflow in float16. The returned factor corrects for that.
    """
    check_windows(windows)
    sequences, tokens = windows.shape
    embeddings = _input_embeddings(model)
    device = next(embeddings.parameters()).device
    # The caller may be in inference mode, and a backward does not accept tensors of inference mode.
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), Tap(embeddings, linears, consume) as tap:
        for index in range(sequences):
            window = windows[index : index + 1].clone().to(device)
            tap.backward(sequence_loss(model(input_ids=window, use_cache=False).logits, window, index))
            if progress is not None:
                progress(index + 1, sequences)
    return 1.0 / (sequences * (tokens - 1) ** 2)


def check_windows(windows: Tensor) -> None:
    """Raise ``UsageError`` if ``windows`` is not ``[S, T]`` token ids with tokens to predict."""
    if windows.ndim != 2 or windows.is_floating_point() or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(
            f"windows must be integer token ids [S, T] with S >= 1 and T >= 2; "
            f"got {windows.dtype} of shape {list(windows.shape)}"
        )


def sequence_loss(logits: Tensor, window: Tensor, index: int) -> Tensor:
    """The sum of the next-token cross-entropy over ``window [1, T]``.

    Raises:
        MspError: the sum is not finite; the message names sequence ``index``.
    """
    targets = window[0, 1:].to(logits.device)
    loss = functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum")
    if not torch.isfinite(loss):
        raise MspError(f"sequence {index}: the loss is {loss.item()}")
    return loss


def _input_embeddings(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if not isinstance(embeddings, nn.Module):
        raise MspError(f"{type(model).__name__} does not say which module embeds its input tokens")
    return embeddings


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode, and no parameter requires a gradient."""
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training


class Tap:
    """Records (x, g) of each linear during a forward and a backward, and passes them to ``consume``.

    Gradients flow back to the output of ``embeddings``. If it is None, they flow to the tensors from ``with_gradient``.

    If a forward calls a linear several times, at one place or at several, its calls are joined along T, because the
    gradient is the sum over the calls. x and g are freed as soon as the last call has its g.
    """

    def __init__(self, embeddings: nn.Module | None, linears: Sequence[Linear], consume: Consume) -> None:
        self._embeddings = embeddings
        self._linears = linears
        self._consume = consume
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sources: list[Tensor] = []
        self._calls: dict[str, list[_Call]] = {}

    def __enter__(self) -> Tap:
        if self._embeddings is not None:
            hook = self._embeddings.register_forward_hook(lambda module, inputs, output: self.with_gradient(output))
            self._handles.append(hook)
        for linear in self._linears:
            self._handles += [module.register_forward_hook(self._watch(linear)) for module in linear.modules]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._calls.clear()
        self._sources.clear()

    def backward(
        self, output: Tensor | Sequence[Tensor], gradient: Sequence[Tensor] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Run the backward from ``output``, and pass every linear to ``consume``.

        Args:
            output: a loss, or tensors with one ``gradient`` each.

        Returns:
            The gradients of the tensors from ``with_gradient``, in order; usually of the embeddings. A gradient is None
            if ``output`` does not depend on the tensor.
        """
        outputs = [output] if isinstance(output, Tensor) else list(output)
        pairs = [
            (each, None if gradient is None else gradient[number])
            for number, each in enumerate(outputs)
            if each.requires_grad
        ]
        kept, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(kept, self._sources, None if gradient is None else given, allow_unused=True)
        # These linears have a call whose output did not reach the loss.
        for linear in self._linears:
            self._finish(linear)
        self._calls.clear()
        self._sources.clear()
        return found

    def with_gradient(self, output: Tensor) -> Tensor:
        """A copy of ``output`` that may be changed in place; its gradients flow to a new leaf tensor."""
        source = output.detach().requires_grad_()
        self._sources.append(source)
        return source.clone()

    def _watch(self, linear: Linear) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output  # the model itself excludes this call from its gradient
            if not output.requires_grad:
                # The input, for example a relative position, does not depend on the embeddings; the loss may use it.
                output = self.with_gradient(output)
            elif output._is_view():
                # An in-place change of a view rewrites its graph and would drop the hook below.
                output = output.clone()
            call = _Call(inputs[0].detach())
            calls = self._calls.setdefault(linear.name, [])
            calls.append(call)
            # Autograd runs hooks in its own threads, in which a forced backend is not set.
            context = copy_context()

            def receive(g: Tensor) -> None:
                call.g = g.detach()
                if all(other.g is not None for other in calls):
                    context.run(self._finish, linear)

            output.register_hook(receive)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _finish(self, linear: Linear) -> None:
        rows, columns = linear.shape
        joined = [
            (call.input(linear.name).reshape(-1, columns), call.g.reshape(-1, rows))
            for call in self._calls.pop(linear.name, [])
            if call.g is not None
        ]
        joined = [pair for pair in joined if len(pair[0])]
        if not joined:
            return
        x, g = (torch.cat(parts)[None] if len(parts) > 1 else parts[0][None] for parts in zip(*joined, strict=True))
        if x.dtype != g.dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            x, g = x.float(), g.float()
        try:
            self._consume(linear, x, g)
        except UsageError:
            raise
        except ValueError as error:
            raise MspError(f"{linear.name}: {error}") from error


class _Call:
    """One call of a linear: its input, and later the gradient of its output."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._version = x._version
        self.g: Tensor | None = None

    def input(self, name: str) -> Tensor:
        # The input is kept without a copy, so it is checked for in-place changes, as autograd checks its own.
        if self._x._version != self._version:
            raise MspError(f"{name}: the model overwrote this linear's input in place before the backward")
        return self._x
