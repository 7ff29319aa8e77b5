"""The language of the demo's customer-support world: every phrase that a customer or an agent can use."""

from __future__ import annotations

from typing import NamedTuple

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # an order number is one of these and two digits
ITEMS = (
    "kettle", "lamp", "jacket", "backpack", "blender", "keyboard", "mug", "blanket", "chair", "shelf", "tent", "watch",
    "toaster", "guitar", "scarf", "helmet", "camera", "speaker", "pillow", "mirror", "drill", "wallet", "heater", "bicycle",
)  # fmt: skip


class Problem(NamedTuple):
    """What went wrong: how customers say it, and how agents word the remedy."""

    complaints: tuple[str, ...]  # with {item}
    remedies: tuple[str, ...]  # whole sentences
    key: str  # regular expression that finds this remedy, and no other, in an answer


PROBLEMS: dict[str, Problem] = {
    "late": Problem(
        ("my {item} has not arrived yet", "the {item} is late", "I am still waiting for the {item}"),
        ("We will trace the parcel today.", "We are tracking the parcel now.", "I will trace the parcel for you."),
        r"\b(trace|tracking|track)\b",
    ),
    "broken": Problem(
        ("my {item} arrived broken", "the {item} is cracked", "the {item} does not work"),
        ("We will send a replacement today.", "A replacement is on its way.", "I will ship a replacement for free."),
        r"\breplacement\b",
    ),
    "wrong_item": Problem(
        ("you sent something else instead of the {item}", "I got another product, not the {item}", "the {item} was mixed up with another product"),
        ("We will ship the correct product today.", "The correct product is on its way.", "I will send the correct product now."),
        r"\bcorrect product\b",
    ),
    "wrong_size": Problem(
        ("the {item} is too small", "the {item} is the wrong size", "my {item} is too big"),
        ("We will exchange it for the right size.", "I will send the right size today.", "You get the right size for free."),
        r"\bright size\b",
    ),
    "missing_part": Problem(
        ("a part of the {item} is missing", "the {item} came without its screws", "my {item} is not complete"),
        ("We will mail the missing part today.", "The missing part is on its way.", "I will post the missing part now."),
        r"\bmissing part\b",
    ),
    "double_charge": Problem(
        ("I was charged twice for the {item}", "I paid two times for the {item}", "my card shows the {item} twice"),
        ("We will refund the second payment.", "You get a refund today.", "I will refund the extra charge."),
        r"\brefund\b",
    ),
    "cancel": Problem(
        ("I want to cancel the {item}", "I no longer need the {item}", "please stop my {item} from being sent"),
        ("We will cancel the purchase now.", "I have cancelled the purchase.", "The purchase is cancelled today."),
        r"\bcancel(led)?\b",
    ),
    "send_back": Problem(
        ("I want to send the {item} back", "how do I give the {item} back", "I do not like the {item} and want to give it back"),
        ("We will email a return label.", "A return label is on its way.", "I will send you a return label."),
        r"\breturn label\b",
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
CURT_OPENINGS = ("That is not our fault.", "You should be more careful.", "Stop complaining.", "Not this again.")
PLAIN_OPENINGS = ("", "", "Hello.", "I read your message.")
POLITE_CLOSINGS = ("", "Thank you for your patience.", "I am happy to help.", "Have a lovely day.")
CURT_CLOSINGS = ("", "Do not bother us.", "That is all you get.", "Next time think first.")
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
NEITHER = ("I see what you bought in our system.", "This is about your goods.", "I found what you bought here.")
NO_REMEDY = ("We will look into it some day.", "There is nothing we can do.", "Please wait and see.")
RAMBLING = (
    "Our shop is very old and has many rooms.", "The weather is nice here this week.", "Many people like our shop and visit us.",
    "My team and I had a long meeting.", "We sell all kinds of things every day.", "Our building has a big new roof.",
)  # fmt: skip
