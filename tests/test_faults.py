"""What goes wrong, each in a real Trainer run, and what happens then: nothing is silently wrong."""

import copy
import math
import pickle
import random
import signal
import warnings

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_fgsgd import FGSGD, FeatureStdRescaling, NormBoundMonitor, POMGrouping, pom_param_groups
from lightning_fgsgd import fused as fused_step
from lightning_fgsgd.update import Update
from tests.lit import LitBase, LitTiny, loader, trainer
from tests.test_finetuning import LitTimm, images
from tests.test_loop import Features, callbacks, hooks, rescaling, resnet, same, vit, worst

CONV = "model.layer2.0.conv1"


def snapshot(module):
    return copy.deepcopy(module.state_dict())


def equal(state, other):
    return all(torch.equal(state[name], other[name]) for name in state)


def left_behind(module):
    """What a fit could leave behind: hooks, a mode that watches functions, a stance of the compiler."""
    found = [hooks(module), len(torch.overrides._get_current_function_mode_stack())]
    return found != [0, 0] or torch._dynamo.eval_frame._stance.stance != "default"


def assert_fits_as_new(tmp_path, module, used):
    """The module, with the callbacks of an earlier fit, trains bit for bit as with new ones."""
    twin = copy.deepcopy(module)
    for each, given in ((module, used), (twin, callbacks())):
        fit = trainer(tmp_path, *given, max_epochs=2)
        fit.fit(each, images())
        assert worst(fit.optimizers[0]) < 1e-5
    assert same(module, twin)


# Values that are not finite ---------------------------------------------------------------------------------------------


class Poison(Callback):
    """Spoils something in one batch of the second epoch, and keeps what the step must not change."""

    def __init__(self, where, value):
        self.where, self.value = where, value

    def now(self, trainer, batch_idx):
        return trainer.current_epoch == 1 and batch_idx == 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.now(trainer, batch_idx):
            return
        with torch.no_grad():
            if self.where == "feature":
                batch[0][0, 0, 0, 0] = self.value
            elif self.where != "gradient":
                pl_module.get_parameter(self.where).view(-1)[0] = self.value

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.now(trainer, trainer.fit_loop.epoch_loop.batch_idx):
            return
        if self.where == "gradient":
            pl_module.get_parameter(f"{CONV}.weight").grad.view(-1)[0] = self.value
        self.parameters = copy.deepcopy(list(pl_module.parameters()))
        self.state = copy.deepcopy(optimizer.state_dict())


def assert_same_state(state, other):
    for index, values in state["state"].items():
        assert torch.equal(values["momentum_buffer"], other["state"][index]["momentum_buffer"])
    for group, theirs in zip(state["param_groups"], other["param_groups"], strict=True):
        for pom, old in zip(group["pom"], theirs["pom"], strict=True):
            assert pom is old is None or torch.equal(pom["radius"], old["radius"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "feature", f"{CONV}.weight", "model.bn1.bias"])
def test_nan_or_infinity_stops_the_fit_before_a_single_bit_moves_and_names_the_weights(tmp_path, where, value):
    module, poison, given = resnet(), Poison(where, value), callbacks()
    fit = trainer(tmp_path, *given, poison, max_epochs=3)
    message = "constrained weights hold values" if where.endswith("weight") else r"gradients of \d+ of 15 .* no weight"
    with pytest.raises(FloatingPointError, match=message):
        fit.fit(module, images())
    kept = zip(module.parameters(), poison.parameters, strict=True)
    assert all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in kept)
    assert_same_state(fit.optimizers[0].state_dict(), poison.state)
    assert not left_behind(module)
    # What was spoiled is not repaired by itself; a fit is possible again once it is.
    clean = resnet()
    for p, q in zip(module.parameters(), clean.parameters(), strict=True):
        p.data = torch.where(p.isfinite(), p, q.data)
    for b in module.buffers():
        b.nan_to_num_(0.5, posinf=0.5)
    assert_fits_as_new(tmp_path, module, given)


