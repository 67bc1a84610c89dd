"""Choices of the method that the experiments measure."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, FeatureStdRescaling, POMGrouping, eager, pom_param_groups, scaling
from recipes.experiments.choices import (
    BySpectrum,
    Gradually,
    Later,
    OtherStdRescaling,
    Redraw,
    flatness,
    momentum_left_behind,
    rates_by_manifold,
)
from recipes.experiments.networks import cifar_resnet
from recipes.experiments.training import Classifier, Task, Trainer, train

CONFIG = {
    "epochs": 3,
    "validate_every": 3,
    "data": {"source": "digits", "per_class": 16, "validation": 50, "size": 28, "batch_size": 32},
    "network": {"name": "cifar_resnet", "blocks": [1, 1, 1], "channels": [8, 8, 8]},
    "momentum": 0.9,
}


def fitted(callbacks, epochs=3, **options):
    """A small network after a fit, and its optimizer."""
    torch.manual_seed(0)
    options = {"lr": 0.1, "momentum": 0.9, **options}
    module = Classifier(cifar_resnet(10, (1, 1, 1), (8, 8, 8)), "fgsgd", options, {"mean": (0.3,), "std": (0.4,)})
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, limit_val_batches=0, **quiet)
    trainer.fit(module, Task(root="", seed=0, **CONFIG["data"]))
    return module, trainer.optimizers[0]


def test_flatness_is_one_for_equal_singular_values_and_one_over_p_for_a_single_one():
    equal = torch.linalg.qr(torch.randn(5, 7, 3)).Q * 2.5
    single = torch.randn(5, 7, 1) @ torch.randn(5, 1, 3)
    torch.testing.assert_close(flatness(equal), torch.ones(5))
    torch.testing.assert_close(flatness(single), torch.full((5,), 1 / 3))


@pytest.mark.parametrize("assign", ["flat", "steep"])
def test_manifolds_by_spectrum_are_as_many_as_drawn_and_in_the_order_of_flatness(assign):
    net = cifar_resnet(10, (1, 1, 1), (8, 16, 8))
    drawn = pom_param_groups(net, seed=3).plan.weights
    given = BySpectrum(assign, seed=3).param_groups(net).plan.weights
    assert list(drawn) == list(given)
    changed = 0
    for weight, planned in given.items():
        sets, before = planned.index_sets, drawn[weight].index_sets
        assert sets.manifold.bincount().tolist() == before.manifold.bincount().tolist()
        pairs = [set(zip(s.manifold.tolist(), s.slot.tolist(), strict=True)) for s in (sets, before)]
        assert pairs[0] == pairs[1], "a group has the manifold that it had"
        flat = flatness(planned.cutting.cut(weight.detach()))
        by_strength = [flat[sets.manifold == i] for i in range(3)]  # sphere, oblique, Stiefel
        present = [x for x in by_strength if len(x)]
        for weaker, stronger in pairwise(present):
            if assign == "flat":
                assert weaker.max() <= stronger.min()
            else:
                assert weaker.min() >= stronger.max()
        changed += int((sets.manifold != before.manifold).any())
    assert changed


def test_manifolds_by_spectrum_are_refused_where_a_layer_is_not_one_pool():
    with pytest.raises(ValueError, match="assign: it is for scheme: pio"):
        BySpectrum("flat", scheme="pi")
    with pytest.raises(ValueError, match="assign: unknown choice 'round'"):
        BySpectrum("round")


def test_constrained_later_the_first_epochs_are_those_of_plain_sgd():
    common = {**CONFIG, "lr": 0.3, "weight_decay": 0.01}
    plain = train({**common, "method": "sgd", "lr": 0.05}, 0, test=False, root="")
    late = {**common, "method": "fgsgd", "rescale": False, "euclidean_lr": 0.05}
    never = train({**late, "constrain_after": 9}, 0, test=False, root="")
    second = train({**late, "constrain_after": 1}, 0, test=False, root="")
    losses = [[epoch["train_loss"] for epoch in run.epochs] for run in (plain, never, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[2][1:] != pytest.approx(losses[0][1:], rel=1e-5)


def test_constrained_later_the_weights_hold_the_norms_that_they_have_by_then():
    class Norms(Later):
        seen: list

        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            self.seen = [*getattr(self, "seen", []), pl_module.net.conv1.weight.detach().norm().item()]

    later = Norms(1, manifolds=["sphere"], cutting="filter", block_size=1)
    module, optimizer = fitted([later], lr=0.3)
    weight = module.net.conv1.weight
    assert later.seen[1] != pytest.approx(later.seen[0], rel=1e-4)
    assert later.seen[2] == pytest.approx(later.seen[1], rel=1e-5)
    assert weight in optimizer.poms
    assert optimizer.distance(weight) < 1e-5


def test_brought_gradually_the_weights_are_on_their_manifolds_when_they_are_constrained():
    class Distances(Gradually):
        seen: list

        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            filters = pl_module.net.conv1.weight.detach().flatten(1)
            self.seen = [*getattr(self, "seen", []), float((filters.norm(dim=1) - 1).abs().max())]

    gradually = Distances(2, manifolds=["sphere"], cutting="filter", block_size=1, start="project")
    # A rate that moves next to nothing: what is seen is the way to the manifolds alone, a straight one.
    module, optimizer = fitted([gradually], lr=1e-7)
    steps = len(gradually.seen) * 2 // 3
    start = gradually.seen[0] * steps / (steps - 1)
    line = [start * (steps - n) / steps for n in range(1, steps + 1)]
    assert start > 0.1
    assert gradually.seen[:steps] == pytest.approx(line, abs=1e-5)
    assert gradually.seen[steps:] == pytest.approx([0.0] * (steps // 2), abs=1e-5)
    assert module.net.conv1.weight in optimizer.poms


def test_brought_gradually_frozen_weights_stay_as_they_are():
    class Frozen(Gradually):
        def on_train_start(self, trainer, pl_module):
            self.frozen = pl_module.net.conv1.weight.requires_grad_(False)
            self.before = self.frozen.clone()
            super().on_train_start(trainer, pl_module)

    gradually = Frozen(2, manifolds=["sphere"], cutting="filter", block_size=1, start="project")
    module, _ = fitted([gradually])
    assert torch.equal(gradually.frozen, gradually.before)
    other = module.net.layer1[0].conv1.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(other, torch.ones_like(other))


def test_a_run_that_diverges_on_its_way_to_the_manifolds_has_diverged(monkeypatch):
    before = Gradually.on_train_batch_end

    def lost(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.net.conv1.weight.detach().mul_(float("inf"))
        before(self, trainer, pl_module, outputs, batch, batch_idx)

    monkeypatch.setattr(Gradually, "on_train_batch_end", lost)
    options = {
        "method": "fgsgd",
        "lr": 0.1,
        "start": "project",
        "rescale": False,
        "constrain_after": 1,
        "gradually": True,
    }
    outcome = train({**CONFIG, **options}, 0, test=True, root="")
    assert math.isnan(outcome.numbers["test_error"])


def test_gradually_is_refused_where_it_cannot_be():
    told = "gradually: it is for start: project, got 'preserve'"
    with pytest.raises(ValueError, match=told):
        Gradually(1)
    with pytest.raises(ValueError, match=told):
        Gradually(1, start="project", overrides={"layer1*": {"start": "preserve"}})
    with pytest.raises(ValueError, match="gradually: 3 of 3 epochs; some are to follow"):
        fitted([Gradually(3, start="project")])
    for others in ({}, {"assign": "flat"}):
        options = {"method": "fgsgd", "lr": 0.1, "gradually": True, "rescale": False, **others}
        with pytest.raises(ValueError, match="gradually: it goes with constrain_after"):
            train({**CONFIG, **options}, 0, test=False, root="")


@pytest.mark.parametrize("fused", [True, False])
def test_with_rates_by_manifold_a_group_moves_as_with_that_learning_rate(fused):
    def stepped(lr, rates):
        torch.manual_seed(0)
        net = nn.Conv2d(8, 16, 3)
        groups = pom_param_groups(net, cutting="filter", block_size=4, groups=4, start="project")
        optimizer = FGSGD(groups, lr=lr, momentum=0.9, fused=fused)
        with rates_by_manifold(rates):
            for _ in range(3):
                net.weight.grad = torch.sin(torch.arange(net.weight.numel())).view_as(net.weight)  # wherever it is
                optimizer.step()
        pom = optimizer.poms[net.weight]
        return pom.cutting.cut(net.weight.detach()), {name: pom.on(name) for name in pom.sets.manifold_names}

    mixed, on = stepped(0.1, {"sphere": 0.5, "stiefel": 3.0})
    for name, lr in (("sphere", 0.05), ("oblique", 0.1), ("stiefel", 0.3)):
        assert on[name].any()
        alone, _ = stepped(lr, {})
        torch.testing.assert_close(mixed[on[name]], alone[on[name]])
        assert not torch.allclose(mixed[~on[name]], alone[~on[name]], atol=1e-4)


def test_rates_by_manifold_are_refused_where_they_have_no_meaning():
    told = "rates: positive factors by euclidean, sphere, oblique, stiefel, got"
    with pytest.raises(ValueError, match=told), rates_by_manifold({"ball": 1.0}):
        pass
    options = {"method": "fgsgd", "lr": 0.1, "manifolds": ["sphere"], "rates": {"stiefel": 2.0}}
    with pytest.raises(ValueError, match="rates: 'stiefel' is none of this arm's manifolds"):
        train({**CONFIG, **options}, 0, test=False, root="")
    net = nn.Conv2d(8, 16, 3)
    optimizer = FGSGD(pom_param_groups(net, cutting="filter", block_size=4, groups=1), lr=0.1)
    net.weight.grad = torch.ones_like(net.weight)
    told = "rates: groups of weight have components of several manifolds"
    with pytest.raises(ValueError, match=told), rates_by_manifold({"sphere": 0.5}):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("new", [True, False])
def test_redrawn_index_sets_are_others_each_epoch_or_the_same(new):
    class Seen(Redraw):
        sets: list
        momentum: list

        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            (optimizer,) = trainer.optimizers
            weight = pl_module.net.layer1[0].conv1.weight
            self.sets = [*getattr(self, "sets", []), optimizer.pom(weight).manifold.tolist()]
            self.momentum = [*getattr(self, "momentum", []), len(optimizer.state.get(weight, {}))]
            assert optimizer.distance(weight) < 1e-5
            assert optimizer.param_groups[0]["lr"] > 0

    grouping = POMGrouping(start="project", seed=1)
    seen = Seen(grouping, new=new)
    fitted([grouping, seen])
    assert len({tuple(s) for s in seen.sets}) == (3 if new else 1)
    assert seen.momentum == [0, 0, 0]


def test_with_the_same_sets_redrawn_a_step_is_as_long_as_before():
    class Origins(Redraw):
        seen: list

        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            pom = trainer.optimizers[0].poms[pl_module.net.layer1[0].conv1.weight]
            self.seen = [*getattr(self, "seen", []), [float(x) for x in pom.metric("start").unique()]]

    grouping = POMGrouping(start="project")
    origins = Origins(grouping, new=False)
    fitted([grouping, FeatureStdRescaling(), origins])
    assert origins.seen[1] == pytest.approx(origins.seen[0])
    assert origins.seen[2] == pytest.approx(origins.seen[0])


def test_constrained_later_rates_by_layer_stay_theirs():
    later = Later(1, manifolds=["sphere"], layer_decay=0.5)
    _, optimizer = fitted([later], lr=0.3, epochs=2)
    rates = {group["lr_factor"]: group["initial_lr"] for group in optimizer.param_groups if "lr_factor" in group}
    assert len(rates) > 2
    assert [rate / factor for factor, rate in rates.items()] == pytest.approx([0.3] * len(rates))


def test_radii_of_other_readings_of_λ():
    grouping, own = POMGrouping(start="project"), {}
    for std_of in ("nothing", "layer", None):
        rescaling = OtherStdRescaling(std_of, clamp=False) if std_of else FeatureStdRescaling(clamp=False)
        module, optimizer = fitted([grouping, rescaling], epochs=2)
        weight = module.net.layer2[0].conv1.weight
        own[std_of] = optimizer.pom(weight).radius
        layer = optimizer.poms[weight].layer
    gamma = scaling.gamma(layer, "xavier", None)
    torch.testing.assert_close(own["nothing"], torch.full_like(own["nothing"], gamma))
    by_channel = gamma / own[None].unique()
    torch.testing.assert_close(own["layer"], torch.full_like(own["layer"], gamma / by_channel.square().mean().sqrt()))
    with pytest.raises(ValueError, match="std_of: unknown choice 'row'"):
        OtherStdRescaling("row")


def test_momentum_left_behind_is_the_sum_of_tangent_vectors_where_each_was_made():
    torch.manual_seed(0)
    layer = nn.Linear(6, 1, bias=False)
    gradients = torch.randn(3, 1, 6)

    def optimizer():
        groups = pom_param_groups(layer, manifolds=["sphere"], start="project", exclude=())
        return FGSGD(groups, lr=0.2, momentum=0.9, rho=None, metric="unit", fused=False)

    before = eager.move
    fg = optimizer()
    q, buffer = layer.weight.detach().clone(), torch.zeros(1, 6)
    with momentum_left_behind():
        for g in gradients:
            layer.weight.grad = g.clone()
            fg.step()
            buffer = 0.9 * buffer + g - q * (q * g).sum()
            q = torch.nn.functional.normalize(q - 0.2 * buffer, dim=1)
            torch.testing.assert_close(layer.weight.detach(), q)
            torch.testing.assert_close(fg.state[layer.weight]["momentum_buffer"], buffer)
    assert eager.move is before
    assert (buffer * q).sum().abs() > 1e-3, "it is not tangent where the weight is now"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redraw": "often", "rescale": False}, "redraw: unknown choice 'often'"),
        ({"redraw": "new"}, "redraw: with R by λ it is for start: project or random"),
        ({"std_of": "layer", "start": "preserve"}, "std_of: with R by λ it is for start: project or random"),
        ({"constrain_after": 1}, "constrain_after: it needs rescale: false"),
        ({"assign": "flat", "constrain_after": 2}, "assign: it goes with no constrain_after"),
    ],
)
def test_a_wrong_choice_is_refused_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        train({**CONFIG, "method": "fgsgd", "lr": 0.1, **options}, 0, test=False, root="")
