import math
from unittest.mock import Mock

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_fgsgd import FGSGD, FeatureStdRescaling, NormBoundMonitor, POMGrouping
from lightning_fgsgd.bounds import CHECKS, Norms, layer_norms, table1
from lightning_fgsgd.callbacks import norms as norms_callback
from lightning_fgsgd.norms import group_norms
from lightning_fgsgd.scaling import gamma
from tests.lit import LitBase, LitTiny, loader, trainer

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_norms_of_unit_stiefel_kernels_are_those_of_table_2(tmp_path):
    monitor = NormBoundMonitor(every_n_epochs=2)
    logger = CSVLogger(tmp_path)
    fit = trainer(tmp_path, POMGrouping(manifolds=["stiefel"], start="project"), monitor, max_epochs=4, logger=logger)
    fit.fit(LitTiny(), loader())
    assert [row["epoch"] for row in monitor.history] == [0, 1, 3]
    assert [row["step"] for row in monitor.history] == [0, 8, 16]
    conv = monitor.history[-1]["layers"]["model.conv"]
    assert conv["spectral"] == pytest.approx(1, abs=1e-5)
    assert conv["frobenius"] == pytest.approx(3**0.5, abs=1e-5)
    assert conv["mean_frobenius"] == pytest.approx(3**0.5, abs=1e-5)
    assert conv["l21"] == pytest.approx(3, abs=1e-5)
    assert conv["group_frobenius"] == pytest.approx((24 * 3) ** 0.5, abs=1e-4)
    assert conv["table2_spectral"] == 1
    assert conv["table2_l21"] == pytest.approx(3**0.25)  # the paper's, which is not the definition's 3
    assert (conv["prop1_components"], conv["prop1_groups"], conv["remark1"], conv["bai_yin"]) == (0, 0, 1, 1)
    logger.save()
    columns = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    expected = {
        "norms/model.conv/spectral",
        "bounds/bartlett2017",
        "bounds/bartlett2017_at_the_start",
        "bounds/prop1_groups",
    }
    assert expected <= set(columns)


def bounds_by_hand(weights, poms, unconstrained, samples):
    """Table 1 of constrained weights, and of layers that are one group, from dense matrices."""
    layers = []
    for weight, pom in zip(weights, poms, strict=True):
        components, sets = pom.cutting.cut(weight.double()), pom.sets.group
        dense = [torch.cat(list(components[sets == g]), dim=1) for g in range(int(sets.max()) + 1)]
        layers.append(dense)
    layers += [[weight.detach().double().flatten(1).mT] for weight in unconstrained]
    norms = [
        Norms(
            torch.stack([torch.linalg.matrix_norm(m, ord=2) for m in groups]),
            torch.stack([m.norm() for m in groups]),
            torch.stack([m.norm(dim=0).sum() for m in groups]),
        )
        for groups in layers
    ]
    return table1(norms, samples, width=10)._asdict()


@pytest.mark.parametrize("start", ["preserve", "project", "random"])
def test_the_bounds_are_those_of_the_whole_network_now_and_before_its_weights_were_placed(tmp_path, start):
    monitor, module = NormBoundMonitor(), LitTiny()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit = trainer(tmp_path, monitor, POMGrouping(start=start, scheme="pi"), max_epochs=1)
    fit.fit(module, loader(images=32))
    (optimizer,) = fit.optimizers
    poms = list(optimizer.poms.values())
    head = [module.model.head.weight]
    now = bounds_by_hand([p.detach() for p in optimizer.poms], poms, head, samples=32)
    first = bounds_by_hand([before[pom.name] for pom in poms], poms, [before["model.head.weight"]], samples=32)
    for name in now:
        assert monitor.history[-1]["network"][name] == pytest.approx(now[name], rel=1e-4)
        assert monitor.start[name] == pytest.approx(first[name], rel=1e-4)
        same = monitor.history[0]["network"][name] == pytest.approx(first[name], rel=1e-4)
        assert same == (start == "preserve")  # preserve moves nothing, so the first look is at the start


