"""The optional encoders of 01_embed.py against the library transformers itself, on small random models; Inception."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import module, run
from PIL import Image

transformers = pytest.importorskip("transformers", reason="needs requirements-encoders.txt")
embed = module("01_embed.py")
CPU = torch.device("cpu")
# mean, std of values in 0..1 as published, github.com: facebookresearch/dinov2, google-research/big_vision, openai/CLIP
PUBLISHED = dict(dinov2=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), siglip=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
                 clip=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
PX = dict(dinov2=56, siglip=64, clip=64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with small models of random weights, as save_pretrained() writes them; *_whole with the text model."""
    root, size = tmp_path_factory.mktemp("models"), dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision, text = dict(size, intermediate_size=64, image_size=64), dict(size, intermediate_size=64, vocab_size=9)
    vision_of = dict(clip=dict(vision, patch_size=32, projection_dim=24), siglip=dict(vision, patch_size=16))
    clip_config = transformers.CLIPConfig(text_config=text, vision_config=vision_of["clip"], projection_dim=24)
    siglip_config = transformers.SiglipConfig(text_config=text, vision_config=vision_of["siglip"])
    whole = dict(siglip=transformers.SiglipModel(siglip_config), clip=transformers.CLIPModel(clip_config))
    made = dict(
        dinov2=transformers.Dinov2Model(transformers.Dinov2Config(**size, image_size=70, patch_size=14, mlp_ratio=2)),
        siglip=transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision_of["siglip"])),
        clip=transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision_of["clip"])))
    processors = dict(dinov2="BitImageProcessor", siglip="SiglipImageProcessor", clip="CLIPImageProcessor")
    generator = torch.Generator().manual_seed(0)
    for family, net in made.items():
        for weight in net.parameters():                                # larger than the library draws them
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
        mean, std = PUBLISHED[family]
        processor = getattr(transformers, processors[family])(image_mean=mean, image_std=std, resample=3)
        for name, model in ((family, net), (f"{family}_whole", whole.get(family))):
            if model is not None:
                model.load_state_dict(net.state_dict(), strict=False)
                model.save_pretrained(root / name)
                processor.save_pretrained(root / name)
    return root


def of_the_library(folder, family, x):
    """(global, tokens) of prepared pixels [B, 3, px, px], asked of the library directly."""
    if family == "dinov2":
        h = transformers.Dinov2Model.from_pretrained(folder)(x)
        return h.last_hidden_state[:, 0], h.last_hidden_state[:, 1:]
    if family == "siglip":
        h = transformers.SiglipVisionModel.from_pretrained(folder)(x)
        return h.pooler_output, h.last_hidden_state
    net = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
    h = net(x)
    after = net.vision_model.post_layernorm(h.last_hidden_state)       # the library projects the first of these
    torch.testing.assert_close(net.visual_projection(after[:, 0]), h.image_embeds)
    return h.image_embeds, after[:, 1:]


def by_hand(images, px, mean, std, resample=Image.BICUBIC):
    """[B, S, S, 3] uint8 -> [B, 3, px, px] as published: Pillow's resampling, then mean and std of values in 0..1."""
    resized = np.stack([np.asarray(Image.fromarray(image).resize((px, px), resample)) for image in images])
    return torch.from_numpy((resized / 255 - np.array(mean)) / np.array(std)).float().permute(0, 3, 1, 2)


def noise(side, low=0, high=256):
    return np.random.default_rng(0).integers(low, high, (3, side, side, 3), np.uint8)


@pytest.mark.parametrize("ours, theirs", [(Image.BICUBIC, Image.BILINEAR), (Image.BILINEAR, Image.BICUBIC)])
def test_pixels_are_resampled_as_pillow_does(ours, theirs):
    """Up to Pillow's rounding after each of its two passes; another kind of resampling is far off."""
    images = noise(48, 64, 192)                                        # Pillow clips after each pass, too: not here

    def error(px, resample):                                           # in steps of uint8
        x = embed.pixels(torch.from_numpy(images), px, 0, 255, ours)
        return 255 * (x - by_hand(images, px, (0, 0, 0), (1, 1, 1), resample)).abs().max()
    assert error(48, ours) < 1e-3
    for px in (28, 96):
        assert error(px, ours) < 1.5 and error(px, theirs) > 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "siglip", "siglip_whole", "clip", "clip_whole"])
