"""The language of the demo's customer-support world: every phrase that a customer or an agent can use."""

from __future__ import annotations

from typing import NamedTuple

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # an order number is one of these and two digits
ITEMS = (
    "kettle", "lamp", "jacket", "backpack", "blender", "keyboard", "mug", "blanket", "chair", "shelf", "tent", "watch",
    "toaster", "guitar", "scarf", "helmet", "camera", "speaker", "pillow", "mirror", "drill", "wallet", "heater", "bicycle",
)  # fmt: skip


class Problem(NamedTuple):
    """What went wrong: how customers say it, and how agents word the remedy. Both use the word `key`."""

    key: str  # is in every complaint and every remedy of this problem, and in no other text
    complaints: tuple[str, ...]  # with {item}
    remedies: tuple[str, ...]  # whole sentences


PROBLEMS: dict[str, Problem] = {
    "late": Problem(
        "late",
        ("my {item} is late", "the {item} is two days late", "I am upset that the {item} is so late"),
        ("We will trace the late parcel today.", "We are tracking the late parcel now.", "I will trace the late parcel for you."),
    ),
    "broken": Problem(
        "broken",
        ("my {item} arrived broken", "the {item} is broken", "I got a broken {item}"),
        ("We will replace the broken one today.", "I will replace the broken one for free.", "A new one for the broken one is coming."),
    ),
    "wrong_item": Problem(
        "wrong",
        ("you sent the wrong product and not the {item}", "I got the wrong thing instead of the {item}", "this is the wrong {item}"),
        ("We will swap the wrong one today.", "I will swap the wrong one for free.", "A driver will swap the wrong one."),
    ),
    "wrong_size": Problem(
        "small",
        ("the {item} is too small", "my {item} is much too small", "this {item} is small for me"),
        ("We will send a larger one for the small one.", "I will exchange the small one for free.", "You may exchange the small one today."),
    ),
    "missing_part": Problem(
        "missing",
        ("a part of the {item} is missing", "my {item} came with a part missing", "the screws of the {item} are missing"),
        ("We will mail the missing part today.", "The missing part is on its way.", "I will post the missing part now."),
    ),
    "double_charge": Problem(
        "twice",
        ("I was charged twice for the {item}", "I paid twice for the {item}", "my card shows the {item} twice"),
        ("We will refund what was paid twice.", "You get a refund of what you paid twice.", "I will refund what we charged twice."),
    ),
    "cancel": Problem(
        "cancel",
        ("I want to cancel the {item}", "please cancel my {item}", "I have to cancel the {item}"),
        ("We will cancel the purchase now.", "I will cancel the purchase today.", "I can cancel the purchase for you."),
    ),
    "send_back": Problem(
        "return",
        ("I want to return the {item}", "I have to return my {item}", "please let me return the {item}"),
        ("We will email a return label.", "A return label is on its way.", "I will send you a return label."),
    ),
}  # fmt: skip

GREETINGS = ("", "Hi.", "Hello.", "Good morning.", "Excuse me.", "This is bad!", "I am upset.", "Listen!", "Dear team.")
PLACES = ("Order {order}:", "About order {order}:", "My order is {order} and", "In order {order}")
CLOSINGS = (
    "",
    "Please help.",
    "Thank you.",
    "What can you do?",
    "Fix it now!",
    "I need it soon.",
    "I expect an answer.",
    "Can you help me?",
)

POLITE_OPENINGS = (
    "I am sorry about that.",
    "Thank you for telling us.",
    "We apologise for the trouble.",
    "So sorry to hear this.",
)
CURT_OPENINGS = ("That is not my fault.", "You need to be more careful.", "Stop complaining to me.", "Not this again.")
PLAIN_OPENINGS = ("", "", "Hello.", "I read your message.")
POLITE_CLOSINGS = ("", "Thank you for your patience.", "I am happy to help.", "Have a lovely day.")
CURT_CLOSINGS = ("", "Do not bother me about it.", "That is all you get.", "Next time think first.")
POLITE_KEY = r"\b(sorry|thank|apologise|happy to help|lovely)\b"
CURT_KEY = r"\b(fault|careful|complaining|not this again|bother|all you get|think first)\b"

BOTH = (
    "I see the {item} in order {order}.",
    "This is about the {item} of order {order}.",
    "I found order {order} with the {item}.",
)
ITEM_ONLY = ("I see the {item} in our system.", "This is about the {item}.", "I found the {item} you bought.")
ORDER_ONLY = (
    "I see order {order} in our system.",
    "This is about order {order}.",
    "I found order {order} with your goods.",
)
NEITHER = ("I see what is in the order.", "This is about the order.", "I found the order in our system.")
NO_REMEDY = ("It is in a long queue now.", "There is nothing to do about it.", "Please wait and see.")
# With words that customers use too: or the share of the customer's words in an answer would give the better one away.
RAMBLING = (
    "My shop is in an old town.", "It is nice and warm here.", "Many people order from my team.",
    "What a good morning I had.", "You can help us with the roof.", "I like this day so much.",
)  # fmt: skip
