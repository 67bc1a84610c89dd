import csv
import io
import re

import pytest
import timm
import torch

from lightning_fgsgd import FGSGD, POMGrouping, describe, pom_param_groups
from lightning_fgsgd.manifolds import get_manifold
from tests.lit import LitTiny, loader, trainer


def test_the_rows_are_what_the_plan_holds(tiny):
    groups = pom_param_groups(tiny, scheme="pi", manifolds=["stiefel", "sphere"], exclude=["up.*"])
    found = describe(groups, quiet=True)
    rows = {row["name"]: row for row in found.rows}
    assert list(rows) == [name for name, _ in tiny.named_parameters()]
    assert len({tuple(row) for row in found.rows}) == 1  # the same keys everywhere
    conv = rows["conv.weight"]
    assert (conv["shape"], conv["cutting"], conv["n"], conv["p"]) == ((6, 4, 3, 3), "kernel", 3, 3)
    assert (conv["components"], conv["groups"], conv["stiefel"], conv["sphere"], conv["oblique"]) == (24, 8, 12, 12, 0)
    assert (conv["radius_min"], conv["radius_max"], conv["change"], conv["reason"]) == (1.0, 1.0, 0.0, "")
    assert rows["up.weight"]["reason"] == "in exclude"
    assert rows["head.weight"]["reason"] == "classifier head"
    assert rows["norm.weight"]["components"] is None
    constrained = sum(p.numel() for p in groups.plan.weights)
    total = sum(p.numel() for p in tiny.parameters())
    assert found.totals["constrained"] == constrained
    assert found.totals["share"] == pytest.approx(constrained / total)
    assert found.totals["layers"] == 5


def test_the_rows_are_ready_for_a_table_and_the_scalars_for_a_logger(tiny):
    found = describe(pom_param_groups(tiny, start="project"), quiet=True)
    file = io.StringIO()
    writer = csv.DictWriter(file, found.rows[0].keys())
    writer.writerows(found.rows)
    scalars = found.scalars()
    assert scalars["pom/share"] == found.totals["share"]
    assert all(isinstance(value, float) for value in scalars.values())
    assert scalars["pom/change/conv.weight"] > 0.5


