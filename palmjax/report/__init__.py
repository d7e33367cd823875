"""What became of a run, on one page that needs nothing else: `palmjax report --run DIR`.

goodput.py: where the time went. read.py: metrics, events and configuration of a MODEL_DIR as values. plots.py: pictures
of them. page.py: the page. main.py: the verb.
"""

from palmjax.report.goodput import Goodput
from palmjax.report.page import page
from palmjax.report.read import Run, read

__all__ = ["Goodput", "Run", "page", "read"]
