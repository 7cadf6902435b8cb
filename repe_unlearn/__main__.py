"""``python -m repe_unlearn`` and ``torchrun -m repe_unlearn``: the command line."""

from .cli import app

app(prog_name="repe-unlearn")
