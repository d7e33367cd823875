"""`python -m palmjax VERB` is `palmjax VERB`."""

from palmjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
