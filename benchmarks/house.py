"""Count how the package hangs together: rooms, upward imports, and two walks through it.

python benchmarks/house.py [CHECKOUT] counts in this checkout or in another one, such as an older commit, and prints
JSON. The figures in CONTRIBUTING.md are from `benchmarks/results/house.json`, which holds what this program printed at
the commits that it names.

The walk of a sparsity counts the calls, each once, that lead to its parsing and to the budget that is made of it. The
walk of a weight counts the calls that get or return the packed weight of a linear, from the pruner to the files.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

CARRIERS = {"PackedWeight", "SparseLinear", "NMLinear"}
# A forward uses the weight, and is not on its way.
ASIDE = {"forward", "total", "_each", "measure", "pass_through", "run"}


def table_rows(root: Path) -> list[list[str]]:
    """The paths in each row of the table of rooms, from the top."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [
        re.findall(r"`msp/([\w/]+?)(?:\.py|/)`", line.split("|")[1]) for line in text.splitlines() if "| `msp/" in line
    ]
    return [row for row in rows if row]


def upward(root: Path) -> int:
    """The imports, anywhere in a file, that run against the order of the table of rooms."""
    rows, found = table_rows(root), 0
    place = {name: index for index, row in enumerate(rows) for name in row}
    for path in (root / "msp").rglob("*.py"):
        parts = path.relative_to(root / "msp").with_suffix("").parts
        own = place.get(parts[0])
        if own is None or "triton_kernels" in parts:
            continue
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        rooms = {target.split(".")[1] for target in targets if target.startswith("msp.")}
        found += sum(place.get(room, own) < own for room in rooms)
    return found


def walks(root: Path) -> dict[str, Any]:
    """The two walks, on a tiny model."""
    sys.path[:0] = [str(root / "tests"), str(root)]
    warnings.simplefilter("ignore")
    import families

    import msp

    inside = f"{root / 'msp'}/"
    assert str(msp.__file__).startswith(inside), msp.__file__
    calls: dict[tuple[str, str], None] = {}
    budget_is_made = False
    weight: dict[tuple[str, str], None] = {}
    frames: set[int] = set()
    handed = made = 0
    pruned = False

    def stack(frame: FrameType | None) -> list[FrameType]:
        found = []
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
        return found

    def watch(frame: FrameType, event: str, value: Any) -> None:
        nonlocal pruned, budget_is_made, handed, made
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(inside) or code.co_name.startswith("<"):
            return
        pruned = pruned or code.co_qualname == "KeepingPruner.prune"
        key = (code.co_filename.removeprefix(inside), code.co_qualname)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [value] if event == "return" else [frame.f_locals[name] for name in names if name in frame.f_locals]
        if event == "call" and not budget_is_made and code.co_name in ("parse_sparsity", "for_units"):
            own = [each.f_code for each in stack(frame) if each.f_code.co_filename.startswith(inside)]
            chain = [each.co_qualname for each in own if not each.co_name.startswith("<")]
            calls.update(dict.fromkeys(pairwise(reversed(chain))))
            budget_is_made = code.co_name == "for_units"
        if not pruned or any(each.f_code.co_name in ASIDE for each in stack(frame)):
            return
        made += event == "call" and code.co_qualname == "SparseLinear.__init__"
        if code.co_qualname == "KeepingPruner.prune" or any(map(carries, given)):
            weight[key] = None
            handed += event == "call" or id(frame) not in frames
            if event == "call":
                frames.add(id(frame))
        if event == "return":
            frames.discard(id(frame))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        families.save("llama", folder / "dense")
        (folder / "text.txt").write_text(" ".join(f"w{number * 7 % 60}" for number in range(2000)))
        sets = {"window": 16, "calibration_tokens": 64, "fitness_tokens": 64, "test_tokens": 64}
        asked = {
            "pruner": "magnitude",
            "allocator": "uniform",
            "calibration": str(folder / "text.txt"),
            "device": "cpu",
        }
        sys.setprofile(watch)
        try:
            result = msp.prune(folder / "dense", sparsity=0.5, output=folder / "out", **asked, **sets)
        finally:
            sys.setprofile(None)
    files, linears = {file for file, _ in weight}, len(result.allocation)
    return {
        "sparsity to budget": {"calls": len(calls)},
        "way of the sparsity": [" -> ".join(call) for call in calls],
        "weight to file": {
            "calls for a linear": round(handed / linears, 1),
            "modules made for a linear": round(made / linears, 1),
            "functions": len(weight),
            "rooms": len({file.split("/")[0] for file in files}),
        },
        "way of the weight": [f"{file} {function}" for file, function in weight],
    }


def carries(value: Any, depth: int = 0) -> bool:
    """Whether a value is a packed weight, or a container that holds one."""
    if type(value).__name__ in CARRIERS:
        return True
    if depth == 2:
        return False
    if isinstance(value, (list, tuple)):
        return any(carries(each, depth + 1) for each in list(value)[:8])
    if isinstance(value, dict):
        return any(carries(each, depth + 1) for each in list(value.values())[:8])
    return False


def main(root: Path) -> None:
    commit = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    modules = [path for path in (root / "msp").glob("*.py") if not path.stem.startswith("__")]
    packages = [path for path in (root / "msp").glob("*/__init__.py") if not path.parent.is_symlink()]
    found = {
        "commit": commit.stdout.strip(),
        "modules at the top level": len(modules),
        "folders at the top level": len(packages),
        "upward imports": upward(root),
        **walks(root),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve())
