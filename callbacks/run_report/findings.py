"""All rules, asked what they find in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_curv.callbacks.monitoring.watch import KEPT, Raised
from lightning_curv.callbacks.run_report import rules  # noqa: F401 (adds them)
from lightning_curv.callbacks.run_report.course import Course
from lightning_curv.callbacks.run_report.evidence import RULES, Evidence, Finding, Lacking
from lightning_curv.callbacks.run_report.labels import split

ORDER = {"warning": 0, "advice": 1, "note": 2}
SHARED = ("loss", "samples", "learning_rate")  # by all optimizers


def judged(
    course: Course, sizes: Mapping[str, int], momentum: float | None
) -> tuple[list[Finding], list[tuple[str, str]]]:
    """What is found, the gravest first, and what came of every rule.

    Args:
        course: of the run.
        sizes: parameters by layer.
        momentum: of plain SGD.
    """
    findings: list[Finding] = []
    checked: list[tuple[str, str]] = []
    for optimizer, evidence in evidence_of(course, sizes, momentum).items():
        where = f"{optimizer}: " if optimizer else ""
        for rule in RULES:
            try:
                verdict = rule.judge(evidence)
            except Lacking as reason:
                checked.append((where + rule.statement, f"not judged: {reason}"))
                continue
            checked.append((where + rule.statement, "no" if verdict is None else "yes"))
            if verdict is not None:
                findings.append(Finding(verdict.kind, where + verdict.title, verdict.text))
    return sorted(findings, key=lambda finding: ORDER[finding.kind]), checked


def evidence_of(
    course: Course, sizes: Mapping[str, int], momentum: float | None
) -> dict[str, Evidence]:
    """By optimizer, if there are several."""
    points = {name: (series.steps, series.values) for name, series in course.series.items()}
    layers = {name: (rows.steps, rows.values) for name, rows in course.layers.items()}
    shared = {name: points[name] for name in SHARED if name in points}
    optimizers = dict.fromkeys(split(name)[1] for name in points if name not in SHARED)
    by_optimizer = {}
    for optimizer in optimizers:
        own = {split(name)[0]: p for name, p in points.items() if split(name)[1] == optimizer}
        largest = {
            split(name)[0]: point
            for name, point in course.largest.items()
            if split(name)[1] == optimizer
        }
        by_optimizer[optimizer] = Evidence({**shared, **own}, layers, largest, sizes, momentum)
    return by_optimizer


def of_alarms(raised: Sequence[Raised]) -> list[Finding]:
    """One for every alarm that went off.

    Args:
        raised: by the callback, in the order of the steps.
    """
    steps: dict[str, list[int]] = {}
    for one in raised:
        where = f" of {one.where.lstrip('/')}" if one.where else ""
        steps.setdefault(f"{one.alarm}{where}", []).append(one.step)
    least = "at least " if len(raised) >= KEPT else ""  # earlier ones are forgotten
    return [
        Finding(
            "warning",
            f"Alarm: {alarm}",
            f"It went off at {least}{len(times):,} step{'s' if len(times) > 1 else ''}, first at "
            f"step {times[0]:,}, last at step {times[-1]:,}.",
        )
        for alarm, times in steps.items()
    ]
