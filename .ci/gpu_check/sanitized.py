"""Calls one op with every kernel it has, on the shapes of ``tests/ops/cases.py``, for a sanitizer to watch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "ops"))
from cases import every_case

from msp.errors import UsageError
from msp.ops import available_backends, force_backend


def main(op: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    kernels = [name for name in available_backends(op) if name in (("cuda", "triton") if on_gpu else ("cpu",))]
    generator, called = torch.Generator(), 0
    for case in every_case():
        if case.op != op or case.dtype != torch.bfloat16:
            continue
        prepared = case.prepare(generator, case.dtype, device)
        for backend in kernels:
            try:
                with force_backend(backend):
                    prepared.run()
            except UsageError:  # not for these arguments
                continue
            if on_gpu:
                torch.cuda.synchronize()
            called += 1
    print(f"{called} calls of {op} by {', '.join(kernels)}")


if __name__ == "__main__":
    main(sys.argv[1])
