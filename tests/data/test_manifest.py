import codecs
import csv
import io
import json
import os
from pathlib import Path
from typing import Dict, List

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from uadtool.data.manifest import KEYS, read_manifest
from uadtool.errors import UadtoolError

TABLE = "path,class,label\nline 1/a.png,bolt,good\nb.png,Gehäuse,crack\n"
ROWS = [
    {"path": "line 1/a.png", "class": "bolt", "label": "good", "mask": "", "split": ""},
    {"path": "b.png", "class": "Gehäuse", "label": "crack", "mask": "", "split": ""},
]


def read(folder: Path, content: bytes, name: str = "set.csv") -> List[Dict[str, str]]:
    (folder / name).write_bytes(content)
    return read_manifest(str(folder / name))


def problem(folder: Path, content: bytes, name: str = "set.csv") -> str:
    with pytest.raises(UadtoolError) as caught:
        read(folder, content, name)
    assert "\n" not in str(caught.value)
    return str(caught.value).partition(f"{name}")[2].lstrip(", ")


@pytest.mark.parametrize("text", [
    TABLE,
    TABLE.replace(",", ";"),
    TABLE.replace(",", "\t"),
    TABLE.replace("\n", "\r\n"),
    TABLE.replace("\n", "\r"),
    TABLE.replace("\n", "\r\r\n"),
    "sep=;\r\n" + TABLE.replace(",", ";"),
    "SEP=,\n" + TABLE,
    "sep=\t\n" + TABLE.replace(",", "\t"),
    "sep=|\n" + TABLE.replace(",", "|"),
    "\n\n" + TABLE,
    TABLE.replace("path,class,label", ' Path ,CLASS,"Label "'),
    TABLE.replace("class", "\xa0Class\xa0"),
    "Notes; or nothing,path,class,label\n,line 1/a.png,bolt,good\n;,b.png,Gehäuse,crack\n",
    "path, or URL;path;class;label\n,;line 1/a.png;bolt;good\n;b.png;Gehäuse;crack\n",
    'path,"notes\n(optional)",class,label\nline 1/a.png,"none\n\n",bolt,good\nb.png,,Gehäuse,crack\n',
    TABLE.replace("label\n", "label,,\n").replace("good\n", "good,,,,\n"),
    TABLE.replace("b.png", ",,\n , ,\nb.png") + ",,\n",
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
def test_csv_as_spreadsheets_save_it(text: str, encoding: str, tmp_path: Path) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    assert read(tmp_path, mark + text.encode(encoding)) == ROWS


@pytest.mark.parametrize(("content", "message"), [
    (b"image;class\na.png;bolt\n", "line 1, has no column path; its columns are image, class (separated by ';')"),
    (b"image\tclass\n", r"line 1, has no column path; its columns are image, class (separated by '\t')"),
    (b"\nimage\na.png\n", "line 2, has no column path; its columns are image (separated by ',')"),
    (b"sep=;\npath,class\na.png,b\n", "line 2, has no column path; its columns are path,class (separated by ';')"),
    (b"image|path\n", "line 1, has no column path; its columns are image|path (separated by ',')"),
    (b"path,Class,CLASS\na.png,b,c\n", "line 1, has class twice; rename one of the columns path, Class, CLASS"),
    (b"path,label,path\n", "line 1, has path twice"),
    (b"path;label\na.png;good\na;b.png;good\n",
     "line 3, has more fields than the header; quote a path that contains ';'"),
    (b"sep=;\npath;label\n;good\n", "line 3, has no path"),
    (b"sep=;\npath;split\na.png;val\n", "line 3, has the split 'val'; use train or test"),
    ("path,class\na.png,b\n".encode("utf-16-le"), "line 1, has null bytes; save it as UTF-8, or as UTF-16 with"),
    (codecs.BOM_UTF16_LE + b"p\0a\0t\0h\0\n\0a", ": it starts as UTF-16 but is not: truncated data; save it as UTF-8"),
    (b"path," + 200_000 * b"x", "line 1, is not CSV: field larger than field limit"),
])
def test_what_is_said_of_other_csv(content: bytes, message: str, tmp_path: Path) -> None:
    assert problem(tmp_path, content).startswith(message)


def test_the_exact_name_of_a_column_comes_first(tmp_path: Path) -> None:
    content = b"Path,path,PATH\nno.png,a.png,no.png\n"
    assert [row["path"] for row in read(tmp_path, content)] == ["a.png"]
    content = b'{"Path": "no.png", "path": "a.png"}\n{"PATH": "b.png"}\n'
    assert [row["path"] for row in read(tmp_path, content, "set.jsonl")] == ["a.png", "b.png"]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for content in (b"", b"\xef\xbb\xbf", codecs.BOM_UTF16_LE, b"\n\n", b"path\n", b"sep=;\n", b"sep=;\npath;label\n"):
        assert read(tmp_path, content) == []


def test_a_path_alone_has_no_separator_but_the_comma(tmp_path: Path) -> None:
    assert [row["path"] for row in read(tmp_path, b"path\na;b.png\n")] == ["a;b.png"]


@pytest.mark.parametrize("split", ["Train", "TEST", " test "])
def test_a_split_in_any_case(split: str, tmp_path: Path) -> None:
    (row,) = read(tmp_path, f"path,split\na.png,{split}\n".encode())
    assert row["split"] == split.strip().lower()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines_as_windows_saves_them(encoding: str, end: str, tmp_path: Path) -> None:
    rows = [{"Path": "line 1/a.png", "CLASS": "bolt", " label ": "good"}, ROWS[1]]
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    assert read(tmp_path, text.encode(encoding), "set.jsonl") == ROWS


@pytest.mark.parametrize(("text", "message"), [
    ('{"path": "a"}\n{"image": "a", "label": 0}', "line 2, has no path; its fields are image, label"),
    ('{"path": "a", "Class": "b", "CLASS": "c"}', "line 1, has class twice"),
    ('{"Path": ""}', "line 1, has no path"),
])
def test_what_is_said_of_other_json_lines(text: str, message: str, tmp_path: Path) -> None:
    assert problem(tmp_path, text.encode(), "set.jsonl").startswith(message)


def test_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    (row,) = read(tmp_path, b"Path;Class\ngeh\xe4use/1.png;geh\xe4use\n")
    assert {key: os.fsencode(row[key]) for key in ("path", "class")} == {
        "path": b"geh\xe4use/1.png", "class": b"geh\xe4use"}


def test_classes_are_in_nfc_and_paths_as_they_are(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "path,class\nGeha\u0308use/1.png,Geha\u0308use\n".encode())
    assert (row["path"], row["class"]) == ("Geha\u0308use/1.png", "Gehäuse")


def test_relative_paths_of_windows(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/b.png", r"images\b.png", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    content = b"path,mask\n.\\images\\a.png,masks\\a.png\nimages\\b.png,\nimages\\c.png,masks\\c.png\n"
    found = [(row["path"], row["mask"]) for row in read(tmp_path, content)]
    assert found == [("./images/a.png", "masks/a.png"), (r"images\b.png", ""), (r"images\c.png", r"masks\c.png")]


TEXT = st.text(st.characters(exclude_characters="\0\\\r\n", exclude_categories=["Cs"]), max_size=8)


@given(rows=st.lists(st.lists(TEXT, min_size=3, max_size=3), max_size=4),
       others=st.lists(TEXT, min_size=2, max_size=2), place=st.integers(0, 2), separator=st.sampled_from(",;\t"),
       end=st.sampled_from(["\n", "\r\n", "\r"]), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
       named=st.booleans())
def test_any_table_is_read_as_it_was_written(
    rows: List[List[str]], others: List[str], place: int, separator: str, end: str, encoding: str, named: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    header = [*others[:place], " PATH", *others[place:]]
    assume(not any(name.strip().lower() in KEYS for name in others))
    assume(named or not any(character in name for name in others for character in ",;\t"))
    assume(encoding != "utf-8" or not header[0].startswith("\ufeff"))
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([header, *rows])
    content = (f"sep={separator}{end}" * named + text.getvalue()).encode(encoding)
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(content)
    paths = [row[place].strip() for row in rows if any(map(str.strip, row))]
    if "" in paths:
        with pytest.raises(UadtoolError, match="has no path"):
            read_manifest(str(path))
    else:
        assert [row["path"] for row in read_manifest(str(path))] == paths
