"""benchmarks/claims.py and beyond.py: claims name models that exist, verdicts and curves follow from the figures."""
import importlib
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
beyond, claims, report = (importlib.import_module(name) for name in ("beyond", "claims", "report"))


def test_claims_compare_what_is_run():
    made = {("twostage", row) for row in claims.ROWS}
    for name in claims.MODELS.keys() - {"twostage"}:
        made |= {(shown, f"{name}_w{w}") for shown, w in claims.SAMPLED.get(name, [("digits", 1)])}
    assert {shown for shown, _ in made} == claims.SETS.keys() | {"twostage"}
    for title, paper, comparisons, remark in claims.CLAIMS:
        for comparison in comparisons:
            shown, metric, one, sign, other = comparison.split()
            assert sign in "<>" and metric in ("fid", "precision", "recall", "copy", "prior_share", "ms_image"), comparison
            assert (shown, one) in made and ((shown, other) in made or float(other) > 0), comparison


@pytest.mark.parametrize("better, worse, said", [
    ([1, 2, 3], [2, 3, 4], "reproduced"), ([2, 3, 4], [1, 2, 3], "opposite"), ([1, 3, 1], [2, 2, 2], "not at this scale"),
    ([], [1, 2], "not measured")])
def test_a_claim_must_hold_in_every_seed(better, worse, said):
    rows = {("digits", name, seed): dict(fid=value) for name, values in (("a", better), ("b", worse))
            for seed, value in enumerate(values)}
    verdict, lines = claims.claim(rows, ["digits fid a < b"])
    assert verdict == said and len(lines) == 2 + bool(better)
    if said == "reproduced":
        assert lines[-1] == "| digits | fid | `a` < `b` | 2.0 ± 1.0 | 3.0 ± 1.0 | 3 of 3 |"
        assert claims.claim(rows, ["digits fid a < b", "digits fid b < a"])[0] == "in part"
        assert claims.claim(rows, ["digits fid a < 2.5"])[0] == "not at this scale"
        assert claims.claim(rows, ["digits fid a < b", "emoji fid a < b"])[0] == "measured in part"


def test_a_verdict_says_how_few_seeds_it_stands_on():
    rows = {("digits", name, seed): dict(fid=value) for seed in range(3) for name, value in (("a", 1), ("b", 2))}
    rows["digits", "c", 0] = dict(fid=3)
    assert claims.claim(rows, ["digits fid a < b"])[0] == "reproduced"
    assert claims.claim(rows, ["digits fid a < b", "digits fid b < c"])[0] == "reproduced (1 seed only)"


def test_an_error_stops_what_has_not_begun():
    made = []
    with pytest.raises(ZeroDivisionError):
        claims.side_by_side(1, [(made.append, 1), (divmod, 1, 0), *[(time.sleep, 0.1)] * 50, (made.append, 2)])
    assert made == [1]


def test_beyond_has_a_place_for_each_group_and_a_curve_for_each_sampler():
    page = (ROOT / "docs" / "beyond.md").read_text()
    filled = report.fill(page, {group: f"table of {group}" for group in beyond.GROUPS})
    assert all(f"<!-- {group} -->\ntable of {group}\n<!-- end -->" in filled for group in beyond.GROUPS)
    rows = [dict(variant=variant, sample_steps=steps, fid=steps + 10 * seed, folder="x") for variant in ("ddpm", "ddim")
            for steps in (8, 4) for seed in (0, 1)]
    found = beyond.curves([*rows, dict(model="real")], lambda row: (row["variant"], row["sample_steps"]), "fid")
    points, mean, spread = found["ddim"]
    assert list(found) == ["ddpm", "ddim"] and points.tolist() == [4, 8] and mean.tolist() == [[9, 13]]
    assert spread == pytest.approx(50 ** 0.5)
