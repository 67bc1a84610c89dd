import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_fgsgd import FGSGD, FeatureStdRescaling

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks():
    return re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_lightning_code_runs_as_it_stands(tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, pretrained, **kwargs: create(*args, **kwargs)
    )  # no hub here
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
    scope = {"train_loader": DataLoader(data, batch_size=4)}
    exec(blocks()[0], scope)
    trainer = scope["trainer"]
    assert trainer.current_epoch == 10
    (optimizer,) = trainer.optimizers
    assert len(optimizer.poms) == 20
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-5
    assert [len(c.history) for c in trainer.callbacks if isinstance(c, FeatureStdRescaling)] == [10]


def test_the_plain_pytorch_code_runs_as_it_stands():
    scope = {"model": timm.create_model("resnet10t")}
    exec(blocks()[1], scope)
    assert isinstance(scope["optimizer"], FGSGD)


def test_the_first_two_bash_blocks_are_the_two_commands():
    commands = re.findall(r"^```bash\n(.*?)\n```", README, flags=re.MULTILINE | re.DOTALL)
    assert commands == [
        'pip install -e ".[recipes]" && python -m recipes.finetune fit',
        'pip install -e ".[test]" && pytest',
    ]


def test_every_name_in_the_table_of_choices_exists():
    table = README[README.index("## Choices") : README.index("## Recipes")]
    from lightning_fgsgd.grouping import SCHEMES
    from lightning_fgsgd.manifolds import MANIFOLDS
    from lightning_fgsgd.plan import STARTS
    from lightning_fgsgd.pom import METRICS

    for name in (*SCHEMES, *MANIFOLDS, *STARTS, *METRICS):
        assert f"`{name}`" in table


@pytest.mark.parametrize("name", re.findall(r"`(\w+)`", README[README.index("## Recipes") : README.index("## How it")]))
def test_every_config_named_exists(name):
    configs = {path.stem for path in (Path(__file__).parent.parent / "recipes/configs").glob("*.yaml")}
    assert name in configs | {"create_dataset"}
