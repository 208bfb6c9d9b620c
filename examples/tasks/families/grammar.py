"""The form of words: tense, number and agreement."""

from __future__ import annotations

from families.sampling import Pool, Sampler, Slots, listed
from families.task import Example, Task, labelled

# Base form, third person and past of verbs that fit every object below.
VERBS = listed("""
    paint paints painted, break breaks broke, carry carries carried, sell sells sold, wash washes
    washed, find finds found, steal steals stole, repair repairs repaired, bring brings brought,
    draw draws drew, move moves moved, hide hides hid, choose chooses chose, count counts counted,
    hold holds held, buy buys bought, clean cleans cleaned, lose loses lost, take takes took, open
    opens opened, catch catches caught, drop drops dropped, keep keeps kept, throw throws threw,
    lift lifts lifted, build builds built, leave leaves left, forget forgets forgot, love loves
    loved, see sees saw
""")
PEOPLE = listed("""
    farmer, teacher, child, neighbour, doctor, baker, sailor, student, painter, thief, king, girl,
    boy, driver, nurse, tailor, singer, guest
""")
OBJECTS = listed("""
    barrels, windows, chairs, letters, lamps, baskets, coins, flags, bottles, ropes, maps, plates,
    clocks, bags, candles, tickets, books, mirrors
""")
PLACES = listed("""
    in the yard, by the river, at the fair, near the church, behind the barn, on the hill, in the
    cellar, at the corner, under the bridge
""")
REGULAR_PEOPLE = tuple(person for person in PEOPLE if person not in ("child", "thief"))
SINGULAR_OBJECTS = tuple(word.removesuffix("s") for word in OBJECTS)
STATES = ("old", "broken", "very heavy", "new", "missing", "quite small", "wet", "blue", "gone")

TENSES = {
    "past": (
        "The {person} {past} the {object} {place}.",
        "The old {person} {past} {object} {place}.",
        "The {person} was going to {base} the {object}.",
        "Our {person} {past} two {object}.",
        "The {person} did {base} the {object}.",
        "Who {past} the {object} {place}?",
    ),
    "present": (
        "The {person} {third} the {object} {place}.",
        "The old {person} {third} {object} {place}.",
        "The {person} often {third} the {object}.",
        "Our {person} {third} two {object}.",
        "The {person} does {base} the {object}.",
        "Who {third} the {object} {place}?",
    ),
    "future": (
        "The {person} will {base} the {object} {place}.",
        "The old {person} will {base} {object} {place}.",
        "The {person} is going to {base} the {object}.",
        "Our {person} will {base} two {object}.",
        "The {person} is about to {base} the {object}.",
        "Who will {base} the {object} {place}?",
    ),
}
# A verb in the past does not betray the number: only the first noun does.
DOERS = {
    "one": (
        "The {one} {past} the {object} {place}.",
        "The {one} of the {many} {past} {object}.",
        "The {one} {place} {past} the {object}.",
        "Did the {one} who knew the {many} find the {object}?",
        "The {one} next to the {many} {past} the {object}.",
        "Yesterday the {one} {past} {object} for the {many}.",
    ),
    "many": (
        "The {many} {past} the {object} {place}.",
        "The {many} of the {one} {past} {object}.",
        "The {many} {place} {past} the {object}.",
        "Did the {many} who knew the {one} find the {object}?",
        "The {many} next to the {one} {past} the {object}.",
        "Yesterday the {many} {past} {object} for the {one}.",
    ),
}
# The noun next to the gap often has the other number: the first noun decides.
GAPS = {
    "is": (
        "The {one} near the {many} ___ {state}.",
        "The {one} {place} ___ {state}.",
        "The {one} with the {many} ___ {state}.",
        "The {one} that the {person} bought ___ {state}.",
        "The {one} behind the {many} ___ not {state}.",
        "The {one} between the {many} ___ {state}.",
    ),
    "are": (
        "The {many} near the {one} ___ {state}.",
        "The {many} {place} ___ {state}.",
        "The {many} with the {one} ___ {state}.",
        "The {many} that the {person} bought ___ {state}.",
        "The {many} behind the {one} ___ not {state}.",
        "The {many} between the {many} ___ {state}.",
    ),
}
PRESENT = (
    "The {person} {third} the {object} {place}.",
    "The {person} {third} {object}.",
    "Every {person} {third} the {object}.",
)


def _draw_verb(sampler: Sampler) -> dict[str, Pool]:
    forms = sampler.pick(VERBS).split()
    return {name: (form,) for name, form in zip(("base", "third", "past"), forms, strict=True)}


def _write_scene(sampler: Sampler, frames: Pool, verb: Slots) -> str:
    return sampler.write(frames, {"person": PEOPLE, "object": OBJECTS, "place": PLACES, **verb})


def _write_tense(sampler: Sampler, tense: str) -> str:
    return _write_scene(sampler, TENSES[tense], _draw_verb(sampler))


def _write_doers(sampler: Sampler, number: str) -> str:
    people = {"one": REGULAR_PEOPLE, "many": tuple(f"{person}s" for person in REGULAR_PEOPLE)}
    return _write_scene(sampler, DOERS[number], {**people, **_draw_verb(sampler)})


def _write_is_are(sampler: Sampler, verb: str) -> str:
    slots = {"one": SINGULAR_OBJECTS, "many": OBJECTS, "person": PEOPLE, "place": PLACES}
    return sampler.write(GAPS[verb], {**slots, "state": STATES})


def _make_past(sampler: Sampler, _number: int) -> Example:
    verb = _draw_verb(sampler)
    return Example(_write_scene(sampler, PRESENT, verb), verb["past"][0])


TASKS = (
    Task(
        "sentence_tense",
        "grammar",
        "Is this sentence about the past, present or future?",
        "Sentence",
        labelled(("past", "present", "future"), _write_tense),
        ("past", "present", "future"),
    ),
    Task(
        "is_or_are",
        "grammar",
        "Which word fills the gap, is or are?",
        "Sentence",
        labelled(("is", "are"), _write_is_are),
        ("is", "are"),
    ),
    Task(
        "doer_number",
        "grammar",
        "Was this done by one or by many?",
        "Sentence",
        labelled(("one", "many"), _write_doers),
        ("one", "many"),
    ),
    Task(
        "past_forms",
        "grammar",
        "Write only the verb of this sentence, in the past tense.",
        "Sentence",
        _make_past,
    ),
)
