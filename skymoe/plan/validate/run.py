"""`skymoe plan validate`: a file of published measurements, predicted case by case, and the promises that must hold.

Every case becomes comparisons or a reason why there are none. Nothing is fitted here: constants are those of the
catalogue, and how they were fitted is `benchmarks/calibrate.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from skymoe.base.errors import ConfigError, printable
from skymoe.base.files import refuse_no_file, write_atomic
from skymoe.plan.trust import Found, encode
from skymoe.plan.validate.cases import Case, NotJudged, NotJudgedError, read_cases
from skymoe.plan.validate.compare import compare
from skymoe.plan.validate.components import compare_component, compare_relative_memory
from skymoe.plan.validate.config import ValidateConfig
from skymoe.plan.validate.conventions import SOURCES
from skymoe.plan.validate.gains import gains
from skymoe.plan.validate.gates import gates_of
from skymoe.plan.validate.inference import inference_groups
from skymoe.plan.validate.mappings import with_mappings
from skymoe.plan.validate.page import accuracy_page
from skymoe.plan.validate.report import ValidateReport
from skymoe.plan.validate.result import Comparison, grouped
from skymoe.plan.validate.schedules import bubble_of_training, compare_schedule, compare_stages

_TOLD = 5
"""Rows that were set aside, in an error."""


def run(config: ValidateConfig) -> ValidateReport:
    """Predict and compare.

    Raises:
        FormatError: no readable list of cases.
        ConfigError: none of the groups is in the file, or nothing in it can be compared.
    """
    for output in (config.write_docs, config.write_accuracy):
        if output is not None:
            refuse_no_file(output)
    cases, refused = read_cases(config.cases)
    if config.groups:
        names = sorted({case.group for case in cases} | {case.group for case in refused})
        cases = tuple(case for case in cases if case.group in config.groups)
        refused = tuple(case for case in refused if case.group in config.groups)
        if not cases and not refused:
            raise ConfigError(
                f"no case of the group {', '.join(config.groups)}",
                where=config.cases,
                hint=f"one of {', '.join(names)}" if names else "a file with cases",
            )
    report = validate(cases, refused, name=config.cases.name)
    if not report.comparisons:
        raise _nothing_compared(config, report)
    if config.write_docs is not None:
        write_atomic(config.write_docs, accuracy_page(report, worst=max(config.worst, 40)).encode())
    if config.write_accuracy is not None:
        gates = [gate for gate in report.gates if gate.value is not None]
        found = (Found(gate.name, gate.value or 0.0, gate.limit, gate.num_cases) for gate in gates)
        write_atomic(config.write_accuracy, encode(found))
    return report


def _nothing_compared(config: ValidateConfig, report: ValidateReport) -> ConfigError:
    """Figures about nothing would pass for a success; so the rows that were set aside are told, and why."""
    aside = [f"{printable(case.case, 60)}: {case.reason}" for case in report.not_judged]
    more = f"; and {len(aside) - _TOLD} more" if len(aside) > _TOLD else ""
    return ConfigError(
        f"none of {report.num_cases} cases can be compared" if report.num_cases else "there is no case in it",
        where=config.cases,
        why="; ".join(aside[:_TOLD]) + more,
        hint="docs/plan_accuracy.md says what a case has",
    )


def validate(cases: Sequence[Case], refused: Sequence[NotJudged] = (), *, name: str = "cases") -> ValidateReport:
    """Compare `cases`, which were read before."""
    cases = with_mappings(cases)
    comparisons: list[Comparison] = []
    aside = list(refused)
    for case in cases:
        if case.kind == "inference":
            continue
        try:
            found = tuple(_compare(case))
            comparisons += found
            if not found:
                raise NotJudgedError("nothing that was measured is predicted")
        except NotJudgedError as reason:
            aside.append(NotJudged(case.id, case.group, str(reason)))
        except (ValueError, ArithmeticError, LookupError) as error:  # of a stranger's table: one row, not the run
            told = f"its fields do not go together ({type(error).__name__}: {printable(error, 120)})"
            aside.append(NotJudged(case.id, case.group, told))
    comparisons += gains(cases, comparisons)
    conventions = {group: f"{source.convention}: {source.checked}" for group, source in SOURCES.items()}
    groups = grouped(comparisons, aside, conventions)
    served = inference_groups([case for case in cases if case.kind == "inference"])
    return ValidateReport(
        cases=name, num_cases=len(cases) + len(refused), groups=(*groups, *served), gates=gates_of(groups, served)
    )


def _compare(case: Case) -> Iterator[Comparison]:
    yield from _kind_of(case)(case)
    if case.kind == "training":
        try:
            yield from bubble_of_training(case)
        except NotJudgedError:
            return


def _kind_of(case: Case) -> Callable[[Case], tuple[Comparison, ...]]:
    if case.kind == "training":
        return compare
    if case.kind == "memory":
        return compare_relative_memory if case.has("measured.rel_activation_pct_vs_tp_baseline") else compare
    if case.kind == "schedule":
        return compare_schedule
    if case.kind == "stage_timing":
        return compare_stages
    if case.kind == "component":
        return compare_component
    raise NotJudgedError(f"cases of the kind {case.kind!r} are not predicted")
