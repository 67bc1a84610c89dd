"""timm's architectures as they are: what is constrained in each, and that each trains, however it uses its weights."""

import warnings
from collections import Counter
from functools import partial
from itertools import cycle

import pytest
import timm
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from timm.layers import CondConv2d
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from lightning_fgsgd import FeatureStdRescaling, FGSGDMixin, POMGrouping, pom_param_groups
from lightning_fgsgd.grouping import SCHEMES
from lightning_fgsgd.plan import draw_plan
from lightning_fgsgd.selection import head_parameters
from tests.lit import trainer
from tests.zoo import BY_NAME, SAMPLE, ZOO

# All their convolutions standardise their weights, so that nothing is left to constrain but by normalized=True.
STANDARDISED = {"nf_resnet26", "resnetv2_50x1_bit"}
# All that is constrained reads zeros at first: squeeze-and-excite behind residual branches that start at zero.
DARK = {"test_nfnet"}
# Files with less than 99 % of their numbers, heads apart, in weights: others are position embeddings, norms.
WITH_MUCH_ELSE = {
    "efficientformer_v2": 0.98,
    "gemma4_vit": 0.94,
    "ghostnet": 0.98,
    "naflexvit": 0.97,
    "nest": 0.98,
    "repghost": 0.98,
    "vision_transformer_sam": 0.98,
}
STANDARDISES = "its layer normalises the weight itself"
NO_REASON = "no layer says how it is used"


def names(entries):
    return [entry.name for entry in entries]


# What is constrained --------------------------------------------------------------------------------------------------


def plan_of(model):
    """The plan of a model, every one of whose parameters is in it once, with a reason that means something."""
    plan = draw_plan(model)
    constrained, euclidean = [weight.name for weight in plan.weights.values()], list(plan.euclidean)
    assert Counter(constrained + euclidean) == Counter(name for name, _ in model.named_parameters())
    nameless = [name for name, reason in plan.euclidean.items() if not reason or reason == NO_REASON]
    assert not nameless
    return plan


def numbers(params):
    return sum(p.numel() for p in params)


def test_the_zoo_has_every_file_of_timm_and_every_test_model():
    missing = {file for file in timm.list_modules() if not set(timm.list_models(module=file)) & set(BY_NAME)}
    assert not missing
    assert set(timm.list_models("test_*")) <= set(BY_NAME)
    assert names(ZOO) == sorted(BY_NAME)


@pytest.mark.parametrize("entry", SAMPLE, ids=names(SAMPLE))
def test_every_parameter_of_a_sample_is_constrained_or_has_a_reason(entry):
    with torch.device("meta"):
        model = entry.build()
    plan = plan_of(model)
    weights = {
        f"{path}.{attr}".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LSTM, CondConv2d))
        for attr in module._parameters
        if attr.startswith("weight")
    }
    left_out = {plan.euclidean[name] for name in weights & set(plan.euclidean)}
    assert left_out - {"components of a single number"} <= {"classifier head", STANDARDISES}
    assert (not plan.weights) == (STANDARDISES in left_out) == (entry.name in STANDARDISED)


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("beit_base_patch16_224", "blocks.0.attn.relative_position_bias_table", "table"),
        ("beit_base_patch16_224", "blocks.0.attn.q_bias", "bias"),
        ("beit_base_patch16_224", "blocks.0.gamma_1", "gain"),
        ("beit_base_patch16_224", "cls_token", "token"),
        ("coat_tiny", "cls_token1", "token"),
        ("gemma4_vit_167m", "encoder.patch_embed.position_embedding_table", "table"),
        ("mvitv2_tiny", "stages.0.blocks.0.attn.rel_pos_h", "table"),
        ("naflexvit_base_patch16_gap", "embeds.pos_embed", "position embedding"),
        ("naflexvit_base_patch16_gap", "embeds.reg_token", "token"),
        ("nf_resnet26", "stages.0.0.conv1.weight", STANDARDISES),
        ("nf_resnet26", "stages.0.0.conv1.gain", "gain"),
        ("resnetv2_50x1_bit", "stem.conv.weight", STANDARDISES),
        ("sequencer2d_s", "stages.0.blocks.0.rnn_tokens.rnn_v.bias_hh_l0", "bias"),
        ("swinv2_tiny_window8_256", "layers.0.blocks.0.attn.logit_scale", "gain"),
        ("test_resnet", "bn1.weight", "norm"),
        ("test_resnet", "bn1.bias", "bias"),
        ("test_resnet", "fc.weight", "classifier head"),
        ("test_vit", "pos_embed", "position embedding"),
        ("test_vit", "blocks.0.norm1.weight", "norm"),
        ("volo_d1_224", "aux_head.weight", "classifier head"),
    ],
)
def test_parameters_stay_euclidean_for_the_reason_that_is_theirs(name, parameter, reason):
    with torch.device("meta"):
        model = BY_NAME[name].build()
    assert plan_of(model).euclidean[parameter] == reason


