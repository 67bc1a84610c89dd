"""The same package under ``pytorch_lightning`` and under ``lightning.pytorch``, each run in a process of its own."""

import subprocess
import sys
import textwrap

import pytest

from tests import lit

pytest.importorskip("lightning")
OTHER = {"pytorch_lightning": "lightning.pytorch", "lightning.pytorch": "pytorch_lightning"}
BY_NAME = {"pytorch_lightning": "import pytorch_lightning as pl", "lightning.pytorch": "import lightning.pytorch as pl"}
OURS = "from lightning_fgsgd import FGSGD, FGSGDMixin, FeatureStdRescaling, NormBoundMonitor, POMGrouping"
# A user's script, and what it is to find. `pl` is the Lightning that it uses.
FIT = """
import sys, timm, torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

class Lit(FGSGDMixin, pl.LightningModule):
    def __init__(self, lr: float = 0.05, momentum: float = 0.9):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model("test_resnet", num_classes=3)
    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[0]), batch[1])

class Plain(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def data():
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(3, (8,))), batch_size=4)

def trainer(*callbacks, epochs=3, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks),
                      enable_progress_bar=False, enable_model_summary=False, **options)

def ours():
    return POMGrouping(), FeatureStdRescaling(), NormBoundMonitor()

def fit():
    callbacks = ours()
    assert all(isinstance(c, pl.Callback) for c in callbacks)
    t, module = trainer(*callbacks), Lit()
    t.fit(module, data())
    (optimizer,) = t.optimizers
    assert len(optimizer.poms) > 5 and max(map(optimizer.distance, optimizer.poms)) < 1e-5
    assert len(callbacks[1].history) == 3
    assert any((pom.radius != 1).any() for pom in optimizer.poms.values())
    try:
        trainer(POMGrouping()).fit(Plain(), data())
    except pl.utilities.exceptions.MisconfigurationException as error:
        assert "POMGrouping needs an FGSGD" in str(error)
    else:
        raise AssertionError("a module without FGSGD was accepted")
    return t
"""


def run(tmp_path, *parts):
    script = tmp_path / "script.py"
    script.write_text("\n".join(textwrap.dedent(part) for part in parts))
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("lightning", OTHER)
@pytest.mark.parametrize("first", ["ours", "lightning"])
def test_a_fit_runs_in_either_whichever_is_imported_first_and_never_loads_the_other(tmp_path, lightning, first):
    imports = [OURS, BY_NAME[lightning]]
    unused = f"assert not [m for m in sys.modules if m.startswith({OTHER[lightning]!r})]"
    run(tmp_path, *(imports if first == "ours" else imports[::-1]), FIT, "fit()", unused)


@pytest.mark.slow
@pytest.mark.parametrize("lightning", OTHER)
def test_with_both_loaded_callbacks_work_in_either(tmp_path, lightning):
    run(tmp_path, BY_NAME[OTHER[lightning]], OURS, BY_NAME[lightning], FIT, "fit()")


@pytest.mark.slow
def test_a_checkpoint_of_one_is_resumed_by_the_other(tmp_path):
    save = """
    torch.manual_seed(0)
    t = fit()
    t.save_checkpoint("half.ckpt")
    """
    load = """
    callbacks = ours()
    t = trainer(*callbacks, epochs=4)
    t.fit(Lit(), data(), ckpt_path="half.ckpt")
    assert t.current_epoch == 4 and [record["epoch"] for record in callbacks[1].history] == [0, 1, 2, 3]
    print([float(p.double().sum()) for p in t.lightning_module.parameters()])
    """
    run(tmp_path, OURS, BY_NAME["pytorch_lightning"], FIT, save)
    printed = {name: run(tmp_path, OURS, BY_NAME[name], FIT, load) for name in OTHER}
    assert printed["pytorch_lightning"] == printed["lightning.pytorch"] != ""


@pytest.mark.slow
@pytest.mark.parametrize("lightning", OTHER)
def test_the_command_line_takes_our_class_paths(tmp_path, lightning):
    callbacks = """
    - class_path: lightning_fgsgd.POMGrouping
      init_args: {scheme: pi, manifolds: [sphere, stiefel]}
    - class_path: lightning_fgsgd.FeatureStdRescaling
    - class_path: lightning_fgsgd.NormBoundMonitor
      init_args: {every_n_steps: 1}
    """
    lit.config(tmp_path, callbacks)
    command = f"""
    from {lightning}.cli import LightningCLI
    cli = LightningCLI(Lit, run=False, args=["--config", "config.yaml"], save_config_callback=None)
    cli.trainer.fit(cli.model, data())
    pom = next(iter(cli.trainer.optimizers[0].poms.values()))
    assert (pom.sets.scheme, pom.sets.manifold_names) == ("pi", ("sphere", "stiefel"))
    assert not [m for m in sys.modules if m.startswith({OTHER[lightning]!r})]
    """
    run(tmp_path, OURS, BY_NAME[lightning], FIT, command)


@pytest.mark.slow
def test_neither_is_needed_by_a_plain_loop(tmp_path):
    loop = """
    import sys, timm, torch
    from lightning_fgsgd import FGSGD, pom_param_groups
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = FGSGD(pom_param_groups(model), lr=0.05)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert not [m for m in sys.modules if m.startswith(("pytorch_lightning", "lightning.", "lightning_fabric"))]
    """
    run(tmp_path, loop)
