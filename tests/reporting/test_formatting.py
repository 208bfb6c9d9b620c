"""Numbers as people read them."""

import pytest

from recycle_cli.reporting import formatting
from recycle_cli.reporting.formatting import MINUS, NOTHING


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formatting.percent(0.6123), "61.2 %"),
        (formatting.percent_interval((0.58149, 0.66)), "58.1 to 66.0 %"),
        (formatting.points(0.0213), "+2.1"),
        (formatting.points(-0.0213), f"{MINUS}2.1"),
        (formatting.points(-0.0001), "0.0"),
        (formatting.points_interval((-0.003, 0.045)), f"{MINUS}0.3 to +4.5"),
        (formatting.p_value(0.00099), "< 0.001"),
        (formatting.p_value(0.0312), "0.031"),
        (formatting.p_value(0.274), "0.27"),
        (formatting.score(None), NOTHING),
        (formatting.score(-1.23456), f"{MINUS}1.235"),
        (formatting.score(1e-7), f"1e{MINUS}07"),
        (formatting.seconds(0.44), "0.4 s"),
        (formatting.seconds(59.4), "59 s"),
        (formatting.seconds(59.6), "1 min 00 s"),
        (formatting.seconds(200), "3 min 20 s"),
        (formatting.seconds(7500), "2 h 05 min"),
        (formatting.size(0), NOTHING),
        (formatting.size(999), "999 bytes"),
        (formatting.size(1_340_000_000), "1.3 GB"),
        (formatting.size(512_000_000), "512 MB"),
        (formatting.counted(1, "task"), "1 task"),
        (formatting.counted(1200, "row"), "1,200 rows"),
        (formatting.listed(["a", "b", "c"]), "a, b and c"),
        (formatting.shortened("a\nb  c", 10), "a b c"),
        (formatting.shortened("org/abcdefghij", 9), "org/…ghij"),
    ],
)
def test_numbers_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize("limit", range(3, 20))
def test_a_shortened_name_keeps_to_its_limit(limit: int) -> None:
    assert len(formatting.shortened("x" * 100, limit)) == limit
