"""A worker that needs no model: it squares numbers, and dies of 13."""

import os
import signal

UNLUCKY = 13


class Squares:
    """Does jobs that are numbers."""

    def work(self, job: int) -> tuple[int, int]:
        """The square of a number, and the process that it came from."""
        if job == UNLUCKY:
            os.kill(os.getpid(), signal.SIGKILL)
        return job * job, os.getpid()
