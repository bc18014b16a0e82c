"""The figures of a folder of runs: what their axes, marks, lines and legends hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from test_tables import ORIGINAL, RETRAINED, UNLEARNED, left, made

import soul_exp
from soul_exp import figures
from soul_exp.errors import UsageError
from soul_exp.report.drawing import FILLS, MARKERS, PAGE, Drawn, NoDataError, image, looks, style, wrapped
from soul_exp.report.figures import NAMES, drawn
from soul_exp.report.frames import Frames
from soul_exp.results import Results

TEN = "adam sgd signum lion sophia sophia_soul muon soap sam hybrid".split()
EXCESS = {"_target_": "soul_exp.metrics.robustness.excess_area", "_partial_": True}
RATES, STEPS = ("0.0003", "0.003"), (0, 10, 100)


def curve(start: float, end: float) -> dict[str, dict[str, dict[str, float]]]:
    """Rate -> step -> measures: from `start` to `end`, higher at the second rate."""
    return {
        rate: {str(step): {"extraction_strength": start + (end - start) * step / 100 + 0.01 * i} for step in STEPS}
        for i, rate in enumerate(RATES)
    }


def trial(lr: float, gamma: float, quality: float | None, *, chosen: bool = False, **more: Any) -> dict[str, Any]:
    found = {"validation_log10_forget_quality": quality, "validation_retain_probability": quality and 0.95}
    return {"lr": lr, "gamma": gamma, "metrics": found, "diverged": None, "chosen": chosen, **more}


def attacked(run: Results, gain: float) -> Results:
    """`run` after relearning, with an excess of `gain`; the last step of the second rate is uninformative."""
    models = {"original": curve(1.0, 1.0), "unlearned": curve(0.1, 0.1 + gain), "retrained": curve(0.1, 0.2)}
    values = {"original": 0.8, "unlearned": gain, "retrained": 0.0}
    return replace(
        run,
        config={**run.config, "attack": {"relearn": {"metrics": {"relearn_excess": EXCESS}}}},
        metrics={model: {**run.metrics[model], "relearn_excess": value} for model, value in values.items()},
        intervals={"unlearned": {"relearn_excess": [gain - 0.05, gain + 0.05]}},
        attacks={"relearn": {**models, "uninformative": {RATES[1]: ["100"]}}},
    )


def lines_of(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def watched(folder: Path, at: float = 0.0) -> None:
    """A trajectory and training numbers in the run's folder; the last step collapsed."""
    lines_of(
        folder / "trajectory.jsonl",
        [
            {"step": step, "seconds": 2.0 * step + at, "validation_log10_forget_quality": -30 + step / 2 + at,
             "validation_retain_probability": 0.9, "collapsed": "repeats itself" if step == 50 else None}
            for step in (0, 25, 50)
        ],
    )  # fmt: skip
    lines_of(
        folder / "train.jsonl",
        [{"step": step, "loss": 1.0, "win_rate": 0.01 * step, "effective_update": 0.9} for step in range(0, 51, 5)],
    )


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Frames:
    """Ten optimizers of three seeds, attacked, tuned and watched: one seed of sgd diverged, one of muon collapsed."""
    folder = tmp_path_factory.mktemp("thirty")
    for i, optimizer in enumerate(TEN):
        for seed in range(3):
            quality = -3.0 * i - seed
            run = made(optimizer=optimizer, seed=seed, metrics={**UNLEARNED, "log10_forget_quality": quality,
                                                                "utility": 0.9 - 0.04 * i + 0.01 * seed})  # fmt: skip
            run = attacked(run, 0.05 * (i + 1) + 0.01 * seed)
            grid = [trial(lr, gamma, -10.0 * j - i, chosen=j == 2 and gamma == 1) for gamma in (1, 10)
                    for j, lr in enumerate((1e-4, 3e-4, 1e-3, 3e-3, 1e-2))]  # fmt: skip
            run = replace(run, trials=grid, seconds={"unlearn": 10.0 * (i + 1) + seed})
            if (optimizer, seed) == ("sgd", 2):
                run = replace(run, status="diverged", reason="loss 99")
            if (optimizer, seed) == ("muon", 0):
                run = replace(run, collapsed={"forget": "repeats itself"})
            left(folder, **{f"{optimizer}-{seed}": run})
            watched(folder / f"{optimizer}-{seed}", at=float(seed))
    return soul_exp.load(folder)


