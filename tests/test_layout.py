"""The house rules of docs/architecture.md, held against the code: who imports whom, what lies where, what it is called."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from conftest import CHECKOUT

FOLDERS = ("megaspark", "kernels", "data_prep", "tools")
LINES_AT_MOST = 400

# A module imports only from the lines below its own. Finer than the picture in docs/architecture.md, which must agree with it.
LAYERS = (
    "pretrain __main__",
    "cli tools/*",
    "trl_runs",
    "posttrained_folders",
    "posttraining",
    "train",
    "refusals",
    "starts",
    "recorders guards",
    "savers",
    "checkpoint_writers",
    "traffic_reports",
    "engine scorers plans data_prep/run data_prep/dedup",
    "data_prep/dry_run",
    "placements",
    "pipelines",
    "checkpoint config weights validations proofs gguf_files data_prep/outputs data_prep/dedup_jobs",
    "data_prep/units data_prep/sketches",
    "data_prep/jobs data_prep/clusters",
    "fragments layouts hf evaluations models/* data_prep/steps data_prep/fast_encoders",
    "data_prep/filters/* data_prep/encode",
    "data_prep/filters/_shared",
    "models/__init__ models/blocks deepspeed_files optim batches rope_scalings model_cards hf_kernels",
    "data_prep/documents data_prep/stages",
    "bad_steps data_prep/tables data_prep/duplicates data_prep/workers",
    "data_prep/streams",
    "data_prep/sources data_prep/sorted_runs data_prep/minhash",
    "kernels/* samples groups pieces meters overlaps safetensors_files",
    "kernels/dispatch",
    "kernels/interpreter kernels/cases kernels/native",
    "packing",
    "permutations shards",
    "hf_tokenizers output_folders text_bytes harness_tasks code_tasks completions example_files costs comm_counters",
    "manifests settings volumes",
    "accelerators",
    "rank_logs launchers footprints",
    "devices workloads",
    "ranks signals terminals watchdogs flops energy allocators gguf_readers sandboxes confinements",
    "errors __init__",
)
# Neither these nor data_prep may need torch: a data job on a head node starts in a blink.
WITHOUT_TORCH = (
    "shards", "manifests", "settings", "samples", "packing", "permutations", "overlaps",
    "ranks", "launchers", "signals", "watchdogs", "terminals", "rank_logs", "guards", "flops", "devices", "workloads",
    "footprints", "volumes", "costs", "errors", "cli", "__init__", "data_prep/*",
)
HEAVY = {"torch", "deepspeed", "transformers"}


def modules() -> dict[str, Path]:
    """Every module by its name in the table above ("engine", "models/llama", "kernels/rope") -> its file."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            parts = path.relative_to(CHECKOUT).with_suffix("").parts
            found["/".join(parts[1:] if folder == "megaspark" else parts)] = path
    return found


MODULES = modules()


def line_of(module: str) -> int:
    """The line of a module in LAYERS, 0 at the top: by its own name if it stands there, else by a pattern."""
    for number, line in enumerate(LAYERS):
        if module in line.split():
            return number
    for number, line in enumerate(LAYERS):
        if any("*" in pattern and fnmatch(module, pattern) for pattern in line.split()):
            return number
    raise AssertionError(f"{module} has no place: give it one in LAYERS and in docs/architecture.md")


