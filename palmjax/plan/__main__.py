"""`python -m palmjax.plan`, the same as `palmjax plan`."""

from palmjax.cli import run_main
from palmjax.plan.main import main

raise SystemExit(run_main(main))
