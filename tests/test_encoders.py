"""The optional encoders of 01_embed.py: vision transformers from local directories, Inception, pooled tokens, one-line errors."""
import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import scaling

embed = importlib.import_module("01_embed")
CPU = torch.device("cpu")
# mean and std of values in 0..1 as published: github.com/facebookresearch/dinov2, google-research/big_vision, openai/CLIP
PUBLISHED = dict(dinov2=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), siglip=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
                 clip=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
PX = dict(dinov2=56, siglip=64, clip=64)


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["01_embed.py", "--device", "cpu", "--preset", "digits16", *map(str, flags)])
    embed.main()


def error_of(monkeypatch, capsys, *flags):
    """The one line on standard error of a run that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture
def photos(tmp_path):
    """images.npy: 6 random images of 16 px, which is all that the encoders get to see."""
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 16, 16, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "images.npy", images[:, 0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: directory} of tiny vision models with random weights, and {family} of those that hold the text model as well."""
    transformers = pytest.importorskip("transformers", reason="needs requirements-encoders.txt")
    root, size = tmp_path_factory.mktemp("models"), dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision, text = dict(size, intermediate_size=64, image_size=64), dict(size, intermediate_size=64, vocab_size=9)
    vision_of = dict(clip=dict(vision, patch_size=32, projection_dim=24), siglip=dict(vision, patch_size=16))
    whole = dict(siglip=transformers.SiglipModel(transformers.SiglipConfig(text, vision_of["siglip"])),
                 clip=transformers.CLIPModel(transformers.CLIPConfig(text, vision_of["clip"], projection_dim=24)))
    made = dict(dinov2=transformers.Dinov2Model(transformers.Dinov2Config(**size, image_size=70, patch_size=14, mlp_ratio=2)),
                siglip=transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision_of["siglip"])),
                clip=transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision_of["clip"])))
    generator = torch.Generator().manual_seed(0)
    for family, net in made.items():
        for weight in net.parameters():                                # larger than the library draws them: all parts matter
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
        if family in whole:
            whole[family].load_state_dict(net.state_dict(), strict=False)
            whole[family].save_pretrained(root / f"{family}_whole")
        net.save_pretrained(root / family)
    return root


def of_the_library(folder, family, x):
    """(global, tokens) of prepared pixels [B, 3, px, px], asked of the library directly."""
    import transformers
    with torch.no_grad():
        if family == "dinov2":
            h = transformers.Dinov2Model.from_pretrained(folder)(x)
            return h.pooler_output, h.last_hidden_state[:, 1:]
        if family == "siglip":
            h = transformers.SiglipVisionModel.from_pretrained(folder)(x)
            return h.pooler_output, h.last_hidden_state
        net = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
        h = net(x)
        cls = net.vision_model.post_layernorm(h.last_hidden_state)     # the library projects the first of these
        torch.testing.assert_close(net.visual_projection(cls[:, 0]), h.image_embeds)
        return h.image_embeds, cls[:, 1:]


def by_hand(images, px, mean, std, resample=Image.BICUBIC):
    """[B, S, S, 3] uint8 -> [B, 3, px, px] float, as published: Pillow's resampling, then mean and std of values in 0..1."""
    resized = np.stack([np.asarray(Image.fromarray(image).resize((px, px), resample)) for image in images])
    return torch.from_numpy((resized / 255 - np.array(mean)) / np.array(std)).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("family", PUBLISHED)
def test_pixels_are_those_of_the_published_preprocessing(family):
    """Pillow's bicubic, but for its rounding after each of its two passes; another kind of resampling is far off."""
    mean, std = PUBLISHED[family]
    images = np.random.default_rng(1).integers(64, 192, (2, 48, 48, 3), np.uint8)  # Pillow clips after each pass, too: not here
    ours = [255 * torch.tensor(v)[:, None, None] for v in embed.FAMILIES[family][1:]]

    def error(px, resample):                                            # in steps of uint8
        x = embed.pixels(torch.from_numpy(images), px, *ours) - by_hand(images, px, mean, std, resample)
        return (x * ours[1]).abs().max()
    assert error(48, Image.BICUBIC) < 1e-3
    for px in (28, 96):
        assert error(px, Image.BICUBIC) < 1.5 and error(px, Image.BILINEAR) > 5


