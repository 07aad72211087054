from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from skymoe.base import files
from skymoe.base.errors import ConfigError, MachineError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_atomic_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert names(tmp_path) == ["a.json"]
    assert files.sha256_file(path) == "fe32608c9ef5b6cf7e3f946480253ff76f24f4ec0678f3d0f07f9844cbff9601"


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left") as caught:
        files.write_atomic(path, b"new")
    assert caught.value.exit_code == 3
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a.json"])


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    """The kernel itself refuses (EFBIG): the file is not there afterwards."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write_atomic(tmp_path / "big", b"x" * 5000)
        except BaseException:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert names(tmp_path) == []


def test_staging_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with files.staging_directory(final) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "w").write_bytes(b"1")
        assert not final.exists()
        assert staging.parent == final.parent
        assert staging.name.startswith(".")
    assert (final / "sub" / "w").read_bytes() == b"1"
    assert names(final.parent) == ["model"]


def test_staging_vanishes_on_any_error(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), files.staging_directory(tmp_path / "model") as staging:
            (staging / "w").write_bytes(b"1")
            raise error
    assert names(tmp_path) == []


def test_staging_refuses_what_exists(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    with files.staging_directory(final) as staging:  # empty: nothing is lost
        (staging / "w").write_bytes(b"1")
    with pytest.raises(ConfigError, match="not empty"), files.staging_directory(final):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(final)
    for name in ("file", "link"):
        refusal = pytest.raises(ConfigError, match="not a directory")
        with refusal, files.staging_directory(tmp_path / name, overwrite=True):
            pytest.fail("the block must not run")
    assert names(tmp_path) == ["file", "link", "model"]


def test_overwrite_replaces_all_or_nothing(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for content in ("1", "2"):
        with files.staging_directory(final, overwrite=True) as staging:
            (staging / content).write_text(content)
    assert (names(final), names(tmp_path)) == (["2"], ["model"])
    with pytest.raises(RuntimeError), files.staging_directory(final, overwrite=True):
        raise RuntimeError
    assert (names(final), names(tmp_path)) == (["2"], ["model"])


def test_a_failed_publication_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "old").write_text("")
    rename = os.rename

    def refuse_staging(source: Path, target: Path) -> None:
        if ".tmp-" in Path(source).name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_staging)
    with pytest.raises(MachineError), files.staging_directory(final, overwrite=True) as staging:
        (staging / "new").write_text("")
    assert (names(final), names(tmp_path)) == (["old"], ["model"])


@pytest.mark.parametrize("name", [".", "./.", "..", "x/..", "../here", "gone/..", "/"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_working_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
) -> None:
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    staging = files.staging_directory(Path(name), overwrite=overwrite)
    for directory in (staging, files.resumable_directory(Path(name), "a", overwrite=overwrite)):
        with pytest.raises(ConfigError, match="working directory"), directory:
            pytest.fail("the block must not run")
    assert (names(tmp_path), names(tmp_path / "here")) == (["here"], ["x"])


def test_an_output_does_not_replace_its_source(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for source, told in (("a", "is the source"), ("b/../a", "is the source"), ("link", "is the source"),
                         ("a/b/c", "lies in the output")):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            files.refuse_source(tmp_path / "a", tmp_path / source)
    for source in ("ab", ".", "b/a"):
        files.refuse_source(tmp_path / "a", tmp_path / source)


def test_a_path_that_ends_in_dots_is_where_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for number, directory in enumerate(
        (files.staging_directory, lambda *a, **k: files.resumable_directory(*a, "f", **k))
    ):
        (tmp_path / "there" / "in").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="not empty.*\n.*\n.*--overwrite"), directory(Path("../there/in/..")):
            pytest.fail("the block must not run")
        with directory(Path("../there/in/.."), overwrite=True) as content:
            (content / f"w{number}").write_text("")
        assert (names(tmp_path), names(tmp_path / "there")) == (["here", "there"], [f"w{number}"])
    with files.staging_directory(Path("new/.")) as content:
        (content / "w").write_text("")
    assert names(tmp_path / "here" / "new") == ["w"]


def test_only_refusals_of_the_machine_are_translated() -> None:
    with pytest.raises(FileNotFoundError), files.machine_errors("here", paths=False):
        raise FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(MachineError, match="here: .*denied"), files.machine_errors("here"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_path_that_leads_nowhere_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*cannot be used") as caught:
        files.write_atomic(tmp_path / "nowhere" / "x.html", b"")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere/x.html", "there is no directory"),
        ("there", "it is a directory"),
        (".", "it is a directory"),
        ("there/file/x.html", "there is no directory"),
        ("x" * 250, "too long"),
    ],
)
def test_a_refused_file_is_told_by_the_name_that_was_given(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    with pytest.raises(ConfigError, match=told) as caught:
        files.write_atomic(tmp_path / name, b"")
    assert str(tmp_path / name).startswith(caught.value.where.removesuffix("...")) and ".tmp-" not in str(caught.value)
    assert (names(tmp_path), names(tmp_path / "there")) == (["there"], ["file"])


def test_interrupted_work_is_found_again(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), files.resumable_directory(final, "of a") as content:
            (content / error.__name__).write_text("done")
            (content / ".x.json.tmp-0123abcd").write_text("half")
            raise error
        assert names(final.parent) == [".model.partial"]
    with files.resumable_directory(final, "of a") as content:
        assert names(content) == ["GeneratorExit", "KeyboardInterrupt", "SystemExit"]
    assert (names(final), names(final.parent)) == (["GeneratorExit", "KeyboardInterrupt", "SystemExit"], ["model"])


def test_work_on_something_else_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    final = tmp_path / "model"
    caplog.set_level("INFO", "skymoe")
    for fingerprint in ("of a", "of b"):
        with pytest.raises(KeyboardInterrupt), files.resumable_directory(final, fingerprint) as content:
            assert names(content) == []
            (content / fingerprint).write_text("")
            raise KeyboardInterrupt
    assert "the same command goes on" in caplog.text
    assert "begun anew" in caplog.text


def test_an_error_leaves_nothing_to_resume(tmp_path: Path) -> None:
    for error in (RuntimeError, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        with pytest.raises((RuntimeError, MachineError)), files.resumable_directory(tmp_path / "m", "a") as content:
            (content / "w.part").write_bytes(b"1")
            (content / ".c.json.tmp-0123abcd").write_bytes(b"1")
            raise error
        assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), MachineError("not enough space")])
def test_a_full_disk_does_not_cost_what_is_finished(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "skymoe")
    with pytest.raises(MachineError), files.resumable_directory(tmp_path / "m", "a") as content:
        (content / "w").write_bytes(b"1")
        raise error
    assert "kept: the same command goes on" in caplog.text
    with pytest.raises(MachineError), files.resumable_directory(tmp_path / "m", "a") as content:
        raise error  # at once: nothing was added
    with pytest.raises(RuntimeError), files.resumable_directory(tmp_path / "m", "a") as content:
        assert names(content) == ["w"]
        raise RuntimeError
    assert names(tmp_path) == []


def test_resumable_refuses_and_replaces_like_staging(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), files.resumable_directory(final, "a") as content:
        (content / "w").write_bytes(b"1")
        raise KeyboardInterrupt
    final.mkdir()
    (final / "theirs").write_text("")
    with pytest.raises(ConfigError, match="not empty"), files.resumable_directory(final, "a"):
        pytest.fail("the block must not run")
    with files.resumable_directory(final, "a", overwrite=True) as content:
        assert names(content) == ["w"]  # the refusal did not cost the work
    assert (names(final), names(tmp_path)) == (["w"], ["model"])


def test_two_runs_cannot_write_one_directory(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with files.resumable_directory(final, "a") as content:
        (content / "w").write_text("mine")
        with pytest.raises(MachineError, match="another run"), files.resumable_directory(final, "b"):
            pytest.fail("the block must not run")
    assert (names(final), names(tmp_path)) == (["w"], ["model"])


def test_a_lock_on_a_file_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before us publishes and removes the record between our opening and our locking it."""
    lock, partial = files._lock, tmp_path / ".model.partial"
    calls = []

    def late(file: object, final: Path) -> None:
        lock(file, final)
        calls.append(file)
        if len(calls) == 1:
            shutil.rmtree(partial)

    monkeypatch.setattr(files, "_lock", late)
    with files.resumable_directory(tmp_path / "model", "a") as content:
        assert (content.parent / "fingerprint").read_text() == "a"
    assert (len(calls), names(tmp_path)) == (2, ["model"])
