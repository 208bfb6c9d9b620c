"""What words mean: the kind of a thing, its material, its place."""

from __future__ import annotations

from families.sampling import Sampler, listed
from families.task import Task, labelled

KINDS = {
    "animal": listed("""
        badger, heron, otter, lizard, donkey, moth, salmon, goose, hedgehog, camel, squid, beetle,
        falcon, goat, toad, panther, shrimp, weasel
    """),
    "plant": listed("""
        oak, fern, daisy, ivy, cactus, willow, moss, thistle, lavender, birch, clover, reed,
        poppy, cedar, nettle, orchid, bamboo, heather
    """),
    "tool": listed("""
        hammer, chisel, wrench, saw, drill, pliers, axe, screwdriver, crowbar, spanner, file,
        clamp, shovel, sander, mallet, anvil, scissors, pickaxe
    """),
    "food": listed("""
        bread, cheese, noodles, omelette, butter, sausage, pancake, yoghurt, soup, biscuit,
        porridge, jam, ham, pizza, custard, stew, pudding, dumpling
    """),
}

MATERIALS = {
    "wood": listed("""
        rafter, matchstick, log cabin, violin, oar, chopsticks, bookcase, floorboard, walking stick,
        picture frame, barrel, toothpick, canoe, fence post, rocking chair
    """),
    "metal": listed("""
        nail, coin, anchor, key, frying pan, sword, bolt, paper clip, railway track, bicycle chain,
        tin can, razor blade, medal, horseshoe, church bell
    """),
    "glass": listed("""
        window pane, wine bottle, lens, light bulb, jam jar, mirror, test tube, fish tank, tumbler,
        marble, greenhouse roof, magnifier, crystal ball, hourglass, vase
    """),
    "cloth": listed("""
        curtain, shirt, flag, pillow case, towel, bed sheet, scarf, sail, handkerchief, dress,
        napkin, blanket, apron, tent, trousers
    """),
}
LOOKS = listed("old, new, big, small, plain, fine, heavy, broken, clean, dirty, spare, cheap")
THING_FRAMES = ("a {look} {thing}", "my {thing}, {look} and {look}", "this {look} {thing}")

WORK_PLACES = {
    "hospital": listed("""
        nurses, surgeons, midwives, ward sisters, doctors, paramedics, radiologists, anaesthetists,
        heart specialists, bone specialists, stretcher bearers, therapists
    """),
    "school": listed("""
        teachers, headmasters, pupils, maths tutors, exam markers, language teachers, class helpers,
        principals, chemistry teachers, sports teachers, lecturers, caretakers of classrooms
    """),
    "farm": listed("""
        milkmaids, shepherds, ploughmen, cowhands, fruit pickers, cattle breeders, pig keepers,
        harvesters, tractor drivers, wheat growers, poultry keepers, haymakers
    """),
    "ship": listed("""
        sailors, deckhands, helmsmen, captains, first mates, cabin boys, boatswains, navigators,
        admirals, seamen, stokers, mariners
    """),
}

COUNTS = listed("two, three, four, five, six, seven, eight, nine, ten")
WORKER_FRAMES = ("{count} {one} and {other}", "{one}, {other}", "{one} with {count} {other}")


def _write_kind(sampler: Sampler, kind: str) -> str:
    return ", ".join(sampler.pick_several(KINDS[kind], 2))


def _write_thing(sampler: Sampler, material: str) -> str:
    return sampler.write(THING_FRAMES, {"look": LOOKS, "thing": MATERIALS[material]})


def _write_workers(sampler: Sampler, place: str) -> str:
    people = WORK_PLACES[place]
    return sampler.write(WORKER_FRAMES, {"one": people, "other": people, "count": COUNTS})


TASKS = (
    Task(
        "kinds_of_things",
        "words",
        "What kind of thing are these two?",
        "Words",
        labelled(tuple(KINDS), _write_kind),
        tuple(KINDS),
    ),
    Task(
        "made_of",
        "words",
        "Which material is this usually made of?",
        "Thing",
        labelled(tuple(MATERIALS), _write_thing),
        tuple(MATERIALS),
    ),
    Task(
        "work_places",
        "words",
        "Where do these people work?",
        "People",
        labelled(tuple(WORK_PLACES), _write_workers),
        tuple(WORK_PLACES),
    ),
)
