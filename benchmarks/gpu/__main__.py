"""Runs GPU benchmarks and writes one JSON object a line: ``python -m gpu [op ...]`` in ``benchmarks/``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time

from gpu.runner import Context, records, registry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*", help=f"default: all of {', '.join(registry())}")
    parser.add_argument("--seconds", type=float, default=120, help="for each op; default 120")
    parser.add_argument("--until", type=float, default=math.inf, help="no row begins later (seconds since 1970)")
    parser.add_argument("--seed", type=int, help="of the inputs; default: a fresh one, which is recorded")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU, to see that they run")
    options = parser.parse_args()
    if unknown := set(options.op) - set(registry()):
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(registry())}")
    fine = True
    for op in options.op or registry():
        seconds = min(options.seconds, options.until - time.time())
        context = Context(dry=options.dry, seconds=seconds, seed=options.seed)
        for record in records(op, context):
            print(json.dumps(record), flush=True)
            row = record.get("row")
            fine &= "median_us" in row if row else record.get("complete", True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
