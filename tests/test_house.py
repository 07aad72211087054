"""Rules of the house that no single room can keep alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import skymoe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "skymoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEXTS = sorted(
    path
    for folder in ("skymoe", "tests", "docs", "recipes", "benchmarks", "examples", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in ("", ".py", ".md", ".yaml", ".toml", ".html", ".css", ".js", ".txt", ".json") and path.is_file()
) + sorted(path for path in ROOT.iterdir() if path.is_file() and path.suffix in ("", ".md", ".toml", ".txt"))

# In two pieces, so that this file does not find itself.
HOSTS = ["pypi" + ".org", "pythonhosted" + ".org", "download." + "pytorch.org", "/opt" + "/", "index" + "-url"]
MACHINE_PATHS = ["/work" + "/main", "/work" + "/shared", "/tmp" + "/v/", "/home" + "/", "/root" + "/", "/Users" + "/"]

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("os", "system"), ("subprocess", "getoutput"),
}  # fmt: skip
FORBIDDEN_SWITCHES = {"allow_pickle", "shell", "trust_remote_code"}
FORBIDDEN_METHODS = {
    "recv_pyobj", "send_pyobj", "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_imports_point_down() -> None:
    """The contracts of pyproject.toml: floors, torch-free rooms, no transformers."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_torch_free_rooms_load_no_torch() -> None:
    """As the contract, but by what is in sys.modules: it also sees what a third package brings along."""
    rooms = ("base", "spec", "plan", "data", "report", "ckpt")
    files = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0] in rooms or path.name == "config.py"]
    files.remove(PACKAGE / "ckpt" / "export.py")  # as the contract says
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert len(modules) > 20
    code = f"""if True:
        import sys, importlib
        for module in {modules!r}:
            importlib.import_module(module)
            assert "torch" not in sys.modules, module
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_skymoe_is_cheap_and_load_is_there() -> None:
    code = """if True:
        import sys, skymoe
        assert not {"torch", "transformers", "skymoe.integrations.transformers"} & sys.modules.keys()
        assert callable(skymoe.load)
        assert "torch" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="lode"):
        _ = skymoe.lode  # type: ignore[attr-defined]


def imported(path: Path) -> set[str]:
    """Every module that the file names in an import, wherever it stands."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_transformers_is_imported_on_the_roof_only() -> None:
    """The contract of pyproject.toml does not see `hf_model`, which is no package. Only `import skymoe` opens it."""
    users = {
        path.relative_to(PACKAGE).parts[0] for path in SOURCES if any(_is_of(m, "transformers") for m in imported(path))
    }
    assert users == {"integrations", "hf_model"}
    visitors = {
        path.relative_to(PACKAGE).parts[0]
        for path in SOURCES
        if any(_is_of(m, "skymoe.integrations") for m in imported(path))
    }
    assert visitors == {"__init__.py", "integrations"}


def _is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in FORBIDDEN_MODULES:
                yield node.lineno, node.module
            yield from ((node.lineno, a.name) for a in node.names if (node.module, a.name) in FORBIDDEN_ATTRIBUTES)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            yield node.lineno, node.func.id
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) in FORBIDDEN_ATTRIBUTES or node.attr in FORBIDDEN_METHODS:
                yield node.lineno, f"{owner}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_SWITCHES and ast.unparse(node.value) != "False":
            yield node.value.lineno, f"{node.arg}="


def test_no_pickle_no_eval_no_shell() -> None:
    found = [f"{path}:{line}: {what}" for path in SOURCES for line, what in dangers(ast.parse(path.read_text("utf-8")))]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "from torch import load",
        "eval('1')",
        "d.gather_object(x)",
        "np.load(f, allow_pickle=True)",
        "run(c, shell=True)",
    ],
)
def test_the_gate_above_sees(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def test_no_package_host_and_no_path_of_a_machine() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in TEXTS
        if path.name != "LICENSE"
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1)
        if any(text in line for text in HOSTS + MACHINE_PATHS)
    ]
    assert not lines


def test_every_test_file_holds_a_test() -> None:
    empty = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        machine = any(isinstance(node, ast.Assign) and "TestCase" in ast.unparse(node.value) for node in tree.body)
        if not machine and not any(function.name.startswith("test_") for function in functions(tree)):
            empty.append(str(path))
    assert not empty


def test_every_test_asserts() -> None:
    """A test without an assertion, an expected error or a checked process tests nothing."""
    signs = re.compile(r"\bassert\w*|pytest\.(raises|warns|fail)|check=True|check_\w+\(|gradcheck|\bast\.parse\(")
    bodies = [
        (path, function, ast.unparse(function))
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for function in functions(ast.parse(path.read_text("utf-8")))
    ]
    helpers = {function.name for _, function, body in bodies if signs.search(body)}
    silent = []
    for path, function, body in bodies:
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        if function.name.startswith("test_") and not signs.search(body) and not names & helpers:
            silent.append(f"{path.relative_to(ROOT)}:{function.lineno}: {function.name}")
    assert not silent


def test_functions_and_files_stay_readable() -> None:
    """Examples to follow, not limits to enforce: long ones are listed as a warning, only absurd ones fail."""
    lengths = {
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1
        for path in SOURCES
        for f in functions(ast.parse(path.read_text("utf-8")))
    }
    files = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    long = {name: n for name, n in lengths.items() if n > 60} | {name: n for name, n in files.items() if n > 300}
    if long:
        warnings.warn(f"longer than they should be: {long}", stacklevel=1)
    assert max(lengths.values()) <= 120
    assert max(files.values()) <= 500
    assert sum(lengths.values()) / len(lengths) <= 20


def test_no_empty_rooms() -> None:
    """A package holds code: no room is furnished before somebody lives there."""
    bare = [p.parent.name for p in SOURCES if p.name == "__init__.py" and not ast.parse(p.read_text("utf-8")).body]
    assert not bare


def test_links_between_documents_lead_somewhere() -> None:
    dead = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                dead.append(f"{path.name}: {target}")
    assert not dead


def test_the_map_knows_every_room() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    known = set(
        re.findall(r"^\|[^|]*\| `(\w+)/`", (ROOT / "docs/architecture.md").read_text("utf-8"), flags=re.MULTILINE)
    )
    assert rooms == known


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == skymoe.__version__


def test_every_extra_that_an_error_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    named = re.findall(r'MissingExtraError\([^)]*?"([\w,-]+)"\)', "".join(path.read_text("utf-8") for path in SOURCES))
    assert len(named) >= 5
    assert {extra for names in named for extra in names.split(",")} <= extras


def test_constraints_satisfy_the_requirements() -> None:
    """Every direct dependency has a tested version, within the bounds of pyproject.toml."""
    requirements = pytest.importorskip("packaging.requirements")
    utils = pytest.importorskip("packaging.utils")
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[utils.canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    for requirement in map(requirements.Requirement, wanted):
        name = utils.canonicalize_name(requirement.name)
        if name not in ("skymoe", "wandb"):  # wandb is offered, not tested
            assert requirement.specifier.contains(pins[name]), requirement