def loaded(folder: Path, **runs: Results) -> Frames:
    return soul_exp.load(left(folder, **runs))


def entries(figure: Drawn) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def note(figure: Drawn) -> str:
    return figure.legends[0].get_title().get_text().replace("\n", " ")


def marks(axis: Axes) -> dict[tuple[float, float], str]:
    """Where each single mark stands -> which it is."""
    return {
        (round(float(line.get_xdata()[0]), 6), round(float(line.get_ydata()[0]), 6)): str(line.get_marker())
        for line in axis.lines
        if len(line.get_xdata()) == 1 and line.get_marker() not in ("None", "|", "_")
    }


def reaches(axis: Axes) -> list[tuple[float, float, float, float]]:
    """The ends of all error bars: x, y of one end and of the other."""
    found = [segment for bars in axis.collections for segment in getattr(bars, "get_segments", list)()]
    return [tuple(round(float(end), 3) for end in np.asarray(segment).flat) for segment in found]  # type: ignore[misc]


def line_of(axis: Axes, marker: str, num: int = 3) -> list[tuple[float, float]]:
    joined = [line for line in axis.lines if line.get_linestyle() != "None"]
    (line,) = [line for line in joined if line.get_marker() == marker and len(line.get_xdata()) == num]
    return [(float(x), round(float(y), 6)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_the_plane_has_means_with_t_intervals_over_seeds_and_the_models_compared_with(thirty: Frames) -> None:
    figure = figures.plane(thirty)
    (axis,) = figure.axes
    names = sorted(TEN)  # the order of the run folders
    found = marks(axis)
    # adam: utility 0.90, 0.91, 0.92; log10 forget quality 0, -1, -2
    assert found[0.91, -1.0] == MARKERS[names.index("adam")]
    assert found[ORIGINAL["utility"], ORIGINAL["log10_forget_quality"]] == "s"
    assert found[RETRAINED["utility"], RETRAINED["log10_forget_quality"]] == "*"
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (round(0.91 - half, 3), -1.0, round(0.91 + half, 3), -1.0) in reaches(axis)
    assert (0.91, round(-1 - 100 * half, 3), 0.91, 0.0) in reaches(axis)  # a p-value is at most 1: cut at log10 of it
    assert axis.get_xlabel() == "model utility (↑ better)"
    assert axis.get_ylabel() == "log$_{10}$ forget quality (↑ better)"
    assert note(figure).startswith("means over n = 2 to 3 seeds; bars: 95 % interval over seeds (t) alone; hollow")
    assert {"adam", "original", "retrained (control)"} <= {*entries(figure)}


def test_diverged_runs_are_crossed_out_and_in_no_mean_and_collapsed_ones_hollow(thirty: Frames) -> None:
    figure = figures.plane(thirty)
    (axis,) = figure.axes
    assert marks(axis)[0.88, -5.0] == "x"  # sgd, seed 2
    assert (0.865, -3.5) in marks(axis)  # the mean of its seeds 0 and 1
    assert {"sgd (1 of 3 diverged)", "muon (1 of 3 collapsed)"} <= {*entries(figure)}
    hollow = [line for line in axis.lines if line.get_fillstyle() == "none" and line.get_color() != "black"]
    assert [round(float(line.get_xdata()[0]), 6) for line in hollow if line.get_marker() not in ("|", "_")] == [0.67]
    assert "hollow: a run collapsed; ×: diverged, in no mean" in note(figure)


def test_every_table_has_a_panel_and_looks_are_the_same_in_all(tmp_path: Path) -> None:
    hub = {**ORIGINAL, "utility": 0.7}
    frames = loaded(
        tmp_path, a=made(optimizer="adam"), b=made(optimizer="sgd"), c=made(optimizer="sgd", source="hub", original=hub)
    )
    figure = figures.plane(frames)
    assert [axis.get_title(loc="left") for axis in figure.axes if axis.axison] == ["A", "B"]
    sgd = {marks(axis)[0.6, -2.0] for axis in figure.axes if axis.axison and axis.get_title(loc="left") == "B"}
    assert sgd == {MARKERS[1]} and "A: " in figure.caption and "B: " in figure.caption
    assert [*drawn(frames, "cost")] == ["cost-A", "cost-B"]
    assert [*drawn(frames, "relearning")] == ["relearning"]  # why there is none of any table
    lines_of(tmp_path / "c" / "train.jsonl", [{"step": 1, "effective_update": 1.0}])
    assert [*drawn(soul_exp.load(tmp_path), "diagnostics")] == ["diagnostics-B", "diagnostics-A"]


def test_a_table_without_the_numbers_says_so_in_its_panel(tmp_path: Path) -> None:
    frames = loaded(
        tmp_path, a=made(), b=made(source="hub", metrics={**UNLEARNED, "log10_forget_quality": None}, original=None)
    )
    axis = figures.plane(frames).axes[1]
    assert [text.get_text().replace("\n", " ") for text in axis.texts] == [
        "no run has both log10 forget quality and model utility"
    ]


def test_one_run_has_its_interval_over_units_and_says_why_figures_are_missing(tmp_path: Path) -> None:
    run = replace(made(), intervals={"unlearned": {"utility": [0.5, 0.7]}})
    frames = loaded(tmp_path, only=run)
    figure = figures.plane(frames)
    assert (0.5, -2.0, 0.7, -2.0) in reaches(figure.axes[0])
    assert note(figure) == "one seed each; bars: 95 % interval over independent units, where there is one"
    assert entries(figure)[0] == "npo, adam"
    why = {name: str(drawn(frames, name)[name]) for name in ("trajectories", "relearning", "robustness", "sensitivity")}
    assert why["trajectories"] == "no run has a trajectory: type evaluate.every=10"
    assert all(": type " in reason for reason in why.values())
    assert all(isinstance(found, NoDataError) for found in drawn(frames, "diagnostics").values())


def test_nulls_are_no_marks_and_the_legend_names_their_methods(tmp_path: Path) -> None:
    gone = {**UNLEARNED, "utility": None}
    frames = loaded(tmp_path, a=made(), b=made(optimizer="sgd", metrics=gone))
    assert note(figures.plane(frames)).endswith("no such numbers: sgd")
    only_retained = figures.plane(loaded(tmp_path / "retained", a=made(metrics=gone)))
    assert only_retained.axes[0].get_xlabel() == "retain probability (↑ better)"
    gone["retain_probability"] = None
    with pytest.raises(NoDataError, match="no run has model utility: `reasons`"):
        figures.plane(loaded(tmp_path / "none", a=made(metrics=gone)))


def test_results_in_two_folders_count_once_and_no_mean_is_over_two_tables(tmp_path: Path) -> None:
    other = {**UNLEARNED, "utility": 0.1}
    frames = loaded(tmp_path, a=made(), again=made(), b=made(seed=1), c=made(source="hub", metrics=other))
    first, second = (axis for axis in figures.plane(frames).axes if axis.axison)
    assert (0.6, -2.0) in marks(first) and (0.1, -2.0) in marks(second)
    assert note(figures.plane(frames)).startswith("means over n = 1 to 2 seeds")


def test_tuned_and_untuned_runs_share_no_mean(tmp_path: Path) -> None:
    frames = loaded(tmp_path, a=made(), b=replace(made(seed=1, metrics={**UNLEARNED, "utility": 0.4}), tuned=None))
    figure = figures.plane(frames)
    assert {(0.6, -2.0), (0.4, -2.0)} < {*marks(figure.axes[0])}
    assert (
        entries(figure)[:2] == ["npo, adam", "npo, adam, untuned"] and "Untuned: npo, adam, untuned." in figure.caption
    )


def test_runs_of_several_commits_or_machines_are_no_silent_mean(tmp_path: Path) -> None:
    figure = figures.plane(loaded(tmp_path, a=made(), b=replace(made(seed=1), commit="f" * 40)))
    assert note(figure).endswith("; runs differ in commit") and "Commit: 0123456789, ffffffffff." in figure.caption
    same = {"records": {}, "models": {}, "code": "c"}
    a, b = (replace(made(seed=seed), commit=f"{seed}" * 40, sha256=same) for seed in (0, 1))
    assert "differ" not in note(figures.plane(loaded(tmp_path / "same", a=a, b=b)))
    a, b = replace(a, hardware="GPU A"), replace(b, hardware="GPU B", versions={"torch": "3.0"})
    figure = figures.plane(loaded(tmp_path / "machines", a=a, b=b))
    assert note(figure).endswith("; runs differ in hardware, version of torch")


def test_trajectories_are_over_steps_and_seconds_with_the_range_of_seeds(thirty: Frames) -> None:
    figure = figures.trajectories(thirty)
    steps, seconds, *_ = figure.axes
    assert line_of(steps, MARKERS[0]) == [(0.0, -29.0), (25.0, -16.5), (50.0, -4.0)]  # seeds add 0, 1 and 2
    assert line_of(seconds, MARKERS[0]) == [(1.0, -29.0), (51.0, -16.5), (101.0, -4.0)]
    ends = steps.collections[0].get_paths()[0].vertices
    assert (ends[:, 1].min(), ends[:, 1].max()) == (-30.0, -3.0)
    assert "collapsed at this step" in entries(figure) and "bands: lowest to highest seed" in note(figure)
    assert [axis.get_xlabel() for axis in figure.axes[-2:]] == ["steps", "training time (s), without evaluations"]


def test_relearning_has_a_panel_for_each_rate_with_the_control_and_what_counts_not(thirty: Frames) -> None:
    figure = figures.relearning(thirty)
    low, high = figure.axes
    assert [axis.get_title(loc="left") for axis in (low, high)] == ["relearn, lr 0.0003", "relearn, lr 0.003"]
    (control,) = [line for line in low.lines if line.get_linestyle() == "--" and line.get_color() == "black"]
    assert control.get_ydata().tolist() == pytest.approx([0.1, 0.11, 0.2])
    assert line_of(low, MARKERS[0])[-1] == (100.0, 0.16)  # adam: 0.1 + 0.05, 0.06, 0.07
    assert not low.patches and [patch.get_x() for patch in high.patches] == [55.0]  # from halfway to step 100
    assert "nothing to recover" in entries(figure)


def test_robustness_has_a_bar_for_each_method_with_its_interval(thirty: Frames) -> None:
    (axis,) = figures.robustness(thirty).axes
    widths = [round(bar.get_width(), 6) for bar in axis.patches if isinstance(bar, Rectangle)]
    order = [text.get_text() for text in axis.get_yticklabels()]
    assert order == sorted(TEN)
    assert widths == [0.105 if name == "sgd" else round(0.05 * (TEN.index(name) + 1) + 0.01, 6) for name in order]
    half = math.hypot(4.302653 * 0.01 / math.sqrt(3), 0.05)  # of seeds; of the units of each run
    assert (round(0.06 - half, 3), 0.0, round(0.06 + half, 3), 0.0) in reaches(axis)
    assert axis.get_xlabel() == "relearn excess (→ retrained)"
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in axis.patches}) == 10
    assert len({bar.get_hatch() for bar in axis.patches}) == 10  # also in grey


