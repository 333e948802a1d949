"""A folder that appears whole or not at all: destinations, leftovers of the killed, what is on the disk before its name."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from qwen3_jax.checkpoint import folder as module
from qwen3_jax.checkpoint.folder import check_destination, whole_folder
from qwen3_jax.checkpoint.reading import CheckpointError

LEFT = ".out.0123abcd.part"


def put(place: Path, text: str, overwrite: bool = False) -> None:
    with whole_folder(place, overwrite) as part:
        (part / "sub").mkdir()
        (part / "sub" / "file").write_text(text)


def held(place: Path) -> str | None:
    file = place / "sub" / "file"
    return file.read_text() if file.is_file() else None


def test_what_fills_the_place_meanwhile_stays_unless_it_may_be_replaced(tmp_path):
    def filled(overwrite):
        with whole_folder(tmp_path / "out", overwrite) as part:
            (part / "new").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("precious")

    with pytest.raises(CheckpointError, match="out is not empty"):
        filled(False)
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]
    shutil.rmtree(tmp_path / "out")
    filled(True)
    assert os.listdir(tmp_path / "out") == ["new"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_comes_meanwhile_stays(tmp_path, overwrite):
    with pytest.raises(CheckpointError, match="Not a directory"):
        with whole_folder(tmp_path / "out", overwrite):
            (tmp_path / "out").write_text("precious")
    assert (tmp_path / "out").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    put(tmp_path / "out", "new")
    assert held(tmp_path / "out") == "new"


def test_what_cannot_be_removed_does_not_hide_the_error_and_goes_the_next_time(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(os, "rmdir", refuse)
        with whole_folder(tmp_path / "out", False) as part:
            (part / "file").write_text("half")
            raise ZeroDivisionError
    assert len(os.listdir(tmp_path)) == 1
    put(tmp_path / "out", "new")
    assert os.listdir(tmp_path) == ["out"]


def test_the_umask_holds_and_two_writers_at_once_do_not_meet(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "out", True) as outer:
            put(tmp_path / "out", "inner", overwrite=True)
            (outer / "sub").mkdir()
            (outer / "sub" / "file").write_text("outer")
            assert held(tmp_path / "out") == "inner"
    finally:
        os.umask(before)
    assert held(tmp_path / "out") == "outer"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["out"]


def test_only_what_is_left_over_from_this_very_place_is_removed(tmp_path):
    """Names are compared whole: the `[`, `*` and `.` in a folder's own name mean themselves."""
    place = tmp_path / "a[b].*"
    left = [".a[b].*.0123abcd.part", ".a[b].*.00000000.part"]
    others = [
        ".ab.x.0123abcd.part",
        ".a[b].*.0123ABCD.part",
        ".a[b].*.0123abcd.part.x",
        ".a[b].*.more.0123abcd.part",
        ".a[b].*.0123.part",
    ]
    for name in left + others:
        (tmp_path / name / "x").mkdir(parents=True)
    put(place, "new")
    assert sorted(os.listdir(tmp_path)) == sorted([place.name, *others])


