"""Calls one op with every kernel it has, on the shapes of ``tests/ops/cases.py``, for a sanitizer to watch.

``sanitized.py OP UNTIL``: small shapes first, and no further call after ``UNTIL`` (seconds since 1970).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "ops"))
from cases import backends_of, every_case

from msp.errors import UsageError
from msp.ops import force_backend


def main(op: str, until: float) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    kernels = [name for name in backends_of(op) if name in (("cuda", "triton") if on_gpu else ("cpu",))]
    generator, called, told = torch.Generator(), 0, ""
    cases = [case for case in every_case() if case.kernels == op and case.dtype == torch.bfloat16]
    for index, case in enumerate(sorted(cases, key=lambda case: case.large)):
        if time.time() > until:
            told = f" on {index} of {len(cases)} shapes, then the time was up"
            break
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
    print(f"{called} calls of {op} by {', '.join(kernels)}{told}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
