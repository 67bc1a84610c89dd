import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from recipes.experiments import figures
from recipes.experiments.figures import MOST_CURVES, plot_curves, plot_errors
from recipes.experiments.report import paper_table, table, tuning_table, write
from recipes.experiments.runner import COLUMNS, EPOCH
from recipes.experiments.spec import final_runs, tuning_runs
from recipes.experiments.summary import interval, read, read_curves, summarise, tuned

SPEC = {
    "name": "made_up",
    "seeds": [0, 1, 2, 3],
    "tuning_seeds": [100],
    "reference": "SGD",
    "common": {"epochs": 2},
    "arms": {
        "SGD": {"method": "sgd", "grid": {"lr": [0.1, 0.2, 0.4]}, "layout": True},
        "Sp": {"method": "fgsgd", "manifolds": ["sphere"], "layout": True},
        "PI": {"method": "fgsgd", "manifolds": ["stiefel", "sphere"], "scheme": "pi", "layout": True},
        "PIO": {"method": "fgsgd", "manifolds": ["sphere", "stiefel"], "scheme": "pio", "layout": True},
        "PIO, rho none": {"method": "fgsgd", "manifolds": ["sphere", "stiefel"], "scheme": "pio", "rho": None},
    },
}
ERRORS = {
    "SGD": {0: 12.0, 1: 11.5, 2: 12.7, 3: 11.9},
    "Sp": {0: 11.0, 1: 11.3, 2: 11.8, 3: "nan"},
    "PI": {1: 13.0, 3: 12.0},
    "PIO": {2: 10.0},
}
TUNED = {run.key: error for run, error in zip(tuning_runs(SPEC, "SGD"), (3, 2, 1), strict=True)}
KEYS = {
    (arm, run.seed): run.key
    for arm in SPEC["arms"]
    for run in final_runs(SPEC, arm, [{"key": key, "val_error": error} for key, error in TUNED.items()])
}

KEPT = (
    "| arm | test error, % | agreement, % | agreement, norms recalibrated, % | seeds |\n| --- | --- | --- | --- | --- |"
)


def row(stage, arm, seed, error, **more):
    numbers = {"val_error": error, "test_error": error if stage == "final" else "", "train_loss": 0.1, "seconds": 9}
    told = {
        "commit": "abc",
        "versions": json.dumps({"torch": "2.6"}),
        "device": "cpu",
        "config": json.dumps({"lr": 0.1}),
    }
    return (
        {**dict.fromkeys(COLUMNS, ""), "key": KEYS.get((arm, seed), ""), "stage": stage, "arm": arm, "seed": seed}
        | numbers
        | told
        | more
    )


def write_rows(folder, rows):
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path):
    rows = [row("final", arm, seed, error) for arm, errors in ERRORS.items() for seed, error in errors.items()]
    rows += [row("tune", "SGD", 100, error, key=key) for key, error in TUNED.items()]
    write_rows(tmp_path, rows)
    with (tmp_path / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, EPOCH)
        writer.writeheader()
        # A run that was cut off after two epochs, and run again.
        for key, epoch, loss in (
            (KEYS["SGD", 0], 1, 9.0),
            (KEYS["SGD", 0], 2, 8.0),
            (KEYS["SGD", 0], 1, 2.0),
            (KEYS["SGD", 0], 2, 1.0),
        ):
            writer.writerow(
                {"key": key, "epoch": float(epoch), "train_loss": loss, "val_error": "" if epoch == 1 else 12.0}
            )
    return tmp_path


