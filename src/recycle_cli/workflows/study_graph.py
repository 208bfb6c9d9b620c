"""Which runs a study needs and what each waits for, and how they are done in that order."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from recycle_cli.progress import Progress
from recycle_cli.workflows.hands import Hands, Lost
from recycle_cli.workflows.study_runs import AskDigest, Failure, Run
from recycle_cli.workflows.study_store import RunStore


@dataclass(eq=False)
class Node:
    """A run to be: it is known whole when those are done that it needs.

    Attributes:
        title: what people call it.
        build: gives the run, once all that it needs has an outcome.
        needs: the nodes that it waits for.
        run: itself, once it was built.
        outcome: what came of it.
        error: why nothing did.
        reused: whether it was done before this study ran.
        keeps: whether it is done only as long as the adapter that it made is there.
    """

    title: str
    build: Callable[[], Run]
    needs: tuple["Node", ...] = ()
    run: Run | None = None
    outcome: dict[str, Any] | None = None
    error: str | None = None
    reused: bool = False
    keeps: bool = False

    @property
    def settled(self) -> bool:
        """Whether it is known how it ended."""
        return self.outcome is not None or self.error is not None


Work = Hands[Run | AskDigest, Failure | str | None]
Done = Callable[[Node], None]


@dataclass
class Schedule:
    """Does the runs of a study, each once, as soon as what it needs is there.

    Args:
        nodes: all of them.
        store: where runs are kept.
        hands: who does them; None to take what is there and do nothing.
        progress: told of each.
        done: called with each that has an outcome.
    """

    nodes: Sequence[Node]
    store: RunStore
    hands: Work | None
    progress: Progress
    done: Done = lambda node: None
    _under_way: dict[str, list[Node]] = field(default_factory=dict)

    def go(self) -> None:
        """Settles all nodes."""
        waiting: deque[Node] = deque(self.nodes)
        self.progress.stage(f"{len(self.nodes)} runs", len(self.nodes))
        while waiting or self._under_way:
            self._start_some(waiting)
            if self._under_way:
                self._finish_one()
            elif self.hands is None:
                return

    def _start_some(self, waiting: deque[Node]) -> None:
        """Begins what can be begun, until all hands are full; takes it out of those that wait."""
        later: deque[Node] = deque()
        while waiting and not self._full:
            node = waiting.popleft()
            if not self._start(node):
                later.append(node)
        waiting.extendleft(reversed(later))

    @property
    def _full(self) -> bool:
        return self.hands is not None and len(self._under_way) == self.hands.count

    def _start(self, node: Node) -> bool:
        """Begins a run, or settles it at once, where that can be done now."""
        if not all(need.settled for need in node.needs):
            return False
        failed = next((need for need in node.needs if need.error is not None), None)
        if failed is not None:
            self._settle(node, error=f"{failed.title}: {failed.error}")
            return True
        run = node.run = node.run or node.build()
        if run.key in self._under_way:
            self._under_way[run.key].append(node)
            return True
        outcome = self.store.read(run.key)
        if outcome is not None and not self._lost(node, run, outcome):
            self._settle(node, outcome, reused=True)
            return True
        if self.hands is None:
            return False
        if outcome is not None:
            self.store.drop_adapter(run.key)  # what is left of it
        self.hands.begin(run)
        self._under_way[run.key] = [node]
        return True

    def _lost(self, node: Node, run: Run, outcome: dict[str, Any]) -> bool:
        """Whether a run was done, and its adapter, which is needed, is no longer there."""
        return node.keeps and bool(outcome.get("made")) and not self.store.has_adapter(run.key)

    def _finish_one(self) -> None:
        assert self.hands is not None
        run, told = self.hands.finished()
        assert isinstance(run, Run)
        first, *others = self._under_way.pop(run.key)
        if isinstance(told, Failure | Lost):
            error = told.error if isinstance(told, Failure) else told.message
            if isinstance(told, Lost):
                self.store.fail(run.key, error)
            for node in (first, *others):
                self._settle(node, error=error)
            return
        outcome = self.store.read(run.key)
        self._settle(first, outcome)
        for node in others:
            self._settle(node, outcome, reused=True)

    def _settle(
        self,
        node: Node,
        outcome: dict[str, Any] | None = None,
        error: str | None = None,
        reused: bool = False,
    ) -> None:
        node.outcome, node.error, node.reused = outcome, error, reused
        said = error or ("there already" if reused else "done")
        self.progress.advance(f"{node.title}: {said}")
        if outcome is not None:
            self.done(node)


def failures(nodes: Iterable[Node]) -> list[Node]:
    """Those that failed."""
    return [node for node in nodes if node.error is not None]