class Odd(LitTiny):
    """A recurrent layer wider than all the rest, and a frozen Linear layer in eight bits."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.LSTM(16, 64)
        self.quantised = torch.nn.Linear(8, 8, bias=False)
        numbers = torch.randint(-127, 127, (8, 8), dtype=torch.int8)
        self.quantised.weight = torch.nn.Parameter(numbers, requires_grad=False)


def test_the_width_is_that_of_recurrent_layers_too_and_quantised_weights_are_passed_over(tmp_path, monkeypatch):
    widths = []

    def spy(norms, samples, width):
        widths.append(width)
        return table1(norms, samples, width)

    monkeypatch.setattr(norms_callback, "table1", spy)
    trainer(tmp_path, POMGrouping(), NormBoundMonitor(), max_epochs=1).fit(Odd(), loader())
    assert set(widths) == {256}  # of the four gates


def test_the_bounds_fall_below_those_of_the_start_once_the_weights_are_at_gamma_over_lambda(tmp_path):
    monitor = NormBoundMonitor()
    callbacks = POMGrouping(start="project", scheme="po"), FeatureStdRescaling(), monitor
    trainer(tmp_path, *callbacks, max_epochs=3).fit(LitTiny(lr=0.01), loader())
    for name, at_the_start in monitor.start.items():
        assert monitor.history[-1]["network"][name] < at_the_start
    conv = monitor.history[-1]["layers"]["model.conv"]
    assert conv["prop1_components"] == conv["bai_yin"] == conv["remark1"] == 1


def test_it_looks_every_n_steps_and_once_where_gradients_are_accumulated(tmp_path):
    monitor = NormBoundMonitor(every_n_steps=3)
    trainer(tmp_path, monitor, max_epochs=2, accumulate_grad_batches=2).fit(LitTiny(), loader(images=64))
    assert [row["step"] for row in monitor.history] == [0, 3, 6]


def test_the_latest_look_has_every_component_and_group(tmp_path):
    monitor, module = NormBoundMonitor(), LitTiny()
    fit = trainer(tmp_path, monitor, max_epochs=1)
    fit.fit(module, loader())
    p = module.model.conv.weight
    pom = fit.optimizers[0].poms[p]
    expected = layer_norms(pom, p, gamma(pom.cutting))
    found = monitor.latest["model.conv"]
    for norms, by_hand in zip(found[:3], expected[:3], strict=True):
        for x, y in zip(norms, by_hand, strict=True):
            torch.testing.assert_close(x, y)
    torch.testing.assert_close(
        found.groups.frobenius, group_norms(pom.cutting.cut(p.detach()), pom.sets.group.long())[1]
    )
    network = monitor.history[-1]["network"]
    assert {check: network[check] for check in CHECKS} == {
        check: min(norms.checks()[check] for norms in monitor.latest.values()) for check in CHECKS
    }


def test_watching_changes_nothing(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(3)
        module = LitTiny()
        trainer(tmp_path, *callbacks).fit(module, loader())
        return module.state_dict()

    for a, b in zip(weights().values(), weights(NormBoundMonitor(every_n_steps=1)).values(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_fit_goes_on_with_its_history_and_a_new_one_begins_anew(tmp_path):
    def run(epochs, monitor, ckpt_path=None):
        torch.manual_seed(3)
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        callbacks = monitor, POMGrouping(start="project"), checkpoint
        trainer(tmp_path, *callbacks, max_epochs=epochs, enable_checkpointing=True).fit(
            LitTiny(), loader(), ckpt_path=ckpt_path
        )
        return monitor

    whole = run(4, NormBoundMonitor())
    resumed = run(4, NormBoundMonitor(), tmp_path / "epoch=1.ckpt")
    assert resumed.history == whole.history
    assert resumed.start == whole.start
    assert len(run(2, whole).history) == 3
    assert torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)


def test_the_plot_is_one_call(tmp_path):
    monitor = NormBoundMonitor()
    with pytest.raises(RuntimeError, match="nothing to plot before a fit"):
        monitor.plot()
    trainer(tmp_path, POMGrouping(start="project"), monitor).fit(LitTiny(), loader())
    figure = monitor.plot(tmp_path / "norms.png")
    bounds, components, groups = figure.axes
    assert len(bounds.lines) == 6  # three bounds, and each at the start
    assert list(bounds.lines[0].get_ydata()) == [row["network"]["neyshabur2015"] for row in monitor.history]
    assert [label.get_text() for label in components.get_yticklabels()] == list(monitor.latest)
    assert len(groups.lines) == 7  # three norms and their geometric means, and the line at 1
    assert (tmp_path / "norms.png").stat().st_size > 10_000


def test_a_weight_that_is_not_finite_is_reported_as_such(tmp_path):
    class Broken(LitTiny):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.model.conv.weight.data[0, 0, 0, 0] = math.nan

    monitor = NormBoundMonitor()
    trainer(tmp_path, monitor, max_epochs=1).fit(Broken(), loader(images=8))
    assert math.isnan(monitor.history[-1]["layers"]["model.conv"]["spectral"])
    assert all(math.isnan(monitor.history[-1]["network"][name]) for name in monitor.start)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_size_of_the_training_set_can_be_given_and_is_1_where_it_has_none(tmp_path, refuses):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    if refuses:
        Stream.__len__ = Mock(side_effect=NotImplementedError)
    stream = torch.utils.data.DataLoader(Stream(), batch_size=8)
    found = {}
    for samples in (None, 1, 1000):
        monitor, module = NormBoundMonitor(samples=samples), LitTiny()
        torch.manual_seed(0)
        trainer(tmp_path, monitor, max_epochs=1).fit(module, stream)
        norms = [n.groups for n in monitor.latest.values()]
        head = module.model.head.weight.detach().mT[None]
        norms.append(group_norms(head, torch.zeros(1, dtype=torch.long)))
        found[samples] = monitor.history[-1]["network"]["bartlett2017"]
        assert found[samples] == pytest.approx(table1(norms, samples or 1, 10).bartlett2017, rel=1e-5)


def test_it_needs_an_fgsgd(tmp_path):
    class Plain(LitBase):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        MisconfigurationException, match=r"NormBoundMonitor reads the manifolds of an FGSGD.*returned SGD"
    ):
        trainer(tmp_path, NormBoundMonitor()).fit(Plain(), loader())


def test_it_works_with_an_fgsgd_that_is_constrained_when_fitting_starts(tmp_path):
    class Own(LitBase):
        def configure_optimizers(self):
            return FGSGD(self.parameters(), lr=0.1)

    monitor = NormBoundMonitor()
    trainer(tmp_path, monitor, POMGrouping(start="project"), max_epochs=1).fit(Own(), loader())
    assert monitor.start != {name: monitor.history[0]["network"][name] for name in monitor.start}


@pytest.mark.parametrize(
    "options", [{"every_n_epochs": 0}, {"every_n_steps": 0}, {"samples": 0}, {"every_n_epochs": None}, {"samples": 1.5}]
)
def test_wrong_settings_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}: {value} is not a whole number of at least 1"):
        NormBoundMonitor(**options)


def test_the_bounds_at_the_start_stay_when_the_same_trainer_goes_on(tmp_path):
    # The same Trainer goes on, without a checkpoint: it is a new fit, of an optimizer that has just placed the weights.
    monitor, module = NormBoundMonitor(), LitTiny()
    fit = trainer(tmp_path, monitor, POMGrouping(start="project"), max_epochs=1)
    fit.fit(module, loader(8))
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader(8))
    assert set(monitor.start) == {"neyshabur2015", "bartlett2017", "neyshabur2018"}


def test_layers_that_standardise_their_weight_do_not_count_in_the_bounds(tmp_path):
    import timm

    class Standardised(LitTiny):
        def __init__(self):
            super().__init__()
            self.model.conv = timm.layers.StdConv2d(4, 6, 3, padding=1)

    monitor, module = NormBoundMonitor(), Standardised()
    trainer(tmp_path, monitor, max_epochs=1).fit(module, loader(8))
    found = monitor._bounds(module.trainer, module, [n.groups for n in monitor.latest.values()])
    module.model.conv.weight.data *= 10  # changes nothing of what the layer computes
    assert monitor._bounds(module.trainer, module, [n.groups for n in monitor.latest.values()]) == found


def test_the_width_is_that_of_a_wide_head(tmp_path, monkeypatch):
    from lightning_fgsgd.bounds import table1
    from lightning_fgsgd.callbacks import norms as norms_callback

    class Wide(LitTiny):
        def __init__(self):
            super().__init__()
            self.model.head = torch.nn.Linear(9, 300)

    widths = []
    monkeypatch.setattr(norms_callback, "table1", lambda n, s, width: widths.append(width) or table1(n, s, width))
    trainer(tmp_path, NormBoundMonitor(), max_epochs=1).fit(Wide(), loader(8))
    assert set(widths) == {300}


@pytest.mark.parametrize("make", [lambda: FeatureStdRescaling(), lambda: NormBoundMonitor()])
def test_its_history_is_left_alone_by_a_test_run(tmp_path, make):
    class Tested(LitTiny):
        def test_step(self, batch, batch_idx):
            pass

    callback, module = make(), Tested()
    fit = trainer(tmp_path, callback, max_epochs=1)
    fit.fit(module, loader(8))
    history = list(callback.history)
    fit.test(module, loader(8), verbose=False)
    assert callback.history == history != []


@pytest.mark.parametrize("make", [lambda: FeatureStdRescaling(), lambda: NormBoundMonitor()])
def test_its_history_is_of_the_whole_fit_after_a_test_of_its_best_checkpoint(tmp_path, make):
    class Tested(LitTiny):
        def test_step(self, batch, batch_idx):
            pass

    callback, best = make(), ModelCheckpoint(tmp_path, monitor="epoch", mode="min")  # the first epoch's
    fit = trainer(tmp_path, callback, best, max_epochs=3, enable_checkpointing=True)
    fit.fit(Tested(), loader(8))
    history = list(callback.history)
    fit.test(ckpt_path="best", dataloaders=loader(8), verbose=False, weights_only=False)
    assert callback.history == history
    # One that has seen nothing takes what the checkpoint has.
    other = make()
    trainer(tmp_path, other).test(Tested(), loader(8), best.best_model_path, verbose=False, weights_only=False)
    assert other.history == history[: len(other.history)] != []


def test_the_plot_makes_its_folder(tmp_path):
    monitor = NormBoundMonitor()
    trainer(tmp_path, monitor, max_epochs=1).fit(LitTiny(), loader(8))
    monitor.plot(tmp_path / "new" / "norms.png")
    assert (tmp_path / "new" / "norms.png").is_file()
