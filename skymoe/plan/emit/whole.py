"""Stages of whole layers, for programs that cut nowhere else."""

from __future__ import annotations

from skymoe.spec.split import Split


def whole_layers(stages: Split) -> tuple[int, ...] | None:
    """Layers per stage nearest to a split in half layers; None when that leaves an inner stage empty.

    A cut between the halves of a layer moves to the layer's beginning: the feed-forward, the heavier half, stays where
    it is. Where that would empty a stage, it moves to the layer's end. First and last stage may be empty: they have
    the embedding and the head.
    """
    num_layers, num_stages = stages.num_units // 2, stages.num_ranks
    cuts = [0]
    for stage, start in enumerate(stages.offsets[1:], 1):
        least = cuts[-1] + (1 if stage > 1 else 0)
        most = num_layers - (num_stages - 1 - stage)  # an inner stage that follows needs a layer
        cuts.append(min(max(start // 2, least), most))
    sizes = tuple(stop - start for start, stop in zip(cuts, [*cuts[1:], num_layers], strict=True))
    return sizes if min(sizes) >= 0 and min(sizes[1:-1], default=1) > 0 else None


def is_whole(stages: Split) -> bool:
    """Whether no layer is cut."""
    return all(start % 2 == 0 for start in stages.offsets)
