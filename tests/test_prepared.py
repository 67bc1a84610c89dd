"""What is done for all weights at once is that for each; what is kept from step to step changes nothing but the time."""

import copy
import weakref

import pytest
import torch
from torch import nn

from lightning_fgsgd import FGSGD, fused, pom_param_groups
from lightning_fgsgd.cpp import COLUMNS
from lightning_fgsgd.prepared import Prepared
from lightning_fgsgd.stepsize import step_normalizer


def test_step_sizes_of_all_weights_at_once_are_those_of_each_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.Linear(16, 6).double(), nn.Conv2d(2, 4, 3))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    groups = pom_param_groups(model, scheme="pi")
    (constrained,) = (g for g in groups if g["name"] == "pom")
    rhos = [0.5, None, 2.0, 0.5]
    split = [{**constrained, "params": [p], "rho": rho} for p, rho in zip(constrained["params"], rhos, strict=True)]
    groups[:] = [*split, *(g for g in groups if g["name"] != "pom")]
    for i, group in enumerate(groups):
        group["name"] = str(i)
    optimizer = FGSGD(groups, lr=0.1)
    updates, _ = optimizer._updates(set())
    prepared = Prepared(updates)
    sums = prepared.sums(updates)
    for update, of_groups, share in zip(updates, sums, prepared.shares(updates, sums), strict=True):
        assert share.dtype == update.weight.dtype
        if update.group["rho"] is None:
            assert of_groups is None
            assert torch.equal(share, torch.ones_like(share))
            continue
        norms = of_groups.sqrt().to(share.dtype)
        curvature = update.pom.curvatures(update.group["metric"])
        assert torch.equal(share, 1 / step_normalizer(norms, update.group["rho"], curvature))


def network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 16, 1),
        nn.Linear(64, 256),
    )  # by several threads
    return nn.ModuleList(layers)


def with_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    return model


def constrained(optimizer):
    return next(group for group in optimizer.param_groups if group["name"] == "pom")


def rescale(model, optimizer):
    weight = model[0].weight
    optimizer.rescale(weight, torch.full((24,), 0.7))


def leave_out(model, optimizer):
    model[1].weight.grad = None


def lay_out_gradients(model, optimizer):
    for p in model.parameters():
        p.grad = p.grad.to(memory_format=torch.channels_last) if p.ndim == 4 else p.grad


def lay_out_weights(model, optimizer):
    model.to(memory_format=torch.channels_last)


def double(model, optimizer):
    model.double()
    for p in model.parameters():
        p.grad = p.grad.double()


