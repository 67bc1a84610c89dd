"""Train and fine-tune timm models in PyTorch Lightning with their weights held on products of manifolds.

After *Fine-grained Optimization of Deep Neural Networks*, Mete Ozay, NeurIPS 2019.
"""

from lightning_fgsgd.__about__ import __version__
from lightning_fgsgd.callbacks import FeatureStdRescaling, NormBoundMonitor, POMGrouping, POMProjection
from lightning_fgsgd.describe import describe
from lightning_fgsgd.export import export_timm
from lightning_fgsgd.module import FGSGDMixin
from lightning_fgsgd.optimizer import FGSGD
from lightning_fgsgd.plan import pom_param_groups
from lightning_fgsgd.schedules import RobbinsMonroLR, check_step_sizes
from lightning_fgsgd.statistics import FeatureStd

__all__ = [
    "FGSGD",
    "FGSGDMixin",
    "FeatureStd",
    "FeatureStdRescaling",
    "NormBoundMonitor",
    "POMGrouping",
    "POMProjection",
    "RobbinsMonroLR",
    "__version__",
    "check_step_sizes",
    "describe",
    "export_timm",
    "pom_param_groups",
]
