"""02_filter_pairs.py against brute force: every pair, each threshold, the account, exclusion, the command line."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
ARRAYS = ("cls", "pages", "split", "names", "pairs", "sims")
spec = importlib.util.spec_from_file_location("filter_pairs", ROOT / "02_filter_pairs.py")
filter_pairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(filter_pairs)


def write_folder(folder, cls, pages, split, names=None):
    """What 01_embed.py would write, as far as 02 reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(cls)
    names = [f"image {i}" for i in range(n)] if names is None else names
    arrays = dict(cls=np.asarray(cls, np.float32), pages=np.asarray(pages, np.int32), split=np.asarray(split, np.uint8),
                  names=np.array(names))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "data.json").write_text(json.dumps(dict(preset="digits16", images=n, encoder=dict(name="test", px=8))))
    return folder


def read_pairs(folder):
    return np.load(folder / "pairs.npy", allow_pickle=False), np.load(folder / "sims.npy", allow_pickle=False)


def brute_force(cls, pages, split):
    """{(i, j): cosine} of all ordered pairs of training images of one page, in float64."""
    cls = np.asarray(cls, np.float64)
    cls = cls / np.linalg.norm(cls, axis=1, keepdims=True)
    train = [i for i in range(len(cls)) if split[i] == 0]
    return {(i, j): cls[i] @ cls[j] for i in train for j in train if i != j and pages[i] == pages[j]}


def run(monkeypatch, folder, *flags):
    """The script's main() in this process, with small tiles so that pages are cut and packed."""
    monkeypatch.setattr(filter_pairs, "TILE", 7)
    monkeypatch.setattr(filter_pairs, "PACK", 5)
    monkeypatch.setattr(sys, "argv", ["02_filter_pairs.py", "--data", str(folder), *map(str, flags)])
    filter_pairs.main()


def example(seed=0, n=120, d=16):
    """Shuffled pages of 1 to 40 images, a third of the images held out, similarities spread over about 0 to 1."""
    rng = np.random.default_rng(seed)
    pages = rng.permutation(np.repeat([9, 3, 7, 1, 5, 8, 40, 41, 42], [40, 25, 18, 12, 8, 5, 10, 1, 1]))
    return rng.normal(size=(n, d)) + rng.normal(size=(n, 1)), pages, (rng.random(n) < 1 / 3).astype(int)


@pytest.mark.parametrize("sizes", [[1], [3, 1, 4], [5, 5, 5], [6, 2, 2, 2], [20, 1, 1, 30], [1] * 23, [7, 14, 15]])
def test_tiles_hold_each_pair_of_a_page_once(monkeypatch, sizes):
    monkeypatch.setattr(filter_pairs, "TILE", 7)
    monkeypatch.setattr(filter_pairs, "PACK", 5)
    pages = np.repeat(np.arange(len(sizes)), sizes)
    seen = np.zeros((len(pages), len(pages)), int)
    for rows, columns in filter_pairs.tiles(pages):
        assert rows.stop - rows.start <= 7 and columns.stop - columns.start <= 7
        seen[rows, columns] += 1
    same = pages[:, None] == pages
    assert (seen[same] == 1).all() and seen.max() == 1


