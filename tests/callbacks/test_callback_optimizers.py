"""`CurvatureCallback` supplies curvature optimizers, and changes no training run."""

import pytest
import torch
from monitoring import (
    WITH_TRACE,
    ManualNet,
    Net,
    Scaled,
    adam,
    assert_nothing_left_behind,
    assert_same_parameters,
    assert_same_parameters_up_to_rounding,
    cross_entropy_mean,
    cross_entropy_sum,
    data,
    fit,
    kfac,
    sgd,
)

from lightning_curv import BatchGrad, CurvatureCallback, DiagGGNOptimizer, KFACOptimizer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:At step .* are too small:UserWarning"
    ),  # they are, for speed
    pytest.mark.filterwarnings(
        "ignore:(?s).*(deprecated in v4|LightningCLI's args)"
    ),  # Lightning and jsonargparse
]


def repeated(times, dtype=torch.float64):
    """Batches of which `times` successive ones are equal, and the same samples in batches that are as much larger."""
    x, y = data(12, dtype).tensors
    small = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
    return [batch for batch in small for _ in range(times)], [
        (x.repeat(times, 1), y.repeat(times)) for x, y in small
    ]


@pytest.mark.parametrize("precision", ["64-true", "scaler"])
@pytest.mark.parametrize("loss", [cross_entropy_mean, cross_entropy_sum])
@pytest.mark.parametrize("optimizer", [KFACOptimizer, DiagGGNOptimizer])
def test_curvature_optimizers_see_the_curvature_of_the_accumulated_loss(optimizer, loss, precision):
    """Two equal micro-batches make the step of the batch of twice the size: no `curvature_scale` is needed."""

    def build(params):
        return optimizer(params, lr=0.3, damping=0.01, curvature="exact")

    settings = {"precision": precision}
    if precision == "scaler":
        settings = {"precision": None, "plugins": [Scaled()]}
    accumulated = Net(build, loss)
    whole = Net(
        build, loss if loss is cross_entropy_mean else lambda output, y: loss(output, y) / 2
    )
    micro, doubled = repeated(2, torch.float64 if precision == "64-true" else torch.float32)
    fit(
        accumulated,
        CurvatureCallback(every_n_steps=0),
        loader=micro,
        accumulate_grad_batches=2,
        **settings,
    )
    fit(whole, CurvatureCallback(every_n_steps=0), loader=doubled, **settings)
    assert len(accumulated.seen) == 2 * len(whole.seen) == 16
    assert_same_parameters_up_to_rounding(accumulated, whole)


@pytest.mark.parametrize("lr", [0.3, "auto"])
@pytest.mark.parametrize("optimizer", [KFACOptimizer, DiagGGNOptimizer])
def test_curvature_is_that_of_all_micro_batches(optimizer, lr):
    def build(params):
        return optimizer(params, lr=lr, damping=0.01, curvature="exact")

    x, y = data(24, torch.float64).tensors
    micro, whole = ([(x[i : i + n], y[i : i + n]) for i in range(0, 24, n)] for n in (3, 6))
    accumulated, plain = Net(build, cross_entropy_mean), Net(build, cross_entropy_mean)
    fit(
        accumulated,
        CurvatureCallback(every_n_steps=0),
        loader=micro,
        accumulate_grad_batches=2,
        precision="64-true",
    )
    fit(plain, CurvatureCallback(every_n_steps=0), loader=whole, precision="64-true")
    assert_same_parameters_up_to_rounding(accumulated, plain)


def test_manual_accumulation_declares_its_scale():
    """In manual optimization the callback supplies the last backward pass, here the half of a mean."""

    class Halves(ManualNet):
        def configure_optimizers(self):
            optimizer = KFACOptimizer(self.parameters(), lr=0.3, damping=0.01, curvature="exact")
            optimizer.curvature_scale = 2
            return optimizer

    def build(params):
        return KFACOptimizer(params, lr=0.3, damping=0.01, curvature="exact")

    halves, whole, (_, doubled) = Halves(), Net(build), repeated(2)
    fit(halves, CurvatureCallback(every_n_steps=0), loader=doubled)
    fit(whole, CurvatureCallback(every_n_steps=0), loader=doubled)
    assert_same_parameters_up_to_rounding(halves, whole)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (Net, {}),
        (Net, {"accumulate_grad_batches": 2}),
        (Net, {"gradient_clip_val": 0.1}),
        (Net, {"precision": "bf16-mixed"}),
        (ManualNet, {}),
        (ManualNet, {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
def test_parameters_are_bit_identical_with_and_without(net, optimizer, settings):
    one, other = net(optimizer=optimizer, dropout=0.5), net(optimizer=optimizer, dropout=0.5)
    fit(one, **settings)
    fit(other, CurvatureCallback(WITH_TRACE), **settings)
    assert_same_parameters(one, other)


def test_curvature_optimizer_is_supplied_on_the_steps_that_it_asks_for():
    class Asks(torch.optim.SGD):
        asked, got = 0, []

        def required_extensions(self):
            Asks.asked += 1
            return (BatchGrad(),) if Asks.asked % 2 else ()

        def step(self, closure=None):
            loss = super().step(closure)
            Asks.got.append(
                all(
                    hasattr(p, "grad_batch") for group in self.param_groups for p in group["params"]
                )
            )
            return loss

    net = Net(optimizer=lambda params: Asks(params, lr=0.1))
    fit(net, CurvatureCallback(every_n_steps=0), epochs=1)
    assert Asks.got == [True, False, True, False]
    assert_nothing_left_behind(net)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "logging",
    [
        (CurvatureCallback(every_n_steps=1),),
        (CurvatureCallback(every_n_steps=1, mc_samples=3),),
        (CurvatureCallback(every_n_steps=2, mc_samples=0),),
        (CurvatureCallback("all", every_n_steps=1),),
        (CurvatureCallback(every_n_steps=0), CurvatureCallback(every_n_steps=1)),
    ],
)
def test_logging_does_not_change_a_curvature_optimizer(logging, accumulate):
    one, other = Net(optimizer=kfac), Net(optimizer=kfac)
    fit(one, CurvatureCallback(every_n_steps=0), accumulate_grad_batches=accumulate)
    fit(other, *logging, accumulate_grad_batches=accumulate)
    assert_same_parameters(one, other)
    assert_nothing_left_behind(other)
