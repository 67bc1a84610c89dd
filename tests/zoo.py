"""Small members of every family of timm: at least one architecture from each of its model files.

They are cut down, in image size, depth or width, so that a step of training takes a moment on a CPU; images not so far
that batch norm sees one pixel of each, where gradients explode.
"""

import sys
from contextlib import ExitStack
from functools import partial
from inspect import signature
from typing import Any, NamedTuple
from unittest import mock

import timm
from timm.models._efficientnet_builder import round_channels
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import nn


class Entry(NamedTuple):
    """An architecture, the side of its square images, and how it is made small.

    ``kwargs`` is what ``timm.create_model`` is given, ``own`` what takes the place of settings that the architecture makes
    itself, and ``thin`` a divisor of its widths, for those that timm has in one size only.
    """

    name: str
    size: int
    kwargs: dict[str, Any]
    thin: int = 1
    own: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    def build(self) -> nn.Module:
        with ExitStack() as stack:
            if self.own:
                file = sys.modules[timm.model_entrypoint(self.name).__module__]
                builds = file.build_model_with_cfg
                stack.enter_context(
                    mock.patch.object(file, "build_model_with_cfg", lambda *a, **kw: builds(*a, **{**kw, **self.own}))
                )
            for layer, arguments in _WIDTHS.items() if self.thin > 1 else ():
                stack.enter_context(
                    mock.patch.object(layer, "__init__", _thinner(layer.__init__, arguments, self.thin))
                )
            return timm.create_model(self.name, **self.kwargs)


_WIDTHS = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.BatchNorm2d: ("num_features",),
    nn.Linear: ("in_features", "out_features"),
}


def _thinner(init: Any, arguments: tuple[str, ...], divisor: int) -> Any:
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = signature(init).bind(self, *args, **kwargs)
        for name in arguments:
            if given.arguments.get(name, 1) > 3:  # not the colours
                given.arguments[name] //= divisor
        init(*given.args, **given.kwargs)

    return __init__


