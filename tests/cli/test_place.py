"""`memo place`: a table, JSON, a picture; mistakes as messages."""

import json
import xml.etree.ElementTree as ET

import pytest

from memo_compile.cli import main

FILE = "id,lower,upper,size\na,0,2,8\n<b>,1,3,8\n"


@pytest.fixture
def problem(tmp_path):
    file = tmp_path / "problem.csv"
    file.write_text(FILE)
    return str(file)


def test_the_table_says_peak_and_bound(problem, capsys):
    assert main(["place", problem]) == 0
    text = capsys.readouterr().out
    assert "16 bytes" in text
    assert "1.0000" in text


def test_json_has_every_offset(problem, capsys):
    assert main(["place", problem, "--json", "--capacity", "16"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sorted(answer["offsets"].values()) == [0, 8]
    assert (answer["peak"], answer["fits"], answer["proved_optimal"]) == (16, True, True)


def test_a_capacity_that_cannot_be_met_ends_with_the_proof_and_code_1(problem, capsys):
    assert main(["place", problem, "--json", "--capacity", "15"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False
    assert answer["evidence"] == {"step": 1, "live": 16, "buffers": ["a", "<b>"]}


def test_the_picture_has_a_rectangle_for_each_buffer(problem, tmp_path):
    file = tmp_path / "picture.svg"
    assert main(["place", problem, "--svg", str(file)]) == 0
    tree = ET.parse(file)
    titles = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2
    assert titles[1].startswith("<b>: 8 bytes at ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,lower,upper\na,0,2\n", "no column size"),
        ("id,lower,upper,size\na,0,2,x\n", ":2: needs"),
        ("id,lower,upper,size\na,0,2\n", ":2: needs"),
        ("id,lower,upper,size\na,2,2,4\n", "not possible"),
        ("", "no column id"),
        ("id,lower,upper,size\na,0,2,nan\n", ":2: needs"),
        ("id,lower,upper,size\na,0,2,4,5\n", ":2: needs"),
        ("id,lower,upper,size\n,0,2,4\n", ":2: needs an id"),
        ("id,lower,upper,size\na,0,2,-4\n", "not possible"),
        ("id,lower,upper,size\na,0,2,4\na,0,2,4\n", "given twice"),
        (f"id,lower,upper,size\na,0,2,{10**30}\n", "cannot be placed"),
        ('id,lower,upper,size\n"a,0,2,4\n', ":2: needs"),
    ],
)
def test_a_bad_file_is_one_message(tmp_path, capsys, text, message):
    file = tmp_path / "bad.csv"
    file.write_text(text)
    assert main(["place", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_a_folder_and_a_bad_number_are_one_message(tmp_path, problem, capsys):
    assert main(["place", str(tmp_path / "none.csv")]) == 2
    assert main(["place", str(tmp_path)]) == 2
    assert main(["place", problem, "--capacity", "-1"]) == 2
    assert main(["place", problem, "--svg", str(tmp_path / "no" / "x.svg")]) == 2
    text = capsys.readouterr().err
    assert text.count("memo place:") == 4
    assert "Traceback" not in text
