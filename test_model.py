"""The tests, by values: `make test`. CPU only, no network; every file they need they write themselves."""
import csv
import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=tempfile.mkdtemp(), TORCH_HOME=tempfile.mkdtemp())  # before the imports

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel, GteConfig, GteModel, PreTrainedTokenizerFast, T5Config, T5Model

import data
import finetune_mvsa
import model
import pretrain
from model import Masks, sample_masks

HERE = Path(__file__).parent
WORDS = "a red dog on blue grass under the sky with two cats".split()
CONFIG = replace(model.PRESETS["toy"], dim=32, predictor_dim=32, predictor_depth=2, target="ema", vocabulary=WORDS)
TEXTS = ["a red dog", "blue grass under the sky with two cats on a dog", "cats"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return model.TIJEPA(CONFIG)


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48, generator=seeded(1))


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (4, 4), (6, 6), (14, 14), (5, 9), (16, 16)])
def test_masks_are_disjoint_in_range_and_reach_every_patch(grid):
    N, generator = grid[0] * grid[1], seeded(0)
    seen, hidden = torch.zeros(N), torch.zeros(N)
    for _ in range(60):
        context, target = sample_masks(grid, 16, generator)
        assert context.shape[0] == target.shape[0] == 16 and target.shape[1] == 4
        assert 0 <= min(context.min(), target.min()) and max(context.max(), target.max()) < N
        for c, t in zip(context.tolist(), target.flatten(1).tolist()):
            assert len(set(c)) == len(c) > 0 and not set(c) & set(t)
        seen += torch.bincount(context.flatten(), minlength=N)
        hidden += torch.bincount(target.flatten(), minlength=N)
    assert (seen > 0).all() and (hidden > 0).all()


def test_target_blocks_are_rectangles_of_the_right_area_and_aspect():
    areas, aspects = [], []
    for seed in range(300):
        _, target = sample_masks((32, 32), 1, seeded(seed))
        for block in target[0]:
            rows, columns = block // 32, block % 32
            h, w = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
            assert h * w == len(block) == len(set(block.tolist()))
        areas.append(h * w / 1024)
        aspects.append(h / w)
    # rounding to whole patches moves a side by half a patch at most, of 10 or more
    assert 0.135 < min(areas) < 0.155 and 0.195 < max(areas) < 0.22
    assert 0.67 < min(aspects) < 0.80 and 1.42 < max(aspects) < 1.65
    assert abs(np.corrcoef(areas, aspects)[0, 1]) < 0.2  # I-JEPA's sampler ties them: 1.0


