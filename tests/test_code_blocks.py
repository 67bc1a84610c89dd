"""All code in the README and the documentation does what it says, as it stands."""

import ast
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_fgsgd
from lightning_fgsgd import FGSGD, FeatureStdRescaling, FGSGDMixin, pom_param_groups
from tests.pages import PAGES, ROOT, blocks, commands


def having(language):
    return [page for page in PAGES if blocks(page, language)]


def images(count=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(10, (count,), generator=generator)), batch_size=4)


@pytest.fixture
def no_hub(monkeypatch):
    """Pretrained weights cannot be had here: random ones take their place."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **kwargs: create(*args, **kwargs))


def readme(scope, printed):
    trainer = scope["trainer"]
    assert trainer.current_epoch == 10
    (optimizer,) = trainer.optimizers
    assert len(optimizer.poms) == 20
    assert max(optimizer.distance(p) for p in optimizer.poms) < 1e-5
    assert [len(c.history) for c in trainer.callbacks if isinstance(c, FeatureStdRescaling)] == [10]
    assert isinstance(scope["optimizer"], FGSGD)


def first_steps(scope, printed):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(scope["plain"].eval()(x), scope["module"].model.eval()(x))
    assert scope["pom"].components.shape == (4096, 3, 3)
    assert len(scope["rescaling"].history) == 3


def checkpoints(scope, printed):
    assert scope["resumed"].current_epoch == 4
    mine, theirs = (list(scope[name].optimizers[0].poms.values()) for name in ("first", "resumed"))
    assert all(torch.equal(a.sets.group, b.sets.group) for a, b in zip(mine, theirs, strict=True))
    assert {pom.start for pom in theirs} == {"project"}
    assert {pom.start for pom in scope["new"].optimizers[0].poms.values()} == {"preserve"}
    assert len(scope["again"].poms) == len(scope["optimizer"].poms) > 5


def fine_tuning(scope, printed):
    module, decayed = scope["module"], {}
    assert all(int(norm.num_batches_tracked) == 0 for norm in module.modules() if hasattr(norm, "num_batches_tracked"))
    (optimizer,) = module.trainer.optimizers
    names = {p: name for name, p in module.named_parameters()}
    for held, groups in (True, optimizer.param_groups), (False, scope["nothing_held"].param_groups(module)):
        decayed[held] = {
            names[p]
            for group in groups
            for p in group["params"]
            if group.get("weight_decay", 1.0) and not (held and p in optimizer.poms)
        }
    assert decayed[True] == decayed[False] == {"model.classifier.weight"}


def models(scope, printed):
    assert scope["found"].totals["layers"] > 30
    assert printed.count("Weights on products of manifolds") == 2


def choosing(scope, printed):
    held = scope["projection"].held
    assert len(held.poms) == len(pom_param_groups(scope["model"]).plan.weights) > 10
    assert {type(pom.manifolds[0]).__name__ for pom in held.poms.values()} == {"Stiefel"}


OUTCOMES = {
    "README.md": readme,
    "docs/guides/choosing.md": choosing,
    "docs/guides/first-steps.md": first_steps,
    "docs/guides/fine-tuning.md": fine_tuning,
    "docs/guides/checkpoints.md": checkpoints,
    "docs/models.md": models,
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("page", having("python"))
def test_the_python_code_of_a_page_runs_as_it_stands_and_prints_what_is_shown(page, tmp_path, monkeypatch, capsys):
    if "from timm.optim import Muon" in PAGES[page].read_text(encoding="utf-8"):
        pytest.importorskip("timm.optim.muon", reason="timm has no Muon before 1.0.20")
    monkeypatch.chdir(tmp_path)
    # What the reader has: data and, for a loop of one's own, a model.
    scope = {"train_loader": images(), "model": timm.create_model("resnet10t")}
    printed = None
    for block in blocks(page):
        if block.language == "python" and block.file is None:
            capsys.readouterr()
            exec(compile(block.code, page, "exec"), scope)
            printed = capsys.readouterr().out
        elif block.language == "text":
            assert block.before == "python", f"what is this the output of? {block.code}"
            assert printed == block.code
    if page in OUTCOMES:
        OUTCOMES[page](scope, printed)


EXAMPLES = {
    name: textwrap.dedent(found[1])
    for name in lightning_fgsgd.__all__
    if (
        found := re.search(
            r"Example::\n\n((?:\n|    .*(?:\n|$))+)", inspect.getdoc(getattr(lightning_fgsgd, name)) or ""
        )
    )
}


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name, tmp_path, monkeypatch):
    class Lit(FGSGDMixin, LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.lr = timm.create_model("test_resnet", num_classes=10), 0.1

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def train_dataloader(self):
            return images()

    def short(**options):
        return Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, **options)

    monkeypatch.chdir(tmp_path)
    (x, y), module = next(iter(images())), Lit()
    scope = {
        **vars(lightning_fgsgd),
        "torch": torch,
        "timm": timm,
        "LightningModule": LightningModule,
        "Trainer": short,
    }
    scope |= {"module": module, "model": module.model, "input": x, "target": y, "loader": [x]}
    exec(EXAMPLES[name], scope | {"loss_fn": torch.nn.functional.cross_entropy})


def test_examples_are_found():
    assert set(EXAMPLES) >= {"FGSGD", "FGSGDMixin", "POMGrouping", "NormBoundMonitor", "FeatureStd"}


# Scripts that the reader is to write, and the commands that run them -----------------------------------------------------


def files(page):
    return {block.file: block.code for block in blocks(page) if block.file}


def runs_a_file(page, command):
    return any(word in files(page) for word in shlex.split(command))


RUNS = [(page, command) for page in having("bash") for command in commands(page) if runs_a_file(page, command)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), RUNS)
def test_a_script_of_a_page_runs_by_the_command_beside_it(page, command, tmp_path):
    for name, code in files(page).items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    (script,) = (word for word in shlex.split(command) if word.endswith(".py"))
    if "fully_shard" in files(page)[script] and torch.__version__ < "2.7":
        pytest.skip("fully_shard runs on a CPU from torch 2.7 on")
    # The commands of this Python's environment come first. Two processes may have one GPU between them, or none.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, **found}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # torchrun's processes write a line and its end apart, so two processes' lines may come out as one.
    ranks = dict(re.findall(r"rank (\d): (.*?)(?=rank \d: |$)", done.stdout, flags=re.MULTILINE))
    if "cli.py" not in command:
        assert set(ranks) == {"0", "1"}
        assert ranks["0"] == ranks["1"]  # the same R over the features of both processes
        assert "distance below 1e-5: True" in ranks["0"]


@pytest.mark.parametrize("page", PAGES)
def test_every_script_of_a_page_is_run_by_a_command(page):
    run = {word for where, command in RUNS if where == page for word in shlex.split(command)}
    assert set(files(page)) <= run


# Other commands ----------------------------------------------------------------------------------------------------------


OTHERS = sorted({command for page in PAGES for command in commands(page) if not runs_a_file(page, command)})


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_what_a_command_names_exists(command, tmp_path, monkeypatch, capsys):
    first, *words = shlex.split(command)
    if first == "pip":
        assert words[:2] == ["install", "-e"]
        extras = re.fullmatch(r"\.(?:\[(.*)\])?", words[2])
        known = re.findall(
            r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dep")[2], flags=re.M
        )
        assert set((extras[1] or "recipes").split(",")) <= set(known)
        return
    if first == "mkdocs":
        pytest.importorskip("mkdocs", reason="of the docs extra")
    if first != "python":
        assert shutil.which(first, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert first != "mkdocs" or (ROOT / "mkdocs.yml").exists()
        return
    assert words[0] == "-m"
    module, *options = words[1:]
    monkeypatch.chdir(ROOT)  # of the paths of configs
    accepted = "--print_config" if module == "recipes.finetune" else "--help"
    arguments = [*options, accepted] if module == "recipes.finetune" else [accepted]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert end.value.code in (0, None)
    help_text = capsys.readouterr().out
    if module != "recipes.finetune":  # which has read its options
        assert all(option in help_text for option in options if option.startswith("--"))


# Configurations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", having("yaml"))
def test_the_yaml_of_a_page_is_accepted_by_the_command_line(page, tmp_path):
    from pytorch_lightning.cli import LightningCLI

    class Lit(FGSGDMixin, LightningModule):
        def __init__(self, name: str = "resnet18", lr: float = 0.1):
            super().__init__()

    for block in blocks(page, "yaml"):
        given = yaml.safe_load(block.code)
        config = {"trainer": {"callbacks": given}} if isinstance(given, list) else given
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        args = ["--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
        cli = LightningCLI(Lit, run=False, save_config_callback=None, args=args)
        ours = [c for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_fgsgd")]
        asked = config["trainer"]["callbacks"]
        assert [type(c).__name__ for c in ours] == [c["class_path"].removeprefix("lightning_fgsgd.") for c in asked]
        assert all(isinstance(c, Callback) for c in ours)
        for callback, wanted in zip(ours, asked, strict=True):
            for key, value in wanted.get("init_args", {}).items():
                held = callback.settings[key]
                assert held == (tuple(value) if isinstance(held, tuple) else value)


# Messages ----------------------------------------------------------------------------------------------------------------


def said():
    """All that the package can say: its strings, joined as Python joins them, without what is formatted into them."""
    for path in (ROOT / "lightning_fgsgd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


QUOTED = re.findall(r"^\| `(.+?)` \|", PAGES["docs/guides/troubleshooting.md"].read_text(), flags=re.MULTILINE)


def test_every_message_in_troubleshooting_is_one_that_is_given():
    strings = list(said())
    assert len(QUOTED) > 20
    assert [quoted for quoted in QUOTED if not any(quoted in string for string in strings)] == []
