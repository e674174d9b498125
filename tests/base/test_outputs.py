"""What may be replaced, what is checked before any work, full disks, and two runs at one place."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import SMALL, packed_model, save, tokenizer
from folders import contents, listing, small_files
from verbs import msp_run

import msp
from msp import measure, pareto, search
from msp.base import outputs
from msp.base.files import replacing, write_tensors, write_text
from msp.base.outputs import MARK, check_room, new_folder, reserved, working_folder, write_results
from msp.compressions.nm_ranks import StoredRanks
from msp.engine import distributed
from msp.errors import MspError
from msp.models.gates import State
from msp.models.hidden import HiddenStates
from msp.packed.checkpoint import save_packed
from msp.plan.decode_table import DecodeTable
from msp.show.pictures import check_picture, sensitivity_picture


def make(folder: Path) -> Path:
    """A folder that msp wrote."""
    with new_folder(folder) as (new, _):
        (new / "config.json").write_text("{}")
        (new / "deeper").mkdir()
        (new / "deeper" / "LICENSE").write_text("free")
    return folder


def a_project(out: Path) -> str:
    (out / "src").mkdir(parents=True)
    (out / "config.json").write_text('{"name": "a web app"}')
    (out / "src" / "main.c").write_text("int main(){}")
    return "not a model that msp wrote"


def a_dense_model(out: Path) -> str:
    save("llama", out)
    return "not a model that msp wrote"


def a_file(out: Path) -> str:
    out.write_text("text")
    return "not a model"


def a_folder_with_a_note(out: Path) -> str:
    (make(out) / "deeper" / "note.txt").write_text("mine")
    return r"msp did not write deeper/note\.txt in it: move that away"


def a_folder_with_a_picture_of_the_user(out: Path) -> str:
    (make(out) / "pictures").mkdir()
    (out / "pictures" / "allocation.png").write_text("drawn by msp, later")
    (out / "pictures" / "cat.png").write_text("mine")
    return "pictures/cat.png"


def a_folder_with_a_link(out: Path) -> str:
    (make(out) / "pictures").symlink_to(out.parent)
    return "msp did not write pictures in it"


def a_search_that_was_edited(out: Path) -> str:
    write_results(out, {"recipe.yaml": "a: b"})
    (out / "recipe.yaml").write_text("a: c")
    return r"msp did not write recipe\.yaml"


def a_packed_model_of_a_hub_with_weights_of_the_user(out: Path) -> str:
    packed_model("llama").save_pretrained(out)
    tokenizer().save_pretrained(out)
    assert outputs.foreign(out) is None
    (out / "train.py").write_text("import torch")
    return r"train\.py"


def a_link_elsewhere(out: Path) -> str:
    out.symlink_to(make(out.parent / "elsewhere" / "real"))
    return "is a link to .*real, so it is not replaced: name that folder itself"


def a_mark_of_another_shape(out: Path) -> str:
    (make(out) / MARK).write_text('{"format": 1, "files": {"config.json": 5}}')
    return "not a model that msp wrote"


def a_broken_mark(out: Path) -> str:
    (make(out) / MARK).write_text('{"format": 1, "files": [')
    return "not a model that msp wrote"


IN_THE_WAY = [
    a_project,
    a_dense_model,
    a_file,
    a_folder_with_a_note,
    a_folder_with_a_picture_of_the_user,
    a_folder_with_a_link,
    a_search_that_was_edited,
    a_packed_model_of_a_hub_with_weights_of_the_user,
    a_link_elsewhere,
    a_broken_mark,
    a_mark_of_another_shape,
]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("put", IN_THE_WAY, ids=lambda put: put.__name__)
def test_only_what_msp_wrote_is_replaced(put: Callable[[Path], str], tmp_path: Path) -> None:
    told = put(tmp_path / "out")
    before = tree(tmp_path)
    refused: list[Callable[[], Any]] = [
        lambda: save_packed(packed_model("llama"), None, tmp_path / "out", recipe={}, force=True),
        lambda: msp.prune("absent", sparsity=0.5, output=tmp_path / "out", force=True),
        lambda: new_folder(tmp_path / "out", True).__enter__(),
    ]
    for write in refused:
        with pytest.raises(MspError, match=told):
            write()
    assert tree(tmp_path) == before and not [name for name in listing(tmp_path) if name.startswith(".")]


def test_what_msp_wrote_is_replaced(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    sensitivity_picture({"b.0.q": 1.0}, out / "pictures" / "sensitivity.png")
    with new_folder(out, force=True) as (new, _):
        (new / "other").write_text("other")
    assert listing(out) == [MARK, "other"] and listing(tmp_path) == ["out"]


def test_a_model_whose_pictures_were_cut_off_is_replaced(tmp_path: Path) -> None:
    """By a kill while one was drawn: what that left is nobody's."""
    out = make(tmp_path / "out")
    (out / "pictures").mkdir()
    code = "import os, sys; from msp.base.files import replacing\nwith replacing(sys.argv[1]) as file: os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(out / "pictures" / "search.png")], check=True)
    assert listing(out / "pictures") == [".search.png.msp-lock", ".search.png.msp-partial"]
    outputs.check_replaceable(out)
    assert not listing(out / "pictures")
    with replacing(out / "pictures" / "search.png") as file:
        file.write_text("drawn")
        with pytest.raises(MspError, match=r"did not write pictures/\.search\.png"):
            outputs.check_replaceable(out)  # one that is alive draws there


