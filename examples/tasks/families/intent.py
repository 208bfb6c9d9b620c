"""What does the customer want?  Requests to a bank, a travel desk and a help desk."""

from __future__ import annotations

from collections.abc import Mapping

from families.sampling import Pool, Sampler, listed
from families.task import Task, labelled

OPENERS = (
    "Hello,",
    "Sorry to bother you,",
    "Quick question:",
    "Hi there,",
    "Good morning,",
    "Please help,",
    "Excuse me,",
    "Dear team,",
    "Hey,",
)
CLOSERS = listed("""
    Thanks., What should I do?, I am in a hurry., Can you sort it out?, It is urgent., Any idea?,
    Thank you in advance., Please be quick., I have been waiting all day.
""")
QUESTION_WORDS = listed("""
    are, can, did, do, does, how, is, may, was, what, when, where, which
""")


def _write_request(sampler: Sampler, wishes: Pool, details: Mapping[str, Pool]) -> str:
    frames = ("{opener} {wish}", "{wish} {closer}", "{opener} {wish} {closer}", "{wish}")
    punctuated = tuple(_punctuate(wish) for wish in wishes)
    slots = {"opener": OPENERS, "closer": CLOSERS, "wish": punctuated, **details}
    return sampler.write(frames, slots)


def _punctuate(wish: str) -> str:
    return wish + ("?" if wish.split()[0] in QUESTION_WORDS else ".")


def _task(
    name: str, question: str, heading: str, wishes: Mapping[str, Pool], details: Mapping[str, Pool]
) -> Task:
    def write(sampler: Sampler, answer: str) -> str:
        return _write_request(sampler, wishes[answer], details)

    choices = tuple(wishes)
    return Task(name, "intent", question, heading, labelled(choices, write), choices)


BANK_DETAILS = {
    "place": ("in Porto", "at the station", "abroad", "near my office", "at the market", "online"),
    "when": ("yesterday", "this morning", "last week", "on Tuesday", "an hour ago", "in April"),
    "person": ("my sister", "the landlord", "my son", "a colleague", "the school", "my aunt"),
    "sum": ("fifty", "two hundred", "nine hundred", "eighty", "three hundred", "six thousand"),
}
BANK = {
    "card": (
        "the machine {place} swallowed my plastic {when}",
        "my wallet was stolen {place} {when}",
        "I cannot pay {place} with it, the chip is damaged",
        "my PIN does not work {place}",
        "please block it, I lost it {place}",
        "it was declined when I paid {place}",
        "I need a replacement since mine expired {when}",
        "someone may have copied my chip {place}",
        "I forgot my secret code {when}",
    ),
    "loan": (
        "I would like to borrow {sum} for a new roof",
        "can I pay back what I borrowed sooner",
        "what interest do you charge if I borrow {sum}",
        "I want to finance a car worth {sum}",
        "my mortgage rate went up {when}",
        "{person} and I need money to buy a flat",
        "can I get {sum} now and pay monthly",
        "how much could I borrow with {person} as guarantor",
        "I applied for credit {when} and heard nothing",
    ),
    "transfer": (
        "I want to send {sum} to {person}",
        "the {sum} I sent {person} {when} never arrived",
        "I sent money to the wrong person {when}",
        "how do I move {sum} to {person} overseas",
        "please cancel the payment I made to {person} {when}",
        "when will {person} receive my money",
        "set up a monthly payment of {sum} to {person}",
        "can I wire {sum} to {person} today",
        "{person} says nothing reached their bank {when}",
    ),
    "balance": (
        "how much money do I have left",
        "how much was in my account {when}",
        "tell me what remains after I spent {sum} {when}",
        "do I still have {sum} in there",
        "was I overdrawn {when}",
        "I want to see what I have in savings",
        "is there enough left to pay {sum}",
        "what did my account stand at {when}",
        "what was left in my account {when}",
    ),
}

