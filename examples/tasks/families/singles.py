"""Tasks that stand alone: none shares its skill with a family, or with another one here."""

from __future__ import annotations

from families.sampling import Sampler, listed
from families.task import Task, labelled

SEASONS = {
    "winter": ("December", "January", "February"),
    "spring": ("March", "April", "May"),
    "summer": ("June", "July", "August"),
    "autumn": ("September", "October", "November"),
}
EVENTS = listed("""
    fair, exam, birthday, concert, wedding, trip, sale, race, party, meeting, parade, launch,
    auction, workshop, festival, dinner, lecture, opening
""")
DATE_FRAMES = (
    "The {event} is on the {day} of {month}.",
    "{month} {day}: {event}",
    "We hold the {event} every {month}, on the {day}.",
    "Come to our {event} in {month}!",
    "The {event} was moved to the {day} of {month}.",
    "No {event} before the {day} of {month}.",
)
DAYS_OF_MONTH = ("4th", "9th", "11th", "12th", "14th", "15th", "16th", "17th", "18th")

COUNTED = listed("""
    apples and pears, boys and girls, cars and vans, hens and ducks, cups and plates, chairs and
    tables, miles and laps, wins and losses, cats and dogs
""")
COUNT_FRAMES = (
    "{more} {one} and {less} {other}",
    "{more} {one}, {less} {other}",
    "{more} {one} against {less} {other}",
)


def _write_date(sampler: Sampler, season: str) -> str:
    # Every month is known to every split: a held-back month could only be guessed.
    month = sampler.rng.choice(SEASONS[season])
    slots = {"event": EVENTS, "day": DAYS_OF_MONTH, "month": (month,)}
    return sampler.write(DATE_FRAMES, slots)


def _write_counts(sampler: Sampler, answer: str) -> str:
    low, high = sorted(sampler.rng.sample(range(2, 100), 2))
    first, second = (high, low) if answer == "yes" else (low, high)
    one, other = sampler.pick(COUNTED).split(" and ")
    slots = {"more": (str(first),), "less": (str(second),), "one": (one,), "other": (other,)}
    return sampler.write(COUNT_FRAMES, slots)


TASKS = (
    Task(
        "event_seasons",
        "calendar",
        "In which season does this take place in Europe?",
        "Date",
        labelled(tuple(SEASONS), _write_date),
        tuple(SEASONS),
    ),
    Task(
        "larger_counts",
        "numbers",
        "Is the first count larger than the second? Say yes or no.",
        "Counts",
        labelled(("yes", "no"), _write_counts),
        ("yes", "no"),
    ),
)
