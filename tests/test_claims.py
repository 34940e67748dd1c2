"""benchmarks/claims.py and beyond.py: claims name models that exist, verdicts and curves follow from the figures."""
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import beyond
import claims
import report

ROOT = Path(__file__).parents[1]


def test_claims_compare_what_is_run():
    made = {("twostage", row) for row in claims.ROWS} | {(shown, "real") for shown in claims.SETS}
    for name in claims.MODELS.keys() - {"twostage"}:
        made |= {(shown, f"{name}_w{w}") for shown, w in claims.SAMPLED.get(name, [("digits", 1)])}
    assert {shown for shown, _ in made} == claims.SETS.keys() | {"twostage"}
    for title, paper, comparisons, remark, tried in claims.CLAIMS:
        assert paper and not comparisons[0].startswith("also"), title
        for comparison in comparisons:
            shown, metric, one, sign, other = comparison.removeprefix("also ").split()
            assert sign in "<>" and metric in "fid precision recall copy local prior_share ms_image".split(), comparison
            assert (shown, one) in made and ((shown, other) in made or float(other) > 0), comparison
            assert "local" not in (metric, shown) or shown == "fullset", comparison          # only there are tokens


@pytest.mark.parametrize("better, worse, said, holding", [
    ([1, 2, 3], [2, 3, 4], "reproduced", (1, 0, 0)), ([2, 3, 4], [1, 2, 3], "opposite", (0, 0, 1)),
    ([1, 3, 1], [2, 2, 2], "not at this scale", (0, 1, 0)), ([2, 2, 2], [2, 2, 2], "opposite", (0, 0, 1)),
    ([], [1, 2], "not measured", (0, 0, 0))])
def test_a_claim_must_hold_in_every_seed(better, worse, said, holding):
    rows = {("digits", name, seed): dict(fid=value) for name, values in (("a", better), ("b", worse))
            for seed, value in enumerate(values)}
    verdict, held, lines = claims.claim(rows, ["digits fid a < b"])
    assert verdict == said and held == holding and len(lines) == 3
    if not better:
        assert lines[-1] == "| digits | fid | `a` < `b` | - | - | 0 of 0 |"
    if said == "reproduced":
        assert lines[-1] == "| digits | fid | `a` < `b` | 2.0 ± 1.0 | 3.0 ± 1.0 | 3 of 3 |"
        assert claims.claim(rows, ["digits fid a < b", "digits fid b < a"])[:2] == ("in part", (1, 0, 1))
        assert claims.claim(rows, ["digits fid a < b", "also digits fid b < a"])[0] == "reproduced"
        assert claims.claim(rows, ["digits fid a < 2.5"])[0] == "not at this scale"
        assert claims.claim(rows, ["digits fid a < b", "photos fid a < b"])[:2] == ("measured in part", (1, 0, 0))
        assert claims.claim(rows, ["digits fid a < b", *["digits fid b < a"] * 2])[0] == "not at this scale"
        rows["digits", "real", None] = dict(fid=3.5)
        assert claims.claim(rows, ["digits fid a < real"])[0] == "reproduced"


def test_a_verdict_says_how_few_seeds_it_stands_on():
    rows = {("digits", name, seed): dict(fid=value) for seed in range(3) for name, value in (("a", 1), ("b", 2))}
    rows["digits", "c", 0] = dict(fid=3)
    assert claims.claim(rows, ["digits fid a < b"])[0] == "reproduced"
    assert claims.claim(rows, ["digits fid a < b", "digits fid b < c"])[0] == "reproduced (1 seed only)"


