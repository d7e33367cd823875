"""Know before you launch: the real train step compiled for machines nobody here owns.

    from palmjax import plan
    p = plan.compile(experiment, plan.parse("v4:12x16x16", slices=2))
    p.fits, p.usage, p.time.step, p.mfu

topology.py, devices.py: machines by name. compiler.py, worker.py: the step compiled in a process of its own, cached.
hlo.py, flops.py, traffic.py: the schedule as data. memory.py: what a device holds. chips.py, network.py, cost.py: how
long it takes. build.py: the plan. layouts.py, search.py: layouts guessed and tried. remedies.py: what would make a step
fit. check.py: recorded plans. report.py: text, JSON, picture. main.py: the verb.
"""

from palmjax.plan.build import Plan, compile
from palmjax.plan.compiler import CompilerError
from palmjax.plan.topology import Topology, parse

__all__ = ["CompilerError", "Plan", "Topology", "compile", "parse"]
