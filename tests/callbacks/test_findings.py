"""What a report says in words: every rule on series with a known answer, and what it does not say."""

import pytest

from lightning_curv.callbacks.run_report import rules
from lightning_curv.callbacks.run_report.course import Course
from lightning_curv.callbacks.run_report.evidence import RULES, Evidence, Lacking
from lightning_curv.callbacks.run_report.findings import judged

LAYERS = ("a", "b", "c", "d", "e")


def evidence(layers=None, sgd=None, sizes=None, **series):
    """Series from lists; numbers stand for 60 equal values."""
    lists = {name: v if isinstance(v, list) else [float(v)] * 60 for name, v in series.items()}
    points = {name: (list(range(len(values))), values) for name, values in lists.items()}
    largest = {name: max(zip(values, range(len(values))))[::-1] for name, values in lists.items()}
    rows = {} if layers is None else {"grad_norm": (list(range(len(layers))), layers)}
    return Evidence(points, rows, largest, sizes or {}, sgd)


def halves(first, second):
    return [float(first)] * 30 + [float(second)] * 30


def thirds(first, middle, last):
    return [float(first)] * 20 + [float(middle)] * 20 + [float(last)] * 20


def rows(count=20, **norms):
    return [dict.fromkeys(LAYERS, 1.0) | norms for _ in range(count)]


