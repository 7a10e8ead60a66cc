"""The page: well-formed, complete, self-contained, and safe whatever names it shows."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from handmade import small_report, zipped_pair, zipped_three
from retraining import labelled

import mtzip
from mtzip.cli import main
from mtzip.reports.page import page
from mtzip.reports.page_style import STYLE, TASKS
from mtzip.reports.report import AxisReport, LayerReport, Private, Report
from mtzip.saving.save import save
from mtzip.show import describe_html


class Curve:
    """Losses as :func:`mtzip.retrain` gives them."""

    def __init__(self, **losses):
        self.tasks, self._losses = tuple(losses), losses

    def losses(self, task: str) -> list[float]:
        return self._losses[task]


def parsed(content: str) -> ET.Element:
    """The page as a tree: it is well-formed XML as well as HTML."""
    assert content.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(content)


def words(content: str) -> str:
    """What a reader sees, and titles."""
    root = parsed(content)
    body = root.find("body")
    return " ".join([*body.itertext(), *(item.get("title", "") for item in body.iter())])


def sections(content: str) -> list[str]:
    return [item.findtext("h2") for item in parsed(content).iter("section")]


def boxes(content: str) -> list[dict[str, float]]:
    """For every picture of neurons, style to width of its boxes."""
    found = []
    for svg in parsed(content).iter("svg"):
        if svg.get("class") == "boxes":
            found.append({rect.get("class"): float(rect.get("width")) for rect in svg.iter("rect")})
    return found


def large(count: int = 50) -> Report:
    names = [f"backbone.layer{at // 12}.{at % 12}.residual_function.convolution_{at}" for at in range(count)]
    axes = [AxisReport(n, {"digits": 64 + at, "clothes": 60}, 40, 10.0 ** -(at % 6)) for at, n in enumerate(names)]
    layers = [LayerReport(n, 10**4 + at, 7000, {}, 1e-3, "feature", {"digits": 0.1}) for at, n in enumerate(names)]
    private = [Private("clothes", f"head.{at}", "an output of the network") for at in range(30)]
    return Report(("digits", "clothes"), "refit", axes, layers, private, 10**6, 7 * 10**5, {"zip": 1.0})


def test_everything_in_the_report_is_on_the_page():
    report = large()
    content = page(report)
    shown = words(content)
    for item in (*report.axes, *report.layers, *report.private):
        assert item.name in shown
    for expected in ("digits", "clothes", "refit", "70.0%", "700 k", "an output of the network", "0.001"):
        assert expected in shown
    assert sections(content) == ["The networks side by side", "Layer by layer", "What stayed private, and why"]
    assert len(boxes(content)) == 50


def test_boxes_are_as_wide_as_the_neurons_are_many():
    conv, hidden = boxes(page(small_report()))
    assert conv.keys() == {"t0", "shared", "t1"}
    assert conv["shared"] / conv["t0"] == pytest.approx(4 / 2, rel=1e-2)
    assert conv["t0"] == conv["t1"]
    assert hidden.keys() == {"shared"}


def test_more_than_two_tasks_stand_side_by_side():
    axes = [AxisReport("fc", {"a": 8, "b": 4, "c": 8}, 4), AxisReport("late", {"a": 8, "c": 8}, 2)]
    content = page(Report(("a", "b", "c"), "mtz", axes, [], [], 9, 3))
    a, b, c, late_a, late_c = boxes(content)
    assert a["shared"] == pytest.approx(a["t0"], rel=1e-2)
    assert b.keys() == {"shared"}
    assert c["shared"] == pytest.approx(c["t2"], rel=1e-2)
    assert late_a["t0"] / late_a["shared"] == pytest.approx(3, rel=1e-2)
    assert late_c.keys() == {"shared", "t2"}
    assert "not in this task" in words(content)


def test_errors_and_retraining():
    errors = {"originals": {"a": 1.5, "b": 10.0}, "zipped": {"a": 1.75, "b": 12.5}}
    content = page(small_report(), history=Curve(a=[2.0, 1.0, 0.5], b=[3.0, math.nan, 1.0]), errors=errors)
    assert sections(content)[:2] == ["Error before and after", "Retraining"]
    for expected in ("originals", "zipped", "1.75", "12.5", "a: 2 to 0.5"):
        assert expected in words(content)
    lines = [item for item in parsed(content).iter("polyline")]
    assert [len(line.get("points").split()) for line in lines] == [3, 1, 1]  # a gap where the loss was no number
    heights = [float(point.split(",")[1]) for point in lines[0].get("points").split()]
    assert heights == sorted(heights)  # falling losses go down the page


@pytest.mark.parametrize(
    "losses", [[], [1.0], [0.0] * 5, [math.nan] * 3, [-1.0, 2.0], [1e-12, 1e12], [5.0] * 5000, [1.0, math.inf]]
)
def test_any_curve_gives_a_page(losses):
    content = page(small_report(), history=Curve(a=losses))
    assert "Retraining" in sections(content)
    assert not re.search(r"(points|x|y|width)=\"[^\"]*(nan|inf)", content)
    assert len(content) < 60_000


def test_odd_reports():
    for report in (
        Report((), "refit"),
        Report(("a",), "refit", [AxisReport("fc", {"a": 0}, 0)]),
        Report(
            ("a", "b"), "mtz", [AxisReport("fc", {}, 0, math.nan)], [LayerReport("fc", 0, 0, error={"a": math.inf})]
        ),
        Report(tuple(f"task{at}" for at in range(12)), "mtz", [AxisReport("fc", {"task11": 3}, 1)]),
    ):
        content = page(report)
        parsed(content)
        assert "nan" not in content.lower().replace("nance", "")
    with pytest.raises(TypeError, match="errors must map a stage to a mapping from task to error, got dict"):
        page(small_report(), errors={"a": 1.0})


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'\" onmouseover='x",
    "</title></style><svg onload=x>",
    "&lt;&amp;",
    "\x00\x1b[31m\u202ereversed",
    "]]><!--",
    "\ud800",
    "a" * 5000,
]


@pytest.mark.parametrize("bad", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_text_and_nothing_else(bad, tmp_path):
    report = Report((bad, "b"), bad, [AxisReport(bad, {bad: 4, "b": 4}, 2)], [LayerReport(bad, 4, 2, error={bad: 0.1})])
    report.private = [Private(bad, bad, bad)]
    report.seconds = {bad: 1.0}
    plain = Report(("a", "b"), "m", [AxisReport("x", {"a": 4, "b": 4}, 2)], [LayerReport("x", 4, 2, error={"a": 0.1})])
    plain.private, plain.seconds = [Private("a", "x", "y")], {"z": 1.0}
    errors, other = {bad: {bad: 1.0}}, {"s": {"a": 1.0}}
    report.html(tmp_path / "p.html", errors=errors, history=Curve(**{bad: [1.0, 2.0]}))
    content = (tmp_path / "p.html").read_text(encoding="utf-8")
    shape = [(item.tag, sorted(item.keys())) for item in parsed(content).iter()]
    expected = page(plain, errors=other, history=Curve(a=[1.0, 2.0]))
    assert shape == [(item.tag, sorted(item.keys())) for item in parsed(expected).iter()]
    assert all(character.isprintable() or character == "\n" for character in content)


def test_nothing_is_fetched_or_run():
    content = page(large(), history=Curve(digits=[1.0, 0.5]), errors={"originals": {"digits": 1.0}})
    tags = {item.tag for item in parsed(content).iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a", "base", "form"}
    attributes = {name for item in parsed(content).iter() for name in item.keys()}
    assert not {name for name in attributes if name.startswith("on") or "href" in name or name in ("src", "style")}
    assert not re.search(r"url\(|@import|https?:|//", content)


def test_every_style_on_the_page_is_in_the_sheet_and_both_schemes_have_every_colour():
    used = {style for item in parsed(page(large())).iter() for style in item.get("class", "").split()}
    used |= {f"t{at}" for at in range(TASKS)}
    assert {style for style in used if f".{style}" not in STYLE} <= {"wide", "key"}
    light, dark = STYLE.split("prefers-color-scheme: dark")
    names = set(re.findall(r"var\((--[a-z0-9]+)\)", STYLE))
    for scheme in (light, dark):
        assert names <= set(re.findall(r"(--[a-z0-9]+):", scheme))


# -- files ---------------------------------------------------------------------------------------------------------


def test_the_page_of_a_file(tmp_path):
    save(zipped_pair(), tmp_path / "z.safetensors")
    content = describe_html(tmp_path / "z.safetensors")
    shown = words(content)
    assert "What the file holds" in sections(content)
    for expected in ("z.safetensors", "handmade.Small", f"{(tmp_path / 'z.safetensors').stat().st_size:,} bytes"):
        assert expected in shown
    assert str(tmp_path) not in content
    save(zipped_three(), tmp_path / "three")  # without a report
    assert "No layer" in words(describe_html(tmp_path / "three"))


def test_the_command(tmp_path, capsys):
    file, out = tmp_path / "z.safetensors", tmp_path / "page.html"
    save(zipped_pair(), file)
    assert main(["show", str(file), "--html", str(out)]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == describe_html(file)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["page.html", "z.safetensors"]
    assert main(["show", str(file), "--html", str(tmp_path / "missing" / "page.html")]) == 2
    assert "missing" in capsys.readouterr().err


def test_a_page_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small_report().html(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in Path(tmp_path).iterdir()] == ["page.html"]


def test_curves_and_errors_of_the_report_are_in_the_file_and_on_its_page(tmp_path):
    zipped = zipped_pair()
    zipped.report = small_report()
    mtzip.retrain(zipped, labelled(8), steps=3)
    assert [len(zipped.report.retraining[task]) for task in zipped] == [3, 3]
    zipped.report.errors = {"originals": {"a": 1.625}, "retrained": {"a": 1.875}}
    mtzip.save(zipped, tmp_path / "z.safetensors")
    content = describe_html(tmp_path / "z.safetensors")
    assert "Retraining" in content and "Error before and after" in content and "1.875" in content
    assert Report.from_dict(zipped.report.to_dict()).retraining.keys() == zipped.report.retraining.keys()


@pytest.mark.parametrize("steps", [1, 2, 47, 48, 49, 50, 95, 1000])
def test_a_long_curve_is_kept_in_few_values(steps):
    report = small_report()
    losses = [1.0 + 1.0 / (1 + at) for at in range(steps)]
    report.note_retraining({"a": losses})
    kept = report.retraining["a"]
    assert len(kept) == min(steps, 48)
    ends = [item.text for item in parsed(page(report)).iter("text") if item.get("text-anchor") in ("start", "end")]
    assert ends[-1] == (f"{steps - 1:,}" if steps > 1 else "step 0")
    assert kept[0] == pytest.approx(losses[0], rel=1e-3) and kept[-1] == pytest.approx(losses[-1], rel=1e-3)
    assert all(after <= before for before, after in pairwise(kept))
