"""Generated pages and pictures are those of the code; each says how to make it again."""

from pathlib import Path

from tools import config_table, draw_rooms

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_config_keys_is_up_to_date():
    assert (DOCS / "config.md").read_text() == config_table.text()


def test_the_picture_of_the_rooms_is_up_to_date():
    assert (DOCS / "architecture.svg").read_text() == draw_rooms.draw()