@pytest.mark.parametrize("folder", ["dinov2", "siglip", "siglip_whole", "clip", "clip_whole"])
def test_embeddings_are_those_of_the_library(folder, models, tmp_path, monkeypatch):
    """cls.npy and tokens.npy equal the library's output for pixels prepared by hand; with wrong constants they would not."""
    family = folder.split("_")[0]
    px, (mean, std) = PX[family], PUBLISHED[family]
    images = np.random.default_rng(0).integers(0, 256, (3, px, px, 3), np.uint8)   # nothing is resampled: equal, not nearly so
    np.save(tmp_path / "images.npy", images[:, None])
    monkeypatch.setitem(embed.common.PRESETS, "digits16", dict(embed.common.PRESETS["digits16"], size=px))
    flags = ("--images", tmp_path / "images.npy", "--encoder", models / folder)
    flags += ("--encoder-px", px) if family == "dinov2" else ()        # the others say in config.json what they take
    main(monkeypatch, *flags, "--out", tmp_path / "out")
    cls, tokens = (np.load(tmp_path / "out" / f"{name}.npy", allow_pickle=False) for name in ("cls", "tokens"))
    if family == "dinov2":                                             # 4 x 4 patches for positions of 5 x 5: interpolated
        want_cls, want_tokens = of_the_library(models / folder, family, by_hand(images, px, mean, std))
    else:
        want_cls, want_tokens = of_the_library(models / family, family, by_hand(images, px, mean, std))
    np.testing.assert_allclose(cls, want_cls.numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(tokens, want_tokens.numpy(), atol=2e-3, rtol=2e-3)    # float16
    assert json.loads((tmp_path / "out" / "data.json").read_text())["encoder"] == dict(
        name=str(models / folder), px=px, size=px, dim=want_cls.shape[1], tokens=list(want_tokens.shape[1:]))
    for other in set(PUBLISHED) - {family}:                            # the test sees a wrong mean and std, the nearest too
        monkeypatch.setitem(embed.FAMILIES, family, (embed.FAMILIES[family][0], *embed.FAMILIES[other][1:]))
        wrong, _ = embed.transformer(family, models / folder, px, CPU)(torch.from_numpy(images))
        assert np.abs(wrong.detach().numpy() - cls).max() > 30 * 1e-4


def test_flops_of_the_scaling_page():
    transformers = pytest.importorskip("transformers", reason="needs requirements-encoders.txt")
    for width, blocks in scaling.DINOV2.values():
        size = dict(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64)
        config = transformers.Dinov2Config(**size, patch_size=14)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            transformers.Dinov2Model(config)(torch.empty(1, 3, 224, 224))
        assert counter.get_total_flops() == scaling.embedding_flops(width, blocks)


def test_position_embeddings_are_interpolated(models):
    """Any multiple of the patch will do: 3 x 3 of them here, where 5 x 5, 4 x 4 and 2 x 2 were trained."""
    for family, patch in (("dinov2", 14), ("siglip", 16), ("clip", 32)):
        encode = embed.transformer(family, models / family, 3 * patch, CPU)
        with torch.no_grad():
            cls, tokens = encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
        assert tokens.shape[1] == 9 and cls.isfinite().all()


def test_a_directory_may_say_how_its_pixels_are_prepared(models, tmp_path, photos):
    folder = shutil.copytree(models / "dinov2", tmp_path / "own")
    own = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2, crop_size=224)
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    with torch.no_grad():
        cls, _ = embed.transformer("dinov2", folder, 56, CPU)(torch.from_numpy(photos[1]))
    mean, std = ([255 * v for v in own[key]] for key in ("image_mean", "image_std"))
    x = torch.nn.functional.interpolate(torch.from_numpy(photos[1]).permute(0, 3, 1, 2).float(), (56, 56), mode="bilinear")
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(cls, of_the_library(folder, "dinov2", x)[0], atol=1e-4, rtol=1e-4)


