"""Hundreds of damaged images and array headers, seeded: a named skip or one line; no traceback, no hang, bounded memory."""
import importlib
import io
import json
import os
import resource
import signal
import sys

import system
import numpy as np
import pytest
import torch
from PIL import Image

embed = importlib.import_module("01_embed")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory as Linux counts it")
HUGE = [0, 1, 255, 32_767, 65_535, 2**24, 2**31 - 1, 2**32 - 1]


def mutate(data, rng):
    """A copy with a few bytes flipped, cut off, repeated, spliced, or set to a huge number."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 3)):
        at, n = int(rng.integers(max(1, len(data)))), int(rng.integers(1, 9))
        if rng.random() < 0.3:                                         # headers are where it hurts
            at %= 64
        match rng.integers(6):
            case 0:
                data[at:at + n] = rng.bytes(n)
            case 1:
                del data[at + n:]
            case 2:
                data[at:at] = data[at:at + 50 * n]
            case 3:
                del data[at:at + n]
            case 4:
                width = int(rng.choice([2, 4]))
                value = int(rng.choice(HUGE)) % 2 ** (8 * width)
                data[at:at + width] = value.to_bytes(width, str(rng.choice(["big", "little"])))
            case 5 if data:
                data[at % len(data)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def valid_images():
    """{name: bytes}: small pictures in every common format, some with an alpha channel, a palette, frames or rotation."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).resize((60, 40))
    kinds = {"a.jpg": {}, "progressive.jpg": dict(progressive=True, exif=exif), "a.png": {}, "a.webp": {},
             "lossless.webp": dict(lossless=True), "a.tif": {}, "packed.tif": dict(compression="tiff_lzw"), "a.bmp": {},
             "a.gif": dict(save_all=True, append_images=[photo]),
             "a.tga": {}, "a.ppm": {}, "a.jp2": {}, "a.avif": {}}
    images = {}
    for name, options in kinds.items():
        try:
            photo.save(buffer := io.BytesIO(), Image.registered_extensions()[os.path.splitext(name)[1]], **options)
        except (KeyError, OSError):                                    # a Pillow built without this codec
            continue
        images[name] = buffer.getvalue()
    for mode in ("RGBA", "LA", "P", "1", "I;16"):
        (photo.convert("L") if mode == "I;16" else photo).convert(mode).save(buffer := io.BytesIO(), "PNG")
        images[f"{mode.replace(';', '')}.png"] = buffer.getvalue()
    return images


def tiny_encoder(px, device):
    """Takes the place of a network: pixels as embeddings."""
    return lambda images: (images[:, 0, :2].flatten(1).float(), images[:, 0, :4].float())


