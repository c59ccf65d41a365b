"""The benchmark of the peers: every contender computes the same thing, and the command measures and saves it."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packages import needs
from torch import nn
from zoo import assert_close

import lightning_curv

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DETERMINISTIC = """BatchGrad BatchL2Grad SumGradSquared Variance DiagGGNExact BatchDiagGGNExact DiagHessian
BatchDiagHessian""".split()  # noqa: SIM905


@pytest.fixture
def contenders(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contenders

    return contenders


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_backpack_computes_what_we_do(contenders, name):
    needs("backpack")
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3))
    theirs, x, y = copy.deepcopy(ours), torch.randn(5, 2, 3), torch.randint(3, (5,))
    contenders.ours(ours, x, y, (name,))()
    contenders.backpack(theirs, x, y, (name,))()
    field = getattr(lightning_curv, name)().savefield
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(getattr(p, field), getattr(q, field), rtol=1e-4)
        assert_close(p.grad, q.grad)
    contenders.clear(ours)
    assert all(p.grad is None and not hasattr(p, field) for p in ours.parameters())


def test_vmap_computes_per_sample_gradients(contenders):
    net, x, y = nn.Linear(6, 4), torch.randn(5, 6), torch.randint(4, (5,))
    found = contenders.vmap_grad(net, x, y, ("BatchGrad",))()
    contenders.ours(net, x, y, ("BatchGrad",))()
    assert_close(found["weight"] / len(x), net.weight.grad_batch)


def test_interleaved_runs_are_those_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(
        "optimizer_benchmark", BENCHMARKS / "optimizers.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    regression = benchmark.WORKLOADS["regression"]
    runs = {
        method: lambda method=method, count=count: benchmark.train(
            regression, method, 0, steps=count
        )
        for method, count in {"baseline": 6, "KFAC": 4}.items()
    }
    together = benchmark.interleaved({method: run() for method, run in runs.items()})
    for method, run in runs.items():
        (alone,) = benchmark.interleaved({method: run()}).values()
        assert [point["step"] for point in together[method]] == [point["step"] for point in alone]
        assert [point["test"] for point in together[method]] == [point["test"] for point in alone]


def test_peak_memory_is_that_of_live_tensors(contenders):
    import measure

    def step():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b.exp() + b

    found = measure.peak_bytes(measure.Contender(step, lambda: None), "cpu")
    assert 12_000 <= found < 12_500


def test_slow_and_failing_steps_are_named(contenders):
    import measure

    def slow():
        while True:
            pass

    def broken():
        raise NotImplementedError

    made = {
        "fast": measure.Contender(lambda: None, lambda: None),
        "slow": measure.Contender(slow, lambda: None),
        "broken": measure.Contender(broken, lambda: None),
    }
    measure.compare(made, rounds=3, limit=0.2)
    assert [c.skipped for c in made.values()] == ["", "> 0.2 s", "unsupported"]
    assert len(made["fast"].report()["seconds"]) == 3


def test_command_merges_into_saved_results(tmp_path):
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"networks": {"logistic": {"KFAC": {}}}}))
    choice = [
        "--networks",
        "logistic",
        "--samples",
        "4",
        "--repeats",
        "2",
        "--quantities",
        "Variance",
        "HMP",
    ]
    command = [sys.executable, BENCHMARKS / "peers.py", *choice, "--results", path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Variance" in run.stdout
    saved = json.loads(path.read_text())["networks"]["logistic"]
    assert list(saved) == ["KFAC", "Variance", "HMP"]
    assert len(saved["Variance"]["ours"]["seconds"]) == 2
    assert saved["Variance"]["ours"]["bytes"] > 0


def test_libraries_may_use_the_vector_instructions_that_are_named(tmp_path):
    """They look once, when they start: the command starts a process for it."""
    path = tmp_path / "peers.json"
    choice = ["--networks", "logistic-64", "--samples", "4", "--repeats", "1", "--isa", "avx2"]
    command = [sys.executable, BENCHMARKS / "peers.py", *choice, "--peers", "--quantities"]
    subprocess.run([*command, "Variance", "--results", path], capture_output=True, check=True)
    environment = json.loads(path.read_text())["environment"]
    here = torch.backends.cpu.get_cpu_capability()
    assert environment["vector instructions"] == ("AVX2" if here.startswith("AVX") else here)
    assert environment["device"]


def test_every_network_has_three_sizes(contenders):
    import networks

    kinds = [name.partition("-")[0] for name in networks.ALL_SIZES]
    assert all(kinds.count(name) >= 3 for name in networks.NETWORKS)
    for network in networks.OTHER_SIZES.values():
        net, (x, y) = network.build(nn.Sigmoid), network.data(2)
        assert torch.nn.functional.cross_entropy(net(x), y).isfinite(), network.title


def test_slopes(contenders):
    import scaling

    sizes = [8, 16, 32, 64]
    assert scaling.slope(sizes, [3 * n for n in sizes]) == pytest.approx(1)
    assert scaling.slope(sizes, [5.0] * 4) == pytest.approx(0)


def test_memory_is_measured_under_a_budget_that_is_given_back(contenders, monkeypatch):
    import scaling

    monkeypatch.setitem(scaling.SIZES, "N", (4, 8))
    before = scaling.jacobian.CHUNK_BYTES
    found = scaling.memory(["Variance"], budget=2**12)
    assert [row["size"] for row in found["Variance"]] == [4, 8]
    assert all(row["bytes"] > 0 for row in found["Variance"])
    assert before == scaling.jacobian.CHUNK_BYTES


def test_ratios_are_medians_over_rounds(contenders):
    import report

    cells = {
        "plain": {"seconds": [1.0, 2.0, 4.0], "bytes": 10},
        "ours": {"seconds": [2.0, 2.0, 2.0], "bytes": 30},
        "BackPACK": {"skipped": "unsupported"},
    }
    assert report.time_ratio(cells, "plain") == 1.0
    assert report.memory_ratio(cells, "plain") == 3.0
    assert report.time_ratio(cells, "BackPACK") is None
    assert "BackPACK: unsupported" in report.line(cells)
    rows = list(report.table("mlp", {"Variance": cells}))
    assert "| Variance | 1.00 | 3.00 | unsupported | — |" in rows


def test_floor_counts_operations_and_bytes(contenders):
    import floor

    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)
    )  # 4 positions, patches of 18
    work = floor.count(net, torch.randn(5, 2, 4, 4), torch.randint(4, (5,)))
    convolution, linear = 2 * 5 * 3 * 18 * 4, 2 * 5 * 12 * 4
    assert work["plain"] == 2 * convolution + 3 * linear
    assert work["Variance"] == work["SumGradSquared"] == convolution + linear
    assert work["BatchGrad"] == convolution
    assert work["BatchL2Grad"] == min(convolution, 2 * 5 * 4 * 4 * (3 + 18))
    assert work["DiagGGNMC"] == linear + (convolution + linear)
    assert work["DiagGGNExact"] == 3 * (linear + convolution) + linear  # three columns
    assert work["KFAC"] == 5 * 4 * (9 + 18**2) + 5 * (16 + 12**2) + linear
    assert work["BatchGrad bytes"] == 4 * 5 * (54 + 3 + 48 + 4)
    assert work["KFAC bytes"] == 4 * (9 + 18**2 + 9 + 16 + 12**2 + 16)


def test_density_counts_tokens_lines_and_names(contenders):
    import density

    source = '"""Two lines\nof docstring."""\n\nX = f"{1}, {2 + 3}"  # why\n\n\n'
    source += "def f(argument):\n    ab, abcd = argument\n    # how\n    return ab\n"
    found = density.density(source + "#" * 101 + "\n", package=True)
    assert (
        found.files,
        found.packages,
        found.code_lines,
        found.comment_lines,
        found.long_lines,
    ) == (1, 1, 4, 3, 1)
    assert found.tokens == 3 + 6 + 5 + 2
    assert sorted(found.names) == ["ab", "abcd"]
    assert " 3.0 " in found.row("room")


def test_density_of_every_room():
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "density.py"], capture_output=True, text=True, check=True
    )
    _, *rooms, total = (line.split() for line in run.stdout.splitlines())
    assert [row[0] for row in rooms] == ["lightning_curv", "optimizers", "callbacks"]
    assert int(total[1]) == sum(int(row[1]) for row in rooms)


@pytest.mark.parametrize(
    ("outcome", "ends"), [("right", 0), ("refused", 0), ("wrong", 1), ("crash", 1)]
)
def test_sweep_of_models_ends_with_an_error_where_something_is_wrong(outcome, ends):
    code = "import sys, models; sys.argv[1:] = ['--only', 'gcn'];"
    code += f"models.cells = lambda network, *_: [models.Cell(network.name, network.suite, 'BatchGrad', {outcome!r})];"
    run = subprocess.run(
        [sys.executable, "-c", code + "models.main()"],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
    )
    assert run.returncode == ends, run.stderr
    assert "1 networks" in run.stdout


def test_generated_networks_are_right():
    command = [sys.executable, BENCHMARKS / "fuzz.py", "--cases", "36"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "36 networks, 288 cells: {'right': 288}" in run.stdout, run.stdout + run.stderr
    assert run.returncode == 0
