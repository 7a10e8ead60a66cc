"""The report: a table, a dict and back, a picture."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
from handmade import images, small, small_report

from mtzip.reports.report import AxisReport, LayerReport, Private, Report, SharedBy
from mtzip.zip import zip_networks

TABLE = """\
a + b, method refit: 396 parameters stored of 545 (72.7%)

axis    neurons a  neurons b  shared    %  difference
-----------------------------------------------------
conv            6          6       4   67      0.0213
hidden          5          5       5  100           -

layer          parameters  stored     %  error a  error b  damping  moments
---------------------------------------------------------------------------
conv                  228     164  71.9     0.01     0.25    0.001  feature
hidden                250     165  66.0      0.1    0.002     0.01   sample
---------------------------------------------------------------------------
whole network         545     396  72.7

left private:
  a: head: an output of the network

time: trace 1.5 s, sweep 0.2 s"""


def many(count: int = 30) -> Report:
    """Long names, axes that one task lacks, values over five decades."""
    names = [f"backbone.layer{i // 12}.{i % 12}.residual_function.conv_{i}" for i in range(count)]
    axes = [
        AxisReport(
            name, {"mnist": 64 + i} | ({"fashion": 60} if i % 3 else {}), 40, 10.0 ** -(i % 6) if i % 7 else None
        )
        for i, name in enumerate(names)
    ]
    layers = [
        LayerReport(name, 10**4 + i, 7000, {}, 1e-3, "feature", {"mnist": math.nan}) for i, name in enumerate(names)
    ]
    private = [Private("mnist", f"head.{i}", "an output of the network") for i in range(30)]
    return Report(("mnist", "fashion"), "mtz", axes, layers, private, 10**6, 7 * 10**5)


CASES = {
    "small": small_report(),
    "many": many(),
    "empty": Report((), "refit"),
    "one": Report(("a", "b", "c", "d"), "average", [AxisReport("fc", dict.fromkeys("abcd", 3), 3)], [], [], 9, 3),
}


def test_table():
    assert str(small_report()) == TABLE


def test_table_of_many_layers_is_aligned_and_groups_what_is_private():
    text = str(many())
    for block in text.split("\n\n")[1:3]:
        lines = block.splitlines()
        assert len({len(line) for line in lines if not line.startswith("whole")}) == 1
    private = text[text.index("left private") :]
    assert private.count("an output of the network") == 1
    assert all(f"head.{i}" in private for i in range(30))
    assert max(map(len, private.splitlines())) <= 110


@pytest.mark.parametrize("report", CASES.values(), ids=CASES)
def test_to_dict_is_json_and_comes_back(report):
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    back = Report.from_dict(data)
    assert back.to_dict() == report.to_dict()
    assert str(back) == str(report)
    assert isinstance(back.tasks, tuple)
    if report is not CASES["many"]:  # NaN is not equal to itself
        assert back == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": 3}, "report.method must be a string, got 3"),
        ({"tasks": "ab"}, "report.tasks must be a list, got 'ab'"),
        ({"axes": {}}, "report.axes must be a list"),
        ({"axes": [{"name": "x"}]}, r"report.axes\[0\] must have the fields .* got no 'neurons'"),
        ({"parameters_before": -1}, "report.parameters_before must be an integer >= 0, got -1"),
        ({"parameters_after": True}, "report.parameters_after must be an integer >= 0, got True"),
        ({"seconds": {"trace": "long"}}, r"report.seconds\['trace'\] must be a number, got 'long'"),
        ({"seconds": {"trace": 10**400}}, r"report.seconds\['trace'\] must be a number"),
        ({"extra": 1}, "report must have the fields .* got an unknown 'extra'"),
    ],
)
def test_from_dict_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        Report.from_dict(small_report().to_dict() | change)
    with pytest.raises(ValueError, match="report must be a mapping, got None"):
        Report.from_dict(None)


@pytest.mark.parametrize("report", CASES.values(), ids=CASES)
def test_plot(report, tmp_path):
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    neurons, difference, parameters = figure.axes
    assert neurons.get_title(loc="left") == "neurons"
    assert len(neurons.get_yticks()) == len(difference.get_yticks()) == len(report.axes)
    assert len(parameters.get_yticks()) - len(report.layers) in (0, 1)
    labels = [label.get_text() for label in neurons.get_yticklabels()]
    assert len(set(labels)) == len(labels)  # what is cut off long names is not what tells them apart


def test_bars_have_the_lengths_of_the_numbers():
    neurons, _, parameters = small_report().plot().axes
    assert sorted(bar.get_width() for bar in neurons.patches) == [0, 0, 2, 2, 4, 4, 5, 5]
    assert sorted(bar.get_width() for bar in parameters.patches) == sorted([228, 250, 67, 164, 165, 67])


def test_matplotlib_is_imported_by_plot_alone_and_pyplot_never():
    code = (
        "import sys; from mtzip.reports.report import Report; assert 'matplotlib' not in sys.modules;"
        "Report(('a',), 'mtz').plot(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report_of_a_real_zip(tmp_path):
    zipped = zip_networks({"a": small(3, 0), "b": small(4, 1)}, {"a": images(0, 64), "b": images(1, 64)})
    report = zipped.report
    assert report.parameters_after == zipped.parameter_count()
    assert f"{report.parameters_after:,} parameters stored" in str(report)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert len(report.plot(tmp_path / "z.svg").axes) == 3


def test_axes_whose_slots_some_tasks_share(tmp_path):
    axis = AxisReport("wide", {"a": 9, "b": 9, "c": 4}, 6, 0.1, [SharedBy(("a", "b", "c"), 1), SharedBy(("a", "b"), 5)])
    report = Report(("a", "b", "c"), "refit", [axis])
    assert [axis.used(task) for task in "abc"] == [6, 6, 1]
    head, _, row = str(report).split("\n\n")[1].splitlines()
    assert re.split("  +", head)[-3:] == ["by a, b, c", "by a, b", "difference"]
    assert re.split("  +", row)[-3:] == ["1", "5", "0.1"]
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    report.html(tmp_path / "page.html")
    assert "c: 1 of 4 neurons shared" in (tmp_path / "page.html").read_text()
    earlier = report.to_dict()
    del earlier["axes"][0]["sets"]  # as files of earlier versions are
    assert [Report.from_dict(earlier).axes[0].used(task) for task in "abc"] == [6, 6, 4]
