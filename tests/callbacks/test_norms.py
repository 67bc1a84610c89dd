import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_fgsgd import NormBoundMonitor, POMGrouping
from tests.lit import LitBase, LitTiny, loader, trainer


def test_norms_of_unit_stiefel_kernels_are_those_of_table_2(tmp_path):
    monitor = NormBoundMonitor(every_n_epochs=2)
    logger = CSVLogger(tmp_path)
    fit = trainer(tmp_path, POMGrouping(manifolds=["stiefel"], start="project"), monitor, max_epochs=4, logger=logger)
    fit.fit(LitTiny(), loader())
    assert [row["epoch"] for row in monitor.history] == [1, 3]
    conv = monitor.history[-1]["layers"]["model.conv"]
    assert conv["spectral"] == pytest.approx(1, abs=1e-5)
    assert conv["frobenius"] == pytest.approx(3**0.5, abs=1e-5)
    assert conv["l21"] == pytest.approx(3, abs=1e-5)
    assert conv["group_frobenius"] == pytest.approx((24 * 3) ** 0.5, abs=1e-4)
    assert conv["geometric_mean"] == pytest.approx(3**0.5, abs=1e-5)
    logger.save()
    assert "norms/model.conv/spectral" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_it_needs_an_fgsgd(tmp_path):
    class Plain(LitBase):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        MisconfigurationException, match=r"NormBoundMonitor reads the manifolds of an FGSGD.*returned SGD"
    ):
        trainer(tmp_path, NormBoundMonitor()).fit(Plain(), loader())
    with pytest.raises(ValueError, match="every_n_epochs: 0 is not"):
        NormBoundMonitor(every_n_epochs=0)
