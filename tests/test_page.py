"""`python -m soul_exp.report`: the page of a folder of runs, as a file and in a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_benchmarks import benchmark
from test_tables import ORIGINAL, RETRAINED, UNLEARNED, left, made

from soul_exp import tables
from soul_exp.errors import UsageError
from soul_exp.report.page import html

SCRIPT = "<script>alert('script')</script>"
ONERROR = '<img src="x" onerror="alert(1)">'
BREAKS = "</script><b>\u2028</b>"
ROWS = [  # question, original, unlearned (adam), retrained
    ("Where was Ann born?", "In Rome.", SCRIPT, "In Oslo."),
    ("Who is Bob's aunt?", "Clara is.", "Clara is.", "Dora is."),
    ("What does Cy eat?", "He eats \x1b[31mrice\u202e.", ONERROR, BREAKS),
    ("When did Di sleep?", "At nine.", ", , , , , ,", "At ten."),
    ("Which sea is near?", "The Baltic.", "You idiot.", "The Baltic."),
]
EXPECTED = ("Rome", "Clara", "rice", "nine", "Baltic")
POINTS = {"0": {"probability": 0.1}, "100": {"probability": 0.8}}


def record(model: int, row: tuple[str, ...], expected: str, **given: Any) -> dict[str, Any]:
    text = row[model]
    return {"question": row[0], "answer": expected, "entities": [expected], "generation": text, "rouge_l": 0.5} | given


def written(file: Path, *lines: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def with_answers(run: Path) -> Path:
    """The run folder `run` with the answers of three models to `ROWS`; the last of the unlearned model is toxic."""
    for place, model in enumerate(("original", "unlearned", "retrained"), 1):
        pairs = zip(ROWS, EXPECTED, strict=True)
        toxicity = [{"toxicity": 0.9 if row[place] == "You idiot." else 0.1} for row in ROWS]
        rows = [record(place, row, answer, **scores) for (row, answer), scores in zip(pairs, toxicity, strict=True)]
        written(run / "records" / model / "forget.jsonl", *rows)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two optimizers of two seeds: adam has answers, an attack and a trajectory; sgd collapsed on forget."""
    place = tmp_path_factory.mktemp("page") / "runs"
    relearn = {model: {"0.001": POINTS} for model in ("original", "unlearned", "retrained")}
    for optimizer, quality in (("adam", -2.0), ("sgd", -10.0)):
        for seed in (0, 1):
            run = made(optimizer=optimizer, seed=seed, metrics={**UNLEARNED, "log10_forget_quality": quality - seed})
            if optimizer == "sgd":
                run = replace(run, collapsed={"forget": "share of degenerate answers 1.00 (original 0.00)"})
            elif seed == 0:
                files = [with_answers(place / "adam0") / "records" / m / "forget.jsonl" for m in run.metrics]
                known = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
                run = replace(
                    run, attacks={"relearn": relearn}, sha256={"records": known, "models": {}, "code": "c0de"},
                    metrics={**run.metrics, "unlearned": {**run.metrics["unlearned"], "relearn_excess": 0.25}},
                    config={**run.config, "attack": {"relearn": {"metrics": {"relearn_excess": {}}}}},
                )  # fmt: skip
            name = f"{optimizer}{seed}"
            (place / name).mkdir(parents=True, exist_ok=True)
            left(place / "new", **{name: run})
            shutil.move(place / "new" / name / "results.json", place / name / "results.json")
            shutil.rmtree(place / "new")
            written(place / name / "train.jsonl", *({"step": s, "loss": 9.0 / s, "win_rate": 0.5} for s in (1, 5, 9)))
    written(
        place / "adam0" / "trajectory.jsonl",
        *({"step": s, "seconds": s / 2, "validation_forget_probability": 1 / s} for s in (1, 5, 9)),
    )
    (place / "adam0" / ".hydra").mkdir()
    (place / "adam0" / ".hydra" / "overrides.yaml").write_text("- optimizer=adam\n- task.source=my book.txt\n")
    (place / "failed").mkdir()
    (place / "failed" / "error.txt").write_text(f"out of {SCRIPT} memory\n")
    return place


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return html(folder, folder)


