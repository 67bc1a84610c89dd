import csv
import importlib
import inspect
import re
import statistics
from pathlib import Path

import pytest
import timm
import yaml

from lightning_fgsgd import POMGrouping
from tests.pages import DOCS, PAGES, ROOT, blocks

MATHEMATICS = (DOCS / "mathematics.md").read_text()
TABLE = [line for line in MATHEMATICS.splitlines() if line.startswith("| ") and "lightning_fgsgd" in line]
LINKS = re.findall(r"\[`([\w./:]+)`\]\(([^)]+)\)", MATHEMATICS)


def resolve(name):
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = inspect.getattr_static(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize(("name", "target"), sorted({link for link in LINKS if link[0].startswith("lightning_fgsgd")}))
def test_every_function_in_the_table_is_where_its_link_points(name, target):
    found = resolve(name)
    source = inspect.getsourcefile(found.fget if isinstance(found, property) else inspect.unwrap(found))
    assert Path(source).resolve() == (DOCS / target).resolve()


@pytest.mark.parametrize(("name", "target"), sorted({link for link in LINKS if link[0].startswith("tests/")}))
def test_every_test_in_the_table_is_where_its_link_points(name, target):
    path, test = name.split("::")
    assert (ROOT / path).resolve() == (DOCS / target).resolve()
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), flags=re.MULTILINE)


def test_every_row_of_the_table_has_a_function_and_a_test():
    assert len(TABLE) >= 30
    for row in TABLE:
        where, here, shown = (cell.strip() for cell in row.strip("|").split("|"))
        assert where, row
        assert "](../lightning_fgsgd/" in here, row
        assert "](../tests/" in shown, row


@pytest.mark.parametrize(
    "what",
    [
        *(f"Eq. {i}" for i in range(1, 8)),
        *("Table 1", "Table 2", "Theorem 1", "Remark 1", "Remark 2.1", "Remark 2.2", "Proposition 1", "Definition 1"),
        *("Corollary 2", "Xavier", "weight normalisation", "PI, PO and PIO"),
        *("lines 1 and 2", "lines 3 and 4", "line 5", "line 6", "lines 7 and 8", "line 10"),
    ],
)
def test_nothing_that_the_paper_numbers_is_missing(what):
    assert any(what in row.split("|")[1] for row in TABLE)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_between_files_are_alive(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


TABLES = {page: (DOCS / page).read_text() for page in ("lightning.md", "beside.md")}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[^`]+)`", "".join(TABLES.values())))))
def test_every_test_about_lightning_exists(name):
    path, test = name.split("::")
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(("page", "least"), [("lightning.md", 40), ("beside.md", 19)])
def test_every_row_about_lightning_says_what_happens_and_which_test_shows_it(page, least):
    rows = [line.strip("|").split("|") for line in TABLES[page].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows if row[-1].strip() != "test"]
    assert len(rows) >= least
    for row in rows:
        assert len(row) == 3, row
        assert row[1], row
        assert row[2].startswith("`tests/"), row


def test_the_yaml_about_models_is_accepted():
    ((callback,),) = (yaml.safe_load(block.code) for block in blocks("docs/models.md", "yaml"))
    assert callback["class_path"] == "lightning_fgsgd.POMGrouping"
    groups = POMGrouping(**callback["init_args"]).param_groups(timm.create_model("resnet18"))
    kinds = {weight.name: (weight.start, weight.cutting.kind) for weight in groups.plan.weights.values()}
    assert kinds["layer4.0.conv1.weight"] == ("project", "filter")
    assert kinds["layer3.0.conv1.weight"] == ("preserve", "kernel")
    assert "conv1.weight" not in kinds


def test_every_reason_in_the_text_is_one_that_is_given():
    text = (DOCS / "models.md").read_text()
    source = "".join((ROOT / "lightning_fgsgd" / name).read_text() for name in ("plan.py", "reasons.py"))
    for reason in re.findall(r"^\| ([a-z][^|]*?) \|", text, flags=re.MULTILINE):
        for part in reason.split(", "):
            assert part in source or part == "reason", part


def test_the_table_of_metrics_is_that_of_its_file():
    with (DOCS / "metric.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        found.setdefault((row["start"] or "plain SGD", row["metric"] if row["start"] else ""), {}).setdefault(
            row["lr"], []
        ).append(float(row["error"]))
    lines = re.findall(
        r"^\| ([\w ]+) \| (\w*) *\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", MATHEMATICS, flags=re.MULTILINE
    )
    assert len(lines) == len(found) == 10
    for start, metric, *errors in lines:
        assert [f"{statistics.mean(found[start, metric][lr]):.1f}" for lr in ("0.02", "0.1", "0.5")] == errors