def test_masks_depend_on_grid_batch_and_generator_only():
    first, again, other = (sample_masks((14, 14), 8, seeded(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first.target.shape != other.target.shape or not torch.equal(first.target, other.target)
    torch.manual_seed(99)
    assert torch.equal(sample_masks((14, 14), 8, seeded(3)).context, first.context)


def test_masks_are_drawn_for_each_image():
    target = sample_masks((14, 14), 8, seeded(0)).target
    assert len({tuple(t.flatten().tolist()) for t in target}) == 8


def test_a_large_batch_does_not_lose_the_bottom_rows():
    counts = torch.zeros(14)
    for seed in range(20):
        counts += torch.bincount(sample_masks((14, 14), 256, seeded(seed)).context.flatten() // 14, minlength=14)
    top, bottom = counts[:7].sum(), counts[7:].sum()
    assert 0.95 < bottom / top < 1.05
    assert 0.9 < counts[13] / counts[0] < 1.1


@pytest.mark.parametrize("grid", [(1, 1), (1, 0)])
def test_a_grid_without_room_is_refused(grid):
    with pytest.raises(ValueError, match="too small"):
        sample_masks(grid, 2, seeded(0))


# -- X, X~ and g --------------------------------------------------------------------------------------------------------


def test_ema_starts_equal_then_follows_the_formula(net):
    theta = list(net.context_encoder.parameters())
    xi = list(net.target_encoder.parameters())
    assert len(theta) == len(xi) and all(torch.equal(a, b) and a is not b for a, b in zip(theta, xi))
    with torch.no_grad():
        for p in theta:
            p.add_(torch.randn(p.shape, generator=seeded(2)))
    before = [p.clone() for p in xi]
    net.update_target(0.9)
    for new, old, p in zip(xi, before, theta):
        assert torch.allclose(new, 0.9 * old + 0.1 * p, atol=1e-7) and not torch.equal(new, old)


def test_target_and_frozen_encoders_stay_in_eval_mode(net):
    for part in (net, net.target_encoder, net.image_encoder, net.text_encoder):
        part.train()
        for frozen in (net.target_encoder, net.image_encoder, net.text_encoder):
            assert not any(module.training for module in frozen.modules())
    assert net.context_encoder.training and net.predictor.training


def test_gradients_reach_context_encoder_and_predictor_only(net, images):
    net.train()
    net(*net.frozen(images, TEXTS), sample_masks(net.grid, 3, seeded(0))).loss.backward()
    for name, p in net.named_parameters():
        if name.startswith(("context_encoder", "predictor")):
            assert p.grad is not None and p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None and not p.requires_grad, name


@pytest.mark.parametrize("self_attention", [False, True])
def test_padding_does_not_change_a_caption(images, self_attention):
    torch.manual_seed(0)
    net = model.TIJEPA(replace(CONFIG, self_attention=self_attention)).eval()
    with torch.no_grad():  # an untrained X hardly listens to the text: make it, in both
        for x, x_target in zip(net.context_encoder.blocks, net.target_encoder.encoder.blocks):
            x_target.cross.proj.weight.copy_(x.cross.proj.weight.mul_(100))
    masks = sample_masks(net.grid, 3, seeded(0))
    together = net(*net.frozen(images, TEXTS), masks)
    for i, text in enumerate(TEXTS):
        alone = net(*net.frozen(images[i:i + 1], [text]), Masks(masks.context[i:i + 1], masks.target[i:i + 1]))
        assert torch.allclose(alone.energy[0], together.energy[i], rtol=1e-5)
        assert torch.allclose(alone.target[0], together.target[i], atol=1e-4)
    changed = net(*net.frozen(images, [TEXTS[1], TEXTS[1], TEXTS[2]]), masks)  # the caption itself does change it
    assert (changed.energy[0] - together.energy[0]).abs() > 3e-4  # 30 times the tolerance above
    assert (changed.target[0] - together.target[0]).abs().max() > 0.1


def test_an_empty_caption_has_a_finite_energy(net, images):
    out = net(*net.frozen(images, ["", "  ", "cats"]), sample_masks(net.grid, 3, seeded(0)))
    assert out.energy.isfinite().all() and torch.equal(*(net.encode(images[:1], [t])[0] for t in ("", "  ")))


def test_hidden_patches_reach_the_prediction_only_through_the_frozen_encoder(net, images):
    masks = sample_masks(net.grid, 3, seeded(0))
    s_image = net.image_encoder(images).requires_grad_()
    s_text, text_mask = net.text_encoder(TEXTS)
    context = net.context_encoder(model.gather(s_image, masks.context), s_text, text_mask)
    net.predictor(context, masks).square().sum().backward()
    reach = s_image.grad.abs().sum(-1)  # [B, N]
    visible = torch.zeros_like(reach, dtype=torch.bool).scatter(1, masks.context, True)
    assert (reach[visible] > 0).all() and (reach[~visible] == 0).all()


def test_each_target_block_is_predicted_on_its_own(net, images):
    masks = sample_masks(net.grid, 3, seeded(0))
    context = net.context_encoder(model.gather(net.image_encoder(images), masks.context), *net.text_encoder(TEXTS))
    alone = net.predictor(context, Masks(masks.context, masks.target[:, 2:3]))
    assert torch.allclose(net.predictor(context, masks)[:, 2], alone[:, 0], atol=1e-5)


def test_skipping_what_nobody_reads_changes_nothing(images):
    """The predictor's last block is computed for the mask tokens only, X~ for the hidden patches only."""
    for self_attention in (False, True):
        torch.manual_seed(0)
        net = model.TIJEPA(replace(CONFIG, self_attention=self_attention))
        features, masks = net.frozen(images, TEXTS), sample_masks(net.grid, 3, seeded(0))
        out, (B, M, P) = net(*features, masks), masks.target.shape
        everywhere = F.layer_norm(net.target_encoder(*features), (32,))  # [B, N, D]
        assert torch.allclose(out.target, model.gather(everywhere, masks.target.flatten(1)).unflatten(1, (M, P)), atol=1e-5)
        g, context = net.predictor, net.context_encoder(model.gather(features[0], masks.context), *features[1:])
        visible = g.embed(context) + g.positions[0, masks.context]
        for m in range(M):
            x = torch.cat([visible, g.mask_token + g.positions[0, masks.target[:, m]]], dim=1)
            for block in g.blocks:
                x = block(x)
            assert torch.allclose(g.proj(g.norm(x))[:, -P:], out.prediction[:, m], atol=1e-5)


def test_the_caption_reaches_the_prediction_before_any_training():
    """With I-JEPA's init of std 0.02 these widths took several times the steps to hear the caption."""
    torch.manual_seed(0)
    net = model.TIJEPA(replace(model.PRESETS["toy"], vocabulary=WORDS))
    pictures, masks = torch.randn(3, 3, 48, 48, generator=seeded(1)), sample_masks((6, 6), 3, seeded(0))
    said, other = (net(*net.frozen(pictures, texts), masks).prediction for texts in (TEXTS, TEXTS[::-1]))
    assert (said - other)[0].abs().mean() > 0.05 * said[0].std()  # 0.003 with std 0.02
    assert net.context_encoder.blocks[0].cross.q.weight.std().item() == pytest.approx((2 / 192) ** 0.5, rel=0.03)


def test_predictor_positions_tell_the_patches_apart(net):
    positions = model.sincos_2d((6, 6), 32)
    assert len({tuple(p.tolist()) for p in positions}) == 36
    assert torch.allclose(positions[7, :8], torch.sin(1.0 * 10000 ** (-torch.arange(8) / 8)))  # row 1
    assert torch.equal(positions[7, :16], positions[11, :16]) and torch.equal(positions[7, 16:], positions[31, 16:])


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_energy_equals_a_plain_loop(images, loss):
    torch.manual_seed(0)
    net = model.TIJEPA(replace(CONFIG, loss=loss))
    with torch.no_grad():  # X~ must not be X, or a mix-up of the two would pass
        for p in net.target_encoder.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(3)))
    masks = sample_masks(net.grid, 3, seeded(0))
    out = net(*net.frozen(images, TEXTS), masks)
    s_image, (s_text, text_mask) = net.image_encoder(images), net.text_encoder(TEXTS)
    for b in range(3):
        target = net.target_encoder.encoder(s_image[b:b + 1], s_text[b:b + 1], text_mask[b:b + 1])[0]
        context = net.context_encoder(s_image[b:b + 1, masks.context[b]], s_text[b:b + 1], text_mask[b:b + 1])
        prediction = net.predictor(context, Masks(masks.context[b:b + 1], masks.target[b:b + 1]))[0]
        errors = []
        for block, patches in enumerate(masks.target[b]):
            for k, patch in enumerate(patches):
                y = (target[patch] - target[patch].mean()) / (target[patch].var(correction=0) + 1e-5).sqrt()
                d = (prediction[block, k] - y).abs()
                errors += (d ** 2 if loss == "mse" else torch.where(d < 1, 0.5 * d ** 2, d - 0.5)).tolist()
        assert out.energy[b].item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert out.loss.item() == pytest.approx(out.energy.mean().item())


def test_encode_gives_the_target_encoders_tokens_and_their_mean(net, images):
    with torch.no_grad():
        net.target_encoder.encoder.norm.weight.mul_(2)  # now X~ differs from X
    tokens, pooled = net.encode(images, TEXTS)
    assert torch.equal(tokens, net.target_encoder(net.image_encoder(images), *net.text_encoder(TEXTS)))
    assert tokens.shape == (3, 36, 32) and torch.allclose(pooled, tokens.sum(1) / 36, atol=1e-6)


def test_self_attention_lets_patches_see_each_other(images):
    for self_attention in (False, True):
        torch.manual_seed(0)
        net = model.TIJEPA(replace(CONFIG, self_attention=self_attention))
        s_image, text = net.image_encoder(images), net.text_encoder(TEXTS)
        part, whole = net.context_encoder(s_image[:, :5], *text), net.context_encoder(s_image, *text)[:, :5]
        assert torch.allclose(part, whole, atol=1e-5) != self_attention


def test_impossible_architectures_are_refused():
    for change, word in (({"heads": 5}, "do not divide"), ({"loss": "l1"}, "mse"), ({"predictor_dim": 30}, "multiple of 4")):
        with pytest.raises(ValueError, match=word):
            model.TIJEPA(replace(CONFIG, **{"predictor_heads": 2, **change}))


def test_presets_are_the_papers():
    sizes = {name: (c.dim, c.depth, c.heads, c.predictor_depth, c.predictor_dim) for name, c in model.PRESETS.items()}
    assert sizes["small"] == (768, 4, 8, 12, 384) and sizes["medium"] == (768, 6, 12, 12, 384)
    assert sizes["large"] == (1024, 8, 16, 12, 384)
    assert all(model.PRESETS[name].target == "ema" and not model.PRESETS[name].vicreg for name in ("small", "medium", "large"))
    for name in ("tiny", "small", "large"):
        assert timm.is_model(model.PRESETS[name].image_encoder.split(".")[0])


# -- frozen encoders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, prefix", [("test_vit", 1), ("test_vit_relpos", 0)])
def test_patch_tokens_without_class_token(tmp_path, name, prefix):
    vit = timm.create_model(name, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    encoder = model.ImageEncoder(name, str(tmp_path / "vit.pth"))
    pictures = torch.randn(2, 3, 160, 160, generator=seeded(0))
    tokens = encoder(pictures)
    assert torch.allclose(tokens, vit.eval().forward_features(pictures)[:, prefix:], atol=1e-5)
    assert tokens.shape[1] == 100
    assert encoder.grid == (10, 10) and encoder.data_config["input_size"] == (3, 160, 160)


def test_pretrained_weights_come_through_timms_own_loader(tmp_path):
    vit = timm.create_model("test_vit", num_classes=5)
    timm.models.save_for_hf(vit, tmp_path)
    encoder = model.ImageEncoder(f"local-dir:{tmp_path}")
    assert torch.equal(encoder.vit.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)


def test_timm_reads_ijepas_own_file_format(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", fc_norm=False, num_classes=0)
    entry = {f"module.{key}": value for key, value in vit.state_dict().items()}
    target = {key: value + 1 for key, value in entry.items()}
    torch.save({"encoder": entry, "predictor": {}, "opt": {"state": {}}, "scaler": None, "target_encoder": target,
                "epoch": 300, "loss": 0.1, "batch_size": 128, "world_size": 16, "lr": 1e-3}, tmp_path / "vit.pth.tar")
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:  # timm has no small I-JEPA: make the tiny ViT one (no class token)
        patch.setattr(model.timm, "create_model", lambda name, pretrained, num_classes: create(
            name, pretrained=pretrained, num_classes=num_classes, class_token=False, global_pool="avg", fc_norm=False))
        encoder = model.ImageEncoder("vit_tiny_patch16_224", str(tmp_path / "vit.pth.tar"))
    assert all(torch.equal(a, b) for a, b in zip(encoder.vit.state_dict().values(), vit.state_dict().values()))


def test_image_weights_that_do_not_fit_are_refused(tmp_path):
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    path = str(tmp_path / "vit.pth")
    torch.save(state, path)
    model.ImageEncoder("test_vit", path)  # a classifier of any size may be left over: f_I has none
    torch.save({key: value for key, value in state.items() if "blocks.1.attn.proj" not in key}, path)
    with pytest.raises(model.ModelError, match="blocks.1.attn.proj.weight"):
        model.ImageEncoder("test_vit", path)
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(model.ModelError, match="extra.weight"):
        model.ImageEncoder("test_vit", path)
    torch.save({**state, "blocks.0.mlp.fc1.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(model.ModelError, match="blocks.0.mlp.fc1.weight"):
        model.ImageEncoder("test_vit", path)
    with pytest.raises(model.ModelError, match="nowhere.pth"):
        model.ImageEncoder("test_vit", str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("name, word", [("vit_tiny_patch16_224", "--image_weights"), ("no_such_vit", "Unknown model")])
def test_image_encoders_that_cannot_be_had_are_named(name, word):
    with pytest.raises(model.ModelError, match=word):
        model.ImageEncoder(name)


def test_an_image_encoder_without_a_patch_grid_is_refused(tmp_path):
    torch.save(timm.create_model("test_efficientnet", num_classes=0).state_dict(), tmp_path / "net.pth")
    with pytest.raises(model.ModelError, match="patch grid"):
        model.ImageEncoder("test_efficientnet", str(tmp_path / "net.pth"))


def save_text_encoder(folder, text_model):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    text_model.save_pretrained(folder)
    return str(folder)


SMALL = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TEXT_MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "gte": lambda: GteModel(GteConfig(**SMALL, pad_token_id=0)),  # the paper's text encoder, in small
    "t5": lambda: T5Model(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_encoders_load_from_a_folder(tmp_path, name):
    torch.manual_seed(0)
    saved = TEXT_MODELS[name]().eval()
    encoder = model.TextEncoder(save_text_encoder(tmp_path, saved))
    states, mask = encoder(TEXTS + [""])
    assert mask.tolist() == [[n < length for n in range(11)] for length in (3, 11, 1, 1)] and encoder.dim == 16
    ids = torch.tensor([[2 + WORDS.index(word) for word in TEXTS[0].split()]])
    expected = (saved.encoder if name == "t5" else saved)(input_ids=ids).last_hidden_state
    assert torch.allclose(states[0, :3], expected[0], atol=1e-5)


def test_a_text_encoder_stored_in_half_precision_is_used_in_single(tmp_path):
    encoder = model.TextEncoder(save_text_encoder(tmp_path, BertModel(BertConfig(**SMALL)).half()))
    assert encoder(TEXTS)[0].dtype == torch.float32


def test_long_texts_are_cut_to_what_the_encoder_takes(tmp_path):
    encoder = model.TextEncoder(save_text_encoder(tmp_path, BertModel(BertConfig(**SMALL, max_position_embeddings=12))))
    states, _ = encoder(["dog " * 500])
    assert states.shape[1] == 12


def test_text_encoders_that_do_not_load_whole_are_refused(tmp_path):
    folder = save_text_encoder(tmp_path, BertModel(BertConfig(**{**SMALL, "num_hidden_layers": 1})))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(model.ModelError, match="encoder.layer.1"):
        model.TextEncoder(folder)
    with pytest.raises(model.ModelError, match="--text_encoder PATH"):
        model.TextEncoder("sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(model.ModelError, match="no/such/folder"):
        model.TextEncoder("no/such/folder")


# -- data ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "toy"
    data.write_toy(root, images=40, posts=60)
    return root


def test_toy_data_are_the_same_bytes_for_the_same_seed(toy, tmp_path):
    data.write_toy(tmp_path / "again", images=40, posts=60)
    data.write_toy(tmp_path / "other", images=40, posts=60, seed=1)
    files = sorted(path.relative_to(toy) for path in toy.rglob("*") if path.is_file())
    assert all((toy / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files) and len(files) > 300
    name = "mvsa/MVSA_Single/data/1.txt"
    assert (toy / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_toy_coco_goes_through_the_loader(toy, capsys):
    dataset = data.CocoCaptions(toy / "coco")
    assert len(dataset.items) == 41 and dataset.left_out.counts() == {"image not on disk": 1}
    assert all(len(captions) == 5 for _, captions in dataset.items)
    pictures = data.Pictures(dataset.items, model.ImageEncoder("toy").data_config)
    batch = pictures[[(i, (i + 1) % 41, 2) for i in range(41)]]
    assert batch.images.shape == (40, 3, 48, 48) and batch.left_out == [40] and batch.size == 40
    assert batch.texts == [dataset.items[i + 1][1][2] for i in range(40)]
    broken = dataset.items[40][0].name
    dataset.left_out.add("broken image", broken)
    dataset.left_out.add("broken image", broken)
    assert capsys.readouterr().err.count("000000000040.jpg") == 1 and dataset.left_out.counts()["broken image"] == 1


def test_preprocessing_is_the_encoders(tmp_path):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, 50:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    tensor = data.image_transform(config)(data.read_image(tmp_path / "half.png"))
    for channel, (mean, std) in enumerate(zip(config["mean"], config["std"])):
        assert tensor[channel, 16, 0].item() == pytest.approx((0 - mean) / std, abs=1e-5)  # the left edge is kept
        assert tensor[channel, 16, 31].item() == pytest.approx((1 - mean) / std, abs=1e-5)  # and so is the right


def test_each_epoch_draws_every_image_once_with_one_caption(toy):
    items, train = data.CocoCaptions(toy / "coco").items, np.arange(1, 41)
    first, again, second = (data.epoch_batches(items, train, 10, 0, epoch) for epoch in (0, 0, 1))
    assert first == again and first != second and [len(batch) for batch in first] == [10] * 4
    draws = [draw for batch in data.epoch_batches(items, train, 100, 0, 0) for draw in batch]  # a batch above the set: all
    assert sorted(i for i, _, _ in draws) == list(range(1, 41)) and all(i == owner for i, owner, _ in draws)
    drawn = {draw for epoch in range(60) for batch in data.epoch_batches(items, train, 40, 0, epoch) for draw in batch}
    assert len(drawn) == 40 * 5


def test_held_out_images_are_not_trained_on(toy):
    splits = [data.CocoCaptions(toy / "coco").hold_out(10) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*splits)) and len(splits[0][1]) == 10
    assert sorted(np.concatenate(splits[0])) == list(range(41))
    with pytest.raises(data.DataError, match="leaves nothing"):
        data.CocoCaptions(toy / "coco").hold_out(41)


def test_coco_that_is_not_there_or_not_coco_is_refused(tmp_path):
    with pytest.raises(data.DataError) as error:
        data.CocoCaptions(tmp_path)
    for path in ("train2017", "annotations/captions_train2017.json", "make coco"):
        assert path in str(error.value)
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for content in ("{", "[]", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}',
                    '{"images": [], "annotations": []}'):
        (tmp_path / "annotations" / "captions_train2017.json").write_text(content)
        with pytest.raises(data.DataError, match="captions_train2017.json"):
            data.CocoCaptions(tmp_path)


@pytest.mark.parametrize("text, image, label", [
    ("positive", "positive", "positive"), ("neutral", "neutral", "neutral"), ("negative", "negative", "negative"),
    ("neutral", "positive", "positive"), ("positive", "neutral", "positive"), ("neutral", "negative", "negative"),
    ("negative", "neutral", "negative"), ("positive", "negative", None), ("negative", "positive", None)])
def test_label_rules(text, image, label):
    assert data.combine(text, image) == label


def write_labels(folder, rows, columns, newline="\n", posts=True):
    (folder / "data").mkdir(parents=True)
    text = newline.join(["ID\t" + "\t".join(["text,image"] * columns), *rows, ""])
    (folder / "labelResultAll.txt").write_bytes(text.encode())
    for number in (row.split("\t")[0] for row in rows if posts):
        (folder / "data" / f"{number}.txt").write_text(f"post {number}")
        (folder / "data" / f"{number}.jpg").write_bytes(b"")
    return folder


def test_single_labels_with_each_way_to_be_dropped(tmp_path):
    rows = ["1\tpositive,positive", "2\tneutral,negative", "3\tpositive,negative", "4\tneutral,neutral",
            "9\tnegative,neutral"]
    folder = write_labels(tmp_path / "MVSA_Single", rows, 1, "\r\n")
    (folder / "data" / "9.jpg").unlink()
    posts, left_out = data.load_mvsa(folder)
    assert [(p.set, p.id, p.label, p.text) for p in posts] == [
        ("single", "1", 0, "post 1"), ("single", "2", 2, "post 2"), ("single", "4", 1, "post 4")]
    assert left_out.reasons == {"text and image of opposite polarity": {"3"}, "text or image file missing": {"9"}}


def test_multi_labels_with_each_way_to_be_dropped(tmp_path):
    P, U, N = "positive", "neutral", "negative"
    rows = [f"1\t{P},{U}\t{P},{U}\t{N},{P}",  # text positive 2:1, image neutral 2:1 -> positive
            f"2\t{P},{P}\t{U},{P}\t{N},{P}",  # text has no majority
            f"3\t{P},{P}\t{P},{U}\t{P},{N}",  # image has none
            f"4\t{P},{N}\t{P},{N}\t{U},{U}",  # majorities of opposite polarity
            f"5\t{U},{N}\t{U},{N}\t{N},{P}"]  # neutral text, negative image -> negative
    posts, left_out = data.load_mvsa(write_labels(tmp_path / "anything", rows, 3))
    assert [(p.set, p.id, data.LABELS[p.label]) for p in posts] == [("multi", "1", P), ("multi", "5", N)]
    assert left_out.reasons == {"no majority": {"2", "3"}, "text and image of opposite polarity": {"4"}}


@pytest.mark.parametrize("row", ["1\tpositive", "1\tpositive,happy", "1\tpositive,neutral\tneutral,neutral", "1", "1\t,"])
def test_label_lines_of_another_format_are_refused(tmp_path, row):
    folder = write_labels(tmp_path / "set", ["7\tpositive,positive", row], 1, posts=False)
    with pytest.raises(data.DataError, match="line 3"):
        data.load_mvsa(folder)


def test_repeated_ids_and_unknown_headers_are_refused(tmp_path):
    with pytest.raises(data.DataError, match="second time"):
        data.load_mvsa(write_labels(tmp_path / "a", ["7\tpositive,positive", "7\tneutral,neutral"], 1))
    with pytest.raises(data.DataError, match="first line"):
        data.load_mvsa(write_labels(tmp_path / "b", [], 2))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_label_files_with_any_line_end_and_byte_order_mark_are_the_same(tmp_path, newline, mark):
    folder = write_labels(tmp_path / "set", ["1\tpositive,positive", "", "2\tNeutral , negative"], 1, newline, posts=False)
    labels = folder / "labelResultAll.txt"
    labels.write_bytes(mark + labels.read_bytes())
    assert data.read_labels(labels) == ({"1": 0, "2": 2}, {})


@pytest.mark.parametrize("content, text", [
    (b"plain\r\n", "plain"), ("caf\u00e9 \u4f60\u597d".encode(), "caf\u00e9 \u4f60\u597d"), (b"\xef\xbb\xbfbom", "bom"),
    ("\u4f60\u597d".encode("gb18030"), "\u4f60\u597d"), (b"caf\xe9", "caf\u00e9"), (b"", ""), (b"\xff\xff\xff", "\xff" * 3)])
def test_posts_in_any_encoding_are_read(content, text):
    assert data.decode(content) == text


@pytest.mark.parametrize("single, multi", [("MVSA_Single", "MVSA_Multiple"), ("MVSA-single", "MVSA-multiple"),
                                           ("x/MVSA_Single", "y/MVSA"), ("b", "a")])
def test_both_sets_are_found_by_their_headers(tmp_path, single, multi):
    write_labels(tmp_path / single, [], 1)
    write_labels(tmp_path / multi, [], 3)
    assert data.find_mvsa(tmp_path) == {"single": tmp_path / single, "multi": tmp_path / multi}
    assert data.find_mvsa(tmp_path / single) == {"single": tmp_path / single}
    with pytest.raises(data.DataError, match="two folders hold MVSA-single"):
        write_labels(tmp_path / "copy", [], 1)
        data.find_mvsa(tmp_path)


def test_ids_may_clash_between_the_sets(toy):
    posts = [p for folder in data.find_mvsa(toy / "mvsa").values() for p in data.load_mvsa(folder)[0]]
    assert len({p.id for p in posts}) < len(posts) == len({(p.set, p.id) for p in posts}) == 61 + 121


def test_splits_are_stratified_and_whole():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    parts = data.stratified_split(labels, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(1000)) and [len(p) for p in parts] == [800, 100, 100]
    for part in parts:
        assert np.allclose(np.bincount(labels[part]) / len(part), [0.6, 0.3, 0.1], atol=0.01)
    assert not np.array_equal(parts[2], data.stratified_split(labels, seed=1)[2])
    with pytest.raises(data.DataError, match="cannot split"):
        data.stratified_split(np.array([0, 0, 0, 1]), seed=0)


def write_split(folder, parts):
    folder.mkdir(parents=True)
    for name, entries in parts.items():
        content = [{"id": i, "text": "", "emotion_label": label} for i, label in entries]
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_published_split(tmp_path):
    posts = [data.Post("single", str(i), Path(), "", i % 3) for i in range(30)]
    entries = [(str(i), i % 3) for i in range(28)] + [("999", 0)]
    write_split(tmp_path / "MVSA-single" / "10-flod-1", {"train": entries[:20], "dev": entries[20:24], "test": entries[24:]})
    write_split(tmp_path / "MVSA-multiple" / "10-flod-1", {"train": [], "dev": [], "test": []})
    for folder in (tmp_path, tmp_path / "MVSA-single", tmp_path / "MVSA-single" / "10-flod-1"):
        parts, notes = data.published_split(folder, posts)
        assert [part.tolist() for part in parts] == [list(range(20)), [20, 21, 22, 23], [24, 25, 26, 27]]
        assert notes["listed, but not among the posts"] == 1 and notes["not listed, so not used"] == 2
    wrong = [data.Post("single", p.id, p.image, "", (p.label + 1) % 3) for p in posts]
    with pytest.raises(data.DataError, match="not a split of MVSA-single"):
        data.published_split(tmp_path, wrong)
    with pytest.raises(data.DataError, match="found 0"):
        data.published_split(tmp_path / "MVSA-multiple", posts)


# -- pretrain.py --------------------------------------------------------------------------------------------------------


def test_schedules():
    assert [pretrain.linear(s, 101, 0.996, 1.0) for s in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1.0])
    assert [pretrain.cosine(s, 101, 0.04, 0.4) for s in (0, 25, 50, 100)] == pytest.approx([0.04, 0.0927208, 0.22, 0.4])
    lr = [pretrain.warmup_cosine(s, 101, 10, 2e-4, 1e-3, 1e-6) for s in range(101)]
    assert [lr[0], lr[5], lr[10], lr[55], lr[100]] == pytest.approx([2e-4, 6e-4, 1e-3, 5.005e-4, 1e-6])
    assert pretrain.warmup_cosine(0, 1, 0, 2e-4, 1e-3, 1e-6) == 1e-3  # a run of one step


def test_biases_and_norms_are_not_decayed(net):
    decayed, plain = (group["params"] for group in pretrain.build_optimizer(net, torch.device("cpu")).param_groups)
    names = {id(p): name for name, p in net.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] or "_proj.1" in names[id(p)] for p in plain)
    assert all(names[id(p)].endswith(("weight", "mask_token")) for p in decayed)
    assert len(decayed) + len(plain) == sum(p.requires_grad for p in net.parameters())


def test_accumulation_equals_the_large_batch():
    pictures, texts = torch.randn(7, 3, 48, 48, generator=seeded(5)), (TEXTS * 3)[:7]
    results = []
    for sizes in ([7], [3, 3, 1]):
        torch.manual_seed(0)
        net = model.TIJEPA(CONFIG).double()
        optimizer = pretrain.build_optimizer(net, torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = 0.1
        ends = np.cumsum(sizes)
        micro = [data.RawBatch(pictures[e - n:e].double(), texts[e - n:e], []) for e, n in zip(ends, sizes)]
        loss, norm = pretrain.train_step(net, net, optimizer, torch.amp.GradScaler("cpu", enabled=False), micro,
                                         sample_masks(net.grid, 7, seeded(0)), 1.0)
        results.append((loss.item(), norm.item(), [p.grad for p in net.parameters() if p.grad is not None]))
    (loss, norm, grads), (loss2, norm2, grads2) = results
    # the error itself is taken in float32 (as under autocast), so equality is to float32's rounding
    assert loss2 == pytest.approx(loss, rel=1e-6) and norm2 == pytest.approx(norm, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(grads, grads2)) and len(grads) > 20


def test_gradients_are_clipped(net, images):
    optimizer = pretrain.build_optimizer(net, torch.device("cpu"))
    batch = data.RawBatch(images, TEXTS, [])
    _, norm = pretrain.train_step(net, net, optimizer, torch.amp.GradScaler("cpu", enabled=False), [batch],
                                  sample_masks(net.grid, 3, seeded(0)), 1e-3)
    clipped = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
    assert norm > 1e-2 and clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_std_and_rank_show_a_collapse():
    positions_only = torch.randn(1, 36, 8, generator=seeded(0)).expand(20, -1, -1)  # the same for every image
    assert model.sample_std(positions_only) < 1e-6
    assert model.sample_std(torch.randn(2000, 4, 8, generator=seeded(0))) == pytest.approx(1, abs=0.02)
    one_direction = torch.randn(50, 1, generator=seeded(0)) * torch.randn(1, 8, generator=seeded(1))
    assert model.effective_rank(one_direction + 3) == pytest.approx(1, abs=0.01)
    assert model.effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(4, abs=1e-3)  # four equal directions


def test_vicreg_term_equals_a_plain_loop():
    context = torch.randn(6, 5, 3, generator=seeded(0)) * torch.tensor([0.3, 1.0, 3.0])
    z = context.mean(1).double().numpy()
    covariance = np.cov(z, rowvar=False)
    variance = np.mean([max(0, 1 - np.sqrt(covariance[d, d] + 1e-4)) for d in range(3)])
    expected = variance + sum(covariance[i, j] ** 2 for i in range(3) for j in range(3) if i != j) / 3 / 25
    assert model.vicreg_term(context).item() == pytest.approx(expected, rel=1e-4)


def test_vicreg_term_adds_to_the_loss_and_not_to_the_energy(images):
    outs = []
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        net = model.TIJEPA(replace(CONFIG, vicreg=weight))
        masks = sample_masks(net.grid, 3, seeded(0))
        outs.append(net(*net.frozen(images, TEXTS), masks))
    s_image, text = net.image_encoder(images), net.text_encoder(TEXTS)
    term = model.vicreg_term(net.context_encoder(model.gather(s_image, masks.context), *text))
    assert torch.equal(outs[0].energy, outs[1].energy) and term > 0.1
    assert (outs[1].loss - outs[0].loss).item() == pytest.approx(2 * term.item(), rel=1e-4)


def test_image_target_is_the_frozen_encoders_and_blind_to_the_caption(images):
    torch.manual_seed(0)
    net = model.TIJEPA(replace(CONFIG, target="image"))  # D is 32, D_I is 96
    masks = sample_masks(net.grid, 3, seeded(0))
    out, other = net(*net.frozen(images, TEXTS), masks), net(*net.frozen(images, TEXTS[::-1]), masks)
    s_image = net.image_encoder(images)
    expected = (s_image - s_image.mean(-1, keepdim=True)) / (s_image.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = torch.stack([expected[b, masks.target[b]] for b in range(3)])  # [B, M, P, D_I]
    assert torch.allclose(out.target, expected, atol=1e-5) and torch.equal(out.target, other.target)
    out.loss.backward()
    with torch.no_grad():
        for p in net.context_encoder.parameters():
            p.sub_(p.grad)
    net.update_target(0.0)
    assert torch.equal(net(*net.frozen(images, TEXTS), masks).target, out.target)  # training cannot move it
    with pytest.raises(ValueError, match="target must be"):
        model.TIJEPA(replace(CONFIG, target="text"))


def test_judge_by_hand():
    energies = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 0.5], [0.0, 0.0, 5.0]])
    figures = pretrain.judge(energies)
    assert figures["auc"] == pytest.approx((2 + 1 + 0) / 6)
    assert figures["auc_pooled"] == pytest.approx((3 + 3 + 0) / 18)  # matched 1, 1, 5; others 2, 3, 2, .5, 0, 0
    assert figures["recall@1"] == pytest.approx(1 / 3) and figures["recall@5"] == 1.0
    assert figures["energy"] == pytest.approx(7 / 3) and figures["energy_wrong"] == pytest.approx(7.5 / 6)
    flat = pretrain.judge(torch.ones(10, 10))  # an energy that says nothing must not score
    assert flat["auc"] == flat["auc_pooled"] == 0.5 and flat["recall@1"] == flat["recall@5"] == 0


def test_energies_do_not_depend_on_which_caption_is_the_right_one(net, images):
    """The leak that would fake an AUC: a pair's energy must be the same wherever it stands in the matrix."""
    pairs = pretrain.Pairs(net, data.RawBatch(images, TEXTS, []))
    matrix = pretrain.energy_matrix(net, pairs, draws=2)
    turned = pretrain.Pairs(net, data.RawBatch(images, TEXTS[1:] + TEXTS[:1], []))
    turned = pretrain.energy_matrix(net, turned, draws=2)
    assert torch.allclose(turned, matrix.roll(-1, dims=1), atol=1e-6) and matrix.shape == (3, 3)
    figures = pretrain.monitor(net, pairs)
    again = pretrain.monitor(net.train(), pairs)
    assert figures == again and net.training  # same masks each time


# -- devices and precision ----------------------------------------------------------------------------------------------


class OneDevice(TorchDispatchMode):
    """Fails for an operation on tensors of two devices: on meta most would be let through, unlike on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        assert moves or len({tensor.device for tensor in tensors}) <= 1, f"{func}: {[tensor.device for tensor in tensors]}"
        return func(*args, **(kwargs or {}))


def test_masks_go_where_the_model_is(net):
    """On an MPS they stayed on the CPU."""
    assert {index.device.type for index in pretrain.step_masks(net.to("meta"), 0, 0, 3)} == {"meta"}


@pytest.mark.parametrize("change", [dict(), dict(target="image"), dict(self_attention=True, vicreg=1.0)])
def test_all_stays_on_the_device_of_the_model(images, monkeypatch, change):
    """On torch's meta device, where a tensor has no values: asking for one is an error, as is a tensor left on the CPU."""
    net = model.TIJEPA(replace(CONFIG, **change)).to("meta")
    text = torch.ones(3, 5, dtype=torch.bool)
    batch = data.FeatureBatch(torch.randn(3, 36, 96), torch.randn(3, 5, 96), text, [])
    optimizer, scaler = pretrain.build_optimizer(net, net.device), torch.amp.GradScaler("meta", enabled=False)
    with OneDevice():
        for step in range(2):  # the second finds the optimizer's state
            masks = pretrain.step_masks(net, 0, step, 3)
            given = list(pretrain.train_step(net, net, optimizer, scaler, [batch], masks, 1.0))
            net.update_target(0.9)
        given += net(*batch.features(net), masks)
        given += [value for state in optimizer.state.values() for value in (state["exp_avg"], state["exp_avg_sq"])]
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)  # the rank's way over the CPU, for MPS
        given += pretrain.held_out_figures(net, pretrain.Pairs(net, batch)).values()
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: False)  # transformers asks if nothing is padded
        given += net.encode(images, TEXTS)
    assert len(given) > 100 and {value.device.type for value in [*given, *net.state_dict().values()]} == {"meta"}


class Elsewhere(torch.Tensor):
    """A tensor as of a GPU to numpy: it cannot be converted before .cpu()."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *rest, **options):
        return self.numpy()

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_pictures_are_drawn_of_tensors_on_any_device(net, tmp_path):
    masks = [Masks(*(index.as_subclass(kind) for index in pretrain.step_masks(net, 0, 0, 1)))
             for kind in (Elsewhere, torch.Tensor)]
    for name, each in zip(("gpu", "cpu"), masks):
        pretrain.draw_masks(Image.new("RGB", (48, 48), "red"), net.grid, each, tmp_path / f"{name}.png")
    assert (tmp_path / "gpu.png").read_bytes() == (tmp_path / "cpu.png").read_bytes()


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_no_caller_can_forget_the_autocast(net, images, dtype, tolerance):
    """--bench did: features of the device's dtype met weights of float32."""
    masks = sample_masks(net.grid, 3, seeded(0))
    exact, (tokens, pooled) = net(*net.frozen(images, TEXTS), masks), net.encode(images, TEXTS)
    net.precision, half = dtype, getattr(torch, dtype)
    s_image, s_text, text_mask = data.FeatureBatch(*net.frozen(images, TEXTS), []).features(net)
    rounded = net(s_image.to(half), s_text.to(half), text_mask, masks)
    rounded.loss.backward()
    assert s_image.dtype == s_text.dtype == half and rounded.prediction.dtype == half
    assert all(p.grad is None or p.grad.dtype == p.dtype == torch.float32 for p in net.parameters())
    assert torch.allclose(rounded.energy, exact.energy, rtol=tolerance) and not torch.equal(rounded.energy, exact.energy)
    coarse = net.encode(images, TEXTS)
    assert {part.dtype for part in coarse} == {torch.float32}
    assert torch.allclose(coarse[0], tokens, atol=10 * tolerance) and torch.allclose(coarse[1], pooled, atol=10 * tolerance)


def test_mixed_precision_learns_what_float32_learns(toy):
    """400 steps on 16 pairs, by when each picture knows its caption. (The whole toy preset: README.)"""
    items, results = data.CocoCaptions(toy / "coco").items[:16], []
    config = replace(CONFIG, target="image", depth=1, heads=2, predictor_depth=1, predictor_heads=1,
                     vocabulary=sorted({word for _, words, in data.COLOURS for word in words}))
    for dtype in ("float32", "bfloat16", "float16"):
        torch.manual_seed(0)
        net = model.TIJEPA(config)
        net.precision, losses = dtype, []
        batch = data.FeatureBatch(*data.Pictures(items, net.image_encoder.data_config)[[(i, i, 0) for i in range(16)]]
                                  .features(net), [])
        optimizer, scaler = pretrain.build_optimizer(net, net.device), torch.amp.GradScaler("cpu", enabled=dtype == "float16")
        for step in range(400):
            for group in optimizer.param_groups:
                group["lr"] = pretrain.warmup_cosine(step, 400, 40, 6e-4, 3e-3, 1e-6)
            masks = pretrain.step_masks(net, 0, step, 16)
            losses.append(pretrain.train_step(net, net, optimizer, scaler, [batch], masks, 1.0)[0].item())
        auc = pretrain.judge(pretrain.energy_matrix(net.eval(), pretrain.Pairs(net, batch), 1))["auc"]
        results.append((auc, np.mean(losses[-30:])))
    (exact, loss), *rounded = results
    assert exact > 0.97 and loss < 0.3 < losses[0]
    assert all(abs(auc - exact) < 0.02 and abs(value / loss - 1) < 0.05 and value != loss for auc, value in rounded), results


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fine_tuning_in_mixed_precision_is_that_of_float32(posts, monkeypatch, dtype):
    train, validation, _ = data.stratified_split(posts.labels, 0)
    y, encoder, found = posts.labels, posts.net.target_encoder, []
    monkeypatch.setattr(finetune_mvsa, "LEARNING_RATES", (5e-4,))
    probes = [finetune_mvsa.fit_head(posts.features[name], y, train, validation)
              for name in (finetune_mvsa.PRETRAINED, finetune_mvsa.BOTH)]
    for precision in ("float32", dtype):
        monkeypatch.setattr(posts.net, "precision", precision)
        classifier, choice = finetune_mvsa.finetune(encoder, probes, posts, y, train, validation, posts.args, 0)
        found.append((choice["loss"], finetune_mvsa.predict(classifier, posts, validation)))
        assert choice["epoch"] > 0 and all(p.dtype == torch.float32 for p in classifier.parameters())
    assert posts.inputs([0])[0].dtype == getattr(torch, dtype)
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02) and np.allclose(found[1][1], found[0][1], atol=0.05)
    assert not np.array_equal(found[1][1], found[0][1])


def test_dtype_of_a_device(net, monkeypatch):
    cpu, mps, cuda = map(torch.device, ("cpu", "mps", "cuda"))
    assert model.amp_dtype(cpu) == model.amp_dtype(mps) == net.dtype == torch.float32
    assert [model.amp_dtype(cpu, name) for name in model.PRECISIONS[1:]] == [torch.float32, torch.bfloat16, torch.float16]
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
        assert model.amp_dtype(cuda) == dtype and model.amp_dtype(cuda, "float32") == torch.float32


def test_the_named_gpu_is_used_for_everything(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    assert model.choose_device("cpu").type == "cpu" and asked == []
    assert model.choose_device("cuda:1") == torch.device("cuda:1") and asked == ["high", torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="of a machine without")
def test_a_gpu_that_torch_cannot_use_stops_the_run(tmp_path, monkeypatch):
    assert model.choose_device("auto").type == "cpu"
    (tmp_path / "nvidia-smi").write_text("""#!/bin/bash
        case "$*" in
            -L) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)";;
            "--query-gpu=driver_version --format=csv,noheader") echo 525.60.13;;
            *) exit 1;;
        esac""")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for built, words in (("13.0", "for CUDA 13.0.*install a newer driver"), (None, "without CUDA.*install a torch with CUDA")):
        monkeypatch.setattr(torch.version, "cuda", built)
        with pytest.raises(model.ModelError, match=f"driver 525.60.13.*{words}.*--device cpu"):
            model.choose_device("auto")
    assert model.choose_device("cpu").type == "cpu"
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\necho 'No devices were found'; exit 6")
    assert model.choose_device("auto").type == "cpu"


# -- the feature cache --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A toy model and 41 items of the toy data that it can encode."""
    torch.manual_seed(0)
    return model.TIJEPA(replace(CONFIG, vocabulary=sorted({word for _, words, in data.COLOURS for word in words})))


def make(root, items, net, dtype="float32"):
    return data.feature_cache(root, items, net, dtype, 0)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 3e-3), ("bfloat16", 3e-2)])
def test_cached_features_are_those_encoded_on_the_fly(toy, small, tmp_path, dtype, tolerance):
    items = data.CocoCaptions(toy / "coco").items
    draws = [(40, 40, 0), *((i, (i + 3) % 40, i % 5) for i in range(39, 0, -2))]  # the first is broken
    cached = make(tmp_path, items, small, dtype)[draws]
    fresh = data.Pictures(items, small.image_encoder.data_config)[draws]
    assert cached.left_out == fresh.left_out == [40] and cached.size == fresh.size == 20
    (s_image, s_text, mask), (expected, text, text_mask) = cached.features(small), fresh.features(small)
    assert s_image.dtype == torch.float32 and torch.equal(mask, text_mask)
    assert torch.allclose(s_image, expected, atol=tolerance)
    assert torch.allclose(s_text[mask], text[mask], atol=tolerance) and (s_text[~mask] == 0).all()
    masks = sample_masks(small.grid, 20, seeded(0))
    energies = [small(*batch.features(small), masks).energy for batch in (cached, fresh)]
    assert torch.allclose(*energies, rtol=10 * tolerance)


def test_texts_that_are_cut_are_counted(toy, small, tmp_path, capsys):
    (first, _), (second, _) = data.CocoCaptions(toy / "coco").items[:2]
    make(tmp_path, [(first, ["red", "red " * 63]), (second, ["red " * 500])], small)  # [CLS] and [SEP] count as well
    assert "2 texts have 64 tokens or more, of which f_T reads 64" in capsys.readouterr().out
    make(tmp_path, [(first, ["red " * 61])], small)
    assert "tokens or more" not in capsys.readouterr().out


def test_all_of_a_batch_may_be_broken(toy, small, tmp_path):
    items = data.CocoCaptions(toy / "coco").items[-1:] * 3  # a cache of nothing but broken images
    for source in (make(tmp_path, items, small), data.Pictures(items, small.image_encoder.data_config)):
        batch = source[[(0, 0, 0), (2, 2, 1)]]
        assert batch.size == 0 and batch.left_out == [0, 2]


def test_another_recipe_never_meets_an_old_cache(toy, small, tmp_path):
    items, folders = [(tmp_path / path.name, texts) for path, texts in data.CocoCaptions(toy / "coco").items[:4]], []
    for path, _ in items:
        (tmp_path / path.name).write_bytes((toy / "coco" / "train2017" / path.name).read_bytes())

    def folder(items=items, net=small, dtype="float32"):
        return make(tmp_path / "cache", items, net, dtype).folder

    first = folder()
    assert folder() == first and len(list((tmp_path / "cache").iterdir())) == 2  # one folder and .lock
    other = model.TIJEPA(small.config)
    with torch.no_grad():
        other.image_encoder.vit.blocks[0].mlp.fc1.bias[0] += 1e-3
    words = model.TIJEPA(replace(small.config, vocabulary=small.config.vocabulary[::-1]))  # another tokenizer
    squeezed = model.TIJEPA(small.config)
    squeezed.image_encoder.data_config["mean"] = (0.1, 0.2, 0.3)
    texts = [(path, ["red " + texts[0], *texts[1:]]) for path, texts in items]
    folders = [first, folder(net=other), folder(net=words), folder(net=squeezed), folder(dtype="float16"), folder(texts),
               folder(items[:3]), folder(items[::-1])]
    Image.open(items[0][0]).rotate(90).save(items[0][0])  # the same name, another picture
    folders.append(folder())
    assert len(set(folders)) == len(folders)
    stored = json.loads((first / "recipe.json").read_text())
    (folders[-1] / "recipe.json").write_text(json.dumps(stored))  # a folder that is not what its name says
    with pytest.raises(data.DataError, match="differs in files"):
        folder()


def test_an_interrupted_encode_goes_on_to_the_same_bytes(toy, small, tmp_path, monkeypatch, capsys):
    items = data.CocoCaptions(toy / "coco").items
    monkeypatch.setattr(data, "ENCODE_BATCH", 8)
    whole, calls, frozen = make(tmp_path / "whole", items, small).folder, [], small.frozen_image

    def interrupted(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return frozen(images)

    with monkeypatch.context() as patch:
        patch.setattr(small, "frozen_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cut", items, small)
        part, = (tmp_path / "cut").glob("*.part")
        with open(part / "image.bin", "ab") as file:  # and the last write was torn
            file.write(b"torn")
        calls[:] = [0] * 10
        resumed = make(tmp_path / "cut", items, small).folder
    # 6 chunks: 3 were done before, and the last one's only picture is broken
    assert len(calls) == 10 + 2 and "going on at image 24" in capsys.readouterr().out
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in resumed.iterdir()) and "image.bin" in names
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)


