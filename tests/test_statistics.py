"""Statistics of several runs: intervals of means, dominance, improvement and profiles, against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from soul_exp.metrics import general, tofu
from soul_exp.metrics.scale import Scale, scale_of
from soul_exp.report import paired
from soul_exp.report.paired import compared
from soul_exp.report.statistics import (
    Range,
    dominated_by,
    mean_of,
    performance_profile,
    probability_of_improvement,
)
from soul_exp.report.table import Cell, Column, Row, Table

SHARE = Range(0.0, 1.0)
T1, T2 = 12.7062, 4.30265  # Student's t at 97.5 %, of 1 and 2 degrees of freedom


def ends(cell: Cell) -> list[float]:
    assert cell.low is not None and cell.high is not None
    return [cell.low, cell.high]


def test_a_mean_over_runs_without_intervals_of_their_own_has_students_t() -> None:
    found = mean_of([0.4, 0.5, 0.6], [None] * 3, [None] * 3)
    assert found.value == pytest.approx(0.5) and found.n == 3
    assert ends(found) == pytest.approx([0.5 - T2 * 0.1 / 3**0.5, 0.5 + T2 * 0.1 / 3**0.5], rel=1e-4)


def test_half_widths_over_runs_and_over_units_add_as_squares() -> None:
    """Over runs 12.7062 · 0.1 / √2 · … scaled to 3, over units 4 below and 8 above: 5 below, √73 above."""
    gap = 3 / T1 * 2  # two runs at ± gap / 2 have the standard error gap / 2, and so the half-width 3
    values = [10 - gap / 2, 10 + gap / 2]
    found = mean_of(values, [(value - 4, value + 8) for value in values], [None, None])
    assert ends(found) == pytest.approx([10 - 5, 10 + 73**0.5], rel=1e-4)


def test_more_runs_do_not_make_the_units_more_certain() -> None:
    """All runs answer the same questions: with equal runs the interval is that of one, of 2 runs or of 200."""
    for number in (2, 200):
        found = mean_of([0.5] * number, [(0.4, 0.7)] * number, [None] * number)
        assert ends(found) == pytest.approx([0.4, 0.7])


def test_one_run_without_an_interval_leaves_the_interval_to_the_runs() -> None:
    found = mean_of([1.0, 3.0], [(0.0, 9.0), None], [None, None])
    assert ends(found) == pytest.approx([2 - T1, 2 + T1], rel=1e-4)


def test_a_single_run_keeps_its_own_interval_and_a_null_counts_for_nothing() -> None:
    assert mean_of([0.5, None], [(0.4, 0.7), None], [1, 1]) == Cell(None, 0.5, 0.4, 0.7, n=1, is_partial=True)
    assert mean_of([0.5], [None], [1]) == Cell(None, 0.5, n=1)
    assert mean_of([None], [None], [1]) == Cell(is_partial=True)


def test_over_several_tuning_studies_their_means_are_what_varies() -> None:
    """Means 1 and 3 of two studies: their standard error is 1, of however many seeds each study has."""
    found = mean_of([0.0, 2.0, 3.0, 3.0], [None] * 4, [7, 7, 8, 8])
    assert found.value == 2 and found.n == 4
    assert ends(found) == pytest.approx([2 - T1, 2 + T1], rel=1e-4)
    same = mean_of([0.0, 2.0, 3.0, 3.0], [None] * 4, [7, 7, 7, 7])
    assert np.diff(ends(same)) < np.diff(ends(found))  # one study says nothing about another one


def test_an_interval_stays_in_the_range_of_its_metric() -> None:
    """0.421 ± 1.720 of two runs becomes [0, 1], as no number outside can be; the mean stays as it is."""
    found = mean_of([0.2856, 0.5564], [None, None], [None, None], SHARE)
    assert found.value == pytest.approx(0.421) and ends(found) == [0.0, 1.0]
    assert ends(mean_of([0.0, 1.0], [None] * 2, [None] * 2, Range())) == pytest.approx([0.5 - T1 / 2, 0.5 + T1 / 2])


def test_p_values_are_averaged_as_logarithms() -> None:
    """1e-2 and 1e-4: geometric mean 1e-3; the interval of log10 p, -3 ± 12.7062, ends at p = 1."""
    p_value = Range(0.0, 1.0, is_p_value=True)
    found = mean_of([1e-2, 1e-4], [None, None], [None, None], p_value)
    assert found.value == pytest.approx(1e-3)
    assert ends(found) == pytest.approx([10 ** (-3 - T1), 1.0], rel=1e-3)
    zero = mean_of([0.0, 1.0], [None, None], [None, None], p_value)
    assert zero.value == pytest.approx(10 ** (general.LOG10_TINY / 2)) and ends(zero) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (general.forget_quality, Range(0, 1, True)),
        (tofu.forget_quality, Range(0, 1, True)),
        (tofu.open_unlearning_forget_quality, Range(0, 1, True)),
        (tofu.log10_forget_quality, Range(general.LOG10_TINY, 0)),
        (tofu.forget_ks_distance, Range(0, 1)),
        (tofu.probability, Range(0, 1)),
    ],
)
def test_which_metrics_are_p_values_follows_from_their_declaration(metric: object, expected: Range) -> None:
    assert Range.of(scale_of(metric)) == expected  # type: ignore[arg-type]
    assert Range.of(None) == Range() and Range.of(Scale("lower", 1, 9)) == Range(1, 9)


def drawn(rng: np.random.Generator, of_seeds: float, of_units: float) -> np.ndarray:
    """Values [3 seeds, 12 units] with the mean 0: an effect of each seed, one of each unit, and noise."""
    return of_seeds * rng.normal(size=(3, 1)) + of_units * rng.normal(size=(1, 12)) + 0.3 * rng.normal(size=(3, 12))


def bootstrapped(rng: np.random.Generator, values: np.ndarray) -> tuple[float, float]:
    """The hierarchical bootstrap: seeds are drawn, then units, the same for all seeds; 95 % percentiles."""
    seeds, units = (rng.multinomial(size, np.full(size, 1 / size), size=300) / size for size in values.shape)
    low, high = np.quantile(np.einsum("ds,su,du->d", seeds, values, units), [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize(("of_seeds", "of_units", "too_short"), [(0.5, 0.3, "bootstrap"), (0.15, 1.0, "seeds alone")])
def test_the_interval_covers_the_truth_at_3_seeds_where_a_bootstrap_or_seeds_alone_do_not(
    of_seeds: float, of_units: float, too_short: str
) -> None:
    """Of 400 experiments of 3 seeds and 12 units at least 94 % cover; of the others under 85 %, where one level rules.

    A bootstrap fails where seeds rule, of which 3 are too few to draw from; seeds alone where units do.
    """
    rng = np.random.default_rng(0)
    covered = dict.fromkeys(("ours", "bootstrap", "seeds alone"), 0)
    for _ in range(400):
        values = drawn(rng, of_seeds, of_units)
        means = values.mean(1)
        halves = float(student.ppf(0.975, 11)) * values.std(1, ddof=1) / 12**0.5
        own = [(mean - half, mean + half) for mean, half in zip(means, halves, strict=True)]
        found = {
            "ours": ends(mean_of(list(means), own, [None] * 3)),
            "bootstrap": bootstrapped(rng, values),
            "seeds alone": ends(mean_of(list(means), [None] * 3, [None] * 3)),
        }
        for name, (low, high) in found.items():
            covered[name] += low <= 0 <= high
    assert covered["ours"] >= 0.94 * 400
    assert covered[too_short] < 0.85 * 400, covered


def test_a_difference_of_methods_has_an_interval_over_the_seeds_of_both_and_over_units() -> None:
    """Half-widths 3 and 4 over two seeds each, and √11 over units: √(9 + 16 + 11) = 6. No interval of four units."""

    def seeds(mean: float, half: float, units: list[float]) -> list[dict[str, float | None]]:
        return [{f"u{i}": mean + sign * half / T1 + unit for i, unit in enumerate(units)} for sign in (-1, 1)]

    unit = 11**0.5 / float(student.ppf(0.975, 4)) * 5**0.5 / (2 / 4) ** 0.5  # of standard deviation √(2/4)·unit
    own = seeds(2, 3, [unit, -unit, 0, 0, 0])
    found = compared({"sgd": own, "adam": seeds(1, 4, [0.0] * 5)}, "adam")["sgd"]
    assert found is not None and found.value == pytest.approx(1) and found.n == 5
    assert [found.low, found.high] == pytest.approx([1 - 6, 1 + 6], rel=1e-4)
    few = compared({"sgd": seeds(2, 3, [0.0] * 4), "adam": seeds(1, 4, [0.0] * 4)}, "adam")["sgd"]
    assert few is not None and (few.low, few.high, few.p) == (None, None, 2 / 2**4)


def test_the_interval_of_a_difference_of_shares_ends_at_minus_1_and_1() -> None:
    """Shares 0 and 1 of two seeds each: the difference 1/2, without a range ± 12.7 · 0.5 and more."""
    values = {"sgd": [dict.fromkeys("abcde", share) for share in (0.0, 1.0)], "adam": [dict.fromkeys("abcde", 0.0)]}
    free, cut = (compared(values, "adam", within)["sgd"] for within in (Range(), SHARE))
    assert free is not None and cut is not None and free.value == cut.value == 0.5
    assert [free.low, free.high] == pytest.approx([0.5 - T1 / 2, 0.5 + T1 / 2]) and [cut.low, cut.high] == [-1.0, 1.0]
    assert Range(-1, 1).of_differences == Range(-2, 2) and Range(0).of_differences == Range()
    beyond = compared({"sgd": [dict.fromkeys("abcde", 1.25)], "adam": values["adam"]}, "adam", SHARE)["sgd"]
    assert beyond is not None and (beyond.low, beyond.value, beyond.high) == (1.25,) * 3  # it holds its mean


@pytest.mark.parametrize("number", [5, 20])
def test_the_patterns_of_signs_are_made_once_for_a_number_of_units(number: int) -> None:
    """And those of few numbers are kept: of 400 units they take 40 MB."""
    paired._signs.cache_clear()
    p = [paired.sign_flip(np.full(number, sign)) for sign in (1.0, -1.0)]
    found = paired._signs.cache_info()
    assert p[0] == p[1] < 0.1 and (found.misses, found.hits) == (1, 1) and (found.maxsize or 99) < 10


def test_dominance_needs_no_worse_anywhere_and_better_somewhere() -> None:
    losses = {"a": (1.0, 1.0, 1.0), "b": (1.0, 2.0, 1.0), "c": (0.0, 3.0, 1.0), "d": (1.0, 1.0, 1.0), "e": (2, 2, 2)}
    assert dominated_by(losses) == {"a": [], "b": ["a", "d"], "c": [], "d": [], "e": ["a", "b", "d"]}


def test_the_probability_of_improvement_counts_pairs_of_runs() -> None:
    """Losses 1, 3 against 2, 3: better in (1, 2) and (1, 3), a tie in (3, 3), worse in (3, 2): 2.5 of 4."""
    assert probability_of_improvement([1.0, 3.0], [2.0, 3.0]) == 2.5 / 4
    assert probability_of_improvement([0.0, 0.0], [1.0, 1.0, 1.0]) == 1 and probability_of_improvement([5], [5]) == 0.5
    rng = np.random.default_rng(0)
    ours, base = rng.integers(0, 4, 7).tolist(), rng.integers(0, 4, 5).tolist()
    pairs = [(one < other) + 0.5 * (one == other) for one in ours for other in base]
    assert probability_of_improvement(ours, base) == pytest.approx(np.mean(pairs))


def test_a_profile_is_the_share_of_scores_strictly_above_each_threshold() -> None:
    assert performance_profile([0.0, 0.25, 0.5, 1.0], [0.0, 0.25, 0.9, 1.0]) == [0.75, 0.5, 0.25, 0.0]


# ---- marks


def marks(direction: str, *cells: Cell, target: float | None = None, ruined: int | None = None) -> list[str]:
    columns = (Column("x", "x", "utility", direction),)  # type: ignore[arg-type]
    rows = tuple(Row((cell,), is_sound=place != ruined) for place, cell in enumerate(cells))
    reference = Row((Cell(None, 99.0),), is_reference=True)
    found = Table("", columns, (reference, *rows)).marked([target]).rows
    assert found[0].cells[0].mark == ""
    return [row.cells[0].mark for row in found[1:]]


def test_the_best_is_marked_and_what_its_interval_and_its_own_explain_is_tied_with_it() -> None:
    """Half-widths 3 and 4 explain a difference of 5, not of 5.1; a larger half of 3 below counts, not 1 above."""
    best, near, far = Cell(None, 10, 7, 11), Cell(None, 5, 1, 9), Cell(None, 4.9, 0.9, 8.9)
    assert marks("higher", near, best, far) == ["tied", "best", ""]
    assert marks("lower", Cell(None, -5, -9, -1), Cell(None, -10, -13, -9)) == ["tied", "best"]
    assert marks("nearest", Cell(None, 0.4), Cell(None, 0.7), target=0.5) == ["best", ""]
    assert marks("nearest", Cell(None, 0.4), Cell(None, 0.7)) == ["", ""]  # no retrained model
    assert marks("higher", Cell(None, 1), Cell(None, 2), ruined=1) == ["", ""]  # one row is nothing to compare
    assert marks("higher", Cell(None, 1), Cell(None, 3), Cell(None, 2), ruined=1) == ["", "", "best"]
    assert marks("higher", Cell(None, 1), Cell(None, 1)) == ["", ""]  # all are equal
    for null in (Cell(), Cell(None, 5, n=1, is_partial=True)):  # more steps than were tried
        assert marks("higher", Cell(None, 1), Cell(None, 2), null) == ["", "", ""]


def test_p_values_are_tied_by_their_logarithms() -> None:
    """0.1 [0.001, 1] and 1e-50 [1e-70, 1e-30] are no neighbours, however near 0 both are."""
    columns = (Column("method", "method"), Column("forget_quality", "p", direction="higher", is_p_value=True))
    cells = (Cell(value=0.1, low=1e-3, high=1.0), Cell(value=1e-50, low=1e-70, high=1e-30), Cell(value=0.02))
    rows = tuple(Row((Cell(str(place)), cell)) for place, cell in enumerate(cells))
    found = Table("t", columns, rows).marked([None, None])
    assert [row.cells[1].mark for row in found.rows] == ["best", "", "tied"]
    assert [row.cells[1].value for row in found.rows] == [0.1, 1e-50, 0.02]


def test_ties_of_runs_give_no_interval_of_width_0() -> None:
    found = mean_of([-2.176, -2.176], [None, None], [None, None])
    assert (found.value, found.low, found.high, found.n) == (-2.176, None, None, 2)
    found = mean_of([0.5, 0.5], [(0.4, 0.6), (0.4, 0.6)], [None, None])
    assert found.low == pytest.approx(0.4) and found.high == pytest.approx(0.6)


def test_a_small_p_value_is_written_with_its_own_digits_and_a_zero_has_no_sign() -> None:
    assert Cell(value=4.9e-4, low=0.0, high=0.139).written == "4.9e-04 [0.000, 0.139]"
    assert Cell(value=-4.9e-4, low=-0.01, high=0.01).written == "0.000 [-0.010, 0.010]"
