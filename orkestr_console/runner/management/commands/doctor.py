"""`manage.py doctor`: say in plain words what this machine lacks."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from orkestr_console.runner.doctor import Finding, examine
from orkestr_console.runner.layout import StartError, layout_from


class Command(BaseCommand):
    """Exit status 0 when everything needed is there, 1 otherwise."""

    help = "Say in plain words what this machine lacks, and what to do about it."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        """Print one line a check, and below it what to do unless all is well."""
        try:
            layout = layout_from()
        except StartError as error:
            raise CommandError(str(error)) from error
        findings = []
        for finding in examine(layout):
            findings.append(finding)
            self._print(finding)
        failed = sum(finding.verdict == "fail" for finding in findings)
        warned = sum(finding.verdict == "warn" for finding in findings)
        if failed:
            raise CommandError(f"{failed} of {len(findings)} checks failed.")
        self.stdout.write(
            f"\nThis machine is ready{f', with {warned} warnings' if warned else ''}."
        )

    def _print(self, finding: Finding) -> None:
        paint = {
            "ok": self.style.SUCCESS,
            "warn": self.style.WARNING,
            "fail": self.style.ERROR,
        }[finding.verdict]
        self.stdout.write(f"{paint(f'{finding.verdict:>5}')}  {finding.name:<16} {finding.detail}")
        if finding.remedy:
            self.stdout.write(f"{'':<24}→ {finding.remedy}")
