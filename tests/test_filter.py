"""02_filter_pairs.py against brute force: pairs, thresholds, the cap of a page, exclusion, the command line."""
import sys

import numpy as np
import pytest

from conftest import done, module, write_data

filter_pairs = module("02_filter_pairs.py")
SCRIPT = "02_filter_pairs.py"


def write_folder(folder, cls, pages, split):
    """What 01 would write, as far as 02 reads it."""
    arrays = dict(cls=np.asarray(cls, np.float32), pages=np.asarray(pages, np.int32), split=np.asarray(split, np.uint8))
    return write_data(folder, dict(name="test", size=16), **arrays)


def example(seed=0):
    """120 shuffled images on pages of 1 to 40, a third of them held out, similarities spread over about 0 to 1."""
    rng = np.random.default_rng(seed)
    pages = rng.permutation(np.repeat([9, 3, 7, 1, 5, 8, 40, 41, 42], [40, 25, 18, 12, 8, 5, 10, 1, 1]))
    return rng.normal(size=(120, 16)) + rng.normal(size=(120, 1)), pages, (rng.random(120) < 1 / 3).astype(int)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force(cls, pages, split):
    """{(i, j): cosine} of all ordered pairs of training images of one page, in float64."""
    sims, train = unit(cls) @ unit(cls).T, np.flatnonzero(split == 0)
    return {(i, j): sims[i, j] for i in train for j in train if i != j and pages[i] == pages[j]}


def threshold(every, share):
    """A value with about that share of the similarities below it, far from all: other CPUs round differently."""
    values = np.unique(np.round(list(every.values()), 9))
    near = int(share * len(values)) + np.arange(-10, 10)
    k = near[np.diff(values)[near].argmax()]
    assert values[k + 1] - values[k] > 1e-4
    return values[k:k + 2].mean()


def found(folder):
    return np.load(folder / "pairs.npy", allow_pickle=False), np.load(folder / "sims.npy", allow_pickle=False)


def filtered(monkeypatch, folder, *flags):
    """main() in this process, with small tiles: pages are cut, and packed. Returns pairs, sims."""
    monkeypatch.setattr(filter_pairs, "TILE", 7)
    monkeypatch.setattr(filter_pairs, "PACK", 5)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--data", str(folder), *map(str, flags)])
    filter_pairs.main()
    return found(folder)


@pytest.mark.parametrize("seed", [0, 1])
def test_value_thresholds_equal_brute_force(tmp_path, monkeypatch, capsys, seed):
    cls, pages, split = example(seed)
    every = brute_force(cls, pages, split)
    low, high = threshold(every, 0.25), threshold(every, 0.75)
    pairs, sims = filtered(monkeypatch, write_folder(tmp_path, cls, pages, split), "--low", low, "--high", high)
    assert pairs.dtype == np.int64 and sims.dtype == np.float32 and len(pairs) == len(sims)
    wanted = {pair: sim for pair, sim in every.items() if low <= sim <= high}
    kept = dict(zip(map(tuple, pairs.tolist()), sims.tolist()))
    assert kept.keys() == wanted.keys() and len(kept) == len(pairs)
    np.testing.assert_allclose([kept[pair] for pair in wanted], list(wanted.values()), atol=1e-5)
    assert (np.diff(pages[pairs[:, 0]]) >= 0).all()                     # in the order of the pages
    below, above = (sum(test) for test in zip(*((sim < low, sim > high) for sim in every.values())))
    said = capsys.readouterr().out
    assert f"{len(every):,} pairs of one page: {below:,} below" in said and f"{above:,} above" in said
    assert f"kept {len(pairs):,} " in said


def test_quantile_thresholds_are_within_a_bin(tmp_path, monkeypatch):
    cls, pages, split = example()
    values = np.sort(list(brute_force(cls, pages, split).values()))
    folder, width = write_folder(tmp_path, cls, pages, split), 2 / 5000 + 1e-5
    sims = np.sort(filtered(monkeypatch, folder, "--low-quantile", 0.3, "--high-quantile", 0.9)[1])
    low, high = np.quantile(values, [0.3, 0.9], method="inverted_cdf")
    assert low - width <= sims[0] <= low + width and high - width <= sims[-1] <= high + width
    assert len(sims) >= ((values >= low + 1e-5) & (values <= high - 1e-5)).sum()         # the band is never too narrow
    assert len(filtered(monkeypatch, folder, "--low-quantile", 0, "--high-quantile", 1)[1]) == len(values)