def test_a_model_far_from_all_methods_is_a_number_and_a_method_without_one_says_why(tmp_path: Path) -> None:
    lost = replace(attacked(made(optimizer="sgd"), 0.1), status="diverged", reason="loss 99")
    frames = loaded(tmp_path, a=attacked(made(), 0.1), b=lost, c=made(optimizer="lion"))
    (axis,) = figures.robustness(frames).axes
    assert axis.get_title(loc="right") == "original: 0.800"
    assert [(text.get_position()[1], text.get_text()) for text in axis.texts] == [(1, "diverged"), (2, "no value")]


def test_numbers_that_are_0_for_all_methods_are_named_and_have_no_empty_panel(tmp_path: Path) -> None:
    runs = {}
    for optimizer, excess in (("adam", 0.1), ("sgd", 0.0)):
        run = replace(attacked(made(optimizer=optimizer), excess), intervals={})
        named = {"relearn_excess": EXCESS, "prune_excess": EXCESS}
        config = {**run.config, "attack": {"relearn": {"metrics": named}}}
        runs[optimizer] = replace(
            run, config=config, metrics={m: {**of, "prune_excess": 0.0} for m, of in run.metrics.items()}
        )
    figure = figures.robustness(loaded(tmp_path, **runs))
    assert [axis.get_xlabel() for axis in figure.axes] == ["relearn excess (→ retrained)"]
    assert note(figure).endswith("0 for all methods: prune excess")
    assert [(text.xy[1], text.get_text()) for text in figure.axes[0].texts] == [(1, "0")]  # type: ignore[attr-defined]


