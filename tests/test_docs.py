import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = [line for line in (ROOT / "docs" / "mathematics.md").read_text().splitlines() if line.startswith("|")]


def resolve(name):
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(lightning_fgsgd[\w.]+)`", "\n".join(TABLE)))))
def test_every_function_in_the_table_exists(name):
    assert callable(resolve(name))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/.:]+)`", "\n".join(TABLE)))))
def test_every_test_in_the_table_exists(name):
    path, test = name.split("::")
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), flags=re.MULTILINE)


def test_the_table_has_three_full_columns():
    for row in TABLE[2:]:
        assert all(cell.strip() for cell in row.strip("|").split("|")), row
