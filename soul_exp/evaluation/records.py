"""Answers in files: our records, a JSON object per example, and the logs of others. N examples, K wrong answers."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from soul_exp.errors import short
from soul_exp.files import write_atomically
from soul_exp.metrics.answers import MATRICES, Answers


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{short(value)}, expected a text")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{short(value)}, expected a list of texts")
    return tuple(value)


def _any_texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{short(value)}, expected a list of texts, which may be empty")
    return tuple(value)


def _counts(value: object) -> np.ndarray:
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"{short(value)}, expected a list of whole numbers of 0 or more")
    return np.array(value, dtype=np.int64)


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{short(value)}, expected a number or null")
    return float(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{short(value)}, expected true or false")
    return value


def _vector(value: object) -> np.ndarray:
    if not isinstance(value, list):
        raise ValueError(f"{short(value)}, expected a list of numbers")
    return np.array([_number(item) for item in value], dtype=np.float64)


def _bits(value: object) -> np.ndarray:
    """A text such as "1101": one digit per token, so that a record stays readable."""
    if not isinstance(value, str) or value.strip("01"):
        raise ValueError(f"{short(value)}, expected a text of the digits 0 and 1")
    return np.array([digit == "1" for digit in value], dtype=bool)


def _value(read: Callable[[object], Any], value: object, where: str) -> Any:
    """`read(value)`, one of the functions above, whose errors begin with what was found: `where` comes before it."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{where}: found {error}") from error


def _matrix(rows: Sequence[np.ndarray], where: Callable[[int], str]) -> np.ndarray:
    """The rows stacked to [N, K]; `where(i)` names row i in the error on an empty or longer or shorter one."""
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or not len(row):
            expected = f"{len(rows[0])} as in the first example" if len(rows[0]) else "at least one"
            raise ValueError(f"{where(i)}: found {len(row)} numbers, expected {expected}")
    return np.stack(rows)


# The keys of a record in their order, and the function that reads the value of each.
_FIELDS: dict[str, Callable[[object], Any]] = {
    "question": _text,
    "answer": _text,
    "unit": _text,
    "entities": _texts,
    "nll": _number,
    "logp": _vector,
    "right": _bits,
    "paraphrase_nll": _number,
    "wrong_nll": _vector,
    "rouge_l": _number,
    "generation": _text,
    "toxicity": _number,
    "generation_nll": _number,
    "refused": _flag,
    "mean_logp": _vector,
    "var_logp": _vector,
    "gradnorm": _number,
    "gradnorm_mean": _number,
    "recall_ll": _number,
    "rephrased_nll": _number,
    "rephrased_generation": _text,
    "similarity": _vector,
    "embedding": _text,
    "bare_nll": _number,
    "bare_wrong_nll": _vector,
    "entity_logp": _number,
    "exchanged_logp": _vector,
    "samples": _any_texts,
    "draws": _counts,
}
_DIGITS = 8  # a log-probability changes by 5e-8 of itself at most, less than float32 can tell
_DECIMALS = 12  # at most: a power of ten that float64 holds exactly


def as_recorded(answers: Answers) -> Answers:
    """`answers` as they come back from a file: metrics of these are the metrics of the records, to the last bit.

    Numbers per token have 8 significant digits and at most 12 decimals, all others every digit of float64; numbers that
    are not finite are nan.
    """
    return replace(answers, **{field: _recorded(field, getattr(answers, field)) for field in _FIELDS})


