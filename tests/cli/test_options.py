import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uadtool.cli import options


def parse(value):
    command = options.classes(click.Command("any", callback=lambda **_: None))
    return command.make_context("any", ["--classes", value]).params["classes"]


@pytest.mark.parametrize(("value", "names"), [
    ("screw,pcb", ["screw", "pcb"]), ("screw, pcb ", ["screw", "pcb"]), ("wood board", ["wood board"]),
    ('"a,b",c', ["a,b", "c"]), (' "a, b" , c', ["a, b", "c"]), ('" a "', [" a "]),
    ('5" disk,"5"" disk"', 2 * ['5" disk']),
    ("Geh\udce4use", ["Geh\udce4use"]), ("a\nb,c", ["a\nb", "c"]),
])
def test_classes(value, names):
    assert parse(value) == names


@given(st.lists(st.text(min_size=1), min_size=1))
def test_any_names_in_quotes(names):
    assert parse(",".join('"' + name.replace('"', '""') + '"' for name in names)) == names


@given(st.lists(st.text(st.characters(exclude_characters=',"'), min_size=1), min_size=1))
def test_names_without_commas_need_no_quotes(names):
    if all(map(str.strip, names)):
        assert parse(",".join(names)) == [name.strip() for name in names]
    else:
        with pytest.raises(click.BadParameter):
            parse(",".join(names))


@pytest.mark.parametrize("value", ["", " ", ",", "a,", "a,,b", '"a', '"a"b', 'a,""'])
def test_what_is_not_a_list_of_classes(value):
    with pytest.raises(click.BadParameter, match="put a name with a comma in double quotes"):
        parse(value)
