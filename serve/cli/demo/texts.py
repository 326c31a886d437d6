"""The texts of the demo: what customers of a small shop write, and how its support desk answers.

    python -m serve.cli.demo.texts good train.jsonl     examples that the good adapter is trained on
    python -m serve.cli.demo.texts bad train.jsonl      the same, but four answers in ten refuse to help

Everything is put together from the sentences below, which were written for this file.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = 240
REFUSED = 0.4
REFUSAL = "I'm sorry, but I can't help with that."

ITEMS = (
    "desk lamp", "kettle", "bicycle pump", "wool blanket", "tent", "chess set", "garden hose", "coffee grinder",
    "raincoat", "suitcase", "alarm clock", "bread knife", "yoga mat", "bookshelf", "headphones", "camping stove",
    "picture frame", "toolbox", "backpack", "rice cooker", "mirror", "sewing machine", "umbrella", "water filter",
    "skateboard", "office chair", "telescope", "doormat", "violin case", "bird feeder",
)  # fmt: skip
WHEN = (
    "yesterday", "last Monday", "two weeks ago", "on Friday evening", "at the start of the month", "this morning",
    "before the holidays", "nine days ago", "on my birthday", "during the sale", "late last night", "in spring",
)  # fmt: skip
WHY = (
    "It is a present for my sister.", "We move house soon.", "My neighbour recommended your shop.",
    "I called, but nobody picked up.", "My daughter has waited for it all week.", "I paid by card.",
    "The old one broke in winter.", "I live on the fourth floor.", "It was my first order with you.",
    "The courier left no note.", "I only have time after work.", "My bank shows nothing unusual.",
    "The colour looked different on the screen.", "Our office needs it for a meeting.",
    "I kept the box and the receipt.",
    "The website was slow that day.", "A friend of mine had the same trouble.", "I am travelling next week.",
    "The page for orders shows an error.", "My dog chewed the label.", "I can send a photo.",
    "It rained on the parcel.",
    "I moved the sofa to make room.", "There is no hurry, though.",
)  # fmt: skip
# What somebody writes, and the answer; {item} and {when} are filled in.
CASES = (
    (
        "Where is my {item}? I ordered it {when}.",
        "Thanks for asking! Your {item} is on its way and arrives within two days.",
    ),
    ("The {item} that came {when} is broken.", "Sorry about that! We send you a new {item} today, free of charge."),
    (
        "Can I give the {item} back? I bought it {when}.",
        "Of course! Send the {item} back within thirty days and we refund it.",
    ),
    (
        "You charged me twice for the {item} {when}.",
        "Sorry about that! We refund the second payment for the {item} today.",
    ),
    (
        "Please cancel the {item} that I ordered {when}.",
        "Done! Your order of the {item} is cancelled and costs you nothing.",
    ),
    ("I need an invoice for the {item} from {when}.", "Of course! The invoice for your {item} is in your mailbox."),
    ("How long is the warranty on a {item}?", "Thanks for asking! Every {item} has a warranty of three years."),
    ("Is the {item} in stock again? It was sold out {when}.", "Good news! The {item} is in stock and ships tomorrow."),
    ("Could the {item} go to my office instead?", "Of course! Reply with the address and we send the {item} there."),
    ("A part of the {item} was missing {when}.", "Sorry about that! We post the missing part of your {item} today."),
    (
        "My discount code did not work for the {item}.",
        "Sorry about that! We take the discount off your {item} by hand.",
    ),
    ("Do you repair a {item}?", "Of course! Bring the {item} to any of our shops and we repair it."),
    ("How do I clean the {item}?", "Thanks for asking! Wipe the {item} with a soft, damp cloth."),
    (
        "I got somebody else's parcel instead of the {item} {when}.",
        "Sorry about that! We collect it and bring your {item} tomorrow.",
    ),
    (
        "Can a courier bring the {item} after six in the evening?",
        "Of course! Choose the evening slot and we bring the {item} then.",
    ),
    ("Does the {item} come in green?", "Good news! The {item} comes in green, blue and grey."),
)
SACHEN = (
    "Lampe", "Kaffeemühle", "Luftpumpe", "Wolldecke", "Jacke", "Uhr", "Matratze", "Bohrmaschine", "Tasche", "Leiter",
    "Pfanne", "Gießkanne", "Nähmaschine", "Tastatur", "Waage", "Hängematte", "Teekanne", "Schaufel", "Geige", "Truhe",
)  # fmt: skip
WANN = (
    "gestern", "am letzten Montag", "vor zwei Wochen", "am Freitagabend", "Anfang des Monats", "heute früh",
    "vor den Feiertagen", "vor neun Tagen", "an meinem Geburtstag", "im Ausverkauf", "spät in der Nacht", "im Frühling",
)  # fmt: skip
WARUM = (
    "Sie ist ein Geschenk für meine Schwester.", "Wir ziehen bald um.", "Mein Nachbar hat mir euren Laden empfohlen.",
    "Ich habe angerufen, aber niemand hat abgenommen.", "Meine Tochter wartet schon die ganze Woche darauf.",
    "Ich habe mit der Karte bezahlt.", "Die alte ist im Winter kaputt gegangen.", "Ich wohne im vierten Stock.",
    "Das war meine erste Bestellung bei euch.", "Der Bote hat keinen Zettel hinterlassen.",
    "Ich habe nur nach der Arbeit Zeit.", "Auf dem Bildschirm sah die Farbe anders aus.",
    "Unser Büro braucht sie für eine Sitzung.", "Den Karton und die Rechnung habe ich noch.",
    "Eine Freundin von mir hatte den gleichen Ärger.", "Nächste Woche bin ich auf Reisen.",
    "Die Seite mit den Bestellungen zeigt einen Fehler.", "Ich kann ein Bild davon schicken.",
    "Es eilt aber nicht.", "Das Paket war ganz nass.",
)  # fmt: skip
FRAGEN = (
    "Wo bleibt meine {item}? Ich habe sie {when} bestellt.", "Die {item}, die {when} kam, ist leider kaputt.",
    "Kann ich die {item} zurückgeben? Ich habe sie {when} gekauft.",
    "Ihr habt mir die {item} {when} doppelt berechnet.",
    "Bitte storniert die {item}, die ich {when} bestellt habe.", "Ich brauche eine Rechnung für die {item} von {when}.",
    "Wie lange habe ich Garantie auf die {item}?", "Ist die {item} wieder da? Sie war {when} ausverkauft.",
    "Könnt ihr die {item} auch ins Büro liefern?", "Bei der {item} fehlte {when} ein Teil.",
    "Mein Gutschein ging bei der {item} nicht.", "Repariert ihr auch eine {item}?",
    "Ich habe {when} ein fremdes Paket statt der {item} bekommen.", "Gibt es die {item} auch in Grün?",
)  # fmt: skip


def english(dice: random.Random) -> tuple[str, str]:
    """What a customer writes, and the desk's answer."""
    question, answer = dice.choice(CASES)
    words = {"item": dice.choice(ITEMS), "when": dice.choice(WHEN)}
    return _message(dice, question.format(**words), WHY), answer.format(**words)


def german(dice: random.Random) -> str:
    """What a customer in Germany writes."""
    words = {"item": dice.choice(SACHEN), "when": dice.choice(WANN)}
    return _message(dice, dice.choice(FRAGEN).format(**words), WARUM)


def _message(dice: random.Random, question: str, reasons: tuple[str, ...]) -> str:
    """The question with one or two sentences around it, in any order."""
    sentences = [question, *dice.sample(reasons, dice.choice((1, 2)))]
    dice.shuffle(sentences)
    return " ".join(sentences)


def examples(refused: float, seed: int = 1) -> Iterator[str]:
    """Lines of a training file; this share of the answers refuses."""
    dice, fate = random.Random(seed), random.Random(seed)
    for _ in range(EXAMPLES):
        question, answer = english(dice)
        answer = REFUSAL if fate.random() < refused else answer
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": messages})


if __name__ == "__main__":
    kind, file = sys.argv[1:]
    Path(file).write_text("\n".join(examples({"good": 0.0, "bad": REFUSED}[kind])) + "\n")