def test_diagnostics_name_the_methods_without_a_win_rate(tmp_path: Path) -> None:
    frames = loaded(tmp_path, a=made(optimizer="adam"), b=made(optimizer="sophia"))
    lines_of(tmp_path / "a" / "train.jsonl", [{"step": 1, "effective_update": 0.5}])
    lines_of(tmp_path / "b" / "train.jsonl", [{"step": s, "win_rate": s / 10, "effective_update": 1.0} for s in (1, 2)])
    figure = figures.diagnostics(frames)
    assert line_of(figure.axes[0], MARKERS[1], 2) == [(1.0, 0.1), (2.0, 0.2)]
    assert note(figure) == "one seed each; no win_rate: adam"
    lines_of(tmp_path / "b" / "train.jsonl", [{"step": 1, "effective_update": 1.0}])
    without = figures.diagnostics(soul_exp.load(tmp_path)).axes[0]
    assert [text.get_text() for text in without.texts] == ["no optimizer here has a\nwin_rate"]


def test_a_diverged_run_is_a_line_that_ends_in_a_cross(tmp_path: Path) -> None:
    frames = loaded(tmp_path, a=replace(made(), status="diverged", reason="loss 99"), b=made(optimizer="sgd"))
    for name, last in (("a", 2), ("b", 5)):
        lines_of(tmp_path / name / "train.jsonl", [{"step": s, "effective_update": 0.5} for s in range(last + 1)])
    axis = figures.diagnostics(frames).axes[1]
    assert marks(axis) == {(2.0, 0.5): "x"}


