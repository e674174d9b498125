"""Mechanisms that have one home: no other file repeats them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# what a repetition looks like, the files to search, and the files that may have it
HOMES = {
    "json is parsed by the reader, and sniffed in text": (
        r"json\.loads?\(",
        "msp/**/*.py",
        {"msp/base/reading.py", "msp/text/text_files.py"},
    ),
    "config.json is edited by edit_config": (r"indent=2, sort_keys=True", "msp/**/*.py", {"msp/models/travelling.py"}),
    "one file takes the place of another in staging": (
        r"os\.(replace|rename)\(",
        "msp/**/*.py",
        {"msp/base/staging.py"},
    ),
    "a dtype is named by dtype_name": (r"removeprefix\(\"torch\.\"\)", "msp/**/*.py", {"msp/base/readable.py"}),
    "the reason of an OSError is system_reason": (
        r"error\.strerror (or|if)",
        "msp/**/*.py",
        {"msp/errors.py"},
    ),
    "a compiled module that must be there is compiled()": (
        r"assert (compiled|module) is not None",
        "msp/ops/**/*.py",
        {"msp/ops/_compiled.py"},
    ),
    "an instruction set is chosen by MSP_BEST, by nm_linear for its tokens": (
        r"isa >= Isa::",
        "csrc/cpu/*.[ch]*",
        {"csrc/cpu/isa.h", "csrc/cpu/nm_linear.cpp"},
    ),
    "scored units are launched by groups, their gradients by gradients": (
        r"KIND=|TensorDescriptor\(",
        "triton_kernels/*.py",
        {"triton_kernels/groups.py", "triton_kernels/gradients.py"},
    ),
}


@pytest.mark.parametrize("mechanism", HOMES)
def test_is_in_its_home_only(mechanism: str) -> None:
    pattern, files, homes = HOMES[mechanism]
    found = {
        file.relative_to(ROOT).as_posix()
        for file in ROOT.glob(files)
        if re.search(pattern, file.read_text(encoding="utf-8"))
    }
    assert found == homes
