from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from skymoe.base.errors import FormatError
from skymoe.report.config import ReportConfig
from skymoe.report.run import ReportFile, run

sys.path.insert(0, str(Path(__file__).parent))
from fake_runs import write_demo, write_run

ALL = ("result", "loss", "balance", "gates", "experts", "speed", "receipt", "samples", "config", "environment",
       "reproduce")  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: the tags, the visible text, the chart data, the scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def chart(self, name: str) -> dict:
        return next(chart for chart in self.data["charts"] if chart["id"] == name)


def make(out: Path, *runs: Path, **options: object) -> tuple[ReportFile, Page]:
    report = run(ReportConfig(runs=runs, out=out, **options))  # type: ignore[arg-type]
    return report, Page(out)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("report") / "demo", steps=60, layers=3, experts=4)


def test_a_demo_has_every_section_and_is_the_same_every_time(demo: Path, tmp_path: Path) -> None:
    report, page = make(tmp_path / "a.html", demo)
    assert report.sections == ALL and report.notes == ()
    assert report.num_bytes == (tmp_path / "a.html").stat().st_size
    make(tmp_path / "b.html", demo)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "fewer bits per byte than the dense model" in page.text
    assert "skymoe demo --out demo --seed 0" in page.text


def test_without_out_the_page_lies_in_the_first_directory(tmp_path: Path) -> None:
    write_run(tmp_path / "r", moe=False, steps=3)
    assert run(ReportConfig(runs=(tmp_path / "r",))).path == tmp_path / "r" / "report.html"


def test_the_page_needs_no_network_and_allows_only_its_own_scripts(demo: Path, tmp_path: Path) -> None:
    _, page = make(tmp_path / "a.html", demo)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "data", "action"), (tag, name)
            assert name != "href" or str(value).startswith("#"), value
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "http" not in policy
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_the_page_is_well_formed_and_its_ids_are_unique(demo: Path, tmp_path: Path) -> None:
    _, page = make(tmp_path / "a.html", demo)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [str(attributes["href"])[1:] for tag, attributes in page.tags if tag == "a"]
    assert anchors == list(ALL) and set(anchors) <= set(ids)
    assert {f"plot-{chart['id']}" for chart in page.data["charts"]} <= set(ids)
    plots = [attributes for _, attributes in page.tags if attributes.get("class") == "plot"]
    assert all(attributes["aria-label"] for attributes in plots)


def test_the_figures_of_the_headline_are_those_of_the_runs(demo: Path, tmp_path: Path) -> None:
    _, page = make(tmp_path / "a.html", demo)
    ends = []
    for name in ("dense-continue", "moe-train"):
        records = [json.loads(line) for line in (demo / name / "metrics.jsonl").read_text().splitlines()]
        ends.append([r for r in records if r["kind"] == "eval"][-1]["bits_per_byte"]["all"])
    assert f"{ends[0]:.3f}" in page.text and f"{ends[1]:.3f}" in page.text
    assert f"−{(1 - ends[1] / ends[0]) * 100:.1f}" in page.text
    lines = {line["name"]: line for line in page.chart("bits")["lines"]}
    assert lines["MoE"]["y"][-1] == pytest.approx(ends[1], rel=1e-5)
    assert lines["MoE"]["xs"][1][-1] > lines["dense, continued"]["xs"][1][-1]  # same tokens, more compute
    assert lines["MoE"]["xs"][0] == lines["dense, continued"]["xs"][0]


def test_layers_domains_and_experts_all_appear(demo: Path, tmp_path: Path) -> None:
    _, page = make(tmp_path / "a.html", demo)
    names = [line["name"] for line in page.chart("layer-drop_rate")["lines"]]
    assert names == ["layer 0", "layer 1", "layer 2", "mean"]
    heats = [chart for chart in page.data["charts"] if chart["heat"]]
    assert len(heats) == 3
    for row in heats[0]["heat"]["z"]:
        assert len(row) == 4 and sum(row) == pytest.approx(4, rel=1e-3)  # multiples of the fair share


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    write_run(tmp_path / "long", moe=True, steps=1500, layers=2, evals=False)
    _, page = make(tmp_path / "a.html", tmp_path / "long", max_points=100)
    for chart in page.data["charts"]:
        assert all(len(line["y"]) <= 100 and len(line["y"]) == len(line["xs"][0]) for line in chart["lines"])
    tokens = page.chart("loss")["lines"][0]["xs"][0]
    assert tokens[0] == 16 * 256 and tokens[-1] == 1500 * 16 * 256


@pytest.mark.parametrize("moe", [False, True])
def test_one_run_alone_says_what_is_missing(tmp_path: Path, moe: bool) -> None:
    write_run(tmp_path / "only", moe=moe, steps=20)
    report, page = make(tmp_path / "a.html", tmp_path / "only")
    assert "no pair of a dense run and a mixture of experts" in page.text
    assert ("balance" in report.sections) == moe
    assert ("None of these runs trains a mixture of experts." in page.text) == (not moe)
    assert any(note.startswith("Samples") for note in report.notes)


