"""Who may import whom, and what nobody may use: read from the sources, not from what is loaded.

Each rule has a small bad source that the checker must report, so that no rule is empty.
"""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "spectral_scale"

# From the ground up: a package imports from floors below its own, never from its own or above.
FLOORS = (
    {"errors"},
    {"files"},
    {"ops", "config", "parallel", "hyperbolic"},
    {"optim", "models", "cluster", "metrics"},
    {"methods", "doctor"},
    {"backends"},
    {"__init__", "megatron"},  # the package's face: names for a user's own loop
    {"data", "checkpoint", "tasks"},
    {"supervision"},
    {"engine"},
    {"plan", "artifacts", "bench", "integrations"},
    {"gpu_checks"},
    {"cli"},
    {"testing", "__main__"},
)

# package -> packages of this project that it may import, besides itself and the version.
BELOW_BACKENDS = frozenset(
    {"errors", "files", "config", "ops", "parallel", "models", "optim", "methods"}
)
BELOW_ENGINE = BELOW_BACKENDS | {"backends", "data", "checkpoint", "metrics", "supervision"}
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "ops": frozenset({"errors"}),
    "files": frozenset({"errors"}),
    "config": frozenset({"errors", "files"}),
    "parallel": frozenset({"errors"}),
    "hyperbolic": frozenset({"errors"}),
    "metrics": frozenset({"errors", "config"}),
    "optim": frozenset({"errors", "config", "ops", "parallel"}),
    "models": frozenset({"errors", "files", "config", "ops", "parallel"}),
    "cluster": frozenset({"errors", "files", "parallel"}),
    "methods": BELOW_BACKENDS - {"methods", "models"},
    "doctor": frozenset({"files", "cluster", "parallel"}),
    "backends": BELOW_BACKENDS,
    "__init__": BELOW_BACKENDS | {"backends"},
    "megatron": frozenset({"config", "backends"}),
    "data": frozenset({"errors", "files", "config", "ops"}),
    "checkpoint": frozenset({"errors", "files", "parallel"}),
    "tasks": frozenset({"errors", "files"}),
    "supervision": frozenset(
        {"errors", "files", "config", "parallel", "checkpoint", "data", "backends"}
    ),
    "engine": BELOW_ENGINE,
    "plan": BELOW_BACKENDS - {"ops"} | {"data", "engine", "metrics"},
    "artifacts": BELOW_ENGINE | {"engine"},
    "bench": BELOW_ENGINE | {"engine"},
    "integrations": BELOW_BACKENDS - {"models", "ops"} | {"engine"},
    "gpu_checks": BELOW_ENGINE | {"cluster", "engine", "bench", "plan"},
    "cli": BELOW_ENGINE
    | {"cluster", "engine", "artifacts", "bench", "plan", "doctor", "gpu_checks"},
    "testing": BELOW_ENGINE | {"engine", "cli", "cluster"},
    "__main__": frozenset({"cli"}),
}
# Folders of these packages are apart from each other: what they share lies beside them.
APART = {"methods", "backends"}

# third-party module -> where it may be imported (path prefixes inside the package).
ONLY_IN = {
    "torch": (
        *("ops/", "parallel/", "optim/", "models/", "methods/", "doctor/", "backends/", "data/"),
        *("checkpoint/", "metrics/", "supervision/", "engine/", "artifacts/", "bench/", "testing/"),
        *("gpu_checks/", "hyperbolic/", "integrations/", "tasks/"),
    ),
    "torch.distributed": (
        *("parallel/", "doctor/", "backends/", "checkpoint/", "supervision/", "engine/"),
        "testing/",
    ),
    "transformers": (
        *("models/", "backends/", "data/", "engine/", "artifacts/", "bench/", "cli/", "testing/"),
        "integrations/",
    ),
    "deepspeed": ("backends/deepspeed/", "testing/deepspeed.py"),
    "megatron": ("backends/megatron/", "testing/megatron.py"),
    "mpi4py": ("cluster/mpi.py",),
}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec", "__import__"}
FORBIDDEN_CALLS = re.compile(
    r"torch\.(serialization\.)?load|torch\.hub\.\w+|os\.(system|popen)"
    r"|yaml\.(full_load|unsafe_load)(_all)?"
    r"|(.+\.)?(all_gather_object|gather_object|send_object_list|recv_object_list"
    r"|broadcast_object_list|scatter_object_list)"
)
FORBIDDEN_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True}


@dataclass(frozen=True)
class Import:
    """One imported module, as written."""

    module: str
    line: int
    on_load: bool
    """Executed when the file is imported, not inside a function."""


