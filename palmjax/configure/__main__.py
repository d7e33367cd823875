"""`python -m palmjax.configure` is `palmjax config`."""

from palmjax.cli import run_main
from palmjax.configure import main

if __name__ == "__main__":
    raise SystemExit(run_main(main))