def test_means_and_paired_differences_are_those_of_scipy_over_the_seeds_that_both_arms_ended(folder):
    summary = {r["arm"]: r for r in summarise(read(folder), SPEC)}
    assert list(summary) == ["SGD", "Sp", "PI", "PIO"]
    sgd = np.array(list(ERRORS["SGD"].values()))
    assert summary["SGD"]["test_error_mean"] == pytest.approx(sgd.mean())
    assert summary["SGD"]["test_error_std"] == pytest.approx(sgd.std(ddof=1))
    assert math.isnan(summary["SGD"]["difference"])

    sphere = np.array([11.0, 11.3, 11.8])
    expected = stats.ttest_rel(sphere, sgd[:3]).confidence_interval(0.95)
    found = summary["Sp"]
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["difference"] == pytest.approx((sphere - sgd[:3]).mean())
    assert found["relative"] == pytest.approx(100 * (sphere - sgd[:3]).mean() / sgd[:3].mean())
    assert (found["seeds"], found["diverged"], found["shared"]) == ([0, 1, 2], [3], 3)

    expected = stats.ttest_rel([13.0, 12.0], sgd[[1, 3]]).confidence_interval(0.95)
    assert (summary["PI"]["low"], summary["PI"]["high"]) == pytest.approx((expected.low, expected.high))
    assert summary["PIO"]["difference"] == pytest.approx(10.0 - 12.7)
    assert math.isnan(summary["PIO"]["low"])  # one seed has no interval


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    intervals = np.array([interval(list(five)) for five in draws])
    assert ((intervals[:, 0] < 3) & (intervals[:, 1] > 3)).mean() == pytest.approx(0.95, abs=0.012)


def test_the_table_says_how_many_seeds_and_what_diverged(folder):
    lines = table(summarise(read(folder), SPEC), SPEC).splitlines()
    assert lines[0].startswith("| arm | test error, % | − SGD | 95 % interval |")
    assert lines[2] == "| SGD | 12.03 ± 0.50 |  |  |  | 12.03 ± 0.50 | 4 |"
    assert lines[3].startswith("| Sp | 11.37 ± 0.40 | -0.70 | -1.")
    assert lines[3].endswith("| 3 (1 diverged) |")
    assert lines[5].startswith("| PIO | 10.00 | -2.70 | - | -21.3 |")


def test_a_difference_over_fewer_seeds_than_the_mean_says_over_how_many(tmp_path):
    """A seed that the reference lost is in the arm's mean and in no difference."""
    errors = {"SGD": {0: 12.0, 1: 11.0, 2: "nan"}, "Sp": {0: 11.5, 1: 11.1, 2: 30.0}, "PI": {2: 9.0, 3: "nan"}}
    write_rows(tmp_path, [row("final", arm, s, e) for arm, runs in errors.items() for s, e in runs.items()])
    sgd, sphere, pi = table(summarise(read(tmp_path), SPEC), SPEC).splitlines()[2:]
    assert sgd.endswith("| 2 (1 diverged) |")
    expected = stats.ttest_rel([11.5, 11.1], [12.0, 11.0]).confidence_interval(0.95)
    assert f"| -0.20 | {expected.low:+.2f} to {expected.high:+.2f} |" in sphere
    assert sphere.endswith("| 3 (2 shared) |")
    assert pi == "| PI | 9.00 |  |  |  | 9.00 | 1 (1 diverged, 0 shared) |"


def test_the_fit_and_the_time_of_an_arm_are_of_the_runs_that_ended(tmp_path):
    told = {"SGD": [(0.31, 50), (0.29, 70), (0.33, 60)], "Sp": [(0.2, 80), (0.24, 90), ("nan", 3)]}
    errors = {"SGD": [12.0, 11.0, 13.0], "Sp": [11.0, 12.0, "nan"]}
    rows = [
        row("final", arm, seed, errors[arm][seed], train_loss=loss, seconds=seconds)
        for arm, runs in told.items()
        for seed, (loss, seconds) in enumerate(runs)
    ]
    write_rows(tmp_path, rows + [row("tune", "SGD", 100, error, key=key) for key, error in TUNED.items()])
    write(tmp_path, SPEC)
    report = (tmp_path / "report.md").read_text()
    assert "| SGD | 0.310 ± 0.020 | 60 | 3 |" in report
    assert "| Sp | 0.220 ± 0.028 | 85 | 2 |" in report


