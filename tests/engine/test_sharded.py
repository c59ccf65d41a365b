"""Models whose parameters are shared among processes."""

import pytest
import torch
from sharded_ranks import SHARDED, WORLD, work
from torch import multiprocessing

REFUSED = {
    "tensor parallel": "UnsupportedError: BatchL2Grad() needs whole parameters in the forward pass, found a `DTensor`",
    "products": "UnsupportedError: GGNMP() needs the parameters of its graph after the pass",
    "kept": "UnsupportedError: JacobianMC(mc_samples=1) needs the parameters of its graph after the pass",
    "kfac": "UnsupportedError: Curvature and private steps need whole parameters",
    "diag_ggn": "UnsupportedError: Curvature and private steps need whole parameters",
    "private": "UnsupportedError: Curvature and private steps need whole parameters",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found."""
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(results, case):
    for found in results:
        assert found["refusals"][case].startswith(REFUSED[case])


@pytest.mark.parametrize("name", SHARDED)
def test_quantities_are_those_of_whole_parameters(results, name):
    """They are left on the sharded parameters, of this process' samples; the gradient is that of all."""
    for found in results:
        for fields, expected, gradients, means in found["quantities"][name]:
            assert fields.keys() == expected.keys()
            assert len(fields) > 30
            for key, value in expected.items():
                for one, other in zip(flat(fields[key]), flat(value), strict=True):
                    assert close(one, other, name), key
            for one, other in zip(gradients, means, strict=True):
                assert close(one, other.to(one), name)


def flat(value):
    return value if isinstance(value, (list, tuple)) else [value]


def close(one, other, name=""):
    """Equal up to rounding: bfloat16 has eight digits, and sums over ranks another order."""
    relative = 2**-6 if name == "mixed" else 1e-9
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=relative**2)


def test_micro_batches_are_exchanged_once(results):
    for found in results:
        assert all(close(one, other) for one, other in found["accumulated"])