def test_nan_in_the_gradient_of_an_unconstrained_weight_is_stepped_as_by_sgd_and_stops_the_next_step(tmp_path):
    class Spoil(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                pl_module.model.fc.weight.grad[0, 0] = math.nan

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.after = snapshot(pl_module)

    module, spoil = resnet(), Spoil()
    with pytest.raises(FloatingPointError, match="gradients of 15 of 15 constrained weights are not finite"):
        trainer(tmp_path, *callbacks(), spoil, max_epochs=1).fit(module, images())
    assert spoil.after["model.fc.weight"].isnan().sum() == 1
    assert all(p.isfinite().all() for name, p in spoil.after.items() if "fc.weight" not in name)
    assert all(torch.equal(p, spoil.after[n]) for n, p in module.named_parameters() if "fc" not in n)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_in_a_batch_that_is_skipped_leave_the_radius_and_are_said_once(tmp_path, value):
    class Skips(LitTimm):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss.isfinite() else None

    torch.manual_seed(0)
    module = Skips("test_vit", img_size=32)  # without batch norm, whose running statistics would be spoiled for good
    fit = trainer(tmp_path, *callbacks(), Poison("feature", value), max_epochs=4)
    with pytest.warns(UserWarning, match=r"input of 25 layers \(model\..* NaN or infinite values in epoch 1") as record:
        fit.fit(module, images())
    assert sum("NaN or infinite" in str(w.message) for w in record) == 1
    rows = [look["layers"]["model.blocks.0.attn.qkv"] for look in rescaling(fit).history]
    assert [math.isfinite(row["std"]) for row in rows] == [True, False, True, True]
    assert rows[0]["radius"] != rows[1]["radius"] == rows[2]["radius"] != rows[3]["radius"]
    assert worst(fit.optimizers[0]) < 1e-5


def test_a_first_epoch_with_features_that_are_not_finite_does_not_become_the_first_lambda(tmp_path):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 0:
                batch[0][0, 0, 0, 0] = math.nan
            if trainer.current_epoch == 2:
                batch[0].mul_(2)

    class Still(LitTiny):
        """Takes no step, so λ changes by what enters only."""

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    module = Still()
    fit = trainer(tmp_path, FeatureStdRescaling(every_n_batches=1), Spoil(), max_epochs=4)
    with pytest.warns(UserWarning, match="NaN or infinite values in epoch 0"):
        fit.fit(module, loader())
    radius = fit.optimizers[0].pom(module.model.conv.weight).radius
    torch.testing.assert_close(radius, torch.full_like(radius, 0.5))  # λ of the second epoch over λ of the third


# Gradients and features of zero ------------------------------------------------------------------------------------------


def test_a_weight_without_a_gradient_stays_bit_for_bit_and_the_others_step_as_if_it_were_not_there(tmp_path):
    class Idle(LitTimm):
        def __init__(self):
            super().__init__("test_resnet")
            self.idle = nn.Linear(5, 4)

    torch.manual_seed(0)
    module, twin = Idle(), resnet()
    before = module.idle.weight.detach().clone()
    fits = []
    for each in (module, twin):
        fits.append(trainer(tmp_path, POMGrouping(), max_epochs=1))
        fits[-1].fit(each, images())
    (optimizer,) = fits[0].optimizers
    assert torch.equal(module.idle.weight, before)
    assert module.idle.weight.grad is None
    assert "momentum_buffer" not in optimizer.state[module.idle.weight]
    assert optimizer.pom(module.idle.weight) is not None
    assert same(module.model, twin.model)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("start", ["preserve", "project"])
def test_gradients_of_zero_leave_the_weights_where_they_are_to_rounding(tmp_path, start, fused):
    class Flat(LitTimm):
        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    class Kept(Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = [p.detach().clone() for p in trainer.optimizers[0].poms]

    torch.manual_seed(0)
    module, kept = Flat("test_resnet"), Kept()
    module.fused = fused
    fit = trainer(tmp_path, POMGrouping(start=start), kept, max_epochs=10)
    fit.fit(module, images())
    (optimizer,) = fit.optimizers
    for p, before in zip(optimizer.poms, kept.before, strict=True):
        assert (p - before).abs().max() <= 1e-5 * before.abs().max()
        assert not optimizer.state[p]["momentum_buffer"].any()
    assert worst(optimizer) < 1e-5


@pytest.mark.parametrize("fused", [None, False])
def test_after_gradients_of_zero_momentum_moves_the_weights_on_as_in_sgd(tmp_path, fused):
    class Fading(LitTimm):
        def training_step(self, batch, batch_idx):
            return (1.0 if self.global_step == 0 else 0.0) * super().training_step(batch, batch_idx)

    class Path(Callback):
        def on_train_start(self, trainer, pl_module):
            self.places, self.norms = [copy.deepcopy(list(trainer.optimizers[0].poms))], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            (optimizer,) = trainer.optimizers
            self.places.append(copy.deepcopy(list(optimizer.poms)))
            self.norms.append(nn.utils.get_total_norm([optimizer.state[p]["momentum_buffer"] for p in optimizer.poms]))

        def way(self, start, end):
            pairs = zip(self.places[start], self.places[end], strict=True)
            return nn.utils.get_total_norm([(p - q).detach() for p, q in pairs])

    torch.manual_seed(0)
    module, path = Fading("test_resnet", lr=1e-3), Path()
    module.fused = fused
    fit = trainer(tmp_path, POMGrouping(), path, max_epochs=2)
    fit.fit(module, images())
    # Steps as short as these turn it next to nothing: it is 0.9 times as long after each.
    torch.testing.assert_close(torch.stack(path.norms), path.norms[0] * 0.9 ** torch.arange(6), rtol=1e-3, atol=0)
    expected = path.way(0, 1) * sum(0.9**i for i in range(1, 6))
    torch.testing.assert_close(path.way(1, 6), expected, rtol=1e-2, atol=0)
    assert worst(fit.optimizers[0]) < 1e-5


@pytest.mark.parametrize("make", [resnet, vit])
def test_batches_of_one_image_train_and_are_read_as_any(tmp_path, make):
    module = make()
    # Batch norm itself refuses one image where its features are a single pixel, as those of the last stage are at 32 x 32.
    layer, dim, size = (CONV, 1, 64) if make is resnet else ("model.blocks.1.mlp.fc1", None, 32)
    features = Features(layer)
    fit = trainer(tmp_path, *callbacks(), features, max_epochs=2)
    fit.fit(module, DataLoader(images(6, size).dataset, batch_size=1))
    assert fit.global_step == 12
    for epoch, row in enumerate(rescaling(fit).history):
        seen = torch.cat(features.seen[epoch])
        std = features.std(epoch, 1) if dim == 1 else seen.std(correction=0).item()
        assert row["layers"][layer]["std"] == pytest.approx(std, rel=1e-5)
    assert all(p.isfinite().all() for p in module.parameters())
    assert worst(fit.optimizers[0]) < 1e-5


@pytest.mark.parametrize(
    ("start", "options", "silent", "radius"),
    [
        ("preserve", {}, 0.0, 1.0),  # no ratio: R stays
        ("preserve", {}, 1e-3, 10.0),  # the limit
        ("preserve", {"limit": None}, 1e-3, 1000.0),
        ("project", {}, 0.0, "γ"),  # λ is taken as 1
        ("project", {"clamp": False}, 0.0, 1.0),  # R stays
    ],
)
def test_the_radius_of_a_channel_that_dies_is_what_the_docs_say(tmp_path, start, options, silent, radius):
    class Dying(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            x = trainer.train_dataloader.dataset.tensors[0]
            if trainer.current_epoch == 0 and start == "project":
                x[:, 0] = silent
            if trainer.current_epoch == 1 and start == "preserve":
                x[:, 0] *= silent

    class Still(LitTiny):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    module = Still()
    fit = trainer(
        tmp_path, POMGrouping(start=start), FeatureStdRescaling(every_n_batches=1, **options), Dying(), max_epochs=3
    )
    fit.fit(module, loader())
    pom = fit.optimizers[0].pom(module.model.conv.weight)
    reads = fit.optimizers[0].poms[module.model.conv.weight].cutting.input_channel()
    expected = (4 * 9 + 6 * 9) ** -0.5 if radius == "γ" else radius
    torch.testing.assert_close(pom.radius[reads == 0], torch.full((6,), expected), rtol=1e-4, atol=0)
    assert worst(fit.optimizers[0]) < 1e-5
    assert all(p.isfinite().all() for p in module.parameters())


# Exceptions --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupts():
    """Lightning ignores further interrupts once it has seen one; the tests after this one do not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Raising(Callback):
    def __init__(self, error, hook):
        setattr(self, hook, lambda trainer, *args, **kwargs: self.fail(trainer))
        self.error = error

    def fail(self, trainer):
        if trainer.global_step == 4:
            raise self.error


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_before_optimizer_step"])
def test_an_exception_in_mid_epoch_leaves_a_model_that_can_be_used_and_callbacks_for_another_fit(tmp_path, hook, error):
    module, given = resnet(), callbacks()
    fit = trainer(tmp_path, *given, Raising(error("stop"), hook), max_epochs=3)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit.fit(module, images())
    assert fit.global_step == 4
    assert not left_behind(module)
    assert worst(fit.optimizers[0]) < 1e-5
    with torch.no_grad():
        assert module.model(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert_fits_as_new(tmp_path, module, given)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("fused", [None, False])
def test_an_interrupt_between_the_weights_of_a_step_leaves_each_before_or_after_it(tmp_path, monkeypatch, fused):
    move, advance, calls = Update.move, fused_step.Launches.advance, []

    def interrupted(update, shares):
        calls.append(update.pom.name)
        if len(calls) == 4 * 15 + 7:  # the seventh weight of the fifth step
            raise KeyboardInterrupt
        return move(update, shares)

    def interrupted_code(launches, jobs, shares):  # of all weights in one call
        calls.append(len(jobs))
        if len(calls) < 5:
            return advance(launches, jobs, shares)
        advance(fused_step.Launches(jobs[:6]), jobs[:6], shares[:6])
        raise KeyboardInterrupt

    class Kept(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = snapshot(pl_module)

    module, given, kept = resnet(), callbacks(), Kept()
    module.fused = fused
    monkeypatch.setattr(Update, "move", interrupted)
    monkeypatch.setattr(fused_step.Launches, "advance", interrupted_code)
    fit = trainer(tmp_path, *given, kept, max_epochs=3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit.fit(module, images())
    monkeypatch.undo()
    (optimizer,) = fit.optimizers
    moved = [not torch.equal(p, kept.before[pom.name]) for p, pom in optimizer.poms.items()]
    assert moved == [True] * 6 + [False] * 9
    assert worst(optimizer) < 1e-5
    assert not left_behind(module)
    # The same optimizer goes on from there, without a word about weights that left their manifolds.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert worst(optimizer) < 1e-5
    assert_fits_as_new(tmp_path, module, given)


def test_an_interrupt_while_r_is_set_finds_r_and_the_weight_changed_together(monkeypatch):
    model = nn.Conv2d(4, 6, 3)
    optimizer = FGSGD(pom_param_groups(model), lr=0.1)
    pom, before = optimizer.poms[model.weight], model.weight.detach().clone()
    set_radius, calls = pom.set_radius, []

    def interrupted(*args, **kwargs):
        set_radius(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pom, "set_radius", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.rescale(model.weight, torch.full_like(pom.radius, 0.02))
    assert worst(optimizer) < 1e-5
    torch.testing.assert_close(model.weight.detach(), 0.02 * before)


@pytest.mark.slow
@pytest.mark.usefixtures("interrupts")
def test_interrupts_at_any_moment_leave_nothing_behind(tmp_path):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    moments, stopped = random.Random(0), 0
    for i in range(20):
        module, given = resnet(), callbacks()
        module.fused = None if i % 2 else False
        fit = trainer(tmp_path, *given, max_epochs=20)
        signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.2, 1.0))
            fit.fit(module, images())
        except (KeyboardInterrupt, SystemExit):
            stopped += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert not left_behind(module)
        assert all(p.isfinite().all() for p in module.parameters())
        if fit.optimizers:
            assert worst(fit.optimizers[0]) < 1e-5
    assert stopped >= 10
    assert_fits_as_new(tmp_path, module, given)


# Again, copied, and without a fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["the same Trainer", "another Trainer"])
def test_a_second_fit_with_the_same_callbacks_is_bit_for_bit_one_with_new_ones(tmp_path, again):
    module, given = resnet(), (*callbacks(), NormBoundMonitor())
    fit = trainer(tmp_path, *given, max_epochs=2)
    fit.fit(module, images())
    twin = copy.deepcopy(module)
    if again == "the same Trainer":
        fit.fit_loop.max_epochs = 4
    else:
        fit = trainer(tmp_path, *given, max_epochs=2)
    fit.fit(module, images())
    new = (*callbacks(), NormBoundMonitor())
    other = trainer(tmp_path, *new, max_epochs=2)
    other.fit(twin, images())
    assert same(module, twin)
    assert_same_state(fit.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    assert [look["layers"] for look in given[1].history] == [look["layers"] for look in new[1].history]
    assert [look["network"] for look in given[2].history] == [look["network"] for look in new[2].history]
    assert given[2].start == new[2].start


@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_goes_on_bit_for_bit_as_the_original(tmp_path, copied, start):
    module = resnet()
    fit = trainer(tmp_path, *callbacks(start), max_epochs=2)
    fit.fit(module, images())
    (optimizer,) = fit.optimizers
    model, twin = copied((module.model, optimizer))
    assert len(twin.poms) == 15
    assert {id(p) for p in twin.poms} <= {id(p) for p in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net, each in ((module.model, optimizer), (model, twin)):
            for x, y in images():
                each.zero_grad()
                cross_entropy(net.train()(x), y).backward()
                each.step()
    assert same(module.model, model)
    assert_same_state(twin.state_dict(), optimizer.state_dict())
    assert worst(twin) < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_callbacks_can_be_copied_before_in_the_middle_of_and_after_a_fit(tmp_path, copied):
    given = *callbacks(), NormBoundMonitor()
    copies = [copied(given)]

    class Copy(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 4:
                copies.append(copied(given))

    module = LitTimm()
    trainer(tmp_path, *given, Copy(), max_epochs=2).fit(module, images())
    copies.append(copied(given))
    assert [len(each[1].history) for each in copies] == [0, 1, 2]
    assert copies[-1][1].history == given[1].history
    assert copies[-1][2].history == given[2].history
    assert not left_behind(module)
    start = resnet()
    for each in copies:
        trained, twin = copy.deepcopy(start), copy.deepcopy(start)
        assert each[0].settings == given[0].settings
        trainer(tmp_path, *each, max_epochs=2).fit(trained, images())
        trainer(tmp_path, *callbacks(), max_epochs=2).fit(twin, images())
        assert same(trained, twin)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_model_that_is_copied_in_the_middle_of_a_batch_is_not_read_and_can_be_run(tmp_path, with_gradients):
    class Teacher(LitTimm):
        """A mean teacher that is made in the first step, and run beside the student, on louder images."""

        def training_step(self, batch, batch_idx):
            if self.global_step == 0:
                self.__dict__["teacher"] = pickle.loads(pickle.dumps(copy.deepcopy(self.model)))
            with torch.set_grad_enabled(with_gradients):
                self.teacher(100 * batch[0])
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module, twin = Teacher("test_resnet"), resnet()
    fits = [trainer(tmp_path, *callbacks(), max_epochs=2) for _ in range(2)]
    for fit, each in zip(fits, (module, twin), strict=True):
        fit.fit(each, images())
    assert rescaling(fits[0]).history == rescaling(fits[1]).history
    assert same(module.model, twin.model)


class Evaluated(LitTimm):
    def validation_step(self, batch, batch_idx):
        self.log("loss", cross_entropy(self.model(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_evaluating_before_without_and_after_a_fit_changes_nothing(tmp_path, what):
    def evaluate(fit, module):
        before = snapshot(module)
        found = getattr(fit, what)(module, images(), **({} if what == "predict" else {"verbose": False}))
        assert equal(module.state_dict(), before)
        assert not left_behind(module)
        return found

    torch.manual_seed(0)
    module = Evaluated("test_resnet")
    twin = copy.deepcopy(module)
    plain = evaluate(trainer(tmp_path), module)
    given = *callbacks(), NormBoundMonitor()
    fit = trainer(tmp_path, *given, max_epochs=2)
    found = evaluate(fit, module)
    if what == "predict":
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    else:
        assert found == plain
    assert fit.optimizers == []
    assert given[1].history == given[2].history == []

    fit.fit(module, images())
    other = trainer(tmp_path, *callbacks(), NormBoundMonitor(), max_epochs=2)
    other.fit(twin, images())
    assert same(module, twin)

    history = copy.deepcopy(given[1].history)
    state = copy.deepcopy(fit.optimizers[0].state_dict())
    evaluate(fit, module)
    assert given[1].history == history
    assert_same_state(fit.optimizers[0].state_dict(), state)
    fit.fit_loop.max_epochs = 3  # a fit after it is as one without it
    fit.fit(module, images())
    other.fit_loop.max_epochs = 3
    other.fit(twin, images())
    assert same(module, twin)


def test_a_step_without_any_gradient_moves_nothing(tmp_path):
    class Skips(LitBase):
        def configure_optimizers(self):
            return FGSGD(pom_param_groups(self, start="project"), lr=0.1)

        def training_step(self, batch, batch_idx):
            return None

    class Kept(Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = snapshot(pl_module)

    module, kept = Skips(), Kept()
    fit = trainer(tmp_path, FeatureStdRescaling(), kept, max_epochs=2)
    with pytest.warns(UserWarning, match="was not seen in any forward pass; its R stays as it is"):
        fit.fit(module, loader())
    assert equal(module.state_dict(), kept.before)
    assert worst(fit.optimizers[0]) < 1e-5
