import pytest
import torch
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
