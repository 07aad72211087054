"""A plan is data: counted, printed and compared without touching a tensor."""

from __future__ import annotations

import pytest

from skymoe.base.dtype import DType
from skymoe.convert.plan import Copy, Source, Step, Target, Zeros, plan_of
from skymoe.weights.header import TensorInfo

MATRIX = Source(0, "w", TensorInfo(DType.BFLOAT16, (7, 5)))
STACK = TensorInfo(DType.FLOAT32, (4, 6, 3))


def target(name: str, shape: tuple[int, ...] = (7, 5), slot: int = 0) -> Target:
    return Target(name, DType.BFLOAT16, shape, slot)


def test_a_source_is_a_tensor_or_a_part_of_one() -> None:
    assert (MATRIX.shape, MATRIX.num_bytes, str(MATRIX)) == ((7, 5), 70, "w")
    expert = Source(1, "fused", STACK, (range(2, 3), range(0, 3)))
    assert (expert.shape, expert.num_bytes, str(expert)) == ((3, 3), 36, "#1:fused[2:3][0:3]")
    assert Source(0, "fused", STACK, (range(1, 3),)).shape == (2, 6, 3)
    assert Source(0, "w", MATRIX.info, (range(2, 3),)).shape == (1, 5)  # one row of a matrix stays a matrix


def test_steps_and_targets_come_in_the_order_of_the_files() -> None:
    steps = [
        Step(Zeros(), (target("d"),)),
        Step(Copy(MATRIX), (target("c"), target("a"))),
        Step(Zeros(), (target("b", (2,)),)),
    ]
    plan = plan_of(steps, ["a", "b", "c", "d"])
    assert [[t.name for t in step.targets] for step in plan.steps] == [["a", "c"], ["b"], ["d"]]
    assert [t.name for t in plan.tensors] == ["a", "b", "c", "d"]


def test_bytes_and_memory() -> None:
    plan = plan_of(
        [Step(Copy(MATRIX), (target("a"), target("b"), target("c"))), Step(Zeros(), (target("z"),))],
        ["a", "b", "c", "z"],
    )
    assert (plan.bytes_read, plan.bytes_written) == (70, 280)
    assert plan.peak_bytes == 140  # the source, and the result once for all three targets
    scaled = Step(Copy(MATRIX, 0.5), (target("a"),))
    assert scaled.peak_bytes == 140 + 4 * 35  # scaled in fp32
    two = Step(Zeros(), (target("x"), target("y", (2, 2), slot=1)))
    assert two.peak_bytes == 70 + 8


def test_lines_and_json_name_every_target() -> None:
    plan = plan_of(
        [Step(Copy(MATRIX, 0.5), (target("a"), target("b"))), Step(Zeros(), (target("z"),))], ["a", "z", "b"]
    )
    assert list(plan.lines()) == [
        "w -> copy, times 0.5 -> a [7x5 bfloat16] 70",
        "w -> copy, times 0.5 -> b [7x5 bfloat16] 70",
        "- -> zeros -> z [7x5 bfloat16] 70",
    ]
    assert str(plan.steps[0]) == "w -> copy, times 0.5 -> a [7x5 bfloat16] and 1 more"
    data = plan.as_json()
    assert (data["bytes_read"], data["bytes_written"]) == (70, 210)
    assert data["tensors"][1] == {
        "target": "b", "operation": "copy, times 0.5", "sources": ["w"], "dtype": "bfloat16", "shape": [7, 5],
        "bytes": 70,
    }  # fmt: skip


def test_the_fingerprint_is_that_of_the_content() -> None:
    def made(scale: float, name: str = "w", shape: tuple[int, ...] = (7, 5)) -> str:
        source = Source(0, name, TensorInfo(DType.BFLOAT16, (7, 5)))
        return plan_of([Step(Copy(source, scale), (target("a", shape),))], ["a"]).fingerprint()

    assert made(1.0) == made(1.0)
    assert len({made(1.0), made(0.5), made(1.0, "v"), made(1.0, shape=(35,))}) == 4


def test_a_tensor_made_twice_or_never_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        plan_of([Step(Zeros(), (target("a"),)), Step(Zeros(), (target("a"),))], ["a"])
