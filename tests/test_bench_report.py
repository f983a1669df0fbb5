"""What is made of a run: the table, CSV, the page with its pictures, the README's tables, the difference of two runs.

All of rows that are made up here: nothing is timed.
"""

import csv
import io
import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gptfast.cli import main
from gptfast_bench import compare, page, report
from gptfast_bench.harness import times
from gptfast_bench.suite import REPORT, SCHEMA

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def samples(ms, seed, spread=0.02, rounds=30, drift=0.0):
    draw = random.Random(seed)
    return [ms * (1 + drift * i / rounds) * draw.lognormvariate(0, spread) for i in range(rounds)]


def row(provider, ms, seed=0, *, op="attention", mode="forward", shape=None, baseline="SDPA", spread=0.02, **more):
    B, T = 4, (shape or {}).get("T", 512)
    return {
        "op": op,
        "mode": mode,
        "dtype": "float32",
        "shape": {"B": B, "T": T} | (shape or {}),
        "provider": provider,
        "baseline": baseline,
        "status": "ok",
        "error": 1e-7,
        "tolerance": 2e-4,
        "first_call_ms": 3 * ms,
        "computes_in": "float32",
        **times(samples(ms, f"{provider} {seed}", spread), moved=1e3 * T, flops=1e5 * T, tokens=B * T),
        **more,
    }


def run(rows, **what):
    environment = {"device": "Xeon & Co", "kind": "cpu", "threads": 2, "torch": "2.13", "commit": "abc", "started": "t"}
    return {
        "schema": SCHEMA,
        "profile": "full",
        "command": "gptfast bench <fast>",
        "environment": environment,
        "limits": {"copy_gb_s": 20.0, "read_gb_s": 15.0, "matmul_tflop_s": {"float32": 0.3}},
        "complete": True,
        "left": [],
        "rows": rows,
    } | what


PARTS = {"matmul": 6.0, "attention": 2.0, "GELU": 1.0, "other": 0.5}
ROWS = [
    *(row(name, ms * T, shape={"T": T}) for T in (128, 512) for name, ms in (("SDPA", 0.02), ("gptfast", 0.01))),
    {**row("Liger & <co>", 1.0), "status": "unavailable", "reason": "liger-kernel is not installed", "ms": None},
    {**row("gptfast int8", 1.0), "status": "wrong", "reason": "off by 1.0e-02, 2e-04 is accepted", "ms": None},
    row("transformers", 30.0, op="model", mode="parts", baseline="transformers", parts=PARTS),
    row("gptfast", 10.0, op="model", mode="parts", baseline="transformers", parts=PARTS),
    *(
        row(name, 1.0, op="model", mode="memory", shape={"T": T}, baseline="transformers", peak_mib=mib * T)
        for T in (64, 512)
        for name, mib in (("transformers", 2.0), ("gptfast", 0.9))
    ),
]


# -- the table, CSV, the page -------------------------------------------------------------------------------------


def test_the_table_names_every_row_and_says_why_one_is_missing():
    text = report.table(run(ROWS))
    for each in ROWS:
        assert re.search(rf"^  {re.escape(each['provider'])} ", text, re.MULTILINE)
    assert "CPU figures: Xeon & Co, 2 threads" in text
    assert "20 GB/s copied, 15 GB/s read; matmuls 300 GFLOP/s in float32" in text
    assert "unavailable: liger-kernel is not installed" in text
    assert "wrong: off by 1.0e-02" in text
    assert re.search(r"^  gptfast .* (1\.9|2\.0)\dx +3 % ", text, re.MULTILINE)


def test_a_difference_within_the_noise_is_marked():
    steady, shaky = (
        run([row("SDPA", 10.0), row("gptfast", 9.7)]),
        run([row("SDPA", 10.0, spread=0.3), row("gptfast", 9.7)]),
    )
    assert "~" not in report.table(steady).split("baseline\n")[1]
    assert re.search(r"^  gptfast .* ~(0\.9|1\.0)\dx ", report.table(shaky), re.MULTILINE)


def test_csv_has_a_line_a_row():
    lines = list(csv.DictReader(io.StringIO(report.to_csv(run(ROWS)))))
    assert [line["provider"] for line in lines] == [row["provider"] for row in ROWS]
    assert lines[0]["shape.T"] == "128"
    assert float(lines[0]["ms"]) == ROWS[0]["ms"]


def test_the_page_is_well_formed_loads_nothing_and_names_every_row():
    html = page.html(run(ROWS))
    tree = ElementTree.fromstring(html.split("\n", 1)[1])  # behind the doctype
    assert not re.search(r"<script|<link|<img|src=|href=|@import|url\(", html)
    assert re.findall(r"https?://[^\"' ]+", html.replace("http://www.w3.org/2000/svg", "")) == []
    table = tree.find("body/table")
    shown = [line.find("td").text for line in table.iter("tr") if line.find("td") is not None]
    for each in ROWS:
        assert each["provider"] in shown
        assert report.key_of(each) in shown
    assert "liger-kernel is not installed" in html


