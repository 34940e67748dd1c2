"""docs/figures.py draws every figure from small files, and counts what the filter drops as a count by hand does."""
import itertools
import json

import numpy as np
import small
from conftest import ROOT, done, module

import common


def test_all_figures_and_what_the_filter_drops(tiny_data, tmp_path):
    images, cls = (np.array(common.load(tiny_data / f"{name}.npy")) for name in ("images", "cls"))
    cls[3::5] = cls[0::5] + 0.1 * cls[3::5]                             # near-duplicates of the first of each page
    kinds = ["0-digit1-{}", "1-digit1-7{}", "2-stranger-digit2-{}", "3-near-duplicate-digit1-{}", "4-digit1-8{}"]
    names = [f"train/{page}/{kind.format(page)}.png" for page in range(4) for kind in kinds]
    unit = cls / np.linalg.norm(cls, axis=1, keepdims=True)
    dropped, hits, kept = [0, 0], [0, 0], []                            # [strangers below, near-duplicates above]
    for page, (i, j) in itertools.product(range(4), itertools.permutations(range(4), 2)):        # the fifth is held out
        cosine = unit[5 * page + i] @ unit[5 * page + j]
        planted = [2 in (i, j), {i, j} == {0, 3}]
        for side, out in enumerate((cosine < -0.2, cosine > 0.5)):
            dropped[side] += out
            hits[side] += out and planted[side]
        kept += [cosine] if -0.2 <= cosine <= 0.5 else []
    arrays = dict(samples=np.stack([images] * 3, 1), conditions=np.arange(4, 20, 5), cls=cls,
                  names=np.array(names), sims=np.array(kept, np.float32))
    row = dict(guidance=None, precision=0.5, recall=0.5, fid=9.0)
    rows = json.dumps([row | dict(model=model) for model in ("real (train)", "pairs", "pca4_9", "none_9")])
    runs = "samples/recon_w1", "samples/pairs_w1", "twostage/unconditional", "twostage/2sdm", "twostage/oracle"
    for folder in (".", "twostage", "twostage/sweep", *runs):           # more than the figures need of each
        (tiny_data / folder).mkdir(parents=True, exist_ok=True)
        (tiny_data / folder / "metrics.json").write_text(rows)
        for name, array in arrays.items():
            np.save(tiny_data / folder / f"{name}.npy", array)
    for name in ("recon", "pairs"):
        curve = (ROOT / f"docs/reference/{name}.jsonl").read_text()
        (tiny_data / f"{name}.jsonl").write_text("\n".join(curve.splitlines()[:3]))
    for name, cond in (("recon", "both"), ("pairs", "both"), ("film", "film")):
        small.checkpoint(tiny_data / f"{name}.pt", cond, sample_steps=2)
    done("07_twostage.py", "prior", "--data", tiny_data, "--steps", 2)
    (tiny_data / "snapshots").mkdir()
    said = done("-m docs.figures", tiny_data)
    drawn = {path.stem for path in (tiny_data / "figures").glob("*.png")}
    assert "not drawn" not in said and drawn == set(module("docs/figures.py").FIGURES)
    for hit, out, planted in zip(hits, dropped, (24, 8)):               # 6 of the 12 ordered pairs of a page, and 2
        assert 0 < hit < out and f"precision {hit / out:.2f}, recall {hit / planted:.2f}" in said
    train = [i for i in range(20) if i % 5 != 4]
    right = [max(train, key=lambda t: unit[i] @ unit[t]) // 5 == i // 5 for i in range(4, 20, 5)]
    assert f"held-out images, nearest training image of the right page: {sum(right) / 4:.0%}" in said
    assert "sweep: not drawn" in done("-m docs.figures", tmp_path, "--only", "sweep")
