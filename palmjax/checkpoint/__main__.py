"""`python -m palmjax.checkpoint`, the same as `palmjax checkpoint`."""

from palmjax.checkpoint.main import main
from palmjax.cli import run_main

raise SystemExit(run_main(main))