def module_named(dotted: str) -> str:
    """The table's name of what `megaspark.a.b.c` stands for: the module itself, or the one that holds the name c."""
    name = dotted.removeprefix("megaspark").strip(".").replace(".", "/") or "__init__"
    for candidate in (name, f"{name}/__init__", name.rpartition("/")[0], f"{name.rpartition('/')[0]}/__init__"):
        if candidate in MODULES:
            return candidate
    return "__init__"  # a name that megaspark/__init__.py defines


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where a module lies"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    return {module_named(name) for name in imported(MODULES[module]) if name.split(".")[0] == "megaspark"} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    """An upward or sideways import makes two parts one: data prep would need torch, or a kernel the trainer."""
    for other in own_imports(module):
        if module.startswith("kernels/") and other.startswith("kernels/"):
            continue  # an op may be built of others; the test below keeps them out of circles
        assert line_of(other) > line_of(module), f"{module} imports {other}, which is not below it in LAYERS"


def test_no_circles():
    """Modules that import each other work until somebody imports the other one first."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join([*path, module])}"
        if module not in done:
            for other in sorted(own_imports(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_kernels_stand_alone_and_nobody_imports_tools():
    """Kernels are used inside transformers without the trainer; a tool that is imported is no tool but a module."""
    for module in MODULES:
        others = own_imports(module)
        if module.startswith("kernels/"):
            assert all(other.startswith("kernels/") for other in others), module
        assert not any(other.startswith("tools/") for other in others), module


def test_the_picture_agrees():
    """The page that people read, docs/architecture.md, must not show another order than the one that is held."""
    text = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.partition("## Who imports whom")[2].partition("```")[2].partition("```")[0].strip().splitlines()
    lines = [[name for entry in re.findall(r"[\w/]+\{[^}]*\}|[^\s,]+", line) for name in names_in(entry)] for line in picture]
    assert len(lines) > 5
    for number, line in enumerate(lines):
        for upper in line:
            for lower in (name for below in lines[number + 1 :] for name in below):
                assert line_of(upper) < line_of(lower), f"the picture has {upper} above {lower}, LAYERS has not"
    shown = {name for line in lines for name in line}
    missing = set(MODULES) - shown - {"__init__", "__main__", "models/__init__"}
    assert not missing, f"docs/architecture.md does not show {sorted(missing)}"


def names_in(entry: str) -> list[str]:
    """The modules that an entry of the picture stands for: a name, `models/<arch>`, `kernels/*`, `data_prep/{a, b/*}`."""
    folder, brace, inside = entry.partition("{")
    if brace:
        return [name for part in inside.rstrip("}").split(",") for name in names_in(folder + part.strip())]
    if entry == "models/<arch>":
        return [name for name in MODULES if name.startswith("models/") and name not in ("models/__init__", "models/blocks")]
    if entry == "kernels/<op>":
        return [name for name in MODULES if name.startswith("kernels/") and line_of(name) == line_of("kernels/rope")]
    found = [name for name in MODULES if fnmatch(name, entry)]
    assert found, f"docs/architecture.md shows {entry}, which is no module"
    return found


@pytest.mark.parametrize("pattern", WITHOUT_TORCH)
def test_these_never_name_torch(pattern):
    """Also not inside a function: a worker of a data job would pull in 600 MB at its first document."""
    found = [module for module in MODULES if fnmatch(module, pattern)]
    assert found
    for module in found:
        assert not {name.split(".")[0] for name in imported(MODULES[module])} & HEAVY, module


def test_these_do_not_bring_torch_in(run_python):
    """What they import in turn (a library, or a module of ours) may bring torch along: asked of a real interpreter."""
    names = [
        "megaspark." + module.replace("/", ".") for module in MODULES
        if any(fnmatch(module, pattern) for pattern in WITHOUT_TORCH) and module != "__init__"
    ]  # fmt: skip
    text = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint({HEAVY} & set(sys.modules))"
    assert run_python(text).checked().stdout.strip() == "set()"


@pytest.mark.parametrize("path", [*MODULES.values(), *(CHECKOUT / "tests").glob("*.py")], ids=lambda path: path.stem)
def test_nobody_uses_the_bare_names(path):
    """A top-level `kernels` is Hugging Face's package: `from transformers import LlamaForCausalLM` would break."""
    bare = {"kernels", "data_prep", "tools", "ds_configs", *(m for m in MODULES if "/" not in m)} - {"__init__", "__main__"}
    assert not {name.split(".")[0] for name in imported(path)} & bare


def test_no_module_shadows_another():
    """Run by path, megaspark/ comes first on sys.path: a `types.py` in it would be everybody's."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - {"megaspark"}
    inside = {path.stem for path in (CHECKOUT / "megaspark").glob("*")} - {"__init__", "__main__"}
    assert "types" in taken and "torch" in taken and "engine" in inside
    assert not inside & taken


def test_setup_cfg_lists_every_folder():
    """A subpackage that is not listed is silently absent from the wheel."""
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    listed = parser["options"]["packages"].split()
    places = dict(re.split(r"\s*=\s*", line) for line in parser["options"]["package_dir"].strip().splitlines())
    expected = {}
    for path in MODULES.values():
        folder = path.parent.relative_to(CHECKOUT)
        dotted = ".".join(folder.parts)
        expected[dotted if folder.parts[0] == "megaspark" else f"megaspark.{dotted}"] = str(folder)
    assert sorted(listed) == sorted([*expected, "megaspark.ds_configs"])
    for package, folder in expected.items():
        implied = package.startswith("megaspark.") and folder == package.replace(".", "/")
        assert places.get(package) == folder or implied, f"package_dir lacks {package} = {folder}"
    for folder in ("kernels", "data_prep", "tools"):
        assert not (CHECKOUT / folder / "__init__.py").exists(), f"{folder}/__init__.py makes it importable by its bare name"


def test_shipped_configs_are_in_the_wheel():
    """package_data that misses a file ending leaves an installed megaspark without its configs."""
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    patterns = [p.strip() for p in parser["options.package_data"]["megaspark.ds_configs"].split(",")]
    for path in (CHECKOUT / "ds_configs").iterdir():
        if path.is_file():
            assert any(fnmatch(path.name, pattern) for pattern in patterns), path.name


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_for(module):
    """A file without a first line of its own, a public name without a docstring, or a file too long to read in one sitting."""
    text = MODULES[module].read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}: {node.name} has no docstring"
    assert len(text.splitlines()) <= LINES_AT_MOST, f"{module} has {len(text.splitlines())} lines"


# ---- nothing pickled

FORBIDDEN = {
    ("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("joblib", "load"),
    ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("marshal", "loads"), ("shelve", "open"),
}  # fmt: skip


def unsafe_calls(source: str) -> list[str]:
    """Ways in which Python text can run code that a file brings along: unpickling, unsafe YAML, np.load with pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in FORBIDDEN:
            found.append(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in modules if name in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")]
            if isinstance(node, ast.ImportFrom):
                found += [f"{node.module}.{a.name}" for a in node.names if (node.module, a.name) in FORBIDDEN]
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            found += [node.arg] if not (isinstance(node.value, ast.Constant) and node.value.value is False) else []
    return found


def test_nothing_pickled_is_ever_loaded():
    """A checkpoint, a dataset or a tokenizer from elsewhere could run whatever it likes."""
    for text in ("import pickle", "torch.load(x)", "from torch import load", "np.load(f, allow_pickle=True)", "yaml.load(x, L)"):
        assert unsafe_calls(text), text
    assert not unsafe_calls("np.load(f, allow_pickle=False); yaml.safe_load(x); json.load(f)")
    for folder in ("megaspark", "kernels", "data_prep", "tools"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            assert unsafe_calls(path.read_text()) == [], path