def test_a_cap_keeps_pairs_of_each_page_at_random(tmp_path, monkeypatch):
    cls, pages, split = example()
    folder, band = write_folder(tmp_path, cls, pages, split), ("--low", -1, "--high", 1)
    every, _ = filtered(monkeypatch, folder, *band)
    draws, wanted = [], np.minimum(np.bincount(pages[every[:, 0]]), 8)
    for seed in (0, 1, 0):
        pairs, sims = filtered(monkeypatch, folder, *band, "--per-page", 8, "--seed", seed)
        assert (np.bincount(pages[pairs[:, 0]]) == wanted).all() and (np.diff(pages[pairs[:, 0]]) >= 0).all()
        own = (unit(cls)[pairs[:, 0]] * unit(cls)[pairs[:, 1]]).sum(1)
        np.testing.assert_allclose(sims, own, atol=1e-5)
        draws.append(set(map(tuple, pairs.tolist())))
        assert len(draws[-1]) == len(pairs) and draws[-1] <= set(map(tuple, every.tolist()))
    assert draws[0] == draws[2] and len(draws[0] & draws[1]) < len(pairs) / 2


def test_exclude(tmp_path, monkeypatch):
    cls, pages, split = example()
    folder, victims = write_folder(tmp_path / "data", cls, pages, split), np.flatnonzero(split == 0)[[3, 11, 30]]
    rng = np.random.default_rng(1)
    one = 3 * cls[victims[:2]] + 0.01 * rng.normal(size=(2, 16))
    two = np.concatenate([rng.normal(size=(20, 16)) * -9, cls[victims[2:]]])
    best = (unit(cls[split == 0]) @ unit(np.concatenate([one, two])).T).max(1)
    assert (best > 0.98).sum() == 3 and abs(best - 0.98).min() > 1e-4
    np.save(tmp_path / "one.npy", one.astype(np.float32))
    np.save(tmp_path / "two.npy", two.astype(np.float32))
    before, _ = filtered(monkeypatch, folder, "--low", -1, "--high", 1)
    after, _ = filtered(monkeypatch, folder, "--low", -1, "--high", 1, "--exclude", tmp_path / "one.npy",
                        tmp_path / "two.npy", "--exclude-above", 0.98)
    assert set(map(tuple, after.tolist())) == {(i, j) for i, j in before.tolist() if not np.isin([i, j], victims).any()}


def planted():
    """30 pages of ten images near one direction, a stranger (10) and a near-duplicate (11) of the first."""
    rng, cls = np.random.default_rng(0), []
    for page in range(30):
        members = rng.normal(size=32) + 0.3 * rng.normal(size=(10, 32))
        cls += [*members, rng.normal(size=32), members[0] + 0.01 * rng.normal(size=32)]
    return cls, np.repeat(np.arange(30), 12), np.zeros(360)


def test_command_line_drops_strangers_and_near_duplicates(tmp_path):
    folders = [write_folder(tmp_path / name, *planted()) for name in ("one", "two")]
    band = ("--low", 0.5, "--high", 0.99)
    said = [done(SCRIPT, "--data", folder, *band, processes=n) for n, folder in enumerate(folders, 1)]
    assert said[0].count("wrote") == said[1].count("wrote") == 1        # under torchrun the first process works alone
    pairs, _ = found(folders[0])
    kept = np.zeros((12, 12), int)
    np.add.at(kept, (pairs[:, 0] % 12, pairs[:, 1] % 12), 1)
    wanted = np.full((12, 12), 30) - 30 * np.eye(12, dtype=int)
    wanted[10], wanted[:, 10], wanted[0, 11], wanted[11, 0] = 0, 0, 0, 0
    assert (kept == wanted).all()
    for name in ("pairs.npy", "sims.npy"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
