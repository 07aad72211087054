"""A Gpu from a measured profile: the constants of the laws are those that were fitted on this machine.

What was measured replaces the catalogue's figure: rates of matrix products (as a peak that is reached whole, so MFU on
such a Gpu is a share of what products reach, not of a data sheet), memory, launch, links between ranks. What a profile
has no figure for is the catalogue's: attention keeps its share relative to products, the network out of the node its
latency and bandwidth.
"""

from __future__ import annotations

from dataclasses import replace

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.catalogue import find_gpu
from skymoe.plan.hardware.gpu import Gpu, Precision
from skymoe.plan.hardware.profile import LinkKind, Profile

_MEASURED = " (measured)"
_SUMS = (LinkKind.ALL_REDUCE, LinkKind.REDUCE_SCATTER, LinkKind.ALL_GATHER, LinkKind.ALL_TO_ALL)


def gpu_from_profile(profile: Profile, *, base: Gpu | None = None) -> Gpu:
    """The device of `profile`.

    Args:
        profile: as read.
        base: for what was not measured; None: the catalogue's entry of that title, or its `cpu`.
    """
    base = find_gpu(measured_on(profile) or "cpu") if base is None else base
    laws = replace(
        base.laws,
        gemm=1.0,
        gemm_narrow=1.0,
        memory=1.0,
        launch_s=max(law.launch_s for law in profile.law.values()) if profile.law else base.laws.launch_s,
        attention=min(1.0, base.laws.attention / base.laws.gemm),
        host_s=_host_s(profile, base),
    )
    link = next((profile.links[kind].link for kind in _SUMS if kind in profile.links), base.node)
    return replace(
        base,
        name=f"{base.name.removesuffix(_MEASURED)}{_MEASURED}",
        title=profile.machine.title or base.title,
        memory=profile.machine.memory,
        peak=_rates(profile, base),
        bandwidth=profile.stream,
        node=link,
        pair=profile.links[LinkKind.P2P].link if LinkKind.P2P in profile.links else None,
        laws=laws,
        source="measured by `skymoe plan profile`",
        origin="measured by `skymoe plan profile`; attention in proportion to the catalogue's",
    )


def measured_on(profile: Profile) -> str | None:
    """The entry of the catalogue that the profile is of: `cpu`, or a GPU by its title; None where there is none."""
    if profile.machine.device.startswith("cpu"):
        return "cpu"
    try:
        return find_gpu(profile.machine.title).name
    except ConfigError:
        return None


def _host_s(profile: Profile, base: Gpu) -> float:
    """The host starts a dense half layer in no more than the fastest measured one took; in less where the catalogue
    says so, for what was measured may have waited for the device instead.
    """
    halves = [kind.attention for kind in profile.times.kinds]
    halves += [kind.feed_forward for kind in profile.times.kinds if not kind.is_moe]
    return min(base.laws.host_s, *(min(half.forward_s, half.backward_s) for half in halves))


def _rates(profile: Profile, base: Gpu) -> dict[Precision, float]:
    """FLOP/s that products reach: measured; others in the proportion of the catalogue's peaks."""
    measured = {precision: law.rate for precision, law in profile.law.items()}
    if not measured:
        return {precision: base.reached(precision) for precision in base.peak}
    known = next(iter(measured))
    factor = measured[known] / base.reached(known)
    return {precision: base.reached(precision) * factor for precision in base.peak} | measured
