import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uadtool.errors import UadtoolError
from uadtool.files import (
    COPIED,
    UNSUPPORTED,
    atomic_write,
    check_folder,
    check_writable,
    claimed,
    file_digest,
    list_digest,
    remove_leftovers,
)
from uadtool.schemas.json_files import read_json, write_json


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "file.json"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path  # os.replace is atomic within a file system
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [UadtoolError("refused"), ValueError("bug"), KeyboardInterrupt(), SystemExit(143)])
def test_the_old_file_stays_when_the_block_fails(tmp_path, error):
    path = tmp_path / "file.json"
    path.write_text("old")

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)) as raised:
        write()
    assert raised.value is error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    def write():
        with atomic_write(tmp_path / "file.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UadtoolError, match=r"^cannot write .*file.json: No space left on device$"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("")
    finally:
        after = os.umask(before)
    assert after == mask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        for write in (check_writable, lambda path: write_json({}, path)):
            with pytest.raises(UadtoolError, match=f"^cannot write {path}: "):
                write(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_folder_of_an_output_is_made(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "x")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_two_commands_do_not_write_one_file(tmp_path):
    with claimed(tmp_path / "x", [str(tmp_path / "input")]):
        with pytest.raises(UadtoolError, match=r"another command is writing .*x; wait for it, or give this output"), \
                claimed(tmp_path / "x"):
            pass
        check_writable(tmp_path / "x")  # which removes what killed commands left, and no more
        with pytest.raises(UadtoolError, match="another command is writing"), claimed(tmp_path / "x"):
            pass
        with claimed(tmp_path / "y"):
            pass
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "x"):
        pass


def test_a_killed_command_leaves_no_claim(tmp_path):
    program = ("import os, sys; from uadtool.files import claimed\n"
               "with claimed(sys.argv[1]): print('claimed', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "x"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"claimed\n"
        with pytest.raises(UadtoolError, match="another command is writing"), claimed(tmp_path / "x"):
            pass
        process.kill()
        process.wait()
    with claimed(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_folder_that_seems_writable():
    folder = Path("/proc/self/fd")
    assert os.access(folder, os.W_OK)
    for check, path in ((check_writable, folder / "x"), (check_folder, folder)):
        with pytest.raises(UadtoolError, match=f"^cannot write {path}: No such file or directory$"):
            check(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    for write in (check_writable, lambda path: write_json({}, path)):
        with pytest.raises(UadtoolError, match="cannot write"):
            write(tmp_path / "file")


# Volumes that lack something


VOLUME = """
import errno, os, sys
from pathlib import Path
from uadtool.errors import UadtoolError
from uadtool.files import atomic_write, check_folder, check_writable

folder = Path(sys.argv[1])
refused = {event: getattr(errno, name) for event, _, name in (word.partition("=") for word in sys.argv[2:])}
locked = set()


def inode(file):
    status = os.stat(file)
    return status.st_dev, status.st_ino


def hook(event, arguments):
    if event == "fcntl.flock" and "smb" in refused:
        (locked.discard if arguments[1] & 8 else locked.add)(inode(arguments[0]))  # LOCK_UN
    elif event == "open" and locked and os.path.isfile(arguments[0]) and inode(arguments[0]) in locked:
        raise OSError(refused["smb"], os.strerror(refused["smb"]))
    elif event in refused and (event == "fcntl.flock" or str(arguments[0]).startswith(str(folder))):
        raise OSError(refused[event], os.strerror(refused[event]))


sys.addaudithook(hook)
file = folder / "file"
for content in ("new", "newer", "newest"):
    check_folder(folder)
    check_writable(file)
    with atomic_write(file) as temporary:
        temporary.write_text(content)
    assert file.read_text() == content
    assert os.listdir(folder) == ["file"]
"""
"""Stands in for a volume where audit events, such as chmod=EPERM, fail. On smb, whoever opens a locked file again is
refused, even by another handle of the same process.
"""


def on_volume(folder, *refused):
    done = subprocess.run([sys.executable, "-c", VOLUME, str(folder), *refused], capture_output=True, text=True)
    return done.stderr.splitlines()[-1] if done.stderr else ""


@pytest.mark.parametrize("refused", [
    ["os.chmod=EPERM"],
    ["fcntl.flock=ENOLCK"],
    ["os.chmod=ENOTSUP", "fcntl.flock=ENOSYS", "os.rename=ENOSYS"],
    ["smb=EACCES"],
    *[[f"os.rename={errno.errorcode[number]}"] for number in sorted(COPIED)],
])
def test_volumes_that_lack_something_are_written(tmp_path, refused):
    assert on_volume(tmp_path, *refused) == ""


@pytest.mark.parametrize("refused", ["os.rename=EIO", "os.rename=EROFS", "open=ENOSPC", "os.remove=EPERM"])
def test_volumes_that_cannot_be_written_are_found_out_before(tmp_path, refused):
    reason = os.strerror(getattr(errno, refused.partition("=")[2]))
    assert on_volume(tmp_path, refused) == f"uadtool.errors.UadtoolError: cannot write {tmp_path}: {reason}"


def test_an_enforced_lock_protects_nothing(tmp_path):
    """Files of running processes have no lock there, so leftovers stay."""
    leftover = tmp_path / ".file.abc.uadtool-part"
    leftover.write_text("")
    assert on_volume(tmp_path, "smb=EACCES").startswith("AssertionError")  # two files in the folder
    assert leftover.exists()


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, *UNSUPPORTED])
def test_failures_of_fsync_count_unless_it_is_not_supported(tmp_path, monkeypatch, number, durable):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "file").write_text("old")

    def write():
        with atomic_write(tmp_path / "file", durable) as temporary:
            temporary.write_text("new")

    if number in UNSUPPORTED or not durable:
        write()
    else:
        for fail in (lambda: check_writable(tmp_path / "file"), write):
            with pytest.raises(UadtoolError, match=f"^cannot write {tmp_path}/file: {os.strerror(number)}$"):
                fail()
    assert (tmp_path / "file").read_text() == ("new" if number in UNSUPPORTED or not durable else "old")
    assert len(list(tmp_path.iterdir())) == 1


MOUNTED = """
mount --bind "$1/outside" "$1/file" || exit 77
"$2" -c 'import sys; from uadtool.files import check_writable; from uadtool.schemas.json_files import write_json
check_writable(sys.argv[1]); write_json({"new": 1}, sys.argv[1])' "$1/file"
"""


def test_a_file_that_is_a_mount_point_is_overwritten(tmp_path):
    """As containers have it: it cannot be replaced."""
    if not shutil.which("unshare"):
        pytest.skip("unshare")
    (tmp_path / "outside").write_text("a longer old content, of which nothing stays")
    (tmp_path / "file").touch()
    done = subprocess.run(["unshare", "-rm", "sh", "-c", MOUNTED, "sh", str(tmp_path), sys.executable],
                          capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounts are not allowed")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "outside").read_text()) == {"new": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "outside"]


# Links, inputs and leftovers


@pytest.mark.parametrize("target", ["here.json", "elsewhere/there.json"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_and_its_target_is_written(tmp_path, target, exists):
    (tmp_path / "elsewhere").mkdir()
    if exists:
        (tmp_path / target).write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    check_writable(link)
    write_json({"new": 1}, link)
    assert link.is_symlink()
    assert json.loads((tmp_path / target).read_text()) == {"new": 1}


def test_redirected_stdout_is_written_and_its_name_stays(tmp_path):
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    program = f"from uadtool.schemas.json_files import write_json; write_json({{}}, '{tmp_path}/stdout')"
    with (tmp_path / "file").open("w") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert (tmp_path / "file").read_text() == "{}\n"
    assert (tmp_path / "stdout").is_symlink()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)  # a pipe
    assert done.returncode == 1
    assert b"is not a regular file" in done.stderr


def test_inputs_are_not_overwritten(tmp_path):
    (tmp_path / "model").write_text("weeks of work")
    (tmp_path / "link").symlink_to("model")
    for one, other in (("model", "model"), ("link", "model"), ("model", "link")):
        with pytest.raises(UadtoolError, match=f"{one} is an input of this command; give"):
            check_writable(tmp_path / one, [None, str(tmp_path / other)])
    check_writable(tmp_path / "other", [str(tmp_path / "model")])


def test_files_of_other_programs_stay(tmp_path):
    for name in (".download.part", ".file.abc.part", ".file.uadtool-part-of-mine", "file.uadtool-part"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".file.abc.uadtool-part").write_text("left by a run that was killed")
    check_writable(tmp_path / "file")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".download.part", ".file.abc.part", ".file.uadtool-part-of-mine", "file.uadtool-part"]


def test_a_file_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def flock(handle, operation):
        if len(removed) < 3 and not operation & fcntl.LOCK_NB:  # between the creation of a file and its lock
            removed.extend(tmp_path.iterdir())
            remove_leftovers(tmp_path)
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_json({"new": 1}, tmp_path / "file")
    assert json.loads((tmp_path / "file").read_text()) == {"new": 1}
    assert len(set(removed)) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_checking_leaves_no_trace(tmp_path, monkeypatch):
    check_writable(tmp_path / "file")
    check_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    check_writable("file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("old")
    check_writable("file")
    assert (tmp_path / "file").read_text() == "old"


def test_the_longest_name_that_a_file_can_have(tmp_path):
    room = os.pathconf(tmp_path, "PC_NAME_MAX") - len("..12345678.uadtool-part")
    check_writable(tmp_path / ("x" * room))
    write_json({}, tmp_path / ("x" * room))
    with pytest.raises(UadtoolError, match=r"File name too long$"):
        check_writable(tmp_path / ("x" * (room + 1)))


@given(data=st.binary(max_size=100), repeat=st.sampled_from([1, 30_000]))
def test_file_digest_is_that_of_sha256sum(tmp_path_factory, data, repeat):
    path = tmp_path_factory.getbasetemp() / "digest"
    path.write_bytes(data * repeat)
    assert file_digest(path) == "sha256:" + hashlib.sha256(data * repeat).hexdigest()


def test_digest_of_an_unreadable_file(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UadtoolError, match=f"^cannot read {path}: "):
            file_digest(path)


PATHS = st.lists(st.text(st.characters(exclude_characters="\0")))  # with surrogates: names that are not UTF-8


@given(PATHS, PATHS)
def test_lists_have_one_digest_exactly_if_they_are_equal(one, other):
    one, other = ([line for line in lines if encodable(line)] for lines in (one, other))
    assert (list_digest(one) == list_digest(other)) == (one == other)
    assert list_digest(iter(one)) == list_digest(one)


def encodable(line):
    try:
        line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that no file name decodes to
        return False
    return True


def test_digests_of_lists_know_the_order_and_the_borders():
    digests = {list_digest(lines) for lines in ([], [""], ["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])}
    assert len(digests) == 6


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                      | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


@given(st.dictionaries(st.text(), VALUES))
def test_json_survives_being_written_and_read(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / "record.json"
    record = {**fields, "schema": "uadtool.test/1"}
    write_json(record, path)
    assert read_json(path, "uadtool.test/1") == record


def test_json_goes_through_stdout_and_stdin(capsys, monkeypatch):
    write_json({"schema": "uadtool.test/1", "name": "grün"})
    printed = capsys.readouterr().out
    assert printed.endswith("}\n")
    assert printed.isascii()
    monkeypatch.setattr(sys, "stdin", io.StringIO(printed))
    assert read_json("-", "uadtool.test/1")["name"] == "grün"


def test_json_holds_no_nan(tmp_path):
    path = tmp_path / "record.json"
    write_json({"value": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"value": float("nan")}, path)
    assert json.loads(path.read_text()) == {"value": 1}


@pytest.mark.parametrize(("data", "message"), [
    (b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"),
    (b"[]", "is not a uadtool.test/1 file"), (b"{}", "is not a uadtool.test/1 file"),
    (b'{"schema": "uadtool.tests/2"}', "is not a uadtool.test/1 file"),
    (b'{"schema": "uadtool.test/0"}', "is not a uadtool.test/1 file"),
    (b'{"schema": "uadtool.test/2"}', r"was written by a newer uadtool \(uadtool.test/2\); upgrade uadtool$"),
])
def test_other_files_are_refused(tmp_path, data, message):
    path = tmp_path / "record.json"
    path.write_bytes(data)
    with pytest.raises(UadtoolError, match=f"^{path} {message}") as error:
        read_json(path, "uadtool.test/1")
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(UadtoolError, match=f"^cannot read {tmp_path}/missing: No such file or directory$"):
        read_json(tmp_path / "missing", "uadtool.test/1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("{"))
    with pytest.raises(UadtoolError, match=r"^stdin is not JSON"):
        read_json("-", "uadtool.test/1")
