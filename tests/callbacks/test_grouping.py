import copy
import pickle

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_fgsgd import FGSGD, POMGrouping, pom_param_groups
from tests.lit import LitBase, LitTiny, loader, trainer

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_wrong_settings_are_refused_when_the_callback_is_made():
    with pytest.raises(ValueError, match="scheme: unknown scheme 'all'"):
        POMGrouping(scheme="all")
    with pytest.raises(ValueError, match="block_size: 0"):
        POMGrouping(block_size=0)


def test_patterns_that_match_nothing_are_refused_before_training(tmp_path):
    class Watched(LitTiny):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training started")

    with pytest.raises(ValueError, match=r"include: the pattern 'conv\*' matches no parameter.*'model\.conv\.weight'"):
        trainer(tmp_path, POMGrouping(include=["conv*"])).fit(Watched(), loader())


def test_an_optimizer_that_is_not_fgsgd_is_named(tmp_path):
    class Plain(LitBase):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"POMGrouping needs an FGSGD.*returned SGD"):
        trainer(tmp_path, POMGrouping()).fit(Plain(), loader())


def test_an_optimizer_that_was_grouped_already_is_refused(tmp_path):
    class Grouped(LitBase):
        def configure_optimizers(self):
            return FGSGD(pom_param_groups(self), lr=0.1)

    with pytest.raises(MisconfigurationException, match="has grouped the weights already"):
        trainer(tmp_path, POMGrouping()).fit(Grouped(), loader())


def test_the_same_callback_groups_a_second_fit_anew(tmp_path):
    grouping = POMGrouping()
    for _ in range(2):
        module = LitTiny()
        fit = trainer(tmp_path, grouping, max_epochs=1)
        fit.fit(module, loader())
        assert module.model.conv.weight in fit.optimizers[0].poms


def test_a_second_fit_constrains_what_the_module_makes_without_the_mixin(tmp_path):
    class Own(LitBase):
        def configure_optimizers(self):
            return FGSGD(self.parameters(), lr=0.1)

    grouping = POMGrouping()
    for _ in range(2):
        module = Own()
        fit = trainer(tmp_path, grouping, max_epochs=1)
        fit.fit(module, loader(8))
        assert module.model.conv.weight in fit.optimizers[0].poms


def test_layers_that_standardise_their_weight_are_constrained_where_asked_for():
    import timm

    class Standardised(LitBase):
        def __init__(self):
            super().__init__()
            self.model.conv = timm.layers.StdConv2d(4, 6, 3)

    module = Standardised()
    names = [w.name for w in POMGrouping(normalized=True).param_groups(module).plan.weights.values()]
    assert "model.conv.weight" in names


def test_its_defaults_are_those_of_pom_param_groups(tiny):
    # The same defaults wherever they are written.
    import inspect

    mine = inspect.signature(POMGrouping).parameters
    for name, parameter in inspect.signature(pom_param_groups).parameters.items():
        if name != "model":
            assert mine[name].default == parameter.default, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 5.0}, r"layer_decay: 5.0 is not in \(0, 1\]"),
        ({"layer_decay": "x"}, "layer_decay: 'x' is not in"),
        ({"euclidean_lr_factor": -1.0}, "euclidean_lr_factor: -1.0 is not a positive number"),
        ({"include": "timm:stem"}, "include: 'timm:stem' is one string"),
        ({"exclude": "timm:stem"}, "exclude: 'timm:stem' is one string"),
        ({"no_weight_decay": "blocks.*"}, r"no_weight_decay: 'blocks.\*' is one string"),
    ],
)
def test_what_is_wrong_whatever_the_model_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        POMGrouping(**options)


def test_an_optimizer_that_was_grouped_already_is_refused_also_while_its_weights_are_frozen(tmp_path):
    class Grouped(LitBase):
        def configure_optimizers(self):
            self.model.requires_grad_(False)
            self.model.head.requires_grad_(True)
            return FGSGD(pom_param_groups(self, manifolds=["sphere"]), lr=0.1)

    with pytest.raises(MisconfigurationException, match="has grouped the weights already"):
        trainer(tmp_path, POMGrouping()).fit(Grouped(), loader())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_has_the_settings_and_not_the_plan_of_a_fit(tmp_path, copied):
    class InAFit(Callback):
        def on_train_start(self, trainer, pl_module):
            copies.append(copied(grouping))

    grouping, copies = POMGrouping(manifolds=["stiefel"]), []
    trainer(tmp_path, grouping, InAFit(), max_epochs=1).fit(LitTiny(), loader(8))
    copies.append(copied(grouping))
    for other in copies:
        assert other.settings == grouping.settings
        assert other._groups is None
