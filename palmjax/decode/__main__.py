"""`python -m palmjax.decode`, the same as `palmjax generate`."""

from palmjax.cli import run_main
from palmjax.decode.main import main

raise SystemExit(run_main(main))
