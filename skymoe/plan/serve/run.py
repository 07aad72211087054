"""`skymoe plan serve`: how to divide a model over the GPUs of a server, and what it will give."""

from __future__ import annotations

from dataclasses import replace

from skymoe.base.errors import SkymoeError
from skymoe.base.files import refuse_no_file, write_atomic
from skymoe.plan.serve.asked import Asked, check_length, read_asked
from skymoe.plan.serve.config import Objective, PlanServeConfig
from skymoe.plan.serve.divide import whole_model
from skymoe.plan.serve.fit import counted, fit, refuse
from skymoe.plan.serve.frontier import Fitted, frontier
from skymoe.plan.serve.layers import balanced, stage_layers
from skymoe.plan.serve.model import active_elements
from skymoe.plan.serve.page import plan_page
from skymoe.plan.serve.planned import serving_plan, splits
from skymoe.plan.serve.report import SCHEMA, Cost, GpuMemory, PipelineChoice, Rival, ServeReport
from skymoe.plan.serve.step import Setting, settings
from skymoe.plan.serve.sweep import best, limits, saturation, sweep
from skymoe.plan.serve.workload import period_s
from skymoe.spec.serving_plan import write_serving_plan


def run(config: PlanServeConfig) -> ServeReport:
    """Plan `config.model` on `config.gpus`; print it with `skymoe.plan.serve.table.show`.

    Raises:
        ConfigError: unknown GPU or preset, a split or length that cannot be, nothing fits; the hint says what would do.
            Before any of that: a file that cannot be written.
        FormatError: no readable model directory.
    """
    for output in (config.save, config.html):
        if output is not None:
            refuse_no_file(output)
    asked = read_asked(config)
    check_length(asked)
    fitted = _fitted(asked)
    (setting,) = settings(asked.served, asked.gpus, fitted.shares, asked.engine)
    points = sweep(setting, asked.workload, fitted.kv_tokens, config.batch)
    top = best(points)
    both = {way: _tokens(asked, rotate=way) for way in (True, False)} if not asked.wish.fixed else {}
    plan = serving_plan(asked.served, asked.gpus, fitted, config, asked.context, points)
    report = ServeReport(
        schema=SCHEMA, model=asked.served.shape.name, gpus=tuple(gpu.name for gpu in asked.gpus),
        weights=config.weights, kv=config.kv, context=asked.context, engine=config.engine,
        objective=config.objective.value, splits=splits(asked.served, fitted.shares), ffn_block=fitted.shares.block,
        rotated=bool(plan.rotate), replicas=fitted.shares.replicas, fits=True,
        memory_gb=tuple(memory.needed for memory in _memory(asked, fitted)), memory=_memory(asked, fitted),
        kv_tokens=fitted.kv_tokens, max_sequences=fitted.kv_tokens // asked.context,
        kv_tokens_rotated=both.get(True), kv_tokens_not_rotated=both.get(False), sweep=points,
        tokens_per_s={point.batch: point.tokens_per_s for point in points},
        best_batch=top.batch if top else None, limits=limits(points, fitted, asked.workload),
        pipeline=_pipeline(asked), cost=_cost(config, asked, top.mixed_tokens_per_s) if top else None,
        rival=None, plan=plan, notes=_notes(asked, fitted),
    )  # fmt: skip
    if config.compare is not None:
        report = replace(report, rival=_rival(asked, report))
    if config.save is not None:
        write_serving_plan(plan, config.save)
    if config.html is not None:
        write_atomic(config.html, plan_page(report).encode())
    return report


def _fitted(asked: Asked) -> Fitted:
    """The division that serves the objective best."""
    found = frontier(asked.served, asked.gpus, asked.reserve, asked.wish)
    fastest = next(found, None)
    if fastest is None:
        raise refuse(
            asked.served, asked.gpus, asked.engine, asked.wish, max_batch=asked.max_batch, reserve=asked.config.reserve
        )
    if asked.config.objective is Objective.LATENCY:
        return fastest
    return max((fastest, *found), key=lambda one: _rate(asked, one))  # the first of equals: the fastest step


def _rate(asked: Asked, fitted: Fitted) -> float:
    (setting,) = settings(asked.served, asked.gpus, fitted.shares, asked.engine)
    return saturation(setting, asked.workload, fitted.kv_tokens, asked.max_batch)


def _tokens(asked: Asked, *, rotate: bool) -> int | None:
    """Tokens that have room with the remainder going round, or not."""
    found = fit(asked.served, asked.gpus, asked.reserve, replace(asked.wish, rotate=rotate))
    return None if found is None else found.kv_tokens


def _memory(asked: Asked, fitted: Fitted) -> tuple[GpuMemory, ...]:
    rows = zip(asked.gpus, fitted.weights, fitted.reserve, fitted.token, strict=True)
    return tuple(
        GpuMemory(
            gpu=gpu.name, weights=weights / 1e9, reserve=kept / 1e9, context=token * asked.context / 1e9,
            needed=(weights + kept + token * asked.context) / 1e9, kv_room=(gpu.memory - weights - kept) / 1e9,
            memory=gpu.memory / 1e9,
        )
        for gpu, weights, kept, token in rows
    )  # fmt: skip


