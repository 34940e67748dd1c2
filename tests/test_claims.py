"""benchmarks/claims.py: every claim names models that exist, and the verdict follows from the figures."""
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
claims = importlib.import_module("claims")


def test_claims_compare_what_is_run():
    made = {("twostage", row) for row in claims.ROWS}
    for name in claims.MODELS.keys() - {"twostage"}:
        made |= {(shown, f"{name}_w{w}") for shown, w in claims.SAMPLED.get(name, [("digits", 1)])}
    assert {shown for shown, _ in made} == claims.SETS.keys() | {"twostage"}
    for title, paper, comparisons, remark in claims.CLAIMS:
        for comparison in comparisons:
            shown, metric, one, sign, other = comparison.split()
            assert sign in "<>" and metric in ("fid", "precision", "recall", "copy", "prior_share"), comparison
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