TRAVEL_DETAILS = {
    "city": ("Vienna", "Madrid", "Oslo", "Prague", "Dublin", "Athens", "Lyon", "Naples", "Riga"),
    "day": ("Monday", "Friday", "the third of June", "Sunday", "Saturday", "Tuesday"),
    "who": ("two adults", "my family", "one person", "a group of six", "me", "a couple"),
}
TRAVEL = {
    "flight": (
        "we want to fly to {city} on {day}",
        "my boarding pass for {city} is missing",
        "how early must I be at the airport on {day}",
        "can {who} take hand luggage on board",
        "I need a window seat on the plane to {city}",
        "is there a direct airline to {city}",
        "the gate for {city} has changed",
        "what time do we land in {city}",
        "our plane to {city} was cancelled on {day}",
    ),
    "hotel": (
        "I need a double room in {city} from {day}",
        "is breakfast included in {city}",
        "can {who} check in late on {day}",
        "we want to stay three nights in {city}",
        "do the rooms in {city} have a bath",
        "where can {who} sleep near {city}",
        "I want a quiet bed in {city} for {who}",
        "please add a cot to the room on {day}",
        "may {who} keep the room until evening on {day}",
    ),
    "train": (
        "which platform for {city} on {day}",
        "is the rail pass valid to {city}",
        "the carriage to {city} was full on {day}",
        "I missed the express to {city}",
        "can {who} sleep on the night railway to {city}",
        "do I change at the station in {city}",
        "is there a dining carriage to {city}",
        "when does the last one leave {city} station",
        "are the tracks to {city} open again on {day}",
    ),
    "car": (
        "I want to rent something with four wheels in {city}",
        "what does a full tank cost to {city}",
        "can my wife also drive to {city}",
        "we need a rental with child seats for {who}",
        "where do I park in {city} on {day}",
        "I scratched the door of the rental in {city}",
        "do I need insurance to drive in {city}",
        "is an automatic for {who} free on {day}",
        "we had a flat tyre near {city}",
    ),
}


PHONE_DETAILS = {
    "since": listed("""
        since the update, since yesterday, since it fell, for a week, after lunch, since I
        travelled
    """),
    "place": ("at home", "on the train", "in the office", "in the garden", "upstairs", "in town"),
}
PHONE = {
    "battery": (
        "it is empty by noon {since}",
        "it does not charge {place}",
        "it shuts down at twenty percent {since}",
        "the power runs out quickly {since}",
        "plugging it in {place} does nothing",
        "it gets hot while charging {since}",
        "it lasts only an hour {since}",
        "I must recharge three times a day {since}",
        "the charge drops overnight {since}",
    ),
    "screen": (
        "the glass is cracked {since}",
        "I see green stripes {since}",
        "it stays black when I touch it {since}",
        "the picture flickers {since}",
        "it is too dim to read {place}",
        "my finger taps are ignored {since}",
        "there is a dead pixel {since}",
        "the display is upside down {since}",
        "colours look wrong {since}",
    ),
    "network": (
        "I have no signal {place}",
        "web pages do not load {place}",
        "it does not find the wifi {place}",
        "mobile data is slow {place}",
        "calls drop {place} {since}",
        "it says no service {since}",
        "I cannot get online {place}",
        "roaming fails {since}",
        "the connection breaks {place} {since}",
    ),
    "sound": (
        "callers cannot hear me {since}",
        "the speaker crackles {since}",
        "it does not ring any more {since}",
        "my headphones stay silent {place}",
        "the volume is too low {place}",
        "I hear an echo {place}",
        "music is distorted {since}",
        "voices are muffled {since}",
        "the alarm makes no noise {since}",
    ),
}

TASKS = (
    _task(
        "bank_requests", "What is this bank customer asking about?", "Customer", BANK, BANK_DETAILS
    ),
    _task(
        "travel_desk",
        "Which travel service does the caller need?",
        "Caller",
        TRAVEL,
        TRAVEL_DETAILS,
    ),
    _task(
        "phone_helpdesk", "Which part of the phone has the problem?", "Ticket", PHONE, PHONE_DETAILS
    ),
)
