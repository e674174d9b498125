"""The module that holds a packed weight and multiplies by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from msp.errors import MspError
from msp.formats.packed_weight import check_stored, pack_bits
from msp.formats.patterns import NMPattern
from msp.formats.positions import check_positions, count_positions
from msp.formats.storage import BITMASK, Storage
from msp.models.structure import weight_identity
from msp.ops import CodedWeight, PackedWeight
from msp.ops.linear import DENSE, LAYOUTS, ROWS, TILES, Layout, Size, group_op, is_compliant
from msp.ops.linear.group import MOST, MOST_TOKENS


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with ``W`` ``[out_features, in_features]`` in the packed form of one pattern.

    ``values`` is a parameter, so ``model.dtype``, parameter counts, casts and offloading treat it as a weight, and it
    can be trained at its fixed positions. It starts frozen, so that a call does not keep its input when adapters
    elsewhere are trained. ``bitmask`` is a buffer, because no cast or optimizer may change it.

    On a CUDA device ``settle`` puts values and bitmask into an order for the kernels (``layout``) of the same size, or
    unpacks a weight if packing saves too few bytes. ``packed``, ``weight`` and the state dict keep the canonical form.

    A new module has zero values at the first N positions of every group. ``from_packed`` makes a module with content.
    When a state dict is loaded, the positions are checked before any kernel reads them.

    Attributes:
        layout: how values and bitmask lie in memory.
        kept: the additional form of the weight for products of many tokens, if ``fast_prefill`` asked for it.
        shared: the linears that are called with the same input, if ``fast_decode`` found some.
        conv1d: whether the architecture has a ``Conv1D`` at this place.
        places: the number of places of the model that share the weight.
    """

    values: nn.Parameter
    bitmask: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: NMPattern | str,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._begin(in_features, out_features, Storage(NMPattern.of(pattern)), bias, device, dtype)

    def _begin(
        self,
        in_features: int,
        out_features: int,
        storage: Storage,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Set all attributes. The parts are zero except the bitmask; parts in the model's dtype are parameters."""
        assert storage.support is not None
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.storage = storage
        self.pattern = storage.support
        self.layout: Layout = ROWS
        self.compliant = self.pattern.always_compliant
        for name, part in storage.packed_parts(out_features, in_features).items():
            if name == BITMASK:
                self.register_buffer(name, self._first_kept(device))
                continue
            zeros = torch.zeros(part.shape, device=device, dtype=part.dtype or dtype)
            if part.dtype is None:
                self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
            else:
                self.register_buffer(name, zeros)
        self.keeps = False
        # not a buffer: it is made again on each device, and code that offloads modules would treat None as a tensor
        self.kept: Tensor | None = None
        self.shared: SharedInput | None = None
        self.conv1d = False
        self.places = 1
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def _first_kept(self, device: torch.device | str | None) -> Tensor:
        """The bitmask that keeps the first N of every group."""
        columns = torch.arange(self.in_features, device=device)
        return pack_bits((columns % self.pattern.m < self.pattern.n)[None]).repeat(self.out_features, 1)

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> SparseLinear:
        """A module that shares memory with ``packed`` and, if it is given, with ``bias`` ``[out_features]``.

        Raises:
            MspError: the bias or the parts of ``packed`` do not fit; no later call checks them.
        """
        rows, columns = packed.shape
        if not packed.bitmask.is_meta:
            packed.check()
        if bias is not None and bias.shape != (rows,):
            raise MspError(f"a bias of shape {list(bias.shape)} for {rows} output features")
        module = cls(columns, rows, packed.pattern, bias is not None, device="meta", dtype=packed.dtype)
        module.values = nn.Parameter(packed.values, requires_grad=False)
        module.bitmask = packed.bitmask
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors of the weight by name, in the current layout."""
        return {"values": self.values, BITMASK: self.bitmask}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def is_offloaded(self) -> bool:
        """Whether a part of the weight is not in memory."""
        return any(part.is_meta for part in self.parts.values())

    @property
    def identity(self) -> int:
        """A number that is equal for modules that share one weight."""
        return id(next(iter(self.parts.values())))

    def share(self, other: SparseLinear) -> None:
        """Replace the parts by those of ``other``, which has an equal weight."""
        for name, part in other.parts.items():
            setattr(self, name, part)

    @property
    def packed(self) -> PackedWeight | CodedWeight:
        """The weight in the canonical form of the ops; it shares memory with the module if the layout is ``rows``."""
        values, bitmask = self._canonical()
        return PackedWeight(values, bitmask, self.pattern, (self.out_features, self.in_features))

    def _canonical(self) -> tuple[Tensor, Tensor]:
        return self.layout.restore(self.values, self.bitmask, self.pattern, self.in_features)

    def settle(self) -> None:
        """Convert the weight to the layout that is fastest on its device.

        It is called when a model is loaded and when a module is moved or cast. A weight that is trained stays in rows.
        """
        frozen = not self.values.requires_grad and not self.values.is_meta
        size = Size(self.pattern, self.out_features, self.in_features, self.values.dtype, self.values.device)
        self._set_layout(next(layout for layout in LAYOUTS if layout.serves(size)) if frozen else ROWS)
        if self.values.is_cuda and self.layout != DENSE and not self.bitmask.is_meta:
            # checked now and not in the first product, because the check waits for the device, which a CUDA graph
            # does not allow
            check_positions(self.bitmask, self.pattern.n, self.pattern.m, self.in_features)
        self.kept = None
        if self.keeps:
            weight = self.values.detach(), self.bitmask, self.pattern, self.in_features
            self.kept = self.layout.for_many_tokens(*weight, self.compliant)

    def _set_layout(self, layout: Layout) -> None:
        if layout == self.layout:
            return
        if self.shared is not None:
            self.shared.part()
        values, bitmask = (part.detach() for part in self._canonical())
        if layout == TILES:
            self.compliant = self.pattern.always_compliant or is_compliant(bitmask, self.pattern.m)
        values, self.bitmask = layout.arrange(values, bitmask, self.pattern, self.in_features)
        self.layout = layout
        self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)

    def set_values(self, values: Tensor) -> None:
        """Replace the values by ``values`` ``[R, K/M*N]``, in row order, at the same positions.

        Raises:
            MspError: the shape, dtype or device differs from that of the current values.
        """
        if self.shared is not None:
            self.shared.part()
        self._set_layout(ROWS)
        for label in ("shape", "dtype", "device"):
            found, needed = getattr(values, label), getattr(self.values, label)
            if found != needed:
                raise MspError(f"values of {label} {found}, needs {needed}")
        self.kept = None
        self.values = nn.Parameter(values.detach(), requires_grad=self.values.requires_grad)
        self.settle()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        self.kept = None  # ``settle`` makes it again if it is needed
        if self.shared is not None:
            self.shared.part()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.settle()
        return self

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked on every access, for model code that reads ``.weight`` directly."""
        return self.packed.unpack()

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None and (found := self.shared.product(self, x)) is not None:
            return found
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if x.dtype == torch.float32 != values.dtype and not x.is_cuda:  # a model whose weights are narrow
            values, bias = values.float(), None if bias is None else bias.float()
        return self.layout.product(
            x, values, self.bitmask, bias, self.pattern, self.in_features, self.compliant, self.kept
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={self.pattern}, bias={self.bias is not None}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != ROWS:
            values, bitmask = self._canonical()
            destination[f"{prefix}values"], destination[f"{prefix}bitmask"] = values.detach(), bitmask

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Parts that do not fit are refused here, before the copy; a single part is checked with the module's other one.
        found = {name: state_dict.get(f"{prefix}{name}") for name in self.parts}
        given = {name: part for name, part in found.items() if isinstance(part, Tensor)}
        if any(not part.is_meta for part in given.values()):
            try:
                self._check_loaded(given, prefix.removesuffix("."))
            except MspError as error:
                error_msgs.append(str(error))
                return
        self._set_layout(ROWS)
        state = dict(state_dict)
        if _is_guard(state.get(f"{prefix}weight")):
            del state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.settle()

    def _check_loaded(self, given: Mapping[str, Tensor], name: str) -> None:
        """Raise ``MspError`` if the loaded parts do not fit together; the module's own parts stand for absent ones."""
        parts = given if given.keys() == self.parts.keys() else {**self.packed.parts, **given}
        shape = self.out_features, self.in_features
        check_stored({label: part.to("meta") for label, part in parts.items()}, self.storage, shape, name)
        bitmask = parts.get(BITMASK)
        if bitmask is not None and not bitmask.is_meta:
            count_positions(bitmask, self.pattern.n, self.pattern.m, self.in_features, name)


class SharedInput:
    """Packed linears that a model calls with the same tensor, in this order: q/k/v, or gate/up.

    For a token or two without gradients the first call computes the products of all in one launch
    (``group_op``), and each of the other calls takes its own.
    """

    def __init__(self, linears: Sequence[SparseLinear]) -> None:
        self.linears = tuple(linears)
        # The input, and the products that were not yet asked for. It is one attribute, because another thread may
        # replace it at any time.
        self.waiting: tuple[Tensor, dict[int, Tensor]] | None = None
        for linear in linears:
            linear.shared = self

    def part(self) -> None:
        """Separate the linears, for example when one of them is moved."""
        for linear in self.linears:
            linear.shared = None

    def product(self, linear: SparseLinear, x: Tensor) -> Tensor | None:
        """The product of ``linear`` with ``x``, or None if it must be computed alone."""
        if linear is self.linears[0]:
            return self._all(x)
        waiting = self.waiting
        if waiting is None or waiting[0] is not x:
            return None
        y = waiting[1].pop(self.linears.index(linear), None)
        if not waiting[1]:
            self.waiting = None
        return y

    def _all(self, x: Tensor) -> Tensor | None:
        columns = self.linears[0].in_features
        if torch.is_grad_enabled() or not 0 < x.numel() <= MOST_TOKENS * columns:
            return None
        first, *others = group_op(
            x,
            [linear.values for linear in self.linears],
            [linear.bitmask for linear in self.linears],
            [linear.bias for linear in self.linears],
            [linear.pattern.n for linear in self.linears],
            [linear.pattern.m for linear in self.linears],
            columns,
        )
        self.waiting = x, dict(enumerate(others, start=1))
        y: Tensor = first
        return y


def fast_decode(model: nn.Module) -> int:
    """Make packed linears with the same input multiply in one launch, for one or two tokens.

    A forward of one token finds these linears, so ``model`` must take token ids and be on its CUDA device already.
    Linears that are moved, cast or loaded again multiply separately.

    Returns:
        The number of launches that a forward saves; 0 on a CPU, where the gain would be tiny.
    """
    in_tiles = [linear for linear in model.modules() if isinstance(linear, SparseLinear) and linear.layout == TILES]
    if not in_tiles:
        return 0
    calls: list[tuple[SparseLinear, Tensor, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, SparseLinear)
        calls.append((module, inputs[0], inputs[0]._version))

    handles = [linear.register_forward_pre_hook(note) for linear in in_tiles]
    try:
        # tensors of inference mode have no version counter
        with torch.inference_mode(False), torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[SparseLinear]] = []
    for at, (linear, x, version) in enumerate(calls):
        together = at > 0 and calls[at - 1][1] is x and calls[at - 1][2] == version
        if together and len(groups[-1]) < MOST and linear not in groups[-1]:
            groups[-1].append(linear)
        else:
            groups.append([linear])
    # a linear that is called twice is in no group, because its second call would find no product
    counts = Counter(linear for linear, _, _ in calls)
    groups = [group for group in groups if len(group) > 1 and all(counts[linear] == 1 for linear in group)]
    return sum(len(SharedInput(group).linears) - 1 for group in groups)


def fast_prefill(model: nn.Module) -> int:
    """Make the packed linears of ``model`` keep a second form of their weight for many tokens, on a CUDA device.

    Without it, a product of more than 192 tokens unpacks its weight each time, or converts it to the order of sparse
    tensor cores, and may be slower than a dense product. With 16-bit values, the second form takes 1.125 bytes a weight
    if sparse tensor cores can multiply with it, and otherwise 2 bytes. Decoding does not read it. It is made again when
    the model is moved, and it is not saved.

    Returns:
        The bytes of all second forms; 0 on a CPU, which does not need them.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.keeps = True
            module.settle()
            total += 0 if module.kept is None else module.kept.nbytes
    return total


def guarded_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of ``model`` as files store it: with a guard, an empty ``<name>.weight``, for each packed linear.

    A loader without support for the packed format expects a weight there and fails on its shape. State dicts in memory
    have no guards, so code that copies, shards or trains a model needs no special case.
    """
    state: dict[str, Any] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            state[f"{name}.weight"] = torch.empty(0, dtype=module.dtype)
    return state


def _is_guard(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.shape == (0,)


def put_in_place(model: nn.Module, name: str, sparse: SparseLinear) -> None:
    """Replace the linear ``name`` of ``model``; ``sparse`` remembers whether it was a ``Conv1D``."""
    sparse.conv1d = isinstance(model.get_submodule(name), Conv1D)
    model.set_submodule(name, sparse)


def at_places(packed: PackedWeight | CodedWeight, dense: Sequence[nn.Module]) -> list[SparseLinear]:
    """A module for each place of one weight, with the bias of the ``dense`` module there; one module per bias."""
    from msp.packed.coded_linear import linear_of  # imported here, because it imports this module

    made: dict[int, SparseLinear] = {}
    for module in dense:
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        if id(bias) not in made:
            made[id(bias)] = sparse = linear_of(packed, bias, like=dense[0])
            sparse.conv1d, sparse.places = getattr(module, "conv1d", isinstance(module, Conv1D)), len(dense)
    first, *others = made.values()
    for other in others:
        other.share(first)
    return [made[id(module.bias)] for module in dense]


def find_linear(model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Linear | Conv1D:
    """The linear called ``name``; ``MspError`` if there is none or it is not ``[out, in]`` = ``shape``."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise MspError(f"{name}: {type(model).__name__} has no such linear") from error
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise MspError(f"{name}: a {type(module).__name__} of {type(model).__name__}, not a linear")
    found = shape_of(module)
    if found != tuple(shape):
        raise MspError(f"{name}: {type(model).__name__} has a weight of {list(found)} there, not {list(shape)}")
    return module


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """``[out, in]`` of a sparse linear, an ``nn.Linear`` or a ``Conv1D``, which stores it transposed."""
    if isinstance(linear, SparseLinear):
        return linear.out_features, linear.in_features
    assert isinstance(linear, (nn.Linear, Conv1D))
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def note_pattern(linear: nn.Module, pattern: NMPattern) -> None:
    """Store the pattern of a linear that stays dense as its attribute, for the checkpoint."""
    linear.pattern = pattern  # type: ignore[assignment]


def storages_of(model: nn.Module) -> dict[str, Storage]:
    """The storage of every sparse linear of ``model``, and of every dense linear with a stored pattern.

    The storage of a weight with several places is under the first of their names, see ``shared_by``.
    """
    return {names[0]: storage for names, storage in by_weight(model)}


def shared_by(model: nn.Module) -> dict[str, str]:
    """The name of every further place of a weight, with the name of the weight's first place."""
    return {other: names[0] for names, _ in by_weight(model) for other in names[1:]}


def by_weight(model: nn.Module) -> list[tuple[list[str], Storage]]:
    """The names and the storage of every weight that has a storage, in the order of ``named_modules``."""
    found: dict[Hashable, tuple[list[str], Storage]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        pattern = getattr(module, "pattern", None)
        if isinstance(pattern, NMPattern):
            packed = isinstance(module, SparseLinear)
            weight: Hashable = module.identity if packed else weight_identity(module.weight)
            storage = module.storage if packed else Storage(pattern)
            found.setdefault(weight, ([], storage))[0].append(name)
    return list(found.values())