def _pipeline(asked: Asked) -> PipelineChoice | None:
    """Layers over the same GPUs, at the best batch of those asked that fits."""
    if len(asked.gpus) == 1:
        return None
    found = balanced(
        asked.served, asked.gpus, asked.reserve, kv_tokens=asked.context, load_tokens=asked.wish.load_tokens
    )
    if found is None:
        return None
    stages = []
    for g, (gpu, kinds) in enumerate(zip(asked.gpus, stage_layers(asked.served, found.layers), strict=True)):
        alone = whole_model(asked.served, gpu)
        stages.append(
            Setting(
                served=asked.served, gpus=(gpu,), shares=alone, engine=asked.engine, layers=kinds,
                head=g == len(asked.gpus) - 1,
                is_stage=True,
            )
        )  # fmt: skip
    rates = {
        batch: batch / period_s(stages, asked.workload, batch)
        for batch in asked.config.batch
        if batch * asked.workload.length <= found.kv_tokens
    }
    top = max(rates, key=lambda batch: rates[batch], default=None)
    return PipelineChoice(
        layers=found.layers, kv_tokens=found.kv_tokens, best_batch=top,
        mixed_tokens_per_s=None if top is None else rates[top],
        vllm=f"VLLM_PP_LAYER_PARTITION={','.join(map(str, found.layers))}",
    )  # fmt: skip


def _cost(config: PlanServeConfig, asked: Asked, tokens_per_s: float) -> Cost:
    hours = len(asked.gpus) * 1e6 / tokens_per_s / 3600
    return Cost(gpu_hours=hours, money=None if config.price is None else config.price * hours)


def _rival(asked: Asked, report: ServeReport) -> Rival:
    """Another model on the same GPUs, in the same formats, for the same workload."""
    config = asked.config
    assert config.compare is not None
    other = config.replace(model=config.compare, compare=None, save=None, html=None, context=None, split=())
    served = read_asked(other).served
    active, own = active_elements(served), active_elements(asked.served)
    rival = Rival(model=served.shape.name, active_parameters=active, active_ratio=active / own)
    try:
        theirs = run(other)
    except SkymoeError as error:
        return replace(rival, why=error.what)
    rates = [{p.batch: p for p in found.sweep if p.fits} for found in (report, theirs)]
    ours = rates[0][report.best_batch] if report.best_batch else None
    top = rates[1][theirs.best_batch] if theirs.best_batch else None
    same = rates[1].get(report.best_batch) if report.best_batch else None
    return replace(
        rival, fits=True, best_batch=theirs.best_batch,
        mixed_tokens_per_s=top.mixed_tokens_per_s if top else None, same_batch=same.batch if same else None,
        same_batch_tokens_per_s=same.tokens_per_s if same else None,
        times_cheaper=ours.mixed_tokens_per_s / top.mixed_tokens_per_s if ours and top else None,
        times_cheaper_same_batch=ours.tokens_per_s / same.tokens_per_s if ours and same else None,
    )  # fmt: skip


def _notes(asked: Asked, fitted: Fitted) -> tuple[str, ...]:
    notes = ["all times are predicted by a model of " + counted(asked.gpus) + ", none is measured"]
    notes.append(f"engine {asked.config.engine}: {asked.engine.origin.strip()}")
    if fitted.shares.replicas > 1:
        heads = asked.served.attention.num_kv_heads
        notes.append(
            f"{heads} key/value heads on {len(asked.gpus)} GPUs: replicated up to {fitted.shares.replicas} times"
        )
    if asked.served.weight_bytes < 2 and fitted.shares.block < 128 and fitted.shares.block > 0:
        notes.append(f"blocks of {fitted.shares.block} columns are cut within FP8 scale blocks of 128")
    idle = [str(g) for g, heads in enumerate(fitted.shares.mean_heads) if not heads]
    if idle and not asked.wish.fixed:
        notes.append(f"GPUs without heads, which wait while the others attend: {', '.join(idle)}")
    return (*notes, *_not_the_fastest(asked, fitted))


def _not_the_fastest(asked: Asked, fitted: Fitted) -> tuple[str, ...]:
    """Why slower GPUs may have more heads: there is more room, so more sequences share a slower step."""
    fastest = fit(asked.served, asked.gpus, asked.reserve, asked.wish)
    if fastest is None or fastest.kv_tokens >= fitted.kv_tokens or fastest.shares == fitted.shares:
        return ()
    heads, rates = ",".join(map(str, fastest.shares.heads)), (_rate(asked, fitted), _rate(asked, fastest))
    return (
        "of all divisions that no other beats in layer time and in room, this one gives most tokens a second; it is "
        f"not the fastest step: heads {heads} (--objective latency) leave room for {fastest.kv_tokens:,} tokens of "
        f"keys and values instead of {fitted.kv_tokens:,}, and the largest batch that has room gives {rates[1]:,.0f} "
        f"tok/s instead of {rates[0]:,.0f}",
    )