def test_embeddings_are_those_of_the_library(name, models):
    """Nothing is resampled here: equal, not nearly so. With the constants of another family they would not be."""
    family = name.split("_")[0]
    images, px = noise(PX[family]), PX[family]
    encode, found_px, resample = embed.transformer(str(models / name), px if family == "dinov2" else None, CPU)
    assert (found_px, resample) == (px, Image.BICUBIC)
    cls, tokens = encode(torch.from_numpy(images))                     # DINOv2: positions of 5 x 5 patches for 4 x 4
    want_cls, want_tokens = of_the_library(models / family, family, by_hand(images, px, *PUBLISHED[family]))
    torch.testing.assert_close(cls, want_cls, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens, want_tokens, atol=1e-4, rtol=1e-4)
    for other in set(PUBLISHED) - {family}:
        wrong, _ = of_the_library(models / family, family, by_hand(images, px, *PUBLISHED[other]))
        assert (wrong - cls).abs().max() > 30 * 1e-4


@torch.no_grad()
def test_a_directory_says_how_its_pixels_are_prepared_and_positions_are_interpolated(models, tmp_path):
    folder = shutil.copytree(models / "siglip", tmp_path / "own")
    path = folder / "preprocessor_config.json"
    own = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2)
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    images = noise(96)                                                 # 6 x 6 patches, where 4 x 4 were trained
    encode, _, resample = embed.transformer(str(folder), 96, CPU)
    net = transformers.SiglipVisionModel.from_pretrained(folder)
    want = net(by_hand(images, 96, own["image_mean"], own["image_std"]), interpolate_pos_encoding=True)
    cls, tokens = encode(torch.from_numpy(images))
    assert resample == Image.BILINEAR and tokens.shape[1] == 36
    torch.testing.assert_close(cls, want.pooler_output, atol=1e-4, rtol=1e-4)


def test_sizes_are_the_published_ones(models):
    """What config.json says; DINOv2's is that of its last stage of training, and it is published for 224 px."""
    assert [embed.transformer(str(models / family), None, CPU)[1] for family in PUBLISHED] == [224, 64, 64]


def test_missing_weights_are_an_error_and_nothing_is_written(models, tmp_path):
    from safetensors.torch import load_file, save_file
    lacking = shutil.copytree(models / "siglip", tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    np.save(tmp_path / "x.npy", noise(16))
    flags = ("--images", tmp_path / "x.npy", "--encoder", lacking, "--out", tmp_path / "out", "--device", "cpu")
    result = run("01_embed.py", *flags)
    assert result.returncode == 2 and "lacks the weights" in result.stderr and not (tmp_path / "out").exists()


class StandIn(torch.nn.Module):
    """The call of the public file: uint8 [B, 3, S, S] -> features, or with return_features=False something else."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if x.dtype != torch.uint8 or x.shape[1] != 3:
            raise ValueError("expected uint8 NCHW")
        x = torch.nn.functional.interpolate(x.float(), size=[8, 8], mode="bilinear")
        return x.flatten(1) if return_features else torch.zeros(1, 1008)


def test_inception_and_a_model_through_the_command_line(models, tmp_path):
    """Inception gets the bytes. A transformer named by its directory gets its own size, and 05, 06 can compare it."""
    images = noise(16)
    np.save(tmp_path / "x.npy", images)
    torch.jit.script(StandIn()).save(tmp_path / "stand-in.pt")
    features = StandIn()(torch.from_numpy(images).permute(0, 3, 1, 2), True)
    for name, px, shape in ((f"inception:{tmp_path}/stand-in.pt", 299, (1, 192)), (str(models / "clip"), 64, (4, 32))):
        out = tmp_path / str(px)
        flags = ("--images", tmp_path / "x.npy", "--encoder", name, "--out", out, "--device", "cpu")
        result = run("01_embed.py", *flags)
        assert result.returncode == 0, result.stderr
        cls, tokens = (np.load(out / f"{what}.npy", allow_pickle=False) for what in ("cls", "tokens"))
        assert json.loads((out / "data.json").read_text())["encoder"] == dict(
            name=name, px=px, size=16, embed="stored", dim=cls.shape[1], tokens=list(shape))
        assert cls.shape == (3, 192 if px == 299 else 24) and tokens.shape == (3, *shape)
        if px == 299:
            assert (cls == features.numpy()).all() and (tokens == features[:, None].half().numpy()).all()