def runtime_imports(tree: ast.Module) -> Iterator[Import]:
    """Every import that can run, those under TYPE_CHECKING left out."""
    yield from _imports(tree, on_load=True)


def _imports(node: ast.AST, on_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), on_load)
            continue
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, on_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from _from_import(child, on_load)
        elif isinstance(child, ast.Call):
            yield from _dynamic_import(child, on_load)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, on_load and not inside)


def _from_import(node: ast.ImportFrom, on_load: bool) -> Iterator[Import]:
    module = "." * node.level + (node.module or "")
    if node.module in (PACKAGE, "torch"):  # `from torch import distributed` names a module
        yield from (Import(f"{module}.{alias.name}", node.lineno, on_load) for alias in node.names)
    else:
        yield Import(module, node.lineno, on_load)


def _dynamic_import(node: ast.Call, on_load: bool) -> Iterator[Import]:
    if not ast.unparse(node.func).endswith("import_module") or not node.args:
        return
    name = node.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        yield Import(name.value, node.lineno, on_load)


def violations(path: str, source: str) -> list[str]:
    """What `source` does against the rules, were it the package's file `path` ("ops/svd.py")."""
    tree = ast.parse(source)
    found = [f"{path}: no catch-all modules"] if PurePosixPath(path).name == "utils.py" else []
    for imported in runtime_imports(tree):
        fault = _import_fault(path, imported.module)
        found += [f"{path}:{imported.line}: {fault}"] if fault else []
    for node in ast.walk(tree):
        fault = None
        if isinstance(node, ast.Call):
            fault = _call_fault(path, node) or _yaml_fault(node, tree)
        found += [f"{path}:{node.lineno}: {fault}"] if fault else []
    return found


def _import_fault(path: str, module: str) -> str | None:
    if module.startswith("."):
        return "relative import; write the whole name"
    top = module.split(".")[0]
    if top == PACKAGE:
        return _package_fault(path, module)
    if top in PICKLERS:
        return f"{top} executes what it loads"
    for name, places in ONLY_IN.items():
        if f"{module}.".startswith(f"{name}.") and not path.startswith(places):
            return f"{name} may be imported only in {', '.join(places)}"
    return None


def _package_fault(path: str, module: str) -> str | None:
    parts = module.split(".")
    source = path.split("/")[0].removesuffix(".py")
    if source not in MAY_IMPORT:
        return f"package {source} has no row in the table"
    if len(parts) == 1 or parts[1] == "__version__":
        return None
    if parts[1] == source:
        return _neighbour_fault(path, parts)
    if parts[1] not in MAY_IMPORT[source]:
        return f"{source} may not import {parts[1]}"
    return None


def _neighbour_fault(path: str, parts: list[str]) -> str | None:
    """methods/sst/ and methods/frod/ do not know each other, nor do the backends."""
    folders = path.split("/")[:-1]
    if len(folders) < 2 or folders[0] not in APART or len(parts) < 4:
        return None
    if parts[2] != folders[1]:
        return f"{'/'.join(folders[:2])} may not import its neighbour {parts[1]}.{parts[2]}"
    return None


def _call_fault(path: str, node: ast.Call) -> str | None:
    name = ast.unparse(node.func)
    if name == "print" and not path.startswith("cli/"):
        return "only cli/ prints"
    if name in FORBIDDEN_NAMES or FORBIDDEN_CALLS.fullmatch(name):
        return f"{name} is forbidden"
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg in FORBIDDEN_KEYWORDS and value is FORBIDDEN_KEYWORDS[keyword.arg]:
            return f"{keyword.arg}={value} is forbidden"
    return None


def _yaml_fault(node: ast.Call, tree: ast.Module) -> str | None:
    """yaml.load is fine with the safe loader, or with a class of the same file built on it."""
    if ast.unparse(node.func) not in ("yaml.load", "yaml.load_all"):
        return None
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    classes = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef)]
    safe |= {c.name for c in classes if safe & {ast.unparse(base) for base in c.bases}}
    if any(k.arg == "Loader" and ast.unparse(k.value) in safe for k in node.keywords):
        return None
    return "yaml.load needs a safe Loader"


