"""Verify and audit: every check a pure function, every battery a report."""

from repe_unlearn.audit.report import Check, Report
from repe_unlearn.audit.verify import random_plan, verify

__all__ = ["Check", "Report", "random_plan", "verify"]
