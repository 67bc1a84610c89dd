import csv
import math

import pytest
from scipy import stats

from recipes.experiments.pairs import main
from tests.pages import DOCS, ROOT

CONFIG = str(ROOT / "recipes" / "configs" / "experiments" / "digits_all.yaml")
L2SP, FILTERS = "L2-SP, head decayed", "Filters Sp, a group each, head alone decayed, chosen to keep"


def by_seed(arm, column, experiment="digits_all"):
    with (DOCS / "experiments" / experiment / "runs.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["arm"] == arm and r["stage"] == "final"]
    return {int(r["seed"]): float(r[column]) for r in rows}


def told(seeds, column, digits):
    ours, theirs = (by_seed(arm, column) for arm in (FILTERS, L2SP))
    ours, theirs = [ours[s] for s in seeds], [theirs[s] for s in seeds]
    by_scipy = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    middle = math.fsum(a - b for a, b in zip(ours, theirs, strict=True)) / len(seeds)
    return f"{middle:+.{digits}f}, {by_scipy.low:+.{digits}f} to {by_scipy.high:+.{digits}f}"


@pytest.mark.parametrize("seeds", [None, [1, 3, 4]])
def test_any_two_arms_of_the_published_rows_differ_by_what_scipy_says(seeds):
    output = str(DOCS / "experiments")
    lines = main(CONFIG, L2SP, seeds=seeds, output=output).splitlines()
    assert lines[0] == f"Differences to {L2SP}, 95 % intervals:"
    (line,) = (line for line in lines if line.startswith(f"| {FILTERS} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    columns = {
        "test_error": 2,
        "agreement": 2,
        "agreement_recalibrated": 2,
        "divergence": 3,
        "drift": 3,
        "drift_task": 3,
    }
    seeds = seeds or range(5)
    assert cells == [*(told(seeds, column, digits) for column, digits in columns.items()), str(len(seeds))]


def test_arms_of_other_seeds_are_compared_on_those_that_both_have_and_tuning_runs_do_not_count():
    config = str(ROOT / "recipes" / "configs" / "experiments" / "frozen_10.yaml")
    few = "SGD, layer decay, head alone decayed, chosen to keep"  # five seeds, SGD has twenty and runs that tuned it
    table = main(config, few, output=str(DOCS / "experiments"))
    (line,) = (line for line in table.splitlines() if line.startswith("| SGD |"))
    assert line.endswith("| 5 |")
    (line,) = (line for line in main(config, "SGD", output=str(DOCS / "experiments")).splitlines() if few in line)
    assert line.endswith("| 5 |")
    assert main(config, "SGD", seeds=[7, 8], output=str(DOCS / "experiments")).splitlines()[-1].endswith("| 2 |")


def test_an_arm_that_is_not_there_and_one_that_cannot_be_paired_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"arm: digits_all has no arm 'Adam'; choose from 'SGD', "):
        main(CONFIG, "Adam")
    with pytest.raises(ValueError, match=r"arm: no other arm shares two runs with 'SGD' on seeds \[3\]"):
        main(CONFIG, "SGD", seeds=[3], output=str(DOCS / "experiments"))
    with pytest.raises(ValueError, match=r"seeds: 'SGD' was not run with \[99\]; choose from \[0, 1, 2, 3, 4\]"):
        main(CONFIG, "SGD", seeds=[0, 1, 99], output=str(DOCS / "experiments"))
    with pytest.raises(ValueError, match="arm: no other arm shares two runs with 'SGD' in "):
        main(CONFIG, "SGD", output=str(tmp_path))


def test_an_arm_of_another_experiment_on_the_same_images_is_compared_by_seed():
    configs = ROOT / "recipes" / "configs" / "experiments"
    ours, output = str(configs / "frozen_50.yaml"), str(DOCS / "experiments")
    table = main(ours, "SGD", other=str(configs / "accuracy_50.yaml"), output=output)
    assert table.startswith("Differences to SGD of accuracy_50, 95 % intervals:")
    filters, sgd = by_seed(FILTERS, "test_error", "frozen_50"), by_seed("SGD", "test_error", "accuracy_50")
    shared = sorted(set(filters) & set(sgd))
    told = stats.ttest_rel([filters[s] for s in shared], [sgd[s] for s in shared]).confidence_interval(0.95)
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {FILTERS} |"))
    assert f"{told.low:+.2f} to {told.high:+.2f}" in line
    assert line.endswith(f"| {len(shared)} |")
    assert "| SGD |" in table, "the experiment's own arm of that name is another"
    with pytest.raises(
        ValueError, match=r"other: frozen_200 has data .*'per_class': 200.*, frozen_50 has .*'per_class': 50"
    ):
        main(ours, "SGD", other=str(configs / "frozen_200.yaml"), output=output)
    with pytest.raises(ValueError, match=r"other: scratch_vit has network .*; give one that has the same"):
        main(str(configs / "scratch_affine.yaml"), "AdamW", other=str(configs / "scratch_vit.yaml"), output=output)
    with pytest.raises(ValueError, match="arm: accuracy_50 has no arm 'Head alone'"):
        main(ours, "Head alone", other=str(configs / "accuracy_50.yaml"), output=output)


def test_an_arm_that_another_experiment_tuned_only_is_refused_by_its_own_name(tmp_path):
    config = str(ROOT / "recipes" / "configs" / "experiments" / "accuracy_50.yaml")
    with pytest.raises(ValueError, match=r"other: 'SGD' of accuracy_50 has no final run in .*accuracy_50"):
        main(config.replace("accuracy_50", "frozen_50"), "SGD", other=config, output=str(tmp_path))