def test_the_papers_layout_has_one_cell_an_arm_that_asks_for_it(folder):
    lines = paper_table(summarise(read(folder), SPEC), SPEC).splitlines()[2:]
    assert lines[0] == "|  | alone | PI | PO | PIO |"
    assert lines[2] == "| Euclidean | 12.03 ± 0.50 (4) |  |  |  |"
    assert lines[3] == "| Sp | 11.37 ± 0.40 (3) |  |  |  |"
    assert lines[4] == "| Sp+St |  | 12.50 ± 0.71 (2) |  | 10.00 (1) |"
    assert len(lines) == 5
    plain = {**SPEC, "arms": {"SGD": {"method": "sgd"}}}
    assert paper_table(summarise(read(folder), plain), plain) == ""


def test_arms_of_one_cell_are_not_mixed_and_none_is_lost(tmp_path):
    arms = {
        "A": {"manifolds": ["sphere"], "scheme": "pi", "layout": True},
        "B": {"manifolds": ["sphere"], "scheme": "po", "layout": True},
        "C": {"manifolds": ["sphere"], "scheme": "po"},
    }
    spec = {**SPEC, "common": {"method": "fgsgd"}, "reference": "A", "arms": arms}
    write_rows(tmp_path, [row("final", arm, 0, 10 + i) for i, arm in enumerate(arms)])
    lines = paper_table(summarise(read(tmp_path), spec), spec).splitlines()[4:]
    assert lines == ["| Sp | A: 10.00 (1)<br>B: 11.00 (1) |  |  |  |"]


def test_an_arm_that_leaves_the_manifolds_out_has_those_of_the_default(tmp_path):
    spec = {**SPEC, "reference": "A", "arms": {"A": {"method": "fgsgd", "layout": True}}}
    write_rows(tmp_path, [row("final", "A", 0, 10)])
    assert "| Sp+Ob+St |  |  |  | 10.00 (1) |" in paper_table(summarise(read(tmp_path), spec), spec)


def test_a_grid_that_diverged_as_a_whole_has_a_report_that_says_so(tmp_path):
    write_rows(tmp_path, [row("tune", "SGD", 100, "nan", key=run.key) for run in tuning_runs(SPEC, "SGD")])
    report = write(tmp_path, SPEC)[0].read_text()
    assert "| SGD | lr 0.1, 0.2, 0.4 | none: every point diverged |  | 3 |" in report
    assert "Not run: SGD, Sp, PI, PIO, PIO, rho none." in report


def test_a_grid_that_is_half_run_is_not_decided(tmp_path):
    runs = list(tuning_runs(SPEC, "SGD"))[:2]
    write_rows(tmp_path, [row("tune", "SGD", 100, 5, key=run.key) for run in runs])
    assert tuning_table(read(tmp_path), SPEC).endswith("| SGD | lr 0.1, 0.2, 0.4 | not decided |  | 2 |")


def test_the_choice_of_a_grid_is_told_with_its_edge(folder):
    (row,) = tuned(read(folder), SPEC)
    assert row["chosen"] == {"lr": 0.4}
    assert row["val_error"] == 1
    assert row["edges"] == ["lr"]
    assert "lr 0.4 (an end of its grid)" in (write(folder, SPEC)[0]).read_text()


@pytest.mark.parametrize(("rates", "edges"), [([0.1], []), ([0.1, 0.2], ["lr"]), ([0.1, 0.2, 0.4], [])])
def test_either_value_of_two_is_an_end_and_one_alone_is_not(tmp_path, rates, edges):
    spec = {**SPEC, "arms": {"SGD": {"method": "sgd", "grid": {"lr": rates}}}}
    errors = [2, 1, 3][: len(rates)]
    write_rows(
        tmp_path,
        [row("tune", "SGD", 100, e, key=run.key) for e, run in zip(errors, tuning_runs(spec, "SGD"), strict=True)],
    )
    assert tuned(read(tmp_path), spec)[0]["edges"] == edges