def in_child(work, seconds, room):
    """(exit code, growth of its memory in bytes) of work() in a forked child, so that a hang or a crash ends only that."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(seconds)
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
            before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
            work()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            os.write(write, json.dumps(grown).encode())
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(write)
    with open(read) as f:
        return code, json.loads(f.read() or "0")


def run_01(tmp_path, monkeypatch, seconds):
    """01 on tmp_path/images in a child: (exit code, growth in bytes, what it printed, names it kept, names it skipped)."""
    stderr = tmp_path / "stderr"
    monkeypatch.setattr(embed, "ENCODERS", {"efficientnet_lite0": tiny_encoder})
    monkeypatch.setattr(sys, "argv", ["01", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out"),
                                      "--preset", "digits16", "--device", "cpu"])

    def work():
        torch.set_num_threads(1)
        for stream in (1, 2):
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stderr = os.fdopen(2, "w")
        embed.main()
    code, grown = in_child(work, seconds, room=4 << 30)
    output = stderr.read_text(errors="replace")
    assert code == 0 and "Traceback" not in output, f"exit code {code}: {output[-3000:]}"
    skipped = [line.split()[1] for line in output.splitlines() if line.startswith("skipped ") and "(" in line]
    return grown, output, np.load(tmp_path / "out" / "names.npy", allow_pickle=False).tolist(), skipped


@linux
def test_damaged_images_are_skipped_by_name(tmp_path, monkeypatch):
    """500 mutants and as many whole images through 01: each is embedded or named with its reason, and 01 finishes."""
    rng, images, root = np.random.default_rng(0), valid_images(), tmp_path / "images"
    root.mkdir()
    mutants = [(name, mutate(images[name], rng)) for name in rng.choice(list(images), 500)]
    for i, (name, data) in enumerate([*mutants, *[*images.items()] * (500 // len(images) + 1)]):
        (root / f"{i:03d}_{name}").write_bytes(data)
    grown, output, kept, skipped = run_01(tmp_path, monkeypatch, seconds=120)
    assert grown < 2 << 30 and "MemoryError" not in output, grown      # the largest picture let through has 89 megapixels
    assert sorted(skipped + kept) == sorted(path.name for path in root.iterdir())
    assert 100 < len(skipped) <= 500 and f"skipped {len(skipped)} of {len(kept) + len(skipped)} files" in output


@linux
@pytest.mark.parametrize("what", ["dangling link", "folder", "pipe", "link to its folder", "program"])
def test_what_is_no_image_file_is_neither_waited_for_nor_run(tmp_path, monkeypatch, what):
    root = tmp_path / "images"
    (root / "page").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (9, 9)).save(root / "page" / f"{i}.png")
    odd = root / "page" / "odd.png"
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "dangling link":
        odd.symlink_to("nowhere.png")
    elif what == "folder":
        odd.mkdir()
    elif what == "link to its folder":
        (root / "page" / "here").symlink_to(root)
    else:                                                              # PostScript: Pillow would hand it to Ghostscript
        Image.new("RGB", (9, 9)).save(odd, "EPS")
        (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\n")
        (tmp_path / "gs").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    _, _, kept, skipped = run_01(tmp_path, monkeypatch, seconds=5)
    assert kept == [f"page/{i}.png" for i in range(3)] and set(skipped) <= {"page/odd.png"}
    assert not (tmp_path / "was_run").exists()


def one_line(function, capsys, *arguments):
    """function(*arguments), or None if it exited with code 2 and one line."""
    try:
        return function(*arguments)
    except SystemExit as stop:
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.code == 2 and len(errors) == 1
        return None


def headers(rng):
    """Headers that parse, with shapes, orders and types that lie about what follows."""
    shape = rng.choice(["(3, 4)", "(3,)", "()", "(-3, 4)", "(3, -4)", f"({2**62}, 4)", f"({2**31}, {2**31}, {2**31})",
                        f"({2**63},)", "(0, 4)", "(1e3,)", "(True,)", "3", "[3, 4]", "('3',)", "(3, 4, 1, 1, 1)",
                        "(" + "1," * 40 + ")", "(999999999,)", "(" * 200])
    kind = rng.choice(["'<f4'", "'|O'", "'|V0'", "'<U0'", "'<U4'", "'|S999999999'", "'<M8[s]'", "[('a', '<f4')]", "[('a', '|O')]",
                       "'x'", "None", "4", "('<f4', (2, 2))", "'<f4, <i2'", "''", "[]"])
    order = rng.choice(["False", "True", "None", "'no'"])
    text = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + rng.bytes(48)


@pytest.mark.filterwarnings("ignore")
def test_damaged_arrays_are_read_or_refused(tmp_path, capsys):
    """read_array() of 1,500 mutants: an array no larger than its file, whose values can be read, or one line."""
    rng, path, whole = np.random.default_rng(0), tmp_path / "a.npy", []
    for array in (np.arange(12, dtype=np.float32).reshape(3, 4), np.array(["ab", "c"]), np.zeros((2, 3, 3, 3), np.uint8)):
        np.save(path, array)
        whole.append(path.read_bytes())
    read = 0
    for i in range(1500):
        path.write_bytes(headers(rng) if i % 3 == 0 else mutate(whole[rng.integers(3)], rng))
        array = one_line(system.read_array, capsys, path)
        if array is not None:
            read += 1
            assert array.nbytes <= path.stat().st_size and array.ndim > 0
            array.copy()
    assert 50 < read < 1400


def test_damaged_checkpoints_and_settings_are_read_or_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    torch.save(dict(model=dict(w=torch.zeros(9)), ema=dict(w=torch.zeros(9)), step=3, config=dict(a=[1, 2])), tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps(dict(preset="digits16", encoder=dict(name="x", px=3))))
    for name, read, n in (("a.pt", system.read_checkpoint, 200), ("a.json", system.read_json, 300)):
        whole = (tmp_path / name).read_bytes()
        for _ in range(n):
            (tmp_path / name).write_bytes(mutate(whole, rng))
            found = one_line(read, capsys, tmp_path / name)
            assert found is None or isinstance(found, dict)
    for text in ("[" * 100_000, "3", '"x"', "null"):
        (tmp_path / "a.json").write_text(text)
        assert one_line(system.read_json, capsys, tmp_path / "a.json") is None