def load_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules of the package that importing it imports first."""
    names = {_module_name(path): source for path, source in sources.items()}
    graph: dict[str, set[str]] = {}
    for name, source in names.items():
        tree = ast.parse(source)
        loaded = {i.module for i in runtime_imports(tree) if i.on_load}
        graph[name] = {module for module in loaded if module in names and module != name}
    return graph


def _module_name(path: str) -> str:
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join([PACKAGE, *parts]).removesuffix(".__init__")


SOURCES = {
    str(file.relative_to(ROOT / PACKAGE)): file.read_text(encoding="utf-8")
    for file in sorted((ROOT / PACKAGE).rglob("*.py"))
}


@pytest.mark.fast
@pytest.mark.parametrize("path", SOURCES)
def test_file_keeps_the_contract(path):
    assert violations(path, SOURCES[path]) == []


@pytest.mark.fast
def test_arrows_lead_down_and_testing_is_imported_by_nobody():
    floor = {package: level for level, packages in enumerate(FLOORS) for package in packages}
    assert floor.keys() == MAY_IMPORT.keys()
    upward = [
        (package, other)
        for package, allowed in MAY_IMPORT.items()
        for other in allowed
        if floor[other] >= floor[package]
    ]
    assert upward == []
    assert all("testing" not in allowed for allowed in MAY_IMPORT.values())


BAD = {
    "a layer above": ("ops/bad.py", "from spectral_scale.methods.sst.layer import SSTLinear"),
    "a layer above, by package": ("ops/bad.py", "from spectral_scale import methods"),
    "a layer above, in a function": ("data/bad.py", "def f():\n    import spectral_scale.engine"),
    "a layer above, by name": ("optim/bad.py", "import_module('spectral_scale.engine.loop')"),
    "testing": ("engine/bad.py", "from spectral_scale.testing import harness"),
    "a package without a row": ("helpers/bad.py", "import spectral_scale.errors"),
    "relative": ("ops/bad.py", "from . import sampling"),
    "torch in config": ("config/bad.py", "import torch"),
    "torch in the command line": ("cli/bad.py", "from torch import nn"),
    "distributed in ops": ("ops/bad.py", "import torch.distributed as dist"),
    "distributed in methods": ("methods/sst/bad.py", "from torch.distributed import all_reduce"),
    "distributed in models": ("models/bad.py", "from torch import distributed"),
    "distributed in optim": ("optim/bad.py", "from torch.distributed.tensor import DTensor"),
    "deepspeed": ("engine/bad.py", "def f():\n    import deepspeed.runtime"),
    "deepspeed in another backend": ("backends/torch/backend.py", "import deepspeed"),
    "a backend's neighbour": (
        "backends/fsdp2/bad.py",
        "from spectral_scale.backends.torch.backend import TorchBackend",
    ),
    "a method's neighbour": (
        "methods/frod/bad.py",
        "from spectral_scale.methods.sst.layer import SpectralLinear",
    ),
    "the engine from what watches over it": (
        "supervision/bad.py",
        "from spectral_scale.engine.build import Run",
    ),
    "the backends from a method": (
        "methods/sst/bad.py",
        "from spectral_scale.backends.base import Backend",
    ),
    "megatron": ("models/bad.py", "from megatron.core import tensor_parallel"),
    "transformers": ("methods/bad.py", "from transformers import OPTForCausalLM"),
    "transformers in checkpoint": ("checkpoint/reader.py", "import transformers"),
    "under an else of TYPE_CHECKING": (
        "config/bad.py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import torch",
    ),
    "print": ("engine/bad.py", "print('hello')"),
    "utils": ("data/utils.py", ""),
    "pickle": ("checkpoint/bad.py", "import pickle"),
    "dill": ("data/bad.py", "from dill import loads"),
    "torch.load": ("checkpoint/bad.py", "state = torch.load(path, weights_only=True)"),
    "object collectives": ("parallel/bad.py", "dist.all_gather_object(found, fact)"),
    "eval": ("config/bad.py", "eval(text)"),
    "exec": ("config/bad.py", "exec(text)"),
    "shell": ("cli/bad.py", "subprocess.run(command, shell=True)"),
    "os.system": ("cli/bad.py", "os.system(command)"),
    "yaml.load": ("config/bad.py", "yaml.load(text)"),
    "yaml.full_load": ("config/bad.py", "yaml.full_load(text)"),
    "an unsafe loader": ("config/bad.py", "yaml.load(text, Loader=yaml.Loader)"),
    "an own unsafe loader": (
        "config/bad.py",
        "class Mine(yaml.Loader):\n    pass\nyaml.load(text, Loader=Mine)",
    ),
    "remote code": ("data/bad.py", "AutoTokenizer.from_pretrained(p, trust_remote_code=True)"),
    "pickled arrays": ("data/bad.py", "np.load(path, allow_pickle=True)"),
}


@pytest.mark.parametrize(("path", "source"), BAD.values(), ids=BAD)
def test_checker_reports(path, source):
    assert len(violations(path, source)) == 1


GOOD = {
    "types only": ("config/good.py", "if TYPE_CHECKING:\n    import torch"),
    "model.eval()": ("engine/good.py", "model.eval()"),
    "no remote code": ("data/good.py", "load(path, trust_remote_code=False)"),
    "safe yaml": ("config/good.py", "yaml.safe_load(text)"),
    "an own safe loader": (
        "config/good.py",
        "class Mine(yaml.SafeLoader):\n    pass\nyaml.load(text, Loader=Mine)",
    ),
    "the own package": ("backends/deepspeed/backend.py", "import deepspeed"),
    "a layer below": ("engine/good.py", "from spectral_scale.methods.sst.bank import Bank"),
    "a similar name": ("config/good.py", "import torchless"),
    "a command that prints": ("cli/good.py", "print('done')"),
}


@pytest.mark.parametrize(("path", "source"), GOOD.values(), ids=GOOD)
def test_checker_allows(path, source):
    assert violations(path, source) == []


@pytest.mark.fast
def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter(load_graph(SOURCES)).prepare()


def test_a_circle_is_found_but_not_through_a_function():
    circle = {
        "ops/a.py": "from spectral_scale.ops.b import f",
        "ops/b.py": "import spectral_scale.ops.a",
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(load_graph(circle)).prepare()
    lazy = circle | {"ops/b.py": "def f():\n    import spectral_scale.ops.a"}
    graphlib.TopologicalSorter(load_graph(lazy)).prepare()


def whole_graph(sources: dict[str, str], folder: str) -> dict[str, set[str]]:
    """Module of a folder -> its modules that it imports anywhere: when it is loaded, inside a
    function, or for types alone."""
    names = {_module_name(path): text for path, text in sources.items() if path.startswith(folder)}
    graph: dict[str, set[str]] = {}
    for name, source in names.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Call):
                found |= {imported.module for imported in _dynamic_import(node, False)}
        graph[name] = found & names.keys() - {name}
    return graph


@pytest.mark.parametrize("folder", ["backends/", "methods/"])
def test_no_circle_inside_a_folder_even_through_a_function(folder):
    graph = whole_graph(SOURCES, folder)
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "back",
    [
        "def f():\n    from spectral_scale.backends.deepspeed.store import ZeroStore",
        "def f():\n    from spectral_scale.backends.deepspeed import store",
        "if TYPE_CHECKING:\n    from spectral_scale.backends.deepspeed.store import ZeroStore",
        "def f():\n    import_module('spectral_scale.backends.deepspeed.store')",
    ],
    ids=["in a function", "by package", "for types", "by name"],
)
def test_a_circle_inside_a_folder_is_found(back):
    circle = {
        "backends/deepspeed/store.py": "from spectral_scale.backends.deepspeed.clipping import f",
        "backends/deepspeed/clipping.py": back,
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(whole_graph(circle, "backends/")).prepare()


# distribution -> module, where the names differ.
MODULE_OF = {"pyyaml": "yaml"}


def declared_modules() -> set[str]:
    """Third-party modules that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]]
    return {MODULE_OF.get(name, name) for name in names}


