"""A folder that is replaced by a process that is killed, before every system call, or that meets an error."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from haori.core import folder_swap
from haori.core.errors import StorageError
from haori.core.storage import staged_folder, sweep

# Kills itself when it is about to touch the file system for the nth time; prints the call it would have made.
REPLACE = """
import os, signal, sys
from pathlib import Path
from haori.core import folder_swap
from haori.core.storage import staged_folder

final, kill_at, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
calls = 0

def count(event, arguments):
    global calls
    if event.partition(".")[0] not in ("os", "shutil") and event not in ("open", "exchange"):
        return
    calls += 1
    if calls == kill_at:
        os.write(1, event.encode())
        os.kill(os.getpid(), signal.SIGKILL)

if exchange:
    real = folder_swap._exchange
    def audited(first, second):
        sys.audit("exchange")
        done = real(first, second)
        assert done
        sys.audit("exchange")
        return done
    folder_swap._exchange = audited
else:
    folder_swap._exchange = lambda first, second: False
sys.addaudithook(count)
with staged_folder(final) as stage:
    for name in ("a", "b"):
        (stage / name).write_text("new")
print("done", calls)
"""


def replace(final: Path, kill_at: int, way: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", REPLACE, str(final), str(kill_at), way]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW = {"a": "old", "c": "old"}, {"a": "new", "b": "new"}


def old_folder(final: Path) -> None:
    final.mkdir(parents=True)
    for name, text in OLD.items():
        (final / name).write_text(text)


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_before_every_system_call_it_leaves_the_old_or_the_new_folder(tmp_path: Path, way: str):
    if way == "exchange" and folder_swap._exchange_call() is None:
        pytest.skip("this system cannot exchange two names")
    seen: list[dict[str, str]] = []
    gone: list[str] = []
    for step in range(1, 200):
        final = tmp_path / str(step) / "final"
        old_folder(final)
        ended = replace(final, step, way)
        if ended.returncode == 0:
            assert ended.stdout.startswith("done"), ended
            break
        assert ended.returncode == -9, ended.stderr
        if not final.exists():
            gone.append(ended.stdout)
        sweep(final.parent)  # as the next start does
        assert content(final) in (OLD, NEW), (step, ended.stdout)
        assert [path.name for path in final.parent.iterdir()] == ["final"]
        seen.append(content(final))
    assert content(final) == NEW and [path.name for path in final.parent.iterdir()] == ["final"]
    assert OLD in seen and NEW in seen and seen == sorted(seen, key=[OLD, NEW].index)
    assert len(seen) > 10
    # With an exchange there is no moment without the folder; without one there is, and the old one comes back.
    assert gone == ([] if way == "exchange" else ["os.rename"])


@pytest.mark.parametrize("step", range(1, 60, 4))
def test_the_next_writer_puts_right_what_a_killed_one_left(tmp_path: Path, step: int):
    final = tmp_path / "final"
    old_folder(final)
    replace(final, step, "two renames")
    with staged_folder(final) as stage:
        (stage / "a").write_text("third")
    assert content(final) == {"a": "third"}
    assert not list(tmp_path.glob("*.old"))


def test_an_error_at_the_last_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch):
    final = tmp_path / "final"
    old_folder(final)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if Path(target) == final and not self.name.endswith(".old"):
            raise OSError(errno.ENOSPC, "no space")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(folder_swap, "_exchange", lambda first, second: False)
    with pytest.raises(StorageError, match="disk is full"), staged_folder(final) as stage:
        (stage / "a").write_text("new")
    assert content(final) == OLD and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_folder_that_cannot_be_deleted_does_not_undo_the_new_one(tmp_path: Path, monkeypatch):
    final = tmp_path / "final"
    old_folder(final)

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(folder_swap, "delete_folder", fail)
    with staged_folder(final) as stage:
        (stage / "a").write_text("new")
    assert content(final) == {"a": "new"}


def test_a_file_in_the_place_is_kept(tmp_path: Path):
    final = tmp_path / "final"
    final.write_text("a user's")
    with pytest.raises(StorageError, match="in the way"), staged_folder(final) as stage:
        (stage / "a").write_text("new")
    assert final.read_text() == "a user's" and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_link_in_the_place_is_replaced_and_what_it_points_to_is_kept(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("kept")
    (tmp_path / "final").symlink_to(tmp_path / "elsewhere")
    with staged_folder(tmp_path / "final") as stage:
        (stage / "a").write_text("new")
    assert content(tmp_path / "elsewhere") == {"a": "kept"} and content(tmp_path / "final") == {"a": "new"}


def test_writers_of_one_folder_at_once_leave_one_of_theirs(tmp_path: Path):
    code = REPLACE.replace('"new"', "str(os.getpid())")
    for way in ("exchange", "two renames"):
        final = tmp_path / way / "final"
        old_folder(final)
        command = [sys.executable, "-c", code, str(final), "0", way]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
        for process in running:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
        held = content(final)
        assert set(held) == {"a", "b"} and len(set(held.values())) == 1
        assert [path.name for path in final.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_another_writer_may_recover_between_any_two_calls(tmp_path: Path, way: str):
    code = REPLACE.replace("os.kill(os.getpid(), signal.SIGKILL)", "folder_swap.recover(final)")
    for step in range(1, 200):
        final = tmp_path / str(step) / "final"
        old_folder(final)
        command = [sys.executable, "-c", code, str(final), str(step), way]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, (step, ended.stdout, ended.stderr)
        assert content(final) == NEW
        assert [path.name for path in final.parent.iterdir()] == ["final"], step
        if int(ended.stdout.split()[-1]) < step:
            break
    assert step > 10


# Instead of killing itself: puts a folder of its own there, as another process would that has just recovered.
ANOTHER = """recover, folder_swap.recover = folder_swap.recover, lambda final: None
        new = final.parent / "another"
        new.mkdir()
        for name in ("a", "b"):
            (new / name).write_text("another's")
        folder_swap.put_in_place(new, final)
        folder_swap.recover = recover"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_another_writer_may_replace_it_between_any_two_calls(tmp_path: Path, way: str):
    code = REPLACE.replace("os.kill(os.getpid(), signal.SIGKILL)", ANOTHER)
    for step in range(1, 200):
        final = tmp_path / str(step) / "final"
        old_folder(final)
        command = [sys.executable, "-c", code, str(final), str(step), way]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, (step, ended.stdout, ended.stderr)
        assert len(set(content(final).values())) == 1 and set(content(final)) == {"a", "b"}, step
        assert [path.name for path in final.parent.iterdir()] == ["final"], (step, ended.stdout)
        if int(ended.stdout.split()[-1]) < step:
            break
    assert step > 10


def test_names_that_look_alike_are_told_apart(tmp_path: Path):
    with staged_folder(tmp_path / "base.old"):
        folder_swap.recover(tmp_path / "base")  # the unfinished folder of another is not taken for its old one
        assert not (tmp_path / "base").exists()
        aside = tmp_path / ".base.x.abcdefgh.old"
        aside.mkdir()
        folder_swap.recover(tmp_path / "base")
        assert not (tmp_path / "base").exists() and aside.exists()
        folder_swap.recover(tmp_path / "base.x")
        assert (tmp_path / "base.x").exists()
