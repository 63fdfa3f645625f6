"""`megaspark plan CONFIG`: what a run needs and takes on a cluster, before anybody pays for it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megaspark.accelerators import settle_accelerator
from megaspark.config import load_config
from megaspark.devices import DEVICES, Device
from megaspark.errors import UserError
from megaspark.flops import parameters, per_token
from megaspark.plans import Plan, gigabytes, lines, make_plan, nearby

SHOWN = 3  # other layouts


def main(argv: list[str]) -> int:
    """Prints the plan; raises UserError for an illegal layout, or for one that does not fit, naming one that does."""
    args = parser().parse_intermixed_args(argv)
    settle_accelerator()  # else DeepSpeed, which knows what its files may say, warns that there is no GPU here
    if args.gpus < 1 or (args.mfu is not None and not 0 < args.mfu <= 1):
        raise UserError("--gpus must be at least 1, and --mfu above 0 and at most 1")
    config, tree = load_config(args.config, args.overrides)
    device = DEVICES[args.gpu]
    plan = make_plan(config, tree, device, args.gpus)
    others = nearby(config, device, args.gpus)[:SHOWN] if args.others or not plan.fits else []
    if args.json:
        print(json.dumps({**described(plan, config, device, args.mfu), "others": [brief(other) for other in others]}, indent=1))
    else:
        print("\n".join(table(plan, config, device, args)))
        if others:
            print(f"\nthe {len(others)} layouts that fit with the least time bound:")
            for other in others:
                said = " ".join(other.overrides) or "(as it is)"
                print(f"  {other.costs.bound_s:8.3g} s {gigabytes(other.costs.memory.peak):>6} GB  {said}")
    if not plan.fits:
        usable = f"the {gigabytes(device.usable_bytes)} GB that {device.driver_name} has left for it"
        near = f"nearest that fits: {' '.join(others[0].overrides)}" if others else "no layout fits: take more or larger GPUs"
        raise UserError(f"a rank needs {gigabytes(plan.costs.memory.peak)} GB, more than {usable}; {near}")
    return 0


def table(plan: Plan, config: Any, device: Device, args: argparse.Namespace) -> list[str]:
    """The whole plan, a figure a line."""
    work, found = plan.work, plan.costs
    count = f"{parameters(work.shape, work.tied):,} parameters"
    heading = f"{config.run.name}: {count} on {work.world} x {device.driver_name}, {work.precision}"
    rows = [heading, *(f"  {line}" for line in lines(plan, device)), "", "memory of a rank, bytes:"]
    rows += [f"  {name:24} {value:>20,}" for name, value in {**found.memory.parts(), "peak": found.memory.peak}.items()]
    rows += ["sent by a rank in a step, bytes:"]
    rows += [
        f"  {v.kind:24} {v.sent_bytes:>20,}  {v.op} among {v.group}{', between nodes' if v.crosses else ''}" for v in found.sent
    ]
    flops = per_token(work.shape, work.seq)
    rows += [
        "a step:",
        f"  {'tokens':24} {work.step_tokens:>20,}",
        f"  {'FLOPs, Litespark count':24} {flops.litespark * work.step_tokens:>20,}",
        f"  {'FLOPs, causal':24} {work.step_flops:>20,}",
        f"  {'FLOPs done again':24} {work.recomputed_flops:>20,}",
        f"the run: {config.run.steps:,} steps, {config.run.steps * work.step_tokens:,} tokens, "
        f"at least {days(config.run.steps * found.bound_s)}",
    ]
    if args.mfu is not None:
        step_s = seconds_at(plan, device, args.mfu)
        rows.append(f"at {args.mfu:.1%} MFU (Litespark count): {step_s:.3g} s a step, {days(config.run.steps * step_s)}")
    return rows


def described(plan: Plan, config: Any, device: Device, mfu: float | None) -> dict[str, Any]:
    """The plan as plain data."""
    work, found = plan.work, plan.costs
    return {
        "run": config.run.name,
        "gpu": device.driver_name,
        "gpus": work.world,
        "parameters": parameters(work.shape, work.tied),
        "fits": plan.fits,
        "memory_bytes": {**found.memory.parts(), "peak": found.memory.peak, "device": device.memory_bytes},
        "sent_bytes": {volume.kind: volume.sent_bytes for volume in found.sent},
        "bubble": found.bubble,
        "tokens": work.step_tokens,
        "flops": per_token(work.shape, work.seq).litespark * work.step_tokens,
        "flops_causal": work.step_flops,
        "bound_s": found.bound_s,
        "compute_s": found.compute_s,
        "overlapped_s": found.overlapped_s,
        "exposed_s": found.exposed_s,
        "steps": config.run.steps,
        "step_s": None if mfu is None else seconds_at(plan, device, mfu),
    }


def brief(plan: Plan) -> dict[str, Any]:
    """Another layout: how to say it, and what decides."""
    return {"overrides": list(plan.overrides), "bound_s": plan.costs.bound_s, "peak_bytes": plan.costs.memory.peak}


def seconds_at(plan: Plan, device: Device, mfu: float) -> float:
    """A step's time at a share of the peak that the user states, counted as metrics.jsonl counts its mfu."""
    work = plan.work
    return per_token(work.shape, work.seq).litespark * work.step_tokens / (mfu * device.peak(work.precision) * work.world)


def days(seconds: float) -> str:
    """A long time in days, a short one in hours."""
    return f"{seconds / 86400:.3g} days" if seconds > 86400 else f"{seconds / 3600:.3g} hours"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="megaspark plan",
        description="Says whether a run's layout is legal and fits, what a rank holds and sends, and a time that no step can beat. "
        "Neither the data nor the GPUs are needed. Exit status 2: illegal, or does not fit.",
        epilog="example: megaspark plan ds_configs/llama-3b-16nodes.yaml --gpu h200 --gpus 128 --mfu 0.4",
    )
    out.add_argument("config", metavar="CONFIG", help="a run's YAML")
    out.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    out.add_argument("--gpu", choices=DEVICES, default="h200", help="8 a node (default: h200)")
    out.add_argument("--gpus", type=int, default=8, help="how many in all (default: 8)")
    out.add_argument("--mfu", type=float, help="also the time at this share of the peak")
    out.add_argument("--others", action="store_true", help="also the best other layouts; shown anyway if this one does not fit")
    out.add_argument("--json", action="store_true")
    return out
