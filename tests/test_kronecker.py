"""Kronecker factors against brute force, for KFAC-expand and KFAC-reduce."""

import oracle
import pytest
import torch
from test_ggn import RUNS, assert_unbiased
from zoo import ROW, assert_close, compute

from lightning_curv.extensions import KFAC, KFLR

NAMES = [
    "mlp_sigmoid",
    "mlp_mse",
    "mlp_bce",
    "one_datum",
    "one_datum_cnn",
    "cnn_inplace_groups",
    "conv1d",
    "conv2d_paddings",
    "conv2d_stride_dilation",
    "conv2d_same_dilated",
    "conv3d",
    "groupnorm_cnn",
    "batchnorm_eval_cnn",
    "sequence_linear",
    "layernorm_axes",
    "embedding_padding",
    "language_model",
    "segmentation_ce",
    "segmentation_mse",
]
SHARING = pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])


@SHARING
@pytest.mark.parametrize("name", NAMES)
def test_kflr_equals_brute_force(name, weight_sharing):
    problem = ROW[name].make()
    compute(problem, KFLR(weight_sharing=weight_sharing))
    params = problem.parameters()
    for key, factors in oracle.kronecker(problem, weight_sharing).items():
        assert len(params[key].kflr) == len(factors), key
        for axis, (actual, expected) in enumerate(zip(params[key].kflr, factors)):
            assert_close(actual, expected, label=f"{key}, factor {axis}")


@SHARING
def test_exact_for_one_datum_without_weight_sharing(weight_sharing):
    problem = ROW["one_datum"].make()
    compute(problem, KFLR(weight_sharing=weight_sharing))
    for key, p in problem.parameters().items():
        product = torch.kron(*p.kflr) if len(p.kflr) == 2 else p.kflr[0]
        assert_close(product, oracle.ggn(problem)[key].sum(0), label=key)


@SHARING
@pytest.mark.parametrize("name", ["mlp_sigmoid", "mlp_mse", "mlp_bce", "cnn_inplace_groups", "segmentation_ce"])
def test_kfac_is_unbiased(name, weight_sharing):
    """A has no noise; the mean of B over draws of the labels is the exact B."""
    generator = torch.Generator().manual_seed(0)
    problem = ROW[name].make()
    exact = oracle.kronecker(problem, weight_sharing)
    params = problem.parameters()
    runs = {key: [] for key in exact}
    for _ in range(RUNS):
        compute(problem, KFAC(mc_samples=8, weight_sharing=weight_sharing), generator=generator)
        for key in exact:
            runs[key].append(params[key].kfac)
    for key, run in runs.items():
        assert_unbiased(torch.stack([factors[0] for factors in run]), exact[key][0], key)
        for factors in run[:2]:
            assert_close(factors[1], exact[key][1], label=key) if len(factors) == 2 else None


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_symmetric_and_positive_semidefinite(name):
    problem = ROW[name].make()
    compute(problem, KFLR())
    for key, p in problem.parameters().items():
        for factor in p.kflr:
            if factor.ndim == 1:
                assert (factor >= 0).all(), key
                continue
            assert_close(factor, factor.mT, label=key)
            assert torch.linalg.eigvalsh(factor).min() >= -1e-12 * factor.abs().max(), key


def test_unknown_weight_sharing_is_refused():
    with pytest.raises(ValueError, match="expand"):
        KFLR(weight_sharing="shrink")
