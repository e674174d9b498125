"""The trials of ``make torture`` find what they look for: a planted fault counts as a failure, in every kind."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import packed_model, save, save_text
from torture import concurrency, disk, kernels, kills, mutations, numbers, saving, table
from torture.__main__ import KINDS
from torture.formats import SAME, Format
from torture.harness import Report, forked

from msp.base import staging
from msp.base.reading import read_json
from msp.errors import MspError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("planted", 1, 30.0, tmp_path, "none")


def failures(report: Report) -> dict[str, int]:
    return {kind: count for part in report.parts.values() for kind, count in part.failed.items()}


def soon() -> float:
    return time.monotonic() + 30


def strict(path: Path) -> Any:
    return read_json(path)


def form(read: Any, full: int = 40) -> Format:
    sample = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    return Format("planted", "x.json", read, lambda data: json.loads(data.decode()), full, {"x.json": sample}, "json")


def try_reader(report: Report, read: Any, tmp_path: Path) -> dict[str, int]:
    mutations.try_format(report, form(read), [b"other"], tmp_path / "work", soon())
    return failures(report)


def test_a_right_reader_passes(report: Report, tmp_path: Path) -> None:
    assert try_reader(report, strict, tmp_path) == {}
    part = report.parts["planted"]
    assert part.done == part.asked == sum(part.what.values()) == 40 and part.what["read"] and part.what["refused"]


def raises(path: Path) -> Any:
    found = read_json(path)
    assert found["a"] is not found
    return found


def misreads(path: Path) -> Any:
    found = read_json(path)
    return found if found == json.loads(form(strict).sample) else "something else"


def crashes(path: Path) -> Any:
    try:
        return read_json(path)
    except MspError:
        os.abort()


def takes_memory(path: Path) -> Any:
    try:
        return read_json(path)
    except MspError:
        held = b"x" * (mutations.CASE_BYTES * 2)
        assert len(held)
        raise


def reserves_memory(path: Path) -> Any:
    try:
        return read_json(path)
    except MspError:
        try:
            bytearray(1 << 50)
        except MemoryError as error:
            raise MspError("refused") from error


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (raises, "traceback"),
        (misreads, "wrong"),
        (crashes, "crash"),
        (takes_memory, "memory"),
        (reserves_memory, "memory"),
    ],
)
def test_a_reader_that_is_wrong_is_found(
    read: Any, kind: str, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutations, "CASE_BYTES", 1 << 26)
    assert try_reader(report, read, tmp_path).keys() == {kind}
    assert report.parts["planted"].done == 40, "the others are tried all the same"
    assert report.failed and report.failures[0]["case"].startswith("planted:")


def test_a_reader_that_hangs_is_found(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "CASE_SECONDS", 0.3)

    def hangs(path: Path) -> Any:
        try:
            return read_json(path)
        except MspError:
            time.sleep(60)

    mutations.try_format(report, form(hangs, 4), [b"other"], tmp_path / "work", soon())
    assert failures(report).keys() == {"hang"} and report.parts["planted"].done == 4


def test_a_hash_that_is_not_compared_is_found(report: Report, tmp_path: Path) -> None:
    unchecked = form(lambda path: path.read_bytes(), 10)
    unchecked.expected = SAME
    mutations.try_format(report, unchecked, [b"other"], tmp_path / "work", soon())
    assert failures(report).keys() == {"wrong"}


def test_a_case_is_the_same_again(tmp_path: Path) -> None:
    one, other = (mutations.changed(form(strict), [b"other"], 5, number) for number in (7, 7))
    assert one == other != mutations.changed(form(strict), [b"other"], 6, 7)


def test_a_saver_without_one_step_is_found(report: Report) -> None:
    """It writes where the result stands, so that a kill leaves half of it."""

    def write(out: Path, new: bool) -> None:
        out.mkdir(exist_ok=True)
        for name in "ab":
            (out / name).write_text("new" if new else "old")

    saving.try_saving(report, "planted", saving.Saving(write), soon(), 1, 0)
    assert failures(report).keys() == {"lost"}


def test_what_a_saver_leaves_is_found(report: Report) -> None:
    def write(out: Path, new: bool) -> None:
        scratch = out.with_name(f"scratch-{os.getpid()}")
        scratch.write_text("new" if new else "old")
        os.replace(scratch, out)

    saving.try_saving(report, "planted", saving.Saving(write), soon(), 1, 0)
    assert failures(report).keys() == {"lost", "leftover"}


def test_a_kill_that_loses_a_model_is_found(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, here = staging.exchange, os.getpid()

    def slowly(new: Path, target: Path) -> bool:
        if os.getpid() == here:
            return exchange(new, target)
        target.rename(target.with_name("away"))
        time.sleep(60)
        return False

    part = report.part("save", kills.KILLS)
    part.asked = 1
    draw = random.Random(1)
    monkeypatch.setattr(draw, "uniform", lambda *_: 2.0)
    monkeypatch.setattr(report, "part", lambda name, full: part)
    monkeypatch.setattr(staging, "exchange", slowly)
    kills.kill_saves(report, soon(), draw, tmp_path)
    assert "lost" in failures(report)


def test_kills_see_other_bytes_and_leftovers(report: Report, tmp_path: Path) -> None:
    scene = object.__new__(kills.Scene)
    scene.home, scene.name, scene.verb = tmp_path, "x", kills.Verb([], one=True)
    save("llama", tmp_path / "model")
    save_text(tmp_path / "text.txt", 7)
    scene.inputs = kills.bytes_below(tmp_path / "model") | kills.bytes_below(tmp_path)
    folder = scene.new("0")
    (folder / "said.out").write_text('{"kl": 1.5, "seconds": 3}')
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("x")
    scene.files, scene.answer = kills.contents(folder), kills.said(folder)
    assert list(scene.wrong_at_the_end(folder)) == [] and not scene.wrong_after_a_kill(folder, {})
    (folder / "said.out").write_text('{"kl": 1.25, "seconds": 3}')
    assert [kind for kind, _ in scene.wrong_at_the_end(folder)] == ["wrong"]
    (folder / "out" / "config.json").write_text("y")
    (folder / "tmp" / "left").write_text("")
    assert [kind for kind, _ in scene.wrong_at_the_end(folder)] == ["wrong", "wrong", "leftover"]
    assert scene.wrong_after_a_kill(folder, {})
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "lost" in [kind for kind, _ in scene.wrong_at_the_end(folder)]


@pytest.mark.parametrize(
    ("code", "said", "verdict"),
    [
        (1, "msp: text.txt is empty", "refused"),
        (2, "Usage: msp prune ...\n error", "refused"),
        (1, "msp: ValueError: boom (run again with --debug for the traceback)", "traceback"),
        (1, "Traceback (most recent call last):\nmsp: x", "traceback"),
        (1, "Error", "wrong"),
        (-11, "", "crash"),
        (143, "msp: interrupted", "crash"),
    ],
)
def test_errors_are_judged(code: int, said: str, verdict: str) -> None:
    assert numbers.error(code, said)[0] == verdict


def test_figures_are_judged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert numbers.figures(tmp_path, '{"kl": 0.5}')[0] == "figures"
    assert [numbers.figures(tmp_path, text)[0] for text in ('{"kl": NaN}', '{"kl": "inf"}', "x")] == ["wrong"] * 3
    (tmp_path / "out").mkdir()
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "out" / "model.safetensors")
    assert numbers.figures(tmp_path, '{"kl": 0.5}') == ("wrong", "a of the saved model is not finite")


def test_every_verb_has_numbers() -> None:
    found = numbers.numeric_options()
    assert found.keys() == numbers.VERBS.keys()
    assert {"--sparsity", "--window", "--seed", "--hidden-bytes", "--fitness-noise"} <= set(found["prune"])
    assert {"--temperature", "--max-new-tokens"} <= set(found["generate"]) and "--group-size" in found["measure"]


def test_a_writer_that_hides_a_full_disk_is_found(report: Report, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    on_disk = forked(lambda: disk.mount(tmp_path / "disk"), 20).code == 0
    report.part("writers", 1)

    def loses(place: Path) -> None:
        (place / "out" / "a").unlink()
        raise MspError("out cannot be written")

    def hides(place: Path) -> None:
        raise KeyError("a")

    def silent(place: Path) -> None:
        raise MspError("failed")

    found = [
        forked(lambda: disk._one_writer(tmp_path / "disk", "save_packed", write, 4096, on_disk), 20).value[0]  # noqa: B023
        for write in (loses, hides, silent)
    ]
    assert found == ["lost", "traceback", "wrong"]


def test_positions_that_a_kernel_takes_unchecked_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kernels.try_case(1, number)[0] for number in range(60)} == {"refused", "right"}
    # what unpacks by the first bits alone, and looks at none
    from msp import ops

    monkeypatch.setattr(ops, "nm_unpack", lambda packed: torch.zeros(packed.shape, dtype=packed.values.dtype))
    monkeypatch.setattr(ops, "nm_linear", lambda x, packed: x @ torch.zeros(packed.shape, dtype=x.dtype).T)
    assert "wrong" in {kernels.try_case(1, number)[0] for number in range(60)}


def test_threads_that_disagree_are_found(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    monkeypatch.setattr(concurrency, "packed_model", lambda *_: packed_model("llama"))
    monkeypatch.setattr(concurrency, "logits", lambda *_: str(draw.random()))
    concurrency.threads(report, tmp_path, time.monotonic() + 0.5, draw)
    assert failures(report).keys() == {"wrong"}


def test_a_kind_that_does_nothing_fails(report: Report) -> None:
    report.part("nothing", 5)
    assert report.failed == 1
    report.write()
    written = json.loads(report.path.read_text())
    assert (written["asked"], written["done"], written["failed"], written["seed"]) == (5, 0, 1, 1)


def test_the_shares_of_time_are_no_more_than_all() -> None:
    assert all(sum(lane.values()) <= 1 for lane in KINDS)


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    found = table.load()
    assert table.put(table.PAGE.read_text(), found) == table.PAGE.read_text()
    assert all(content["failed"] == 0 and content["minutes_asked"] == 30 for content in found.values())
