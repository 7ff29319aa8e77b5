"""The rows of a comparison as a table whose numbers are whole at any width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MIB = 2**20
WHEN = "use it when"
LAYOUTS = ((False, True, 2), (True, True, 1), (True, False, 1), (True, False, 0))  # short numbers, WHEN as a column, gap; from wide to narrow
WIDEST = 1000  # columns
HEADS = {
    "technique": "technique", "trained": "trained weights", "share": "share", "memory": "memory", "speed": "steps/s", "loss": "loss", "rate": "learning rate",
    "bytes": "published",
}  # fmt: skip
NARROW = HEADS | {"trained": "trained", "rate": "rate"}


def size(count: float) -> str:
    """Bytes in the unit that a person would take."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.0f} KiB"


def short(count: int) -> str:
    """A count in four characters or five: 640, 78.3k, 1.24B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def cells(row: dict[str, Any], *, narrow: bool) -> list[str]:
    """What a row shows, in the order of HEADS."""
    loss = "–" if row["loss"] is None else f"{row['loss']:.3f}"
    trained = short(row["trainable"]) if narrow else f"{row['trainable']:,}"
    share = 100 * row["trainable"] / row["parameters"]
    percent = f"{share:.2f}%" if share >= 0.1 else f"{share:.3f}%" if share >= 0.001 else "<0.001%"
    return [row["technique"], trained, percent, size(row["memory"]), f"{row['steps_per_second']:.2f}", loss, f"{row['learning_rate']:g}", size(row["bytes"])]


def said(row: dict[str, Any]) -> str:
    """A measured row in one line, for who watches."""
    loss = "" if row["loss"] is None else f", loss {row['loss']:.3f}"
    return f"{row['trainable']:,} weights trained, {size(row['memory'])}, {row['steps_per_second']:.2f} steps/s{loss}"


def table(rows: list[dict[str, Any]], title: str, *, narrow: bool, when: bool, gap: int) -> Table:
    """The measured rows, with short or long numbers, with or without WHEN, `gap` columns and one between two of them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False, title_justify="left")
    for key, head in (NARROW if narrow else HEADS).items():
        made.add_column(Text(head), justify="left" if key == "technique" else "right", no_wrap=True)
    if when:
        made.add_column(WHEN, no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, cells(row, narrow=narrow)), *([Text(row["when"])] if when else []))
    return made


def below(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """What the columns mean, and why some techniques have no row."""
    measured = [row for row in rows if "reason" not in row]
    loss = "validation" if all(row.get("validated", True) for row in measured) else "the last of training"
    lines = [
        f"memory: the most while it trains; of a GPU, what was allocated there, else torch's tensors. loss: {loss}, after {steps} steps. "
        "share: of all weights, the technique's own among them. published: bytes of its checkpoint.",
    ]
    if len(measured) < len(rows):
        lines = [*(lines if measured else []), "not measured:"]
    return [*lines, *(f"  {row['technique']}: {row['reason']}" for row in rows if "reason" in row)]


def show(rows: list[dict[str, Any]], steps: int, what: str, console: Console) -> None:
    """Print the rows in the first of LAYOUTS that fits; where WHEN is no column it is said below; in a file no line is too long. Nothing is cut: a terminal that is narrower than
    the narrowest layout breaks its lines."""
    from rich.text import Text

    measured = [row for row in rows if "reason" not in row]
    layouts = [table(measured, f"{what}, {steps} steps each", narrow=narrow, when=when, gap=gap) for narrow, when, gap in LAYOUTS]
    room = console.width if console.is_terminal else WIDEST
    chosen = next((place for place, layout in enumerate(layouts) if natural(layout) <= room), len(layouts) - 1)
    made = layouts[chosen]
    lines = below(rows, steps)
    if not LAYOUTS[chosen][1]:
        wide = max((len(row["technique"]) for row in measured), default=0)
        lines = [f"{WHEN}:", *(f"  {row['technique']:{wide}}  {row['when']}" for row in measured), "", *lines]
    if measured:
        console.width = max(console.width, natural(made))
        console.print(made)
        console.print()
    console.width = room
    for line in lines:
        console.print(Text(line))


def natural(made: Table) -> int:
    """The columns that a table takes where nothing of it is cut."""
    from rich.console import Console

    return Console(width=WIDEST).measure(made).maximum
