"""Serving asks the price list's laws: one place where a matrix product has a price."""

import math

import pytest

from skymoe.plan.cost.laws import Kernels
from skymoe.plan.hardware.catalogue import parse_gpus
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.serve.asked import read_asked
from skymoe.plan.serve.config import PlanServeConfig
from skymoe.plan.serve.divide import whole_model
from skymoe.plan.serve.step import Load, settings, step_s


def test_an_engine_has_the_laws_of_the_gpu_and_no_launches():
    (gpu,) = parse_gpus("h100-80g")
    training, engine = Kernels.of(gpu, Precision.BF16), Kernels.of_engine(gpu, Precision.BF16)
    assert engine.gemm(4096, 4096, 4096) == pytest.approx(training.gemm(4096, 4096, 4096) - training.launch_s)
    slower = Kernels.of_engine(gpu, Precision.BF16, gemm=0.5, memory=0.25)
    assert slower.product(1e15, 0) == pytest.approx(2 * engine.product(1e15, 0))
    assert slower.product(0, 1e9) == slower.memory(1e9) == pytest.approx(4 * engine.memory(1e9))
    assert engine.attend(3e12, 4e9) == pytest.approx(math.hypot(engine.attend(3e12, 0), engine.memory(4e9)))


def test_a_dense_step_is_its_products():
    """One sequence: all weights are read once, by the law, whatever the products are."""
    asked = read_asked(PlanServeConfig(model="llama-3-8b", gpus="h100-80g", engine="trtllm-pytorch"))
    gpu, engine, served = asked.gpus[0], asked.engine, asked.served
    (setting,) = settings(served, asked.gpus, whole_model(served, gpu), engine)
    kernels = Kernels.of_engine(
        gpu, Precision.BF16, gemm=engine.gemm * engine.kernels(gpu.name).gemm,
        memory=engine.memory * engine.kernels(gpu.name).memory,
    )  # fmt: skip
    shape = served.shape
    attention, ffn = 2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336
    one = sum(kernels.product(2 * elements, 2 * elements) for elements in (attention, ffn))
    passes = 8 * 2 * 4096 / (gpu.bandwidth * gpu.laws.memory)
    assert step_s(setting, Load(decode=1, context=1))["weights"] == pytest.approx(shape.num_layers * (one + passes))