# By name; all of timm's test_* models are among them.
ZOO = [
    Entry("beit_base_patch16_224", 32, {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32}),
    Entry("botnet26t_256", 64, {"img_size": 64, "width_factor": 0.25}),
    Entry("cait_xxs24_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 96}),
    Entry(
        "coat_tiny",
        32,
        {"img_size": 32, "embed_dims": (32, 64, 64, 64), "serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    ),
    Entry("convit_tiny", 32, {"img_size": 32, "depth": 3, "local_up_to_layer": 2}),
    Entry("convmixer_768_32", 96, {}, thin=4),
    Entry("cpubone_nano", 64, {}, own={"width_list": (8, 16, 32, 48, 64)}),
    Entry("crossvit_tiny_240", 32, {}, own={"embed_dim": (24, 48), "depth": ((1, 2, 0), (1, 2, 0))}),
    Entry("cs3darknet_focus_s", 64, {}),
    Entry("csatv2", 64, {"dims": (16, 32, 64, 96)}),
    Entry("cspnext_tiny", 64, {}, thin=2),
    Entry("davit_tiny", 32, {"embed_dims": (24, 48, 96, 192)}),
    Entry("deepseek_vit_412m", 112, {"depth": 1, "embed_dim": 128, "num_heads": 2}),
    Entry("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 2}),
    Entry("deit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
    Entry("densenet121", 64, {"growth_rate": 8}),
    Entry("dla46x_c", 64, {}),
    Entry("dpn48b", 32, {"k_sec": (1, 1, 1, 1)}),
    Entry("edgenext_xx_small", 32, {}),
    Entry("efficientformer_l1", 224, {"embed_dims": (24, 48, 64, 96)}),
    Entry("efficientformerv2_s0", 32, {"img_size": 32, "depths": (1, 1, 3, 2)}, own={"embed_dims": (16, 32, 48, 64)}),
    Entry("efficientnet_cc_b0_4e", 64, {}, own={"round_chs_fn": partial(round_channels, multiplier=0.25)}),
    Entry("efficientvim_m1", 96, {"embed_dim": (32, 48, 64)}),
    Entry("efficientvit_b0", 64, {}),
    Entry("efficientvit_m0", 64, {}),
    Entry("ese_vovnet19b_slim_dw", 64, {}),
    Entry("fasternet_t0", 32, {"embed_dim": 16}),
    Entry("fastvit_t8", 32, {}),
    Entry("focalnet_tiny_srf", 32, {}, own={"embed_dim": 24}),
    Entry("gcvit_xxtiny", 32, {"img_size": 32, "embed_dim": 16}),
    Entry("gemma4_vit_167m", 96, {"depth": 1, "embed_dim": 128, "num_heads": 2}),
    Entry("ghostnet_050", 64, {}),
    Entry("gmlp_ti16_224", 32, {"img_size": 32}, own={"embed_dim": 64, "num_blocks": 6}),
    Entry("halonet26t", 64, {"output_stride": 8, "width_factor": 0.25}),
    Entry("hardcorenas_b", 64, {}, thin=4),
    Entry("hgnetv2_b0", 64, {}, thin=4),
    Entry("hiera_tiny_224", 32, {"img_size": 32, "embed_dim": 24}),
    Entry("hrnet_w18_small", 64, {}, thin=2),
    Entry("iformer_t", 64, {}, own={"dims": (16, 32, 64, 96)}),
    Entry("inception_next_atto", 32, {"dims": (16, 32, 48, 64)}),
    Entry("inception_resnet_v2", 128, {}, thin=8),
    Entry("inception_v3", 128, {}, thin=4),
    Entry("inception_v4", 128, {}, thin=8),
    Entry("lambda_resnet26rpt_256", 64, {"img_size": 64, "width_factor": 0.25}),
    Entry("lambda_resnet26t", 64, {"width_factor": 0.25}),
    Entry("lcnetv2_small", 96, {"head_hidden_size": 64}),
    Entry("legacy_seresnet18", 64, {"layers": (1, 1, 1, 1)}, thin=4),
    Entry("legacy_xception", 32, {}, thin=4),
    Entry("levit_128s", 32, {"img_size": 32, "depth": (1, 1, 1)}, own={"embed_dim": (32, 64, 96)}),
    Entry("lowformer_b0", 64, {"head_widths": (64, 64), "width_list": (8, 16, 32, 48, 64)}),
    Entry("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64, "embed_dim": (32, 64, 96, 128)}),
    Entry("mixnet_s", 64, {}, own={"round_chs_fn": partial(round_channels, multiplier=0.5)}),
    Entry("mobilenetv3_small_050", 32, {}),
    Entry("mobilenetv5_base", 64, {"channel_multiplier": 0.125, "num_features": 64}),
    Entry("mobilevit_xxs", 64, {}),
    Entry("mvitv2_tiny", 32, {}, own={"model_cfg": MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=(24, 48, 96, 192))}),
    Entry("naflexvit_base_patch16_gap", 32, {"depth": 2, "embed_dim": 64, "num_heads": 2}),
    Entry("nasnetalarge", 96, {"stem_size": 16, "num_features": 384}),
    Entry("nest_tiny", 32, {"img_size": 32}, own={"embed_dims": (24, 48, 96)}),
    Entry("nextvit_small", 64, {"depths": (1, 1, 5, 1)}),  # its widths are fixed
    Entry("nf_resnet26", 32, {"channels": (32, 64, 96, 128)}),
    Entry("pit_ti_224", 32, {"img_size": 32, "depth": (1, 1, 1)}),
    Entry("pnasnet5large", 96, {}, thin=6),
    Entry("poolformerv2_s12", 32, {}, own={"dims": (16, 32, 64, 96)}),
    Entry("pvt_v2_b0", 32, {"depths": (1, 1, 1, 1)}),
    Entry("qwen3_vit_88m", 64, {"depth": 1, "embed_dim": 128, "num_heads": 2}),
    Entry("rdnet_tiny", 32, {"num_init_features": 16, "growth_rates": (16, 16, 16, 16, 16, 16, 16)}),
    Entry("regnetx_002", 32, {}),
    Entry("repghostnet_050", 32, {}),
    Entry("repvit_m1", 32, {}, own={"embed_dim": (24, 48, 96, 128)}),
    Entry("res2next50", 32, {"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128)}),
    Entry("resnest14d", 32, {"channels": (32, 64, 96, 128)}),
    Entry("resnet50_clip", 32, {"width_factor": 0.25, "img_size": 32}),
    Entry("resnetv2_18", 32, {"channels": (32, 64, 96, 128)}),
    Entry("resnetv2_50x1_bit", 32, {"channels": (128, 256, 512, 1024), "stem_chs": 32}, own={"layers": (1, 1, 1, 1)}),
    Entry("rexnet_100", 32, {"width_mult": 0.25}),
    Entry("sam2_hiera_tiny", 32, {"embed_dim": 24}),
    Entry(
        "samvit_base_patch16_224",
        64,
        {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64, "global_attn_indexes": [1]},
    ),
    Entry("selecsls42", 96, {}, thin=4),
    Entry(
        "sequencer2d_s", 32, {"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64), "hidden_sizes": (8, 16, 16, 16)}
    ),
    Entry("shvit_s1", 32, {"depth": (1, 1, 1), "embed_dim": (64, 96, 128)}),
    Entry("skresnet18", 96, {"channels": (32, 64, 96, 128)}),
    Entry("starnet_s050", 32, {}),
    Entry("swiftformer_xs", 32, {"embed_dims": (16, 32, 48, 64)}),
    Entry("swin_tiny_patch4_window7_224", 32, {"img_size": 32, "embed_dim": 24}),
    Entry("swinv2_cr_tiny_224", 32, {"img_size": 32, "embed_dim": 24}),
    Entry("swinv2_tiny_window8_256", 32, {"img_size": 32, "embed_dim": 24}),
    Entry("test_byobnet", 32, {}),
    Entry("test_coatnet", 32, {"img_size": 32}),
    Entry("test_convnext", 32, {}),
    Entry("test_convnext2", 32, {}),
    Entry("test_convnext3", 32, {}),
    Entry("test_efficientnet", 32, {}),
    Entry("test_efficientnet_evos", 32, {}),
    Entry("test_efficientnet_gn", 32, {}),
    Entry("test_efficientnet_ln", 32, {}),
    Entry("test_mambaout", 32, {}),
    Entry("test_maxvit", 32, {"img_size": 32}),
    Entry("test_nfnet", 32, {}),
    Entry("test_resnet", 32, {}),
    Entry("test_vit", 32, {}),
    Entry("test_vit2", 32, {}),
    Entry("test_vit3", 32, {"img_size": 32}),
    Entry("test_vit4", 32, {}),
    Entry("test_vit_relpos", 32, {"img_size": 32}),
    Entry("tf_efficientnet_lite0", 64, {}, thin=2),
    Entry("tiny_vit_5m_224", 32, {"embed_dims": (32, 64, 96, 128), "num_heads": (2, 4, 3, 4)}),
    Entry("tnt_s_legacy_patch16_224", 32, {"img_size": 32, "depth": 1}),
    Entry("tresnet_m", 32, {"width_factor": 0.25, "layers": (1, 1, 1, 1)}),
    Entry("twins_svt_small", 32, {"embed_dims": (32, 64, 96, 128), "depths": (2, 2, 2, 2)}),
    Entry("vgg11", 32, {"mlp_ratio": 1 / 256}, thin=4),
    Entry("visformer_tiny", 32, {"img_size": 32, "embed_dim": 96, "depth": (1, 1, 1)}),
    Entry("vit_base_patch16_siglip_224", 32, {"depth": 1, "img_size": 32, "embed_dim": 96, "num_heads": 3}),
    Entry("vit_base_patch16_siglip_gap_224", 32, {"depth": 1, "img_size": 32, "embed_dim": 96, "num_heads": 3}),
    Entry("vit_tiny_patch16_dinov3_qkvb", 32, {"depth": 2}),
    Entry("vit_tiny_r_s16_p8_224", 32, {"img_size": 32, "depth": 2}),
    Entry("vitamin_small_224", 32, {"img_size": 32, "depth": 1}),
    Entry("volo_d1_224", 32, {"img_size": 32}, own={"embed_dims": (48, 96, 96, 96), "layers": (2, 2, 2, 1)}),
    Entry("xception41p", 32, {}, thin=4),
    Entry("xcit_nano_12_p8_224", 32, {"depth": 2}),
]

BY_NAME = {entry.name: entry for entry in ZOO}

# A few that differ in what they hold: functional qkv, shared modules, experts, tables, LSTMs, standardised weights,
# an auxiliary head.
SAMPLE = [
    BY_NAME[name]
    for name in (
        "beit_base_patch16_224",
        "coat_tiny",
        "efficientnet_cc_b0_4e",
        "gemma4_vit_167m",
        "mvitv2_tiny",
        "naflexvit_base_patch16_gap",
        "nf_resnet26",
        "resnetv2_50x1_bit",
        "sequencer2d_s",
        "swinv2_tiny_window8_256",
        "test_convnext",
        "test_resnet",
        "test_vit",
        "volo_d1_224",
    )
]
