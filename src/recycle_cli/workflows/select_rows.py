"""Scoring adapters by the rows they answer, each answer kept and never computed twice."""

import functools
import hashlib
import json
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recycle_cli.errors import RecycleError
from recycle_cli.evaluation.tasks import Row
from recycle_cli.progress import Progress
from recycle_cli.records import LeftOut
from recycle_cli.selection.halving import rounds
from recycle_cli.selection.ranking import Score, rank
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.hands import each
from recycle_cli.workflows.scorers import Job, ScoringHands, context_of
from recycle_cli.workflows.select_outcome import Outcome
from recycle_cli.workflows.select_request import SelectRequest

if TYPE_CHECKING:
    from recycle_cli.store.answers import AnswerBook


class RowScores:
    """The scores of adapters on rows of a task: from the index where they are there.

    Args:
        book: the answers in the index.
        hands: who compute those that are not there.
        progress: told of each adapter.
    """

    def __init__(self, book: "AnswerBook", hands: ScoringHands, progress: Progress) -> None:
        self._book, self._hands, self._progress = book, hands, progress
        self._context = context_of(hands)
        self.left_out: list[LeftOut] = []
        self.rows_scored = 0
        self.passes = 0

    def on(self, pool: Sequence[Source], rows: Sequence[Row]) -> list[Score]:
        """The scores on these rows of those that can be scored, in the order of the pool; the
        others go to `left_out`."""
        self._progress.stage(f"scoring {len(pool)} adapters on {len(rows)} rows", len(pool))
        found: dict[str, Score] = {}
        jobs = []
        for source in pool:
            try:
                missing = self._missing(source, rows)
            except RecycleError as error:
                self._leave_out(source, error.message)
                continue
            if missing:
                jobs.append(Job(source, missing))
            else:
                self._note(source, rows, found)
        for job, outcome in each(self._hands, jobs):
            assert isinstance(job, Job)
            assert not isinstance(outcome, str)
            if isinstance(outcome, RecycleError):
                self._leave_out(job.source, outcome.message)
                continue
            answers = zip(job.rows, outcome, strict=True)
            self._book.add(self._context, _key(job.source), {_digest(r): a for r, a in answers})
            self.rows_scored += len(job.rows)
            self.passes += 1
            self._note(job.source, rows, found)
        return [found[s.ref.sha256] for s in pool if s.ref.sha256 in found]

    def known(self, source: Source, rows: Sequence[Row]) -> Score | None:
        """A score that the index already holds, or None."""
        try:
            missing = self._missing(source, rows)
        except RecycleError:  # no adapter whose answers could be there
            return None
        return None if missing else self._score(source, rows)

    def _missing(self, source: Source, rows: Sequence[Row]) -> tuple[Row, ...]:
        answers = self._book.of(self._context, _key(source))
        return tuple(row for row in rows if _digest(row) not in answers)

    def _note(self, source: Source, rows: Sequence[Row], found: dict[str, Score]) -> None:
        score = self._score(source, rows)
        if math.isfinite(score.tie_breaker):
            found[source.ref.sha256] = score
            self._progress.advance(f"{source.ref.id} {score.value:.3f}")
        else:
            self._leave_out(source, "its likelihoods are no numbers")

    def _score(self, source: Source, rows: Sequence[Row]) -> Score:
        kept = self._book.of(self._context, _key(source))
        answers = [kept[_digest(row)] for row in rows]
        right = sum(answer.correct for answer in answers)
        likelihood = math.fsum(answer.log_likelihood for answer in answers)
        return Score(source.ref.sha256, right / len(answers), likelihood / len(answers))

    def _leave_out(self, source: Source, reason: str) -> None:
        self.left_out.append(LeftOut(id=source.ref.id, reason=reason))
        self._progress.advance(f"{source.ref.id} left out")


def evaluate(request: SelectRequest, pool: Sequence[Source], scores: RowScores) -> Outcome:
    """Every adapter on every row."""
    rows = request.rows_to_score()
    found = scores.on(pool, rows)
    return Outcome(found, scores.left_out, scores.passes, rows_scored=scores.rows_scored)


def halve(request: SelectRequest, pool: Sequence[Source], scores: RowScores) -> Outcome:
    """Many adapters on few rows, few on many, in the order of a seeded shuffle of the rows."""
    rows = list(request.rows_to_score())
    random.Random(f"halving:{request.seed}").shuffle(rows)
    left, found = list(pool), list[Score]()
    plan = rounds(len(pool), len(rows), request.k)
    for number, (adapters, count) in enumerate(plan):
        if number:
            kept = {score.sha256 for score in found[:adapters]}
            out = [source for source in left if source.ref.sha256 not in kept]
            scores.left_out += [_went_out(source, plan[number - 1][1]) for source in out]
            left = [source for source in left if source.ref.sha256 in kept]
        found = rank(scores.on(left, rows[:count]), len(left)).taken
        scored = {score.sha256 for score in found}
        left = [source for source in left if source.ref.sha256 in scored]
    whole = len(pool) * len(rows)
    return Outcome(
        found,
        scores.left_out,
        scores.passes,
        rows_scored=scores.rows_scored,
        rows_of_full=whole,
        agreement=_agreement(pool, rows, found, request.k, scores),
    )


def _went_out(source: Source, rows: int) -> LeftOut:
    return LeftOut(id=source.ref.id, reason=f"it went out after {rows} rows")


def _agreement(
    pool: Sequence[Source], rows: Sequence[Row], found: Sequence[Score], k: int, scores: RowScores
) -> float | None:
    """The share of the first k that the full ranking has among its first k too, where the index
    holds all answers that takes; None where it does not."""
    full = [scores.known(source, rows) for source in pool]
    known = [score for score in full if score is not None]
    if len(known) < len(pool):
        return None
    best = {score.sha256 for score in rank(known, k).taken}
    return sum(score.sha256 in best for score in found[:k]) / max(1, len(best))


def _key(source: Source) -> str:
    """Stands for an adapter's update: its weights, and the configuration that scales them."""
    return f"{source.ref.sha256}:{source.config_digest}"


@functools.cache
def _digest(row: Row) -> bytes:
    text = json.dumps([row.input, row.output, row.choices])
    return hashlib.sha256(text.encode()).digest()[:16]