def undeclared(source: str, declared: set[str]) -> set[str]:
    """Third-party modules that `source` imports though nothing asks for them."""
    tops = {i.module.split(".")[0] for i in runtime_imports(ast.parse(source))}
    hosts = {"deepspeed", "megatron", "mpi4py"}  # optional, with their own install message
    return tops - {PACKAGE} - hosts - declared - set(sys.stdlib_module_names)


def test_every_import_is_a_declared_dependency():
    declared = declared_modules()
    assert {p: u for p, s in SOURCES.items() if (u := undeclared(s, declared))} == {}
    assert undeclared("import requests, json, torch", declared) == {"requests"}


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
{code}
"""


def run_without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter where the `blocked` packages cannot be imported."""
    program = BLOCKED.format(blocked=blocked, code=code)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_import_loads_nothing_heavy():
    code = "import spectral_scale; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = run_without(set(), code)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "transformers", "numpy", "matplotlib", "datasets", "jsonargparse"}
    assert not heavy & set(ast.literal_eval(done.stdout))


HELP = "import runpy; sys.argv = ['spectral-scale', '--help']; runpy.run_module('spectral_scale')"
HEAVY = {"torch", "deepspeed", "megatron", "transformers"}


def test_help_works_without_torch():
    done = run_without(HEAVY, HELP.replace("('spectral_scale')", "('spectral_scale.__main__')"))
    assert done.returncode == 0, done.stderr
    assert "usage: spectral-scale" in done.stdout


def test_blocking_blocks():
    done = run_without(HEAVY, "from spectral_scale import convert")
    assert done.returncode == 1
    assert "torch is blocked" in done.stderr
