import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_first_two_bash_blocks_are_the_two_commands():
    commands = re.findall(r"^```bash\n(.*?)\n```", README, flags=re.MULTILINE | re.DOTALL)
    assert commands == [
        'pip install -e ".[recipes]" && python -m recipes.finetune fit',
        'pip install -e ".[test]" && pytest',
    ]


def test_every_name_in_the_table_of_choices_exists():
    table = README[README.index("## Choices") : README.index("## Recipes")]
    from lightning_fgsgd.choices import STARTS
    from lightning_fgsgd.grouping import SCHEMES
    from lightning_fgsgd.manifolds import MANIFOLDS
    from lightning_fgsgd.pom import METRICS

    for name in (*SCHEMES, *MANIFOLDS, *STARTS, *METRICS):
        assert f"`{name}`" in table


@pytest.mark.parametrize("name", re.findall(r"`(\w+)`", README[README.index("## Recipes") : README.index("## How it")]))
def test_every_config_named_exists(name):
    configs = {path.stem for path in (Path(__file__).parent.parent / "recipes/configs").glob("*.yaml")}
    assert name in configs | {"create_dataset"}