def test_what_is_in_use_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model := make(tmp_path / "out") / "deeper" / "model").mkdir()
    for kind, setting in {
        "the current directory": lambda: monkeypatch.chdir(model.parent),
        "the home": lambda: monkeypatch.setenv("HOME", str(model)),
    }.items():
        setting()
        with pytest.raises(MspError, match=f"{kind} .*deeper.*not replaced"):
            outputs.check_output(tmp_path / "out", True)
        monkeypatch.undo()
    outer, inner = make(tmp_path / "model"), make(tmp_path / "model" / "inner")
    for out, read in ((tmp_path / "out", model), (outer, outer), (inner, outer)):
        with pytest.raises(MspError, match=r"the model .*that is read"):
            outputs.check_output(out, True, model=str(read))
        with pytest.raises(MspError, match=r"the model .*that is read"):
            msp.prune(read, sparsity=0.5, output=out, force=True)
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "config.json").symlink_to(tmp_path / "out" / "config.json")
    with pytest.raises(MspError, match="of which there is a file in"):
        outputs.check_output(tmp_path / "out", True, model=tmp_path / "cached")
    for out, work in ((outer, outer), (outer, inner), (inner, outer), (tmp_path / "new", tmp_path / "new" / "work")):
        with pytest.raises(MspError, match="are not apart"):
            msp.prune("absent", sparsity=0.5, output=out, force=True, work_dir=work)


def test_the_source_of_a_model_in_memory_is_not_replaced(tmp_path: Path) -> None:
    save_packed(packed_model("llama"), None, tmp_path / "packed", recipe={})
    loaded = msp.load_model(tmp_path / "packed").model
    before = contents(tmp_path / "packed")
    with pytest.raises(MspError, match="the model that is read"):
        save_packed(loaded, None, tmp_path / "packed", recipe={}, force=True)
    with pytest.raises(MspError, match="packed model itself"):
        msp.export_dense(tmp_path / "packed", tmp_path / "packed", force=True)
    assert contents(tmp_path / "packed") == before
    msp.export_dense(tmp_path / "packed", tmp_path / "dense")
    msp.export_dense(tmp_path / "packed", tmp_path / "dense", force=True)
    (tmp_path / "dense" / "note.txt").write_text("mine")
    with pytest.raises(MspError, match=r"note\.txt"):
        msp.export_dense(tmp_path / "packed", tmp_path / "dense", force=True)