def pictures():
    html = page.html(run(ROWS))
    svgs = list(ElementTree.fromstring(html.split("\n", 1)[1]).iter(f"{SVG}svg"))
    return {svg.find(f"{SVG}title").text: svg for svg in svgs}


def test_the_four_pictures():
    titles = list(pictures())
    assert [title.split()[0] for title in titles] == ["attention", "Roofline,", "Where", "Memory"]


def test_what_is_faster_is_drawn_higher():
    svg = next(svg for title, svg in pictures().items() if title.startswith("attention forward"))
    lines = [line.get("points").split() for line in svg.iter(f"{SVG}polyline")]
    names = [text.text for text in svg.iter(f"{SVG}text") if text.text in ("SDPA", "gptfast")]
    theirs, ours = lines  # ours is drawn last, over the others, and named first
    assert names == ["gptfast", "SDPA"]
    assert all(float(a.split(",")[1]) < float(b.split(",")[1]) for a, b in zip(ours, theirs, strict=True))


def test_everything_is_drawn_inside_the_picture():
    for svg in pictures().values():
        _, _, width, height = map(float, svg.get("viewBox").split())
        for element in svg.iter():
            for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(name, 0)) <= most, (element.tag, element.attrib)
        for line in svg.iter(f"{SVG}polyline"):
            for point in line.get("points").split():
                x, y = map(float, point.split(","))
                assert -1 <= x <= width + 1
                assert -1 <= y <= height + 1


def test_shares_of_a_bar_add_up():
    svg = next(svg for title, svg in pictures().items() if title.startswith("Where"))
    assert "63 %" in [text.text for text in svg.iter(f"{SVG}text")]  # 6 of 9.5


# -- the README ---------------------------------------------------------------------------------------------------


def test_the_readmes_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.with_blocks(text) == text, "make readme-figures"


def test_every_committed_result_is_whole():
    for file in (ROOT / "benchmarks" / "results").rglob(REPORT):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["rows"], file
        assert all(row["status"] == "ok" or row["reason"] for row in content["rows"]), file
        for name in ("environment", "limits", "command"):
            assert content[name], file


def readme(rows, folder, name="some-cpu", **what):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / REPORT).write_text(json.dumps(run(rows, **what)))
    return report.with_blocks(f"before\n<!-- bench: {name} -->\nold\n<!-- /bench -->\nafter\n", folder)


def test_a_readme_table_has_every_cell_with_the_best_in_bold_whoever_it_is(tmp_path):
    lost = [row("SDPA", 4.0, shape={"T": 64}), row("gptfast", 5.0, shape={"T": 64})]
    text = readme([*ROWS[2:6], *lost], tmp_path)
    assert text.startswith(
        "before\n<!-- bench: some-cpu -->\n| | SDPA | gptfast | gptfast to the strongest peer | of limit |\n"
    )
    assert text.endswith("<!-- /bench -->\nafter\n")
    won, behind = [line for line in text.splitlines() if line.startswith("| attention")]
    assert re.fullmatch(
        r"\| attention forward 4 × 512 \| 10\.\d ms \| \*\*5\.\d+ ms\*\* \| (1\.9|2\.0)\d× SDPA \| 3 % \|", won
    )
    assert re.fullmatch(
        r"\| attention forward 4 × 64 \| \*\*[34]\.\d+ ms\*\* \| [45]\.\d+ ms \| lost, 0\.[78]\d× SDPA \| 0 % \|",
        behind,
    )
    assert "float32 on 2 threads of Xeon & Co; torch 2.13; commit abc; `gptfast bench <fast>`" in text
    assert report.with_blocks(text, tmp_path) == text
    with pytest.raises(FileNotFoundError):
        report.with_blocks(text.replace("some-cpu", "nowhere"), tmp_path)


def test_a_readme_table_compares_like_with_like(tmp_path):
    """Coarser weights are shown, yet neither bold nor a peer; what is within the noise is marked; the peer is named."""
    names = (("transformers", 30.0), ("hand-made SDPA", 12.0), ("gptfast", 10.0))
    rows = [row(name, ms, baseline="transformers") for name, ms in names]
    coarse = row("gptfast int8", 3.0, baseline="transformers", computes_in="int8")
    (line,) = [line for line in readme([*rows, coarse], tmp_path).splitlines() if line.startswith("| attention")]
    _, _, _, ours, int8, against, _ = line.removeprefix("| ").split(" | ")
    assert ours.startswith("**")
    assert re.fullmatch(r"[23]\.\d+ ms", int8)
    assert re.fullmatch(r"1\.[12]\d× hand-made SDPA", against)
    near = [row("SDPA", 10.0, spread=0.3), row("gptfast", 10.0, spread=0.3)]
    assert re.search(r"\| ~[01]\.\d\d× SDPA \|", readme(near, tmp_path))


