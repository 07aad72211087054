from typer.testing import CliRunner

from skymoe.cli.plan import app
from skymoe.plan.trust import FILE, Found, encode, found
from skymoe.plan.validate.gates import gates_of


def test_the_packaged_figures_are_those_of_the_gates():
    names = {gate.name for gate in gates_of((), ())}
    assert found() and set(found()) <= names
    assert encode(found().values()) == FILE.read_bytes()


def test_a_validation_writes_them(tmp_path):
    cases = FILE.parents[2] / "tests" / "plan" / "data" / "cases.json"
    out = tmp_path / "accuracy.json"
    result = CliRunner().invoke(app, ["validate", "--cases", str(cases), "--write-accuracy", str(out)])
    assert result.exit_code == 0, result.output
    assert '"name": "memory, mean error"' in out.read_text()


def test_what_is_over_its_limit_says_so():
    assert (
        Found("x", 0.2, 0.1, 3).said == "x: 20.0% off on average over 3 published figures, more than the 10% aimed at"
    )
    assert Found("x", 0.05, 0.1, 3).said == "x: 5.0% off on average over 3 published figures"