def _recorded(field: str, values: Any) -> Any:
    if values is None or _FIELDS[field] not in (_number, _vector):
        return values
    if _FIELDS[field] is _vector and field not in MATRICES:
        return [_finite(rounded(row)) for row in values]
    return _finite(np.asarray(values, dtype=np.float64))


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest numbers of 8 significant digits and at most 12 decimals."""
    numbers = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # of 0, nan and the infinities
        exponents = np.floor(np.log10(np.abs(numbers)))
    scale = 10.0 ** np.clip(_DIGITS - 1 - np.nan_to_num(exponents, posinf=0, neginf=0), 0, _DECIMALS)
    return np.round(numbers * scale) / scale


def _finite(numbers: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(numbers), numbers, np.nan)


def write_records(path: Path, answers: Answers) -> None:
    """Writes one JSON object per line, one line per example; the file appears complete or not at all.

    Fields that are None are left out; numbers have all digits; nan and the infinities are null: strict JSON.
    """
    fields = [field for field in _FIELDS if getattr(answers, field) is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    records = ({field: _json_value(field, getattr(answers, field)[i]) for field in fields} for i in range(len(answers)))
    write_atomically(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def _json_value(field: str, value: Any) -> object:
    if _FIELDS[field] in (_text, _texts, _any_texts):
        return _value(_FIELDS[field], value, f"Answers, {field}")
    if _FIELDS[field] is _bits:
        return "".join("1" if hit else "0" for hit in value)
    if _FIELDS[field] is _flag:
        return bool(value)
    if _FIELDS[field] is _counts:
        return [int(number) for number in value]
    numbers = np.asarray(value, dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, None).tolist()  # type: ignore[call-overload]


def read_records(path: Path) -> Answers:
    """The answers that `write_records` wrote; null becomes nan.

    Raises ValueError, with file and line, for other than a strict JSON object of known fields, the same as in line 1.
    """
    lines = path.read_bytes().splitlines()
    if not lines:
        raise ValueError(f"{path}, line 1: found an empty file, expected one JSON object per example")
    records = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    for number, record in enumerate(records, start=1):
        if record.keys() != records[0].keys():
            found = f"found the fields {list(record)}, expected {list(records[0])} as in line 1"
            raise ValueError(f"{path}, line {number}: {found}")
    columns: dict[str, Any] = {field: [record[field] for record in records] for field in records[0]}
    for field in columns.keys() & {*MATRICES}:
        columns[field] = _matrix(columns[field], lambda i, field=field: f"{path}, line {i + 1}, {field}")  # type: ignore[misc]
    columns |= {name: np.array(values) for name, values in columns.items() if _FIELDS[name] in (_number, _flag)}
    return Answers(**columns)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        found = short(line.decode(errors="replace"))
        raise ValueError(f"{where}: found {found}, expected one JSON object ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {short(record)}, expected one JSON object")
    if "nll" not in record or not record.keys() <= _FIELDS.keys():
        others = [field for field in _FIELDS if field != "nll"]
        raise ValueError(f"{where}: found the fields {list(record)}, expected nll and any of {others}")
    return {field: _value(_FIELDS[field], value, f"{where}, {field}") for field, value in record.items()}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not strict JSON, null is")


_TOFU_SECTIONS = {
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
    "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json",
}


def read_tofu_log(path: Path | str) -> dict[str, Answers]:
    """The four probes retain, forget, authors and facts of an aggregated evaluation log of the TOFU authors.

    A metric's values may be a list, or an object keyed by the item's number. For authors and facts, `paraphrase_nll` is
    the answer's NLL as the authors' code computed it a second time (up to 0.12 nats apart): their truth ratio, and so
    their model utility, comes from it. Raises ValueError, naming file and key, if a key is missing or malformed.
    """
    log = _json_of(path)
    return {probe: _tofu_answers(log, section, str(path)) for probe, section in _TOFU_SECTIONS.items()}


def _json_of(path: Path | str) -> object:
    try:
        return json.loads(Path(path).read_bytes())  # Python's json also reads the NaN that the others' code may write
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}, line {line}: found no JSON ({error}), expected an evaluation log") from error


def _tofu_answers(log: object, section: str, path: str) -> Answers:
    metrics = log.get(section) if isinstance(log, dict) else None
    if not isinstance(metrics, dict):
        found = f"the keys {short(list(log))}" if isinstance(log, dict) else short(log)
        raise ValueError(f"{path}: found {found}, expected a TOFU evaluation log with an object {section}")

    def column(key: str, read: Callable[[object], Any]) -> list[Any]:
        values = _in_order(metrics.get(key), f"{path}, {section}, {key}")
        return [_value(read, value, f"{path}, {section}, {key}, item {i}") for i, value in enumerate(values)]

    wrong = column("average_perturb_loss", _vector)
    wrong_nll = _matrix(wrong, lambda i: f"{path}, {section}, average_perturb_loss, item {i}")
    keys = ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall")
    nll, paraphrase_nll, rouge_l = (np.array(column(key, _number)) for key in keys)
    question = None  # `generated_text` has [prompt, generation, answer] per item; a log of metrics alone has none
    if "generated_text" in metrics:
        question = column("generated_text", lambda value: str(value[0]) if isinstance(value, list) else None)
    try:
        return Answers(nll=nll, paraphrase_nll=paraphrase_nll, wrong_nll=wrong_nll, rouge_l=rouge_l, question=question)
    except ValueError as error:  # keys of different lengths
        raise ValueError(f"{path}, {section}: {error}") from error


_OPEN_UNLEARNING = {"forget": "forget", "retain": "retain", "authors": "ra", "facts": "wf"}  # probe -> name there
# Field of Answers -> the end of the metric's name, the key of its values by item, and the function that reads one.
_OPEN_UNLEARNING_FIELDS: dict[str, tuple[str, str, Callable[[object], Any]]] = {
    "nll": ("Q_A_Prob", "avg_loss", _number),
    "paraphrase_nll": ("Q_A_PARA_Prob", "avg_loss", _number),
    "wrong_nll": ("Q_A_PERT_Prob", "avg_loss", _vector),
    "rouge_l": ("Q_A_ROUGE", "rougeL_recall", _number),
    "question": ("Q_A_ROUGE", "input", _text),
    "answer": ("Q_A_ROUGE", "ground_truth", _text),
    "generation": ("Q_A_ROUGE", "generation", _text),
}


def read_open_unlearning(path: Path | str) -> dict[str, Answers]:
    """The probes of an evaluation file of OpenUnlearning (TOFU_EVAL.json) for which it has NLLs.

    A field of Answers is None where the file lacks its metric; the model's token probabilities are not in such files,
    so membership is not available. Raises ValueError, naming file and metric, for one that is malformed.
    """
    log = _json_of(path)
    probes = {probe: _open_unlearning_answers(log, name, str(path)) for probe, name in _OPEN_UNLEARNING.items()}
    found = {probe: answers for probe, answers in probes.items() if answers is not None}
    if not found:
        keys = f"the keys {short(list(log))}" if isinstance(log, dict) else short(log)
        raise ValueError(f"{path}: found {keys}, expected an evaluation file with forget_Q_A_Prob")
    return found


def _open_unlearning_answers(log: object, name: str, path: str) -> Answers | None:
    columns: dict[str, Any] = {}
    for field, (metric, key, read) in _OPEN_UNLEARNING_FIELDS.items():
        stated = log.get(f"{name}_{metric}") if isinstance(log, dict) else None
        if stated is None:
            continue
        where = f"{path}, {name}_{metric}"
        by_item = stated.get("value_by_index") if isinstance(stated, dict) else None
        items: list[Any] = _in_order(by_item, f"{where}, value_by_index")
        for i, item in enumerate(items):
            if not isinstance(item, dict) or key not in item:
                raise ValueError(f"{where}, item {i}: found {short(item)}, expected an object with {key}")
        columns[field] = [_value(read, item[key], f"{where}, item {i}, {key}") for i, item in enumerate(items)]
        if read is _vector:
            columns[field] = _matrix(columns[field], lambda i, where=where: f"{where}, item {i}")  # type: ignore[misc]
        elif read is _number:
            columns[field] = np.array(columns[field])
    try:
        return Answers(**columns) if "nll" in columns else None
    except ValueError as error:  # metrics of different numbers of items
        raise ValueError(f"{path}, {name}: {error}") from error


def _in_order(values: object, where: str) -> list[object]:
    if isinstance(values, list) and values:
        return values
    if isinstance(values, dict) and values:
        try:
            return [values[key] for key in sorted(values, key=int)]
        except ValueError as error:
            raise ValueError(f"{where}: found the keys {short(list(values))}, expected item numbers") from error
    raise ValueError(f"{where}: found {short(values)}, expected a list, or an object keyed by item number")


def read_retrained(path: Path) -> Mapping[str, Answers]:
    """The retrained model's answers by probe: a folder of our records, a TOFU log, or a file of OpenUnlearning.

    Raises FileNotFoundError if there is nothing at `path`, ValueError for a folder without records or a malformed file.
    """
    if path.is_dir():
        answers = {file.stem: read_records(file) for file in sorted(path.glob("*.jsonl"))}
        if not answers:
            inner = ", ".join(sorted(each.parent.name for each in path.glob("*/*.jsonl"))[:1])
            advice = f": name the folder of one model, such as {path / inner}" if inner else ""
            raise ValueError(f"{path}: found no *.jsonl in the folder, expected records such as forget.jsonl{advice}")
        return answers
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found nothing, expected a folder of records or an evaluation log")
    log = _json_of(path)
    is_tofu = isinstance(log, dict) and log.keys() & {*_TOFU_SECTIONS.values()}
    return read_tofu_log(path) if is_tofu else read_open_unlearning(path)
