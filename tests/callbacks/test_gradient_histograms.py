"""Histograms of all entries of the per-sample gradients: exact counts, judged by brute force."""

import numpy as np
import pytest
import torch
from monitoring import ManualNet, Net, Scaled, events, fit, per_sample_gradients
from torch import nn

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.monitoring import histograms, report
from lightning_curv.callbacks.monitoring.histograms import (
    COARSE,
    FINE,
    histogram_1d,
    image_2d,
    limits,
)

pytestmark = pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning")
BOTH = ["grad_hist_1d", "grad_hist_2d"]


def bins_of(values, per_decade):
    """The bin of every value, the naive way: how many upper limits are smaller."""
    bounds = limits(per_decade).numpy()
    return np.array([sum(bound < value for bound in bounds) for value in values.tolist()])


def brute_force(net, step):
    """Counts of all bins, in one and in two dimensions."""
    gradients = per_sample_gradients(net, step)
    one = np.bincount(bins_of(gradients.flatten(), FINE), minlength=len(limits(FINE)) + 1)
    params = torch.cat([p.flatten() for p in next(s for s in net.seen if s[0] == step)[1].values()])
    bins = len(limits(COARSE)) + 1
    joint = np.zeros((bins, bins))
    columns = bins_of(params, COARSE)
    for row in gradients:
        np.add.at(joint, (bins_of(row, COARSE), columns), 1)
    return one, joint


def found_1d(tmp_path):
    """By step: {upper limit: count}."""
    values = {}
    for event in events(tmp_path).Histograms("curvature/grad_hist_1d"):
        held = event.histogram_value
        values[event.step] = dict(zip(held.bucket_limit, held.bucket, strict=True))
    return values


@pytest.mark.parametrize("accumulate", [1, 2])
def test_counts_are_exact(tmp_path, monkeypatch, accumulate):
    pictures, net = [], Net()
    monkeypatch.setattr(report, "image_2d", lambda c: (pictures.append(c), image_2d(c))[1])
    fit(net, CurvatureCallback(BOTH), tmp_path=tmp_path, accumulate_grad_batches=accumulate)
    found = found_1d(tmp_path)
    assert len(found) == len(pictures) == 8 // accumulate
    for step in found:
        one, joint = brute_force(net, step)
        upper = [*limits(FINE).tolist(), np.inf]
        truth = {round(limit, 30): count for limit, count in zip(upper, one) if count}
        counted = {round(limit, 30): count for limit, count in found[step].items() if count}
        assert list(counted.values()) == list(truth.values())
        assert list(counted) == pytest.approx(list(truth), rel=1e-6)
        assert pictures[step].reshape(joint.shape).tolist() == joint.tolist()
        assert joint.sum() == one.sum() == 6 * accumulate * sum(p.numel() for p in net.parameters())


def test_a_scaler_and_manual_optimization(tmp_path):
    fit(Net(), CurvatureCallback(BOTH), tmp_path=tmp_path / "a", precision="32-true")
    fit(Net(), CurvatureCallback(BOTH), tmp_path=tmp_path / "b", precision=None,
        plugins=[Scaled()])  # fmt: skip
    assert found_1d(tmp_path / "a") == found_1d(tmp_path / "b")
    net = ManualNet()  # two passes, of half of the batch each
    fit(net, CurvatureCallback(BOTH), tmp_path=tmp_path / "c")
    fit(Net(), CurvatureCallback(BOTH), tmp_path=tmp_path / "d")
    manual, automatic = found_1d(tmp_path / "c")[0], found_1d(tmp_path / "d")[0]
    # the bins of two passes are twice as wide, as a sample's gradient is twice what a pass has
    assert sum(manual.values()) == sum(automatic.values())
    mean = [
        sum(limit * n for limit, n in found.items() if limit < 1e9) for found in (manual, automatic)
    ]
    assert mean[0] == pytest.approx(mean[1], rel=0.3, abs=1.0)


def test_some_samples_are_counted_alone(tmp_path):
    fit(Net(), CurvatureCallback(BOTH, max_samples=2), tmp_path=tmp_path)
    parameters = sum(p.numel() for p in Net().parameters())
    assert {sum(found.values()) for found in found_1d(tmp_path).values()} == {2 * parameters}


def test_bins_hold_zeros_infinities_and_nothing():
    counts = np.zeros(len(limits(FINE)) + 1)
    assert histogram_1d(counts, 1.0) == {}
    assert image_2d(np.zeros((len(limits(COARSE)) + 1) ** 2)) is None
    for value, index in ((0.0, len(limits(FINE)) // 2), (1e9, len(counts) - 1), (-1e9, 0)):
        assert torch.bucketize(torch.tensor(value), limits(FINE).float()) == index
    counts[[0, -1]] = 3
    found = histogram_1d(counts, 2.0)
    assert found["num"] == 6
    assert np.isfinite([found["min"], found["max"], found["sum_squares"]]).all()
    assert histogram_1d(counts, np.nan) == {}


def test_the_picture_has_gradients_upwards_and_values_to_the_right():
    bins = len(limits(COARSE)) + 1
    counts = np.zeros((bins, bins))
    counts[bins - 1, 0], counts[0, bins - 1], counts[0, 0] = 100, 1, 1
    image = image_2d(counts.flatten(), pixels=1)
    assert image.shape == (3, bins, bins)
    bright, dim = image[:, 0, 0], image[:, -1, -1]  # large gradient of a negative value: top left
    assert bright.sum() > dim.sum() > 0
    assert not image[:, 0, -1].any()


def test_images_are_in_the_event_file(tmp_path):
    fit(Net(), CurvatureCallback(BOTH), tmp_path=tmp_path, epochs=1)
    assert len(events(tmp_path).Images("curvature/grad_hist_2d")) == 4
    fit(Net(), CurvatureCallback(BOTH, histograms=False), tmp_path=tmp_path / "none", epochs=1)
    assert not events(tmp_path / "none").Tags()["histograms"]


def test_batch_norm_leaves_them_out(tmp_path):
    net = Net()
    net.net.insert(1, nn.BatchNorm1d(6))
    with pytest.warns(UserWarning, match="leaves out grad_hist_1d, grad_hist_2d: .*batch_norm"):
        fit(net, CurvatureCallback([*BOTH, "grad_norm"], strict=False), tmp_path=tmp_path)
    assert not events(tmp_path).Tags()["histograms"]


def test_a_preview_has_their_price():
    batch = (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))

    class Previewed(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(self(batch[0]), batch[1])

    table = CurvatureCallback.preview(Previewed(), batch, quantities=BOTH)
    assert [row.path for row in table.rows] == ["exact"] * 2
    assert all(row.price > 0 for row in table.rows)


def test_chunks_of_samples_and_of_entries_add_up(tmp_path, monkeypatch):
    fit(Net(), CurvatureCallback(BOTH), tmp_path=tmp_path / "a", epochs=1)
    monkeypatch.setattr(histograms, "CHUNK", 7)
    fit(Net(), CurvatureCallback(BOTH), tmp_path=tmp_path / "b", epochs=1)
    assert found_1d(tmp_path / "a") == found_1d(tmp_path / "b")
