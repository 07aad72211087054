"""The figures of a step as plain data: the `train` and `run` lines of metrics.jsonl, and what the progress bar shows.

Gate statistics (sharpness, entropy, load) are computed here and only on log steps, over the last micro-batch of the
step; drop rate and alpha are those of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skymoe.ops.balance import load_metrics
from skymoe.spec.flops import count_parameters
from skymoe.spec.layout import Layout
from skymoe.spec.timeline import Span, timeline_record
from skymoe.train.job import Job
from skymoe.train.metrics import SCHEMA
from skymoe.train.objective import balance_value
from skymoe.train.step import StepResult


def run_line(job: Job) -> dict[str, Any]:
    """The first line: what is trained, on what."""
    config, spec, machine = job.config, job.state.engine.spec, job.machine
    count = count_parameters(spec)
    return {
        "kind": "run",
        "schema": SCHEMA,
        "parent": None if config.model.path is None else str(config.model.path),
        "seed": config.run.seed,
        "steps": config.steps,
        "tokens_per_step": config.batch.sequences * config.data.sequence_length,
        "sequence_length": config.data.sequence_length,
        "parameters": count.total,
        "active_parameters": count.active,
        "moe_layers": list(spec.moe_layer_ids),
        "experts": spec.moe.num_experts if spec.moe else 0,
        "top_k": spec.moe.top_k if spec.moe else 0,
        "gate_norm": bool(spec.moe and spec.moe.gate_norm),
        "flops_per_token": machine.flops.model_causal,
        "flops_per_token_full": machine.flops.model_full,
        "flops_per_token_hardware": machine.flops.hardware_causal,
        "world_size": machine.num_devices,
        "peak_flops": machine.peak_flops,
        "peak_source": machine.peak_source,
        "compute": str(config.precision.compute),
        "data_fingerprint": job.mixture.fingerprint,
    }


def train_line(job: Job, result: StepResult, lr: float) -> dict[str, Any]:
    """Means since the last line, and the gate as it is now."""
    counters = job.state.counters
    window = counters.window
    tokens_per_s = window.tokens / max(window.seconds, 1e-9)
    share = job.machine.utilisation(tokens_per_s)
    moe = job.state.engine.spec.moe
    aux = balance_value(job.objective, result.alpha_L, result.sums.totals_L, moe.top_k) if moe else 0.0
    line = {
        "kind": "train",
        "step": counters.step,
        "tokens": counters.tokens,
        "loss": window.loss / max(1, window.targets),
        "aux_loss": aux,
        "z_loss": float(result.sums.z),
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / job.machine.num_devices,
        "world_size": job.machine.num_devices,
        "mfu_causal": share.mfu_causal,
        "mfu_full": share.mfu_full,
        "hfu": share.hfu,
        "flops": counters.flops,
        "seconds": counters.seconds,
    }
    return {**line, "layers": layer_figures(job, result)} if moe else line


def layer_figures(job: Job, result: StepResult) -> dict[str, list[float]]:
    """One list per figure, one entry per MoE layer: loads over the whole step, the gate's over its last micro-batch."""
    figures = [figures._asdict() for figures in job.state.engine.gate_figures(result.sums)]
    for layer, totals in zip(figures, result.sums.totals_L, strict=True):
        layer.update(load_metrics(totals.counts_E)._asdict())
    lists = {name: [layer[name] for layer in figures] for name in figures[0]} if figures else {}
    return {"drop_rate": result.drop_rate_L, "alpha": result.alpha_L, **lists}


def timeline_line(
    job: Job, layout: Layout, spans: Sequence[Span], *, span_s: float = 0.0, planned: Sequence[Span] = ()
) -> dict[str, Any]:
    """Where the ranks were during the step just taken: its passes on all ranks, beside what a plan says."""
    return timeline_record(layout, spans, step=job.state.counters.step, span_s=span_s, planned=planned)


def progress_fields(line: dict[str, Any]) -> dict[str, object]:
    """What a person wants to see while it runs."""
    fields: dict[str, object] = {"loss": line["loss"], "tok/s": int(line["tokens_per_s"])}
    if line["world_size"] > 1:
        fields["per device"] = int(line["tokens_per_s_per_device"])
    fields["MFU"] = f"{line['mfu_causal']:.1%} causal {line['mfu_full']:.1%} full"
    if line["hfu"] > line["mfu_causal"]:
        fields["HFU"] = f"{line['hfu']:.1%}"
    if drops := line.get("layers", {}).get("drop_rate"):
        fields["drop"] = f"{sum(drops) / len(drops):.1%}"
    return fields


def event_fields(result: StepResult) -> dict[str, Any]:
    """Why a step was refused."""
    return {"reason": result.verdict.reason, "loss": result.loss, "grad_norm": result.grad_norm}
