"""The command line in this process, at a size that takes a moment."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from msp.cli import app

SMALL = [
    "--window",
    "16",
    "--calibration-tokens",
    "64",
    "--fitness-tokens",
    "64",
    "--test-tokens",
    "64",
    "--device",
    "cpu",
]


def msp_run(*arguments: object):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def one_object(result) -> dict:
    """The JSON object that is all of standard output."""
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found
