"""One block at a time: its kept values learn to give the output of the dense block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from msp.errors import MspError
from msp.models.gates import GatedModel, State
from msp.models.hidden import HiddenStates
from msp.models.structure import Block
from msp.recovery.base import DirectRecovery, Parameters, Phase, Task, distinct, kept_values, register_recovery, vectors

PROBED_TOKENS = 32
Of = Literal["training", "held-out"]


@register_recovery
@dataclass(frozen=True)
class Blockwise(DirectRecovery):
    """Reconstruction of the hidden states of the dense model, block by block (EBFT, 2402.12419).

    A block gets the output of the blocks before it, which are recovered already. Its kept values, norms and biases
    learn the hidden states that the dense model has after the block. The loss is their mean squared error, divided by
    the mean square of the dense states, so that it is a share in every block. A weight that several blocks share is
    trained in its first block.
    """

    name: ClassVar[str] = "blockwise"
    learning_rate: float = 1e-3

    def parameters(self, model: nn.Module) -> Parameters:
        """The parameters of all blocks; ``phases`` trains those that are inside the blocks of the model."""
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        inside: dict[str, nn.Parameter] = {}
        for name, blocks in lists:
            inside |= _of_block(blocks, f"{name}.")
        return distinct(inside)

    def phases(self, task: Task) -> Iterator[Phase]:
        structure = task.structure
        blocks = [Block(each.index, each.name, task.student.get_submodule(each.name), ()) for each in structure.blocks]
        of_teacher = GatedModel(task.teacher, structure, task.device)
        of_student = GatedModel(task.student, replace(structure, blocks=tuple(blocks)), task.device)
        with of_teacher:
            reason = of_teacher.why_not_one_by_one(task.batches[0][:1, :PROBED_TOKENS])
        if reason is not None:
            raise MspError(f"blockwise runs one block at a time, and {reason}: choose another method, such as distil")
        states = HiddenStates(task.hidden_bytes)
        teacher, student = _Prefix(task, of_teacher, states, "dense"), _Prefix(task, of_student, states, "pruned")
        trained: dict[str, nn.Parameter] = {}
        with of_teacher, of_student:
            for block in blocks:
                with task.progress.stage(f"Dense output of {block.name}"):
                    teacher.advance(block.index)
                parameters = distinct(_of_block(block.module, f"{block.name}."), without=trained)
                trained |= parameters
                if parameters:
                    yield _phase(task, block, parameters, teacher, student)
                if block is not blocks[-1]:
                    with task.progress.stage(f"Output of {block.name}"):
                        student.advance(block.index)


def _of_block(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {**kept_values(module, prefix), **vectors(module, prefix)}


class _Prefix:
    """The hidden states of all tokens after the blocks that ran so far."""

    def __init__(self, task: Task, gates: GatedModel, states: HiddenStates, whose: str) -> None:
        self._tokens: dict[Of, Sequence[Tensor]] = {"training": task.batches, "held-out": task.held_out}
        self._gates = gates
        self._states = states
        self._whose = whose
        self._depth = 0

    def entering(self, of: Of, batch: int) -> State | None:
        """The state of a batch after the last block that ``advance`` ran; None before the first block."""
        return self._states.get((self._whose, of, batch)) if self._depth else None

    def output(self, index: int, of: Of, batch: int) -> Tensor:
        """The hidden states that block ``index`` returns for a batch."""
        return self._gates.block(index, self._tokens[of][batch], self.entering(of, batch)).hidden

    def advance(self, index: int) -> None:
        """Run block ``index`` on all tokens and keep its output."""
        with torch.no_grad():
            for of, batches in self._tokens.items():
                for batch, tokens in enumerate(batches):
                    state = self._gates.block(index, tokens, self.entering(of, batch))
                    if self._depth:
                        self._states.pop((self._whose, of, batch))
                    self._states.put((self._whose, of, batch), state)
        self._depth = index + 1


def _phase(task: Task, block: Block, parameters: Parameters, teacher: _Prefix, student: _Prefix) -> Phase:
    def target(of: Of, batch: int) -> Tensor:
        state = teacher.entering(of, batch)
        assert state is not None
        return state.hidden.to(task.device).float()

    squares, count = 0.0, 0
    for batch in range(len(task.held_out)):
        hidden = target("held-out", batch)
        squares, count = squares + float(hidden.double().square().sum()), count + hidden.numel()
    scale = count / squares if squares else 1.0

    def loss(batch: int) -> Tensor:
        return scale * mse_loss(student.output(block.index, "training", batch).float(), target("training", batch))

    def measure() -> float:
        total = 0.0
        with torch.no_grad():
            for batch in range(len(task.held_out)):
                dense = target("held-out", batch)
                found = student.output(block.index, "held-out", batch).float()
                total += float((found.double() - dense.double()).square().sum())
        return scale * total / count

    return Phase(block.name, parameters, loss, measure)
