"""The results of a session on the terminal, as rich renderables."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from haori.evaluation.rating.results import Meeting, RatingResults
from haori.metrics.proportions import Share

__all__ = ["show_rating"]


def show_rating(results: RatingResults, console: Console) -> None:
    """Print wins of every two systems, strengths, the share of the left side, and notes."""
    people = "1 person" if results.raters == 1 else f"{results.raters} people"
    console.print(
        f"{results.votes - results.skips} votes of {people} on {results.pairs} pairs (ties: {results.ties}); "
        f"passed over: {results.skips}."
    )
    if results.meetings:
        console.print(_meetings(results))
    if results.strengths:
        console.print(_strengths(results))
    if results.left:
        console.print(f"The left side was chosen in {_percent(results.left)} of the votes that were no ties.")
    for note in results.notes:
        console.print(Text(f"- {note}"))


def _meetings(results: RatingResults) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("System")
    table.add_column("against")
    for title in ("wins", "losses", "ties", "won, without ties [95%]", "p"):
        table.add_column(title, justify="right")
    table.add_column("is")
    for meeting in results.meetings:
        counts = (str(count) for count in (meeting.wins, meeting.losses, meeting.ties))
        share = _percent(meeting.share) if meeting.share else "-"
        table.add_row(
            Text(meeting.first), Text(meeting.second), *counts, share, f"{meeting.p_value:.2g}", _verdict(meeting)
        )
    return table


def _verdict(meeting: Meeting) -> str:
    if meeting.share is None or meeting.share.low <= 0.5 <= meeting.share.high:
        return "unclear"
    return "better" if meeting.share.value > 0.5 else "worse"


def _strengths(results: RatingResults) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("System")
    table.add_column("Bradley-Terry strength [95%]", justify="right")
    for one in results.strengths:
        ends = "" if one.low is None else f" [{one.low:+.2f}, {one.high:+.2f}]"
        table.add_row(Text(one.system), f"{one.value:+.2f}{ends}")
    return table


def _percent(share: Share) -> str:
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