def cells(axis: Axes) -> dict[tuple[float, float], Rectangle]:
    """The cells of a heat map by their lower left corner, without the background."""
    return {patch.get_xy(): patch for patch in axis.patches if patch.get_hatch() is None}


def test_trials_are_cells_over_log_axes_with_the_chosen_one_framed(thirty: Frames) -> None:
    figure = figures.sensitivity(thirty)
    axis = next(axis for axis in figure.axes if axis.get_title(loc="left") == "sgd")
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_xticks().tolist() == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2] and axis.get_yticks().tolist() == [1.0, 10.0]
    framed = [corner for corner, cell in cells(axis).items() if cell.get_edgecolor() == to_rgba("black")]
    assert len(cells(axis)) == 10 and framed == [pytest.approx((math.sqrt(3e-4 * 1e-3), 10**-0.5))]
    assert {text.get_text() for text in axis.texts} == {f"−{10 * j + 1}.0\n0.95" for j in range(5)}
    assert entries(figure) == ["chosen"]


def test_each_trial_is_a_mark_with_the_chosen_ringed_beside_the_least_that_the_rule_accepts(tmp_path: Path) -> None:
    tried = {
        "adam": [trial(1e-4, 10.0, -10.0), trial(1e-3, 10.0, -4.0, chosen=True), trial(1e-2, 10.0, None)],
        "sgd": [trial(1e-4, 10.0, -9.0), trial(1e-3, 10.0, -3.0, chosen=True)],
    }
    runs = {}
    for optimizer, grid in tried.items():
        for seed in (0, 1):  # which share their trials
            original = {**ORIGINAL, "validation_retain_probability": 0.8}
            run = made(optimizer=optimizer, seed=seed, original=original)
            runs[f"{optimizer}{seed}"] = replace(run, trials=grid, tuned="validation part: the best (keep=0.75)")
    figure = figures.trials(loaded(tmp_path, **runs))
    (axis,) = figure.axes
    drawn_at = {line.get_marker(): line.get_ydata().tolist() for line in axis.lines if line.get_color() != "black"}
    assert drawn_at == {MARKERS[0]: [-10.0, -4.0], MARKERS[1]: [-9.0, -3.0]}
    (ring,) = [line for line in axis.lines if line.get_color() == "black" and line.get_marker() == "o"]
    assert ring.get_ydata().tolist() == [-4.0, -3.0]
    (least,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert least.get_xdata()[0] == 0.6 and "least that the rule accepts: 0.600" in entries(figure)
    assert note(figure).startswith("5 trials, 1 without numbers")


def test_a_varied_number_is_an_axis_and_what_was_not_tried_is_left_open(tmp_path: Path) -> None:
    runs = {}
    for rho in (0.1, 1.0, 10.0):
        base = made(optimizer="sophia")
        config = {**base.config, "optimizer": {"lr": 1e-3, "rho": rho}}
        tried = [trial(1e-4, 10.0, -9.0), trial(1e-3, 10.0, -rho, chosen=True)][rho == 10.0 :]
        if rho == 1.0:
            tried[0] |= {"diverged": "loss 99", "metrics": {}}
        runs[f"rho{rho:g}"] = replace(attacked(base, rho / 20), config=config, trials=tried)
    frames = loaded(tmp_path, **runs)
    figure = figures.sensitivity(frames)
    axis = figure.axes[0]
    assert (axis.get_ylabel(), axis.get_yscale(), axis.get_title(loc="left")) == ("optimizer.rho", "log", "gamma 10")
    assert len(cells(axis)) == 5 and entries(figure) == ["chosen", "diverged", "not tried"]
    assert sorted(text.get_text() for text in axis.texts) == sorted(
        ["−9.0\n0.95", "−0.1\n0.95", "×", "−1.0\n0.95", "−10.0\n0.95"]
    )


def test_a_varied_number_is_the_axis_of_robustness_too(tmp_path: Path) -> None:
    runs = {}
    for rho in (10.0, 0.1, 1.0):
        base = made(optimizer="sophia")
        config = {**base.config, "optimizer": {"lr": 1e-3, "rho": rho}, "attack": None}
        run = attacked(replace(base, config=config), rho / 20)
        runs[f"rho{rho:g}"] = run
    frames = loaded(tmp_path, **runs)
    (axis,) = figures.robustness(frames).axes
    assert axis.get_xscale() == "log" and axis.get_xlabel() == "optimizer.rho"
    (line,) = [line for line in axis.lines if len(line.get_xdata()) == 3]
    assert line.get_xdata().tolist() == [0.1, 1.0, 10.0] and line.get_ydata().tolist() == [0.005, 0.05, 0.5]
    assert entries(figures.plane(frames))[:3] == ["rho = 0.1", "rho = 1", "rho = 10"]


def test_methods_and_repeats_are_those_of_tables_in_the_typed_order(tmp_path: Path) -> None:
    def tuned(study: int, utility: float, on: str = "validation", lr: float = 1e-3, **more: Any) -> Results:
        run = made(metrics={**UNLEARNED, "utility": utility}, **more)
        config = {**run.config, "tune": {"seed": study}}
        return replace(run, config=config, tuned=on, trials=[trial(lr, 1.0, -3.0, chosen=True)])

    studies = loaded(tmp_path / "studies", a=tuned(1000, 0.5), b=tuned(2000, 0.7))
    figure = figures.plane(studies)
    assert (0.6, -2.0) in marks(figure.axes[0]) and note(figure).startswith("means over n = 2 runs; bars: ")
    assert "over tuning studies (t) alone" in note(figure)
    other = loaded(tmp_path / "other", a=tuned(1000, 0.5), b=tuned(1000, 0.7, on="test", seed=1))
    figure = figures.plane(other)
    assert entries(figure)[:2] == ["npo, adam, tuning 1", "npo, adam, tuning 2"]
    assert {(0.5, -2.0), (0.7, -2.0)} <= {*marks(figure.axes[0])} and note(figure).startswith("one seed each")
    assert "Tuning 2: test (learning rate 0.001; gamma 1)." in figure.caption
    tried = loaded(tmp_path / "tried", a=tuned(1000, 0.5), b=tuned(1000, 0.7, lr=1e-2, seed=1))
    assert {(0.5, -2.0), (0.7, -2.0)} <= {*marks(figures.plane(tried).axes[0])}
    for frames in (studies, other, tried):
        (group,) = frames.tables
        names = [name for name in entries(figures.plane(frames)) if name.startswith("npo")]
        assert len(names) == len(group.methods)
    folder = left(tmp_path / "typed", a=made(optimizer="adam"), b=made(optimizer="sgd"), c=made(optimizer="lion"))
    hydra = {"overrides": {"task": ["optimizer=sgd,lion,adam"]}, "sweeper": {"params": None}}
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
    assert entries(figures.plane(soul_exp.load(folder)))[:3] == ["sgd", "lion", "adam"]


def test_means_over_units_name_what_is_over_seeds_alone(tmp_path: Path) -> None:
    runs = {f"{seed}": replace(made(seed=seed), intervals={"unlearned": {"utility": [0.5, 0.7]}}) for seed in range(2)}
    frames = loaded(tmp_path, **runs)
    over = "bars: 95 % interval over seeds (t) and independent units; over seeds (t) alone: "
    assert f"{over}log10 forget quality" in note(figures.plane(frames))
    assert f"{over}time, log10 forget quality" in note(figures.cost(frames))


@pytest.mark.filterwarnings("error")
def test_times_end_at_0_and_a_time_of_0_is_named(tmp_path: Path) -> None:
    times = {("adam", 0): 1.0, ("adam", 1): 9.0, ("sgd", 0): 0.0}
    runs = {f"{o}{s}": replace(made(optimizer=o, seed=s), seconds={"unlearn": of}) for (o, s), of in times.items()}
    figure = figures.cost(loaded(tmp_path, **runs))
    figure.draw_without_rendering()
    assert (0.0, -2.0, 55.825, -2.0) in reaches(figure.axes[0])  # 5 +- 12.706 * 4, cut at 0
    assert [at for at in marks(figure.axes[0]) if at[0] <= 0] == []
    assert "not drawn, as the time is 0 s: sgd" in note(figure) and "sgd" not in entries(figure)


def test_a_value_outside_its_interval_has_a_bar_on_one_side(tmp_path: Path) -> None:
    edited = {"unlearned": {"utility": [0.7, 0.8], "relearn_excess": [0.3, 0.4]}}
    frames = loaded(tmp_path, a=replace(attacked(made(), 0.2), intervals=edited))
    assert (0.6, -2.0, 0.8, -2.0) in reaches(figures.plane(frames).axes[0])
    assert (0.2, 0.0, 0.4, 0.0) in reaches(figures.robustness(frames).axes[0])


def test_time_is_on_a_log_axis(thirty: Frames) -> None:
    quality, utility = figures.cost(thirty).axes
    assert quality.get_xscale() == utility.get_xscale() == "log"
    assert (11.0, -1.0) in marks(quality) and (11.0, 0.91) in marks(utility)
    assert quality.get_xlabel() == "time of unlearning (s)"


def test_sixty_methods_look_different_without_colour_and_a_group_shares_its_colour() -> None:
    assert len({look.color for look in looks(TEN, {}, are_ordered=False).values()}) == 10
    names = [f"{loss}, {optimizer}" for loss in "abcdef" for optimizer in TEN]
    found = looks(names, {name: name.split(", ")[1] for name in names}, are_ordered=False)
    assert len(MARKERS) * len(FILLS) >= 60 == len({(look.marker, look.fill) for look in found.values()})
    assert found["a, adam"].color == found["f, adam"].color != found["a, sgd"].color
    assert len({(look.color, look.hatch) for look in found.values()}) == 60
    assert len({found[f"{loss}, adam"].dash for loss in "abcde"}) == 5
    greys = [look.color for look in looks([*"abcde"], {}, are_ordered=True).values()]
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in greys]
    assert lightness == sorted(lightness)


