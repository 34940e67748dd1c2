"""benchmarks/, tiny: tables, JSON, the sections of the page, bad input. How fast anything is, is not tested."""
import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import report

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, *flags): its main() in this process; returns the rows of its JSON."""
    def run(script, *flags):
        found = tmp_path / "found.json"
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags), "--out", str(found)])
        importlib.import_module(script).main()
        return json.loads(found.read_text())["rows"]
    return run


def test_train(run, monkeypatch, capsys):
    """Our network and one other: its numbers, or that it is not there. Memory is taken in this process: faster, and not exact."""
    bench, few = importlib.import_module("bench_train"), dict(preset="digits16", data=None, device="cpu", amp="none", batch=2)
    monkeypatch.setattr(report, "run", lambda *words: json.dumps(bench.memory(words[-1], argparse.Namespace(**few))))
    ours, other = run("bench_train", "--networks", "none", "lucidrains", "--batch", 2, "--rounds", 1, "--repeats", 1)
    assert ours["peak_mib"] > ours["added_mib"] >= 0 and 0 < ours["share"] < 1.2
    assert ours["flops_image"] == pytest.approx(294e6, rel=0.01)       # three times the forward pass of common.py
    if "parameters" in other:
        assert abs(other["parameters"] / ours["parameters"] - 1) < 0.05 and other["flops_image"] > ours["flops_image"]
    else:
        assert "| lucidrains, no condition | not installed |" in capsys.readouterr().out


def test_sample(run):
    rows = run("bench_sample", "--batch", 2, "--sample-steps", 2, "--rounds", 1, "--guidance", 0, 1)
    assert len(rows) in (4, 6) and all(row["ms_image_step"] > 0 for row in rows)


def test_embed(run, monkeypatch, capsys):
    """The cost of an image is the slope between few and many, whatever the start takes."""
    bench = importlib.import_module("bench_embed")

    def embed(images, out, args):
        n = len(np.load(images, allow_pickle=False)) if images.suffix == ".npy" else len(list(images.glob("*.jpg")))
        return 5 + (0.2 if images.suffix == ".npy" else 0.4) * n
    monkeypatch.setattr(bench, "embed", embed)
    rows = run("bench_embed", "--small", 2, 4, "--jpegs", 2, 5, "--jpeg-size", 64, 48, "--rounds", 1)
    found = {row["what"]: row["ms_image"] for row in rows}
    assert found["small"] == [pytest.approx(200)] and found["jpegs"] == [pytest.approx(400)] and found["encode"][0] > 0


def test_sample_size(tiny_data, tmp_path):
    """Through the command line; and the script's section of a page, the rest of which stays."""
    np.save(tiny_data / "split.npy", (np.arange(20) % 5 > 1).astype(np.uint8))                  # 8 unseen, 8 to train on
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("before\n<!-- sample_size -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    flags = ["--data", tiny_data, "--images", 4, 8, 9, "--repeats", 2, "--out", found, "--write", page]
    command = [sys.executable, ROOT / "benchmarks" / "sample_size.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(found.read_text())["rows"]
    assert [(row["n"], row["m"], len(row["fid"])) for row in rows] == [(4, 8, 2), (8, 8, 1), (4, 4, 2)]
    text = page.read_text()
    assert text.startswith("before\n<!-- sample_size -->\n```\n") and text.endswith("\n<!-- end -->\nafter <!-- end -->\n")
    assert "old" not in text and "| 8 | 8 | 1 |" in text


def test_page_without_a_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("nothing here\n")
    for name, words in (("none.md", "is not a page"), ("page.md", "<!-- bench_train -->")):
        monkeypatch.setattr(sys, "argv", ["bench_train.py", "--write", str(tmp_path / name)])
        with pytest.raises(SystemExit) as stopped:
            report.parse(report.parser(""), "bench_train")
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_sections_of_the_page():
    """docs/benchmarks.md has a place for each script that writes there."""
    marks = re.findall(r"^<!-- (\w+) -->\n", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE)
    assert sorted(marks[::2]) == ["bench_embed", "bench_metrics", "bench_sample", "bench_train", "sample_size"]
    assert set(marks[1::2]) == {"end"}


def test_metrics(run):
    """Of few images: 06 beside whatever is there; FID is that of n < d."""
    rows = run("bench_metrics", "--images", 20, "--features", 32, "--metrics", "fid", "--packages", "06")
    assert len(rows) == 1 and rows[0]["seconds"] > 0 and rows[0]["peak_mib"] > rows[0]["added_mib"]


def test_targets():
    found = report.targets([("a", 3, 2.5, "x"), ("b", 0.7, 0.75, "%"), ("c", None, 3, "x"), ("d", 1, None, "%")])
    assert [line.split(" | ")[1:] for line in found.splitlines()[2:]] == [
        ["3x", "2.5x", "met |"], ["70%", "75%", "missed |"], ["not measured", "3x", " |"], ["100%", "", " |"]]