def test_a_readme_table_takes_our_graph_where_there_is_one(tmp_path):
    """And never a variant that says which backend auto should have taken."""
    names = (("transformers", 30.0), ("hand-made SDPA CUDA graph", 10.0), ("gptfast", 20.0))
    rows = [row(name, ms, baseline="transformers") for name, ms in names]
    more = [
        row("gptfast CUDA graph", 5.0, baseline="transformers"),
        row("gptfast triton", 1.0, baseline="transformers"),
    ]
    start = row("gptfast", 1.0, mode="start", baseline="transformers", import_ms=1.0, torch_import_ms=1.0)
    (line,) = [line for line in readme([*rows, *more, start], tmp_path).splitlines() if line.startswith("| attention")]
    assert re.search(r"\| (1\.9|2\.0)\d× hand-made SDPA CUDA graph \| 3 % \|$", line)


def test_the_first_call_with_warm_caches_is_shown():
    start = {"import_ms": 400.0, "torch_import_ms": 2000.0, "cold_call_ms": 9000.0, "warm_call_ms": 1234.0}
    text = report.table(run([row("gptfast", 1.0, op="model", mode="start", baseline="gptfast", **start)]))
    assert "first call 9,000 ms, 1,234 with warm caches" in text


def test_a_readme_table_shows_what_is_wrong_or_not_there(tmp_path):
    two = [
        {**each, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
        for each in (row("SDPA", 9.0), row("gptfast", 5.0))
    ]
    two[-1] |= {"status": "wrong", "reason": "off"}
    text = readme([*two, *ROWS[6:8]], tmp_path, complete=False, left=["one"])
    (line,) = [line for line in text.splitlines() if line.startswith("| attention forward 4 × 512, bfloat16")]
    assert line.endswith("| wrong | – | – |")
    assert "Not all was measured: 1 cells are left." in text
    assert "parts" not in text  # a picture, not a figure


def test_a_page_without_a_block_is_named_and_not_left_as_if_it_had_been_made(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("no table here\n")
    with pytest.raises(SystemExit, match=r"README\.md has no block"):
        report.main([str(page)])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,230"), (12.345, "12.3"), (0.012345, "0.0123"), (999.6, "1,000"), (1.0, "1.00"), (0.0, "0")],
)
def test_three_digits(value, shown):
    assert report.significant(value) == shown


# -- two runs -----------------------------------------------------------------------------------------------------


def pair(ms_before, ms_after, *, machine=1.0, spread=0.02):
    """Two runs of one cell, on a machine that is ``machine`` times as slow the second time."""
    before = [row("SDPA", 10.0, 1, spread=spread), row("gptfast", ms_before, 1, spread=spread)]
    after = [
        row("SDPA", 10.0 * machine, 2, spread=spread),
        row("gptfast", ms_after * machine, 2, spread=spread),
    ]
    return {each.provider: each for each in compare.compare(run(before), run(after))}


@pytest.mark.parametrize("machine", [1.0, 1.6, 0.7])
def test_a_fifth_slower_is_found_whatever_the_machine_does(machine):
    found = pair(5.0, 6.0, machine=machine)["gptfast"]
    assert found.verdict == "slower"
    assert found.change == pytest.approx(0.2, abs=0.05)
    assert pair(6.0, 5.0, machine=machine)["gptfast"].verdict == "faster"


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_two_runs_of_the_same_code_are_not_called_different(spread):
    for seed in range(15):
        runs = [
            run([row("SDPA", 10.0, 2 * seed + i, spread=spread), row("gptfast", 5.0, 2 * seed + i, spread=spread)])
            for i in range(2)
        ]
        assert {each.verdict for each in compare.compare(*runs)} == {"control", "same"}


def test_without_a_baseline_times_are_compared_as_they_are():
    before, after = run([row("gptfast", 5.0, 1)]), run([row("gptfast", 6.0, 2)])
    (found,) = compare.compare(before, after)
    assert (found.verdict, found.raw) == ("slower", None)


def test_a_row_that_became_wrong_is_lost_and_another_is_new():
    wrong = {**row("gptfast", 5.0), "status": "wrong", "reason": "off"}
    before, after = run([row("SDPA", 9.0), row("gptfast", 5.0)]), run([row("SDPA", 9.0), wrong, row("flash", 4.0)])
    verdicts = {each.provider: each.verdict for each in compare.compare(before, after)}
    assert verdicts == {"SDPA": "control", "gptfast": "lost", "flash": "new"}


def test_the_command_compares_and_its_status_tells(tmp_path, capsys):
    for name, ms in (("a", 5.0), ("b", 6.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run([row("SDPA", 10.0, name), row("gptfast", ms, name)])))
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "compare", a, b])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert re.search(r"slower +attention forward float32 B=4 T=512: gptfast: \+(1\d|2\d)\.\d %, noise \d+ %", out)
    assert out.endswith("1 slower, 0 lost, 0 faster, 0 new, 0 same\n")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "compare", a, a, "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)[1]["verdict"] == "same"
    assert main(["bench", "compare", a, str(tmp_path / "none.json")]) == 2