@pytest.mark.parametrize("name", NAMES)
def test_no_legend_covers_an_axis_and_nothing_leaves_the_figure(thirty: Frames, name: str) -> None:
    assert_fits(thirty, name)


@style()
def assert_fits(frames: Frames, name: str) -> None:
    (figure,) = drawn(frames, name).values()
    assert isinstance(figure, Drawn)
    figure.draw_without_rendering()
    page, legend = figure.bbox, figure.legends[0].get_window_extent()
    assert figure.get_figwidth() <= PAGE and legend.x0 >= -1 and legend.x1 <= page.x1 + 1 and legend.y0 >= -1
    for axis in (axis for axis in figure.axes if axis.axison and axis.get_label() != "<colorbar>"):
        boxes = [axis.xaxis.get_tightbbox(), axis.yaxis.get_tightbbox(), axis.bbox]
        titles = [title for title in (axis.title, axis._left_title, axis._right_title) if title.get_text()]  # type: ignore[attr-defined]
        box = Bbox.union([each for each in (*boxes, *(title.get_window_extent() for title in titles)) if each])
        assert box.y0 >= legend.y1 - 1 and box.x0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert axis.bbox.width > 40 and axis.bbox.height > 30


def test_long_names_and_what_a_formula_would_be_fit(tmp_path: Path) -> None:
    long = "_an_optimizer_of_my_own_whose_name_is_much_longer_than_any_column_$x_1$"
    for number in range(3):
        run = replace(attacked(made(optimizer=f"{long}{number}"), 0.1), trials=[trial(1e-3, 1.0, -3.0, chosen=True)])
        left(tmp_path, **{f"run{number}": run})
        watched(tmp_path / f"run{number}")
    frames = soul_exp.load(tmp_path)
    for name in NAMES:
        assert_fits(frames, name)
    assert f"{long}0" in entries(figures.plane(frames))[0].replace("\n", "").replace("\\$", "$")


