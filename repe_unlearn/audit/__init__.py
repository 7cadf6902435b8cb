"""Verify and audit: every check a pure function, every battery a report."""

from repe_unlearn.audit.attribute import audit_contrast
from repe_unlearn.audit.battery import random_plan, verify
from repe_unlearn.audit.card import card
from repe_unlearn.audit.compare import compare
from repe_unlearn.audit.examine import audit
from repe_unlearn.audit.leakage import diagnose_plan
from repe_unlearn.audit.report import Check, Report

__all__ = [
    "Check",
    "Report",
    "audit",
    "audit_contrast",
    "card",
    "compare",
    "diagnose_plan",
    "random_plan",
    "verify",
]