def test_bad_directories_are_one_line(models, tmp_path, photos, monkeypatch, capsys):
    def error(folder, *flags):
        return error_of(monkeypatch, capsys, "--images", photos[0], "--out", tmp_path / "out", "--encoder", folder, *flags)

    assert "multiples of its patches of 14" in error(models / "dinov2", "--encoder-px", 64)
    lacking = shutil.copytree(models / "siglip", tmp_path / "lacking")
    from safetensors.torch import load_file, save_file
    weights = load_file(lacking / "model.safetensors")
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    assert "lacks weights" in error(lacking) and not (tmp_path / "out").exists()
    (lacking / "model.safetensors").write_bytes(b"cut")
    assert "cannot load" in error(lacking)
    (lacking / "model.safetensors").unlink()
    assert "cannot load" in error(lacking)

    class Dangerous:
        def __reduce__(self):
            return (tmp_path / "run").mkdir, ()
    torch.save(Dangerous(), lacking / "pytorch_model.bin")
    assert "cannot load" in error(lacking) and not (tmp_path / "run").exists()
    shutil.copy(models / "siglip" / "model.safetensors", lacking)
    for strange in (dict(resample=1), dict(image_std=0.5), dict(do_normalize=False), dict(rescale_factor=1)):
        (lacking / "preprocessor_config.json").write_text(json.dumps(strange))
        assert "resample 2 or 3" in error(lacking)


def test_unreachable_weights_are_one_line(models, tmp_path, photos, monkeypatch, capsys):
    """What was downloaded before is taken as it is; else the hub is asked once before the library starts its attempts."""
    import huggingface_hub
    import transformers
    tried, load = [], transformers.Dinov2Model.from_pretrained

    def downloaded(source, local_files_only=False, **options):
        tried.append(local_files_only)
        if "missing" in tried:
            raise OSError("not in\nthe cache")
        return load(models / "dinov2", **options)

    def no_network(*args, **options):
        raise ConnectionError("cannot resolve\nthe hub's name")
    monkeypatch.setattr(transformers.Dinov2Model, "from_pretrained", downloaded)
    monkeypatch.setattr(huggingface_hub, "model_info", no_network)
    flags = ("--images", photos[0], "--encoder", "dinov2_vitl14", "--encoder-px", 56, "--out")
    main(monkeypatch, *flags, tmp_path / "cached")
    assert tried == [True] and (tmp_path / "cached" / "data.json").exists()
    tried[:] = ["missing"]
    error = error_of(monkeypatch, capsys, *flags, tmp_path / "out")
    assert "hf download facebook/dinov2-large --local-dir" in error and "cannot resolve the hub's" in error
    assert tried == ["missing", True] and not (tmp_path / "out").exists()


def test_without_the_extra_one_line_says_what_to_install(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = error_of(monkeypatch, capsys, "--images", photos[0], "--out", tmp_path / "out", "--encoder", "siglip_l")
    assert "pip install -r requirements-encoders.txt" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, family, published, px", [
    ("dinov2_vits14", "dinov2", "facebook/dinov2-small", 224), ("dinov2_vitb14", "dinov2", "facebook/dinov2-base", 224),
    ("dinov2_vitl14", "dinov2", "facebook/dinov2-large", 224), ("siglip_b", "siglip", "google/siglip-base-patch16-224", 224),
    ("siglip_l", "siglip", "google/siglip-large-patch16-256", 256), ("clip_vitb32", "clip", "openai/clip-vit-base-patch32", 224)])
def test_each_name_is_a_published_model_at_its_own_size(name, family, published, px, tmp_path):
    """A directory of it too; DINOv2's config.json says 518, where it was trained last, but it is published for 224."""
    make, found = embed.find(name, 128)
    assert (make.func, make.args, found) == (embed.transformer, (family, published), px)
    size = dict(image_size=518 if family == "dinov2" else px)
    config = size if family == "dinov2" else dict(vision_config=size)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=family, **config)))
    make, found = embed.find(str(tmp_path), 128)
    assert (make.func, make.args, found) == (embed.transformer, (family, str(tmp_path)), px)


