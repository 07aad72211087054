"""The Grafana dashboard asks for metrics that the server has, by labels that they have, and shows all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from skymoe.engine.output import EngineInfo, EngineStats
from skymoe.serve.admission import Admission
from skymoe.serve.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "skymoe.json").read_text())
_BY_PROMETHEUS = {"instance", "job", "le"}


def exposed() -> dict[str, set[str]]:
    """Every series of a server, and its labels."""
    metrics = Metrics("m", Admission(max_requests=1, max_tokens=1))
    metrics.finished("stop")
    metrics.answered("/", 200)
    info = EngineInfo(
        name="m", vocab_size=9, max_model_len=9, eos_ids=(0,), bos_id=None, num_ranks=1, num_pages=9, page_size=16,
        num_layers=1, num_experts=2, moe_layers=(0,), weights="fp32", kv_dtype="fp32", split={"heads": (1,)},
    )  # fmt: skip
    stats = EngineStats(num_running=0, num_waiting=0, num_pages=9, free_pages=9, expert_tokens=((1, 2),))
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.expose(info, stats).decode()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query")


def test_every_metric_and_label_that_is_asked_for_exists() -> None:
    series, asked = exposed(), set()
    for query in queries():
        names = re.findall(r"skymoe_\w+", query)
        assert names, query
        asked |= set(names)
        for name, wanted in re.findall(r"(skymoe_\w+)\{([^}]*)\}", query):
            assert name in series, query
            grouped = [label for group in re.findall(r" by \(([\w, ]+)\)", query) for label in group.split(", ")]
            labels = {*re.findall(r"(\w+)=", wanted), *grouped}
            assert labels <= series[name] | _BY_PROMETHEUS, query
    assert asked <= series.keys(), asked - series.keys()
    base = re.compile(r"_(created|sum|count|bucket)$")
    unseen = {base.sub("", name) for name in series} - {base.sub("", name) for name in asked}
    assert {name for name in unseen if f"{name}_total" not in asked} == set()


def test_panels_do_not_overlap_and_name_their_unit() -> None:
    taken: set[tuple[int, int]] = set()
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    for panel in panels:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken and all(x < 24 for x, _ in cells)
        taken |= cells
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"] and panel["datasource"]["uid"] == "${datasource}"
