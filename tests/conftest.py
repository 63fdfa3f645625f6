"""What the tests share: `--all`, an environment cut off from the network, a small corpus of tokens, a launcher of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# Set before any test module imports torch, deepspeed or transformers, which read them once.
os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")})

VOCAB, EOS = 131, 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long: run with --all"))


@pytest.fixture(autouse=True, scope="session")
def _own_extensions_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test compiles reaches, or waits for a lock in, the user's own folder of torch extensions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.getbasetemp() / "torch_extensions"))
        yield


# ---- data


def write_tokens(folder: Path, name: str, shards: Sequence[Sequence[Sequence[int]]], tokenizer: bytes = b"a tokenizer") -> Path:
    """A token dataset at `folder`: shards of documents of token ids below VOCAB, as data prep would write it."""
    from megaspark.shards import Counts, Manifest, ShardWriter, dtype_for, sha256_of

    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    infos = []
    for number, documents in enumerate(shards):
        with ShardWriter(folder, f"{name}-{number:05d}", dtype_for(VOCAB), source=name) as writer:
            for document in documents:
                writer.add(document)
        infos.append(writer.info)
    counts = Counts(read=sum(map(len, shards)), kept=sum(map(len, shards)), tokens=sum(info.tokens for info in infos))
    Manifest(
        name=name, tokenizer="tokenizer.model", tokenizer_sha256=sha256_of(folder / "tokenizer.model"), vocab=VOCAB,
        dtype=dtype_for(VOCAB).name, eos_id=EOS, bos_id=None, append_eos=True, prepend_bos=False, settings_sha256="0" * 64,
        shards=tuple(infos), counts={name: counts}, job=counts,
    ).save(folder)  # fmt: skip
    return folder


def random_documents(seed: int, count: int, longest: int = 60) -> list[list[int]]:
    """Documents of 1 to `longest` random ids above EOS, each ended by EOS; low ids are likelier, so that loss can fall."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, count)
    return [[*(3 + (generator.random(n) ** 3 * (VOCAB - 3)).astype(int)).tolist(), EOS] for n in lengths]


@dataclass(frozen=True)
class TinyData:
    """Folders of token datasets: `train` holds datasets a and b of three shards each, `validation` one."""

    train: Path
    validation: Path
    tokenizer: Path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two training datasets for blends, about 6,000 and 3,000 tokens, and a validation dataset of 1,500."""
    folder = tmp_path_factory.mktemp("tokens")
    for seed, (name, per_shard) in enumerate({"a": 70, "b": 35}.items()):
        shards = [random_documents(10 * seed + number, per_shard) for number in range(3)]
        write_tokens(folder / "train" / name, name, shards)
    write_tokens(folder / "validation" / "a", "a", [random_documents(99, 50)])
    return TinyData(folder / "train", folder / "validation", folder / "train" / "a" / "tokenizer.model")


def tiny_run(data: TinyData, folder: Path, **changes: str) -> tuple[Path, list[str]]:
    """A run's YAML, written into `folder`, on the tiny data; `changes` become overrides, a_b for a.b. Returns (path, overrides).

    Its sizes are awkward on purpose: hardly any parameter divides by 2, so that partitions are padded.
    """
    path = folder / "run.yaml"
    path.write_text(
        f"""\
model: {{arch: llama, hidden: 33, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn: 41, vocab: {VOCAB}, init_std: 0.1}}
data: {{train: {data.train}, validation: {data.validation}, seq: 24, document_mask: true}}
optim: {{lr: 1.0e-2, min_lr: 1.0e-3, warmup_steps: 2, weight_decay: 0.1, clip: 1.0}}
run: {{name: tiny, dir: {folder / "runs"}, steps: 20, global_batch: 8, micro_batch: 2, seed: 3, precision: fp32}}
deepspeed: zero1.json
"""
    )
    return path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]


# ---- processes


@dataclass(frozen=True)
class Finished:
    """What a launch ended with; `returncode` is 0 only if every process's was."""

    returncode: int
    stdout: str
    stderr: str

    def checked(self) -> Finished:
        """Itself, if it succeeded; else fails the test with the end of what was said."""
        assert self.returncode == 0, f"exit status {self.returncode}\n{self.stdout[-2000:]}\n{self.stderr[-6000:]}"
        return self


Launch = Callable[..., Finished]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def process_environment(**extra: str) -> dict[str, str]:
    """This environment for a child: offline, on CPU, one thread, the checkout importable, nobody's rank."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if key not in ranks}
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    bin_folder = str(Path(sys.executable).parent)
    return {**kept, **ENVIRONMENT, "PYTHONPATH": path, "PATH": f"{bin_folder}{os.pathsep}{kept.get('PATH', '')}", **extra}


def launch_processes(processes: int, script: Path, *arguments: str, timeout_s: float = 120) -> Finished:
    """Runs `python script arguments` in so many processes, with the environment that torchrun would give each.

    Ends them all when one fails or the time is up. stdout is rank 0's, stderr everybody's, one after the other.
    """
    port = str(free_port())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        outputs = [((folder / f"out{rank}").open("w+"), (folder / f"err{rank}").open("w+")) for rank in range(processes)]
        children = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments], stdout=out, stderr=error, stdin=subprocess.DEVNULL, cwd=CHECKOUT,
                env=process_environment(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                ),
            )
            for rank, (out, error) in enumerate(outputs)
        ]  # fmt: skip
        codes = _wait_for_all(children, timeout_s)
        for file in (file for pair in outputs for file in pair):
            file.close()
        stdout = (folder / "out0").read_text()
        stderr = "\n".join((folder / f"err{rank}").read_text() for rank in range(processes))
    return Finished(next((code for code in codes if code), 0), stdout, stderr)


def _wait_for_all(children: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Exit statuses; as soon as one child fails, or when the time is up, the others are killed (status -9)."""
    end = time.monotonic() + timeout_s
    while any(child.poll() is None for child in children):
        if time.monotonic() > end or any(child.poll() for child in children):
            time.sleep(0.5)  # for the others to say why, if they fail too
            for child in children:
                child.kill()
            break
        time.sleep(0.02)
    return [child.wait() for child in children]


def launch_deepspeed(processes: int, script: Path, *arguments: str, timeout_s: float = 120) -> Finished:
    """Runs `deepspeed --num_gpus N script arguments`, the way users do."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes), "--master_port", str(free_port())]
    done = subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, timeout=timeout_s, cwd=CHECKOUT,
        env=process_environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run_python() -> Callable[..., Finished]:
    """Runs a piece of Python text in a fresh process: run_python(text, *arguments)."""

    def run(text: str, *arguments: str, timeout_s: float = 60) -> Finished:
        done = subprocess.run(
            [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=timeout_s, cwd=CHECKOUT,
            env=process_environment(), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def launch() -> Launch:
    """launch(N, script, *arguments, by="torchrun" or "deepspeed"): real processes; see `launch_processes`."""

    def run(processes: int, script: Path, *arguments: str, by: str = "torchrun", timeout_s: float = 120) -> Finished:
        starter = launch_deepspeed if by == "deepspeed" else launch_processes
        return starter(processes, script, *arguments, timeout_s=timeout_s)

    return run


def snapshot(folder: Path) -> str:
    """Everything under a folder with its size and time: equal before and after means that nothing was written."""
    found = sorted((str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    return json.dumps(found)
