"""Directional derivatives of the recorded terms against the per-sample Jacobians they stand for."""

import pytest
import torch
from zoo import NAMES, ROW, assert_close, compute

from lightning_curv.extensions import JacobianExact, JacobianMC, SqrtGGNExact, SqrtGGNMC, ggn


@pytest.mark.parametrize("name", NAMES)
def test_dot_is_the_product_with_the_square_root(name):
    problem = ROW[name].make()
    compute(problem, JacobianExact(), SqrtGGNExact(), JacobianMC(2), SqrtGGNMC(2))
    for key, p in problem.parameters().items():
        if p.grad is None:
            continue
        d = torch.randn_like(p)
        for jacobian, root in [
            (p.jacobian_exact, p.sqrt_ggn_exact),
            (p.jacobian_mc, p.sqrt_ggn_mc),
        ]:
            expected = (root * d).reshape(*root.shape[:2], -1).sum(-1)
            assert_close(jacobian.dot(d), expected, ROW[name].rtol, key, rounding=1e-14)


def test_the_home_of_kept_jacobians_in_version_0_1_still_has_them():
    assert ggn.JacobianMC is JacobianMC
    assert ggn.JacobianExact is JacobianExact