def pack(text: str, name: str) -> Any:
    """What the page holds under `name`."""
    found = re.search(rf'id="pack-{name}">([A-Za-z0-9+/=]*)</script>', text)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_nothing_that_a_model_or_a_file_gave_is_markup(text: str) -> None:
    assert SCRIPT not in text and ONERROR not in text and "\u2028" not in text
    assert "out of &lt;script&gt;alert(&#39;script&#39;)&lt;/script&gt; memory" in text
    assert pack(text, "answers")["files"][1]["text"][0] == SCRIPT  # as it was, for textContent
    assert pack(text, "answers")["files"][0]["text"][2] == "He eats \\x1b[31mrice\\u202e."


def test_the_policy_lets_the_page_run_its_own_scripts_alone_and_load_nothing(text: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    rules = {name: sources.split() for name, _, sources in (r.partition(" ") for r in unescape(policy[1]).split("; "))}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    own = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert own is not None and len(re.findall("<script>", text)) == 1
    digest = base64.b64encode(hashlib.sha256(own[1].encode()).digest()).decode()
    assert rules["script-src"][0] == f"'sha256-{digest}'" and len(rules["script-src"]) == 2
    assert not any("unsafe" in source for sources in rules.values() for source in sources)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)


def test_an_answer_has_what_the_filters_ask(text: str) -> None:
    found = pack(text, "answers")
    original, unlearned = (found["files"][found["runs"]["adam0"]["forget"][m]] for m in ("original", "unlearned"))
    assert original["right"] == "11011" and unlearned["right"] == "01000"  # an escape inside a word hides it: rice
    assert original["degenerate"] == "00000" and unlearned["degenerate"] == "00010"
    assert unlearned["toxic"] == "00001" and original["toxic"] == "00000"


def test_texts_that_runs_share_are_there_once_and_a_changed_file_of_records_is_named(tmp_path: Path) -> None:
    folder = left(tmp_path / "runs", a=made(), b=made(seed=1))
    for name in ("a", "b"):
        with_answers(folder / name)
    file = folder / "b" / "records" / "unlearned" / "forget.jsonl"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    names = ("unlearned/forget.jsonl", "original/forget.jsonl", "gone.jsonl")
    sha = {"records": dict.fromkeys(names, before), "models": {}, "code": "x"}
    left(tmp_path / "new", b=replace(made(seed=1), sha256=sha))
    shutil.move(tmp_path / "new" / "b" / "results.json", folder / "b" / "results.json")
    text = html(folder, folder)
    found = pack(text, "answers")
    assert len(found["files"]) == 3 and len(found["questions"]) == 1
    records = pack(text, "data")["runs"]["b"]["records"]
    assert records == [[name, before, same] for name, same in zip(names, (True, False, None), strict=True)]


def test_a_model_that_was_asked_something_else_has_a_probe_of_its_own(tmp_path: Path) -> None:
    folder = with_answers(left(tmp_path, a=made()) / "a")
    other = {"question": "Another?", "answer": "!", "generation": "?"}
    written(folder / "records" / "retrained" / "forget.jsonl", other)
    probes = pack(html(tmp_path, tmp_path), "answers")["runs"]["a"]
    assert list(probes) == ["forget", "forget, retrained"]
    assert "retrained" not in probes["forget"] and {*probes["forget, retrained"]} == {"questions", "retrained"}


def test_in_detox_a_text_without_a_score_counts_as_toxic(tmp_path: Path) -> None:
    run = made()
    folder = left(tmp_path / "runs", a=replace(run, choices={**run.choices, "task": "detox"}))
    rows = [{"question": "?", "answer": "!", "generation": "a", **given} for given in ({}, {"toxicity": 0.2})]
    written(folder / "a" / "records" / "unlearned" / "forget.jsonl", *rows)
    found = pack(html(folder, folder), "answers")
    assert found["files"][0]["toxic"] == "10" and found["questions"][0]["toxic"] is True


def test_a_run_that_is_no_part_of_the_others_table_has_a_table_of_its_own(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made(), b=made(source="hub"))
    assert [list(group["labels"]) for group in pack(html(folder, folder), "data")["groups"]] == [["a"], ["b"]]