def test_runs_without_evaluations_recipe_or_environment_still_make_a_page(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", moe=True, steps=10, evals=False)
    (bare / "recipe.yaml").unlink()
    (bare / "environment.json").unlink()
    report, page = make(tmp_path / "a.html", bare)
    assert report.sections == ("loss", "balance", "gates", "experts", "speed", "reproduce")
    assert "were not evaluated" in page.text and "no recipe.yaml" in page.text


def test_several_mixtures_are_compared_by_their_means(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"g{i}" / "run", moe=True, steps=20, layers=3, seed=i) for i in range(3)]
    _, page = make(tmp_path / "a.html", *runs)
    lines = page.chart("layer-drop_rate")["lines"]
    assert [line["name"] for line in lines] == ["g0/run", "g1/run", "g2/run"]
    assert len({line["color"] for line in lines}) == 3


def test_an_incomplete_demo_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    write_run(demo / "dense-continue", moe=False, steps=10)
    report, _ = make(tmp_path / "a.html", demo)
    assert "moe-train/metrics.jsonl is missing" in report.notes


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'\u2028"


def test_text_from_files_is_never_markup(tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo", steps=8, layers=2, experts=3)
    for name in ("dense-continue", "moe-train"):
        metrics = demo / name / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[0]["architecture"] = EVIL
        lines.append({"kind": "event", "step": 8, "event": EVIL, "detail": {EVIL: [EVIL]}})
        for line in lines:
            for key in ("loss", "bits_per_byte", "expert_load"):
                if line["kind"] == "eval" and key in line:
                    line[key][EVIL] = line[key].pop("code")
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (demo / name / "recipe.yaml").write_text(f"data: {{path: {json.dumps(EVIL)}}}\nrun: '{name}'\n")
        (demo / name / "environment.json").write_text(json.dumps({EVIL: EVIL, "command": [EVIL, name]}))
    (demo / "moe" / "receipt.json").write_text(json.dumps({"reason": EVIL, "exact": True, EVIL: EVIL, "kl": "x"}))
    (demo / "samples.json").write_text(json.dumps([{"prompt": EVIL, "dense": EVIL, "moe": EVIL, EVIL: EVIL}]))
    (demo / "summary.json").write_text(json.dumps({"command": EVIL, "seconds": {EVIL: EVIL}, "seed": EVIL}))
    _, page = make(tmp_path / "a.html", demo, title=EVIL)
    assert len(page.scripts) == 3 and "alert" not in "".join(page.scripts[1:])
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 12  # it is all there, as text


def test_broken_lines_and_numbers_are_gaps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", moe=True, steps=12, layers=2)
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    train = [i for i, line in enumerate(lines) if '"train"' in line]
    lines[train[2]] = lines[train[2]].replace('"loss": ', '"loss": NaN, "was": ')
    lines[train[3]] = lines[train[3]].replace('"loss": ', '"loss": "high", "was": ')
    lines[train[4]] = json.dumps({**json.loads(lines[train[4]]), "layers": {"drop_rate": [1e400, None, "x", 0.5]}})
    lines[train[5]] = json.dumps({**json.loads(lines[train[5]]), "layers": None, "tokens": 10**400})
    lines += ["not json", "[1, 2]", "[" * 100_000, '{"kind": "train", "step": 13, "loss": 3.']
    metrics.write_text("\n".join(lines))
    report, page = make(tmp_path / "a.html", path)
    assert "r: 4 line(s) of metrics.jsonl could not be read and were left out" in report.notes
    loss = page.chart("loss")["lines"][0]["y"]
    assert len(loss) == 12 and loss[2] is None and loss[3] is None and math.isfinite(loss[6])


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", moe=True, steps=10, layers=2, evals=False)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    again = [line for line in lines if '"train"' in line and json.loads(line)["step"] in (5, 6, 7)]
    (path / "metrics.jsonl").write_text("\n".join(lines[:-1] + again) + "\n")
    _, page = make(tmp_path / "a.html", path)
    assert page.chart("loss")["lines"][0]["xs"][0] == [step * 16 * 256 for step in range(1, 8)]


def test_directories_that_are_no_runs_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    with pytest.raises(FormatError, match=r"no metrics\.jsonl"):
        run(ReportConfig(runs=(tmp_path / "nothing",), out=out))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("garbage\n")
    with pytest.raises(FormatError, match="no record"):
        run(ReportConfig(runs=(tmp_path / "empty",), out=out))
    assert not out.exists()


def test_the_report_room_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, skymoe.report.run; sys.exit('torch' in sys.modules or 'plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
