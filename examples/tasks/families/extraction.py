"""Find the one word that was asked for: a name, a city or a day that the text holds."""

from __future__ import annotations

from families.sampling import Pool, Sampler, listed
from families.task import Example, Task, labelled

NAMES = listed("""
    Anna, Peter, Maria, Oscar, Helen, Victor, Laura, Simon, Julia, Martin, Clara, Felix, Nina,
    Robert, Alice, Tom, Eva, Hugo, Ruth, Leo, Irene, Carl, Sophie, Daniel
""")
CITIES = listed("""
    Paris, London, Rome, Berlin, Vienna, Madrid, Oslo, Prague, Dublin, Athens, Lisbon, Warsaw,
    Cairo, Boston, Tokyo, Chicago, Moscow, Delhi, Geneva, Milan, Toronto, Sydney, Lima, Seoul
""")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
GOODS = listed("""
    piano, bicycle, carpet, camera, violin, painting, sofa, lamp, clock, coat, mirror, desk,
    guitar, radio, statue, tent, kettle, saddle
""")
FRAMES = (
    "{name} bought a {good} in {city} on {day}.",
    "On {day} {name} sent the {good} to {city}.",
    "The {good} from {city} reached {name} on {day}.",
    "In {city}, {name} will sell a {good} this {day}.",
    "{name} left for {city} on {day} with a {good}.",
    "By {day} the {good} must be in {city}, says {name}.",
    "Last {day} a {good} was stolen from {name} in {city}.",
    "They repaired the {good} in {city} and {name} paid on {day}.",
    "Every {day} {name} plays with a {good} in {city}.",
)


def _write_note(sampler: Sampler, wanted: str, answer: str) -> str:
    slots: dict[str, Pool] = {"name": NAMES, "city": CITIES, "day": DAYS, "good": GOODS}
    return sampler.write(FRAMES, {**slots, wanted: (answer,)})


def _make_name(sampler: Sampler, _number: int) -> Example:
    answer = sampler.pick(NAMES)
    return Example(_write_note(sampler, "name", answer), answer)


def _make_city(sampler: Sampler, _number: int) -> Example:
    answer = sampler.pick(CITIES)
    return Example(_write_note(sampler, "city", answer), answer)


def _write_day(sampler: Sampler, answer: str) -> str:
    return _write_note(sampler, "day", answer)


TASKS = (
    Task(
        "find_name",
        "extraction",
        "Who is named in this note? Answer with the name only.",
        "Note",
        _make_name,
    ),
    Task("find_city", "extraction", "Which city is mentioned? Give one word.", "Text", _make_city),
    Task(
        "find_day",
        "extraction",
        "On which day of the week does it happen?",
        "Event",
        labelled(DAYS, _write_day),
        DAYS,
    ),
)