def load(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_without_momentum(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict({**state, "state": {}})


def forget(model, optimizer):
    optimizer.state.clear()


def replace(model, optimizer):
    for p in model.parameters():
        p.data = p.data.clone()


def add(model, optimizer):
    layer = with_gradients(nn.Conv2d(3, 4, 3), seed=5)
    optimizer.add_param_group({"params": list(layer.parameters()), "name": "more"})


def threads(model, optimizer):
    torch.set_num_threads(2 * torch.get_num_threads())


def options(**given):
    def change(model, optimizer):
        constrained(optimizer).update(given)

    change.__name__ = ", ".join(f"{name}={value}" for name, value in given.items())
    return change


CHANGES = [
    *(
        rescale,
        leave_out,
        lay_out_gradients,
        lay_out_weights,
        double,
        load,
        load_without_momentum,
        forget,
        replace,
        add,
    ),
    threads,
    *(options(lr=0.02), options(lr=0.0), options(lr=torch.tensor(0.03)), options(momentum=0.0), options(momentum=0.5)),
    *(options(nesterov=True), options(dampening=0.1), options(weight_decay=0.1), options(maximize=True)),
    *(options(rho=3.0), options(rho=None), options(rho="average"), options(metric="unit"), options(fused=False)),
]


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("start", ["preserve", "project"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_steps_are_to_the_last_bit_those_of_an_optimizer_that_keeps_nothing(change, start):
    found = []
    for kept in (True, False):
        torch.manual_seed(1)
        model = network()
        manifolds = ["sphere", "oblique", "stiefel", "euclidean"]
        groups = pom_param_groups(model, manifolds=manifolds, start=start, exclude=[])
        optimizer = FGSGD(groups, lr=0.05, momentum=0.9)
        for step in range(6):
            with_gradients(model, step)
            if step in (2, 4):  # the second time, what was made for the first is not taken again unasked
                change(model, optimizer)
            if not kept:
                optimizer._own.prepared = Prepared()
            optimizer.step()
        found.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_what_is_prepared_is_kept_while_only_gradients_and_numbers_change():
    model = network()
    optimizer = FGSGD(pom_param_groups(model), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    with_gradients(model, 0)
    optimizer.step()
    prepared = optimizer._own.prepared
    for step in range(1, 5):
        optimizer.zero_grad()
        with_gradients(model, step)
        optimizer.step()
        schedule.step()
        assert optimizer._own.prepared is prepared
    model[0].weight.grad = None
    optimizer.step()
    assert optimizer._own.prepared is not prepared


def test_neither_gradients_nor_weights_live_longer_for_it():
    model = network()
    optimizer = FGSGD(pom_param_groups(model), lr=0.05, momentum=0.9)
    with_gradients(model, 0)
    optimizer.step()
    prepared, gradients = optimizer._own.prepared, [weakref.ref(p.grad) for p in model.parameters()]
    weights, momenta = (
        [weakref.ref(p) for p in optimizer.poms],
        [weakref.ref(s["momentum_buffer"]) for s in optimizer.state.values()],
    )
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in gradients)
    del model, optimizer
    assert prepared is not None
    assert not any(ref() is not None for ref in (*weights, *momenta))


@pytest.mark.parametrize("change", [load, rescale, double], ids=lambda change: change.__name__)
def test_nothing_of_manifolds_as_they_were_lives_longer_for_it(change):
    model = network()
    optimizer = FGSGD(pom_param_groups(model, block_size=4), lr=0.05, momentum=0.9)
    with_gradients(model, 0)
    optimizer.step()
    old = [weakref.ref(x) for pom in optimizer.poms.values() for x in (pom._radius, pom.group) if not pom.cutting.small]
    before = [weakref.ref(pom._radius) for pom in optimizer.poms.values()]
    change(model, optimizer)
    assert len(optimizer.poms) == 4  # which follow their weights
    alive = [ref() is not None for ref in (before if change is not rescale else before[:1])]
    assert not any(alive)
    assert change is not load or not any(ref() is not None for ref in old)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("at", [1, 2])  # while norms are prepared, and while the move is
@pytest.mark.parametrize("again", [False, True])
def test_a_step_that_was_interrupted_while_it_was_prepared_is_taken_whole_the_next_time(monkeypatch, again, at):
    class Interrupting(list):
        def __iter__(self):
            yield from list(super().__iter__())[:2]
            raise KeyboardInterrupt

    lay_out, found = fused.Launches._lay_out, []
    for interrupts in (True, False):
        model = with_gradients(network(), 0)
        optimizer = FGSGD(pom_param_groups(model), lr=0.05)
        if again:
            torch.set_num_threads(1)
            optimizer.step()
            torch.set_num_threads(2)
        calls = []

        def interrupted(self, jobs, threads, calls=calls):
            calls.append(len(jobs))
            return lay_out(self, Interrupting(jobs) if len(calls) == at else jobs, threads)

        if interrupts:
            monkeypatch.setattr(fused.Launches, "_lay_out", interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
            monkeypatch.undo()
        optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_copy_of_an_optimizer_steps_as_the_one_it_was_copied_from():
    model = with_gradients(network(), 0)
    optimizer = FGSGD(pom_param_groups(model), lr=0.05, momentum=0.9)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    weights = [p for group in twin.param_groups for p in group["params"]]
    for p, mine in zip(weights, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        p.grad = mine.grad.clone()
    twin.step()
    optimizer.step()
    for p, mine in zip(weights, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        assert torch.equal(p, mine)


@pytest.mark.usefixtures("_threads")
def test_code_is_run_by_as_many_threads_as_torch_has_at_the_time():
    model = with_gradients(network(), 0)
    optimizer = FGSGD(pom_param_groups(model), lr=0.05)
    for count in (1, 3, 2):
        torch.set_num_threads(count)
        optimizer.step()
        ((_, launches),) = optimizer._own.prepared._moves
        tables = [table for _, _, table in launches._tables]
        assert {n for table in tables for n in table[COLUMNS.index("threads") :: len(COLUMNS)]} == {1, count}
