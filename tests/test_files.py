import os
import stat

import pytest

from hf_e5.errors import InputError
from hf_e5.files import whole_file, whole_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_mode_is_that_of_any_new_file(tmp_path, umask):
    with whole_file(tmp_path / "file") as file:
        file.write(b"text")
    with whole_folder(tmp_path / "folder"):
        pass
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path, "w") as file:
        file.write("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    with whole_file(path, "w") as file:
        file.write("néw")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "néw" and names(tmp_path) == ["file"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    with whole_file(tmp_path / "link") as file:
        file.write(b"text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_bytes() == b"text"


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), whole_folder(out) as folder:
        (folder / "part").write_text("half")
        raise RuntimeError
    assert names(tmp_path / "new") == []
    with whole_folder(out) as folder:
        assert folder.name == "out" and not out.exists()
        (folder / "part").write_text("whole")
    assert names(tmp_path / "new") == ["out"] and (out / "part").read_text() == "whole"


def write(out, content):
    with whole_folder(out, marker=".mark") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(content)


@pytest.mark.parametrize("addition", ["empty/", "deep/other", "link"])
def test_only_what_an_earlier_call_wrote_is_replaced(tmp_path, addition):
    out = tmp_path / "out"
    write(out, "first")
    write(out, "second")
    assert (out / "deep" / "file").read_text() == "second" and names(tmp_path) == ["out"]
    if addition == "link":
        (tmp_path / "other").mkdir()
        (out / addition).symlink_to(tmp_path / "other")
    elif addition.endswith("/"):
        (out / addition).mkdir()
    else:
        (out / addition).write_text("mine")
    with pytest.raises(InputError, match=f"also holds {addition.rstrip('/')}"):
        write(out, "third")
    assert (out / "deep" / "file").read_text() == "second"


def test_what_is_put_there_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    for marker in (None, ".mark"):
        with pytest.raises(InputError, match="out: exists"), whole_folder(out, marker=marker):
            out.mkdir()
            (out / "file").write_text("mine")
        assert (out / "file").read_text() == "mine" and names(tmp_path) == ["out"]
        (out / "file").unlink()
        out.rmdir()


def test_what_cannot_be_a_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("data")
    with pytest.raises(InputError, match="file: exists and is no folder"), whole_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="Not a directory"), whole_folder(tmp_path / "file" / "deep" / "out"):
        pass
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with whole_folder(tmp_path / "dangling"):
        pass
    assert (tmp_path / "nowhere").is_dir()
