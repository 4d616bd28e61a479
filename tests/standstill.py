"""A test that failed while the machine stood still has said nothing, and is run again.

Whatever waits for another process then finds that it took too long, though nothing was slow. So all that the test needs
is set up anew, too. Each such failure is among the warnings of the run; who fails `RUNS` times has failed, whatever the
machine did.
"""

import time
import warnings

import pytest
from _pytest.runner import runtestprotocol

from tests.machine_watch import MachineWatch

__all__ = ["RUNS", "STANDSTILL_S", "MachineStoodStill"]

RUNS = 3
STANDSTILL_S = 1.0
WATCH = pytest.StashKey[MachineWatch]()


class MachineStoodStill(UserWarning):
    """A test failed meanwhile."""


def pytest_collection_finish(session: pytest.Session) -> None:
    watch = session.config.stash[WATCH] = MachineWatch()
    session.config.add_cleanup(watch.close)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    for run in range(1, RUNS + 1):
        began = time.monotonic()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        failed = [report for report in reports if report.failed]
        if not failed or run == RUNS:
            break
        if (seconds := item.config.stash[WATCH].longest_since(began)) < STANDSTILL_S:
            break
        said = f"the machine stood still for {seconds:.1f} s while this failed; it is run again:"
        warnings.warn(MachineStoodStill(f"{said}\n{failed[0].longreprtext}"), stacklevel=1)
        item.session._setupstate.teardown_exact(None)  # what was set up stood still too
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