def test_a_part_that_somebody_holds_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / LEFT).mkdir()
    handle = os.open(tmp_path / LEFT, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    put(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == [LEFT, "out"]
    os.close(handle)

    def unsupported(handle, flags):
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", unsupported)
        put(tmp_path / "out", "newer", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [LEFT, "out"] and held(tmp_path / "out") == "newer"
    put(tmp_path / "out", "newest", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("how", ["held", "gone", "replaced"])
def test_a_part_taken_for_a_leftover_before_it_is_locked_is_made_again(tmp_path, monkeypatch, how):
    """Another writer starts between this one's mkdir and its lock."""
    flock, handles = fcntl.flock, []

    def taken(handle, flags):
        if not handles:
            (part,) = tmp_path.iterdir()
            handles.append(os.open(part, os.O_RDONLY))
            if how == "held":
                flock(handles[0], flags)
            else:
                part.rename(tmp_path / "elsewhere")
                if how == "replaced":
                    part.mkdir()
        return flock(handle, flags)

    monkeypatch.setattr(fcntl, "flock", taken)
    with whole_folder(tmp_path / "out", False) as part:
        assert not os.path.samestat(os.stat(part), os.fstat(handles[0]))
        probe = os.open(part, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(probe)
    os.close(handles[0])
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_while_folders_change_places_leaves_the_old(tmp_path, monkeypatch, exchange):
    put(tmp_path / "out", "old")
    rename = os.rename

    def fail(first, second):
        if str(first).endswith(".part"):
            raise OSError(errno.ENOTEMPTY if (tmp_path / "out").exists() else errno.EIO, "no", str(first))
        rename(first, second)

    monkeypatch.setattr(os, "rename", fail)
    if exchange:
        monkeypatch.setattr(module, "_swap", lambda part, place: fail(place.with_suffix(".part"), place))
    else:
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    with pytest.raises(CheckpointError, match="no$"):
        put(tmp_path / "out", "new", overwrite=True)
    assert held(tmp_path / "out") == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_an_old_folder_between_two_renames_is_put_back(tmp_path, there):
    """What a kill leaves where folders cannot be exchanged: before the second rename, and after it."""
    old = tmp_path / ".out.0123abcd.old"
    if there:
        put(tmp_path / "out", "new")
        put(old, "old")
    else:
        put(old, "old")
        put(tmp_path / LEFT, "new")
        handle = os.open(tmp_path / LEFT, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out", False):
            raise ZeroDivisionError
        assert sorted(os.listdir(tmp_path)) == [old.name, LEFT]  # its writer is at work
        os.close(handle)
    with pytest.raises(CheckpointError, match="out is not empty"):
        put(tmp_path / "out", "newer")
    assert held(tmp_path / "out") == ("new" if there else "old")
    assert os.listdir(tmp_path) == ["out"]


def test_all_is_on_the_disk_before_the_rename_and_the_names_after_it(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(handle):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noted_rename(first, second):
        events.append(("rename", str(second)))
        rename(first, second)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    place = tmp_path / "deep" / "deeper" / "out"
    with whole_folder(place, False) as part:
        (part / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            (part / name).write_text("x")
        wanted = {str(part / name) for name in ("", "a", "b", "sub", "sub/c")}
    at = events.index(("rename", str(place)))
    assert {name for _, name in events[:at]} >= wanted
    assert {name for _, name in events[at + 1 :]} >= {str(path) for path in list(place.parents)[:3]}


def test_a_place_that_cannot_be_replaced_is_refused_at_the_door(tmp_path, monkeypatch):
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    with pytest.raises(CheckpointError, match="a/x: Too many levels of symbolic links"):
        check_destination(tmp_path / "a" / "x", True, 0)
    with pytest.raises(CheckpointError, match="/proc is a mount point"):
        check_destination(Path("/proc"), True, 0)
    (tmp_path / "out" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "here")
    for place in (Path("."), tmp_path / "out" / "here", tmp_path / "out"):
        with pytest.raises(CheckpointError, match="the folder that this process works in"):
            check_destination(place, True, 0)
    check_destination(Path("below"), True, 0)
    check_destination(tmp_path / "out" / "other", True, 0)
    (tmp_path / "file").write_text("")
    for place, reason in ((tmp_path / ("n" * 300), "File name too long"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(CheckpointError, match=f"{place}: {reason}"):
            check_destination(place, False, 0)
        with pytest.raises(CheckpointError, match=f": {reason}"):
            put(place, "x")


def test_an_unlistable_place_is_one_line(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'out'}: Permission denied$"):
        check_destination(tmp_path / "out", False, 0)


def test_the_disk_is_the_one_where_the_link_leads(tmp_path, monkeypatch):
    (tmp_path / "big").mkdir()
    os.symlink("big/new/out", tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 if Path(path) == tmp_path / "big" else 10**9))
    with pytest.raises(CheckpointError, match=r"its disk has 1 bytes? free"):
        check_destination(tmp_path / "out", True, 1000)
    put(tmp_path / "out", "new")
    assert held(tmp_path / "big" / "new" / "out") == "new" and (tmp_path / "out").is_symlink()