def test_the_page_has_every_claim_and_the_command_for_it(monkeypatch, tmp_path):
    rows = {("twostage", name, seed): dict(fid=i) for seed in range(3) for i, name in enumerate(("kmeans", "unconditional"))}
    monkeypatch.setattr(claims, "score", lambda runs: rows)
    claims.write(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    for number, (title, *_) in enumerate(claims.CLAIMS, 1):
        assert f"| {number} | {title} |" in page and f"## {number}. {title}: " in page
    assert "| twostage | fid | `kmeans` < `unconditional` | 0.0 | 1.0 | 3 of 3 |" in page
    for line in page.splitlines():
        if line.startswith("`python benchmarks/claims.py run"):
            named = line.strip("`").split("--models ")[1].split()
            assert named and set(named) <= claims.MODELS.keys()
    assert page.count("`python benchmarks/claims.py run --models") == len(claims.CLAIMS)


def test_what_a_claim_runs(monkeypatch, tmp_path):
    """Conditions of a seed's own draw, in the model's own embedding; scored in the data's; all of them in the full set."""
    lines = []
    monkeypatch.setattr(claims, "script", lines.append)
    claims.chain(tmp_path, 2, "photos_random")
    train, sample, embed = lines
    assert train.startswith("04_train_pairs.py") and "photos_random --out" in train and "--seed 2" in train
    assert "--draw 2 " in sample and f"--data {tmp_path}/photos_random " in sample and "--guidance 1 --seed 2" in sample
    assert f"--data {tmp_path}/photos " in embed and embed.endswith(f"{tmp_path}/2/photos/photos_random_w1 --cls-only")
    lines.clear()
    claims.chain(tmp_path, 1, "pairs_full")
    assert "--batch" not in lines[0] and all("--sample-steps 12" in line for line in lines if line.startswith("05"))
    sample, embed, local = (line for line in lines if "fullset" in line)
    assert "--draw" not in sample and "--cls-only" in embed and local.endswith("/fullset/pairs_full_w1/local")
    assert sum(" --draw 1 " in line for line in lines) == sum(line.startswith("05") for line in lines) - 1


def test_scores_are_of_unseen_images_and_of_their_seed(monkeypatch, tmp_path):
    rows = [dict(reference="unseen", model="real (train)", fid=1)]
    for seed in (0, 2):
        folder = tmp_path / str(seed) / "digits" / "pairs_w1"
        folder.mkdir(parents=True)
        (folder / "data.json").write_text("{}")
        rows += [dict(reference=reference, folder=str(folder), fid=10 * seed + bad) for reference, bad in
                 (("unseen", 5), ("seen", 100))]

    def scored(line):
        assert line.startswith("06_fewshot_metrics.py") and line.count("pairs_w1") == 2
        out = Path(line.split("--out ")[1].split()[0])
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps(rows))
    monkeypatch.setattr(claims, "script", scored)
    found = claims.score(tmp_path)
    assert {key: row["fid"] for key, row in found.items()} == {
        ("digits", "real", None): 1, ("digits", "pairs_w1", 0): 5, ("digits", "pairs_w1", 2): 25}


def test_local_similarity_is_of_the_same_place(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(4, 3, 5)).astype(np.float16)
    (tmp_path / "local").mkdir()
    for path, array in (("tokens.npy", tokens), ("conditions.npy", np.array([2, 0])),
                        ("local/tokens.npy", np.concatenate([2 * tokens[[2, 2, 0]], tokens[[0]][:, ::-1]]))):
        np.save(tmp_path / path, array)
    a, b = tokens[0].astype(float), tokens[0, ::-1].astype(float)
    turned = np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b)])
    assert claims.local_similarity(tmp_path, tmp_path) == pytest.approx((3 + turned) / 4, abs=1e-6)


def test_pages_hold_nothing_that_was_held_out_or_planted(tmp_path):
    names = ["digit 7 number 1", "stranger: digit 7 number 2", "digit 3 number 0", "near-duplicate: digit 3 number 0",
             "digit 3 number 4"]
    arrays = dict(images=np.zeros((5, 4, 4, 3)), pages=np.full(5, 5), split=np.array([0, 0, 1, 0, 0]), names=np.array(names))
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array.astype(np.uint8) if name == "images" else array)
    source = tmp_path / "web"
    source.symlink_to(tmp_path)
    for by_class, wanted in ((False, ["web00005/00000.png", "web00005/00004.png"]), (True, ["3/00004.png", "7/00000.png"])):
        target = tmp_path / str(by_class)
        claims.save_pages(target, source, by_class)
        assert sorted(str(path.relative_to(target)) for path in target.rglob("*.png")) == wanted


def test_tiles_of_a_photograph_are_disjoint(monkeypatch, tmp_path):
    """Side by side again they are the photograph, but for what is left at its edges."""
    photo = np.random.default_rng(0).integers(0, 256, (40, 25, 3), np.uint8)
    data = SimpleNamespace(astronaut=lambda: photo)
    monkeypatch.setitem(sys.modules, "skimage", SimpleNamespace(data=data))
    monkeypatch.setattr(claims, "PHOTOS", ("astronaut",))
    claims.save_tiles(tmp_path, across=3, size=8)
    tiles = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "astronaut").iterdir())]
    assert len(tiles) == 15 and tiles[0].shape == (8, 8, 3)
    whole = np.concatenate([np.concatenate(tiles[row:row + 3], 1) for row in range(0, 15, 3)])
    assert (whole == photo[:, :24]).all()


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
