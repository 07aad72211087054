"""Case files come from anywhere: whatever stands in them, every row is judged or set aside with a reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skymoe.base.errors import FormatError
from skymoe.plan.validate.cases import Case, NotJudgedError, check_cases, read_cases
from skymoe.plan.validate.mappings import with_mappings
from skymoe.plan.validate.run import validate

ROWS = json.loads((Path(__file__).parent / "data" / "cases.json").read_text(encoding="utf-8"))
QUICK = [row for row in ROWS if row["group"] != "zero_bubble"]


def test_what_is_no_row_is_set_aside_with_its_reason():
    cases, refused = check_cases([ROWS[0], 5, {}, {"id": "a", "kind": "training"}, ROWS[0]])
    assert [case.id for case in cases] == [ROWS[0]["id"]]
    reasons = ["not an object", "no id, no kind, no group", "no group", "the id appears twice"]
    assert [one.reason for one in refused] == reasons


def test_a_broken_file_is_refused_as_a_whole(tmp_path):
    path = tmp_path / "cases.json"
    for content in ("{}", "[1", '{"cases": 5}', '[{"id": NaN}]'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(FormatError):
            read_cases(path)
    path.write_text(json.dumps({"cases": ROWS[:2]}), encoding="utf-8")
    assert len(read_cases(path)[0]) == 2


def test_fields_are_bounded():
    case = Case("a", "training", "g", {"model": {"n": 5, "big": 1e30, "half": 2.5, "yes": True, "list": [1, -1]}})
    assert case.count("model.n") == 5 and case.count("model.none", 7) == 7 and case.text("model.n", "x") == "x"
    for path in ("model.big", "model.half", "model.yes", "model.none", "model", "n.m.o"):
        with pytest.raises(NotJudgedError):
            case.count(path)
    with pytest.raises(NotJudgedError):
        case.numbers("model.list")


def test_unknown_kinds_gpus_and_layouts_are_named():
    changed = [copy.deepcopy(ROWS[0]) for _ in range(6)]
    changed[0]["kind"] = "astrology"
    changed[1]["cluster"]["gpu"] = "abacus \x1b[31m"
    changed[2]["parallel"] = None
    changed[3]["cluster"]["num_gpus"] = 7
    changed[4]["model"]["num_layers"] = 10**9
    changed[5]["model"]["name"] = "Mamba-2"
    for number, row in enumerate(changed):
        row["id"], row["group"] = f"case {number}", f"group {number}"
    report = validate(*check_cases(changed))
    assert not report.comparisons
    reasons = {one.case: one.reason for one in report.not_judged}
    words = ("astrology", "catalogue", "not published", "7 GPUs", "outside", "kind that is not modelled")
    assert len(reasons) == 6 and all(word in reasons[f"case {n}"] for n, word in enumerate(words))
    assert "\x1b" not in "".join(reasons.values())


def test_a_mapping_is_looked_up_in_the_same_file():
    row = copy.deepcopy(next(row for row in ROWS if row["id"] == "mpf-mixtral-8x22b-MCore"))
    other = copy.deepcopy(row)
    other["id"], other["cluster"]["num_gpus"] = "scaled", 256
    other["parallel"] = {"tp": None, "pp": None, "dp": None, "method": "MCore", "note": "same mapping as Table 3"}
    found = with_mappings(check_cases([row, other])[0])[1]
    assert (found.get("parallel.tp"), found.get("parallel.pp"), found.get("parallel.ep")) == (2, 8, 4)
    alone = with_mappings(check_cases([other])[0])
    assert "not published" in validate(alone).not_judged[0].reason


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(QUICK), st.data())
def test_no_value_of_any_field_ends_the_validation(row, data):
    row = copy.deepcopy(row)
    section = data.draw(st.sampled_from([key for key in row if key not in {"id", "group"}]))
    if isinstance(row[section], dict) and row[section] and data.draw(st.booleans()):
        row[section][data.draw(st.sampled_from(sorted(row[section])))] = data.draw(JUNK)
    else:
        row[section] = data.draw(JUNK)
    for key in ("num_microbatches", "global_batch_size"):  # no long simulations here
        if isinstance(row.get("batch"), dict) and isinstance(row["batch"].get(key), (int, float)):
            row["batch"][key] = min(row["batch"][key], 512)
    cases, refused = check_cases([row])
    report = validate(cases, refused)
    assert report.comparisons or report.not_judged
    json.dumps(report.as_json())
