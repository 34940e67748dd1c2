"""Every bad input is one line on standard error that says what is wrong, and exit code 2 (DESIGN, section 8)."""
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from small import checkpoint, here, samples


class Bomb:
    """Whoever unpickles this makes the folder `executed`."""

    def __init__(self, folder):
        self.target = str(folder / "executed")

    def __reduce__(self):
        return os.mkdir, (self.target,)


# What may be wrong with a folder of data: functions of that folder.


def missing(name):
    return lambda folder: (folder / name).unlink()


def truncated(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def pickled(name):
    def damage(folder):
        if name.endswith(".npy"):
            np.save(folder / name, np.array([Bomb(folder)] * 20, dtype=object), allow_pickle=True)
        else:
            torch.save(dict(ema=Bomb(folder)), folder / name)
    return damage


def array(name, value):
    return lambda folder: np.save(folder / name, np.array(value))


def shard(name, size, content):
    """A tar of one member, without its end."""
    info = tarfile.TarInfo(name)
    info.size = size
    return lambda folder: (folder / "0.tar").write_bytes(info.tobuf() + content)


def img2dataset_files(folder):
    (folder / "00000" / "000000007.json").mkdir(parents=True)


def other_encoder(folder):
    text = (folder / "data.json").read_text()
    (folder / "data.json").write_text(text.replace('"px": 16', '"px": 32'))


def trained(folder):
    """03 has finished here."""
    here("03_train_recon.py", "--data", folder, *SHORT.split())


def trained_on_other_data(folder):
    trained(folder)
    array("cls.npy", np.zeros((20, 6), np.float32))(folder)


def as_it_is(folder):
    pass


SHORT = "--steps 1 --batch 4"
ROWS = [                                                                # script and flags, damage, what the line says
    ("03_train_recon.py", truncated("data.json"), "data.json cannot be read"),
    ("03_train_recon.py", missing("images.npy"), "images.npy is missing; 01_embed.py writes it"),
    ("03_train_recon.py", truncated("tokens.npy"), "tokens.npy cannot be read"),
    ("03_train_recon.py", pickled("cls.npy"), "cls.npy cannot be read"),
    ("03_train_recon.py --preset emoji64", as_it_is, "has images of 16 px, emoji64 needs 64 px"),
    ("03_train_recon.py --batch 4 --accumulate 3", as_it_is, "--batch 4 does not divide"),
    (f"03_train_recon.py {SHORT}", array("cls.npy", np.full((20, 6), np.nan, np.float32)), "the loss is nan at step 1"),
    (f"03_train_recon.py {SHORT} --lr 1e40", as_it_is, "the weights are not finite at step 1"),
    (f"03_train_recon.py {SHORT} --lr 1", trained, "recon.pt was trained with other lr"),
    (f"03_train_recon.py {SHORT}", trained_on_other_data, "recon.pt was trained with other data"),
    ("03_train_recon.py --cond film --init DATA/both.pt", as_it_is, "expected a checkpoint of the same network"),
    ("03_train_recon.py --cond film --init DATA/film.pt", as_it_is, "expected a checkpoint of the same network"),
    ("03_train_recon.py --cond none --init DATA/none.pt", as_it_is, "expected a checkpoint of the same network"),
    ("03_train_recon.py --device cuda:99", as_it_is, "--device cuda:99"),
    ("03_train_recon.py --device nonsense", as_it_is, "--device nonsense"),
    ("03_train_recon.py --steps 0", as_it_is, "--steps: 0 is not in [1, inf]"),
    ("03_train_recon.py --lr nan", as_it_is, "--lr: nan is not in"),
    ("03_train_recon.py --cond-drop 1.5", as_it_is, "--cond-drop: 1.5 is not in [0, 1]"),
    ("03_train_recon.py --seed -1", as_it_is, "--seed: -1 is not in"),
    ("03_train_recon.py --nonsense", as_it_is, "unrecognized arguments: --nonsense; see --help"),
    ("04_train_pairs.py", missing("pairs.npy"), "pairs.npy is missing; 02_filter_pairs.py writes it"),
    ("04_train_pairs.py", array("pairs.npy", np.zeros((0, 2), int)), "pairs.npy is empty or not of these"),
    ("04_train_pairs.py", array("pairs.npy", [[0, 1], [2, 4]]), "pairs.npy is empty or not of these training images"),
    ("04_train_pairs.py", array("pairs.npy", [[0, 20]]), "pairs.npy is empty or not of these training images"),
    ("05_sample.py", as_it_is, "pairs.pt is missing; 03_train_recon.py or 04_train_pairs.py writes it"),
    ("05_sample.py --checkpoint DATA/both.pt", truncated("both.pt"), "both.pt cannot be read"),
    ("05_sample.py --checkpoint DATA/both.pt", pickled("both.pt"), "both.pt cannot be read"),
    ("05_sample.py --checkpoint DATA/both.pt", other_encoder, "trained with the encoder"),
    ("05_sample.py --checkpoint DATA/none.pt --guidance 2", as_it_is, "without a null condition"),
    ("05_sample.py --checkpoint DATA/undropped.pt --guidance 2", as_it_is, "without a null condition"),
    ("05_sample.py --checkpoint DATA/both.pt --y DATA/cls.npy", as_it_is, "reads local tokens, which --y does not"),
    ("05_sample.py --checkpoint DATA/film.pt --y DATA/y.npy", array("y.npy", np.zeros((2, 7))), "arrays of shape"),
    ("05_sample.py --checkpoint DATA/kmeans.pt", as_it_is, "was trained with --cls kmeans.npy; give --cls or --y"),
    ("05_sample.py --checkpoint DATA/both.pt --interpolation 2", as_it_is, "--interpolation: 2 is not in [0, 1]"),
    ("02_filter_pairs.py --low 2", as_it_is, "--low: 2 is not in [-1, 1]"),
    ("02_filter_pairs.py --low 0.9999", as_it_is, "pairs of one page is between"),
    ("01_embed.py --images DATA/*.tar --out DATA/new", shard("0.json", 13, b'{"status": 1}'), "KeyError: 'page'"),
    ("01_embed.py --images DATA --out DATA/new", shard("0.json", 7, b"no JSON"), "0.tar: JSONDecodeError"),
    ("01_embed.py --images DATA/0.tar --out DATA/new", shard("0.jpg", 2000, b"cut"), "0.tar: ReadError"),
    ("01_embed.py --images DATA --out DATA/new", img2dataset_files, "choose its --output_format webdataset"),
    ("02_filter_pairs.py --exclude DATA/gone.npy", as_it_is, "gone.npy is missing"),
    ("01_embed.py --images DATA/nowhere --out DATA/new", as_it_is, "nowhere holds no images"),
    ("01_embed.py --images DATA/empty --out DATA/new", lambda folder: (folder / "empty").mkdir(), "holds no images"),
    ("06_fewshot_metrics.py", array("cls.npy", np.zeros((19, 6), np.float32)), "has 19 rows for 20 images"),
    ("06_fewshot_metrics.py", missing("samples/old/cls.npy"), "samples has ./cls.npy; run 05_sample.py"),
    ("06_fewshot_metrics.py", array("samples/old/cls.npy", np.zeros((39, 6), np.float32)), "39 features for 4"),
    ("06_fewshot_metrics.py", other_encoder, "samples/old was embedded by"),
    ("07_twostage.py y --rows 2sdm", as_it_is, "prior.pt is missing"),
    ("07_twostage.py prior --lr 0", as_it_is, "--lr: 0 is not in"),
]


def test_the_bomb_goes_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path)))
    assert (tmp_path / "executed").exists()


@pytest.fixture
def folder(tiny_data):
    for cond in ("both", "film", "none"):
        checkpoint(tiny_data / f"{cond}.pt", cond)
    samples(tiny_data)
    checkpoint(tiny_data / "undropped.pt", "film", cond_drop=0)
    checkpoint(tiny_data / "kmeans.pt", "film", cls="kmeans.npy")
    return tiny_data


def contents(folder):
    """{path: bytes} of what is there, but for unfinished files and for the log of a training."""
    paths = (path for path in folder.rglob("*") if path.suffix not in (".tmp", ".jsonl"))
    return {path: path.is_file() and path.read_bytes() for path in paths}


@pytest.mark.parametrize("command, damage, fragment", ROWS, ids=[f"{row[0]}: {row[2]}" for row in ROWS])
def test_one_line_and_exit_code_2(folder, capfd, command, damage, fragment):
    damage(folder)
    capfd.readouterr()
    before = contents(folder)
    script, *flags = command.replace("DATA", str(folder)).split()
    with pytest.raises(SystemExit) as stop:
        here(script, "--data", folder, *flags)
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and fragment in lines[0], lines[0]
    assert not (folder / "executed").exists()
    assert contents(folder) == before
