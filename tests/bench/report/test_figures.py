"""Figures, and the page that holds figures and tables."""

import re

from helpers import bench_records

from lorafast.bench.report import html_report, plots, tables
from lorafast.bench.report.record import Results

RESULTS = bench_records.results()
# Namespaces and credits in the SVG; nothing is loaded from them.
NAMESPACES = ("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org")
NAMESPACES += ("https://matplotlib.org",)


def test_figures_have_axes_units_and_a_legend():
    figures = plots.figures([RESULTS])
    assert list(figures) == [
        "linear-4x6-r2-fp32-ratio",
        "linear-4x6-r2-fp32-peak",
        "training-minilm-r2-fp32-loss",
    ]
    ratio = figures["linear-4x6-r2-fp32-ratio"]
    titles = ["lora, dropout 0", "dora, dropout 0", "lora, dropout 0.1", "dora, dropout 0.1"]
    assert [panel.get_title() for panel in ratio.axes] == titles
    assert ratio.axes[0].get_ylabel() == "step time ÷ frozen layer's"
    assert ratio.axes[2].get_xlabel() == "tokens per batch M"
    legend = {text.get_text() for text in ratio.legends[0].get_texts()}
    assert legend == {"frozen", "lorafast", "peft"}
    assert figures["linear-4x6-r2-fp32-peak"].axes[0].get_ylabel() == "peak memory of a step, MiB"
    for panel in ratio.axes:
        bottom, top = panel.get_ylim()
        assert bottom == 0
        assert top >= panel.dataLim.ymax or not panel.has_data()


def test_rows_of_two_files_or_runs_are_in_different_figures():
    other = Results({"device_name": "another"}, RESULTS.records[:2])
    assert "linear-4x6-r2-fp32-ratio-2" in plots.figures([RESULTS, other])
    records = [bench_records.linear(run=run) for run in ("a", "b")]
    names = plots.figures([Results({"runs": {"a": {}, "b": {}}}, records)])
    assert {"a-4x6-r2-fp32-ratio", "b-4x6-r2-fp32-ratio"} <= set(names)


def test_inference_has_figures_and_tables_of_its_own():
    rows = [bench_records.linear(), bench_records.linear(inference=True)]
    names = plots.figures([Results({}, rows)])
    assert {"linear-4x6-r2-fp32-ratio", "linear-4x6-in-inference-r2-fp32-ratio"} <= set(names)
    assert len(tables.tables([Results({}, rows)])) == 2


def test_every_base_has_a_figure_of_its_own():
    rows = [bench_records.training(base_format=name) for name in ("dense", "nf4")]
    found = plots.figures([Results({}, rows)])
    assert list(found) == ["training-minilm-r2-fp32-loss", "training-minilm-in-nf4-r2-fp32-loss"]


def test_rows_without_percentiles_are_drawn():
    record = bench_records.linear(ratio_to_frozen_p20=None, ratio_to_frozen_p80=None)
    assert plots._ratio(record) == (2.0, 2.0, 2.0)
    record.step_ms_p20 = record.step_ms_p80 = None
    assert plots._time(record) == (2.0, 2.0, 2.0)


def test_the_lower_bound_is_drawn_where_there_is_one():
    records = [bench_records.linear(M=M, floor=1 + M / 64) for M in (16, 8)]
    records.append(bench_records.linear("peft", M=8, floor=2.3))
    ratio, peak = plots.figures([Results({}, records)]).values()
    (line,) = [line for line in ratio.axes[0].get_lines() if line.get_label() == "floor"]
    assert line.get_xydata().tolist() == [[8, 1.125], [16, 1.25]]
    assert not [line for line in peak.axes[0].get_lines() if line.get_label() == "floor"]


def test_the_page_is_deterministic_and_loads_nothing():
    page = html_report.page([RESULTS])
    assert page == html_report.page([RESULTS])
    assert page.count("<svg") == 3
    assert page.count("<table") == 3
    assert "a CPU &amp; more" in page
    links = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert all(link.startswith(NAMESPACES) for link in links)
    assert not re.search(r"<(script|img|link|iframe)\b", page)


def test_the_page_names_the_runs_of_a_compact_file():
    runs = {"layer": {"commit": "abc", "command": "lorafast-bench linear"}}
    results = Results({"runs": runs}, [bench_records.linear(run="layer")])
    page = html_report.page([results])
    assert "<dt>run layer</dt><dd>abc: lorafast-bench linear</dd>" in page


def test_the_page_greys_rows_of_a_busy_machine():
    rows = [bench_records.linear(frozen_spread=spread) for spread in (1.2, 2.0)]
    page = html_report.page([Results({}, rows)])
    assert re.findall(r'<tr class="(.*?)">', page) == ["ours", "end ours busy"]
    assert "this machine was busy" in page
