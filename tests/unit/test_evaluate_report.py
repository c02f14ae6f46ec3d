"""The report's files, its figures, and what the terminal shows."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from haori.core.errors import StorageError
from haori.core.records import BaseReference, DataReference, Fingerprint, Metric
from haori.evaluation import plots
from haori.evaluation.report import render_html, write_report
from haori.evaluation.result import Confusion, EvaluationResult, RowResult, headline, metric_lines
from haori.evaluation.show import show_result
from haori.metrics.kinds import KINDS
from haori.tasks.examination import Answer, Sample, Turn

EVIL = "<script>alert('x')</script> [bold]& \"q\""


def metric(value, base, low, high):
    return Metric(
        value=value, low=value - 0.05, high=value + 0.05, base=base, difference=value - base,
        difference_low=low, difference_high=high,
    )  # fmt: skip


def make(**changes):
    rows = tuple(
        RowResult(n, f"d:{n}", EVIL, 4, Answer(nll=4.0 + n, label=EVIL), Answer(nll=6.0, label="b")) for n in range(6)
    )
    fingerprint = Fingerprint(architecture="LlamaForCausalLM", structure="sha256:1", weights="sha256:2")
    plain = {
        "adapter": EVIL,
        "against": EVIL,
        "base": BaseReference(name=EVIL, source=EVIL, fingerprint=fingerprint, licence=EVIL),
        "data": DataReference(source=EVIL, hash="sha256:abcdef012345678", format="messages", rows={}, attribution=EVIL),
        "metrics": {"perplexity": metric(3.25, 4.5, -2.0, -0.5), "accuracy": metric(0.865, 0.765, 0.06, 0.14)},
        "base_intervals": {"accuracy": (0.7, 0.83)},
        "labels": (EVIL, "b"),
        "confusion": Confusion(((3, 1), (0, 2)), ((0, 4), (1, 1))),
        "samples": (Sample(0, "d:0", (Turn("user", EVIL),), EVIL, Answer(text=EVIL, label="b"), Answer(text="")),),
        "rows": rows,
        "notes": (EVIL,),
        "seconds": 12.0,
        "time": "2026-11-21T10:00:00+00:00",
    }
    return EvaluationResult(**(plain | changes))


class Tags(HTMLParser):
    """Collects tags and attributes, and complains of tags that do not match."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_nothing_from_data_becomes_markup() -> None:
    page = render_html(make())
    tags = Tags(page)
    assert "script" not in tags.names
    assert "&lt;script&gt;" in page
    assert not {name for name, _ in tags.attributes} & {"src", "href", "onload", "onclick"}
    assert "http" not in page.replace("http-equiv", "")


def test_page_says_what_was_found() -> None:
    page = render_html(make())
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for words in ("86.5%", "76.5%", "+10.0 points", "+6.0 to +14.0", "70.0 to 83.0", "3.250", "-1.250", "better"):
        assert words in text, words
    assert "abcdef012345" in text
    assert page.count("<svg") == 5  # two scales, value and difference each, and the histogram


def test_page_without_a_base_has_no_empty_parts() -> None:
    alone = make(
        against=None, base=None, base_intervals={}, confusion=None, labels=(), samples=(),
        metrics={"chrf": Metric(value=41.0)}, rows=(),
    )  # fmt: skip
    page = render_html(alone)
    Tags(page)
    assert "Difference" not in page and "Side by side" not in page and "Adapter minus base" not in page
    assert "None" not in page
    assert headline(alone) == "chrF 41.0."


def test_files_are_whole(tmp_path) -> None:
    result = make()
    table, page = write_report(result, tmp_path / "a" / "b")
    found = json.loads(table.read_text())
    assert found["metrics"]["accuracy"]["difference_low"] == 0.06
    assert found["rows"][5]["adapter"] == {"nll": 9.0, "label": EVIL, "text": None, "score": None, "scores": None}
    assert found["samples"][0]["prompt"] == [{"role": "user", "content": EVIL}]
    assert found["confusion"] == {"adapter": [[3, 1], [0, 2]], "base": [[0, 4], [1, 1]]}
    assert found["base"]["fingerprint"]["architecture"] == "LlamaForCausalLM"
    assert set(found) == set(vars(result))
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in table.parent.iterdir()) == ["evaluation.html", "evaluation.json"]


def test_folder_that_is_a_file_is_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="in the way"):
        write_report(make(), tmp_path / "file")


def test_lines_read_well() -> None:
    accuracy, perplexity = metric_lines(make())
    assert (accuracy.kind.title, accuracy.adapter, accuracy.difference) == ("Accuracy", "86.5%", "+10.0 points")
    assert accuracy.verdict == "better"
    assert (perplexity.difference, perplexity.verdict) == ("-1.250", "better")  # lower is better
    assert headline(make()) == (
        "Accuracy 86.5% with the adapter, 76.5% without: +10.0 points (95% interval +6.0 to +14.0), better."
    )
    worse, unclear = metric(5.0, 4.5, 0.1, 0.9), metric(0.76, 0.765, -0.04, 0.0)
    lines = metric_lines(make(metrics={"accuracy": unclear, "perplexity": worse}))
    assert [line.verdict for line in lines] == ["no clear difference", "worse"]
    assert lines[0].difference_interval == "-4.0 to 0.0"