# rule: what it finds, a part of its title; where it finds nothing; where it says nothing
CASES = {
    "batch_below_noise_scale": (
        evidence(samples=64, noise_scale=halves(1, 320), grad_signal=1),
        "The batch of 64 is 5 × below the noise scale",
        [
            evidence(samples=64, noise_scale=halves(900, 120)),
            # a third of the values is below twice the batch: not three quarters are above
            evidence(samples=64, noise_scale=halves(1, 1)[:30] + [100.0, 999.0, 999.0] * 10),
        ],
        [
            evidence(noise_scale=320),
            evidence(samples=64),
            evidence(samples=64, noise_scale=[320.0] * 38),
        ],
    ),
    "batch_above_noise_scale": (
        evidence(samples=512, noise_scale=halves(9999, 64)),
        "The batch of 512 is 8 × above the noise scale",
        [evidence(samples=512, noise_scale=300), evidence(samples=64, noise_scale=64)],
        [evidence(samples=512), evidence(samples=512, noise_scale=[64.0] * 5)],
    ),
    "gradient_is_not_resolved": (
        evidence(grad_signal=halves(1, 1)[:30] + [-1.0, 1.0] * 15),
        "too small to tell the gradient from noise",
        [evidence(grad_signal=halves(-1, 1)), evidence(grad_signal=[-1.0, 1.0, 1.0] * 20)],
        [evidence(grad_norm=1), evidence(grad_signal=[-1.0] * 14)],
    ),
    "noise_scale_grows": (
        evidence(noise_scale=thirds(20, 30, 120)),
        "The noise scale grew 6 ×",
        [evidence(noise_scale=thirds(20, 500, 59)), evidence(noise_scale=thirds(120, 60, 20))],
        [evidence(), evidence(noise_scale=[1.0] * 10 + [100.0] * 10)],
    ),
    "loss_does_not_fall": (
        evidence(loss=thirds(2.3, 0.1, 2.3)),
        "The training loss did not fall",
        [evidence(loss=thirds(2.3, 9, 2.2))],
        [evidence(), evidence(loss=[1.0] * 20)],
    ),
    "gradient_norm_explodes": (
        evidence(grad_norm=thirds(2, 5, 40)),
        "The gradient norm grew 20 ×",
        [evidence(grad_norm=thirds(2, 900, 19)), evidence(grad_norm=thirds(40, 5, 2))],
        [evidence(), evidence(grad_norm=[1.0] * 10 + [100.0] * 10)],
    ),
    "gradient_norm_has_a_spike": (
        evidence(grad_norm=[1.0] * 41 + [30.0] + [1.0] * 20),
        "The gradient norm had a spike at step 41",
        [evidence(grad_norm=[1.0] * 40 + [19.0]), evidence(grad_norm=0)],
        [evidence(), evidence(grad_norm=[1.0, 1.0, 30.0])],
    ),
    "gradients_of_layers_vanish": (
        evidence(rows(b=1e-6)),
        "Gradients of layer b vanish",
        [
            evidence(rows(b=2e-4)),
            # per entry it is not smaller: one entry beside 10¹² of them
            evidence(rows(b=1e-6), sizes=dict.fromkeys("acde", 10**12)),
            evidence(rows(10, b=1e-6) + rows(10)),  # later it does not
        ],
        [evidence(), evidence(rows(14, b=1e-6)), evidence([{"a": 1.0, "b": 1e-9}] * 20)],
    ),
    "layers_get_no_gradient": (
        evidence(rows(b=0.0, d=0.0)),
        "Layers b, d get no gradient",
        [evidence(rows(b=1e-30)), evidence(rows(b=0.0)[:19] + rows(1))],
        [evidence(), evidence(rows(14, b=0.0))],
    ),
    "single_samples_dominate": (
        evidence(sample_norm_max=halves(1, 30), sample_norm_median=2),
        "the largest gradient is 15 × the median one",
        [
            evidence(sample_norm_max=halves(99, 19), sample_norm_median=2),
            evidence(sample_norm_max=[1.0] * 50 + [99.0] * 10, sample_norm_median=1),
        ],
        [evidence(sample_norm_max=3), evidence(sample_norm_max=9, sample_norm_median=0)],
    ),
    "gradient_is_noise": (
        evidence(early_stopping=halves(-1, 0.1)),
        "The gradient is mere noise",
        [evidence(early_stopping=halves(1, -0.1)), evidence(early_stopping=[0.5, -0.5] * 30)],
        [evidence(), evidence(early_stopping=[1.0] * 14)],
    ),
    "sharpness_is_at_the_edge": (
        evidence(hessian_max_eigenvalue=halves(1, 38), learning_rate=0.1, sgd=0.9),
        "Training is at the edge of stability",  # 2 · 1.9 / 0.1 = 38
        [
            evidence(hessian_max_eigenvalue=30, learning_rate=0.1, sgd=0.9),
            evidence(hessian_max_eigenvalue=halves(99, 15), learning_rate=0.1, sgd=0.0),
        ],
        [
            evidence(hessian_max_eigenvalue=38, learning_rate=0.1),
            evidence(hessian_max_eigenvalue=38, sgd=0.9),
            evidence(learning_rate=0.1, sgd=0.9),
        ],
    ),
    "steps_are_short": (
        evidence(alpha=halves(0, -0.8)),
        "Steps end far before the minimum",
        [evidence(alpha=halves(-0.8, -0.4)), evidence(alpha=[-0.9, 0.1] * 30)],
        [evidence(), evidence(alpha=[-0.9] * 14)],
    ),
    "steps_overshoot": (
        evidence(alpha=halves(0, 0.8)),
        "Steps overshoot the minimum",
        [evidence(alpha=halves(0.8, 0.4)), evidence(alpha=[0.9, -0.1] * 30)],
        [evidence(), evidence(alpha=[0.9] * 14)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_finds_what_is_there_and_nothing_else(name):
    there, title, nothing, lacking = CASES[name]
    judge = getattr(rules, name)
    found = judge(there)
    assert title in found.title
    assert found.text
    assert found.kind in ("warning", "advice", "note")
    for seen in nothing:
        assert judge(seen) is None
    for seen in lacking:
        with pytest.raises(Lacking, match="needs"):
            judge(seen)


def test_every_rule_has_a_case():
    assert {rule.judge.__name__ for rule in RULES} == CASES.keys()


def test_a_signal_that_is_not_resolved_says_nothing_of_the_batch():
    seen = evidence(samples=64, noise_scale=999, grad_signal=[1.0] * 30 + [-1.0, 1.0] * 15)
    with pytest.raises(Lacking, match="needs a signal above zero in most steps, there are 15 of"):
        rules.batch_below_noise_scale(seen)
    assert rules.gradient_is_not_resolved(seen) is not None


def test_noise_scales_are_those_of_the_second_half_of_the_run():
    """Where they have gaps, early ones would be among the second half of their number."""
    steps = list(range(100))
    noise = (steps[:45] + steps[55:76], [999.0] * 45 + [10.0] * 21)
    series = {"grad_signal": (steps, [1.0] * 100), "samples": (steps, [64.0] * 100)}
    assert rules.batch_below_noise_scale(Evidence({**series, "noise_scale": noise})) is None


def test_findings_come_by_weight_and_every_rule_has_an_outcome():
    course = Course()
    for step in range(60):
        values = {"samples": 64.0, "noise_scale": 640.0, "grad_norm": 1.0 + 99 * (step == 50)}
        course.add(step, values, {})
    findings, checked = judged(course, {}, None)
    assert [finding.kind for finding in findings] == ["warning", "advice"]
    assert len(checked) == len(RULES)
    outcomes = {outcome.partition(":")[0] for _, outcome in checked}
    assert outcomes == {"no", "not judged", "yes"}


def test_several_optimizers_are_judged_apart():
    course = Course()
    for step in range(60):
        norms = {"grad_norm/optimizer_0": 1.0, "grad_norm/optimizer_1": 1.0 + 99 * (step == 50)}
        course.add(step, {"samples": 64.0, **norms}, {})
    findings, checked = judged(course, {}, None)
    assert [f.title for f in findings] == ["optimizer_1: The gradient norm had a spike at step 50"]
    assert len(checked) == 2 * len(RULES)


def test_nothing_is_found_in_a_run_of_a_few_steps():
    course = Course()
    for step in range(7):
        course.add(step, {"samples": 64.0, "noise_scale": 6400.0, "alpha": -1.0, "loss": 2.0}, {})
    findings, checked = judged(course, {}, None)
    assert findings == []
    assert all(outcome.startswith("not judged: needs") for _, outcome in checked)
