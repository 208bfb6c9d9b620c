"""What is the text about?  Headlines, shop goods and school questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from families.sampling import Pool, Sampler, listed
from families.task import Task, labelled


@dataclass(frozen=True)
class Subject:
    """One topic: who does what, in words that belong to it."""

    who: Pool
    what: Pool


def _task(
    name: str,
    question: str,
    heading: str,
    frames: Pool,
    fillers: Pool,
    subjects: Mapping[str, Subject],
) -> Task:
    def write(sampler: Sampler, answer: str) -> str:
        subject = subjects[answer]
        slots = {"who": subject.who, "what": subject.what, "filler": fillers}
        return sampler.write(frames, slots)

    choices = tuple(subjects)
    return Task(name, "topic", question, heading, labelled(choices, write), choices)


NEWS = {
    "sports": Subject(
        who=listed("""
            striker, goalkeeper, marathon runner, coach, swimmer, home side, tennis champion,
            cyclist, referee, boxer, rowing eight, pole vaulter
        """),
        what=listed("""
            late goal, cup final, new lap record, penalty, knee injury, gold medal, league defeat,
            semi-final place, relay baton, away win, match ban, title defence
        """),
    ),
    "business": Subject(
        who=listed("""
            carmaker, retail chain, central bank, start-up, airline boss, shareholders, insurer,
            brewery, chief executive, investors, supermarket group, lender
        """),
        what=listed("""
            quarterly profit, merger, share sale, interest rate, factory closure, takeover bid,
            bond issue, price rise, tax bill, bankruptcy, new dividend, sales slump
        """),
    ),
    "science": Subject(
        who=listed("""
            astronomers, physicists, biologists, space probe, researchers, geologists, laboratory
            team, chemists, telescope crew, botanists, fossil hunters, ocean explorers
        """),
        what=listed("""
            distant planet, new particle, ancient bone, gene study, comet dust, deep-sea worm,
            magnetic field, rare crystal, brain cell, dark matter hint, frozen microbe, volcano
            model
        """),
    ),
    "politics": Subject(
        who=listed("""
            prime minister, senators, opposition leader, mayor, parliament, president, cabinet,
            party chairman, lawmakers, foreign secretary, voters, governor
        """),
        what=listed("""
            border treaty, tax vote, election date, coalition deal, asylum bill, ballot recount,
            budget debate, reform law, state visit, party split, referendum plan, confidence
            motion
        """),
    ),
}

SHOP = {
    "kitchen": Subject(
        who=listed("""
            frying pan, whisk, bread knife, kettle, baking tray, soup ladle, toaster, salad bowl,
            rolling pin, coffee grinder, egg timer, cheese grater
        """),
        what=listed("""
            for sauces, for the stove, dishwasher safe, for baking, non-stick, for cooks, for
            fresh pasta, oven proof, for chopping
        """),
    ),
    "garden": Subject(
        who=listed("""
            lawn mower, rake, watering can, flower pot, hedge shears, spade, tulip bulbs, garden
            hose, bird bath, compost bin, wheelbarrow, rose trellis
        """),
        what=listed("""
            for the lawn, for dry soil, frost proof, for hedges, for weeds, with seeds, for
            planting, for green thumbs, for the patio
        """),
    ),
    "clothing": Subject(
        who=listed("""
            wool sweater, raincoat, leather belt, socks, silk blouse, jeans, scarf, winter gloves,
            linen shirt, pleated skirt, knitted hat, evening dress
        """),
        what=listed("""
            in size medium, slim fit, with long sleeves, with buttons, in soft cotton, with a
            hood, lined with fleece, with deep pockets, to wear at work
        """),
    ),
    "toys": Subject(
        who=listed("""
            teddy bear, building blocks, doll, train set, jigsaw puzzle, kite, spinning top, board
            game, toy drum, marbles, rocking horse, hand puppet
        """),
        what=listed("""
            for ages three and up, for playtime, for little ones, for rainy afternoons, to play
            with friends, for the nursery, with a funny face, for two players, for curious kids
        """),
    ),
    "office": Subject(
        who=listed("""
            stapler, ring binder, desk lamp, fountain pen, printer paper, envelopes, hole punch,
            paper clips, sticky notes, ink cartridge, filing tray, whiteboard
        """),
        what=listed("""
            for documents, in A4, for meetings, for your desk, for letters, for the clerk, for
            filing, for notes, for invoices
        """),
    ),
}

SCHOOL = {
    "history": Subject(
        who=listed("""
            the last emperor, the peasants, the Roman legions, the crusaders, the first settlers,
            the king, the pharaohs, the Vikings, the revolutionaries
        """),
        what=listed("""
            lose the war, sign the peace treaty, build a fortress, rule for so long, revolt
            against the crown, abolish slavery, conquer the city, cross the ocean, fall from power
        """),
    ),
    "biology": Subject(
        who=listed("""
            a plant cell, the heart, a frog, the human liver, an insect, the lungs, a bacterium, a
            mushroom, the nervous system
        """),
        what=listed("""
            take in oxygen, reproduce, store sugar, fight disease, digest food, turn light into
            energy, divide in two, pass on its genes, grow new tissue
        """),
    ),
    "geography": Subject(
        who=listed("""
            this river, the desert, a glacier, the capital city, the monsoon, the coastline, an
            island chain, the mountain range, the delta
        """),
        what=listed("""
            lie on the map, border the sea, shape the valley, change with the climate, divide the
            continent, attract so many people, flood the plain, reach the northern hemisphere,
            form over time
        """),
    ),
    "math": Subject(
        who=listed("""
            a triangle, this equation, the fraction, an even number, the circle, a prime, the
            graph, a square root, the angle
        """),
        what=listed("""
            equal twelve, have two solutions, add up to ninety, become negative, divide by seven,
            cross the axis, double in area, simplify, give a remainder
        """),
    ),
}


TASKS = (
    _task(
        "news_topics",
        "Which topic does this headline belong to?",
        "Headline",
        (
            "{who} and the {what}: {filler}",
            "{filler}: {what} ahead for {who}",
            "{what} surprises {who}",
            "After the {what}, {who} must wait",
            "{what} for {who}, {filler}",
            "Why the {what} matters to {who}",
            "{who} silent on {what}",
            "{filler} for {who}",
            "A {what} that nobody saw coming",
        ),
        listed("""
            what we know so far, a long night, questions remain, the full story, hopes rise, a
            turning point, doubts grow, experts are split, calm before the storm
        """),
        NEWS,
    ),
    _task(
        "shop_departments",
        "In which department of the shop is this sold?",
        "Product",
        (
            "{filler} {who}, {what}",
            "{who} ({filler}), {what}",
            "{who}, {filler}",
            "{filler} {who}",
            "Set: {who} and {who}, {filler}",
            "On sale today: {filler} {who}",
            "{who} {what}",
            "Gift idea: {who}, {filler}",
            "Last one: {filler} {who}, {what}",
        ),
        listed("""
            blue, sturdy, lightweight, classic, large, handmade, small, red, value, premium,
            two-tone, best-selling
        """),
        SHOP,
    ),
    _task(
        "school_subjects",
        "Which school subject is this question from?",
        "Question",
        (
            "How did {who} {what}?",
            "Explain why {who} could {what}.",
            "When can {who} {what}?",
            "{filler}: did {who} {what}?",
            "What makes {who} {what}?",
            "{filler}: what do we know about {who}?",
            "Describe how {who} might {what}.",
            "{filler}: {who}.",
            "Can {who} {what}? {filler}.",
        ),
        listed("""
            Give two reasons, Answer in one sentence, Use your notes, Pair work, Homework,
            Revision, Draw a sketch, Quick quiz, Show your thinking
        """),
        SCHOOL,
    ),
)
