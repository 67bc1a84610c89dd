import copy
import pickle

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from timm.optim import Lookahead
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_fgsgd import FeatureStdRescaling, POMGrouping, POMProjection
from tests.lit import LitBase, LitTiny, config, loader, trainer


class Adam(LitBase):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def nearest(weight, manifold):
    """By the definition: rows of norm 1, or the polar factor of all rows, in double precision."""
    rows = weight.detach().double().flatten(1)
    if manifold == "sphere":
        new = rows / rows.norm(dim=1, keepdim=True)
    else:
        u, _, vh = torch.linalg.svd(rows, full_matrices=False)
        new = u @ vh
    return new.view_as(weight).to(weight)


@pytest.mark.parametrize(("manifold", "block_size"), [("sphere", 1), ("stiefel", 16)])
def test_weights_are_at_the_nearest_point_after_each_step_of_the_optimizer(tmp_path, manifold, block_size):
    module = Adam()
    by_hand = copy.deepcopy(module.model)
    callback = POMProjection(
        cutting="filter", block_size=block_size, manifolds=[manifold], start="project", include=["*conv.weight"]
    )
    trainer(tmp_path, callback, max_epochs=2).fit(module, loader())

    assert list(callback.held.poms) == [module.model.conv.weight]
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.1)

    def project():
        with torch.no_grad():
            by_hand.conv.weight.copy_(nearest(by_hand.conv.weight, manifold))

    project()
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            cross_entropy(by_hand(x), y).backward()
            optimizer.step()
            project()
    for mine, theirs in zip(module.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    assert max(callback.held.distance(p) for p in callback.held.poms) < 1e-5


@pytest.mark.parametrize("start", ["preserve", "project", "random"])
def test_a_fit_that_is_resumed_ends_bit_for_bit_as_one_that_was_not(tmp_path, start):
    def run(folder, max_epochs, ckpt_path=None, seed=3):
        torch.manual_seed(7)
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        callback = POMProjection(start=start, seed=seed)
        fit = trainer(tmp_path, callback, checkpoint, max_epochs=max_epochs, enable_checkpointing=True)
        module = Adam()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        return module, callback.held, before

    module, held, before = run(tmp_path / "whole", 4)
    run(tmp_path / "part", 2)
    path = tmp_path / "part" / "epoch=1.ckpt"
    again, resumed, _ = run(tmp_path / "part", 4, path)
    for (name, mine), theirs in zip(module.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, before[name])
    for mine, theirs in zip(held.poms.values(), resumed.poms.values(), strict=True):
        assert torch.equal(mine.sets.manifold, theirs.sets.manifold)
    assert max(resumed.distance(p) for p in resumed.poms) < 1e-5
    assert torch.load(path, weights_only=True)
    with pytest.warns(UserWarning, match="are those of the checkpoint"):  # and not of another seed
        run(tmp_path / "other", 3, path, seed=4)


@pytest.mark.parametrize("start", ["preserve", "random"])
def test_a_strategy_that_restores_when_all_is_set_up_goes_on_with_what_was_held(tmp_path, start):
    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    first = trainer(tmp_path, POMProjection(start=start), max_epochs=2)
    first.fit(Adam(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    ends = []
    for options in ({}, {"strategy": Late(torch.device("cpu"))}):
        callback, module = POMProjection(start=start), Adam()
        fit = trainer(tmp_path, callback, max_epochs=3, **options)
        fit.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
        assert max(callback.held.distance(p) for p in callback.held.poms) < 1e-5
        ends.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_optimizer_that_wraps_another_is_followed_from_its_first_step(tmp_path):
    class Ahead(LitBase):
        def configure_optimizers(self):
            return Lookahead(torch.optim.SGD(self.parameters(), lr=0.1))

    class Steps(Callback):
        def on_train_batch_end(self, *args):
            seen.append(max(callback.held.distance(p) for p in callback.held.poms))

    seen, callback = [], POMProjection(start="project")
    trainer(tmp_path, callback, Steps(), max_epochs=1).fit(Ahead(), loader())
    assert len(seen) == 4
    assert max(seen) < 1e-5


def test_a_new_fit_begins_anew_after_one_that_was_resumed(tmp_path):
    class Starts(Callback):
        def on_train_start(self, trainer, pl_module):
            found.append(max(callback.held.distance(p) for p in callback.held.poms))

    found, callback = [], POMProjection(start="project")
    first = trainer(tmp_path, callback, max_epochs=1)
    first.fit(Adam(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, callback, max_epochs=2).fit(Adam(), loader(), ckpt_path=tmp_path / "last.ckpt")
    trainer(tmp_path, callback, Starts(), max_epochs=1).fit(Adam(), loader())
    assert found[0] < 1e-5  # its own weights are placed, where those of a checkpoint are left as they are


def test_two_optimizers_each_bring_their_own_weights_back(tmp_path):
    seen = []

    class Two(LitBase):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Conv2d(4, 4, 3, padding=1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1), torch.optim.SGD(self.other.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            loss = cross_entropy(self.model(self.other(batch[0])), batch[1])
            self.manual_backward(loss)
            with torch.no_grad():
                self.model.conv.weight.mul_(1.5)
            second.step()
            seen.append((callback.held.distance(self.model.conv.weight), callback.held.distance(self.other.weight)))
            first.step()
            seen.append((callback.held.distance(self.model.conv.weight), callback.held.distance(self.other.weight)))

    callback = POMProjection(manifolds=["sphere"], start="project")
    trainer(tmp_path, callback, max_epochs=1).fit(Two(), loader())
    for (stray, second), (first, still) in zip(seen[::2], seen[1::2], strict=True):
        assert stray > 0.1
        assert max(first, second, still) < 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_optimizer_when_a_fit_ends(tmp_path, fails):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *args):
            if fails:
                raise KeyError("stop")

    fit, module = trainer(tmp_path, POMProjection(), Fails(), max_epochs=1), Adam()
    if fails:
        with pytest.raises(KeyError):
            fit.fit(module, loader())
    else:
        fit.fit(module, loader())
    (optimizer,) = fit.optimizers
    assert not optimizer._optimizer_step_post_hooks
    fit.callbacks[:] = [c for c in fit.callbacks if not isinstance(c, Fails)]
    fit.fit_loop.epoch_progress.reset()
    fit.fit(module, loader())  # once more with the same callback
    held = fit.callbacks[0].held
    assert max(held.distance(p) for p in held.poms) < 1e-5


def test_frozen_weights_stay_as_they_are(tmp_path):
    module = Adam()
    module.model.conv.weight.requires_grad_(False)
    before = module.model.conv.weight.clone()
    callback = POMProjection(start="project")
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert torch.equal(module.model.conv.weight, before)
    assert callback.held.pom(module.model.conv.weight) is None
    assert len(callback.held.poms) > 2


def test_it_is_named_in_a_file_for_the_command_line(tmp_path):
    """jsonargparse finds POMGrouping's arguments, and gives those that are not asked for as they are by default."""
    callbacks = """
    - class_path: lightning_fgsgd.POMProjection
      init_args: {manifolds: [stiefel], start: project, SETTING}
    """

    def cli(setting):
        path = config(tmp_path, callbacks.replace("SETTING", setting))
        return LightningCLI(Adam, run=False, args=["--config", str(path)], save_config_callback=None)

    found = cli("block_size: 8")
    found.trainer.fit(found.model, loader())
    (projection,) = (callback for callback in found.trainer.callbacks if isinstance(callback, POMProjection))
    assert {pom.sets.manifold_names for pom in projection.held.poms.values()} == {("stiefel",)}
    assert max(projection.held.distance(p) for p in projection.held.poms) < 1e-5
    with pytest.raises(ValueError, match=r"layer_decay: it is of FGSGD's parameter groups"):
        cli("layer_decay: 0.5")


def test_what_it_cannot_do_is_said(tmp_path):
    with pytest.raises(TypeError, match=r"layer_decay: it is of FGSGD's parameter groups"):
        POMProjection(layer_decay=0.5)
    with pytest.raises(TypeError, match=r"verbose: print describe\(projection\.held\)"):
        POMProjection(verbose=True)
    with pytest.raises(ValueError, match="manifolds: unknown manifold 'cube'"):
        POMProjection(manifolds=["cube"])
    with pytest.raises(MisconfigurationException, match="an FGSGD holds its weights itself"):
        trainer(tmp_path, POMProjection(), max_epochs=1).fit(LitTiny(), loader())
    with pytest.raises(ValueError, match="Adam has no weight to constrain"):
        trainer(tmp_path, POMProjection(include=["*norm*"]), max_epochs=1).fit(Adam(), loader())

    class OfTheHead(LitBase):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    with pytest.raises(
        MisconfigurationException, match=r"the optimizers have none of the \d weights that are to be held"
    ):
        trainer(tmp_path, POMProjection(), max_epochs=1).fit(OfTheHead(), loader())
    for other in (POMGrouping(), FeatureStdRescaling()):  # which are of an FGSGD
        with pytest.raises(MisconfigurationException, match="FGSGD"):
            trainer(tmp_path, POMProjection(), other, max_epochs=1).fit(Adam(), loader())


def test_what_weights_were_before_they_were_placed_is_kept_until_the_first_step_alone(tmp_path):
    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            kept.append([projection.held.has_unplaced(p) for p in projection.held.poms])

        def on_train_batch_end(self, trainer, *_):
            kept.append(list(projection.held._unplaced))

    projection, kept = POMProjection(start="project"), []
    trainer(tmp_path, projection, Looks(), max_epochs=1).fit(Adam(), loader(16))
    assert all(kept[0])
    assert kept[1:] == [[], []]
    other = pickle.loads(pickle.dumps(projection))
    assert other.held is None
    assert other._grouping._groups is None
