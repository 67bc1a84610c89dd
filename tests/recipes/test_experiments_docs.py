import re
from statistics import correlation

import pytest

from recipes.experiments import report
from recipes.experiments.spec import final_runs, load, tuning_runs
from recipes.experiments.summary import read, summarise
from tests.pages import DOCS, ROOT

CONFIGS = sorted((ROOT / "recipes" / "configs" / "experiments").glob("*.yaml"))
RUN = [path for path in CONFIGS if (DOCS / "experiments" / path.stem / "runs.csv").is_file()]
PAGES = [path.read_text() for path in (DOCS / "experiments.md", *sorted((DOCS / "experiments").glob("*.md")))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_whole_and_has_its_own_name(config):
    spec = load(config)
    assert spec["name"] == config.stem
    for arm in spec["arms"]:
        assert list(tuning_runs(spec, arm)) or final_runs(spec, arm, []) is not None or "tuned_as" in spec["arms"][arm]


@pytest.mark.parametrize("config", RUN, ids=lambda path: path.stem)
def test_every_report_is_what_its_rows_give(config, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_figures", lambda folder, *_: sorted((folder).rglob("*.png")))
    spec, folder = load(config), DOCS / "experiments" / config.stem
    written = (folder / "report.md").read_text()
    copy = tmp_path / config.stem
    copy.mkdir()
    for rows in folder.glob("*.csv"):
        (copy / rows.name).write_text(rows.read_text())
    report.write(copy, spec)
    without_figures = "\n\n".join(part for part in written.strip().split("\n\n") if not part.startswith("!["))
    assert (copy / "report.md").read_text().strip() == without_figures
    for figure in re.findall(r"!\[[^]]*\]\(([^)]+)\)", written):
        assert (folder / figure).is_file()


@pytest.mark.parametrize("config", RUN, ids=lambda path: path.stem)
def test_every_row_is_a_run_of_its_config(config):
    """What was run under other settings, or of an arm that is gone, does not count towards a table."""
    spec, rows = load(config), read(DOCS / "experiments" / config.stem)
    keys = {run.key for arm in spec["arms"] for run in tuning_runs(spec, arm)}
    told = [{**row, "val_error": row["val_error"]} for row in rows]
    keys |= {run.key for arm in spec["arms"] for run in final_runs(spec, arm, told) or []}
    assert [row["key"] for row in rows if row["key"] not in keys] == []
    assert len({row["key"] for row in rows}) == len(rows)


def tables():
    """The rows of tables on the pages, each with what the reports say that it is made of.

    On a page of experiments it is the report that was last named above the table, under the same heading of second rank;
    in the overview the reports of the sections to which the row leads, or the one before it. Otherwise it is any report.
    """
    reports = {path.stem: (DOCS / "experiments" / path.stem / "report.md").read_text() for path in RUN}
    source = every = "".join(reports.values())
    sections = {}
    for page in sorted((DOCS / "experiments").glob("*.md")):
        for line in page.read_text().splitlines():
            if line.startswith("#"):
                section = f"{page.name}#{slug(line)}"
                sections[section] = source = source if line.startswith("###") else every
            for name in re.findall(r"\((\w+)/report\.md\)", line):
                sections[section] = source = reports[name]
            if line.startswith("| "):
                yield line, source
    for line in (DOCS / "experiments.md").read_text().splitlines():
        if line.startswith("| "):
            links = re.findall(r"\(experiments/(\S+?)\)", line)
            source = "".join(sections[link] for link in links) or source
            yield line, source


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def test_every_number_in_a_table_of_the_pages_is_in_its_report():
    rows = list(tables())
    assert len(rows) > 100
    for row, reports in rows:
        assert set(re.findall(r"\d+\.\d+", row)) <= set(re.findall(r"\d+\.\d+", reports)), row


def test_every_difference_in_a_table_of_the_pages_stands_in_its_report_with_its_interval():
    number = r"([+-]\d+\.\d\d)"
    found = 0
    for row, reports in tables():
        # An arm's row as in the report; and "-0.99 (-1.46 to -0.53)" of the overview.
        for difference, low, high in re.findall(rf"\| {number} \| {number} to {number} \|", row):
            arm = row.split(" | ")[0]
            told = rf"^{re.escape(arm)} \|.*\| {re.escape(f'{difference} | {low} to {high}')} \|"
            assert re.search(told, reports, re.MULTILINE), row
            found += 1
        for difference, low, high in re.findall(rf"{number} \({number} to {number}\)", row):
            wide = f"| {difference} | {low} to {high} |"
            assert wide in reports or f"| {difference}, {low} to {high} |" in reports, (difference, low, high, row)
            found += 1
    assert found > 100


def test_every_experiment_that_was_run_is_on_a_page_with_its_config():
    text = "".join(PAGES)
    for path in RUN:
        assert f"({path.stem}/report.md)" in text
        assert f"(../../recipes/configs/experiments/{path.stem}.yaml)" in text


@pytest.mark.parametrize("name", ["full_kernels", "scratch_10"])
def test_fit_and_error_go_together_over_the_arms_as_the_page_says(name):
    spec = load(ROOT / "recipes" / "configs" / "experiments" / f"{name}.yaml")
    rows = [row for row in summarise(read(DOCS / "experiments" / name), spec) if row["seeds"]]
    found = correlation([row["train_loss_mean"] for row in rows], [row["test_error_mean"] for row in rows])
    (line,) = (line for page in PAGES for line in page.splitlines() if "correlation" in line and f"[{name}](" in line)
    assert f"over the {len(rows)} " in line
    assert f"correlation of {found:.2f}" in line or f"correlation is {found:.2f}" in line