FILLS = {"normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_", "sub_", "div_", "fill_", "zero_", "copy_"}


class Unfilled(TorchFunctionMode):
    """Fills nothing: tensors on the meta device have no numbers, and going through the motions takes most of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        target = args[0] if args else None
        if func.__name__ in FILLS and isinstance(target, torch.Tensor) and target.is_meta:
            return target
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_every_parameter_of_every_architecture_is_constrained_or_has_a_reason(record_property, monkeypatch):
    # Of no matter here: billions of draws, and numbers for weights that have none.
    monkeypatch.setattr("lightning_fgsgd.plan.draw_index_sets", lambda *_, **__: None)
    for layer in (nn.Linear, nn.modules.conv._ConvNd):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    files = {}
    for file in timm.list_modules():
        count = files[file] = Counter()
        for name in timm.list_models(module=file):
            with torch.device("meta"), Unfilled():
                model = timm.create_model(name)
            plan = plan_of(model)
            sizes = {n: p.numel() for n, p in model.named_parameters()}
            count["models"] += 1
            count["all"] += sum(sizes.values())
            count["body"] += sum(sizes.values()) - numbers(head_parameters(model))
            count["constrained"] += numbers(plan.weights)
            count["standardised"] += sum(sizes[n] for n, reason in plan.euclidean.items() if reason == STANDARDISES)
    whole = sum(files.values(), Counter())
    lines = [
        f"{'file':28} {'models':>6} {'numbers':>16} {'constrained':>12} {'without heads':>14} {'standardised':>13}"
    ]
    for file, count in [*files.items(), ("all", whole)]:
        of_all, of_body = (count["constrained"] / count[which] for which in ("all", "body"))
        standardised = count["standardised"] / count["all"]
        lines.append(
            f"{file:28} {count['models']:6} {count['all']:16,} {of_all:12.2%} {of_body:14.2%} {standardised:13.2%}"
        )
    record_property("report", "\n".join(lines))  # printed in the end, by conftest.py

    assert whole["models"] == len(timm.list_models())
    assert whole["constrained"] > 0.95 * whole["all"]
    assert whole["constrained"] > 0.96 * whole["body"]
    for file, count in files.items():
        fit_for = count["constrained"] + count["standardised"]
        assert fit_for > WITH_MUCH_ELSE.get(file, 0.99) * count["body"], file


# Training ---------------------------------------------------------------------------------------------------------------


def tensor(output):
    """The output of a model that may return several."""
    return output if isinstance(output, torch.Tensor) else tensor(output[0])


class LitEntry(FGSGDMixin, LightningModule):
    """A model that is to return noise."""

    def __init__(self, model, fused=None):
        super().__init__()
        self.model, self.lr, self.momentum, self.fused = model, 0.01, 0.9, fused
        self.losses = []

    def training_step(self, batch, batch_idx):
        out = tensor(self.model(batch)).float()
        loss = F.mse_loss(out, torch.randn_like(out))
        self.losses.append(loss.item())
        return loss


class Spy(Callback):
    """Looks at the network before the first step, and at its weights after the last one."""

    def __init__(self, image):
        self.image = image

    def on_train_start(self, trainer, pl_module):
        self.logits = logits(pl_module.model, self.image)

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.distances = {pom.name: optimizer.distance(p) for p, pom in optimizer.poms.items()}
        self.schemes = {pom.sets.scheme for pom in optimizer.poms.values()}


@torch.no_grad()
def logits(model, image):
    model.eval()
    out = tensor(model(image))
    model.train()
    return out


def fit(lit, size, folder, *callbacks):
    """Three epochs of a batch of two random images: λ¹, λ² and, before the third, the first R that is not 1."""
    images = DataLoader(torch.randn(6, 3, size, size), batch_size=2, shuffle=True)
    trainer(folder, *callbacks, max_epochs=3, limit_train_batches=1).fit(lit, images)


def trains_on_manifolds(entry, folder, *schemes, fused=None):
    """Of each scheme: the start changes nothing, the steps stay on the manifolds, λ of every weight is gathered.

    Several schemes in one, as ``("pi", "po")``, are those of one layer and the next.
    """
    model, image = entry.build(), torch.randn(1, 3, entry.size, entry.size)
    names = [weight.name for weight in plan_of(model).weights.values()]
    standardised = not names
    assert standardised == (entry.name in STANDARDISED)
    if standardised:
        with pytest.raises(ValueError, match=f"no weight to constrain .*{STANDARDISES}.*normalized=True"):
            pom_param_groups(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    untouched = logits(model, image)
    for scheme in schemes:
        model.load_state_dict(state)
        lit, spy, rescaling = LitEntry(model, fused), Spy(image), FeatureStdRescaling(every_n_batches=1)
        settings = {"start": "preserve", "normalized": standardised}
        if isinstance(scheme, str):
            grouping = POMGrouping(scheme, **settings)
        else:
            names = names or [w.name for w in draw_plan(model, normalized=True).weights.values()]
            turns = zip(names, cycle(scheme), strict=False)
            grouping = POMGrouping(overrides={f"model.{name}": {"scheme": turn} for name, turn in turns}, **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*was not seen")
            fit(lit, entry.size, folder, grouping, rescaling, spy)
        assert (spy.logits - untouched).abs().max() <= 1e-5 * (untouched.max() - untouched.min())
        assert len(lit.losses) == 3
        assert torch.tensor(lit.losses).isfinite().all()
        assert max(spy.distances.values()) <= 1e-5, max(spy.distances, key=spy.distances.get)
        assert spy.schemes == ({scheme} if isinstance(scheme, str) else set(scheme))
        weights = {name.removeprefix("model."): lit.get_parameter(name) for name in spy.distances}
        assert any((p != state[name]).any() for name, p in weights.items())
        layers = [epoch["layers"] for epoch in rescaling.history]
        assert len(layers) == 3
        assert all(set(seen) == {f"model.{name.removesuffix('.weight')}" for name in weights} for seen in layers)
        live = [name for name, layer in layers[0].items() if layer["std"] > 0]  # R = λ¹/λ: where λ¹ is 0 it stays
        assert any(layers[2][name]["radius"] != 1 for name in live) == (entry.name not in DARK)


QUICK = {
    "beit_base_patch16_224": SCHEMES,
    "coat_tiny": ["pi"],
    "efficientnet_cc_b0_4e": ["po"],
    "sequencer2d_s": ["pio"],
    "test_resnet": SCHEMES,
}


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", QUICK)
def test_a_quick_architecture_trains_on_its_manifolds(name, tmp_path):
    trains_on_manifolds(BY_NAME[name], tmp_path, *QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("entry", ZOO, ids=names(ZOO))
def test_every_family_trains_on_its_manifolds(entry, tmp_path):
    # By torch's operations: code would have to be compiled for widths that only these small versions have.
    trains_on_manifolds(entry, tmp_path, SCHEMES, fused=False)


# λ --------------------------------------------------------------------------------------------------------------------


def λ_of(model, size, folder, layers, look):
    """λ of the first epoch of each weight, and what ``look`` makes of the inputs and output of these layers meanwhile."""
    lit, rescaling, seen = LitEntry(model), FeatureStdRescaling(every_n_batches=1), {}

    def hook(name, *call):
        seen.setdefault(name, look(*call))

    for name, layer in lit.named_modules():
        if isinstance(layer, layers):
            layer.register_forward_hook(partial(hook, name))
    fit(lit, size, folder, POMGrouping(), rescaling)
    return {name: layer["std"] for name, layer in rescaling.history[0]["layers"].items()}, seen


def std(features):
    return features.double().std(correction=0).item()


def test_λ_of_qkv_in_beit_is_that_of_what_its_norm_hands_on(tmp_path):
    def look(norm, args, output):
        return std(output)

    entry = BY_NAME["beit_base_patch16_224"]
    model = entry.build()
    for i, block in enumerate(model.blocks):
        nn.init.constant_(block.norm1.weight, 2.0 + i)
    found, seen = λ_of(model, entry.size, tmp_path, nn.LayerNorm, look)
    for i in range(len(model.blocks)):
        assert seen[f"model.blocks.{i}.norm1"] == pytest.approx(2.0 + i, rel=0.01)
        assert found[f"model.blocks.{i}.attn.qkv"] == pytest.approx(seen[f"model.blocks.{i}.norm1"], rel=1e-5)


@torch.no_grad()
def hidden_states(lstm, args, output):
    """std of the hidden states that weight_hh multiplies, for each direction, step by step."""
    found = {}
    for suffix in ("_l0", "_l0_reverse"):
        weights = [getattr(lstm, f"{kind}{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        x = args[0].flip(1) if "reverse" in suffix else args[0]
        h = c = torch.zeros(len(x), lstm.hidden_size)
        entering = []
        for t in range(x.shape[1]):
            entering.append(h)
            h, c = torch.lstm_cell(x[:, t], (h, c), *weights)
        found[suffix] = std(torch.stack(entering))
    return found


def test_λ_of_the_hidden_states_in_a_sequencer_is_that_of_its_lstms_run_by_hand(tmp_path):
    entry = BY_NAME["sequencer2d_s"]
    found, seen = λ_of(entry.build(), entry.size, tmp_path, nn.LSTM, hidden_states)
    by_hand = {f"{name}.weight_hh{suffix}": λ for name, λs in seen.items() for suffix, λ in λs.items()}
    assert set(by_hand) == {name for name in found if "weight_hh" in name}
    assert sum(λ > 0 for λ in by_hand.values()) > 4
    for name, λ in by_hand.items():
        assert found[name] == pytest.approx(λ, rel=1e-5), name
