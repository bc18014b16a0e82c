"""task=custom: every kind of file, errors on malformed rows, and which metrics are available."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from composing import composed

from soul_exp.checks.availability import missing_field
from soul_exp.data import Item
from soul_exp.errors import UsageError
from soul_exp.tasks.custom import custom
from soul_exp.tasks.sources.rows import Row, Rows, columns_of, distinct, read, shared
from soul_exp.tasks.task import Task

Record = dict[str, Any]


def questions(count: int, start: int = 0) -> list[Record]:
    return [{"prompt": f"What is {i}?", "answer": f"It is number {i}."} for i in range(start, start + count)]


def write(path: Path, records: Sequence[Record]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows_of(place: str | Path, **changes: Any) -> Rows:
    settings: dict[str, Any] = {"revision": None, "lead_words": None, **changes}
    columns = columns_of("task.forget", settings.pop("columns", None), settings.pop("forget_columns", None))
    return read(str(place), "task.forget", columns=columns, **settings)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """8 rows to forget, 12 to retain, 4 held out."""
    return {
        "forget": write(tmp_path / "forget.jsonl", questions(8)),
        "retain": write(tmp_path / "retain.jsonl", questions(12, 100)),
        "holdout": write(tmp_path / "holdout.jsonl", questions(4, 200)),
    }


# ---- Reading


def test_the_same_rows_from_every_kind_of_file_are_the_same_items(tmp_path: Path) -> None:
    records = [
        {"prompt": "a, b?", "answer": 'say "c"\nand d', "paraphrased_answer": "c", "perturbed_answer": ["x", "y"]},
        {"prompt": "e?", "answer": "f", "paraphrased_answer": "g", "perturbed_answer": ["h", "i"]},
    ]
    records = [{**row, "alternate_answer": [f"{n}", "z"]} for n, row in enumerate(records)]
    frame = pd.DataFrame(records)
    frame.to_parquet(tmp_path / "rows.parquet")
    lists = {name: frame[name].map(json.dumps) for name in ("perturbed_answer", "alternate_answer")}
    frame.assign(**lists).to_csv(tmp_path / "rows.csv", index=False)
    write(tmp_path / "rows.jsonl", records)
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", records)
    places = [tmp_path / f"rows.{suffix}" for suffix in ("jsonl", "csv", "parquet")] + [f"hub:{tmp_path / 'hub'}"]
    one, *others = [[vars(row) | {"location": ""} for row in rows_of(place).rows] for place in places]
    expected = Row(Item("a, b?", 'say "c"\nand d'), "", "c", ("x", "y"), ("0", "z"))
    assert one[0] == vars(expected) and len(one) == 2
    assert all(other == one for other in others)


def test_a_hub_dataset_is_read_by_its_split_and_configuration_with_its_own_column_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"question": f"{split}?", "response": "yes", "id": 1}])
    for name in ("old", "new"):
        write(tmp_path / f"{name}.jsonl", [{"question": f"{name}?", "response": "yes"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  default: true\n  data_files:\n"
        "  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}\n"
        "- config_name: second\n  data_files:\n  - {split: old, path: old.jsonl}\n  - {split: new, path: new.jsonl}\n"
        "---\n"
    )
    columns = {"prompt": "question", "answer": "response"}
    for place, expected in ((":test", "test?"), (":second:new", "new?")):
        assert rows_of(f"hub:{tmp_path}{place}", columns=columns).items == [Item(expected, "yes")]
    with pytest.raises(
        UsageError, match="found the columns question, response, id, expected prompt and answer, or text"
    ):
        rows_of(f"hub:{tmp_path}:first:train")
    with pytest.raises(UsageError, match="has no split 'dev', it has train, test"):
        rows_of(f"hub:{tmp_path}:first:dev", columns=columns)
    with pytest.raises(UsageError, match="hub:owner/name:configuration:split"):
        rows_of(f"hub:{tmp_path}:a:b:c")


def test_the_cause_why_a_folder_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", questions(2))
    write(tmp_path / "b.jsonl", [{"text": "a b c"}])
    with pytest.raises(UsageError, match=r"text: string .* because column names don't match: give a file"):
        rows_of(f"hub:{tmp_path}")
    entries = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    with pytest.raises(UsageError, match=r"available configs: \['a', 'b'\]: give a file, or choose with hub:"):
        rows_of(f"hub:{tmp_path}")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for folder in (str(tmp_path), f"~/{tmp_path.name}"):
        assert rows_of(f"hub:{folder}:b:train").items == [Item("a", " b c", raw=True)]


def test_an_unreachable_dataset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"task.forget=hub:nobody/.*nothing cannot be reached .* or give a file"):
        rows_of("hub:nobody/nothing")


@pytest.mark.parametrize(
    ("text", "lead_words", "prompt"),
    [
        ("one two three four five six", None, "one two"),  # a third of six words
        ("one two three four five six", 4, "one two three four"),
        ("one two\n\nthree four five six", None, "one two\n\nthree"),  # the answer begins with a single blank
        ("one\ntwo", None, "one"),  # no single blank
    ],
)
def test_a_text_is_divided_after_its_first_third_and_keeps_every_character(
    text: str, lead_words: int | None, prompt: str, tmp_path: Path
) -> None:
    (item,) = rows_of(write(tmp_path / "a.jsonl", [{"text": text}]), lead_words=lead_words).items
    assert item == Item(prompt, text[len(prompt) :], raw=True)


def test_a_row_of_a_csv_is_named_by_the_line_on_which_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,answer\n"one\ntwo\nthree?",yes\nfour?,"no\nnever"\n')
    assert [row.location for row in rows_of(tmp_path / "a.csv").rows] == ["line 2", "line 5"]


MALFORMED: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", '{"prompt": "a", "answer": "b"}\n\n{"prompt": "a"\n', "a.jsonl, line 3: not JSON"),
    (
        "a.json",
        '[{"prompt": "a", "answer": "b"},\n "c"]',
        "row 2: found 'c', expected one JSON object per line, or one a",
    ),
    ("a.json", '[{"prompt": "a", "answer": "b"},\n {"prompt"', r"a.json: not JSON \(Expecting ':' delimiter, line 2\)"),
    ("a.json", '{\n "data": []\n}', "line 1: not JSON .*, expected one JSON object per line, or one array of objects"),
    ("a.json", "[]", "a.json has no rows"),
    (
        "a.jsonl",
        '{"prompt": "a", "prompt": "c", "answer": "b"}',
        r"line 1: not JSON \(the key 'prompt' is there twice\)",
    ),
    (
        "a.jsonl",
        '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "reply": "b"}\n',
        "line 2: answer is missing, found prompt, r",
    ),
    ("a.jsonl", '{"prompt": "a", "answer": null}\n', "line 1: answer is missing or empty"),
    ("a.jsonl", '{"prompt": "a", "answer": " "}\n', "line 1: answer is empty, expected a text"),
    ("a.jsonl", '{"prompt": "a", "answer": "x \\ud800 y"}\n', "line 1: answer has half of a surrogate pair"),
    ("a.jsonl", '{"prompt": "a", "answer": 5}\n', "line 1: answer is 5, expected a text"),
    ("a.jsonl", '{"q": "a", "answer": null}\n', "line 1: found q, expected prompt and answer, or text: rename"),
    ("a.jsonl", '{"prompt": "a", "answer": "b", "text": "c d"}\n', "found prompt and answer and text"),
    ("a.jsonl", '{"text": "one"}\n', "a text of 1 word\\(s\\), expected more than the 1 of its prompt"),
    ("a.jsonl", b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8"),
    ("a.jsonl", "", "a.jsonl has no rows"),
    ("a.jsonl", '{"prompt": "a", "answer": "b", "perturbed_answer": "x"}\n', r'expected a list such as \["a", "b"\]'),
    ("a.jsonl", '{"prompt": "a", "answer": "b", "perturbed_answer": ["x", 3]}\n', "text 2 of perturbed_answer is 3"),
    (
        "a.jsonl",
        '{"prompt": "a", "answer": "b", "paraphrased_answer": "c"}\n{"prompt": "d", "answer": "e"}\n',
        "line 2: no paraphrased_answer, but line 1 has one",
    ),
    (
        "a.jsonl",
        '{"prompt": "a", "answer": "b", "perturbed_answer": ["c"]}\n'
        '{"prompt": "d", "answer": "e", "perturbed_answer": ["f", "g"]}\n',
        "line 2: 2 perturbed answers, expected 1 as in line 1",
    ),
    (
        "a.jsonl",
        '{"prompt": "a", "answer": "b", "alternate_answer": ["c"]}\n{"prompt": "d", "answer": "e"}\n',
        "line 2: no alternate_answer, but line 1 has one",
    ),
    ("a.jsonl", '{"text": "a b", "paraphrased_answer": "c"}\n', "found other answers to a text"),
    (
        "a.jsonl",
        '{"prompt": "a", "answer": "b", "alternate_answer": ["c", "b"]}\n',
        "repeats the answer, expected other",
    ),
    ("a.jsonl", '{"text": "a b", "alternate_answer": ["c"]}\n', "found other answers to a text"),
    ("a.csv", "question,reply\na,b\n", "found the columns question, reply, expected prompt and answer, or text"),
    ("a.csv", "prompt,answer\na,b\nc,\n", "line 3: answer is missing or empty"),
    ("a.csv", 'prompt,answer\n"a\nb",c\nd,e,f\n', "line 4: 3 cells, expected 2 as in the header"),
    ("a.csv", 'prompt,answer\na,b\n"c\n,d\n', "line 3: not CSV"),
    ("a.csv", "prompt,answer,answer\na,b,c\n", "found the column answer twice"),
    ("a.csv", "prompt, answer\na,b\n", "found the columns prompt, ' answer', expected prompt and answer, or text"),
    ("a.csv", "prompt,answer\n", "a.csv has no rows"),
    ("a.csv", "\n", "a.csv is empty: expected a header and rows below it"),
    ("a.csv", b"prompt,answer\na,\xe9\n", "line 2: not UTF-8"),
    ("a.parquet", "no parquet", "is not a Parquet file"),
    ("a.txt", "prompt", "found the suffix '.txt', expected .jsonl, .json, .csv, .tsv, .parquet, or hub:owner/name"),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_a_malformed_file_is_named_with_what_was_found_and_expected(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(f"task.forget={tmp_path / name}")


def test_json_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": ' + "[" * 100_000)
    with pytest.raises(UsageError, match=r"a.jsonl, line 1: not JSON \(nested too deeply\)"):
        rows_of(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text(f"prompt,answer,perturbed_answer\na,b,{'[' * 100_000}\n")
    with pytest.raises(UsageError, match=r"b.csv, line 2: perturbed_answer is .*, expected a list such as"):
        rows_of(tmp_path / "b.csv")


@pytest.mark.parametrize(
    "content",
    [
        'prompt;answer\n"What, then?";Yes, so\n',
        "prompt\tanswer\nWhat, then?\tYes, so\n",
        "id|answer|prompt\n1|Yes, so|What, then?\n",
        'prompt,answer,,\r\n"What, then?","Yes, so",,\r\n',  # two cells without a name
        ',prompt,answer\n0,"What, then?","Yes, so"\n',  # an index
        "sep=;\r\nprompt;answer\r\nWhat, then?;Yes, so\r\n",
        "\ufeffprompt;answer\rWhat, then?;Yes, so\r",
    ],
)
def test_the_header_of_a_csv_decides_what_separates_its_cells(content: str, tmp_path: Path) -> None:
    for suffix in ("csv", "tsv"):
        (tmp_path / f"a.{suffix}").write_bytes(content.encode())
        for columns in (None, {"text": None}):
            assert rows_of(tmp_path / f"a.{suffix}", columns=columns).items == [Item("What, then?", "Yes, so")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_message_names_the_columns_that_the_likeliest_separator_divides(separator: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(separator.join(["Frage", "Antwort", "Ort\nWer?", "Anna", "Ulm\n"]))
    with pytest.raises(UsageError, match="found the columns Frage, Antwort, Ort, expected prompt and answer"):
        rows_of(tmp_path / "a.csv")


def test_the_lines_of_a_csv_are_counted_from_that_which_states_its_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\nprompt;answer\na;b\n")
    assert [row.location for row in rows_of(tmp_path / "a.csv").rows] == ["line 3"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_one_object_per_line_or_one_array_of_them(indent: int | None, ending: str, tmp_path: Path) -> None:
    records = [{"prompt": "a?", "answer": "b\n\u2028c"}, {"text": "d e f"}]
    found = []
    for number, text in enumerate(("\n".join(map(json.dumps, records)), json.dumps(records, indent=indent))):
        path = tmp_path / f"{number}.json"
        path.write_bytes(f"\ufeff{text}".replace("\n", ending).encode())
        found.append(rows_of(path))
    lines, array = found
    assert lines.items == array.items == [Item("a?", "b\n\u2028c"), Item("d", " e f", raw=True)]
    assert [row.location for row in lines.rows] == ["line 1", "line 2"]
    assert [row.location for row in array.rows] == ["row 1", "row 2"]


def test_a_malformed_row_of_a_parquet_file_is_named_by_its_number(tmp_path: Path) -> None:
    pd.DataFrame({"prompt": ["a", "b"], "answer": ["c", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet, row 2: answer is missing"):
        rows_of(tmp_path / "a.parquet")
    pd.DataFrame({"prompt": ["a"], "reply": ["c"]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet: found the columns prompt, reply, expected prompt and answer"):
        rows_of(tmp_path / "b.parquet")


def test_a_text_of_a_parquet_file_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"prompt": text, "answer": text}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"task.forget=.*a\.parquet: a text is not UTF-8"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"a\.jsonl does not exist: give a file, or hub:NAME"),
        ("gone", r"a\.jsonl does not exist \(it is a link to gone\): give a file"),
        ("a.jsonl", r"a\.jsonl cannot be read \(Too many levels of symbolic links\): give a file"),
        (".", r"a\.jsonl is a folder: give a file, or hub:NAME"),
    ],
)
def test_what_is_no_file_is_named(target: str | None, message: str, tmp_path: Path) -> None:
    if target is not None:
        (tmp_path / "a.jsonl").symlink_to(target)
    with pytest.raises(UsageError, match=message):
        rows_of(tmp_path / "a.jsonl")
    with pytest.raises(
        UsageError, match="is a folder: give a file, or hub:NAME for a dataset of the hub or a folder in"
    ):
        rows_of(tmp_path)


def test_a_message_lists_twenty_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"c{i}" for i in range(1000)) + "\n")
    with pytest.raises(UsageError, match=r"found the columns c0, .*, c19, and 980 more, expected prompt and answer"):
        rows_of(tmp_path / "a.csv")


def test_a_link_to_a_file_without_a_suffix_is_read_by_its_own(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write(tmp_path / "store" / "0a1b", questions(2))
    (tmp_path / "a.jsonl").symlink_to("store/0a1b")
    (tmp_path / "folder").symlink_to("store")
    config = composed(
        tmp_path, "task=custom", "task.forget=a.jsonl", "task.retain=./folder/0a1b", "model.path=./folder"
    )
    assert config["task"]["forget"] == str(tmp_path / "a.jsonl") and len(rows_of(config["task"]["forget"]).rows) == 2
    assert config["task"]["retain"] == str(tmp_path / "store" / "0a1b")
    assert config["model"]["path"] == str(tmp_path / "store")


@pytest.mark.parametrize(
    ("path", "message"),
    [("~nosuchuser/a.jsonl", "home directory"), ("./loop/a.jsonl", "loop"), ("./" + "a" * 300, "too long")],
)
def test_a_path_that_leads_nowhere_is_an_error(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=message):
        config = composed(tmp_path, "task=custom", f"task.forget='{path}'")
        rows_of(config["task"]["forget"] + ".jsonl")


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,answer\r\na,b\r\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\r\n')
    assert rows_of(tmp_path / "a.csv").items == rows_of(tmp_path / "a.jsonl").items == [Item("a", "b")]


def test_a_column_that_is_mapped_to_null_is_not_read(tmp_path: Path) -> None:
    place = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b", "text": "c d"}])
    assert rows_of(place, columns={"text": None}).items == [Item("a", "b")]


@pytest.mark.parametrize(
    ("columns", "forget_columns", "message"),
    [
        ({"prompt": "answer"}, None, "task.columns: prompt and answer are both the column answer: name another"),
        (
            None,
            {"prompt": "text"},
            "task.forget_columns: prompt and text are both the column text: name another",
        ),
        (
            {"prompt": None, "text": None},
            None,
            "task.columns: no row can be read, expected the names of prompt",
        ),
        ({"question": "prompt"}, None, "task.columns.question is unknown: choose prompt, answer, text"),
        ({"prompt": 5}, None, "task.columns.prompt=5: expected the name of a column, or null"),
        ({"prompt": ""}, None, "task.columns.prompt='': expected the name of a column, or null"),
        (["a"], None, r"task.columns=\['a'\]: expected names of columns, such as task.columns={prompt: question}"),
    ],
)
def test_names_of_columns_that_cannot_work_are_errors(columns: Any, forget_columns: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows_of("any.jsonl", columns=columns, forget_columns=forget_columns)


def test_each_file_may_have_column_names_of_its_own(files: dict[str, str]) -> None:
    """The names that the message states are the file's own, not the fields'."""
    other = [{"question": row["prompt"], "response": row["answer"]} for row in questions(12, 100)]
    write(Path(files["retain"]), other)
    names = {"prompt": "question", "answer": "response"}
    task = custom(**files, retain_columns=names)  # type: ignore[arg-type]
    assert task.parts["retain"].rows[0] == (Item("What is 100?", "It is number 100."),)
    with pytest.raises(
        UsageError, match=r"task.forget=.*, line 1: found prompt, answer, expected question and response, or text: "
        r"rename them or type 'task.forget_columns={prompt: NAME, answer: NAME}'",
    ):  # fmt: skip
        custom(**files, columns=names)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="line 1: question is missing, found prompt, answer, expected question"):
        custom(**files, columns={"prompt": "question"})  # type: ignore[arg-type]


# ---- Duplicates and overlap


def test_exact_duplicates_are_left_out_with_their_lines(tmp_path: Path) -> None:
    place = write(tmp_path / "a.jsonl", [*questions(3), *questions(2), {"prompt": "what is 0?", "answer": "No."}])
    notes: list[str] = []
    table = distinct(rows_of(place), notes)
    assert len(table.rows) == 4 and distinct(table, notes) == table
    assert notes == [
        f"task.forget={place}: 2 rows repeat another one exactly and are left out, the first being line 4, "
        f"which repeats line 1"
    ]


def test_rows_in_two_files_are_found_whatever_their_case_and_white_space(tmp_path: Path) -> None:
    one = rows_of(write(tmp_path / "a.jsonl", questions(3)))
    other = rows_of(write(tmp_path / "b.jsonl", [{"prompt": "WHAT  is 2?\n", "answer": "it is number 2."}]))
    assert [(a.location, b.location) for a, b in shared(one, other)] == [("line 3", "line 1")]


@pytest.mark.parametrize(
    ("first", "second"), [("forget", "retain"), ("forget", "holdout"), ("retain", "holdout"), ("retain", "forget")]
)
def test_a_row_in_two_files_is_an_error_that_names_both_with_their_lines(
    first: str, second: str, files: dict[str, str]
) -> None:
    line = Path(files[first]).read_text().splitlines()[1]
    with Path(files[second]).open("a") as file:
        file.write(line + "\n")
    number = len(Path(files[second]).read_text().splitlines())
    with pytest.raises(UsageError) as error:
        custom(**files)  # type: ignore[arg-type]
    message = str(error.value)
    assert files[first] in message and files[second] in message and "remove them from one of the two" in message
    assert f"line {number}" in message and "line 2" in message


def test_overlap_drop_removes_the_row_from_retain_and_notes_it(files: dict[str, str]) -> None:
    for name in ("forget", "holdout"):
        with Path(files["retain"]).open("a") as file:
            file.write(Path(files[name]).read_text().splitlines()[0] + "\n")
    task = custom(**files, overlap="drop")  # type: ignore[arg-type]
    assert len(task.parts["retain"].rows) == 12
    assert [note.rpartition(": ")[2] for note in task.notes] == ["left out of task.retain"] * 2
    with Path(files["holdout"]).open("a") as file:
        file.write(Path(files["forget"]).read_text())
    with pytest.raises(UsageError, match=r"8 row\(s\) of task.holdout=.* are in task.forget="):
        custom(**files, overlap="drop")  # type: ignore[arg-type]


def test_nothing_left_to_retain_is_an_error(files: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="nothing else is left in it"):
        custom(files["forget"], files["forget"], overlap="drop")


# ---- The task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"no rows to forget \(task.forget=null\): type task=custom task.forget=FILE task.retain=FILE"),
        ({"forget": "a.jsonl"}, r"no rows to retain \(task.retain=null\): type task=custom"),
        ({"forget": "a.jsonl", "retain": "b", "requests": ["c"]}, "both given: keep one"),
        ({"retain": "b", "requests": "c"}, r"expected a list, such as task.requests=\[a.jsonl,b.jsonl\]"),
        ({"retain": "b", "requests": []}, "expected a list"),
        ({"retain": "b", "requests": [3]}, "expected a list of files"),
    ],
)
def test_missing_or_contradictory_arguments_are_errors_that_name_them(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        custom(**arguments)


def test_the_target_is_trained_on_forget_and_retain_rows_and_the_retrained_model_on_retain_rows(
    files: dict[str, str],
) -> None:
    task = custom(**files)  # type: ignore[arg-type]
    assert {len(task.target_rows), len(task.retrained_rows), len(task.parts["forget"].rows)} == {20, 12, 8}
    assert set(task.probes) == {"forget", "retain", "holdout"} and not task.notes
    assert task.caption == "custom (forget.jsonl): 8 rows forgotten, 12 retained, 4 held out"
    general = custom(**files, train_general=True)  # type: ignore[arg-type]
    assert general.caption == (
        "custom (forget.jsonl): 8 rows forgotten, 12 retained and 216 general questions, 4 held out"
    )
    assert len(general.parts["retain"].rows) == 12 + 216 and len(general.retrained_rows) == 12 + 216
    assert task.parts["refusal"].follows == "forget" and len(task.parts["refusal"].rows) == 8


def test_validation_rows_are_separate_and_probes_of_large_sets_are_evenly_spaced(files: dict[str, str]) -> None:
    task = custom(**files, validation_fraction=0.25, max_probe_rows=8)  # type: ignore[arg-type]
    assert {name: len(probe.items) for name, probe in task.probes.items()} == {
        "forget": 6, "retain": 6, "holdout": 3, "validation_forget": 2, "validation_retain": 2, "validation_holdout": 1,
    }  # fmt: skip
    prompts = {item.prompt for name in ("retain", "validation_retain") for item in task.probes[name].items}
    assert prompts == {f"What is {100 + i * 12 // 8}?" for i in range(8)} and len(task.parts["retain"].rows) == 12
    assert "12 retained (8 probed)" in task.caption and "8 rows forgotten," in task.caption
    assert custom(**files).missing["validation_forget"] == "task.validation_fraction=0 leaves no rows"  # type: ignore[arg-type]


def test_rows_of_one_prompt_are_validation_rows_together(files: dict[str, str]) -> None:
    again = [{"prompt": row["prompt"].upper(), "answer": "Another."} for row in questions(8)]
    write(Path(files["forget"]), [*questions(8), *again])
    probes = custom(**files, validation_fraction=0.25).probes  # type: ignore[arg-type]
    assert [item.prompt for item in probes["validation_forget"].items] == [
        "What is 2?", "What is 6?", "WHAT IS 2?", "WHAT IS 6?",
    ]  # fmt: skip
    assert len(probes["forget"].items) == 12
    assert (probes["validation_forget"].units or [])[1:] == ["prompt 2", "prompt 1", "prompt 2"]


def test_rows_of_the_holdout_that_are_not_probed_are_the_prefix(files: dict[str, str]) -> None:
    write(Path(files["holdout"]), questions(9, 200))
    task = custom(**files, validation_fraction=0.25, max_probe_rows=5)  # type: ignore[arg-type]
    probed = {i.prompt for name in ("holdout", "validation_holdout") for i in task.probes[name].items}
    assert len(probed) == 5 and len(task.prefix) == 4 and not probed & {item.prompt for item in task.prefix}
    all_probed = custom(**files, max_probe_rows=6)  # type: ignore[arg-type]
    assert not all_probed.prefix and not all_probed.related
    assert all_probed.missing["prefix"] == "task.holdout has fewer than 4 rows beyond task.max_probe_rows=6"


def metric(name: str, answers: str) -> Callable[..., float]:
    import functools

    from soul_exp.metrics import text, tofu

    return functools.partial(getattr(tofu, name, None) or getattr(text, name), answers=answers)


def test_metrics_that_need_paraphrases_are_known_to_be_missing_before_any_evaluation(files: dict[str, str]) -> None:
    probes = custom(**files).probes  # type: ignore[arg-type]
    assert missing_field(metric("truth_ratio_forget", "forget"), probes) == ("forget", "paraphrase_nll")
    assert missing_field(metric("truth_ratio", "retain"), probes) == ("retain", "wrong_nll")
    assert missing_field(metric("rouge", "forget"), probes) is None


def test_paraphrases_and_wrong_answers_make_truth_ratios_available(files: dict[str, str]) -> None:
    rows = [{**row, "paraphrased_answer": "This.", "perturbed_answer": ["No.", "Yes."]} for row in questions(8)]
    write(Path(files["forget"]), rows)
    task = custom(**files)  # type: ignore[arg-type]
    assert missing_field(metric("truth_ratio_forget", "forget"), task.probes) is None
    assert task.missing["retain.wrong_nll"] == "task.retain has no perturbed_answer"
    wrong = task.probes["forget"].wrong
    assert wrong is not None and wrong[3] == [Item("What is 3?", "No."), Item("What is 3?", "Yes.")]


def test_alternate_answers_are_a_part_for_altpo(files: dict[str, str]) -> None:
    assert "alternate" not in custom(**files).parts  # type: ignore[arg-type]
    write(Path(files["forget"]), [{**row, "alternate_answer": ["No.", "Yes."]} for row in questions(8)])
    part = custom(**files).parts["alternate"]  # type: ignore[arg-type]
    assert part.rows[3] == [Item("What is 3?", "No."), Item("What is 3?", "Yes.")] and part.follows == "forget"


def test_an_answer_without_a_word_makes_rouge_and_bleu_missing_and_is_named(files: dict[str, str]) -> None:
    write(Path(files["forget"]), [*questions(2), {"prompt": "¿?", "answer": "👍"}])
    task = custom(**files)  # type: ignore[arg-type]
    for name in ("rouge", "bleu"):
        probe, field = missing_field(metric(name, "forget"), task.probes) or ("", "")
        assert task.missing[f"{probe}.{field}"].startswith("the answer in line 3 of task.forget has no letter and no")
    assert missing_field(metric("rouge", "retain"), task.probes) is None


def requested(files: dict[str, str], request: int, **changes: Any) -> Task:
    folder = Path(files["forget"]).parent
    places = [write(folder / f"{number}.jsonl", questions(3, 10 * number)) for number in (1, 2, 3)]
    settings = {"requests": places, "retain": files["retain"], "request": request}
    return custom(**{**settings, **changes})


def test_a_request_forgets_its_own_rows_and_probes_the_earlier_ones(files: dict[str, str]) -> None:
    task = requested(files, 2)
    assert [item.prompt for item in task.probes["forget"].items] == [f"What is {i}?" for i in (20, 21, 22)]
    assert [item.prompt for item in task.probes["earlier"].items] == [f"What is {i}?" for i in (10, 11, 12)]
    later = {f"What is {i}?" for i in (30, 31, 32)}
    assert later & {item.prompt for item in task.retrained_rows} == later
    assert not later & {row[0].prompt for name in ("forget", "retain") for row in task.parts[name].rows}
    assert [len(requested(files, i).retrained_rows) for i in (1, 2, 3)] == [18, 15, 12]
    assert task.target_rows == requested(files, 1).target_rows and len(task.target_rows) == 21
    assert requested(files, 1).missing["earlier"] == "nothing was forgotten before the first request"
    assert "request 2 of 3 starts from the model that request 1 left" in task.notes[-1]


def test_the_probe_of_earlier_requests_has_no_row_that_validated_one_of_them(files: dict[str, str]) -> None:
    folder = Path(files["forget"]).parent
    places = [write(folder / f"of_8_{number}.jsonl", questions(8, 10 * number)) for number in (1, 2)]
    first, second = (requested(files, i, requests=places, validation_fraction=0.25).probes for i in (1, 2))
    assert [item.prompt for item in first["validation_forget"].items] == ["What is 12?", "What is 16?"]
    assert second["earlier"].items == first["forget"].items and len(second["earlier"].items) == 6


def test_a_row_of_two_requests_is_an_error_or_belongs_to_the_first(files: dict[str, str]) -> None:
    folder = Path(files["forget"]).parent
    places = [write(folder / "x.jsonl", questions(3)), write(folder / "y.jsonl", questions(3, 2))]
    with pytest.raises(
        UsageError, match=r"y\.jsonl are in task.requests=.*x\.jsonl too, the first being line 1, there li"
    ):
        requested(files, 1, requests=places)
    task = requested(files, 2, requests=places, overlap="drop")
    assert [item.prompt for item in task.probes["forget"].items] == ["What is 3?", "What is 4?"]


def test_100_000_rows_load_in_seconds(tmp_path: Path) -> None:
    forget = write(tmp_path / "forget.jsonl", questions(5_000))
    retain = write(tmp_path / "retain.jsonl", questions(100_000, 1_000_000))
    start = time.process_time()
    task = custom(forget, retain)
    assert task.hashes
    assert time.process_time() - start < 20  # 4 on an idle core
    assert len(task.parts["retain"].rows) == 100_000
    assert len(task.probes["retain"].items) == 400 and len(task.probes["forget"].items) == 2000
