"""`qdora doctor`: can a run start here? Every check prints what it found and, if need be, what to do about it."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qdora import parallel
from qdora.config import DoctorConfig, Report
from qdora.doctor import machine, ranks
from qdora.doctor.finding import Finding, Row, Verdict, joined
from qdora.doctor.model import model
from qdora.errors import EXIT_ERROR
from qdora.parallel import World

COLOURS = {Verdict.ok: "green", Verdict.skipped: "dim", Verdict.warning: "yellow", Verdict.failed: "red"}


def doctor(config: DoctorConfig) -> int:
    """Checks this machine and every rank that was started; 0 if a run can start, 1 if not. *Collective*."""
    world = parallel.start(config.parallel)
    try:
        rows = joined(parallel.gather(world, examine(config, world)))
    finally:
        parallel.stop()
    can_start = all(row.finding.verdict is not Verdict.failed for row in rows)
    if world.is_main:
        if config.report is Report.json:
            print(_as_json(rows, world, can_start))
        else:
            _show(rows, world, can_start)
    return 0 if can_start else EXIT_ERROR


def examine(config: DoctorConfig, world: World) -> list[Finding]:
    """What this rank finds; what concerns the whole machine its first rank alone. *Collective*."""
    dtype = getattr(torch, config.model.dtype.name)
    found: list[Finding] = []
    if world.local_rank == 0:
        found += [*machine.software(), machine.processor()]
    found += [*machine.gpu(world.device), machine.kernels(world.device, dtype)]
    found += ranks.collectives(world)
    found += ranks.speeds(world, dtype)
    parallel.disarm_watchdog()
    if world.local_rank == 0:
        found += [machine.disk(Path(config.output_dir)), machine.shared_memory()]
    if world.is_main:
        found += [machine.tracker(config.tracker), machine.hub(), model(config.model)]
    return found


def _as_json(rows: list[Row], world: World, can_start: bool) -> str:
    findings = [asdict(row.finding) | {"verdict": row.finding.verdict.name, "ranks": row.ranks} for row in rows]
    return json.dumps({"can_start": can_start, "world_size": world.size, "findings": findings}, indent=2)


def _show(rows: list[Row], world: World, can_start: bool) -> None:
    table = Table(title=f"qdora doctor: {world.size} rank{'s' * (world.size > 1)} on {world.device.type}")
    for name in ("check", "verdict", "found"):
        table.add_column(name, overflow="fold")
    for row in rows:
        finding = row.finding
        some = "" if len(row.ranks) in (1, world.size) else f"ranks {', '.join(map(str, row.ranks))}: "
        text = Text(some + finding.found)
        if finding.remedy:
            text.append(f"\n{finding.remedy}", "bold")
        table.add_row(finding.check, Text(finding.verdict.name, COLOURS[finding.verdict]), text)
    console = Console(highlight=False)
    console.print(table)
    failed = [row.finding.check for row in rows if row.finding.verdict is Verdict.failed]
    console.print("a run can start here" if can_start else f"a run cannot start here: {', '.join(failed)}")


__all__ = ["doctor"]
