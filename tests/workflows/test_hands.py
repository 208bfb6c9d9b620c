"""Whoever does the jobs, each comes out once; one that kills its worker is lost alone."""

import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from support import echo
from support.echo import UNLUCKY, Squares

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.workflows.hands import Hands, Lost, ManyProcesses, OwnHands, RayCluster, each

Outcome = tuple[int, int]


@pytest.fixture(params=["own", "processes"])
def hands(request: pytest.FixtureRequest) -> Iterator[Hands[int, Outcome]]:
    own: Hands[int, Outcome] = OwnHands(Squares())
    with own if request.param == "own" else ManyProcesses(Squares, 2) as found:
        yield found


def squares(hands: Hands[int, Outcome], jobs: range | list[int]) -> dict[int, int | None]:
    return {
        job: None if isinstance(outcome, Lost) else outcome[0] for job, outcome in each(hands, jobs)
    }


def test_each_job_comes_out_once(hands: Hands[int, Outcome]) -> None:
    assert squares(hands, range(12)) == {job: job * job for job in range(12)}
    assert squares(hands, []) == {}
    assert squares(hands, [5]) == {5: 25}


def test_jobs_are_done_where_they_should(hands: Hands[int, Outcome]) -> None:
    places = {outcome[1] for _, outcome in each(hands, range(12)) if not isinstance(outcome, Lost)}
    assert (os.getpid() in places) == isinstance(hands, OwnHands)
    assert len(places) <= hands.count


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_job_that_kills_its_worker_is_lost_alone(at: int) -> None:
    jobs = list(range(10))
    jobs[at] = UNLUCKY
    with ManyProcesses(Squares, 3) as hands:
        found = squares(hands, jobs)
        again = squares(hands, [UNLUCKY, 2])
    assert found == {job: None if job == UNLUCKY else job * job for job in jobs}
    assert again == {UNLUCKY: None, 2: 4}


def test_a_worker_that_cannot_be_made_is_said() -> None:
    with ManyProcesses(no_worker, 2) as hands, pytest.raises(InputError) as caught:
        squares(hands, [1])
    assert (caught.value.message, caught.value.hint) == ("there is no model", "name one")


def no_worker() -> Squares:
    raise InputError("there is no model", "name one")


@pytest.mark.parametrize("kind", [InputError, partial(AdapterProblem, "gated"), RecycleError])
def test_errors_are_the_same_in_another_process(kind: Callable[..., RecycleError]) -> None:
    error = kind("what was wrong", "what to do")
    told = pickle.loads(pickle.dumps(error))
    assert type(told) is type(error)
    assert vars(told) == vars(error)


def test_a_cluster_does_each_job_and_loses_what_kills_its_actor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ray.cloudpickle.register_pickle_by_value(echo)  # its processes cannot import it
    with RayCluster(Squares, "local", most=1) as hands:
        found = squares(hands, [1, 2, UNLUCKY, *range(3, 8)])
        with pytest.raises(TypeError, match="can't multiply"):
            hands.begin("a")  # type: ignore[arg-type]
            hands.finished()
    assert found == {UNLUCKY: None, **{job: job * job for job in range(1, 8)}}
    told = capsys.readouterr()
    assert not told.out
    assert "A worker died" in told.err


def test_a_cluster_that_is_not_there_is_said() -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(RecycleError, match="cannot be reached"):
        RayCluster(Squares, "127.0.0.1:1")