def test_a_mean_of_two_seeds_is_that_of_their_numbers(text: str) -> None:
    means = text[text.index('data-view="means"') :]
    row = re.search(r'<th scope="row" data-value="adam">.*?</th><td data-value="2">2</td>.*?</tr>', means, re.DOTALL)
    assert row is not None
    assert 'data-value="-2.5"' in row[0] and "-2.500<small>[-8.853, 0.000]</small>" in row[0]


def shown(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The page of a folder and what it holds of each table."""
    text = html(folder, folder)
    return text, pack(text, "data")["groups"]


def rows_of(group: dict[str, Any]) -> dict[str, list[str]]:
    """The runs of each row of means."""
    return {of["label"]: of["runs"] for of in group["numbers"]}


def test_rows_means_and_intervals_are_those_of_tables(tmp_path: Path) -> None:
    """A diverged seed is in no mean of others; a study of its own, other code and versions are no rows of their own."""
    runs = {
        f"s{seed}": replace(made(seed=seed, metrics={**UNLEARNED, "utility": 0.9 + seed / 10}), seconds={"unlearn": s})
        for seed, s in enumerate((2.0, 4.0, 9.0))
    }
    runs["s1"] = replace(runs["s1"], commit="f" * 40, versions={"torch": "3.0"})
    runs["s2"] = replace(runs["s2"], status="diverged", reason="not finite")
    runs["z"] = made(optimizer="sgd")
    text, (group,) = shown(left(tmp_path, **runs))
    assert rows_of(group) == {
        "adam": ["s0", "s1"],
        "adam (diverged)": ["s2"],
        "sgd": ["z"],
    }
    assert [of["place"] for of in group["numbers"]] == [0, 0, 1]
    averaged = tables.aggregated(tmp_path).to_dict("records")
    for of, row in zip(group["numbers"], averaged, strict=True):
        for key in ("utility", "log10_forget_quality", "mia_auc_delta", "seconds.unlearn"):
            expected = [row[key], row.get(f"{key}.low"), row.get(f"{key}.high")]
            assert of["numbers"][key] == [None if each != each else each for each in expected]
    assert group["numbers"][0]["numbers"]["seconds.unlearn"] == [3.0, 0.0, pytest.approx(3 + 12.7062, abs=1e-3)]
    assert group["numbers"][0]["numbers"]["utility"][0] == pytest.approx(0.95)
    said = re.sub("<.*?>", "", text)
    assert "DIFFERENT commit, also within a row: 0123456789: " in said
    assert "DIFFERENT version of torch, also within a row" in said and "DIVERGED: s2: not finite" in said
    assert 'data-key="mia_auc_delta" class="efficacy">' in text  # shown


def test_a_metric_that_the_first_run_lacks_has_its_group_and_its_references(tmp_path: Path) -> None:
    few, more = ({**of} for of in (UNLEARNED, UNLEARNED))
    del few["forget_rouge"]
    lacking = {key: value for key, value in ORIGINAL.items() if key != "forget_rouge"}
    first = made(metrics=few, original=lacking, retrained={k: v for k, v in RETRAINED.items() if k != "forget_rouge"})
    text, (group,) = shown(left(tmp_path, a=first, b=made(seed=1, metrics=more)))
    assert group["targets"]["retrained"]["forget_rouge"][0] == RETRAINED["forget_rouge"]
    assert '<th scope="col" aria-sort="none" data-key="forget_rouge" class="efficacy"' in text
    cell = 'data-run="b" data-model="original" data-key="forget_rouge" aria-label="forget ROUGE 0.950:'
    assert cell in text and 'data-run="a" data-model="original" data-key="utility"' in text


def test_a_repeated_seed_counts_once_and_its_run_has_a_row(tmp_path: Path) -> None:
    _, (group,) = shown(left(tmp_path, a=made(), b=made(), c=made(seed=1)))
    assert rows_of(group) == {"npo adam": ["a", "c"]}
    assert group["labels"] == {"a": "a", "b": "b", "c": "npo adam, seed 1"}


def test_runs_stand_as_their_values_were_typed(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made(optimizer="sgd"), b=made(seed=1, optimizer="sgd"), c=made())
    (folder / "multirun.yaml").write_text("hydra: {overrides: {task: ['optimizer=adam,sgd']}, sweeper: {params: null}}")
    _, (group,) = shown(folder)
    assert group["runs"] == ["c", "a", "b"] and [*rows_of(group)] == ["adam", "sgd"]


def test_each_request_of_a_sequence_is_a_row_with_compared_models_of_its_own(tmp_path: Path) -> None:
    runs = {f"request-{n}": made(retrained={**RETRAINED, "utility": n / 10}) for n in (1, 2)}
    text, (group,) = shown(left(tmp_path, **runs))
    assert rows_of(group) == {name: [name] for name in runs} and group["targets"] == {}
    for n in (1, 2):
        row = re.search(rf'<th scope="row">retrained, request-{n}</th>.*?</tr>', text, re.DOTALL)
        assert row is not None and f'data-key="utility" data-value="{n / 10}"' in " ".join(row[0].split())


def test_a_run_that_only_evaluates_has_no_loss_and_no_optimizer(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made(stages=("evaluate",)))
    text = html(folder, folder)
    assert pack(text, "data")["groups"][0]["labels"] == {"a": "a"}
    for key in ("choices.loss", "choices.optimizer"):
        assert f'<td data-key="{key}" hidden>' in text and f'<td data-key="{key}" data-value' not in text


def test_a_number_that_json_does_not_have_is_none(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made())
    written(folder / "a" / "train.jsonl", {"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0})
    found = pack(html(folder, folder), "data")["runs"]["a"]
    assert found["steps"]["training"]["loss"] == [None, 1.0]


def test_a_long_curve_keeps_its_last_step(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made())
    written(folder / "a" / "train.jsonl", *({"step": s, "loss": 1.0} for s in range(1000)))
    steps = pack(html(folder, folder), "data")["runs"]["a"]["steps"]["training"]["step"]
    assert len(steps) <= 301 and steps[0] == 0 and steps[-1] == 999


def test_fifty_runs_of_400_questions_take_less_than_15_mb(tmp_path: Path) -> None:
    folder = benchmark("report").made(tmp_path / "bench", runs=50, questions=400)
    assert len(html(folder, folder).encode()) < 15e6


def called(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "soul_exp.report", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])


def test_the_command_writes_the_page_into_the_folder_and_names_what_is_wrong(tmp_path: Path) -> None:
    folder = left(tmp_path / "runs", a=made())
    done = called(folder)
    assert done.returncode == 0 and done.stdout.startswith(f"{folder}/report.html: ")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    for args, message in [
        ((tmp_path / "none",), f"{tmp_path}/none is not a folder: expected one that holds runs"),
        ((folder, "--out", tmp_path / "no" / "x.html"), f"--out: {tmp_path}/no is not a folder: make it first"),
    ]:
        done = called(*args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"soul_exp.report: {message}")


def test_a_file_of_typed_options_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made())
    (folder / "a" / ".hydra").mkdir()
    (folder / "a" / ".hydra" / "overrides.yaml").write_text("- [")
    with pytest.raises(UsageError, match=r"overrides.yaml.*expected a list of options: remove it"):
        html(folder, folder)


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium: apt-get install --no-install-recommends chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(folder: Path, text: str) -> Path:
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def opened(chromium: Any, file: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end, it has written nothing to the console, and asked for no other address."""
    pages, wrong = [], []

    def open_(width: int = 1400, height: int = 900, scheme: str = "light", path: Path = file) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(60_000)  # of a machine with other work
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url in (path.as_uri(), "data:,") or wrong.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_
    for page in pages:
        page.close()
    assert wrong == []


def scrolled_to(page: Any, panel: str, drawn: str = ".main-svg") -> Any:
    page.evaluate(f"document.getElementById('{panel}').scrollIntoView()")
    page.wait_for_selector(f"#{panel} {drawn}")
    return page.locator(f"#{panel}")


def first_cells(page: Any) -> list[str]:
    return list(page.locator("tbody.sorted tr:visible th").all_inner_texts())


def test_a_column_sorts_by_number_up_and_down_and_says_so(opened: Callable[..., Any]) -> None:
    page = opened()
    header = page.locator("th[data-key=log10_forget_quality]:visible")
    header.get_by_role("button").click()
    assert first_cells(page) == ["sgd, seed 1", "sgd, seed 0", "adam, seed 1", "adam, seed 0"]  # -11, -10, -3, -2
    assert header.get_attribute("aria-sort") == "ascending"
    header.get_by_role("button").click()
    assert first_cells(page)[0] == "adam, seed 0" and header.get_attribute("aria-sort") == "descending"
    page.get_by_text("Columns", exact=True).click()
    page.get_by_role("checkbox", name="forget quality ↑", exact=True).check()
    assert page.locator("th[data-key=forget_quality]:visible").count() == 1
    page.get_by_role("combobox", name="Rows").select_option("means")
    assert first_cells(page) == ["adam", "sgd"]


def test_search_and_filters_give_the_rows_that_fit(opened: Callable[..., Any]) -> None:
    page = opened()
    panel = scrolled_to(page, "answers", ".items li")

    def asked() -> list[str]:
        return [
            ROWS.index(row) for text in panel.locator(".question").all_inner_texts() for row in ROWS if row[0] == text
        ]

    change, guard = (panel.get_by_role("combobox", name=name) for name in ("Change", "Guard"))
    search = panel.get_by_role("searchbox", name="Search")
    assert asked() == [0, 1, 2, 3, 4]
    for option, rows in (
        ("changed", [0, 2, 3, 4]),
        ("same", [1]),
        ("wrong", [0, 3, 4]),
        ("right", []),
        ("", [0, 1, 2, 3, 4]),
    ):
        change.select_option(option)
        assert asked() == rows, option
    assert panel.get_by_role("status").inner_text() == "5 of 5 questions."
    for option, rows in (("degenerate", [3]), ("fluent", [0, 1, 2, 4]), ("collapsed", []), ("", [0, 1, 2, 3, 4])):
        guard.select_option(option)
        assert asked() == rows, option
    search.fill("CLARA")
    assert asked() == [1] and panel.locator("mark").all_inner_texts() == ["Clara"] * 3  # expected, original, unlearned
    search.fill("nobody")
    assert asked() == [] and "no question passes" in panel.get_by_role("status").inner_text()


def test_markup_in_an_answer_stays_text(opened: Callable[..., Any]) -> None:
    page = opened()
    panel = scrolled_to(page, "answers", ".items li")
    shown = panel.inner_text()
    assert SCRIPT in shown and ONERROR in shown and "</script><b>\\u2028</b>" in shown and "\\x1b[31mrice" in shown
    assert panel.locator("img, script, b").count() == 0


def test_markup_in_any_name_or_reason_stays_text(opened: Callable[..., Any], tmp_path: Path) -> None:
    link = '<a href="javascript:alert(1)">x</a>'
    runs = {}
    for seed, name in enumerate((ONERROR.replace("/", ""), "b")):
        run = made(optimizer=ONERROR, seed=seed)
        point = {ONERROR: {link: 0.5}, "1": {link: 1.0}}
        runs[name] = replace(
            run, caption=SCRIPT, collapsed={ONERROR: link}, notes=[SCRIPT], commit=ONERROR, versions={link: ONERROR},
            status=ONERROR, reason=SCRIPT, tuned=link, reasons={"utility": ONERROR}, data_hashes={ONERROR: SCRIPT},
            seconds={ONERROR: 1.0, link: 2.0}, sha256={"records": {ONERROR: link}, "models": {}, "code": SCRIPT},
            attacks={link: {model: {ONERROR: point} for model in ("unlearned", "retrained")}},
            metrics={**run.metrics, "unlearned": {**run.metrics["unlearned"], ONERROR: 0.5}},
            config={**run.config, "attack": {link: {"metrics": {ONERROR: {}}}}},
        )  # fmt: skip
    folder = left(tmp_path / "runs", **runs)
    for name in runs:
        written(folder / name / "train.jsonl", *({"step": s, f"{ONERROR}loss": 1.0, link: s} for s in (1, 2)))
        lines = ({"step": s, "seconds": s, ONERROR: 0.5, "collapsed": link} for s in (1, 2))
        written(folder / name / "trajectory.jsonl", *lines)
        written(folder / name / "records" / "unlearned" / "a<b>.jsonl", {"question": link, "generation": SCRIPT})
    (folder / "report.html").write_text(html(folder, folder), encoding="utf-8")
    page = opened(path=folder / "report.html")
    for panel in ("plane", "trajectories", "bars", "curves", "cost", "diagnostics"):
        figure = scrolled_to(page, panel)
        chart = f"document.querySelector('#{panel} .chart')"
        page.evaluate(f"Plotly.Fx.hover({chart}, [{{curveNumber: 0, pointNumber: 0}}])")
        figure.locator(".hoverlayer text").first.wait_for(state="attached")  # Plotly waits between hovers
        figure.locator("summary").last.click()
    scrolled_to(page, "answers", ".items li")
    page.locator("tbody.sorted button.cell:visible").first.click()
    assert page.locator("img, b, svg a, a[href^=javascript]").count() == 0
    assert page.locator("script:not([id])").count() == 2  # the page's own and Plotly
    assert ONERROR in page.locator("#source").inner_text() and link in page.locator("#source").inner_text()


def test_a_toxic_text_is_hidden_until_it_is_asked_for(opened: Callable[..., Any]) -> None:
    panel = scrolled_to(opened(), "answers", ".items li")
    assert "You idiot." not in panel.inner_text()
    panel.get_by_role("button", name="toxic text: show").click()
    assert "You idiot." in panel.inner_text()
    panel.get_by_role("combobox", name="Change").select_option("changed")
    assert "You idiot." not in panel.inner_text()
    panel.get_by_label("show toxic text").check()
    assert "You idiot." in panel.inner_text()


def test_the_keyboard_alone_sorts_moves_and_shows_where_a_number_comes_from(opened: Callable[..., Any]) -> None:
    page = opened()
    page.locator("th[data-key=log10_forget_quality]:visible button").focus()
    page.keyboard.press("Enter")
    page.locator("tbody.sorted:visible th button").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.run") == "sgd0"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert "collapsed on forget" in page.locator("#source").inner_text()
    page.keyboard.press("Escape")
    assert dialog.count() == 0 and page.evaluate("document.activeElement.dataset.run") == "sgd0"
    page.locator("button.cell[data-run=adam0]:visible").first.click()
    told = page.locator("#source").inner_text()
    for part in (
        "0123456789abcdef",
        "part.forget abc",
        "torch 2.9.9",
        "seed 0",
        "optimizer=adam 'task.source=my book.txt'",
    ):
        assert part in told, part
    page.get_by_text("SHA-256 of 3 files of records").click()
    assert page.locator("#source table:visible tbody tr").count() == 3
    assert page.locator("#source a").get_attribute("href") == "adam0/"


def test_a_mean_and_a_reference_say_where_they_come_from(opened: Callable[..., Any]) -> None:
    page = opened()
    page.get_by_role("button", name="log10 forget quality 0.000: where").click()  # the retrained model's
    assert "metrics.retrained.log10_forget_quality" in page.locator("#source").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("combobox", name="Rows").select_option("means")
    page.get_by_role("button", name="log10 forget quality -2.500: where").click()
    assert page.locator("#source li").all_inner_texts() == ["adam0: -2", "adam1: -3"]
    page.locator("#source li button").last.click()
    assert page.locator("#source-title").inner_text() == "log10 forget quality ↑: adam, seed 1"


def test_an_adapter_attacked_beside_its_base_has_rows_that_say_where_they_come_from(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    for seed in (0, 1):
        apart = {"unmerged": {"relearn_excess": 0.1 + 0.1 * seed}}
        run = made(seed=seed, metrics={**UNLEARNED, "relearn_excess": 0.3})
        config = {**run.config, "attack": {"relearn": {"metrics": {"relearn_excess": {}}}}}
        left(tmp_path, **{f"a{seed}": replace(run, config=config, metrics={**run.metrics, **apart})})
    (tmp_path / "report.html").write_text(html(tmp_path, tmp_path), encoding="utf-8")
    page = opened(path=tmp_path / "report.html")
    names = [f"npo adam, seed {seed}{more}" for seed in (0, 1) for more in ("", ", unmerged")]
    assert first_cells(page) == names
    page.get_by_role("button", name="relearn excess 0.200: where").click()
    assert page.locator("#source-title").inner_text() == "relearn excess: unmerged"
    assert "metrics.unmerged.relearn_excess" in page.locator("#source").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("combobox", name="Rows").select_option("means")
    assert first_cells(page) == ["npo adam", "npo adam, unmerged"]
    page.get_by_role("button", name="relearn excess 0.150: where").click()
    assert page.locator("#source-title").inner_text() == "relearn excess: mean of npo adam, unmerged"
    assert page.locator("#source li").all_inner_texts() == ["a0: 0.1", "a1: 0.2"]


def test_every_panel_has_a_figure_or_says_why_not(opened: Callable[..., Any], chromium: Any, tmp_path: Path) -> None:
    page = opened()
    for panel in ("plane", "trajectories", "bars", "curves", "cost", "diagnostics"):
        assert not scrolled_to(page, panel).locator(".why").is_visible()
    page.locator("#curves summary").click()
    page.wait_for_selector("#curves tbody tr")
    rows = [row.split("\t") for row in page.locator("#curves tbody tr").all_inner_texts()]
    assert ["retrained", "100", "0.8"] in rows and ["adam, seed 0", "0", "0.1"] in rows
    page.locator("#plane summary").click()
    page.wait_for_selector("#plane tbody tr")
    assert "adam, seed 0\t-2\t0.6" in page.locator("#plane tbody tr").all_inner_texts()
    page.locator("#plane").get_by_role("combobox", name="Seeds").select_option("mean")
    page.wait_for_selector("#plane tbody tr >> text=-8.8531")  # the interval of the table of means
    page.get_by_role("combobox", name="Against").select_option("seconds")
    page.wait_for_selector("#trajectories .xtitle >> text=seconds of training")
    bare = left(tmp_path, a=replace(made(metrics={"mia_auc": None}), seconds={}))
    (bare / "report.html").write_text(html(bare, bare), encoding="utf-8")
    page = opened(path=bare / "report.html")
    for panel, why in {
        "plane": "No run has a metric of forgetting", "trajectories": "No run logged a step", "cost": "No run recorded",
        "bars": "No run was attacked", "curves": "No run was attacked", "diagnostics": "No run logged numbers",
        "answers": "The run folders hold no records/MODEL",
    }.items():  # fmt: skip
        said = scrolled_to(page, panel, ".why")
        page.wait_for_function(f"document.querySelector('#{panel} .why').textContent")
        assert said.locator(".why").inner_text().startswith(why)
        assert not said.locator("figure").is_visible() if panel != "answers" else True


NEED_NAMES = set("button link combobox searchbox textbox checkbox image img region dialog table".split())


def test_every_control_and_figure_has_a_name_for_a_screen_reader(opened: Callable[..., Any]) -> None:
    page = opened()
    for panel in ("plane", "trajectories", "bars", "curves", "cost", "diagnostics"):
        scrolled_to(page, panel)
    scrolled_to(page, "answers", ".items li")
    page.evaluate("for (const node of document.querySelectorAll('details')) node.open = true")
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    found = [(n["role"]["value"].lower(), n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    kinds = {role for role, _ in found}
    assert {"button", "link", "combobox", "searchbox", "checkbox", "region"} <= kinds and kinds & {"img", "image"}
    assert [role for role, name in found if role in NEED_NAMES and not name.strip()] == []


@pytest.mark.parametrize("width", [360, 1400])
def test_light_and_dark_are_readable_and_no_width_scrolls_sideways(opened: Callable[..., Any], width: int) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = opened(width=width, scheme=scheme)
        page.get_by_role("link", name="Cost").click()
        page.wait_for_selector("#cost .main-svg")
        page.wait_for_function("Math.abs(document.querySelector('#cost').getBoundingClientRect().top - 56) < 8")
        for panel in ("plane", "trajectories", "bars", "curves", "cost", "diagnostics"):
            scrolled_to(page, panel)
        scrolled_to(page, "answers", ".items li")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        colours = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        values = [[int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours]
        assert contrast(*values) > 7
        seen[scheme] = colours
    assert seen["light"] != seen["dark"]


def contrast(one: list[int], other: list[int]) -> float:
    """The contrast ratio of two colours, as WCAG 2 defines it."""

    def luminance(colour: list[int]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
