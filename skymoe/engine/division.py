"""From what the user asks to a serving plan: which rank has what. No torch.

    --tp 3                                 as even as possible
    --split heads=5,5,4 --split ffn=..     what is named as given, the rest as even as possible
    --split weights=3,1                    everything in proportion: ranks of unequal memory or speed
    --plan FILE                            as `skymoe plan serve --save` found it

Whichever way, the answer is one `ServingPlan`, and nothing after this file asks how it came about. The rules:

- **Heads** are dealt in whole key/value groups, so that no key/value head is kept twice. Where there are more ranks
  than key/value heads, consecutive ranks form a team per head; each of the team keeps that head, and its query heads
  are divided among them (by `weights` too, which count within the team only). More ranks than query heads leave some
  without attention: `--tp` refuses that, a split that says so (`heads=1,1,1,0`) is taken at its word.
- **Columns** of the feed-forward (of every expert alike, as the paper's own serving does: 8 x 1536 of 12288) are all
  dealt. Where the weights are FP8 in blocks a cut falls between blocks; with fewer blocks than ranks some ranks have no
  column, and still take part in attention and sums.
- **Experts** stay whole only where `experts=` says so: each rank then runs its own experts for all tokens.
- **Rotation.** A remainder stays on the same ranks only in one layer: in the next it falls to the next ranks, so that
  over all layers everybody has as much. It goes round among ranks that were to have equal shares: all of them, or those
  of equal `weights`. A split given by hand takes part where it is as even as can be and puts the remainder first
  (5,5,4); any other (4,5,5 or 6,4,4) is the same in every layer.
- **Vocabulary** rows are dealt like columns, and do not rotate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.engine.config import EngineConfig
from skymoe.engine.split_options import Asked, read_split
from skymoe.spec.model import ModelSpec, RopeScaling
from skymoe.spec.serving_plan import PlannedModel, PlannedSplit, ServingPlan, read_serving_plan
from skymoe.spec.split import Split

Weights = Literal["fp32", "bf16", "fp8"]
_ALIGNED = 16  # columns: whole vectors of every CPU and GPU, where it costs no balance
_FINE = 8  # units per rank from which on the coarser unit costs none


def divide(
    spec: ModelSpec, config: EngineConfig, *, fp8_block: int | None = None, weights: Weights | None = None
) -> ServingPlan:
    """The division that `config` asks for.

    Args:
        spec: the model.
        config: `tp`, `split`, `plan` and `rotate` are read; beside them what a plan says of memory.
        fp8_block: columns of a block where weights are FP8 in blocks; None lets columns be cut anywhere.
        weights: number format on disk; default by `fp8_block`.

    Raises:
        ConfigError: the wishes contradict each other or cannot be; the message names what can.
        FormatError: the plan file cannot be read, or is of another model.
    """
    if config.plan is not None:
        return _planned(spec, config)
    asked = read_split(config.split, config.tp)
    kind = weights or ("fp8" if fp8_block else "fp32" if config.dtype is DType.FLOAT32 else "bf16")
    model = planned_model(spec)
    heads = _heads(model, asked)
    _check_groups(model, heads)
    block = _block(model.columns, asked, fp8_block)
    columns, experts = _feed_forward(model, asked, block)
    split = PlannedSplit(
        heads=heads, kv_heads=_touched(model, heads), columns=columns, experts=experts,
        vocabulary=_dealt("vocabulary", model.vocabulary, asked),
    )  # fmt: skip
    plan = ServingPlan(
        model=model, weights=kind, kv=_kv(config, kind), context=context_limit(spec, config.max_model_len),
        max_batch=config.max_batch, kv_tokens=0, split=split, block=block,
    )  # fmt: skip
    return plan.model_copy(update={"rotate": _rotation(plan, asked)}) if config.rotate else plan


def planned_model(spec: ModelSpec) -> PlannedModel:
    """What a plan says of the model it is for."""
    return PlannedModel(
        layers=spec.num_layers, heads=spec.num_heads, kv_heads=spec.num_kv_heads,
        columns=spec.moe.ffn_size if spec.moe and spec.moe_layer_ids else spec.ffn_size,
        experts=spec.moe.num_experts if spec.moe and spec.moe_layer_ids else 1, vocabulary=spec.vocab_size,
    )  # fmt: skip


def context_limit(spec: ModelSpec, wished: int | None = None) -> int:
    """The most tokens of a request: what is wished, or all that the model can.

    Dynamic NTK stretches the frequencies by the longest text of a batch, also those of keys that are in the cache
    already; what a request gets would depend on its neighbours. So such a model is served up to its original context,
    within which nothing is stretched.

    Raises:
        ConfigError: more is wished than the model can.
    """
    dynamic = spec.rope.scaling is RopeScaling.DYNAMIC
    most = spec.rope.original_max_position or spec.max_position if dynamic else spec.max_position
    if wished is not None and wished > most:
        why = "beyond it dynamic NTK depends on the rest of the batch" if dynamic else "its positions end there"
        raise ConfigError(f"max_model_len {wished} is more than the model's {most}", why=why, hint=f"at most {most}")
    return most if wished is None else wished


def _kv(config: EngineConfig, weights: str) -> Literal["fp32", "bf16", "fp8"]:
    if config.kv_dtype != "auto":
        return config.kv_dtype
    return "fp32" if weights == "fp32" or config.dtype is DType.FLOAT32 else "bf16"


# ---- heads


def _heads(model: PlannedModel, asked: Asked) -> tuple[int, ...]:
    """Query heads per rank in layer 0."""
    group, ranks = model.heads // model.kv_heads, asked.num_ranks
    sizes = asked.sizes.get("heads")
    groups = asked.sizes.get("kv_heads")
    if groups is not None and ranks > model.kv_heads:
        raise ConfigError(
            f"--split kv_heads: {ranks} ranks share {model.kv_heads} key/value heads", why="some are kept twice then",
            hint="--split heads= says who reads which",
        )  # fmt: skip
    if groups is not None:
        _check_sum("kv_heads", groups, model.kv_heads)
        if sizes is not None and sizes != tuple(size * group for size in groups):
            raise ConfigError("--split heads and kv_heads contradict each other", hint="leave kv_heads out")
        return tuple(size * group for size in groups)
    if sizes is not None:
        _check_sum("heads", sizes, model.heads)
        return sizes
    if ranks > model.heads:
        idle = ",".join(["1"] * model.heads + ["0"] * (ranks - model.heads))
        raise ConfigError(
            f"{ranks} ranks for {model.heads} heads: some would have no attention",
            hint=f"--tp {model.heads}, or --split heads={idle} for ranks that only help with the rest",
        )
    if ranks <= model.kv_heads:
        return _shares(model.kv_heads, asked).scaled(group).sizes
    teams = Split.remainder_first(ranks, model.kv_heads)  # consecutive ranks, for each key/value head
    dealt = [_shares(group, asked.of(team)).sizes for team in teams]
    return tuple(size for sizes in dealt for size in sizes)


def _touched(model: PlannedModel, heads: Sequence[int]) -> tuple[int, ...]:
    """Key/value heads that each rank keeps."""
    group = model.heads // model.kv_heads
    return tuple(-(-part.stop // group) - part.start // group if part else 0 for part in Split(tuple(heads)))


def _check_groups(model: PlannedModel, heads: Sequence[int]) -> None:
    """Every rank has whole groups, or a part of one.

    Raises:
        ConfigError: with the nearest split that does.
    """
    group = model.heads // model.kv_heads
    for part in Split(tuple(heads)):
        inside_one = part and part.start // group == (part.stop - 1) // group
        if part and not inside_one and (part.start % group or part.stop % group):
            nearest = Split.weighted(model.kv_heads, heads).scaled(group).sizes
            raise ConfigError(
                f"heads={_joined(heads)} cuts through a key/value group",
                why=f"{group} query heads share a key/value head; a rank has whole groups, or a part of one",
                hint=f"heads={_joined(nearest)}",
            )


# ---- feed-forward, vocabulary


def _block(width: int, asked: Asked, fp8_block: int | None) -> int:
    """In which units columns are dealt."""
    if fp8_block is not None and fp8_block > 1:
        return fp8_block
    fine = width // _ALIGNED >= _FINE * asked.num_ranks
    given = asked.sizes.get("ffn", ())
    return _ALIGNED if width % _ALIGNED == 0 and fine and not any(size % _ALIGNED for size in given) else 1


def _feed_forward(model: PlannedModel, asked: Asked, block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Columns and experts per rank in layer 0."""
    ranks, whole = asked.num_ranks, asked.sizes.get("experts")
    if whole is not None:
        if model.experts == 1:
            raise ConfigError("--split experts: the model has none", hint="--split ffn=")
        if "ffn" in asked.sizes:
            raise ConfigError("--split takes experts (whole) or ffn (a part of each), not both")
        _check_sum("experts", whole, model.experts)
        return (model.columns,) * ranks, whole
    given = asked.sizes.get("ffn")
    if given is not None:
        _check_sum("ffn", given, model.columns)
        _check_blocks(given, model.columns, block)
        return given, (model.experts,) * ranks
    blocks = _shares(-(-model.columns // block), asked).scaled(block).sizes
    return _trimmed(blocks, model.columns), (model.experts,) * ranks


def _trimmed(sizes: Sequence[int], total: int) -> tuple[int, ...]:
    """Sizes in whole blocks, the last block only as wide as it is."""
    last = max(rank for rank, size in enumerate(sizes) if size)
    return tuple(size - (sum(sizes) - total) * (rank == last) for rank, size in enumerate(sizes))


def _check_blocks(sizes: Sequence[int], width: int, block: int) -> None:
    last = max(rank for rank, size in enumerate(sizes) if size)
    if any(size % block for size in sizes[:last]):
        nearest = _trimmed(Split.weighted(-(-width // block), sizes).scaled(block).sizes, width)
        raise ConfigError(
            f"--split ffn={_joined(sizes)} cuts through blocks of FP8", why=f"{block} columns share a scale",
            hint=f"--split ffn={_joined(nearest)}",
        )  # fmt: skip


def _dealt(name: str, total: int, asked: Asked) -> tuple[int, ...]:
    sizes = asked.sizes.get(name)
    if sizes is None:
        return _shares(total, asked).sizes
    _check_sum(name, sizes, total)
    return sizes


def _shares(units: int, asked: Asked) -> Split:
    return Split.weighted(units, asked.weights) if asked.weights else Split.remainder_first(units, asked.num_ranks)


def _check_sum(name: str, sizes: Sequence[int], total: int) -> None:
    if sum(sizes) != total:
        nearest = Split.weighted(total, sizes) if any(sizes) else Split.remainder_first(total, len(sizes))
        raise ConfigError(
            f"--split {name}={_joined(sizes)} sums to {sum(sizes)}, the model has {total}",
            hint=f"--split {name}={_joined(nearest.sizes)}",
        )


# ---- rotation


def _rotation(plan: ServingPlan, asked: Asked) -> tuple[tuple[int, ...], ...]:
    """Sets of ranks of equal shares whose remainder can go round."""
    model, split = plan.model, plan.split
    group = model.heads // model.kv_heads
    dealt = [_in_units(split.heads, group)]
    dealt.append(split.experts if plan.whole_experts else _in_units(split.columns, plan.block))
    units = [sizes for sizes in dealt if sizes is not None]
    equal: dict[float, list[int]] = {}
    for rank in range(plan.num_ranks):
        equal.setdefault(asked.weights[rank] if asked.weights else 1.0, []).append(rank)
    return tuple(tuple(ranks) for ranks in equal.values() if _turns(units, ranks))


def _in_units(sizes: Sequence[int], unit: int) -> tuple[int, ...] | None:
    """None where they are no multiples, so that a serving plan leaves them as they are."""
    return None if any(size % unit for size in sizes) else tuple(size // unit for size in sizes)


def _turns(units: Sequence[Sequence[int]], ranks: Sequence[int]) -> bool:
    parts = [tuple(sizes[rank] for rank in ranks) for sizes in units]
    even = all(part == Split.remainder_first(sum(part), len(part)).sizes for part in parts)
    return even and any(len(set(part)) > 1 for part in parts)


# ---- a plan from a file


def _planned(spec: ModelSpec, config: EngineConfig) -> ServingPlan:
    assert config.plan is not None
    if config.split:
        raise ConfigError("a plan says how to split; --split says it again", hint="give one of the two")
    plan = read_serving_plan(config.plan)
    if config.tp is not None and config.tp != plan.num_ranks:
        raise ConfigError(
            f"--tp {config.tp}, but the plan is for {plan.num_ranks} ranks", where=config.plan, hint="leave --tp out"
        )
    told = _differing(plan.model.model_dump(), planned_model(spec).model_dump())
    if told:
        raise ConfigError(
            f"the plan is for another model: {told}", where=config.plan, hint="skymoe plan serve for this model"
        )
    _check_groups(plan.model, plan.split.heads)
    most = context_limit(spec)
    context = min(plan.context, most) if config.max_model_len is None else context_limit(spec, config.max_model_len)
    return plan.model_copy(update={"context": context, **({} if config.rotate else {"rotate": ()})})


def _differing(planned: Mapping[str, int], actual: Mapping[str, int]) -> str:
    names = [name for name in planned if planned[name] != actual[name]]
    return ", ".join(f"{name} {planned[name]}, here {actual[name]}" for name in names)


def _joined(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
