"""A file is written whole or stays as it was; a folder is there whole or not at all."""

import pytest

from dpo_mini._files import whole_folder, write_whole


def test_it_writes_and_replaces(tmp_path):
    write_whole(tmp_path / "a", b"old")
    write_whole(str(tmp_path / "a"), b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["os.fsync", "os.chmod", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file(monkeypatch, tmp_path, step, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_kept(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_an_absent_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "a", b"new")


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "new") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_bytes(b"a")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "inner" / "a").read_bytes() == b"a"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with (
        pytest.raises(
            FileExistsError, match="`path` must be a new folder, got .*new, which is there"
        ),
        whole_folder(tmp_path / "new"),
    ):
        pass


@pytest.mark.parametrize("step", ["os.fsync", "os.chmod", "os.rename"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_no_folder(monkeypatch, tmp_path, step, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)), whole_folder(tmp_path / "new") as partial:
        (partial / "a").write_bytes(b"a")
    assert list(tmp_path.iterdir()) == []


def test_what_other_processes_write_beside_it_stays(tmp_path):
    """Only a caller knows what is its own: `test_real_runs.py` has what checkpoints remove."""
    other, file = tmp_path / ".new.abcdefgh.part", tmp_path / ".file.part"
    other.mkdir()
    (other / "half").write_bytes(b"h")
    file.write_bytes(b"a file of somebody")
    with whole_folder(tmp_path / "new"):
        assert (other / "half").exists()
    assert {path.name for path in tmp_path.iterdir()} == {other.name, file.name, "new"}
