"""`align chat`: a conversation in the terminal with one policy or several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from configs.errors import UserError


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `chat`."""
    parser = verbs.add_parser(
        "chat",
        help="talk to policies in the terminal: switch between them, compare their answers",
        description="A conversation with a policy. Adapters of one base are held on one copy of it, and /use switches without loading. "
        "Lines from a pipe are answered one by one. Nothing that is said is kept in a file, unless /save asks for it.",
        epilog="commands: /use NAME, /compare [TEXT], /system [TEXT], /reset, /save FILE, /help, /quit. Ctrl-C stops an answer, Ctrl-D leaves.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="a registry name such as sft/demo, a Hugging Face folder or a model name; the first answers")
    parser.add_argument("--registry", type=Path, default=Path("runs/registry"), metavar="DIR", help="default: runs/registry")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--once", metavar="TEXT", help="answer this and leave; with several names, each answers")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token each time (default: 0.7)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens of the longest answer (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed and messages give the same answers (default: 0)")
    parser.add_argument("--template", default="auto", metavar="NAME", help="chat template of models from outside: auto, plain, chatml, raw, llama3, qwen, zephyr, mistral, gemma or a .jinja file (default: auto)")
    parser.add_argument("--json", action="store_true", help="one JSON object for each answer, a line each; everything else goes to stderr")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends. Returns the exit code."""
    if not args.temperature >= 0 or args.temperature == float("inf"):
        raise UserError(f"--temperature {args.temperature}: expected 0 or more, such as 0.7")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: expected 1 or more")
    from launch.chat.room import Room
    from stages.chat.speaker import Manner, Speakers

    speakers = Speakers(args.names, args.registry, args.template)
    try:
        room = Room(speakers, Manner(args.temperature, args.max_new_tokens, args.seed), system=args.system, as_json=args.json)
        if args.once is not None:
            room.once(args.once)
            return 0
        interactive = sys.stdin.isatty()
        if interactive:
            for group in speakers.shared():
                room.notice(f"{', '.join(group)} share one base")
            room.notice(f"talking to {room.using}; /help lists the commands")
        room.take(_typed() if interactive else sys.stdin)
    finally:
        speakers.close()
    return 0


def _typed() -> Iterator[str]:
    """Lines of a person at a terminal, with the keys of readline; ends at Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines with it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
