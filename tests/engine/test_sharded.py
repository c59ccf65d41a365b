"""Models whose parameters are shared among processes."""

import pytest
import torch
from sharded_ranks import WORLD, work
from torch import multiprocessing

REFUSED = {
    "tensor parallel": "UnsupportedError: Quantities need whole parameters in the forward pass, found a `DTensor`",
    "fsdp2": "UnsupportedError: Quantities need whole parameters, found a model under FSDP",
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
