"""Is it said with pleasure or with regret?  Four places where people say so.

Many frames hold a word of either colour ("I feared it would be {other}, but it was {same}"), so
that counting the happy words is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass

from families.sampling import Pool, Sampler, Slots, listed
from families.task import Task, labelled


@dataclass(frozen=True)
class Opinions:
    """The words of one domain, and the frames that put them together."""

    frames: Pool
    things: Pool
    good: Pool
    bad: Pool
    glad_ends: Pool
    sorry_ends: Pool

    def write(self, sampler: Sampler, glad: bool) -> str:
        """Write one opinion; `same` words agree with its verdict, `other` words do not."""
        return sampler.write(self.frames, self._glad_slots() if glad else self._sorry_slots())

    def _glad_slots(self) -> Slots:
        return {"thing": self.things, "same": self.good, "other": self.bad, "end": self.glad_ends}

    def _sorry_slots(self) -> Slots:
        return {"thing": self.things, "same": self.bad, "other": self.good, "end": self.sorry_ends}


HOTEL = Opinions(
    frames=(
        "The {thing} was {same} and the {thing} was {same}.",
        "We feared the {thing} would be {other}, but it was {same}.",
        "Our {thing} was {same}; {end}.",
        "Friends had called the {thing} {other}. We found it {same}.",
        "{end}: the {thing} was simply {same}.",
        "The {thing} may look {other} in the photos, yet it is really {same}.",
        "Three nights here. The {thing} was {same}, so {end}.",
        "The {thing} was {other}, I admit, but overall {end}.",
        "Not {other} at all, the {thing}. {end}.",
        "After a long drive we met a {same} {thing} and a {same} {thing}.",
        "One {other} detail, the {thing}; everything else was {same} and {end}.",
        "I have nothing to add: a {same} {thing}, and {end}.",
    ),
    things=listed("""
        room, breakfast, pool, lobby, bed, shower, view, terrace, restaurant, porter, bathroom,
        garden, bar, reception, sauna, balcony, dinner, lift
    """),
    good=listed("""
        spotless, charming, cosy, superb, delightful, peaceful, generous, welcoming, lovely,
        comfortable, elegant, fresh, splendid, quiet and bright, first-rate
    """),
    bad=listed("""
        filthy, noisy, shabby, dreadful, smelly, freezing, stained, rude, disgusting, cramped,
        mouldy, broken, horrid, damp and dark, neglected
    """),
    glad_ends=listed("""
        we will be back, we stayed an extra night, I slept like a baby, worth every penny, we did
        not want to leave, our best holiday in years, I have told all my friends to go, the
        children still talk about it, we have booked again for May
    """),
    sorry_ends=listed("""
        we left a day early, I asked for my money back, never again, we hardly slept, I would
        rather sleep in the car, our worst holiday in years, I have warned all my friends, the
        children cried to go home, we have cancelled our trip in May
    """),
)

GADGET = Opinions(
    frames=(
        "The {thing} is {same} and the {thing} feels {same}.",
        "Bought it in March: {same} {thing}, {end}.",
        "I was told the {thing} is {other}; mine is {same}.",
        "{end}. The {thing} is {same} for this price.",
        "The box promised a {other} {thing}, what came was {same}.",
        "A {same} {thing}, even if the {thing} is {other}; {end}.",
        "Two months of use and the {thing} is still {same}.",
        "My old one had a {other} {thing}, this one has a {same} {thing}.",
        "{end}, mainly because of the {same} {thing}.",
        "Can a {thing} be more {same}? {end}.",
        "Nobody could call this {thing} {other}. {end}.",
        "Setup took an hour, then I saw how {same} the {thing} is.",
    ),
    things=listed("""
        battery, screen, keyboard, charger, camera, speaker, hinge, case, microphone, remote,
        strap, zoom, touchpad, lens, display, motor, cable, software
    """),
    good=listed("""
        brilliant, sturdy, reliable, sharp, fast, excellent, precise, handy, flawless, well made,
        responsive, clever, powerful, solid, impressive
    """),
    bad=listed("""
        useless, flimsy, unreliable, blurry, slow, terrible, faulty, clumsy, scratchy, badly made,
        laggy, dead, weak, wobbly, disappointing
    """),
    glad_ends=listed("""
        I use it every day, best thing on my desk, I bought a second one for my sister, five
        stars, it saves me hours, exactly what I needed, get one while you can, it outlasted my
        old one by years, money well spent
    """),
    sorry_ends=listed("""
        I sent it back, it gathers dust on my desk, I warned my sister not to buy it, one star, it
        wastes hours, not what I paid for, stay away from it, it died within a week, money thrown
        away
    """),
)

FILM = Opinions(
    frames=(
        "The {thing} was {same}, and {end}.",
        "{end}. Such a {same} {thing}!",
        "Critics called the {thing} {other}, I thought it {same}.",
        "A {same} {thing} and an even more {same} {thing}.",
        "It starts with a {other} {thing}, but {end}.",
        "Saw it on Friday: the {thing} is {same} from start to end.",
        "{end}, thanks to a {same} {thing}.",
        "For once the {thing} was not {other} but {same}.",
        "Say what you like about the {other} {thing}; {end}.",
        "With a {thing} this {same}, who needs a {thing}? {end}.",
        "I came for the {thing}, which is {same}; {end}.",
        "My brother found the {thing} {other}. To me it was {same}.",
    ),
    things=listed("""
        plot, acting, ending, music, dialogue, hero, opening, script, villain, romance, chase,
        humour, story, cast, finale, camera work, twist, sequel
    """),
    good=listed("""
        gripping, moving, witty, thrilling, beautiful, convincing, funny, touching, stunning,
        inspired, warm, magical, tense in the best way, original, masterly
    """),
    bad=listed("""
        boring, wooden, silly, predictable, ugly, unconvincing, tedious, clumsy, pointless,
        lifeless, cold, annoying, lazy in the worst way, stale, pathetic
    """),
    glad_ends=listed("""
        I watched it twice, I laughed and cried, the hours flew by, nobody in the room moved until
        the lights came on, I want the poster on my wall, we clapped at the end, I would see it
        again tomorrow, it stayed with me for days, my film of the year
    """),
    sorry_ends=listed("""
        I walked out halfway, I checked my watch all evening, the hours crawled by, half the room
        had left before the lights came on, I want my ticket refunded, we groaned at the end, I
        would not see it again for free, I forgot it within minutes, my flop of the year
    """),
)

STAFF = Opinions(
    frames=(
        "Your {thing} was {same} when I called on Monday; {end}.",
        "I wish to report a {same} {thing}. {end}.",
        "The {thing} at the till was {same}, not {other} as people say.",
        "{end} after the {thing} had been so {same}.",
        "Last year the {thing} was {other}; today he was {same}.",
        "What a {same} {thing}! {end}.",
        "Both the {thing} and the {thing} were {same} to my mother.",
        "One {thing} looked {other}, but then {end}.",
        "Please tell the manager that the {thing} was {same} all along.",
        "I had expected a {other} {thing} and met a {same} one.",
        "In ten years I have not met such a {same} {thing}; {end}.",
        "The {thing} who came to us was {same}, and {end}.",
    ),
    things=listed("""
        driver, clerk, nurse, waiter, plumber, guard, teller, fitter, cashier, receptionist,
        guide, courier, technician, operator, librarian, conductor, assistant, trainer
    """),
    good=listed("""
        helpful, polite, patient, kind, friendly, attentive, skilled, cheerful, considerate,
        honest, prompt, gracious, careful, thoughtful, professional
    """),
    bad=listed("""
        unhelpful, rude, impatient, unkind, hostile, careless, clueless, grumpy, arrogant,
        dishonest, late, insulting, sloppy, thoughtless, unprofessional
    """),
    glad_ends=listed("""
        the problem was solved in minutes, please give them a bonus, I left with a smile, thank
        you so much, it made my day, I could not have asked for more, I will gladly come again,
        they even rang back to check, well done to the whole team
    """),
    sorry_ends=listed("""
        the problem is still not solved, please do something about it, I left in tears, I expect
        an apology, it ruined my day, I could not have been treated worse, I will shop elsewhere,
        they hung up on me, shame on the whole team
    """),
)


def _task(name: str, question: str, heading: str, glad: str, sorry: str, words: Opinions) -> Task:
    choices = (glad, sorry)
    make = labelled(choices, lambda sampler, answer: words.write(sampler, answer == glad))
    return Task(name, "sentiment", question, heading, make, choices)


TASKS = (
    _task(
        "hotel_reviews",
        "Is this hotel review positive or negative?",
        "Review",
        "positive",
        "negative",
        HOTEL,
    ),
    _task(
        "gadget_reviews",
        "Does the buyer find the product good or bad?",
        "Comment",
        "good",
        "bad",
        GADGET,
    ),
    _task(
        "film_remarks",
        "Does this viewer call the film great or poor?",
        "Remark",
        "great",
        "poor",
        FILM,
    ),
    _task(
        "staff_feedback",
        "Is the customer who writes this happy or angry?",
        "Message",
        "happy",
        "angry",
        STAFF,
    ),
)
