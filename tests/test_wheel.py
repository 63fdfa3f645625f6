"""The wheel, installed in a fresh environment beside Hugging Face's `kernels` package, imports and runs."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from conftest import CHECKOUT, process_environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the files that git tracks or would track, as a release is."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (CHECKOUT / name).is_file() and not name.startswith("tests/"):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((CHECKOUT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_setting_and_nothing_else(wheel: Path) -> None:
    """A package missing from setup.cfg is silently absent; a top-level `kernels` would overwrite Hugging Face's."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = {"megaspark": "megaspark", "kernels": "megaspark/kernels", "data_prep": "megaspark/data_prep",
               "tools": "megaspark/tools", "ds_configs": "megaspark/ds_configs"}  # fmt: skip
    expected = set()
    for folder, target in folders.items():
        for path in (CHECKOUT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json", ".jsonl", ".cpp", ".hpp") and "__pycache__" not in path.parts:
                expected.add(f"{target}/{path.relative_to(CHECKOUT / folder)}")
    assert inside == expected


@pytest.mark.launch
def test_installed_wheel_runs_beside_hugging_face_kernels(wheel: Path, tmp_path: Path) -> None:
    """Installed, without the checkout: commands, shipped configs, our kernels and theirs, and transformers' Llama all load."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), "kernels==0.17.2"]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    # Torch and the others are lent from this environment: a second copy would take minutes to install.
    site = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    next(home.glob("lib/python*/site-packages")).joinpath("lent.pth").write_text(f"{site}\n")
    environment = process_environment()
    environment.pop("PYTHONPATH")
    code = """
import sys, kernels
from transformers import LlamaForCausalLM
import megaspark.kernels.rms_norm, megaspark.data_prep.run, megaspark.tools.to_hf, megaspark.train
assert hasattr(kernels, "get_kernel"), "not Hugging Face's kernels"
for module in (megaspark, megaspark.kernels.rms_norm, kernels):
    assert "environment" in module.__file__, module.__file__
from megaspark.train import load_config
print(load_config("llama-demo.yaml", [])[0].run.name)
"""
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "demo", done.stderr[-3000:]
    command = [str(home / "bin" / "megaspark"), "pretrain", "--config", "llama-demo.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "megaspark prep" in done.stderr, done.stderr[-3000:]
