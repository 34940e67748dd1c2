"""benchmarks/: counts against a second count, verdicts from made-up figures, tiny runs. Speed is not tested."""
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, done

import common
from benchmarks import claims, report, scaling


def test_scaling_counts_what_a_real_network_has():
    preset = common.PRESETS["digits16"]
    told = {"tokens": scaling.TOKENS, "cls": (scaling.CLS,)}
    keys = ("size", "patch", "channels", "blocks", "transformers")
    model = common.UViT(*(preset[key] for key in keys), told)
    assert scaling.count(preset)["parameters"] == sum(p.numel() for p in model.parameters())
    x = torch.empty(3, 8, device="meta")
    linear = torch.nn.Linear(8, 16).to("meta")
    found = scaling.run(linear, lambda net: net(x).sum())
    assert found["forward"] == 2 * 3 * 8 * 16 and found["step"] == 2 * found["forward"]          # x needs no gradient
    assert found["kept"] == 2 * 3 * 8 and found["copies"] == 2 * (8 * 16 + 16)                   # bfloat16


def test_pages_have_a_place_for_each_table():
    assert "ratio" in report.fill((ROOT / "docs/benchmarks.md").read_text(), {"bench_train": "ratio"})
    page = (ROOT / "docs/scaling.md").read_text()
    assert done("-m benchmarks.scaling").count("| semantica64 |") == page.count("| semantica64 |") > 0
    commands = re.findall(r"(0\d_\w+\.py) (.+)", page.split("## Commands")[1])
    assert len(commands) > 9
    for script, flags in commands:
        known = (ROOT / script).read_text() + (ROOT / "common.py").read_text()
        assert all(f'"{flag}"' in known for flag in re.findall(r"--[a-z-]+", flags)), script


@pytest.mark.parametrize("better, worse, said", [
    ([1, 2, 3], [2, 3, 4], "reproduced"), ([2, 3, 4], [1, 2, 3], "opposite"),
    ([1, 3, 1], [2, 2, 2], "not at this scale"), ([1], [2], "reproduced (1 seed only)")])
def test_a_claim_must_hold_in_every_seed(better, worse, said):
    rows = {("digits", name, seed): dict(fid=value) for name, values in (("pairs_w1", better), ("small_w1", worse))
            for seed, value in enumerate(values)}
    page = claims.fill((ROOT / "docs/claims.md").read_text(), rows)
    assert f"## 6. A larger decoder helps: {said}\n" in page and f"| 6 | A larger decoder helps | {said} |" in page
    assert "`python -m benchmarks.claims run --models pairs small`" in page
    assert claims.fill(page, {}) == page                               # rows that were not measured again stay


def test_scores_of_claims_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "KEPT", tmp_path / "claims.json")
    claims.KEPT.write_text("[\n]\n")
    measured = dict(fid=1.0, copy=None, folder="/somewhere")
    claims.remember({("digits", "pairs_w1", 0): measured, ("digits", "real", None): dict(fid=2.0)})
    found = claims.remember({("digits", "pairs_w1", 0): dict(fid=3.0)})
    fid = {key: row["fid"] for key, row in found.items()}
    assert fid == {("digits", "pairs_w1", 0): 3, ("digits", "real", None): 2}
    assert "somewhere" not in claims.KEPT.read_text()


def test_tiny_runs(tiny_data, tmp_path):
    out = tmp_path / "found.json"
    for module, flags in dict(bench_sample=["--batch", 2, "--sample-steps", 2, "--rounds", 1, "--guidance", 1],
                              bench_metrics=["--images", 20, "--features", 32, "--packages", "06"],
                              sample_size=["--data", tiny_data, "--images", 8]).items():
        done(f"-m benchmarks.{module}", *flags, "--out", out)
        assert json.loads(out.read_text())["rows"]
    done("-m benchmarks.stress", "--help")
    done("-m benchmarks.quality", "--help")
    narrow = "-m benchmarks.variants", "channels=16,32,64", "03_train_recon.py"
    done(*narrow, "--data", tiny_data, "--steps", 2, "--batch", 4)
    assert common.load(tiny_data / "recon.pt")["config"]["network"]["channels"] == (16, 32, 64)


def test_gpu_scripts_without_a_gpu(tmp_path):
    (tmp_path / "page").write_text("<!-- gpu -->\n<!-- end -->\n")
    measure = f"gpu.sh --device cpu --only same matmul train --out {tmp_path}/found.json --write {tmp_path}/page"
    for call in (measure, f"gpu_demo.sh {tmp_path}/d --device cpu"):
        subprocess.run(f"MODELS=pairs PYTHON={sys.executable} bash benchmarks/{call}", shell=True, cwd=ROOT, check=True)
    assert "MFU" in common.load(tmp_path / "found.json")["rows"]["train"]["tiny, batch 4"]
    assert "| tiny, batch 4 |" in (tmp_path / "page").read_text() and (tmp_path / "d/metrics.txt").exists()
