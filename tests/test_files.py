"""Files that are whole or absent."""

import pytest

from tl_crosscoder.files import write_atomically


def test_of_two_writers_of_one_file_both_finish_and_the_last_stays(tmp_path):
    path = tmp_path / "file"

    def slower(temporary):
        temporary.write_text("slower")
        write_atomically(path, lambda other: other.write_text("faster"))  # as another job meanwhile
        assert path.read_text() == "faster"

    write_atomically(path, slower)
    assert path.read_text() == "slower"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def failing(temporary):
        temporary.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_atomically(path, failing)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