def test_somebody_puts_a_file_there_meanwhile(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with pytest.raises(MspError, match=r"note\.txt"), new_folder(out, force=True) as (new, _):
        (new / "config.json").write_text("new")
        (out / "note.txt").write_text("mine")
    assert (out / "note.txt").read_text() == "mine" and (out / "config.json").read_text() == "{}"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is looked at fails the test."""

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    for verb in ("prune", "search", "compare", "sensitivity"):
        monkeypatch.setattr(f"msp.verbs.{verb}.open_model", loads)
    monkeypatch.setattr("msp.verbs.measure.read_config", loads)


def test_every_output_is_checked_before_any_work(tmp_path: Path, text: str, no_work: None) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("mine")
    (tmp_path / "mine" / "pareto.json").mkdir()
    options: dict[str, Any] = {**SMALL, "calibration": text}
    with pytest.raises(AssertionError, match="work has begun"):
        search("absent", sparsity=0.5, output=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    for out, told in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "mine", r"recipe\.yaml was not written by msp"),
    ):
        with pytest.raises(MspError, match=told):
            search("absent", sparsity=0.5, output=out, **options)
    for out, told in ((tmp_path / "file", "file is a file"), (tmp_path / "mine", r"pareto\.json is a folder")):
        with pytest.raises(MspError, match=told):
            pareto("absent", sparsities=[0.5, 0.6], output=out, **options)
    with pytest.raises(MspError, match="file is a file, and a folder"):
        search("absent", sparsity=0.5, work_dir=tmp_path / "file", **options)
    with pytest.raises(MspError, match="is not a decode table"):
        measure("absent", output=tmp_path / "file")
    with pytest.raises(MspError, match="mine is a folder, and a file"):
        measure("absent", output=tmp_path / "mine")
    with pytest.raises(MspError, match="file is a file, and a folder"):
        measure("absent", output=tmp_path / "file" / "table.json")
    shown = msp_run("search", "absent", "-o", tmp_path / "file", "--calibration", text)
    assert shown.exit_code == 1 and "a folder is needed there" in " ".join(shown.stderr.split())
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\nmine")
    for verb in (["compare", "--allocators", "uniform"], ["sensitivity"]):
        shown = msp_run(verb[0], "absent", "-o", tmp_path / "photo.png", "--calibration", text, *verb[1:])
        assert shown.exit_code == 1 and "no picture that msp drew" in " ".join(shown.stderr.split())
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "mine" / "recipe.yaml").read_text() == "mine"


def test_the_temporary_folder_is_checked_before_any_work(
    tmp_path: Path, text: str, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(MspError, match="set TMPDIR"):
        msp.prune("absent", sparsity=0.5, pruner="sparsegpt", calibration=text, **SMALL)


def test_room_is_checked_before_tokens_are_drawn(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("msp.session.opened.make_token_sets", lambda *_, **__: pytest.fail("work has begun"))
    for budget in ({"sparsity": 0.5}, {"budget_bytes": 50_000}):
        with pytest.raises(MspError, match=r"packed model takes [\d,]+ bytes, and 1,000 are free"):
            msp.prune(tmp_path / "llama", output=tmp_path / "out", calibration=text, **budget, **SMALL)
    with pytest.raises(MspError, match="out: it takes 1,001 bytes, and 1,000"):
        check_room(tmp_path / "deep" / "out", 1001, "it")


def test_results_are_replaced_if_nobody_changed_them(tmp_path: Path) -> None:
    write_results(tmp_path / "found", {"recipe.yaml": "one"})
    write_results(tmp_path / "found", {"recipe.yaml": "two", "picture.png": b"\0"})
    (tmp_path / "found" / "recipe.yaml").write_text("edited")
    with pytest.raises(MspError, match=r"recipe\.yaml was changed since msp wrote it"):
        write_results(tmp_path / "found", {"recipe.yaml": "three"})
    assert (tmp_path / "found" / "recipe.yaml").read_text() == "edited"


def test_a_picture_of_ours_is_replaced(tmp_path: Path) -> None:
    picture = sensitivity_picture({"b.0.q": 1.0}, tmp_path / "p.png")
    check_picture(picture)
    assert listing(tmp_path) == ["p.png"]


def test_a_decode_table_is_replaced(tmp_path: Path, no_work: None) -> None:
    DecodeTable("float32", {}, {}).save(tmp_path / "new" / "table.json")
    with pytest.raises(AssertionError, match="work has begun"):
        measure("absent", output=tmp_path / "new" / "table.json")


def test_a_link_and_a_pipe_are_written_to_and_modes_stay(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text" and listing(tmp_path) == ["link", "pipe", "real"]
    os.close(reader)


HOLDS = """
import sys
from msp.base.outputs import reserved, working_folder
with reserved(sys.argv[1] + "/out"), working_folder(sys.argv[1] + "/work"):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to ``out`` and ``work``."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_a_second_run_says_who_is_there(tmp_path: Path, holder: subprocess.Popen[str], no_work: None) -> None:
    told = rf"is being written by process {holder.pid} on \S+ since 20\S+: wait"
    refused: list[Callable[[], Any]] = [
        lambda: msp.prune("absent", sparsity=0.5, output=tmp_path / "out"),
        lambda: save_packed(packed_model("llama"), None, tmp_path / "out", recipe={}),
        lambda: search("absent", sparsity=0.5, work_dir=tmp_path / "work"),
        lambda: search("absent", sparsity=0.5, output=tmp_path / "work"),
    ]
    for write in refused:
        with pytest.raises(MspError, match=told):
            write()
    with pytest.raises(MspError, match="work is the folder of another run that has not ended"):
        outputs.check_output(tmp_path / "work", True)
    holder.kill()
    holder.wait()
    assert listing(tmp_path) == [".out.msp-lock", "work"] and listing(tmp_path / "work") == [".msp-lock"]
    outputs.check_output(tmp_path / "work", True)
    make(tmp_path / "out")
    with working_folder(tmp_path / "work"):
        pass
    assert listing(tmp_path) == ["out", "work"] and not listing(tmp_path / "work")


def test_another_thread_is_another_run_and_the_same_one_is_not(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with reserved(tmp_path / "out"):
                said.append("both")
        except MspError as error:
            said.append(str(error))

    with reserved(tmp_path / "out"):
        with reserved(tmp_path / "out"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and f"process {os.getpid()}" in said[0]
    assert not listing(tmp_path)


def test_a_file_system_without_locks_is_written_to_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuses)
    (tmp_path / ".out.msp-partial").mkdir()
    with pytest.warns(UserWarning, match="no lock can be held there"):
        make(tmp_path / "out")
    # whether another run is writing there is not known, so it stays
    assert listing(tmp_path) == [".out.msp-partial", "out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "msp-test", place]).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_leaves_what_was_there(small_disk: Path) -> None:
    out = make(small_disk / "out")
    write_text(small_disk / "file", "old")
    write_results(small_disk / "found", {"a": "old"})
    before, names = tree(small_disk), listing(small_disk)
    big = "x" * 100_000
    with pytest.raises(MspError, match=r"out cannot be written.*No space left"):
        save_packed(packed_model("llama"), None, out, recipe={}, force=True)
    with pytest.raises(MspError, match="file cannot be written: No space left"):
        write_text(small_disk / "file", big)
    with pytest.raises(MspError, match=r"tokens cannot be written.*(No space left|os error 28)"):
        write_tensors({"tokens": torch.zeros(100_000)}, small_disk / "tokens")
    with pytest.raises(MspError, match="a cannot be written: No space left"):
        write_results(small_disk / "found", {"a": big})
    assert listing(small_disk) == names
    mark = str(small_disk / "found" / MARK)
    assert {**tree(small_disk), mark: b""} == {**before, mark: b""}
    write_results(small_disk / "found", {"a": "new"})
    with pytest.raises(MspError, match=r"b\.0\.q\.safetensors cannot be written"):
        StoredRanks(small_disk)["b.0.q"] = {8: torch.zeros(100_000, dtype=torch.uint8)}


def test_a_tokenizer_that_cannot_be_written_is_an_error_of_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    own = tokenizer()
    monkeypatch.setattr(own, "save_pretrained", full)
    with pytest.raises(MspError, match=r"out cannot be written: the tokenizer: No space left"):
        save_packed(packed_model("llama"), own, tmp_path / "out", recipe={})
    assert listing(tmp_path) == []


def test_hidden_states_have_no_name_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill would leave them there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    allocate, seen = os.posix_fallocate, []
    monkeypatch.setattr(os, "posix_fallocate", lambda *a: seen.append(listing(tmp_path)) or allocate(*a))
    states = HiddenStates(limit=0)
    states.put("x", State(torch.arange(32.0).view(1, 4, 8), {}))
    assert seen == [[]] and listing(tmp_path) == []
    assert torch.equal(states.get("x").hidden, torch.arange(32.0).view(1, 4, 8))


def test_hidden_states_on_a_full_disk_are_an_error_and_no_crash(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a mapped page that has no room would be a SIGBUS."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    states = HiddenStates(limit=0)
    states.put("small", State(torch.ones(1, 4, 8), {}))
    with pytest.raises(MspError, match=r"hidden states cannot be written: No space left.*TMPDIR"):
        states.put("large", State(torch.ones(1, 400, 100), {}))


def test_a_search_whose_checkpoint_cannot_grow_says_so(tmp_path: Path, text: str) -> None:
    save("llama", tmp_path / "llama")
    options: dict[str, Any] = {**SMALL, "sparsity": 0.6, "calibration": text, "evaluations": 640}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(MspError, match=r"search\.json cannot be written: File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
        try:
            search(tmp_path / "llama", output=tmp_path / "out", work_dir=tmp_path / "work", **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) in (["llama"], ["llama", "work"])


def test_a_file_that_cannot_grow_is_as_before(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with small_files(), pytest.raises(MspError, match="file cannot be written: File too large"):
        write_text(tmp_path / "file", "x" * 30_000)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old" and listing(tmp_path) == ["file"]


def test_a_full_object_store_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullError(Exception):
        pass

    def put(_: object) -> None:
        raise FullError("no memory is left\nand more")

    ray = SimpleNamespace(
        put=put,
        util=SimpleNamespace(register_serializer=lambda *_, **__: None, deregister_serializer=lambda *_: None),
        exceptions=SimpleNamespace(ObjectStoreFullError=FullError, OutOfDiskError=OSError),
    )
    monkeypatch.setattr(distributed, "_own_code", lambda compression: [])
    with pytest.raises(MspError, match=r"object store has no room .*: no memory is left; free memory"):
        distributed._put(ray, SimpleNamespace(compression=None))


def test_ray_does_not_take_the_handler_of_sigterm() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with distributed._own_sigterm():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) == before
