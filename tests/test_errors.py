"""The first line of another library's error is what one of ours quotes."""

import pytest

from elastictok_jax.errors import first_line


@pytest.mark.parametrize(
    ("text", "until", "line"),
    [
        ("no room\nat all", (), "no room"),
        ("\n\n  no room \n", (), "no room"),
        ("no room. See details [spec]", (". See", " [spec"), "no room"),
        ("no room [spec]. See details", (". See", " [spec"), "no room"),
        ("", (), "OSError"),
        (" [spec]", (" [spec", "[spec"), "OSError"),
    ],
)
def test_first_line(text, until, line):
    assert first_line(OSError(text), until=until) == line
