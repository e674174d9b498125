"""Without a GPU, Triton kernels run in Triton's interpreter; it must be asked for before Triton is imported."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import shares

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # before torch reads it; tests that are about threads set their number themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(shares.threads_of_a_worker(int(workers))))

import torch
from isas import isa as isa

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart() -> None:
    """Without what ``MSP_REQUIRE`` asks for, tests would be skipped that are meant to run."""
    from msp.errors import MspError
    from msp.ops._compiled import check_required

    try:
        check_required()
    except MspError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return shares.scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a worker, begin with what takes long.

    Coverage costs two fifths of the time. It is measured in the first two cases of each test, and not in long files.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: shares.place_of(item.nodeid))
    if config.pluginmanager.hasplugin("_cov"):
        cases = Counter[str]()
        for item in items:
            test = item.nodeid.partition("[")[0]
            cases[test] += 1
            if cases[test] > 2 or shares.takes_long(item.nodeid):
                item.add_marker(pytest.mark.no_cover)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random tokens for the models of ``families``."""
    from families import VOCABULARY

    from msp.text.token_sets import save_tokens

    path = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_tokens(torch.randint(0, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(7)), path)
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    from families import save

    path = tmp_path_factory.mktemp("models") / "llama"
    save("llama", path)
    return path
