"""`python -m palmjax.report`, the same as `palmjax report`."""

from palmjax.cli import run_main
from palmjax.report.main import main

raise SystemExit(run_main(main))