@pytest.mark.parametrize("live", [False, True])
def test_the_change_of_project_is_measured_layer_by_layer_and_of_the_output(live):
    model = timm.create_model("test_resnet", num_classes=5).eval()
    x = torch.randn(3, 3, 64, 64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(x)
    groups = pom_param_groups(
        model, start="project", manifolds=["stiefel"], overrides={"conv1.*": {"start": "preserve"}}
    )
    optimizer = FGSGD(groups, lr=0.1) if live else None
    found = describe(optimizer or groups, model, x, quiet=True)
    if not live:  # it has not moved anything
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        optimizer = FGSGD(groups, lr=0.1)
    changes = {row["name"]: row["change"] for row in found.rows if row["constrained"]}
    for name, change in changes.items():
        p = model.get_parameter(name).detach()
        assert change == pytest.approx(((p - before[name]).norm() / before[name].norm()).item(), rel=1e-5)
        if not name.startswith("conv1."):
            cut = optimizer.poms[model.get_parameter(name)].cutting.cut
            torch.testing.assert_close(cut(p), get_manifold("stiefel").project(cut(before[name])), atol=1e-5, rtol=0)
    assert changes["conv1.0.weight"] == 0
    with torch.no_grad():
        assert found.totals["output_change"] == pytest.approx(
            ((model(x) - plain).norm() / plain.norm()).item(), rel=1e-4
        )
    assert found.totals["output_change"] > 0.1


def test_preserve_changes_no_layer_and_no_output():
    model = timm.create_model("test_vit", num_classes=5).eval()
    found = describe(pom_param_groups(model), model, torch.randn(2, 3, 160, 160), quiet=True)
    assert found.totals["output_change"] == 0
    assert all(row["change"] == 0 for row in found.rows if row["constrained"])


def test_measuring_the_output_leaves_running_statistics_alone():
    model = timm.create_model("test_resnet", num_classes=5).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    describe(pom_param_groups(model, start="project"), model, torch.randn(2, 3, 64, 64), quiet=True)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_it_prints_a_table_by_itself_with_rich_and_plain_text_without(tiny, capsys, monkeypatch):
    groups = pom_param_groups(tiny)
    describe(groups)
    rich = capsys.readouterr().out
    assert "Weights on products of manifolds" in rich
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    found = describe(groups)
    plain = capsys.readouterr().out
    assert plain.strip() == str(found)
    for text in (rich, plain):
        assert re.search(
            r"conv\.weight .*6x4x3x3 .*kernel .*3 x 3 .*24 .*3 .*8 sphere, 8 oblique, 8 stiefel .*1 ", text
        )
        assert re.search(r"conv\.bias and \d more .*bias", text)
        assert re.search(r"\d\d\.\d% of [\d,]+ numbers constrained, in 6 weights", text)


def test_a_live_optimizer_shows_its_radii(tiny):
    optimizer = FGSGD(pom_param_groups(tiny), lr=0.1)
    optimizer.rescale(tiny.conv.weight, torch.linspace(0.5, 2, 24))
    row = describe(optimizer, quiet=True).rows[0]
    assert (row["radius_min"], row["radius_max"]) == (0.5, 2.0)
    assert "0.5 to 2" in str(describe(optimizer, quiet=True))


def test_the_grouping_callback_prints_it_when_asked_to(tmp_path, capsys):
    trainer(tmp_path, POMGrouping(), max_epochs=1).fit(LitTiny(), loader())
    assert "Weights on products" not in capsys.readouterr().out
    trainer(tmp_path, POMGrouping(verbose=True), max_epochs=1).fit(LitTiny(), loader())
    assert "model.conv.weight" in capsys.readouterr().out


def test_a_batch_needs_a_model(tiny):
    with pytest.raises(ValueError, match="model: it is needed to run the batch through"):
        describe(pom_param_groups(tiny), batch=torch.randn(1))


def mlp(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def test_two_models_with_the_same_names_are_told_apart():
    a, b, x = mlp(0), mlp(1), torch.randn(5, 8)
    before = a(x)
    groups = [
        *pom_param_groups(a, start="project", exclude=["2.weight"]),
        *pom_param_groups(b, start="preserve", include=["2.weight"]),
    ]
    optimizer = FGSGD(groups, lr=0.1)
    found = describe(optimizer, a, x, quiet=True)
    assert found.totals["output_change"] == pytest.approx(float((a(x) - before).norm() / before.norm()), rel=1e-5)
    assert found.totals["output_change"] > 0.01
    first, second = found.rows[:4], found.rows[4:]
    assert [row["reason"] for row in (first[2], second[0])] == ["in exclude", "not in include"]
    assert first[0]["change"] > 0.01
    assert second[2]["change"] == 0
    both = describe(FGSGD([*pom_param_groups(mlp(2)), *pom_param_groups(mlp(3))]), quiet=True).scalars()
    assert {"pom/change/0.weight", "pom/change/0.weight (2)"} <= set(both)


def test_frozen_weights_are_not_counted_as_constrained_nor_placed():
    net, x = mlp(0), torch.randn(5, 8)
    net[0].weight.requires_grad_(False)
    groups = pom_param_groups(net, start="project")
    planned = describe(groups, net, x, quiet=True)
    before = net(x)
    optimizer = FGSGD(groups, lr=0.1)
    change = float((net(x) - before).norm() / before.norm())
    for found in (planned, describe(optimizer, net, x, quiet=True)):
        assert (found.rows[0]["constrained"], found.rows[0]["reason"]) == (False, "frozen")
        assert found.totals["layers"] == 1
        assert found.totals["output_change"] == pytest.approx(change, rel=1e-5)


def test_after_a_step_it_is_not_known_what_placing_changed():
    net, x = mlp(0), torch.randn(5, 8)
    optimizer = FGSGD(pom_param_groups(net, start="project"), lr=0.1)
    net(x).square().mean().backward()
    optimizer.step()
    found = describe(optimizer, net, x, quiet=True)
    assert found.totals["output_change"] is None
    assert "changes the output" not in str(found)


def test_dropout_is_the_same_before_and_after():
    net, x = torch.nn.Sequential(mlp(0), torch.nn.Dropout(0.5)), torch.randn(50, 8)
    assert describe(pom_param_groups(net), net, x, quiet=True).totals["output_change"] == 0
    state = torch.get_rng_state()
    describe(pom_param_groups(net), net, x, quiet=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_of_zeros_has_no_relative_change():
    net = mlp(0)
    torch.nn.init.zeros_(net[0].weight)
    found = describe(pom_param_groups(net, start="random"), quiet=True)
    assert found.rows[0]["change"] is None
    assert "pom/change/0.weight" not in found.scalars()


def test_parameters_without_a_plan_are_counted():
    found = describe(FGSGD(mlp(0).parameters(), lr=0.1), quiet=True)
    assert found.totals["parameters"] == 8 * 16 + 16 + 16 * 4 + 4
    assert {row["reason"] for row in found.rows} == {"given without a plan"}


def test_a_model_that_puts_out_more_than_a_tensor_is_refused_by_name():
    net = torch.nn.LSTM(3, 4)
    with pytest.raises(TypeError, match="model: its output is a tuple"):
        describe(pom_param_groups(net), net, torch.randn(2, 5, 3), quiet=True)
