"""The tree is what the design says: who may import whom, and how the kernels are reached."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdiff"

# A module may import those of the lines above its own, and what its line names of its own.
LAYERS = [
    {"files", "parts", "early", "devices"},
    {"schedules", "reference", "data", "unet", "version", "cli", "tuned", "ideal", "metrics"},
    {"distributed", "unet2d", "solvers", "library", "ways", "pictures", "native"},
    {"ops", "progress", "runs"},
    {"noise", "fused", "rewrite", "collect", "cpu"},
    {"loop"},
    {"sampler", "likelihood"},
    {"checkpoint"},
    {"diffusers", "classifier", "toy"},
    {"field", "gallery"},
    {"tour", "densities"},
    {"__init__", "sample", "train", "evaluate", "show"},
]
ONLY_FOR = {"diffusers": {"diffusers"}, "triton": set(), "kernels": {"ops"}, "matplotlib": {"train", "field", "evaluate"}}


def imports(path: Path) -> set[tuple[int, str]]:
    """(level, module) of every import in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, node.module)} if node.module else {(node.level, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    (layer,) = [i for i, names in enumerate(LAYERS) if path.stem in names]
    below = set().union(*LAYERS[:layer])
    for level, module in imports(path):
        top = module.split(".")[0]
        if level or top == "fastdiff":
            assert top in below | ONLY_FOR.keys(), f"{path.stem} imports {module}, which does not stand below it"
        if top in ONLY_FOR:
            assert path.stem in ONLY_FOR[top], f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_only_triton_torch_and_each_other(path):
    own = {p.stem for p in path.parent.glob("*.py")}
    for level, module in imports(path):
        assert module.split(".")[0] in (sys.stdlib_module_names | {"triton", "torch"} if level == 0 else own), (
            f"{path.stem} imports {module}"
        )


def test_kernels_is_a_link_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a package called kernels would shadow the one that diffusers looks for"
    assert (PACKAGE / "kernels").is_symlink()
    assert os.readlink(PACKAGE / "kernels") == "../kernels"


def test_importing_fastdiff_needs_neither_triton_nor_diffusers_nor_matplotlib():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('triton', 'diffusers', 'matplotlib')))"
    code = f"{blocked}; import fastdiff; print(fastdiff.normal(0, [0], 0, (4,)).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 4])\n", done.stderr


def test_public_names():
    import fastdiff

    assert all(hasattr(fastdiff, name) for name in fastdiff.__all__)
    wanted = {"load", "Sampler", "Schedule", "solvers", "add_noise", "normal", "Checkpoint"}
    assert wanted <= set(fastdiff.__all__)


def conftest(pytestconfig):
    return pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


@pytest.mark.parametrize(("worker", "named"), [(False, False), (True, False), (False, True)])
def test_the_suite_is_shared_once(worker, named, pytestconfig, monkeypatch):
    """By workers that have none of their own, which would have workers in turn, and where no tests are named."""
    option = SimpleNamespace(numprocesses=None, dist="no", collectonly=False, usepdb=False)
    source = pytestconfig.ArgsSource.ARGS if named else pytestconfig.ArgsSource.TESTPATHS
    config = SimpleNamespace(
        option=option, args_source=source, ArgsSource=pytestconfig.ArgsSource, pluginmanager=pytestconfig.pluginmanager
    )
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    own = conftest(pytestconfig)
    own.pytest_cmdline_main(config)
    shared = not worker and not named and not own.CUDA and pytestconfig.pluginmanager.hasplugin("xdist")
    assert (option.numprocesses is not None) == (option.dist == "loadfile") == shared


@pytest.mark.parametrize("worker", [False, True])
def test_slow_files_come_first_in_workers_only(worker, pytestconfig):
    """benchmarks/gpu names the kernels' tests first, should the time not do for all."""
    items = [SimpleNamespace(path=Path(f"tests/test_{name}.py")) for name in ("ops", "runs", "unet", "sample")]
    conftest(pytestconfig).pytest_collection_modifyitems(SimpleNamespace(**({"workerinput": {}} if worker else {})), items)
    wanted = ("sample", "runs", "ops", "unet") if worker else ("ops", "runs", "unet", "sample")
    assert [item.path.stem for item in items] == [f"test_{name}" for name in wanted]


def test_sampling_on_a_cpu_does_not_wait_for_the_compiler():
    """torch._dynamo takes a second to import, longer than the images of a learner."""
    code = (
        "import sys, torch, fastdiff; s = fastdiff.load('sprites').sampler(device='cpu', compile=False); "
        "print(s(2, steps=2, labels=0).shape, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "torch.Size([2, 3, 16, 16]) False\n", done.stderr
