import csv
import json

import pytest
import yaml
from PIL import Image
from scipy.stats import ttest_rel

from recipes.experiments import overview
from tests.pages import DOCS, ROOT

CONFIGS = ROOT / "recipes" / "configs" / "experiments"
ROWS = yaml.safe_load((DOCS / "experiments" / "overview.yaml").read_text())


def errors(experiment, arm):
    with (DOCS / "experiments" / experiment / "runs.csv").open(newline="") as lines:
        runs = [row for row in csv.DictReader(lines) if row["stage"] == "final" and row["arm"] == arm]
    return {int(row["seed"]): float(row["test_error"]) for row in runs if row["test_error"]}


def test_a_row_has_the_paired_difference_in_percent_of_the_others_errors_with_its_interval():
    for row in (row for rows in ROWS.values() for row in rows):
        found = overview.compare(row, CONFIGS, DOCS / "experiments")
        for beside in ("reference", "other"):
            if beside not in row:
                continue
            mine, theirs = errors(row["experiment"], row["arm"]), errors(row["experiment"], row[beside])
            shared = sorted(mine.keys() & theirs.keys())
            assert len(shared) >= 5
            a, b = ([runs[seed] for seed in shared] for runs in (mine, theirs))
            base = sum(b) / len(b) / 100
            between = ttest_rel(a, b).confidence_interval(0.95)
            wanted = (sum(a) / len(a) - sum(b) / len(b), between.low, between.high)
            assert found[beside] == pytest.approx([value / base for value in wanted], abs=1e-9)


def test_the_figure_in_the_documentation_is_drawn_from_the_rows_as_they_are():
    with Image.open(DOCS / "experiments" / "overview.png") as figure:
        drawn = json.loads(figure.text["Description"])
    assert list(drawn) == list(ROWS)
    for heading, rows in ROWS.items():
        for was, row in zip(drawn[heading], rows, strict=True):
            now = overview.compare(row, CONFIGS, DOCS / "experiments")
            assert was.keys() == now.keys()
            for name, value in now.items():
                assert was[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-6))


def test_it_is_saved_beside_its_rows_or_where_asked(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({heading: rows[:1] for heading, rows in ROWS.items()}))
    assert overview.main(str(file), str(CONFIGS), str(DOCS / "experiments")) == tmp_path / "some.png"
    assert (tmp_path / "some.png").is_file()
    assert (
        overview.main(str(file), str(CONFIGS), str(DOCS / "experiments"), str(tmp_path / "a.png")) == tmp_path / "a.png"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "PIO"}, "scratch_10 has no run of 'PIO'"),
        ({"reference": None}, "has no reference"),
        ({"other": "AdamW"}, "has no name"),
        ({"other": "AdamW", "name": "AdamW", "colour": "red"}, "unknown field 'colour'; choose from task, "),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_refused_by_name(change, message):
    row = {"task": "t", "experiment": "scratch_10", "arm": "Sphere", "reference": "SGD", **change}
    with pytest.raises(ValueError, match=message):
        overview.compare({name: value for name, value in row.items() if value}, CONFIGS, DOCS / "experiments")