def test_a_full_disk_is_said_before_and_cleaned_after(toy, small, tmp_path, monkeypatch):
    items = data.CocoCaptions(toy / "coco").items
    needed = sum(path.stat().st_size for path in make(tmp_path / "whole", items, small).folder.glob("*.*y")) + sum(
        (next((tmp_path / "whole").glob("*/")) / name).stat().st_size for name in ("image.bin", "text.bin"))
    for free in (needed - 200, needed + 200):  # offsets.npy has a header of 128 bytes
        monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
        if free < needed:
            with pytest.raises(data.DataError, match=r"takes .* GB in .*--cache off"):
                make(tmp_path / "full", items, small)
            assert [path.name for path in (tmp_path / "full").iterdir()] == [".lock"]
        else:
            make(tmp_path / "full", items, small)

    def no_space(descriptor):
        raise OSError(data.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", no_space)  # another process filled it meanwhile
    with pytest.raises(data.DataError, match="--cache off"):
        make(tmp_path / "filled", items, small)
    assert [path.name for path in (tmp_path / "filled").iterdir()] == [".lock"]


def test_features_that_float16_cannot_hold_are_refused(toy, small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "frozen_image", lambda images, f=small.frozen_image: f(images) * 1e6)
    items = data.CocoCaptions(toy / "coco").items
    with pytest.raises(data.DataError, match="--cache_dtype bfloat16"):
        make(tmp_path, items, small, "float16")
    assert make(tmp_path, items, small, "bfloat16")[[(0, 0, 0)]].s_image.isfinite().all()


def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    y, x = np.mgrid[:1200, :1600]
    smooth = np.stack([x / 1600, y / 1200, np.sin(x / 150) / 2 + 0.5], axis=-1) * 255
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "large.jpg", quality=95)
    config = dict(input_size=(3, 64, 64), interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    whole, drafted = data.read_image(tmp_path / "large.jpg"), data.read_image(tmp_path / "large.jpg", (64, 64))
    assert whole.size == (1600, 1200) and 128 <= min(drafted.size) < 300
    a, b = (data.image_transform(config)(image) for image in (whole, drafted))
    assert (a - b).abs().max() < 0.05 and a.std() > 0.3
    assert data.read_image(tmp_path / "large.jpg", (448, 448)).size == (1600, 1200)  # not twice as large: as it is


# -- finetune_mvsa.py ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posts(toy, small, tmp_path_factory):
    """The toy posts of MVSA-Single with what every encoder says of them."""
    args = finetune_mvsa.parse_args(["--seeds", "0", "--workers", "0", "--cache", str(tmp_path_factory.mktemp("cache")),
                                     "--finetune_epochs", "2"])
    found, left_out = data.load_mvsa(toy / "mvsa" / "MVSA_Single")
    return finetune_mvsa.Posts(small, found, left_out, args)


def test_nothing_that_is_chosen_or_trained_sees_a_test_label(posts):
    train, validation, test = data.stratified_split(posts.labels, 0)
    scrambled = posts.labels.copy()
    scrambled[test] = (scrambled[test] + 1) % 3
    heads, tuned, x = [], [], posts.features[finetune_mvsa.PRETRAINED]
    for y in (posts.labels, scrambled):
        head, choice = finetune_mvsa.fit_head(x, y, train, validation)
        heads.append((choice, head[-1].coef_.tolist()))
        probes = [finetune_mvsa.fit_head(posts.features[name], y, train, validation)
                  for name in (finetune_mvsa.PRETRAINED, finetune_mvsa.BOTH)]
        classifier, choice = finetune_mvsa.finetune(posts.net.target_encoder, probes, posts, y, train, validation, posts.args, 0)
        tuned.append((choice, classifier.state_dict()))
    assert heads[0] == heads[1] and tuned[0][0] == tuned[1][0]
    assert all(torch.equal(a, b) for a, b in zip(tuned[0][1].values(), tuned[1][1].values()))
    shifted = posts.labels.copy()
    shifted[train] = (shifted[train] + 1) % 3  # but the labels it is to learn from do matter
    assert heads[0][1] != finetune_mvsa.fit_head(x, shifted, train, validation)[0][-1].coef_.tolist()


def test_fine_tuning_starts_as_the_probe_and_trains_target_encoder_and_head(posts, monkeypatch):
    train, validation, _ = data.stratified_split(posts.labels, 0)
    x, y, encoder = posts.features[finetune_mvsa.PRETRAINED], posts.labels, posts.net.target_encoder
    head, _ = finetune_mvsa.fit_head(x, y, train, validation)
    both = posts.features[finetune_mvsa.BOTH]
    beside = finetune_mvsa.Classifier(encoder, finetune_mvsa.fit_head(both, y, train, validation)[0], True,
                                      posts.net.autocast)
    expected = finetune_mvsa.fit_head(both, y, train, validation)[0].predict_proba(both[train])
    assert np.allclose(finetune_mvsa.predict(beside, posts, train), expected, atol=1e-3)
    start = finetune_mvsa.Classifier(encoder, head, False, posts.net.autocast)
    assert np.allclose(finetune_mvsa.predict(start, posts, train), head.predict_proba(x[train]), atol=1e-3)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    moved = finetune_mvsa.Classifier(encoder, head, False, posts.net.autocast)
    optimizer = torch.optim.AdamW(moved.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    finetune_mvsa.train_epoch(moved, optimizer, scaler, posts, y, train, torch.ones(3))
    changed = {name for (name, a), b in zip(moved.state_dict().items(), start.state_dict().values()) if not torch.equal(a, b)}
    assert {"head.weight", "encoder.blocks.0.cross.q.weight", "encoder.text_proj.0.weight"} <= changed
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())  # the checkpoint's is not
    monkeypatch.setattr(finetune_mvsa, "train_epoch", lambda classifier, *rest: classifier.head.bias.data.add_(
        torch.tensor([1e3, 0, 0])))  # training that makes all worse: the probe itself is kept
    probes = [finetune_mvsa.fit_head(features, y, train, validation) for features in (x, both)]
    kept, choice = finetune_mvsa.finetune(encoder, probes, posts, y, train, validation, posts.args, 0)
    probe = beside if choice["beside the frozen features"] else start
    assert choice["epoch"] == 0 and torch.equal(kept.head.bias, probe.head.bias)


def test_the_other_modality_empty_means_that_it_does_not_matter(posts, small):
    one, other = posts.posts[0], posts.posts[1]
    swapped = [replace(one, image=other.image), replace(one, text=other.text)]
    again = finetune_mvsa.Posts(small, [one, other, *swapped], data.LeftOut(), posts.args).features
    text_alone, image_alone = again[finetune_mvsa.NO_IMAGE], again[finetune_mvsa.NO_TEXT]
    assert np.allclose(text_alone[0], text_alone[2], atol=1e-5) and not np.allclose(text_alone[0], text_alone[3], atol=1e-3)
    assert np.allclose(image_alone[0], image_alone[3], atol=1e-5) and not np.allclose(image_alone[0], image_alone[2], atol=1e-3)


def test_bootstrap_by_hand():
    lines = [{"seed": seed, "id": str(i), "row": row, "label": "a", "prediction": "a" if right else "b"}
             for seed in (0, 1) for i in range(200) for row, right in (("new", i % 4 != 0), ("old", i % 2 == 0))]
    difference, low, high = finetune_mvsa.bootstrap(lines, "new", "old")
    assert difference == pytest.approx(25)  # right in 150 against 100 of 200
    # gains of +1 (100 posts), 0 (50) and -1 (50): the deviation of the mean over 200 posts, both seeds being the same posts
    deviation = 100 * (((100 * 0.75 ** 2 + 50 * 0.25 ** 2 + 50 * 1.25 ** 2) / 200) / 200) ** 0.5
    assert low == pytest.approx(25 - 1.96 * deviation, abs=1.5) and high == pytest.approx(25 + 1.96 * deviation, abs=1.5)
    assert finetune_mvsa.bootstrap(lines, "new", "new") == [0, 0, 0]


def make_posts(texts, tmp_path, images=None):
    posts = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.jpg").write_bytes(b"image" + bytes([i if images is None else images[i]]))
        posts.append(data.Post("single", str(i), tmp_path / f"{i}.jpg", text, i % 3))
    return posts


def test_repeated_posts_are_one_group(tmp_path):
    texts = ["Good day! http://t.co/x", "RT @someone: good DAY", "good night", "something", "http://t.co/a", "@you http://t.co/b",
             "a chain", "else"]
    groups = data.duplicate_groups(make_posts(texts, tmp_path, images=[0, 1, 2, 3, 4, 5, 6, 2]))
    assert groups[0] == groups[1] and groups[2] == groups[7]  # the same words; the same bytes
    assert len(set(groups)) == 6 and groups[4] != groups[5]  # no words at all are not the same words
    chain = make_posts(["one", "one", "two"], tmp_path, images=[0, 1, 1])
    assert len(set(data.duplicate_groups(chain))) == 1


def test_grouped_split_keeps_groups_whole_and_classes_even():
    rng = np.random.default_rng(0)
    labels, groups = rng.choice(3, 1000, p=[0.6, 0.1, 0.3]), np.arange(1000)
    groups[500:600] = np.repeat(np.arange(20), 5)  # and posts 0-19 with them
    parts = data.grouped_split(labels, groups, 0)
    assert sorted(np.concatenate(parts)) == list(range(1000)) and [round(len(p) / 100) for p in parts] == [8, 1, 1]
    assert all(not set(groups[a]) & set(groups[b]) for a, b in ((parts[0], parts[1]), (parts[0], parts[2]), (parts[1], parts[2])))
    assert all(abs((labels[p] == c).mean() - (labels == c).mean()) < 0.03 for p in parts for c in range(3))
    assert not np.array_equal(parts[2], data.grouped_split(labels, groups, 1)[2])


def test_the_authors_protocol_pools_and_upsamples():
    labels = np.repeat([0, 1, 2], [60, 10, 30])
    parts = data.random_split(labels, 0)
    assert sorted(np.concatenate(parts)) == list(range(100)) and [len(p) for p in parts] == [80, 10, 10]
    assert not np.array_equal(parts[2], data.random_split(labels, 1)[2])
    train = data.upsample(parts[0], labels, 0)
    assert set(train) == set(parts[0]) and len(set(np.bincount(labels[train]))) == 1


def test_label_counts_of_files_like_the_official_ones(tmp_path):
    """Both files of the size of the official ones, each case as often as it is said to come in them."""
    P, U, N = data.LABELS
    single = {(P, P): 1400, (P, U): 700, (U, P): 583, (U, U): 470, (N, N): 600, (N, U): 400, (U, N): 358, (P, N): 200, (N, P): 158}
    lines = [f"{text},{image}" for (text, image), count in single.items() for _ in range(count)]
    (tmp_path / "labelResultAll.txt").write_bytes("\r\n".join(
        ["ID\ttext,image", *(f"{i}\t{line}" for i, line in enumerate(lines, 1)), ""]).encode())
    kept, dropped = data.read_labels(tmp_path / "labelResultAll.txt")
    assert len(lines) == 4869 and len(kept) == 4511 and list(np.bincount(list(kept.values()))) == [2683, 470, 1358]
    assert sum(reason.startswith("text and image") for reason in dropped.values()) == 358
    multi = {((P, P), (P, P), (N, U)): 11000, ((P, U), (U, U), (P, N)): 320, ((U, U), (U, U), (P, N)): 4408,
             ((N, N), (N, U), (U, N)): 1299, ((P, U), (U, U), (N, U)): 2000, ((P, P), (P, N), (P, U)): 231,
             ((P, N), (P, N), (U, U)): 342}
    lines = ["\t".join(f"{text},{image}" for text, image in votes) for votes, count in multi.items() for _ in range(count)]
    (tmp_path / "labelResultAll.txt").write_text("\n".join(
        ["ID\ttext,image\ttext,image\ttext,image", *(f"{i}\t{line}" for i, line in enumerate(lines, 1))]))
    kept, dropped = data.read_labels(tmp_path / "labelResultAll.txt")
    assert len(lines) == 19600 and len(kept) == 17027 and list(np.bincount(list(kept.values()))) == [11320, 4408, 1299]
    assert sum(reason == "no majority" for reason in dropped.values()) == 2231


def test_untrained_target_encoder_is_not_the_pretrained_one(net):
    fresh = [finetune_mvsa.untrained(net, seed).encoder.blocks[0].cross.q.weight for seed in (0, 0, 1)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    assert not torch.equal(fresh[0], net.target_encoder.encoder.blocks[0].cross.q.weight)


# -- the documented commands, on a few toy samples ------------------------------------------------------------------------


WORK = tempfile.mkdtemp()  # where the commands run: their caches and results go here
os.environ["PYTHONPATH"] = str(HERE)  # for the fork server, which imports this module
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_model"])


def in_child(script, options, out, folder):
    """What a child of the fork server runs: `python script options` in `folder`, with its output to files."""
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # or a DataLoader would start a fork server of its own
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.exit(importlib.import_module(script.removesuffix(".py")).main(options))


def start(script, *options):
    """`python script options` as a process of its own, without the seconds that its imports take -> (process, folder of its
    stdout and stderr)."""
    out = tempfile.mkdtemp()
    process = SERVER.Process(target=in_child, args=(script, [str(option) for option in options], out, WORK))
    process.start()
    return process, Path(out)


def run(script, *options):
    process, out = start(script, *options)
    process.join(300)
    return subprocess.CompletedProcess(options, process.exitcode, *((out / name).read_text() for name in ("stdout", "stderr")))


def run_command(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=WORK, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="session")
def pretrained(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    done = run_command(HERE / "pretrain.py", "--preset", "toy", "--coco", toy / "coco", "--out", out, "--epochs", 2, "--batch_size",
                       16, "--accumulate", 2, "--log_every", 3, "--held_out", 8, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return out, done


def test_pretrain_end_to_end(pretrained):
    out, done = pretrained
    assert done.stdout.startswith("pretrain: preset toy, 33 images") and '"momentum": 0.996' in done.stdout
    assert "1 image not on disk, 1 broken image" in done.stdout and done.stderr.count("000000000040.jpg") == 1
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4] and lines[-1]["momentum"] == 1.0
    assert set(lines[0]) == {"step", "epoch", "loss", "lr", "wd", "momentum", "grad_norm", "skipped_steps", "images_per_s",
                             "data_wait", "energy", "energy_wrong", "lower", "target_std", "prediction_std",
                             "target_rank", "read", "left_out"}
    assert lines[-1]["read"] == {"images": 40, "captions": 200}
    assert lines[-1]["left_out"] == {"image not on disk": 1, "broken image": 1}
    assert "read 40 images, 200 captions; left out: 1 image not on disk, 1 broken image" in done.stdout
    assert all(name in pretrain.__doc__ for name in lines[0]) and 0.3 < lines[0]["loss"] < 3
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["args"]["epochs"] == 2 and checkpoint["config"]["dim"] == 96 and checkpoint["step"] == 4
    assert {reason: len(names) for reason, names in checkpoint["left_out"].items()} == lines[-1]["left_out"]


def test_cache_and_no_cache_have_the_same_loss_curve(toy, tmp_path):
    losses = []
    for name, options in (("off", []), (tmp_path / "cache", ["--cache_dtype", "float32"])):
        done = run("pretrain.py", "--coco", toy / "coco", "--out", tmp_path / "out", "--epochs", 4, "--batch_size", 8,
                   "--held_out", 8, "--log_every", 1, "--device", "cpu", "--target", "ema", "--cache", name, *options)
        assert done.returncode == 0, done.stderr
        losses.append([json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 16 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert "encode:" in done.stderr and "features:" in done.stdout


def test_bench_prints_what_the_readme_explains(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "BENCH_STEPS", 4)
    monkeypatch.setattr(pretrain, "BENCH_REPEATS", 2)
    assert pretrain.main(["--bench", "--coco", str(toy / "coco"), "--cache", str(tmp_path), "--batch_size", "8",
                          "--held_out", "8", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = {line[:52].strip(): float(line[52:]) for line in lines if line[50:52] == "  "}
    readme = " ".join((HERE / "README.md").read_text().split())
    assert len(figures) == 14 and all(name.split(",")[0] in readme for name in figures)
    for kind in ("cached", "uncached"):  # which is faster is not for a test of 4 steps of the toy to say
        images = figures[f"{kind}, images/s"] * figures[f"{kind}, ms per step"] / 1000
        assert images == pytest.approx(8, rel=0.05) and 0 <= figures[f"{kind}, waiting for data, %"] < 100
    assert 0.1 < figures["ratio cached / uncached"] < 10
    frozen, trained = (figures[f"{name}, GFLOP per image"] for name in ("frozen", "trained"))
    assert figures["ratio that the FLOPs promise"] == pytest.approx((frozen + trained) / trained, rel=1e-3)
    # f_I by hand: 37 tokens of width 96, 2 blocks of 12 D^2 + 2 N D multiply-adds, and 36 patches of 192 values embedded
    by_hand = 2 * (2 * 37 * (12 * 96 ** 2 + 2 * 37 * 96) + 36 * 192 * 96) / 1e9
    assert by_hand < frozen < 1.6 * by_hand  # the rest is f_T
    assert [path.name for path in tmp_path.iterdir()] == []  # its cache was its own


def test_pretraining_is_repeatable(toy, pretrained, tmp_path):
    out, _ = pretrained
    for seed in (0, 1):
        assert run("pretrain.py", "--preset", "toy", "--coco", toy / "coco", "--out", tmp_path / str(seed), "--epochs", 2,
                   "--batch_size", 16, "--accumulate", 2, "--seed", seed, "--held_out", 8, "--device", "cpu").returncode == 0
    weights = [torch.load(o / "checkpoint.pt", weights_only=True)["model"]["context_encoder"]["blocks.0.cross.q.weight"]
               for o in (out, tmp_path / "0", tmp_path / "1")]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_eval_command_measures_held_out_pairs_and_typed_captions(toy, pretrained):
    checkpoint = pretrained[0] / "checkpoint.pt"
    done = run("pretrain.py", "--eval", checkpoint, "--coco", toy / "coco", "--eval_masks", 2, "--device", "cpu")
    assert done.returncode == 0 and done.stdout.startswith(f"eval {checkpoint}"), done.stderr
    figures = json.loads((pretrained[0] / "eval.json").read_text())
    for name, size in (("curves", (1600, 320)), ("energies", (500, 320)), ("masks", (900, 320))):
        picture = Image.open(pretrained[0] / f"{name}.png")
        assert picture.size == size and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert 7 <= figures["images"] <= 8 and figures["masks"] == 2 and 0.2 < figures["auc"] < 0.8  # 4 steps teach nothing
    explained = pretrain.__doc__.replace("recall@1, @5", "recall@1 recall@5")
    assert all(name in explained for name in figures if name not in ("images", "masks"))
    assert figures["read"]["images"] == figures["images"] and figures["left_out"]["image not on disk"] == 1
    image = toy / "mvsa" / "MVSA_Single" / "data" / "1.jpg"
    typed = ["red bars blue tiles lime bands ink lines", "moss bars", "sky"]
    done = run("pretrain.py", "--eval", checkpoint, "--image", image, "--captions", *typed, "--device", "cpu")
    energies, captions = zip(*(line.split("  ") for line in done.stdout.splitlines()))
    assert sorted(captions) == sorted(typed) and list(map(float, energies)) == sorted(map(float, energies))


def test_variants_change_what_is_trained(toy, pretrained, tmp_path):
    weights = {"plain": torch.load(pretrained[0] / "checkpoint.pt", weights_only=True)}
    variants = {"shuffled": ["--shuffle_captions"],
                "no_ema": ["--target", "ema", "--momentum", 0, "--final_momentum", 0]}
    for name, options in variants.items():
        assert run("pretrain.py", "--coco", toy / "coco", "--out", tmp_path / name, "--epochs", 2, "--batch_size", 16,
                   "--accumulate", 2, "--held_out", 8, "--device", "cpu", *options).returncode == 0
        weights[name] = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
    key = "blocks.0.cross.q.weight"
    assert len({w["model"]["context_encoder"][key].sum().item() for w in weights.values()}) == 3
    state = weights["no_ema"]["model"]
    assert torch.equal(state["context_encoder"][key], state["target_encoder"]["encoder." + key])


def recompute(folder, ending=""):
    """results.json of a run, after a check that each of its scores comes out of predictions.csv by scikit-learn."""
    results = json.loads((folder / f"results{ending}.json").read_text())
    with open(folder / f"predictions{ending}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for kind, found in results["sets"].items():
        for row, scores in found["scores"].items():
            for n, seed in enumerate(results["seeds"]):
                mine = [line for line in lines if (line["set"], line["row"], line["seed"]) == (kind, row, str(seed))]
                y, p = ([line[key] for line in mine] for key in ("label", "prediction"))
                assert scores["accuracy"][n] == pytest.approx(100 * accuracy_score(y, p))
                assert scores["weighted F1"][n] == pytest.approx(100 * f1_score(y, p, average="weighted"))
                assert scores["macro F1"][n] == pytest.approx(100 * f1_score(y, p, average="macro"))
                recalls = recall_score(y, p, labels=data.LABELS, average=None, zero_division=0)
                assert [scores["classes"][name]["recall"][n] for name in data.LABELS] == pytest.approx(list(100 * recalls))
                for line in mine:
                    probabilities = [float(line[name]) for name in data.LABELS]
                    assert sum(probabilities) == pytest.approx(1, abs=1e-4)
                    assert probabilities[data.LABELS.index(line["prediction"])] == max(probabilities)
            mine = [line for line in lines if (line["set"], line["row"]) == (kind, row)]
            confusion = confusion_matrix(*([line[key] for line in mine] for key in ("label", "prediction")), labels=data.LABELS)
            assert scores["confusion"] == confusion.tolist() and confusion.sum() == len(mine) > 0
        for name, (difference, low, high) in found["differences"].items():
            new, old = (np.mean(found["scores"][row]["accuracy"]) for row in name.split(" minus "))
            if len({len(parts) for parts in found["split_hash"]}) == 1 and results["args"]["protocol"] == "standard":
                assert difference == pytest.approx(new - old)  # all seeds test as many posts
            assert low <= difference <= high
    return results


def test_finetune_end_to_end(toy, pretrained, tmp_path):
    done = run("finetune_mvsa.py", "--checkpoint", pretrained[0] / "checkpoint.pt", "--mvsa", toy / "mvsa", "--out", tmp_path,
               "--seeds", 0, 1, "--finetune_epochs", 1)
    assert done.returncode == 0, done.stderr
    results, rows = recompute(tmp_path), [row for rows in finetune_mvsa.ROWS.values() for row in rows]
    for kind, count in (("single", 60), ("multi", 120)):
        found = results["sets"][kind]
        assert found["posts"] == sum(found["labels"].values()) == count == sum(found["split_sizes"])
        assert found["left_out"]["broken image"] == 1 and found["read"] == {"posts": count} and list(found["scores"]) == rows and len(found["differences"]) == 4
        assert all(len(scores["accuracy"]) == 2 for scores in found["scores"].values())
        assert len(set(found["split_hash"].values())) == 2
    assert set(results["versions"]) == {"python", "torch", "timm", "transformers", "sklearn", "numpy"}
    assert len(results["code"].rstrip("+")) == 40 or results["code"] == "none"
    table = (tmp_path / "results.md").read_text()
    mean = np.mean(results["sets"]["multi"]["scores"]["TI-JEPA, pretrained"]["weighted F1"])
    assert f"{mean:.2f} ±" in table and table in done.stdout and "not the paper's" in table
    assert all(table.count(f"| {row} |") == 2 for row in rows) and table.count("*reported*") == 2
    assert Image.open(tmp_path / "confusion.png").size == (800, 360)


@pytest.mark.parametrize("protocol", ["grouped", "authors"])
def test_other_protocols_end_to_end(toy, pretrained, tmp_path, protocol):
    done = run("finetune_mvsa.py", "--checkpoint", pretrained[0] / "checkpoint.pt", "--mvsa", toy / "mvsa", "--out", tmp_path,
               "--seeds", 0, 1, "--mode", "probe", "--protocol", protocol)
    assert done.returncode == 0, done.stderr
    results = recompute(tmp_path, f"_{protocol}")
    assert list(results["sets"]["single"]["scores"]) == list(finetune_mvsa.ROWS["probe"])
    if protocol == "grouped":
        assert "groups of repeated posts" in done.stdout and results["sets"]["single"]["split_notes"]["posts in them"] == 0
    else:
        assert results["sets"]["single"]["split_hash"] == results["sets"]["multi"]["split_hash"] and "of the pool" in done.stdout
        assert results["sets"]["single"]["split_sizes"][1:] == [18, 18]
        alone = run("finetune_mvsa.py", "--checkpoint", pretrained[0] / "checkpoint.pt", "--mvsa", toy / "mvsa" / "MVSA_Single",
                    "--protocol", protocol)
        assert alone.returncode == 2 and "pools both sets" in alone.stderr


def test_finetune_with_one_set_and_a_published_split(toy, pretrained, tmp_path):
    posts, _ = data.load_mvsa(toy / "mvsa" / "MVSA_Single")
    listed = [(p.id, p.label) for p in posts]
    write_split(tmp_path / "split", {"train": listed[:40], "dev": listed[40:50], "test": listed[50:]})
    (tmp_path / "split").rename(tmp_path / "single")
    done = run("finetune_mvsa.py", "--checkpoint", pretrained[0] / "checkpoint.pt", "--mvsa", toy / "mvsa" / "MVSA_Single",
               "--split", tmp_path / "single", "--out", tmp_path / "out", "--seeds", 0, "--mode", "probe")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sets"]["single"]["split_sizes"] == [40, 10, 10] and list(results["sets"]) == ["single"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.count(f"not measured: no MVSA-Multi in {toy}") == len(finetune_mvsa.ROWS["probe"])


def test_ablation_table_is_made_from_the_runs_files(tmp_path):
    for variant, seed, auc in (("plain", 0, 0.5), ("plain", 1, 0.7), ("image", 0, 1.0)):
        out = tmp_path / f"{variant}-{seed}"
        out.mkdir()
        (out / "log.jsonl").write_text('{"loss": 9}\n{"loss": 0.25}\n')
        (out / "eval.json").write_text(json.dumps({"auc": auc, "target_std": 0.5, "target_rank": 7.0}))
        scores = {row: {"accuracy": [60.0 + 10 * seed]} for row in finetune_mvsa.ROWS["probe"]}
        sets = {kind: {"scores": scores} for kind in ("single", "multi")}
        (out / "results.json").write_text(json.dumps({"sets": sets}))
    done = run("finetune_mvsa.py", "--ablate", tmp_path)
    assert done.returncode == 0 and (tmp_path / "results.md").read_text() in done.stdout
    assert "| plain | 2 | 0.250 ± 0.000 | 0.500 ± 0.000 | 7.0 ± 0.0 | 0.600 ± 0.100 | 65.0 ± 5.0 | 65.0" in done.stdout
    assert "| image | 1 |" in done.stdout and "| *text + image concatenated* |" in done.stdout
    assert run("finetune_mvsa.py", "--ablate", tmp_path / "none").returncode == 2  # no runs, no table


def test_the_readmes_block_for_a_model_of_ones_own_runs(pretrained):
    block, = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 10 and "encode(" in block
    names = {}
    exec(block.replace("out/toy/checkpoint.pt", str(pretrained[0] / "checkpoint.pt")), names)
    assert names["logits"].shape == (2, 10) and names["net"].predictor.mask_token.grad is None
    names["logits"].sum().backward()


@pytest.mark.parametrize("script", ["pretrain.py", "finetune_mvsa.py", "data.py"])
def test_the_commands_say_what_is_missing(script):
    """As a user types it; every other row of bad input is tested without a new process below."""
    done = run_command(HERE / script, *(["check", "--coco", "/nowhere", "--mvsa", "/nowhere"] if script == "data.py" else
                                        [{"pretrain.py": "--coco", "finetune_mvsa.py": "--mvsa"}[script], "/nowhere"]))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "not found: looked for /nowhere" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(toy, tmp_path):
    done = run("pretrain.py", "--coco", toy / "coco", "--out", tmp_path, "--epochs", 3, "--batch_size", 16, "--held_out", 8,
               "--lr", "1e30", "--start_lr", "1e30", "--clip", "1e30", "--device", "cpu")
    assert done.returncode == 1 and "--lr" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoint.pt").exists()


def strict_json(text):
    """json.loads without the Infinity and NaN that Python adds to JSON."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_steps_that_the_loss_scale_skips_are_counted(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 24))
    assert pretrain.main(["--coco", str(toy / "coco"), "--out", str(tmp_path), "--cache", "off", "--epochs", "4", "--dtype",
                          "float16", "--batch_size", "8", "--held_out", "8", "--log_every", "1", "--device", "cpu"]) == 0
    lines = [strict_json(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    skipped = [line["skipped_steps"] for line in lines]
    finite = [line["grad_norm"] is not None for line in lines]
    assert not finite[0] and finite[-1] and skipped == list(np.cumsum(~np.array(finite)))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # a skipped step, and no other, halves the scale
    assert checkpoint["scaler"]["scale"] == 2.0 ** (24 - skipped[-1]) and checkpoint["skipped_steps"] == skipped[-1]
    assert (tmp_path / "curves.png").exists()


def test_a_log_line_is_json_and_its_curve_is_drawn(tmp_path):
    figures = dict.fromkeys(("loss", "energy", "energy_wrong", "lower", "target_std", "prediction_std", "target_rank"), 1.0)
    lines = [pretrain.log_line({**figures, "step": step, "energy": energy, "read": {"images": 3}})
             for step, energy in ((1, math.nan), (2, 1.0), (3, -math.inf))]
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    assert [strict_json(line)["energy"] for line in lines] == [None, 1.0, None] and lines[0].endswith(b"}\n")
    pretrain.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("script", ["pretrain.py", "finetune_mvsa.py"])
def test_help_tells_each_option_and_its_default(script):
    text = " ".join(run(script, "--help").stdout.split())
    options = {word.strip("[],:") for word in text.split() if word.startswith(("--", "[--"))} - {"--help"}
    assert len(options) >= 8 and text.count("(default:") == len(options)


def test_make_lists_its_targets_and_says_what_it_would_run():
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # this may run under make
    make = lambda *words: subprocess.run(["make", *words], cwd=HERE, env=env, capture_output=True, text=True)
    assert {line.split()[1] for line in make().stdout.splitlines()} == {"help", "reproduce", "ablate", "test", "coco", "clean"}
    first = make("check-preset", "DEVICE=cpu", "COCO=/nowhere", "MVSA=/nowhere").stdout
    assert first.startswith("reproduce: preset toy, data data/toy/coco") and "NOT the paper's" in first
    small = make("check-preset", "PRESET=small", "COCO=/a", "MVSA=/b").stdout
    assert "preset small, data /a and /b" in small and "NOT" not in small
    assert make("check-preset", "PRESET=huge").returncode == 2
    assert "preset small" in make("check-preset", f"COCO={HERE}", f"MVSA={HERE}").stdout  # both there: the paper's run


# -- what one can rely on -----------------------------------------------------------------------------------------------


SHORT = ["--epochs", 10, "--batch_size", 8, "--held_out", 8, "--log_every", 1, "--device", "cpu"]  # 40 steps, saved each 4
SLOW = {"images_per_s", "data_wait"}  # the fields of a log line that tell the time


def outcome(out):
    """What a run has come to, bit for bit: weights, optimizer, and log without the times."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    tensors = [value for part in checkpoint["model"].values() for value in part.values()]
    tensors += [value for state in checkpoint["optimizer"]["state"].values() for value in state.values()]
    return tensors, [{name: value for name, value in line.items() if name not in SLOW} for line in log]


def assert_same(out, expected):
    (tensors, log), (tensors_expected, log_expected) = outcome(out), expected
    assert log == log_expected and len(log) == 40
    assert len(tensors) == len(tensors_expected) > 100 and all(map(torch.equal, tensors, tensors_expected))


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A short run without a break: its options, and what it comes to."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["--coco", toy / "coco", "--cache", folder / "cache", *SHORT]
    done = run("pretrain.py", *options, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return options, outcome(folder / "out")


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.is_alive(), "it never came"
        time.sleep(0.01)


def logged(out):
    return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").exists() else 0


@pytest.mark.parametrize("extra", [[], ["--cache", "off", "--workers", 1, "--accumulate", 2]])
def test_ctrl_c_and_sigterm_save_and_resume_goes_on_exactly(toy, whole, tmp_path, extra):
    options, expected = whole
    if extra:  # decoded by a worker, and other arithmetic: it has a run without a break of its own
        assert run("pretrain.py", *options, *extra, "--out", tmp_path / "whole").returncode == 0
        expected = outcome(tmp_path / "whole")
    for number, code, least in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 9)):
        process, out = start("pretrain.py", *options, *extra, "--out", tmp_path, "--resume")
        wait_for(lambda: logged(tmp_path) > least, process)
        os.kill(process.pid, number)
        process.join(120)
        step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
        assert process.exitcode == code and logged(tmp_path) == step >= least
        assert f"stopped after step {step} of 40" in (out / "stdout").read_text()
        assert "Traceback" not in (out / "stderr").read_text()
    done = run("pretrain.py", *options, *extra, "--out", tmp_path, "--resume")
    assert done.returncode == 0 and f"going on after step {step}" in done.stdout
    assert_same(tmp_path, expected)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    done = run("pretrain.py", *options, *extra, "--out", tmp_path, "--resume")
    assert "nothing is left to do" in done.stdout and (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_resume_is_as_exact_in_mixed_precision(toy, tmp_path, monkeypatch, dtype):
    """Also while the loss scale still falls."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 24))
    options = ["--coco", toy / "coco", "--cache", tmp_path / "cache", "--epochs", 2, "--batch_size", 8, "--held_out", 8,
               "--log_every", 3, "--device", "cpu", "--dtype", dtype]
    main = lambda *more: pretrain.main([str(option) for option in (*options, *more)])
    update, done = pretrain.Trainer.update, []

    def stopped(trainer, *rest):
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, *rest)

    assert main("--out", tmp_path / "whole") == 0
    monkeypatch.setattr(pretrain.Trainer, "update", stopped)
    assert main("--out", tmp_path / "cut") == 143 and main("--out", tmp_path / "cut", "--resume") == 0 and len(done) == 8
    (tensors, log), (expected, log_expected) = outcome(tmp_path / "cut"), outcome(tmp_path / "whole")
    assert log == log_expected and len(tensors) == len(expected) > 100 and all(map(torch.equal, tensors, expected))
    assert (log[0]["skipped_steps"] > 0) == (dtype == "float16") and len(log) == 3


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pretrain.Stop() as stop:
        assert stop.signal == 0 and signal.getsignal(signal.SIGINT) != before[0]
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the system's: it kills
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_kill_9_at_20_random_moments_loses_nothing_but_time(whole, tmp_path):
    options, expected = whole
    rng, kills, steps = np.random.default_rng(), 0, []
    while kills < 20:
        process, _ = start("pretrain.py", *options, "--out", tmp_path, "--resume")
        if rng.random() < 0.8:  # while it trains; else wherever it is: building, reading, checking
            lines = logged(tmp_path)
            while process.is_alive() and logged(tmp_path) <= lines:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        kills += 1
        assert process.exitcode in (-9, 0)
        if (tmp_path / "checkpoint.pt").exists():
            net, checkpoint = model.TIJEPA.from_checkpoint(tmp_path / "checkpoint.pt")
            steps.append(checkpoint["step"])
            if checkpoint["step"] == 40:  # done, and more kills to come: once more from the start
                assert_same(tmp_path, expected)
                (tmp_path / "checkpoint.pt").unlink()
    assert len(set(steps)) > 2
    assert run("pretrain.py", *options, "--out", tmp_path, "--resume").returncode == 0
    assert_same(tmp_path, expected)


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(toy, pretrained, tmp_path, capsys):
    out, _ = pretrained
    same = ["--coco", toy / "coco", "--out", out, "--epochs", 2, "--batch_size", 16, "--log_every", 3, "--held_out", 8,
            "--device", "cpu", "--resume", "--cache", tmp_path]
    main = lambda *options: pretrain.main([str(option) for option in (*same, *options)])
    assert main() == 0 and "nothing is left to do" in capsys.readouterr().out
    assert main("--lr", 0.5, "--target", "ema", "--seed", 3) == 2
    said = capsys.readouterr().err
    assert all(f"{key} (then {then}, now {now})" in said for key, then, now in
               (("--lr", 0.001, 0.5), ("--target", "image", "ema"), ("--seed", 0, 3))) and said.count("(then") == 3
    data.write_toy(tmp_path / "other", images=40, posts=60, seed=1)
    assert main("--coco", tmp_path / "other" / "coco") == 2 and "data (then" in capsys.readouterr().err
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    (tmp_path / "out").mkdir()
    torch.save({**checkpoint, "step": 2, "encoder_weights": "0"}, tmp_path / "out" / "checkpoint.pt")
    assert main("--out", tmp_path / "out") == 2 and "other weights of f_I or f_T" in capsys.readouterr().err


class Runs:
    """Unpickling this runs code."""

    def __reduce__(self):
        return os.mkdir, (os.path.join(WORK, "code_was_run"),)


def test_a_checkpoint_cannot_run_code_and_a_torn_one_is_refused(pretrained, tmp_path, capsys):
    torch.save({"config": Runs()}, tmp_path / "evil.pt")
    content = (pretrained[0] / "checkpoint.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[:len(content) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"config": Runs()}, protocol=2))
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "none.pt"):
        assert pretrain.main(["--eval", str(path), "--coco", "/nowhere"]) == 2
        assert f"{path} is not a whole checkpoint" in capsys.readouterr().err
        with pytest.raises(model.ModelError):
            model.TIJEPA.from_checkpoint(path)
    assert not os.path.exists(os.path.join(WORK, "code_was_run"))


def test_two_processes_have_the_losses_of_one(whole, toy, tmp_path):
    options, (_, log) = whole
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", HERE / "pretrain.py", *options, "--out", tmp_path]
    done = run_command(*command, "--cache", tmp_path / "cache", "--epochs", 10)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in outcome(tmp_path)[1]]
    assert losses == pytest.approx([line["loss"] for line in log], abs=1e-5) and len(losses) == 40
    assert "2 processes" in done.stdout and done.stdout.count("pretrain: wrote") == 1
    assert outcome(tmp_path)[1][-1]["left_out"] == log[-1]["left_out"]


def test_mvsa_answers_go_on_at_the_seed_where_they_were_cut_off(toy, pretrained, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", pretrained[0] / "checkpoint.pt", "--mvsa", toy / "mvsa" / "MVSA_Single", "--seeds", 0, 1, 2,
               "--mode", "probe", "--workers", 0, "--cache", tmp_path / "cache"]
    main = lambda *more: finetune_mvsa.main([str(option) for option in (*options, *more)])
    assert main("--out", tmp_path / "whole") == 0
    answers, asked = finetune_mvsa.answers, []

    def interrupted(posts, seed, *rest):
        asked.append(seed)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return answers(posts, seed, *rest)

    monkeypatch.setattr(finetune_mvsa, "answers", interrupted)
    assert main("--out", tmp_path / "cut") == 130 and "interrupted" in capsys.readouterr().err
    assert main("--out", tmp_path / "cut") == 0 and asked == [0, 1, 1, 2]
    same = [(tmp_path / name / "predictions.csv").read_bytes() for name in ("whole", "cut")]
    results = [json.loads((tmp_path / name / "results.json").read_text())["sets"] for name in ("whole", "cut")]
    assert same[0] == same[1] and results[0] == results[1] and not any((tmp_path / "cut" / "partial").iterdir())
    main("--out", tmp_path / "cut")
    assert asked[4:] == [0, 1, 2]  # what is done is not kept beyond its results


def test_make_reproduce_does_not_do_again_what_is_done(tmp_path):
    """With a python that only notes what it is asked for, and fails once in the last stage."""
    (tmp_path / "python").write_text(f"""#!/bin/bash
        echo "$1 $2" >> {tmp_path}/asked
        case "$1 $2" in
            "pretrain.py --preset") mkdir -p {tmp_path}/$3; [ -f {tmp_path}/$3/checkpoint.pt ] || touch {tmp_path}/$3/checkpoint.pt;;
            "pretrain.py --eval") touch $(dirname $3)/eval.json;;
            "finetune_mvsa.py --checkpoint") [ -f {tmp_path}/failed ] || {{ touch {tmp_path}/failed; exit 1; }}
                case "$*" in *grouped*) of=_grouped;; *authors*) of=_authors;; *) of=;; esac
                touch $(dirname $3)/results$of.json;;
        esac""")
    (tmp_path / "python").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # this may run under make

    def asked(preset, *words):
        (tmp_path / "asked").write_text("")
        command = ["make", "reproduce", f"PY={tmp_path}/python", "VENV=", f"PRESET={preset}", f"OUT={tmp_path}/{preset}", *words]
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
        lines = (tmp_path / "asked").read_text().splitlines()
        return done.returncode, [line for line in lines if line.split()[0] in ("pretrain.py", "finetune_mvsa.py")]

    train, evaluate, judge = "pretrain.py --preset", "pretrain.py --eval", "finetune_mvsa.py --checkpoint"
    assert asked("toy") == (2, [train, evaluate, judge])  # cut off in the first of its three tables
    assert asked("toy") == (0, [train, judge, judge, judge])
    assert asked("toy") == (0, [train])  # pretrain.py sees for itself that its steps are done
    assert asked("tiny") == (0, [train, evaluate, judge]) and asked("toy") == (0, [train])  # a preset of its own
    assert asked("toy", "SPLIT=/elsewhere") == (0, [train, judge])  # another command is another result
    time.sleep(0.02)
    (tmp_path / "toy" / "checkpoint.pt").touch()  # trained further
    assert asked("toy", "SPLIT=/elsewhere") == (0, [train, evaluate, judge, judge, judge])
    assert "--resume" in subprocess.run(["make", "-n", "reproduce", "VENV="], cwd=HERE, env=env, capture_output=True,
                                        text=True).stdout


def test_a_cut_off_toy_world_is_written_again(toy, tmp_path, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_toy_mvsa", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.write_toy(tmp_path / "toy", images=40, posts=60)
    assert not (tmp_path / "toy").exists()
    monkeypatch.undo()
    data.write_toy(tmp_path / "toy", images=40, posts=60)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert (tmp_path / "toy" / "coco" / "train2017" / "000000000007.jpg").read_bytes() == (
        toy / "coco" / "train2017" / "000000000007.jpg").read_bytes()


def image_bytes(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


SPECKLED = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
RAMP = np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)
IMAGES = {  # name: (bytes, size, what a pixel is: or None, if it cannot be read)
    "cmyk": (image_bytes(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "JPEG"), (60, 40), (255, 0, 0)),
    "16-bit": (image_bytes(Image.fromarray(RAMP), "PNG"), (60, 40), (0, 0, 0)),
    "palette": (image_bytes(SPECKLED.quantize(16), "PNG"), (60, 40), SPECKLED.quantize(16).convert("RGB").getpixel((0, 0))),
    "animated": (image_bytes(Image.new("RGB", (60, 40), "red"), "GIF", save_all=True,
                             append_images=[Image.new("RGB", (60, 40), "blue")]), (60, 40), (255, 0, 0)),
    "transparent": (image_bytes(Image.new("RGBA", (60, 40), (9, 9, 9, 0)), "PNG"), (60, 40), (255, 255, 255)),
    "grey": (image_bytes(Image.new("L", (60, 40), 77), "PNG"), (60, 40), (77, 77, 77)),
    "1 x 1": (image_bytes(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), (1, 1), (1, 2, 3)),
    "20,000 x 1": (image_bytes(Image.new("RGB", (20000, 1), (0, 0, 254)), "PNG"), (20000, 1), (0, 0, 254)),
    "zero bytes": (b"", None, None),
    "truncated": (image_bytes(SPECKLED, "JPEG")[:1500], None, None),
    "text": (b"<html>404 Not Found</html>", None, None),
    "a bomb": (image_bytes(Image.new("1", (20000, 20000)), "PNG"), None, None),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_every_kind_are_read_or_counted(tmp_path, name):
    content, size, pixel = IMAGES[name]
    (tmp_path / "image.jpg").write_bytes(content)
    config = dict(input_size=(3, 48, 48), interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    batch = data.Pictures([(tmp_path / "image.jpg", ["red bars"])], config)[[(0, 0, 0)]]
    if size is None:
        assert batch.left_out == [0] and batch.size == 0
        return
    image = data.read_image(tmp_path / "image.jpg", (48, 48))
    assert batch.images.shape == (1, 3, 48, 48) and batch.left_out == [] and image.size == size and image.mode == "RGB"
    assert np.allclose(image.getpixel((0, 0)), pixel, atol=2)
    if name == "16-bit":
        assert image.getpixel((59, 39)) == (255, 255, 255) and abs(image.getpixel((30, 20))[0] - 131) < 2  # not clipped


@pytest.mark.parametrize("content", [b"", b" \r\n", "\u4f60\u597d \u0416".encode("utf-16"), b"\x00\x01\xff", b"red " * 100000])
def test_posts_of_every_kind_have_features(net, content):
    states, mask = net.text_encoder([data.decode(content), "a red dog"])
    assert states.isfinite().all() and mask.any(1).all() and states.shape[1] <= net.text_encoder.max_tokens
    assert data.decode("\u4f60\u597d \u0416".encode("utf-16")) == "\u4f60\u597d \u0416"


LABELS_HEAD = b"ID\ttext,image"
CAPTIONS = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(3)],
            "annotations": [{"id": i, "image_id": i, "caption": "red bars"} for i in range(3)]}
BAD = {  # what is wrong: (command, words of the message); {x} is a folder that `bad_folder` has made
    "no COCO folder": ("pretrain.py --coco {x}/none", "{x}/none/train2017 make coco"),
    "empty COCO folder": ("pretrain.py --coco {x}", "{x}/train2017 captions_train2017.json"),
    "no images": ("pretrain.py --coco {x}/bare", "{x}/bare/train2017 3 image not on disk"),
    "json cut off": ("pretrain.py --coco {x}/cut", "{x}/cut/annotations/captions_train2017.json not a COCO caption file"),
    "json of something else": ("pretrain.py --coco {x}/else", "not a COCO caption file"),
    "json is no text": ("pretrain.py --coco {x}/binary", "not a COCO caption file"),
    "an image id twice": ("pretrain.py --coco {x}/twice", "lists image id 1 twice"),
    "captions without images": ("pretrain.py --coco {x}/orphans", "3 captioned image not listed"),
    "batch larger than the data": ("pretrain.py --coco {toy}/coco --batch_size 34 --held_out 8", "--batch_size 34 33 images"),
    "more parts than the batch": ("pretrain.py --coco {toy}/coco --batch_size 4 --held_out 8 --accumulate 5",
                                  "--batch_size --accumulate"),
    "all held out": ("pretrain.py --coco {toy}/coco --held_out 41", "--held_out 41 leaves nothing"),
    "no batch": ("pretrain.py --batch_size 0", "--batch_size less than 1"),
    "not a number": ("pretrain.py --epochs many", "--epochs many"),
    "abbreviated option": ("pretrain.py --epoch 3", "unrecognized arguments"),
    "no CUDA": ("pretrain.py --coco {toy}/coco --batch_size 8 --held_out 8 --device cuda", "--device cuda --device auto"),
    "no such device": ("finetune_mvsa.py --mvsa {toy}/mvsa --device tpu", "--device tpu --device auto"),
    "image hub out of reach": ("pretrain.py --coco {toy}/coco --batch_size 8 --held_out 8 --image_encoder vit_tiny_patch16_224",
                               "vit_tiny_patch16_224 --image_weights"),
    "text hub out of reach": ("pretrain.py --coco {toy}/coco --batch_size 8 --held_out 8 --text_encoder some/bert",
                              "some/bert --text_encoder PATH"),
    "weights that are none": ("pretrain.py --coco {toy}/coco --batch_size 8 --held_out 8 --image_encoder vit_tiny_patch16_224 "
                              "--image_weights {x}/file", "--image_weights {x}/file vit_tiny_patch16_224"),
    "out is a file": ("pretrain.py --coco {toy}/coco --batch_size 8 --held_out 8 --out {x}/file", "--out {x}/file"),
    "out below a file": ("finetune_mvsa.py --mvsa {toy}/mvsa --out {x}/file/out", "--out {x}/file/out"),
    "cache below a file": ("pretrain.py --coco {toy}/coco --batch_size 8 --held_out 8 --out {x}/o --cache {x}/file/c",
                           "--cache {x}/file/c"),
    "disk full": ("pretrain.py --coco {toy}/coco --batch_size 8 --held_out 8 --epochs 1 --out {x}/full --cache off",
                  "cannot be written No space left --out"),
    "no checkpoint": ("finetune_mvsa.py --mvsa {toy}/mvsa --checkpoint {x}/none --out {x}/o", "{x}/none checkpoint"),
    "typed captions without an image": ("pretrain.py --eval {checkpoint} --captions red", "--image --captions"),
    "typed image that is none": ("pretrain.py --eval {checkpoint} --captions red --image {x}/file", "--image {x}/file"),
    "no MVSA folder": ("finetune_mvsa.py --mvsa {x}/none", "{x}/none/labelResultAll.txt mcrlab kaggle"),
    "no posts": ("finetune_mvsa.py --mvsa {x}/labels", "{x}/labels/labelResultAll.txt data"),
    "empty posts folder": ("finetune_mvsa.py --mvsa {x}/empty --checkpoint {checkpoint} --out {x}/o",
                           "none of the posts 2 text or image file missing"),
    "all images broken": ("finetune_mvsa.py --mvsa {x}/broken --checkpoint {checkpoint} --out {x}/o --cache off --workers 0",
                          "no image 2 broken image"),
    "wrong columns": ("finetune_mvsa.py --mvsa {x}/columns", "labelResultAll.txt first line"),
    "unknown word": ("finetune_mvsa.py --mvsa {x}/word --checkpoint {checkpoint} --out {x}/o", "line 3 positive, neutral"),
    "an id twice": ("finetune_mvsa.py --mvsa {x}/ids --checkpoint {checkpoint} --out {x}/o", "line 3 id 1 second time"),
    "labels in UTF-16": ("finetune_mvsa.py --mvsa {x}/utf16", "labelResultAll.txt not the label file"),
    "no split": ("finetune_mvsa.py --mvsa {toy}/mvsa --split {x} --checkpoint {checkpoint} --out {x}/o", "--split {x} train.json"),
    "split of another protocol": ("finetune_mvsa.py --protocol grouped --split x", "--split standard protocol"),
    "one set for two": ("finetune_mvsa.py --protocol authors --mvsa {toy}/mvsa/MVSA_Single --checkpoint {checkpoint} --out {x}/o",
                        "pools both sets"),
    "unknown mode": ("finetune_mvsa.py --mode x", "--mode probe finetune"),
    "toy over something else": ("data.py toy {x}", "{x} exists name another folder"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    (root / "file").write_text("a file")
    orphans = {"images": [], "annotations": CAPTIONS["annotations"]}
    double = {**CAPTIONS, "images": CAPTIONS["images"] + [{"id": 1, "file_name": "other.jpg"}]}
    for name, content in (("bare", json.dumps(CAPTIONS).encode()), ("cut", json.dumps(CAPTIONS).encode()[:80]),
                          ("else", b'{"images": 3}'), ("binary", b"\x1f\x8b\xff\x00"), ("twice", json.dumps(double).encode()),
                          ("orphans", json.dumps(orphans).encode())):
        (root / name / "train2017").mkdir(parents=True)
        (root / name / "annotations").mkdir()
        (root / name / "annotations" / "captions_train2017.json").write_bytes(content)
    good = LABELS_HEAD + b"\n1\tpositive,positive\n2\tneutral,neutral\n"
    for name, content in (("labels", good), ("empty", good), ("broken", good), ("columns", b"ID\ttext\n1\tpositive\n"),
                          ("word", LABELS_HEAD + b"\n1\tpositive,positive\n2\tgood,neutral\n"),
                          ("ids", LABELS_HEAD + b"\r\n1\tpositive,positive\r\n1\tneutral,neutral\r\n"),
                          ("utf16", (LABELS_HEAD + b"\n").decode().encode("utf-16"))):
        (root / name / "data" if name != "labels" else root / name).mkdir(parents=True)
        (root / name / "labelResultAll.txt").write_bytes(content)
    for post in "12":
        (root / "broken" / "data" / f"{post}.jpg").write_bytes(b"")
        (root / "broken" / "data" / f"{post}.txt").write_text("red bars")
    (root / "full").mkdir()
    (root / "full" / "checkpoint.pt.tmp").symlink_to("/dev/full")  # a file on a disk without room
    return root


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_a_sentence_and_exit_code_2(what, bad_folder, toy, pretrained, capsys, monkeypatch):
    monkeypatch.chdir(WORK)
    names = {"x": bad_folder, "toy": toy, "checkpoint": pretrained[0] / "checkpoint.pt"}
    script, *options = [word.format(**names) for word in BAD[what][0].split()]
    try:
        code = {"pretrain.py": pretrain, "finetune_mvsa.py": finetune_mvsa, "data.py": data}[script].main(options)
    except SystemExit as stopped:  # argparse's own way
        code = stopped.code
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2 and "error:" in said
    assert all(word.format(**names).lower() in said.lower() for word in BAD[what][1].split()), said


def test_a_disk_that_fills_up_within_a_checkpoint_leaves_the_one_before(whole, tmp_path, capsys):
    options, expected = whole
    options = [str(option) for option in (*options, "--out", tmp_path, "--resume")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, before[1]))  # no file larger: the checkpoint has 5 MB
        assert pretrain.main(options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path}/checkpoint.pt cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]  # nothing half-made
    assert pretrain.main(options) == 0
    assert len(outcome(tmp_path)[1]) == len(expected[1])


@pytest.mark.parametrize("lost", ["GPU", "CPU", "reader"])
def test_too_little_memory_names_what_to_lower(toy, tmp_path, monkeypatch, capsys, lost):
    def fail(*inputs):
        if lost == "CPU":
            torch.empty(1 << 55)  # torch's own words
        raise (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB") if lost == "GPU" else
               RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))

    monkeypatch.setattr(pretrain, "train_step", fail)
    options = ["--coco", toy / "coco", "--batch_size", 8, "--held_out", 8, "--out", tmp_path, "--cache", tmp_path / "cache"]
    assert pretrain.main([str(option) for option in options]) == 2
    said = capsys.readouterr().err
    assert "out of memory; lower --batch_size or --held_out" in said
    monkeypatch.setattr(pretrain, "train_step", lambda *inputs: torch.ones(2) @ torch.ones(3))  # any other error is a bug
    with pytest.raises(RuntimeError, match="size"):
        pretrain.main([str(option) for option in options])


def test_a_model_that_cannot_be_is_refused_in_words(net):
    for change, words in ((dict(heads=3), "heads=3 do not divide the width dim=32"), (dict(predictor_dim=6), "predictor_dim=6"),
                          (dict(loss="l3"), "l3"), (dict(target="text"), "text")):
        with pytest.raises(model.ModelError, match=words):
            model.TIJEPA(replace(CONFIG, **{"predictor_heads": 2, **change}))
    with pytest.raises(model.ModelError, match=r"images of \[3, 50, 48\], where toy takes \[3, 48, 48\]"):
        net.encode(torch.zeros(1, 3, 50, 48), ["red"])
    with pytest.raises(model.ModelError, match="1 x 1 patch grid is too small.*--image_encoder"):
        sample_masks((1, 1), 2, seeded(0))


def test_captions_of_images_that_are_not_there_are_counted(tmp_path):
    content = {"images": CAPTIONS["images"], "annotations": CAPTIONS["annotations"][:2] + [{"image_id": 77, "caption": "x"}]}
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    SPECKLED.save(tmp_path / "train2017" / "000000000001.jpg")
    SPECKLED.save(tmp_path / "train2017" / "000000000002.jpg")
    dataset = data.CocoCaptions(tmp_path)
    assert dataset.left_out.reasons == {"captioned image not listed": {"77"}, "image not on disk": {"000000000000.jpg"},
                                        "image without caption": {"000000000002.jpg"}}
    assert dataset.read() == {"images": 1, "captions": 1}
    dataset.left_out.add("broken image", str(dataset.items[0][0]))
    assert dataset.read() == {"images": 0, "captions": 0}


class InMemory:
    """A label file for read_labels, without a disk."""

    def __init__(self, content):
        self.content = content

    def read_bytes(self):
        return self.content


def mutate(content, rng):
    """A word or number for another, or a few random changes of bytes: pieces cut out, doubled, or put in."""
    words = list(re.finditer(rb"[a-z]+|\d+", content))
    if rng.random() < 0.5:
        old, new = (words[i] for i in rng.integers(len(words), size=2))
        return content[:old.start()] + new[0] + content[old.end():]
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, to = sorted(rng.integers(0, len(content) + 1, 2))
        to = min(to, at + 30)
        piece = (b"\t", b"\n", b"\r\n", b",", b"positive", b"neutral", b"negative", b"7", b'"', b"}", b"null", b"1e3", b"\\ud800",
                 b"\xef\xbb\xbf", b"\x0b", b"\xc2\x85", b"", bytes(content[at:to]), rng.bytes(3))[rng.integers(19)]
        content[at:to if rng.random() < 0.5 else at] = piece
    return bytes(content)


WORD = r"\s*(positive|neutral|negative)\s*"
LINE = {n: re.compile(rf"\s*(\S(?:[^\t]*\S)?)\s*" + rf"\t{WORD},{WORD}" * n, re.IGNORECASE) for n in (1, 3)}


def expected_labels(content):
    """The labels by another way: a regular expression for each line, and sums in place of votes. None: not such a file."""
    try:
        lines = [line for line in re.split("\r\n|\r|\n", content.decode("utf-8-sig")) if line.strip()]
    except UnicodeDecodeError:
        return None
    count = len(lines[0].split("\t")) - 1 if lines else 0
    matches = [LINE[count].fullmatch(line) for line in lines[1:]] if count in LINE else [None]
    if not all(matches) or len({match[1].strip() for match in matches}) < len(matches):
        return None
    labels = {}
    for match in matches:
        words = [word.lower() for word in match.groups()[1:]]
        sides = [[word for word in data.LABELS if side.count(word) * 2 > count] for side in (words[::2], words[1::2])]
        polarity = {data.LABELS.index(side[0]) - 1 for side in sides if side} - {0}  # -1 positive, 0 neutral, 1 negative
        if all(sides) and len(polarity) < 2:
            labels[match[1].strip()] = 1 + sum(polarity)
    return labels


def test_fuzzed_label_files_give_a_clean_error_or_the_right_labels():
    rng, counts = np.random.default_rng(), {"read": 0, "refused": 0}
    words = [word.encode() for word in data.LABELS]
    for case in range(10000):
        n = (1, 3)[case % 2]
        rows = [b"%d\t" % i + b"\t".join(words[a] + b"," + words[b] for a, b in rng.integers(3, size=(n, 2))) for i in range(4)]
        good = b"\n".join([b"ID\t" + b"\t".join([b"text,image"] * n), *rows, b""])
        content = rng.bytes(rng.integers(60)) if case % 10 == 0 else good if case % 10 == 1 else mutate(good, rng)
        try:
            kept, dropped = data.read_labels(InMemory(content))
        except data.DataError:
            counts["refused"] += 1
            assert case % 10 != 1, content
            continue
        counts["read"] += 1
        assert kept == expected_labels(content), content
        assert not kept.keys() & dropped.keys()
    assert min(counts.values()) > 1500, counts


def test_fuzzed_caption_files_give_a_clean_error_or_the_right_captions():
    rng, counts = np.random.default_rng(), {"read": 0, "refused": 0}
    good = json.dumps(CAPTIONS).encode()
    for case in range(10000):
        content = rng.bytes(rng.integers(60)) if case % 10 == 0 else good if case % 10 == 1 else mutate(good, rng)
        if case % 1000 == 999:
            content = b'{"images":' * 30000 + b"[" * 30000  # deeper than Python's stack
        try:
            files, captions, unlisted = data.parse_captions(content, "captions.json")
        except data.DataError:
            counts["refused"] += 1
            assert case % 10 != 1, content
            continue
        counts["read"] += 1
        parsed = json.loads(content)
        assert sorted(files.items()) == sorted((image["id"], image["file_name"]) for image in parsed["images"]), content
        pairs = [(note["image_id"], note["caption"].strip()) for note in parsed["annotations"]]
        assert sorted((i, text) for i, texts in captions.items() for text in texts) == sorted(pairs), content
        assert set(unlisted) == {i for i, _ in pairs} - files.keys()
        for text in (*files.values(), *(text for _, text in pairs)):
            text.encode()  # what cannot be encoded would fail much later, in the tokenizer
    assert min(counts.values()) > 1500, counts
