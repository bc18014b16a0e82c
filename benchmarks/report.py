"""How large the page of `soul_exp.report` is and how soon it can be used: `report.py [--runs 50] [--questions 400]`.

Makes run folders with answers of 50 random words, in which original and retrained model are those of one target, and
opens their page in Chromium from the disk. Measured: seconds to write it, its size, and, in the browser, milliseconds
from the start of loading until the table can be sorted, and from scrolling there until a figure and answers are shown.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from soul_exp import results
from soul_exp.report.page import html

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = ("adam", "sgd", "signum", "lion", "sophia", "sophia_soul", "muon", "soap", "sam", "mezo")
MODELS = {"original": 0.9, "unlearned": 0.3, "retrained": 0.2}
STEPS = 300


def made(folder: Path, runs: int = 50, questions: int = 400, num_words: int = 50) -> Path:
    """`folder` with so many runs of ten optimizers, the same each time; each has answers, curves and an attack."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]

    def sentence() -> str:
        return " ".join(draw.choices(vocabulary, k=num_words))

    asked = [(f"Who is {vocabulary[i]} of {vocabulary[-i]}?", sentence()) for i in range(questions)]
    shared = {model: _records(asked, [sentence() for _ in asked]) for model in ("original", "retrained")}
    metrics = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "task" / "tofu.yaml").metrics)
    assert isinstance(metrics, dict)
    attack = {"relearn_excess": {"_target_": "soul_exp.metrics.robustness.excess_area", "_partial_": True}}
    for number in range(runs):
        optimizer, seed = OPTIMIZERS[number % len(OPTIMIZERS)], number // len(OPTIMIZERS)
        values = {m: {name: v + draw.random() / 10 for name in (*metrics, *attack)} for m, v in MODELS.items()}
        for model in ("original", "retrained"):
            values[model] = {name: MODELS[model] for name in values[model]}
        curve = {f"{step}": {"probability": step / 100 * draw.random()} for step in (0, 10, 25, 50, 100)}
        found = results.Results(
            name="bench", status="finished", reason=None, caption="TOFU (random words)", tuned="validation",
            choices={"model": "tiny", "task": "tofu", "loss": "npo", "optimizer": optimizer},
            config={
                "task": {"metrics": metrics}, "attack": {"relearn": {"metrics": attack}},
                "optimizer": {"lr": 1e-3}, "stages": ["prepare", "unlearn", "evaluate", "attack"], "seed": seed,
            },
            metrics=values, reasons={}, training={}, num_steps=STEPS, peak_memory_gib=0.5,
            seconds={"prepare": 60.0, "unlearn": 20 + 5 * draw.random(), "evaluate": 10.0, "attack": 30.0},
            intervals={m: {name: [v - 0.05, v + 0.05] for name, v in of.items()} for m, of in values.items()},
            seeds={"seed": seed}, data_hashes={"part.forget": "abc"}, commit="0" * 40, versions={"torch": "2.9.9"},
            attacks={"relearn": {model: {"0.001": curve} for model in MODELS}},
        )  # fmt: skip
        run = folder / f"optimizer-{optimizer}+seed-{seed}"
        for model in MODELS:
            (run / "records" / model).mkdir(parents=True)
            text = shared.get(model) or _records(asked, [sentence() for _ in asked])
            (run / "records" / model / "forget.jsonl").write_text(text)
        lines = ({"step": s, "loss": draw.random(), "forget_loss": 1 / s, "win_rate": 0.5} for s in range(1, STEPS))
        (run / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        results.write(run, found)
    return folder


def _records(asked: list[tuple[str, str]], answers: list[str]) -> str:
    pairs = zip(asked, answers, strict=True)
    rows = ({"question": q, "answer": a, "generation": text, "rouge_l": 0.25} for (q, a), text in pairs)
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = made(Path(place) / "bench", args.runs, args.questions)
        start = time.perf_counter()
        page = folder / "report.html"
        page.write_text(html(folder, folder), encoding="utf-8")
        seconds = time.perf_counter() - start
        print(f"{args.runs} runs of {args.questions} questions: {page.stat().st_size / 1e6:.2f} MB in {seconds:.1f} s")
        browser_path = shutil.which("chromium")
        if browser_path is None:
            print("not opened: there is no chromium")
            return
        from playwright.sync_api import sync_playwright

        with sync_playwright() as player:
            browser = player.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            for _ in range(args.repeats):
                tab = browser.new_page(viewport={"width": 1400, "height": 900})
                tab.goto(page.as_uri())
                tab.wait_for_selector("html[data-ready]")
                ready = tab.evaluate("Number(document.documentElement.dataset.ready)")
                took = {}
                for panel, drawn in (("plane", ".main-svg"), ("answers", ".items li")):
                    start = tab.evaluate(f"document.getElementById('{panel}').scrollIntoView(), performance.now()")
                    tab.wait_for_selector(f"#{panel} {drawn}")
                    took[panel] = tab.evaluate("performance.now()") - start
                after = ", ".join(f"{panel} {value:.0f} ms after scrolling to it" for panel, value in took.items())
                print(f"table {ready:.0f} ms after opening, {after}")
                tab.close()
            browser.close()


if __name__ == "__main__":
    main()