def test_errors_and_figures_below_zero_read_well() -> None:
    metrics = {
        "f1[x]": metric(0.5, 0.4, 0.02, 0.18),
        "reward_margin": metric(12.3456, -0.5, 12.0, 13.0),
        "mcc": metric(-0.042, 0.125, -0.3, -0.02),
        "calibration_error": metric(0.03, 0.11, -0.1, -0.06),
        "log_loss": metric(0.25, 0.75, -0.6, -0.4),
    }
    result = make(metrics=metrics, base_intervals={"mcc": (-0.2, 0.4)})
    lines = {line.name: line for line in metric_lines(result)}
    assert list(lines) == ["mcc", "calibration_error", "log_loss", "reward_margin", "f1[x]"]
    mcc, error, margin = lines["mcc"], lines["calibration_error"], lines["reward_margin"]
    assert (mcc.adapter, mcc.adapter_interval, mcc.base_interval) == ("-0.042", "-0.092 to 0.008", "-0.200 to 0.400")
    assert (mcc.difference, mcc.difference_interval, mcc.verdict) == ("-0.167", "-0.300 to -0.020", "worse")
    assert (error.adapter, error.difference, error.verdict) == ("3.0%", "-8.0 points", "better")
    assert lines["log_loss"].verdict == "better"
    assert (margin.adapter, margin.base, margin.verdict) == ("12.35", "-0.500", "better")
    assert (lines["f1[x]"].kind.title, lines["f1[x]"].adapter) == ("F1, x", "50.0%")
    assert headline(make(metrics={"mcc": metrics["mcc"]}, base_intervals={})) == (
        "MCC -0.042 with the adapter, 0.125 without: -0.167 (95% interval -0.300 to -0.020), worse."
    )
    page = render_html(result)
    Tags(page)
    assert page.count("<svg") == 7  # shares, coefficients and nats, value and difference each, and the histogram
    assert "lower is better" in page


def test_titles_of_figures_lie_inside_their_frame() -> None:
    dot = plots.Dot("base", 1.0, 0.5, 1.5, "t")
    for kind in KINDS.values():
        place = re.search(r'class="name" x="([^"]*)"', plots.dot_plot([plots.DotRow(kind.title, (dot,))], "l"))
        assert float(place[1]) >= 7 * len(kind.title)  # 13 px letters are about 7 px wide, and the text ends there


def test_terminal_shows_data_as_it_is() -> None:
    console = Console(file=StringIO(), width=100, color_system=None)
    show_result(make(), console)
    shown = console.file.getvalue()
    assert EVIL in shown  # "[bold]" was not taken for markup
    assert "+10.0 [+6.0 to +14.0]" in shown
    alone = make(against=None, metrics={"accuracy": Metric(value=0.5, low=0.4, high=0.6)}, base_intervals={})
    show_result(alone, console)
    assert "50.0% [40.0 to 60.0]" in console.file.getvalue()


def test_every_metric_fits_an_eighty_column_terminal() -> None:
    console = Console(file=StringIO(), width=80, color_system=None)
    metrics = {name: metric(0.765, 0.865, -0.24, 0.04) for name in KINDS}
    metrics["perplexity"] = metric(1234.5, 2345.6, -2000.5, -1000.5)
    show_result(make(metrics=metrics, samples=()), console, notes=False)
    lines = console.file.getvalue().splitlines()
    assert any("Accuracy" in line and "unclear" in line for line in lines)
    assert any("Perplexity" in line and "better" in line for line in lines)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_figures_are_drawn_inside_their_frame(values) -> None:
    rows = [plots.DotRow("m", (plots.Dot("base", value, value - 1, value + 1, "t"),)) for value in values]
    for svg, width in (
        (plots.dot_plot(rows, "l"), 460),
        (plots.dot_plot(rows, "l", zero=True), 460),
        (plots.difference_histogram(values, "l"), 960),
    ):
        Tags(svg)
        places = [float(found) for found in re.findall(r' (?:x|x1|x2|cx)="([^"]*)"', svg)]
        assert all(0 <= place <= width for place in places)
        sizes = [float(found) for found in re.findall(r'(?:width|height)="([^"]*)"', svg)]
        assert all(size >= 0 for size in sizes)
    drawn = sum(int(found) for found in re.findall(r"(\d+) rows<", plots.difference_histogram(values, "l")))
    assert drawn == len(values)


def test_package_import_is_light() -> None:
    names = "('torch', 'numpy', 'transformers', 'rich')"
    code = f"import sys, haori.evaluation; print([m for m in {names} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
