"""The CUDA obs_prune's steps, compiled for the CPU and run thread after thread under the op's own loop over blocks."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from msp.ops.obs_prune import reference, sweep_blocks

TESTS = Path(__file__).resolve().parents[1]
BLOCK = 128
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def prune_block(tmp_path_factory: pytest.TempPathFactory):
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("this machine has no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "obs_prune.so"
    flags = [
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-march=native",
    ]
    source = TESTS / "native" / "obs_prune_emulated.cpp"
    command = [compiler, *flags, f"-I{TESTS.parent / 'csrc'}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).obs_prune_block_emulated
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 6
    function.restype = None
    names = (
        "weight_ptr",
        "factor_ptr",
        "errors_ptr",
        "kept_ptr",
        "rows",
        "columns",
        "start",
        "width",
        "group_size",
        "n",
    )
    return lambda **arguments: function(*(arguments[name] for name in names))


def make(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the inverse Hessian's factor of correlated inputs, with NaN where nothing may look."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5 + torch.eye(columns)
    x = torch.randn(3 * columns, columns, dtype=torch.float64) @ mixing
    hessian = 2 * x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    below = torch.ones_like(factor, dtype=torch.bool).tril(-1)
    return torch.randn(rows, columns), factor.masked_fill(below, float("nan"))


def unblocked(weight: torch.Tensor, factor: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The sweep in float64, one column after another, with the choice given."""
    w, u = weight.double(), factor.double()
    for i in range(w.shape[1]):
        error = torch.where(kept[:, i], 0.0, w[:, i]) / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    return w.masked_fill(~kept, 0.0)


# one row, one group, a last block of any width, thread blocks that are partly filled
SHAPES = [(1, 4), (3, 32), (32, 128), (33, 132), (45, 288), (7, 316), (70, 96)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_sweeps_as_in_float64_and_keeps_what_the_reference_keeps(prune_block, m: int, shape: tuple[int, int]) -> None:
    rows, columns = shape[0], -(-shape[1] // m) * m
    for n in {0, 1, m // 4, m - 1, m}:
        weight, factor = make(rows, columns, seed=rows * columns + n)
        updated, kept = sweep_blocks(weight, factor, n, m, BLOCK, prune_block)
        assert (kept.view(rows, -1, m).sum(-1) == n).all()
        assert (updated[~kept] == 0).all() and not torch.signbit(updated[~kept]).any()
        # one other order of operations may choose otherwise where two scores are all but equal
        same = (kept == reference(weight, factor, n, m, BLOCK)[1]).all(1)
        assert same.double().mean() >= (0.97 if rows > 40 else 1.0)
        want = unblocked(weight, factor, kept)
        assert ((updated - want).abs() <= 1e-4 * want.abs() + 1e-5 * want.abs().mean()).all()


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_every_level_and_ties_to_the_lower_column(prune_block, m: int) -> None:
    torch.manual_seed(m)
    weight = torch.randint(-2, 3, (37, 160)).float()
    for n in range(m + 1):
        updated, kept = sweep_blocks(weight, torch.eye(160), n, m, BLOCK, prune_block)
        order = weight.abs().view(37, -1, m).sort(dim=-1, descending=True, stable=True).indices
        wanted = torch.zeros(37, 160 // m, m, dtype=torch.bool).scatter_(-1, order[..., :n], True).view(37, 160)
        assert torch.equal(kept, wanted)
        assert torch.equal(updated, weight.masked_fill(~wanted, 0.0))


def test_writes_its_own_columns_only(prune_block) -> None:
    rows, columns, start, width = 35, 200, 72, 40
    weight, factor = make(rows, columns, seed=1)
    updated, kept = weight.clone(), torch.full((rows, columns), 7, dtype=torch.uint8)
    errors = torch.full((width + 1, rows), float("nan"))
    tensors = {"weight_ptr": updated, "factor_ptr": factor, "errors_ptr": errors, "kept_ptr": kept}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    prune_block(**pointers, rows=rows, columns=columns, start=start, width=width, group_size=8, n=3)
    mine = torch.zeros(columns, dtype=torch.bool)
    mine[start : start + width] = True
    assert torch.equal(updated[:, ~mine], weight[:, ~mine]) and (kept[:, ~mine] == 7).all()
    assert (kept[:, mine].view(rows, -1, 8).sum(-1) == 3).all()
    assert errors[:width].isfinite().all() and errors[width].isnan().all()


def test_infinities_on_the_way_are_kept_to_be_seen(prune_block) -> None:
    factor = torch.eye(8)
    factor[0, 4:] = 3e38
    weight = torch.tensor([[2.0, 3, 4, 5, 1, 1, 1, 1]])
    updated, kept = sweep_blocks(weight, factor, 1, 4, BLOCK, prune_block)
    assert kept.sum() == 2 and not updated.isfinite().all()


def test_a_factor_at_an_odd_address_is_copied(prune_block) -> None:
    weight, factor = make(5, 48, seed=2)
    memory = torch.empty(48 * 48 + 1)
    odd = memory[1:].view(48, 48)
    odd.copy_(factor)
    assert odd.data_ptr() % 16
    found, wanted = (sweep_blocks(weight, u, 2, 8, BLOCK, prune_block) for u in (odd, factor))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