def test_tiles_are_as_few_as_the_images_not_as_the_pages():
    assert len(filter_pairs.tiles(np.arange(100_000) // 2)) <= 100_000 // filter_pairs.PACK + 1


@pytest.mark.parametrize("seed", [0, 1])
def test_value_thresholds_equal_brute_force(tmp_path, monkeypatch, capsys, seed):
    cls, pages, split = example(seed)
    every = brute_force(cls, pages, split)
    values = np.sort(list(every.values()))
    low, high = (values[k:k + 2].mean() for k in (len(values) // 4, len(values) * 3 // 4))       # between two similarities
    run(monkeypatch, write_folder(tmp_path, cls, pages, split), "--low", low, "--high", high)
    pairs, sims = read_pairs(tmp_path)
    assert pairs.dtype == np.int64 and sims.dtype == np.float32 and len(pairs) == len(sims)
    wanted = {pair: sim for pair, sim in every.items() if low <= sim <= high}
    found = dict(zip(map(tuple, pairs.tolist()), sims.tolist()))
    assert found.keys() == wanted.keys() and len(found) == len(pairs)
    np.testing.assert_allclose([found[pair] for pair in wanted], list(wanted.values()), atol=1e-5)

    assert (pages[pairs[:, 0]] == pages[pairs[:, 1]]).all() and (split[pairs] == 0).all() and (pairs[:, 0] != pairs[:, 1]).all()
    assert (np.diff(pages[pairs[:, 0]]) >= 0).all()                                              # in the order of the pages
    alone = (split == 0).sum() - len(np.unique(pairs))
    account = " ".join(capsys.readouterr().out.split())
    for words in (f"{len(every):,} pairs of one page", f"{(values < low).sum():,} dropped, similarity below",
                  f"{(values > high).sum():,} dropped, similarity above", f"{len(pairs):,} kept", f"{alone} training"):
        assert words in account, words


def test_quantile_thresholds_are_within_a_bin(tmp_path, monkeypatch):
    cls, pages, split = example()
    values = np.sort(list(brute_force(cls, pages, split).values()))
    folder = write_folder(tmp_path, cls, pages, split)
    run(monkeypatch, folder, "--low-quantile", 0.3, "--high-quantile", 0.9)
    sims, width = np.sort(read_pairs(folder)[1]), 2 / filter_pairs.BINS
    low, high = np.quantile(values, [0.3, 0.9], method="inverted_cdf")
    assert low - width <= sims[0] <= low + width and high - width <= sims[-1] <= high + width
    assert len(sims) >= ((values >= low) & (values <= high)).sum()                               # the band is never too narrow
    run(monkeypatch, folder, "--low-quantile", 0, "--high-quantile", 1)
    assert len(read_pairs(folder)[0]) == len(values)
    run(monkeypatch, folder, "--low-quantile", 0.5, "--high", 2)                                 # a quantile and a value
    assert len(values) / 2 <= len(read_pairs(folder)[0]) < len(values) / 2 + 20


def test_command_line(tmp_path):
    """A page of ten near one direction, a stranger and a near-duplicate: the thresholds find both, and the script says so."""
    rng = np.random.default_rng(0)
    cls, pages, names = [], [], []
    for page in range(30):
        centre = rng.normal(size=32)
        members = centre + 0.3 * rng.normal(size=(10, 32))
        cls += [*members, rng.normal(size=32), members[0] + 0.01 * rng.normal(size=32)]
        names += [f"page {page} #{i}" for i in range(10)] + [f"stranger: #{page}", f"near-duplicate: page {page} #0"]
        pages += 12 * [page]
    folder = write_folder(tmp_path / "data", cls, pages, np.zeros(360), names)
    done = subprocess.run([sys.executable, ROOT / "02_filter_pairs.py", "--data", folder, "--low", "0.5", "--high", "0.99"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "planted stranger pairs: dropped with precision 1.00 and recall 1.00; 16.7% of all pairs, 0.0% of" in done.stdout
    assert "planted near-duplicate pairs: dropped with precision 1.00 and recall 1.00; 1.5% of all pairs, 0.0% of" in done.stdout
    pairs, _ = read_pairs(folder)
    assert len(pairs) == 30 * (11 * 10 - 2)
    assert (folder / "filter.png").stat().st_size > 5000 and not list(folder.glob("*.tmp"))


def test_two_processes_write_the_files_of_one(tmp_path):
    """torchrun with two gloo processes: the same files bit for bit, the same account; a page of 1,300 is cut."""
    rng = np.random.default_rng(0)
    pages = rng.permutation(np.concatenate([np.repeat(np.arange(150), 10), np.full(1300, 40), np.repeat([900, 901], 1)]))
    cls = rng.normal(size=(len(pages), 8)) + rng.normal(size=(len(pages), 1))
    split = rng.random(len(pages)) < 0.1
    names = [f"{'stranger: ' if i % 7 == 0 else ''}{i}" for i in range(len(pages))]
    np.save(tmp_path / "other.npy", cls[np.flatnonzero(~split)[::100]].astype(np.float32))
    env, out = dict(os.environ, OMP_NUM_THREADS="1"), {}
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        folder = write_folder(tmp_path / name, cls, pages, split, names)
        done = subprocess.run([sys.executable, *launch, ROOT / "02_filter_pairs.py", "--data", folder, "--exclude",
                               tmp_path / "other.npy"], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        out[name] = done.stdout.replace(str(folder), "")
        assert sorted(f.name for f in folder.iterdir()) == sorted([*(f"{a}.npy" for a in ARRAYS), "data.json", "filter.png"])
    assert out["one"] == out["two"] and out["one"].count("wrote") == 1
    for name in ("pairs.npy", "sims.npy", "filter.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert len(read_pairs(tmp_path / "two")[0]) > 100_000


def test_exclude(tmp_path, monkeypatch, capsys):
    cls, pages, split = example()
    folder, victims = write_folder(tmp_path / "data", cls, pages, split), np.flatnonzero(split == 0)[[3, 11, 30]]
    rng = np.random.default_rng(1)
    np.save(tmp_path / "one.npy", (3 * cls[victims[:2]] + 0.01 * rng.normal(size=(2, 16))).astype(np.float32))
    np.save(tmp_path / "two.npy", np.concatenate([rng.normal(size=(20, 16)) * -9, cls[victims[2:]]]).astype(np.float32))
    whole = ["--low", -1, "--high", 1]
    run(monkeypatch, folder, *whole)
    before, _ = read_pairs(folder)
    run(monkeypatch, folder, *whole, "--exclude", tmp_path / "one.npy", tmp_path / "two.npy", "--exclude-above", 0.99)
    after, _ = read_pairs(folder)
    assert set(map(tuple, after.tolist())) == {(i, j) for i, j in before.tolist() if i not in victims and j not in victims}
    assert "3 of them left out" in capsys.readouterr().out

    other = np.load(tmp_path / "two.npy", allow_pickle=False)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    best = filter_pairs.most_similar(np.asarray(cls, np.float32), np.arange(len(cls)), other)
    np.testing.assert_allclose(best, (unit(cls) @ unit(other).T).max(1), atol=1e-5)


@pytest.mark.parametrize("flags, words", [
    (["--low", 0.99, "--high", 0.999999], "no pair of"), (["--low", 2], "no pair of"), (["--exclude", "cls.npy"], "share a page"),
    (["--exclude", "wide.npy"], "features an image"), (["--exclude", "gone.npy"], "missing"), (["--exclude", "nan.npy"], "nan"),
    (["--low-quantile", 0.9, "--high-quantile", 0.1], "0 <= low <= high <= 1")])
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, flags, words):
    write_folder(tmp_path, *example())
    np.save(tmp_path / "wide.npy", np.zeros((3, 99), np.float32))
    np.save(tmp_path / "nan.npy", np.full((3, 16), np.nan, np.float32))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, *flags)
    errors = capsys.readouterr().err.split("error: ")[1:]
    assert stop.value.code == 2 and len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "pairs.npy").exists()