def test_what_is_kept_is_compared_by_seed_with_the_reference_and_with_what_else_is_asked_for(tmp_path):
    spec = {**SPEC, "against": ["Sp"]}
    tune = [row("tune", "SGD", 100, error, key=key) for key, error in TUNED.items()]
    kept = {"SGD": (20, 22, 27), "Sp": (50, 51, 58)}
    write_rows(
        tmp_path,
        tune
        + [
            row("final", arm, seed, ERRORS[arm][seed], agreement=value, agreement_recalibrated=2 * value)
            for arm, values in kept.items()
            for seed, value in enumerate(values)
        ],
    )
    report = write(tmp_path, spec)[0].read_text()
    # Student's t by scipy's own function: differences 30, 29 and 31, of errors -1, -0.2, -0.9.
    expected = []
    for differences in ([-1.0, -0.2, -0.9], [30, 29, 31], [60, 58, 62]):
        low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
        expected.append(f"{np.mean(differences):+.2f}, {low:+.2f} to {high:+.2f}")
    assert f"Differences to SGD, 95 % intervals:\n\n{KEPT}\n| Sp | {' | '.join(expected)} | 3 |" in report
    assert f"Differences to Sp, 95 % intervals:\n\n{KEPT}\n| SGD | +0.70" in report


def test_arms_from_scratch_are_compared_with_what_else_is_asked_for_too(folder):
    report = write(folder, {**SPEC, "against": ["Sp"]})[0].read_text()
    differences = [ERRORS["SGD"][seed] - ERRORS["Sp"][seed] for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    told = f"| SGD | {np.mean(differences):+.2f}, {low:+.2f} to {high:+.2f} | 3 |"
    assert (
        f"Differences to Sp, 95 % intervals:\n\n| arm | test error, % | seeds |\n| --- | --- | --- |\n{told}" in report
    )
    assert "Differences to SGD" not in report  # they are in the table of errors


def test_the_choice_for_both_is_told_with_both(tmp_path):
    spec = {**SPEC, "common": {"epochs": 2, "data": {"validation": 100}}, "keep": "agreement"}
    runs = tuning_runs(spec, "SGD")
    numbers = zip(runs, (12, 13, 30), (9, 40, 80), strict=True)
    write_rows(tmp_path, [row("tune", "SGD", 100, e, key=run.key, agreement=kept) for run, e, kept in numbers])
    told = tuning_table(read(tmp_path), spec)
    assert told.startswith(
        "Chosen: of the points within one standard error of the least validation error, the one with"
    )
    assert told.endswith("| SGD | lr 0.1, 0.2, 0.4 | lr 0.2 | 13.00 | 40.00 | 3 |")


def test_an_experiment_that_is_not_finished_has_a_report_that_says_so(folder):
    report = write(folder, SPEC)[0].read_text()
    assert "Not run: PIO, rho none." in report
    assert "commits abc; torch 2.6" in report
    assert "python -m recipes.experiments recipes/configs/experiments/made_up.yaml" in report
    for name in ("errors.png", "curves.png"):
        assert f"({name})" in report
        assert (folder / name).stat().st_size > 5000


def test_nothing_run_has_no_report(tmp_path):
    assert write(tmp_path, SPEC) == []


def test_a_run_that_was_run_again_has_one_curve(folder):
    (curve,) = read_curves(folder).values()
    assert [(r["epoch"], r["train_loss"], r["val_error"]) for r in curve] == [(1, 2.0, None), (2, 1.0, 12.0)]


def test_what_is_forgotten_is_reported_where_it_was_measured(folder):
    text = (folder / "runs.csv").read_text()
    assert "What is forgotten" not in write(folder, SPEC)[0].read_text()
    measured = row("final", "PIO, rho none", 0, 9.0, agreement=40.0, drift=0.5)
    with (folder / "runs.csv").open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(measured)
    report = write(folder, SPEC)[0].read_text()
    assert "| arm | agreement, % | drift, photographs | seeds |" in report
    assert "| PIO, rho none | 40.00 | 0.500 | 1 |" in report
    assert text in (folder / "runs.csv").read_text()


def test_many_arms_with_long_names_stay_apart(tmp_path):
    errors = {f"an arm with a long name, number {i}": {0: 10.0 + i, 1: 11.0 + i} for i in range(25)}
    errors["diverged"] = {0: math.nan}
    from matplotlib.image import imread

    image = imread(plot_errors(errors, "an arm with a long name, number 0", tmp_path / "errors.png"))
    assert image.shape[0] > 25 * 25  # pixels
    assert MOST_CURVES < 12


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is made."""
    made = []

    def figure_of(*args, **kwargs):
        figure, axes = original(*args, **kwargs)
        made.append(axes)
        return figure, axes

    original = figures.figure_of
    monkeypatch.setattr(figures, "figure_of", figure_of)
    return made


def test_the_figure_of_errors_tells_what_diverged(drawn, tmp_path):
    errors = {"SGD": {0: 12.0, 1: math.nan}, "lost": {0: math.nan, 1: None}, "Sp": {0: 11.0, 1: 13.5}}
    plot_errors(errors, "SGD", tmp_path / "errors.png")
    ((axis,),) = drawn
    assert [label.get_text() for label in axis.get_yticklabels()] == ["SGD (1 diverged)", "lost (2 diverged)", "Sp"]
    half = stats.t.interval(0.95, 1, 12.25, stats.sem([11.0, 13.5]))
    assert any(list(line.get_xdata()) == pytest.approx(half) for line in axis.get_lines() if len(line.get_xdata()) == 2)
    plot_errors({"lost": {0: math.nan}}, "lost", tmp_path / "errors.png")


def test_in_the_figure_of_errors_one_run_that_learned_nothing_leaves_room_for_the_others(drawn, tmp_path):
    errors = {"SGD": {0: 12.0, 1: 12.5, 2: 13.0}, "Sp": {0: 11.0, 1: 90.0, 2: 13.5}}
    plot_errors(errors, "SGD", tmp_path / "errors.png")
    ((axis,),) = drawn
    low, high = axis.get_xlim()
    assert 10 < low < 11
    assert 13.5 < high < 16
    assert [text.get_text() for text in axis.texts] == ["90"]


def curve(errors):
    return [{"epoch": float(i + 1), "train_loss": 1.0 / (i + 1), "val_error": e} for i, e in enumerate(errors)]


def test_curves_are_means_over_seeds_of_the_reference_and_the_best_arms(drawn, tmp_path):
    curves = {"SGD": [curve([30.0, 20.0, 9.0]), curve([50.0, None, 11.0])]} | {f"{i}": [curve([9.0])] for i in range(9)}
    summary = [{"arm": "SGD", "test_error_mean": 99.0}] + [
        {"arm": f"{i}", "test_error_mean": 9.0 - i} for i in range(9)
    ]
    plot_curves(curves, summary, "SGD", tmp_path / "curves.png", most=3)
    ((loss, validation),) = drawn
    assert [line.get_label() for line in validation.get_lines()] == ["SGD", "7", "8"]
    assert list(validation.get_lines()[0].get_ydata()) == pytest.approx([40.0, 20.0, 10.0])
    assert loss.get_title() == "3 of 10 arms: SGD, and those of least test error"


@pytest.mark.parametrize(
    ("errors", "scale"),
    [([20.0, 0.0], "linear"), ([20.0, 10.0], "log"), ([11.0, 10.0], "linear"), ([90.0, 1.0], "log"), ([], "linear")],
)
def test_no_validation_error_is_out_of_sight_or_without_numbers_beside_it(errors, scale, drawn, tmp_path):
    plot_curves({"SGD": [curve(errors)]}, [{"arm": "SGD", "test_error_mean": 1.0}], "SGD", tmp_path / "curves.png")
    ((_, axis),) = drawn
    assert axis.get_yscale() == scale
    low, high = axis.get_ylim()
    assert all(low <= e <= high for e in errors)
    assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 3


def test_runs_under_other_settings_are_in_no_table(folder):
    before = write(folder, SPEC)[0].read_text()
    with (folder / "runs.csv").open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(row("final", "PIO, rho none", 0, 1.0, key="of another budget"))
    assert write(folder, SPEC)[0].read_text() == before
