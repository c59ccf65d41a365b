"""The critical batch size as a picture, from every place where it may be logged."""

import math

import matplotlib
import pytest
from monitoring import Net, fit, series
from pytorch_lightning.loggers import CSVLogger

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks import plot_critical_batch_size

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning")


def drawn(axes):
    """The points of the first line."""
    return dict(zip(*(values.tolist() for values in axes.lines[0].get_data())))


def test_it_reads_what_loggers_wrote(tmp_path):
    settings = {"size": 96, "batch_size": 24}
    callback = CurvatureCallback(["noise_scale"])
    fit(Net(), callback, tmp_path=tmp_path / "board", **settings)
    logger = CSVLogger(tmp_path, name="", version="sheet", flush_logs_every_n_steps=1)
    fit(Net(), CurvatureCallback(["noise_scale"]), logger=logger, **settings)
    truth = series(tmp_path / "board", "noise_scale")
    assert len(truth) > 2
    for place in (tmp_path / "board", tmp_path / "sheet" / "metrics.csv", truth):
        assert drawn(plot_critical_batch_size(place)) == pytest.approx(truth, rel=1e-4)


def test_areas_say_whether_the_batch_is_too_small(tmp_path):
    axes = plot_critical_batch_size({0: 4.0, 10: 256.0, 5: 16.0}, batch_size=32)
    assert [*drawn(axes)] == [0, 5, 10]  # sorted
    green, red = axes.collections
    assert min(green.get_paths()[0].vertices[:, 1]) == pytest.approx(32, rel=0.01)
    assert max(red.get_paths()[0].vertices[:, 1]) == pytest.approx(32, rel=0.01)
    axes.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_it_draws_into_axes_that_are_given():
    from matplotlib.figure import Figure

    given = Figure().add_subplot()
    assert plot_critical_batch_size({1: 2.0}, axes=given) is given


@pytest.mark.parametrize("logged", [{}, {0: math.nan, 1: -1.0}])
def test_nothing_to_draw_is_an_error(tmp_path, logged):
    for place in (logged, tmp_path):
        with pytest.raises(
            ValueError, match="positive values of curvature/noise_scale, found none"
        ):
            plot_critical_batch_size(place)