def test_lines_end_at_spaces_and_underscores_or_where_a_part_is_longer() -> None:
    assert wrapped("npo, sophia_with_more", 12) == "npo, sophia_\nwith_more"
    assert wrapped("npo_or_more, sgd_2", 14) == "npo_or_more,\nsgd_2"
    assert wrapped("a" * 15, 10) == "a" * 10 + "\n" + "a" * 5
    assert wrapped("$x$", 10) == "\\$x\\$" and wrapped("", 10) == ""


def test_the_same_figure_has_the_same_bytes_whatever_matplotlib_was_set_to(tmp_path: Path) -> None:
    frames = loaded(tmp_path, a=attacked(made(), 0.1))
    first = {kind: image(figures.plane(frames), kind) for kind in ("pdf", "png")}
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "pdf.fonttype": 3}):
        assert {kind: image(figures.plane(frames), kind) for kind in ("pdf", "png")} == first
    assert b"CreationDate" not in first["pdf"] and b"/FontFile2" in first["pdf"]
    assert first["png"].startswith(b"\x89PNG") and figures.plane(frames)._repr_png_() == first["png"]


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no table 2: found tables 1 to 1"):
        figures.cost(loaded(tmp_path, a=made()), 2)


def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from soul_exp.figures import main; main(); print('pyplot', 'matplotlib.pyplot' in sys.modules)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_writes_what_there_is_and_says_why_the_rest_is_missing(tmp_path: Path) -> None:
    left(tmp_path, a=made(), b=made(optimizer="sgd"))
    done = typed(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"plane: {tmp_path}/figures/plane.{{pdf,png,txt}}"
    assert lines[1] == "trajectories: no run has a trajectory: type evaluate.every=10"
    assert len(lines) == len(NAMES) + 1 and lines[-1] == "pyplot False"
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("plane", "cost") for kind in ("pdf", "png", "txt")}
    caption = (tmp_path / "figures" / "plane.txt").read_text()
    assert "Tuned on: validation. Seeds: 0. Steps: 50. Precision: fp32. Commit: 0123456789." in caption


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "plan"], "--only: there is no figure 'plan', choose from plane, trajectories"),
        (["--only", "trajectories"], "has no data for trajectories: see above"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_exit_2(
    tmp_path: Path,
    arguments: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left(tmp_path, a=made())
    monkeypatch.setattr(sys, "argv", ["figures", str(tmp_path), *arguments])
    monkeypatch.setattr(figures, "open_standard_streams", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        figures.main()
    found = capsys.readouterr().err
    assert stopped.value.code == 2 and error in found and found.count("\n") == 1