def test_what_is_no_encoder_is_one_line(tmp_path, photos, monkeypatch, capsys):
    def error(*flags):
        return error_of(monkeypatch, capsys, "--images", photos[0], "--out", tmp_path / "out", *flags)

    assert "not one of efficientnet_lite0" in error("--encoder", "nonsense")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in error("--encoder", empty)
    (empty / "config.json").write_text(json.dumps(dict(model_type="bert")))
    assert "model_type bert" in error("--encoder", empty)
    (empty / "config.json").write_text(json.dumps(dict(model_type="siglip", vision_config=dict(image_size="big"))))
    assert "image_size" in error("--encoder", empty)
    assert "cannot use inception:" in error("--encoder", f"inception:{tmp_path}/missing.pt")
    (tmp_path / "junk.pt").write_text("junk")
    assert "cannot use inception:" in error("--encoder", f"inception:{tmp_path}/junk.pt")
    assert "299" in error("--encoder", f"inception:{tmp_path}/junk.pt", "--encoder-px", 128)
    assert "--pool 0" in error("--pool", 0)
    assert "--encoder-px -1" in error("--encoder-px", -1)


class StandIn(torch.nn.Module):
    """The call of the public file: uint8 [B, 3, S, S] -> features, or with return_features=False something else."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if x.dtype != torch.uint8 or x.shape[1] != 3:
            raise ValueError("expected uint8 NCHW")
        x = torch.nn.functional.interpolate(x.float(), size=[8, 8], mode="bilinear")
        return x.flatten(1) if return_features else torch.zeros(1, 1008)


def test_inception_gets_the_bytes_and_gives_its_features(tmp_path, photos, monkeypatch):
    torch.jit.script(StandIn()).save(tmp_path / "stand-in.pt")
    name = f"inception:{tmp_path}/stand-in.pt"
    main(monkeypatch, "--images", photos[0], "--out", tmp_path / "out", "--encoder", name)
    want = StandIn()(torch.from_numpy(photos[1]).permute(0, 3, 1, 2), True)
    cls, tokens = (np.load(tmp_path / "out" / f"{what}.npy", allow_pickle=False) for what in ("cls", "tokens"))
    assert (cls == want.numpy()).all() and (tokens == want[:, None].half().numpy()).all()
    about = json.loads((tmp_path / "out" / "data.json").read_text())["encoder"]
    assert about == dict(name=name, px=299, size=16, dim=192, tokens=[1, 192])


@pytest.mark.parametrize("side, by", [(4, 2), (7, 2), (7, 3), (5, 9), (1, 2)])
def test_pooled_tokens_are_means_of_squares(side, by):
    tokens = torch.randn(2, side * side, 3, generator=torch.Generator().manual_seed(0))
    cls, pooled = embed.pooled(lambda images: (images, tokens), by)(None)
    grid = tokens.numpy().reshape(2, side, side, 3)
    want = [grid[:, y:y + by, x:x + by].mean((1, 2)) for y in range(0, side, by) for x in range(0, side, by)]
    assert cls is None
    np.testing.assert_allclose(pooled.numpy(), np.stack(want, 1), atol=1e-6)


def test_pool_is_a_setting_of_the_encoder(tmp_path, photos, monkeypatch, capsys):
    """It changes tokens.npy and data.json only, is taken over by --data, and a folder without it is another."""
    def run(out, *flags):
        main(monkeypatch, "--images", photos[0], "--out", tmp_path / out, *flags)
        cls, tokens = (np.load(tmp_path / out / f"{what}.npy", allow_pickle=False) for what in ("cls", "tokens"))
        return cls, tokens, json.loads((tmp_path / out / "data.json").read_text())["encoder"]

    lite = ("--encoder-px", 96)
    cls, tokens, about = run("plain", *lite)
    pooled_cls, pooled_tokens, pooled_about = run("pooled", *lite, "--pool", 2)
    assert (cls == pooled_cls).all() and tokens.shape == (6, 9, 320) and pooled_tokens.shape == (6, 4, 320)
    np.testing.assert_allclose(pooled_tokens[:, 0], tokens[:, [0, 1, 3, 4]].astype(np.float32).mean(1), atol=5e-3)
    assert pooled_about == dict(about, tokens=[4, 320], pool=2) and "pool" not in about
    assert run("again", "--data", tmp_path / "pooled")[2] == pooled_about
    assert "encoder (" in error_of(monkeypatch, capsys, "--images", photos[0], "--out", tmp_path / "pooled", *lite)
