"""What a check found, and how it is shown."""

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    ok = "ok"
    skipped = "skipped"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A finding and the ranks that had it."""

    finding: Finding
    ranks: list[int]


def joined(parts: list[list[Finding]]) -> list[Row]:
    """Every rank's findings, those that are the same as one, in the order in which they first appear by check."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(parts):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    checks = list(dict.fromkeys(finding.check for finding in ranks))
    return [Row(finding, ranks[finding]) for finding in sorted(ranks, key=lambda finding: checks.index(finding.check))]
