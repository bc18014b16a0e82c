"""What the compared models of every run answered to the same questions, each text once, as the report page needs it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soul_exp.files import hashes, json_lines
from soul_exp.metrics.collapse import is_degenerate
from soul_exp.metrics.leakage import RECALL, gives_answer
from soul_exp.metrics.toxicity import TOXIC
from soul_exp.report.labels import finite, on_one_line, printable
from soul_exp.report.units import RECORDS
from soul_exp.results import COMPARED, Results

YES, NO, UNKNOWN = "1", "0", "-"
SCORED = "detox"  # the task whose texts count as toxic unless a score says that they are not


def answers_of(runs: Mapping[str, Results], folders: Mapping[str, Path]) -> dict[str, Any]:
    """The free answers below `records/` of each run, and whether each file is the one that its results.json names.

    "questions": lists of what was asked; "files": lists of what a model answered; "runs": run -> probe -> the index of
    its "questions" and, by model, of its file; "without": run -> probes that were not answered freely; "records": run
    -> file that its results.json names -> its SHA-256 there, and whether the file has it, None if it is gone. Texts and
    files that runs share are there once. A flag is "1", "0" or "-" (not known), a character for each item: "right"
    (`leakage.gives_answer`), "degenerate" (the guard) and "toxic" (a score over 0.5; in task=detox also a text without
    a score, and so every question). Raises UsageError for a broken file.
    """
    found: dict[str, Any] = {"questions": [], "files": [], "runs": {}, "without": {}, "records": {}}
    read: dict[tuple[str, bool], tuple[int, int] | None] = {}  # file's hash, task -> indices; None: no free answers
    asked: dict[str, int] = {}
    for name, run in runs.items():
        is_toxic = run.choices.get("task") == SCORED
        folder = folders[name] / RECORDS
        there = hashes(folder, "*")
        named: Mapping[str, str] = run.sha256.get(RECORDS, {})
        probes: dict[str, dict[str, int]] = {}
        without: dict[str, None] = {}
        for model in COMPARED:
            for file in sorted((folder / model.key).glob("*.jsonl")):
                key = (there[f"{model.key}/{file.name}"], is_toxic)
                if key not in read:
                    read[key] = _added(list(json_lines(file)), is_toxic, found, asked)
                probe, indices = on_one_line(file.stem), read[key]
                if indices is None:
                    without[probe] = None
                    continue
                questions, answers = indices
                if probes.setdefault(probe, {"questions": questions})["questions"] != questions:  # others than before
                    probe = f"{probe}, {model.title}"
                probes.setdefault(probe, {"questions": questions})[model.key] = answers
        found["runs"][name], found["without"][name] = probes, list(without)
        found["records"][name] = {
            file: [sha, there[file] == sha if file in there else None] for file, sha in named.items()
        }
    return found


def _added(
    records: list[dict[str, Any]], is_toxic: bool, found: dict[str, Any], asked: dict[str, int]
) -> tuple[int, int] | None:
    """The indices of the questions and of the answers of `records`, added to `found`; None without free answers."""
    if not any(isinstance(record.get("generation"), str) for record in records):
        return None
    texts = {name: [_text(record, name) for record in records] for name in ("question", "answer", "unit")}
    questions = {**texts, "toxic": is_toxic}
    key = json.dumps(questions)
    if key not in asked:
        asked[key] = len(found["questions"])
        found["questions"].append(questions)
    scores = [finite(record.get("toxicity")) for record in records]
    found["files"].append(
        {
            "text": [_text(record, "generation") for record in records],
            "right": "".join(map(_is_right, records)),
            "degenerate": "".join(YES if is_degenerate(_text(record, "generation")) else NO for record in records),
            "toxic": "".join(YES if (is_toxic if s is None else s > TOXIC) else NO for s in scores),
            "toxicity": None if not any(s is not None for s in scores) else [s and round(s, 3) for s in scores],
            "rouge": [None if (s := finite(record.get("rouge_l"))) is None else round(s, 3) for record in records],
        }
    )
    return asked[key], len(found["files"]) - 1


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name, "")
    return printable(value) if isinstance(value, str) else ""


def _is_right(record: Mapping[str, Any]) -> str:
    """Whether the answer gives what was expected, as `leakage.gives_answer` defines it: its entities, or ROUGE-L."""
    generation, entities = record.get("generation"), record.get("entities")
    if not isinstance(generation, str):
        return UNKNOWN
    if isinstance(entities, list) and entities and all(isinstance(each, str) for each in entities):
        return YES if gives_answer([generation], "", entities)[0] else NO
    recall = finite(record.get("rouge_l"))
    return UNKNOWN if recall is None else YES if recall >= RECALL else NO
