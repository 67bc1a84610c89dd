import pytest
import torch
from pytorch_lightning import LightningModule
from torchmetrics.classification import MulticlassAccuracy

from lightning_fgsgd import FGSGD, FGSGDMixin, POMGrouping
from tests.lit import LitBase, LitTiny, loader, trainer


def test_the_mixin_alone_groups_with_the_defaults(tmp_path):
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(LitTiny(), loader())
    (optimizer,) = fit.optimizers
    assert isinstance(optimizer, FGSGD)
    look = optimizer.pom(fit.model.model.conv.weight)
    assert look.manifold_names == ("sphere", "oblique", "stiefel")
    assert look.start == "preserve"
    assert optimizer.pom(fit.model.model.head.weight) is None


def test_the_mixin_groups_with_the_callbacks_settings(tmp_path):
    fit = trainer(tmp_path, POMGrouping(scheme="pi", manifolds=["stiefel"], start="project"), max_epochs=1)
    fit.fit(LitTiny(), loader())
    look = fit.optimizers[0].pom(fit.model.model.conv.weight)
    assert (look.manifold_names, look.start) == (("stiefel",), "project")
    assert look.group.max() == 3  # 4 input channels
    torch.testing.assert_close(look.components.mT @ look.components, torch.eye(3).expand(24, 3, 3))


def test_options_come_from_attributes_then_hparams_then_defaults():
    module = LitTiny(lr=0.3, momentum=0.7)
    module.lr = 0.2
    module.rho = None
    group = module.configure_optimizers().param_groups[0]
    assert (group["lr"], group["momentum"], group["rho"], group["weight_decay"]) == (0.2, 0.7, None, 0.0)


def test_a_torchmetrics_metric_is_not_taken_for_the_riemannian_one(tmp_path):
    module = LitTiny()
    module.metric = MulticlassAccuracy(3)
    assert module.configure_optimizers().param_groups[0]["metric"] == "start"
    with pytest.raises(ValueError, match=r"metric: unknown metric MulticlassAccuracy\(\)"):
        FGSGD(module.parameters(), metric=module.metric)


def test_a_scheduler_is_left_to_the_user(tmp_path):
    class Scheduled(LitTiny):
        def configure_lr_scheduler(self, optimizer):
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(Scheduled(), loader())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_the_wrong_order_of_bases_is_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match=r"write class Wrong\(FGSGDMixin, LightningModule\)"):

        class Wrong(LightningModule, FGSGDMixin):
            pass


def test_a_module_that_builds_its_layers_late_works(tmp_path):
    class Late(LitTiny):
        def __init__(self):
            super().__init__()
            self.late, self.model = self.model, None

        def configure_model(self):
            if self.model is None:
                self.model, self.late = self.late, None

    fit = trainer(tmp_path, POMGrouping(), max_epochs=1)
    fit.fit(Late(), loader())
    assert len(fit.optimizers[0].poms) == 6


def test_the_callback_constrains_an_optimizer_made_without_the_mixin(tmp_path):
    class Own(LitBase):
        def configure_optimizers(self):
            return FGSGD(self.parameters(), lr=0.1)

    fit = trainer(tmp_path, POMGrouping(start="project"), max_epochs=1)
    fit.fit(Own(), loader())
    assert len(fit.optimizers[0].poms) == 6
    assert max(fit.optimizers[0].distance(p) for p in fit.optimizers[0].poms) < 1e-5


def test_every_option_is_read():
    options = {
        "lr": 0.3,
        "momentum": 0.7,
        "dampening": 0.1,
        "weight_decay": 0.2,
        "maximize": True,
        "rho": 2.0,
        "metric": "unit",
        "fused": False,
    }

    class Own(LitTiny):
        def __init__(self, **options):
            super().__init__()
            self.save_hyperparameters()

    for given in (options, {"momentum": 0.5, "nesterov": True}):
        group = Own(**given).configure_optimizers().param_groups[0]
        assert {name: group[name] for name in given} == given


@pytest.mark.parametrize("as_hparam", [True, False])
def test_a_learning_rate_that_is_not_called_lr_is_said_not_to_be_read(as_hparam):
    class Own(LitTiny):
        def __init__(self, learning_rate=0.5):
            super(LitBase, self).__init__()
            self.model = LitBase().model
            if as_hparam:
                self.save_hyperparameters()
            else:
                self.learning_rate = learning_rate

    with pytest.warns(UserWarning, match="Own: FGSGDMixin reads the learning rate from `lr`"):
        assert Own().configure_optimizers().param_groups[0]["lr"] == 0.001


@pytest.mark.parametrize("as_hparam", [True, False])
def test_an_attribute_that_is_no_option_says_where_it_was_found(as_hparam):
    class Own(LitTiny):
        def __init__(self, metric="accuracy"):
            super().__init__()
            if as_hparam:
                self.save_hyperparameters()
            else:
                self.metric = metric

    with pytest.raises(ValueError, match=r"unknown metric 'accuracy'; .* \(FGSGDMixin takes it from self\.metric"):
        Own().configure_optimizers()
