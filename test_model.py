"""The tests, by values: `make test`. CPU only, no network; every file they need they write themselves."""
import contextlib
import csv
import errno
import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

# Before the imports. One thread: two on two busy cores are many times slower, and a fork of threads may hang.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
os.environ.update(HF_HOME=tempfile.mkdtemp(), TORCH_HOME=tempfile.mkdtemp())
os.environ["MPLBACKEND"] = NOTEBOOK = "module://matplotlib_inline.backend_inline"

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report, confusion_matrix
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoModel, IJepaConfig, IJepaModel

import data
import finetune_mvsa
import model
import pretrain
from finetune_mvsa import CONCAT, ONLINE, PRETRAINED, UNTRAINED
from model import UserError, generator_of, sample_masks

os.environ["MPLBACKEND"] = NOTEBOOK  # again, for processes of their own
# tqdm shares its lock with forks: one that is killed while it holds it would stop all the others
os.register_at_fork(after_in_child=lambda: data.tqdm.set_lock(multiprocessing.RLock()))

HERE = Path(__file__).parent
WORDS = "a red dog on blue grass under the sky with two cats".split()
CONFIG = replace(model.PRESETS["toy"], dim=32, predictor_dim=32, vocabulary=WORDS)
IMAGES = torch.randint(256, (3, 3, 48, 48), generator=generator_of(1), dtype=torch.uint8)
TEXTS = ["a red dog", "blue grass under the sky with two cats on a dog", "cats"]
NOISE = torch.randn(3, 36, 8, generator=generator_of(0))
PLACES = torch.rand(3, 36, generator=generator_of(0)).argsort(dim=1)
MASKS = model.Masks(PLACES[:, :9].sort(1)[0], PLACES[:, 9:33].view(3, 4, 6).sort(2)[0])  # one for each pair
SHARED = model.Masks(MASKS.context[:1], MASKS.target[:1])  # one for all
SHORT = ["--epochs", 10, "--batch_size", 8, "--held_out", 8, "--log_every", 1, "--device", "cpu"]  # 40 steps
CAPTIONS = "annotations/captions_train2017.json"
SLOW = {"images_per_s", "data_wait"}  # the fields of a log line that tell the time


def call(module, *options, code=0):
    """A command in this process, which must end with this exit code -> its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            returned = module.run([str(option) for option in options])
        except SystemExit as stopped:  # argparse's own way
            returned = stopped.code
    assert returned == code, err.getvalue()
    return SimpleNamespace(out=out.getvalue(), err=err.getvalue())


def forked(work, *given):
    """A function in a fork of this process, for signals and kills."""
    process = multiprocessing.get_context("fork").Process(target=work, args=given, daemon=True)
    process.start()
    return process


def execute(*command, **options):
    """A command in a process of its own, as a user types it -> CompletedProcess."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return model.TIJEPA(CONFIG)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "toy"
    data.write_toy(root, images=40, posts=60)
    return root


@pytest.fixture(scope="session")
def pretrained(toy, tmp_path_factory):
    """The folder of a finished run of 4 steps and of its --eval, the run's options, and what both printed."""
    out = tmp_path_factory.mktemp("pretrained")
    options = ["--coco", toy / "coco", "--cache", out / "cache", "--epochs", 2, "--batch_size", 16,
               "--accumulate", 2, "--log_every", 3, "--held_out", 8, "--device", "cpu"]
    done = call(pretrain, *options, "--out", out / "out")
    checkpoint = out / "out" / "checkpoint.pt"
    judged = call(pretrain, "--eval", checkpoint, "--cache", out / "cache", "--device", "cpu")
    return SimpleNamespace(out=out / "out", checkpoint=checkpoint, options=options, done=done, judged=judged)


# ---- model.py ----
@pytest.mark.parametrize("grid", [(6, 6), (6, 9), (14, 14), (16, 16)])
def test_sample_masks_are_disjoint_in_range_and_reach_every_patch_alike(grid):
    N, seen, hidden = grid[0] * grid[1], 0, 0
    for step in range(20):
        context, target = sample_masks(grid, 128, 0, step)
        assert len(context) == len(target) == 128 and target.shape[1] == 4
        for c, t in zip(context.tolist(), target.flatten(1).tolist()):
            assert len(set(c)) == len(c) >= N // 10 and not set(c) & set(t)
        seen += torch.bincount(context.flatten(), minlength=N)  # longer for an index out of range
        hidden += torch.bincount(target.flatten(), minlength=N)
    assert len(seen) == len(hidden) == N and (seen > 0).all() and (hidden > 0).all()
    rows = seen.view(grid).sum(1)  # a large batch does not lose the bottom rows
    assert 0.9 < rows[-1] / rows[0] < 1.1


def test_sample_masks_draws_rectangles_and_a_window_of_the_right_areas():
    areas, aspects, outside = [], [], []
    for seed in range(300):
        context, target = sample_masks((32, 32), 1, seed)
        outside.append(1024 - len({*context.flatten().tolist(), *target.flatten().tolist()}))
        for block in target[0]:
            h, w = (int(axis.max() - axis.min()) + 1 for axis in (block // 32, block % 32))
            assert h * w == len(block) == len(set(block.tolist()))
        areas.append(h * w / 1024)
        aspects.append(h / w)
    # rounding to whole patches moves a side by half a patch at most, of 10 or more
    assert 0.135 < min(areas) < 0.155 and 0.195 < max(areas) < 0.22
    assert 0.67 < min(aspects) < 0.80 and 1.42 < max(aspects) < 1.65
    assert abs(np.corrcoef(areas, aspects)[0, 1]) < 0.2  # I-JEPA's sampler ties them: 1.0
    assert min(outside) == 0 and 100 < max(outside) <= 1024 - 30 ** 2  # the window has 85 to 100 %
    sizes = [sample_masks((7, 7), 128, 0, step).context.shape[1] for step in range(300)]
    assert min(sizes) >= 7 * 7 // 10  # else the blocks are drawn again: 7 of these steps need that


@pytest.mark.parametrize("share", [0.5, 0.09, 1e-6])
def test_sample_masks_of_a_share_have_a_random_part_of_a_context_and_the_same_targets(share):
    (whole, target), (part, same) = (sample_masks((14, 14), 64, 0, 3, share) for share in (1.0, share))
    assert torch.equal(target, same) and part.shape == (64, max(1, round(share * whole.shape[1])))
    for some, blocks in zip(part.tolist(), target.flatten(1).tolist()):
        assert not set(some) & set(blocks) and some == sorted(set(some))
    assert 80 < part.float().mean() < 115  # neither the first rows nor the last


def test_sample_masks_draws_anew_for_each_seed_step_and_image():
    images = {tuple(image.flatten().tolist()) for seed in (0, 1, 2 ** 31 - 1) for step in range(5)
              for image in sample_masks((14, 14), 8, seed, step).target}
    assert len(images) == 3 * 5 * 8


def plain_block(block, x, text=None):
    """What a block outputs, with its weights in PyTorch's own attention."""
    ours, (first, _, second) = block.attention, block.mlp
    attention = torch.nn.MultiheadAttention(x.shape[-1], ours.heads, batch_first=True)
    attention.in_proj_weight.data = torch.cat([ours.q.weight, ours.kv.weight])
    attention.in_proj_bias.data = torch.cat([ours.q.bias, ours.kv.bias])
    attention.out_proj = ours.proj
    query = block.norm_attention(x)
    memory = query if text is None else text
    x = x + attention(query, memory, memory, need_weights=False)[0]
    return x + second(F.gelu(first(block.norm_mlp(x))))


def randomize(module, seed=5):
    """All weights, biases and norms at random, so that none can stand for another."""
    for number, p in enumerate(module.parameters()):
        p.data.normal_(0, 0.3, generator=generator_of(seed, number))
    return module


def test_x_and_g_start_from_xavier_g_with_i_jepas_rescaling_and_x_tilde_as_x(net):
    g = model.Predictor((6, 6), 64, 64, 4, 2, 64)
    layers = {p: layer for layer, block in enumerate(g.blocks, start=1)
              for p in (block.attention.proj.weight, block.mlp[2].weight)}
    for p in (*g.parameters(), *net.context_encoder.parameters()):
        if p.ndim == 2:  # a uniform distribution, of 1,000 values or more
            bound = (6 / sum(p.shape)) ** 0.5 / (2 * layers[p] if p in layers else 1) ** 0.5
            assert p.abs().max().item() == pytest.approx(bound, rel=0.03)
    assert not any(p.any() for name, p in g.named_parameters() if name.endswith("bias"))
    assert 0.01 < g.mask_token.std() < 0.04
    assert all(map(torch.equal, net.target_encoder.parameters(), net.context_encoder.parameters()))


def test_predictor_positions_encode_row_and_column():
    angles = np.arange(7)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    expected = [np.concatenate([waves[row], waves[column]]) for row in range(5) for column in range(7)]
    assert np.allclose(model.sincos_2d((5, 7), 16), expected, atol=1e-6)


def test_cross_attention_is_the_softmax_of_scaled_products_over_what_is_not_masked():
    layer, x, memory = randomize(model.Attention(6, 2)), NOISE[:2, :3, :6], NOISE[:2, 3:7, :6]
    mask = torch.tensor([[True, True, True, True], [True, False, True, False]])
    out = layer(x, memory, mask)
    for b in range(2):
        q, (k, v) = layer.q(x[b]), layer.kv(memory[b, mask[b]]).chunk(2, dim=1)  # [N, 6], [L, 6] each
        heads = [(q[:, h] @ k[:, h].T / 3 ** 0.5).softmax(1) @ v[:, h] for h in (slice(3), slice(3, 6))]
        assert torch.allclose(out[b], layer.proj(torch.cat(heads, dim=1)), atol=1e-5)
    assert torch.allclose(layer(x, memory)[0], out[0], atol=1e-5)


def test_cross_attention_lets_each_patch_read_its_own_caption_and_no_patch():
    X, s_text = randomize(model.FusionEncoder(8, 7, 32, 2, 4)), NOISE[1:, :6, :7]
    tokens = X(NOISE[:2, :4], s_text, torch.arange(6) < torch.tensor([[6], [3]]))
    for b, n in np.ndindex(2, 4):  # each pair unpadded, each patch alone
        x, text = X.image_proj(NOISE[b, None, n:n + 1]), X.text_proj(s_text[b, None, :(6, 3)[b]])
        for block in X.blocks:
            x = plain_block(block, x, text)
        assert torch.allclose(tokens[b, n], X.norm(x)[0, 0], atol=1e-5)


@pytest.mark.parametrize("masks", [MASKS, SHARED], ids=["own", "shared"])
def test_g_predicts_each_block_from_the_context_alone(masks):
    g, context = randomize(model.Predictor((6, 6), 8, 32, 2, 2, 20)), NOISE[:, :9]
    prediction = g(context, masks)
    for b, m in np.ndindex(3, 4):
        visible, hidden = (g.positions[:, index[b % len(index)]] for index in masks)  # [1, M, P, 32]
        x = torch.cat([g.embed(context[b:b + 1]) + visible, g.mask_token + hidden[:, m]], dim=1)
        for block in g.blocks:
            x = plain_block(block, x)
        assert torch.allclose(prediction[b, m], g.proj(g.norm(x))[0, -6:], atol=1e-5)


@pytest.mark.parametrize("masks", [MASKS, SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("target", ["ema", "image", "whitened"])
def test_targets_are_the_normalised_tokens_of_the_hidden_patches(target, masks):
    X_ema = lambda image, text, mask: image ** 2 + (text * mask[:, :, None]).sum(1, keepdim=True)
    features = model.Features(NOISE, NOISE[:, :5], (torch.arange(5) < 4).expand(3, 5))
    net = SimpleNamespace(config=replace(CONFIG, target=target), target_encoder=X_ema,
                          whiten=torch.nn.Linear(8, 8))
    tokens = X_ema(*features[:3]) if target == "ema" else NOISE
    y = torch.stack([tokens[b, masks.target[b % len(masks.target)]] for b in range(3)])  # [B, M, P, D]
    normal = (y - y.mean(3, keepdim=True)) / (y.var(3, correction=0, keepdim=True) + 1e-5).sqrt()
    y = net.whiten(y) if target == "whitened" else normal
    targets = model.TIJEPA.targets(net, features, masks)
    assert targets.shape == y.shape and torch.allclose(targets, y, atol=1e-5) and not targets.requires_grad


@pytest.mark.parametrize("loss, by_hand", [("mse", 45000.125), ("smooth_l1", 149.8125)])
def test_patch_energy_is_the_mean_error_of_each_patch_in_float32(loss, by_hand):
    target = torch.tensor([[[[0.5, -300], [0, 0]]]]).half()  # [1, 1, 2, 2]; float16 has no 300 ** 2
    energy = model.TIJEPA.patch_energy(SimpleNamespace(config=replace(CONFIG, loss=loss)), 0 * target, target)
    assert energy.dtype == torch.float32 and energy.tolist() == [[[by_hand, 0]]]


@pytest.mark.parametrize("loss, target", [("mse", "ema"), ("smooth_l1", "image"), ("mse", "whitened")])
def test_forward_goes_from_the_visible_tokens_through_x_and_g_to_the_mean_energy(loss, target):
    net = model.TIJEPA(replace(CONFIG, loss=loss, target=target))
    randomize(net.target_encoder, seed=6)  # X~ must not be X, or a mix-up of the two would pass
    features = net.frozen_features(IMAGES, TEXTS)
    seen = torch.stack([features.s_image[b, MASKS.context[b]] for b in range(3)])
    for given, visible in ((None, seen), (seen + 1, seen + 1)):
        out = net(features, MASKS, given)
        context = net.context_encoder(visible, features.s_text, features.text_mask)
        prediction, y = net.predictor(context, MASKS), net.targets(features, MASKS)
        errors = net.patch_energy(prediction, y)  # [B, M, P]
        torch.testing.assert_close(tuple(out), (errors.flatten(1).mean(1), errors, y, prediction, context))


@pytest.mark.parametrize("mask", ["before", "after"])
def test_visible_tokens_depend_on_hidden_pixels_only_if_masks_apply_after_f_i(mask):
    net, masks = model.TIJEPA(replace(CONFIG, mask=mask)), sample_masks((6, 6), 3, 0)
    seen = torch.zeros(3, 36, dtype=torch.uint8).scatter(1, masks.context, 1).view(3, 1, 6, 6)
    seen = F.interpolate(seen, (48, 48))  # [3, 1, H, W]: 1 where a pixel is in a patch of the context
    tokens = [net.visible(net.frozen_features(pictures, TEXTS), masks)
              for pictures in (IMAGES, IMAGES * seen, IMAGES * (1 - seen))]
    assert torch.equal(tokens[0], tokens[1]) == (mask == "before")
    assert tokens[0].shape == (*masks.context.shape, 96)
    assert not torch.allclose(tokens[0], tokens[2], atol=0.1)


def test_fit_whitening_brings_the_tokens_covariance_near_the_identity():
    net = model.TIJEPA(replace(CONFIG, target="whitened"))
    tokens = torch.randn(999, 96, generator=generator_of(0)) * torch.linspace(0.1, 3, 96) + 5
    net.fit_whitening(tokens)
    S, white = np.cov(tokens.T), net.whiten(tokens)
    expected = np.linalg.inv(S + np.trace(S) / 96 * np.eye(96)) @ S  # of one S alone the order is the same
    assert np.allclose(np.cov(white.T), expected, atol=1e-3) and white.mean(0).abs().max() < 1e-4
    assert np.allclose(net.whiten.weight, net.whiten.weight.T, atol=1e-5)


@pytest.mark.parametrize("mask, visible", [("after", 1.0), ("before", 0.5)])
def test_score_and_energy_matrix_are_the_energies_of_each_pair(mask, visible):
    net = model.TIJEPA(replace(CONFIG, mask=mask, visible=visible))
    masks = [sample_masks(net.grid, 1, draw, share=visible) for draw in range(3)]
    pairs = [net.frozen_features(IMAGES[i:i + 1], [text]) for i in range(3) for text in TEXTS]
    by_hand = [np.mean([net(pair, mask).energy.item() for mask in masks]) for pair in pairs]
    features = net.frozen_features(IMAGES, TEXTS)
    net.image_encoder.forward = f_I = Mock(wraps=net.image_encoder.forward)
    matrix = pretrain.energy_matrix(net, features, draws=3)
    assert f_I.call_count == (3 if mask == "before" else 0)
    assert matrix.flatten().tolist() == pytest.approx(by_hand, rel=1e-5) and matrix.shape == (3, 3)
    scores = net.score(IMAGES, TEXTS, draws=3)
    assert torch.allclose(scores, matrix.diagonal(), rtol=1e-5) and not scores.requires_grad


def test_update_target_follows_the_ema_formula():
    X, X_ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theta, xi = ([p.detach().clone() for p in part.parameters()] for part in (X, X_ema))
    model.TIJEPA.update_target(SimpleNamespace(context_encoder=X, target_encoder=X_ema), 0.9)
    for same, new, p, old in zip(X.parameters(), X_ema.parameters(), theta, xi, strict=True):
        assert torch.equal(same, p) and torch.allclose(new, 0.9 * old + 0.1 * p, atol=1e-7)


def test_sigreg_term_by_hand():
    context = torch.randn(5, 4, 3, generator=generator_of(0)) * 2
    directions = torch.randn(3, 256, generator=generator_of(7, 11)).double().numpy()
    t, directions = np.linspace(-3, 3, 33), directions / np.linalg.norm(directions, axis=0)
    shadows = context.mean(1).double().numpy() @ directions  # [B, 256]
    gaps = np.abs(np.exp(1j * shadows[:, :, None] * t).mean(0) - np.exp(-t * t / 2)) ** 2
    by_hand = 5 * np.trapezoid(gaps * np.exp(-t * t / 2), t).mean()
    assert model.sigreg_term(context, 7, 11).item() == pytest.approx(by_hand, rel=1e-4)


def save_text_encoder(folder, words=WORDS, file="config.json", **edit):
    tokenizer, bert = model.toy_bert(words)
    tokenizer.save_pretrained(folder)
    bert.save_pretrained(folder)  # without a pooler, which AutoModel would make up
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **edit}))


def test_frozen_encoders_have_no_dropout_in_train_mode_either(net):
    net.train()
    assert torch.equal(net.encode_texts(TEXTS)[0], net.encode_texts(TEXTS)[0])  # BERT has dropout
    net.encode_images(IMAGES)
    assert not net.image_encoder.vit.training


def test_unfit_input_and_encoders_are_refused_in_words(net, tmp_path, monkeypatch):
    asked = Mock(return_value="n")  # transformers asks whether to run a folder's code
    monkeypatch.setattr("builtins.input", asked)
    vit = timm.create_model("test_vit", num_classes=0).state_dict()
    del vit["blocks.1.attn.proj.weight"]
    torch.save(vit, tmp_path / "weights")
    (torn := tmp_path / "torn.safetensors").write_bytes(bytes(99))

    def load_text_encoder(words=WORDS, **edit):
        save_text_encoder(tmp_path, **edit)
        if words != WORDS:
            model.toy_bert(words)[0].save_pretrained(tmp_path)
        model.TextEncoder(str(tmp_path))

    def load_with(key):
        save_text_encoder(tmp_path)
        bert = model.toy_bert(WORDS)[1]
        bert.save_pretrained(tmp_path, state_dict={**bert.state_dict(), key: torch.zeros(1)})
        model.TextEncoder(str(tmp_path))

    def load_untokenized(family):
        config = AutoConfig.for_model(family, vocab_size=99, hidden_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, intermediate_size=32)
        AutoModel.from_config(config).save_pretrained(tmp_path / family)
        model.TextEncoder(str(tmp_path / family))

    def load_stand_in(content, name="weights"):
        path = tmp_path / "stand_in" / name
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        path.write_bytes(content)
        model.TextEncoder(str(path.parent)) if name != "weights" else model.ImageEncoder("test_vit", path)

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for attempt, words in (
            (lambda: net.encode(IMAGES, "red"), "with 'red': .* with a list of B strings"),
            (lambda: net.frozen_features(IMAGES / 255, TEXTS), r"torch.float32 with .* of torch.uint8"),
            (lambda: sample_masks((9, 5), 2, 0), "9 x 5 patch grid is too small.*--image_encoder"),
            (lambda: model.ImageEncoder("test_vit", f"{tmp_path}/weights"), "blocks.1.attn.proj.weight"),
            (lambda: model.ImageEncoder("test_vit", torn), "torn.safetensors: SafetensorError"),
            (lambda: model.ImageEncoder("test_resnet", pretrained=False), "num_prefix_tokens.*fixed patch"),
            (lambda: model.TIJEPA(replace(CONFIG, mask="before"), (Mock(grid=(6, 6)), None)), "a plain ViT"),
            (lambda: load_text_encoder(num_hidden_layers=3), "weights are not those of .*encoder.layer.2"),
            (lambda: load_text_encoder(num_hidden_layers=1), "weights are not those of .*encoder.layer.1"),
            (lambda: load_with("layers.9.bias"), "weights are not those of .*layers.9"),
            (lambda: load_text_encoder(auto_map={"AutoConfig": "a.B"}, model_type="a"), "cannot be loaded"),
            (lambda: load_text_encoder(file="tokenizer.json", model={}), "cannot be loaded: Exception: "),
            (lambda: load_text_encoder(file="tokenizer_config.json", pad_token=None), "no padding token"),
            *((lambda f=family: load_untokenized(f), "tokenizer") for family in UNTOKENIZED),
            (lambda: load_text_encoder([*WORDS, "more"]), "more tokens than its embedding"),
            (lambda: load_text_encoder(WORDS[3:]), "knows no English word"),
            (lambda: load_stand_in(pointer), "stand_in/weights is a web page or a pointer of git-lfs"),
            (lambda: load_stand_in(b"\n<!DOCTYPE html><p>Sign in"), "stand_in/weights is a web page"),
            (lambda: load_stand_in(b"\xef\xbb\xbf <?xml?>", "config.json"), "config.json is a web page"),
            (lambda: load_stand_in(b"<HTML>"), "weights is a web page"),
            (lambda: load_stand_in(b"<head>"), "weights is a web page"),
            *((lambda f=file: load_stand_in(pointer, f), f"{file} is a web page")
              for file in ("a.model", "a.safetensors", "pytorch_model.bin", "vocab.txt")),
            (lambda: load_stand_in(b"not a pickle"), "it is no file of weights, or one that runs code; f_I"),
            (lambda: model.ImageEncoder("toy", f"{tmp_path}/weights"), "toy's f_I takes no weights")):
        with pytest.raises(UserError, match=words):
            attempt()
    assert not asked.called


UNTOKENIZED = "bert", "roberta", "distilbert", "mpnet", "xlm-roberta", "electra"


@pytest.mark.parametrize("error", [
    model.HTTP.InvalidURL("Invalid port"), model.HTTP.HTTPError("403 Forbidden"), ImportError("no socksio"),
    huggingface_hub.errors.StrictDataclassError("hidden_size is text"), OSError("no config.json")])
def test_an_error_of_the_hub_is_a_sentence_with_its_cause(monkeypatch, error):
    error.__cause__ = ValueError("the cause")
    monkeypatch.setattr(model, "hf_hub_download", Mock(side_effect=error))
    monkeypatch.setattr(model.AutoTokenizer, "from_pretrained", Mock(side_effect=error))
    for load, name in ((model.ImageEncoder, model.JEPA_14), (model.TextEncoder, "a/b")):
        with pytest.raises(UserError, match=f"{name} cannot be loaded.*: {error} .the cause.; f_"):
            load(name)
    with pytest.raises(ZeroDivisionError), model.user_errors("a file", "advice"):
        1 / 0
    error.__cause__.__context__ = answer = ValueError("403 Forbidden")
    answer.response, answer.__cause__ = "the server's", error  # a circle
    with pytest.raises(UserError, match=f"{name} cannot be loaded.*: {error} .403 Forbidden.; f_"):
        load(name)


@pytest.mark.parametrize("name, prefix, kind", [
    ("test_vit", 1, "ijepa"), ("vit_relpos_small_patch16_224", 0, "plain"), ("test_vit", 1, "hub")])
def test_image_encoder_gives_the_patch_tokens_of_normalised_pixels(tmp_path, monkeypatch, name, prefix, kind):
    if kind == "plain":  # one with buffers and without a class token, made small
        monkeypatch.setattr(timm, "create_model", lambda name, create=timm.create_model, **options: create(
            name, img_size=160, embed_dim=64, depth=2, num_heads=4, **options))
    vit = timm.create_model(name, num_classes=7).eval()  # a classifier may be left over: f_I has none
    plain, path = vit.state_dict(), tmp_path / "weights"
    own, other = ({f"module.{key}": value + n for key, value in plain.items()} for n in (0, 1))
    torch.save({"encoder": own, "target_encoder": other, "predictor": {}} if kind == "ijepa" else plain, path)
    vit.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.2, 0.4, 0.6))
    timm.models.save_for_hf(vit, tmp_path / "hub")
    encoder = model.ImageEncoder(*[f"local-dir:{tmp_path}/hub"] if kind == "hub" else [name, str(path)])
    config = dict(timm.data.resolve_model_data_config(encoder.vit), crop_pct=1.0, input_size=(3, 160, 160))
    transform = timm.data.create_transform(**config)
    images = torch.randint(256, (2, 3, 160, 160), generator=generator_of(0), dtype=torch.uint8)
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert config["mean"][0] == (0.1 if kind == "hub" else 0.5)
    assert torch.allclose(encoder(images), vit.forward_features(pixels)[:, prefix:], atol=1e-5)
    assert encoder.grid == (10, 10) and encoder.input_size == (160, 160)
    if kind == "hub":  # of some patches alone: timm's own way to drop the others
        index = torch.tensor([[3, 50, 99], [0, 7, 8]])
        with_class = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + index], dim=1)
        vit.patch_drop.register_forward_hook(lambda _, given, tokens: model.gather(tokens, with_class))
        assert torch.allclose(encoder(images, index), vit.forward_features(pixels)[:, 1:], atol=1e-5)


@pytest.mark.parametrize("given", ["weights", "weights/model.safetensors", "the hub"])
def test_image_encoder_takes_i_jepa_from_the_hub(tmp_path, monkeypatch, given):
    sizes = dict(image_size=96, patch_size=16, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = IJepaConfig(**sizes, intermediate_size=256, layer_norm_eps=1e-6, initializer_range=0.3)
    saved, asked = IJepaModel(config).eval(), Mock(return_value=str(tmp_path / "weights/model.safetensors"))
    saved.save_pretrained(tmp_path / "weights")
    monkeypatch.setattr(model, "hf_hub_download", asked)
    monkeypatch.setattr(timm, "create_model", lambda name, create=timm.create_model, **options: create(
        name, img_size=96, patch_size=16, embed_dim=64, depth=2, num_heads=4, **options))
    encoder = model.ImageEncoder(model.JEPA_14, str(tmp_path / given) * (given != "the hub"))
    images = torch.randint(256, (2, 3, 96, 96), generator=generator_of(0), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # ImageNet's
    expected = saved((images / 255 - mean) / std).last_hidden_state
    assert torch.allclose(encoder(images), expected, atol=1e-5) and encoder.interpolation == "bicubic"
    if given == "the hub":
        asked.assert_called_once_with("facebook/ijepa_vith14_1k", "model.safetensors")


@pytest.mark.parametrize("kind, longest", [("bert", 64), ("gte", 128)])  # gte: the paper's
def test_text_encoder_gives_the_states_of_a_model_from_the_hub(tmp_path, kind, longest):
    sizes = dict(vocab_size=20, hidden_size=16, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
                 num_hidden_layers=2, max_position_embeddings=longest if kind == "bert" else 8192)
    save_text_encoder(tmp_path)
    saved = AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    saved.save_pretrained(tmp_path, state_dict={**saved.state_dict(), "cls.bias": torch.zeros(1)})  # a head
    for unread in ("README.md", "pytorch_model.bin"):
        (tmp_path / unread).write_text("<html>")
    encoder = model.TextEncoder(str(tmp_path))
    states, mask = encoder([*TEXTS, "", "  "])
    assert mask.tolist() == [[n < 2 + words for n in range(13)] for words in (3, 11, 1, 1, 1)]
    assert encoder.dim == 16 and encoder(["dog " * 500])[0].shape[1] == longest
    ids = torch.tensor([[2, *(4 + WORDS.index(word) for word in TEXTS[0].split()), 3]])
    assert torch.allclose(states[0, :5], saved(input_ids=ids).last_hidden_state[0], atol=1e-5)


def test_fingerprint_has_all_that_decides_the_encoders_output(net, tmp_path):
    prints, f_I = [], net.image_encoder
    for edit in ({}, {"transformers_version": "4.0"}, {"num_attention_heads": 2}, {"words": WORDS[::-1]},
                 {"file": "tokenizer_config.json", "do_lower_case": False},
                 {"file": "tokenizer_config.json", "model_max_length": 7}):
        save_text_encoder(tmp_path, **edit)
        prints.append(model.TextEncoder(str(tmp_path)).fingerprint())
    assert prints[0] == prints[1] and all(model.differences(prints[0], other) for other in prints[2:])
    prints = [json.loads(json.dumps(net.fingerprint()))]
    for values, key in ((vars(f_I.vit.blocks[1].attn), "num_heads"), (vars(f_I), "input_size"),
                        (vars(f_I), "interpolation"), (f_I.vit.pretrained_cfg, "architecture")):
        values[key] = "other"
        prints.append(net.fingerprint())
    for value in (f_I.mean, f_I.std, *f_I.parameters(), *net.text_encoder.parameters()):
        value.view(-1)[-1] += 1e-3
        prints.append(net.fingerprint())
    assert all(model.differences(then, now) for then, now in zip(prints, prints[1:]))


def test_a_checkpoint_runs_no_code_and_is_refused_unless_complete(pretrained, tmp_path):
    complete, made = torch.load(pretrained.checkpoint), tmp_path / "code was run"
    makes_folder = type("MakesFolder", (), {"__reduce__": lambda self: (os.mkdir, (str(made),))})()
    contents = {key: {k: v for k, v in complete.items() if k != key} for key in model.CHECKPOINT_KEYS}
    contents |= {"code": makes_folder, "a list": [1, 2], "no X": {**complete, "model": {"predictor": {}}}}
    content = pretrained.checkpoint.read_bytes()
    for name in (*contents, "torn"):
        out, path = tmp_path / name, tmp_path / name / "checkpoint.pt"
        out.mkdir()
        (out / ".lock").touch()
        torch.save(contents[name], path) if name in contents else path.write_bytes(content[:-999])
        before = tree(out)
        for command in (["--eval", path, "--device", "cpu"], [*pretrained.options, "--resume"]):
            said = call(pretrain, *command, "--out", out, code=2).err
            assert f"{path} is not a complete checkpoint" in said and tree(out) == before
    assert not made.exists()


def test_from_checkpoint_loads_all_weights_and_takes_moved_encoders_but_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        torch.manual_seed(number)
        torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), f"vit{number}")
        save_text_encoder(Path(f"bert{number}"), layer_norm_eps=10.0 ** (-6 + number))
    encoders = model.ImageEncoder("test_vit", "vit0"), model.TextEncoder("bert0")
    config = replace(CONFIG, image_encoder="test_vit", image_weights="vit", text_encoder="bert",
                     target="whitened")
    net = model.TIJEPA(config, encoders)
    randomize(net.context_encoder)  # now X~ differs from X
    parts = {name: getattr(net, name).state_dict() for name in model.TRAINED}
    contents = {"config": vars(config), "encoders": net.fingerprint(), "model": parts}
    torch.save(dict.fromkeys(model.CHECKPOINT_KEYS) | contents, "checkpoint.pt")
    with pytest.raises(UserError, match="^checkpoint.pt was trained .*: f_I weights .* f_T layer_norm_eps"):
        model.TIJEPA.from_checkpoint("checkpoint.pt", "vit1", "bert1")
    loaded = model.TIJEPA.from_checkpoint("checkpoint.pt", "vit0", "bert0")[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())


def test_pick_device_and_dtype_take_what_there_is(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float16)):  # torch counts emulation as well
        supported = lambda including_emulation=True: fast or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert model.pick_dtype("auto", torch.device("cuda")) == dtype
    for name in "empty set_float32_matmul_precision cuda.set_device backends.cuda.enable_cudnn_sdp".split():
        monkeypatch.setattr(f"torch.{name}", Mock())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for there, name, device in ((False, "auto", "cpu"), (True, "auto", "cuda:0"), (True, "cuda:1", "cuda:1")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        assert model.pick_device(name) == torch.device(device)
    torch.cuda.set_device.assert_called_with(torch.device("cuda:1"))
    torch.backends.cuda.enable_cudnn_sdp.assert_called_with(False)


# ---- data.py: pictures, the toy world, COCO ----
def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


SMOOTH = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3) ** 2).resize((240, 160))


@pytest.mark.parametrize("form, mode, width, method, decoded", [
    ("JPEG", "RGB", 1200, "bicubic", 150),  # a large one is decoded at an eighth
    ("JPEG", "CMYK", 90, "bicubic", 90), ("PNG", "L", 60, "bilinear", 60)])
def test_read_image_is_upright_rgb_and_squashed(tmp_path, monkeypatch, form, mode, width, method, decoded):
    path, plain = tmp_path / "image", SMOOTH.resize((width, 2 * width // 3)).convert(mode)
    encoder, resampling = SimpleNamespace(input_size=(32, 48), interpolation=method), Image.Resampling
    monkeypatch.setattr(ImageOps, "exif_transpose", Mock(wraps=ImageOps.exif_transpose))
    for orientation in range(1, 9):
        plain.getexif()[0x0112] = orientation
        plain.save(path, form, quality=95, exif=plain.getexif())
        pixels = data.read_image(path, encoder)
        assert max(ImageOps.exif_transpose.call_args.args[0].size) == decoded
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        expected = np.array(upright.resize((48, 32), resampling[method.upper()])).transpose(2, 0, 1)
        off = np.abs(pixels.numpy() - expected.astype(float))
        assert pixels.dtype == torch.uint8 and off.max() <= (8 if width == 1200 else 0)


def test_what_is_no_image_and_texts_that_are_cut_are_counted(tmp_path, encoded, monkeypatch, capsys):
    cut, bomb, missing = paths = [tmp_path / name for name in "abc"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    SMOOTH.save(bomb, "PNG")
    SMOOTH.save(cut, "JPEG")
    os.truncate(cut, 1500)
    texts = ["red " * 62, "red " * 61, *198 * ["xyzzy"]]  # [CLS] and [SEP] count as well
    cache = data.FeatureCache(tmp_path / "cache", [(path, texts) for path in paths], encoded.net)
    assert list(cache.unreadable) == [0, 1, 2]
    said = "3 images (3 unreadable), 600 texts; 3 have 64 tokens or more: f_T reads 64; f_T does not know 27%"
    assert f"{said} of their tokens\n" in capsys.readouterr().out
    text_encoder = encoded.net.text_encoder
    rows = int((size := len(text_encoder.tokenizer)) / 0.9) + 1
    monkeypatch.setattr(text_encoder.bert.config, "vocab_size", rows)
    data.FeatureCache(tmp_path / "cache", cache.items, encoded.net)
    assert f"tokens; f_T's tokenizer has {size} of the {rows} tokens" in capsys.readouterr().out
    monkeypatch.setattr(Image, "open", Mock(side_effect=MemoryError))  # is not the picture's fault
    assert data.run_command(lambda: data.read_image(cut, encoded.net.image_encoder), "--x") == 2


def test_toy_data_are_always_the_same_bytes_and_replace_nothing(tmp_path, monkeypatch):
    toy, again, mine = (tmp_path / name for name in ("toy", "a/b/again", "mine"))
    mine.mkdir()
    for folder in (toy, again):
        data.write_toy(folder, 4, 5)
    before = tree(tmp_path)
    assert tree(toy) == tree(again)
    assert f"{mine} exists, but not as toy data of" in call(data, "toy", mine, code=2).err
    monkeypatch.setattr(data, "write_toy_mvsa", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.write_toy(tmp_path / "interrupted", 4, 5)
    assert tree(tmp_path) == before


def caption_file(images, notes):
    content = {"images": [{"id": i, "file_name": name} for i, name in images],
               "annotations": [{"image_id": i, "caption": text} for i, text in notes]}
    return json.dumps(content).encode()


def test_coco_is_read_by_image_id_what_is_missing_is_counted_and_damage_refused(tmp_path):
    (tmp_path / CAPTIONS).parent.mkdir()
    (tmp_path / "train2017").mkdir()
    paths = [tmp_path / "train2017" / f"{i}.jpg" for i in range(5)]
    for path in paths[1:]:
        path.touch()
    notes = [(4, "d"), (1, " a "), (2, "c"), (1, "b"), (0, "not there"), (7, "not listed"), (8, "not listed")]
    content = caption_file([(i, paths[i].name) for i in (4, 3, 2, 1, 0)], notes)
    (tmp_path / CAPTIONS).write_bytes(content)
    items, skipped = data.load_coco(tmp_path)
    assert items == [(paths[1], ["a", "b"]), (paths[2], ["c"]), (paths[4], ["d"])]
    assert skipped == {"captioned image not listed": 2, "image not on disk": 1, "image without caption": 1}
    assert data.load_coco(tmp_path, 2) == (items[:2], skipped)
    for old, new, words in ((b"[", b"", "not a COCO"), (b'"id": 1', b'"id": true', "not a COCO"),
                            (b'"1.jpg"', b'"0.jpg"', "twice"), (b'"id": 1', b'"id": 0', "twice")):
        with pytest.raises(UserError, match=words):
            data.parse_captions(content.replace(old, new, 1), "captions.json")


def test_coco_is_fetched_over_a_bad_connection_and_not_fetched_again(tmp_path, monkeypatch):
    """Each address fails, then breaks off, then answers; 39.jpg is nowhere."""
    packed, root, asked = io.BytesIO(), "http://images.cocodataset.org", Counter()
    names = ["../a b#%41.jpg", *(f"{i}.jpg" for i in range(1, 40))]
    with data.ZipFile(packed, "w") as file:
        file.writestr(CAPTIONS, caption_file([*enumerate(names)][::-1], [(i, "red") for i in range(40)]))
    files = {f"{root}/annotations/annotations_trainval2017.zip": packed.getvalue(),
             f"{root}/train2017/a%20b%23%2541.jpg": b"odd",
             **{f"{root}/train2017/{name}": name.encode() for name in names[1:39]}}

    def urlopen(url, timeout):
        asked[url] += 1
        if asked[url] == 1 or url not in files:
            raise OSError("HTTP Error 404")
        read = Mock(side_effect=data.HTTPException) if asked[url] == 2 else lambda: files[url]
        return contextlib.nullcontext(SimpleNamespace(read=read))

    monkeypatch.setattr(data, "urlopen", urlopen)
    monkeypatch.setattr(data, "PAUSES", (0, 0, 0))
    for images, count in ((30, 31), (30, 31), (39, 40)):
        call(data, "coco", tmp_path, "--images", images)
        assert asked == dict.fromkeys([*files][:count], 3)
    _, *photos = files.values()
    assert tree(tmp_path / "train2017") == {Path(name).name: photo for name, photo in zip(names, photos)}
    said = call(data, "coco", tmp_path, "--images", 0, code=2).err
    assert f"{root}/train2017/39.jpg cannot be fetched: HTTP Error 404; run again" in said


def test_epoch_order_has_every_image_once_with_one_of_its_captions():
    cache, train = SimpleNamespace(first=np.arange(0, 210, 5)), np.arange(1, 41)
    first, again, *others = (data.epoch_order(cache, train, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert np.array_equal(first, again)
    for images, texts in (first, *others):
        assert sorted(images) == list(train) and np.array_equal(texts // 5, images)
    for images, texts in others:
        assert not np.array_equal(images, first[0]) and not np.array_equal(texts % 5, first[1] % 5)


def test_hold_out_trains_on_no_held_out_image_and_a_lost_image_moves_no_other():
    cache = SimpleNamespace(items=[(Path(f"{i:012d}.jpg"), []) for i in range(100)], pictures=[*range(100)])

    def hold_out(lost=None, count=40):
        cache.readable = np.array([i for i in range(100) if i != lost])
        train, held = data.hold_out(cache, count)
        assert sorted([*train, *held]) == list(cache.readable) and len(held) == (count or 10)
        return set(held)

    held = hold_out()
    assert held != set(range(40)) and all(held - {lost} <= hold_out(lost) for lost in range(0, 100, 7))
    cache.items.reverse()
    assert {99 - i for i in hold_out()} == held and hold_out(count=0)


def test_hold_out_does_not_divide_copies_of_a_picture():
    items = [(Path(f"{i:012d}.jpg"), []) for i in range(100)]
    cache = SimpleNamespace(items=items, readable=np.arange(100), pictures=[i // 2 for i in range(100)])
    for count in range(2, 60):
        train, held = ({cache.pictures[i] for i in part} for part in data.hold_out(cache, count))
        assert not train & held and 2 * len(held) in (count, count + 1)
    cache.pictures = [max(0, i - 30) for i in range(100)]  # 31 copies: not among the first
    assert len(data.hold_out(cache, 0)[1]) == 10
    cache.pictures = [0] * 100
    with pytest.raises(UserError, match="--held_out 100 of 100"):
        data.hold_out(cache, 0)


# ---- data.py: the feature cache ----
@pytest.fixture(scope="session")
def encoded(toy, tmp_path_factory):
    torch.manual_seed(0)
    words = sorted({word for _, words in data.COLOURS for word in words})
    net, (items, _) = model.TIJEPA(replace(CONFIG, vocabulary=words)), data.load_coco(toy / "coco")
    items = [items[0], items[-1], *items[1:-1]]  # the second is broken; the texts get different lengths
    items = [(path, [" ".join(text.split()[k:]) for k, text in enumerate(texts)]) for path, texts in items]
    items += items[2:32]
    cache = data.FeatureCache(tmp_path_factory.mktemp("encoded"), items, net, pixels=True)
    return SimpleNamespace(net=net, items=items, cache=cache, name=cache.folder.name)


def test_cached_features_are_those_encoded_on_the_fly(encoded, monkeypatch):
    cache, net, items, images = encoded.cache, encoded.net, encoded.items, np.arange(40, 1, -2)
    owners, numbers = (images + 3) % 41, images % 5
    draws = [(images, cache.first[owners] + numbers), (images[:3], cache.first[:3])]
    pictures = torch.stack([data.read_image(items[i][0], net.image_encoder) for i in images])
    texts = [items[owner][1][number] for owner, number in zip(owners, numbers)]
    expected = net.frozen_features(pictures, texts)
    for dtype, atol in ((torch.float32, 3e-3), (torch.bfloat16, 0.03)):
        monkeypatch.setattr(net, "dtype", dtype)
        features, few = cache.batches(draws)
        mask = features.text_mask
        assert features.s_image.dtype == features.s_text.dtype == dtype and len(few.s_image) == 3
        assert torch.equal(mask, expected.text_mask) and not mask.all() and not features.s_text[~mask].any()
        assert torch.equal(features.images, pictures)
        assert torch.allclose(features.s_image.float(), expected.s_image, atol=atol)
        assert torch.allclose(features.s_text[mask].float(), expected.s_text[mask], atol=atol)
    assert list(cache.unreadable) == [1] and np.isnan(cache.map("image.float16")[1]).all()
    means = [features.s_image[0].float().mean(0), features.s_text[0, mask[0]].float().mean(0)]
    for every, index, mean in zip(cache.means(), (images[0], draws[0][1][0]), means):
        assert torch.allclose(every[index], mean, atol=0.03) and every.dtype == torch.float32
    for one in ("encode_images", "encode_texts"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="do not fit float16"):
            patch.setattr(net, one, lambda given, real=getattr(net, one): (
                1e9 * real(given) if one == "encode_images" else (1e9 * real(given)[0], real(given)[1])))
            cache.encode([pictures[0]], texts[:1])


def test_a_copy_needs_no_new_cache_and_other_data_or_encoders_get_one(encoded, tmp_path):
    net, root, originals = encoded.net, tmp_path / "cache", encoded.items[2:6]
    items = [(shutil.copyfile(path, tmp_path / f"{9 - number}.jpeg"), texts)
             for number, (path, texts) in enumerate(originals)]
    (one, texts), (two, others), *rest = items
    again, brighter, half = (model.TIJEPA(net.config) for _ in range(3))
    brighter.image_encoder.mean[0] += 0.1
    half.dtype = torch.bfloat16
    recipes = [(originals, net), (items, net), (items, again),  # the same; and what differs:
               (items, brighter), (items, half), (items[:3], net), (items[::-1], net),
               ([(one, ["red " + texts[0], *texts[1:]]), *items[1:]], net),
               ([(one, texts[:4]), (two, texts[4:] + others), *rest], net)]  # a caption is another picture's
    folders = [data.FeatureCache(root, *recipe).folder for recipe in recipes]
    Image.open(one).rotate(90).save(one, "JPEG")  # another picture of the same name
    folders.append(data.FeatureCache(root, items, net).folder)
    assert len(set(folders[:3])) == 1 and len(set(folders)) == len(list(root.iterdir())) == 8


def test_a_cache_of_a_wrong_size_is_encoded_anew_to_the_same_bytes(encoded, tmp_path):
    folder = shutil.copytree(encoded.cache.folder, tmp_path / encoded.name)
    for name, change in (("image.float16", -2), ("text.float16", 2), ("image.uint8", None)):
        path = folder / name
        path.unlink() if change is None else os.truncate(path, path.stat().st_size + change)
        data.FeatureCache(tmp_path, encoded.items, encoded.net, pixels=True)
        assert tree(folder) == tree(encoded.cache.folder)


def test_a_disk_that_fails_makes_no_picture_unreadable(encoded, tmp_path, monkeypatch, capsys):
    picture, read = encoded.items[40][0], Path.read_bytes
    decode, bad = Image.Image.convert, OSError(errno.EIO, "bad sector")
    good, gone = read(picture), FileNotFoundError(errno.ENOENT, "gone")
    for disk, says in (([bad], "bad sector"), ([good, bad], "bad sector"),  # as it is hashed, or decoded
                       ([good, b"other"], "it changed while it was read"), ([good, gone], "gone")):
        disk = Mock(side_effect=disk)
        monkeypatch.setattr(Path, "read_bytes", lambda path: disk() if path == picture else read(path))
        assert data.run_command(lambda: data.FeatureCache(tmp_path, encoded.items, encoded.net)) == 2
        assert f"error: {picture} cannot be written or read: {says}" in capsys.readouterr().err
        assert set(tree(tmp_path / encoded.name)) <= {".lock"}
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=OSError(errno.ENOMEM, "no memory")))
    assert data.run_command(lambda: data.FeatureCache(tmp_path, encoded.items, encoded.net)) == 2
    assert re.search(r"error: .*\.jpg cannot be written or read: no memory", capsys.readouterr().err)
    monkeypatch.setattr(Image.Image, "convert", decode)
    assert len(data.FeatureCache(tmp_path, encoded.items, encoded.net).unreadable) == 1
    monkeypatch.setattr(Path, "stat", Mock(side_effect=PermissionError(errno.EACCES, "no")))
    for read in (data.read_file, data.is_file):  # what the disk does not tell is not "no file"
        with pytest.raises(PermissionError):
            read(picture)


@pytest.mark.parametrize("lacks", ["fcntl.flock", "mmap.mmap", "os.fsync"])
def test_a_disk_without_locks_mmap_or_fsync_is_named(encoded, tmp_path, monkeypatch, capsys, lacks):
    monkeypatch.setattr(lacks, Mock(side_effect=OSError(errno.ENOSYS, "no such function")))
    assert data.run_command(lambda: data.FeatureCache(tmp_path, encoded.items, encoded.net)) == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path}/" in said and "no such function; does its disk have file locks, mmap" in said


def test_a_killed_cache_is_encoded_anew_once_to_the_same_bytes(encoded, tmp_path, monkeypatch, capfd):
    given, encode_images = (tmp_path, encoded.items, encoded.net), encoded.net.encode_images
    folder, half = tmp_path / encoded.name, multiprocessing.get_context("fork").Event()
    with monkeypatch.context() as patch:  # for ever in the second chunk; the first has the broken picture
        patch.setattr(encoded.net, "encode_images", lambda images:
                      encode_images(images) if len(images) == 31 else half.set() or time.sleep(600))
        builder = forked(data.FeatureCache, *given)
    assert half.wait(60)
    waiting = [forked(data.FeatureCache, *given) for _ in range(2)]
    time.sleep(0.5)
    assert all(process.is_alive() for process in waiting)
    assert set(tree(folder)) == {".lock", "image.float16.tmp", "text.float16.tmp"}  # none has its name
    builder.kill()  # kill -9: nothing of its own can free the lock
    assert [process.join(60) or process.exitcode for process in waiting] == [0, 0]
    assert tree(folder).items() <= tree(encoded.cache.folder).items()
    assert capfd.readouterr().err.count("cannot be read as an image") == 2  # the killed one's, and one more


# ---- data.py: MVSA, its splits, damaged files ----
def test_posts_of_any_encoding_are_read_and_dropped_for_each_reason(tmp_path):
    texts = {b"plain\r\n": "plain", b"\xef\xbb\xbfbom": "bom", b"": "", b"caf\xe9": "caf\u00e9",
             "caf\u00e9 \u4f60".encode(): "caf\u00e9 \u4f60", b"\xff\xff\xff": "\xff" * 3,
             "\u4f60".encode("gb18030"): "\u4f60", "\u4f60 \u0416".encode("utf-16"): "\u4f60 \u0416"}
    p, u, n = data.LABELS
    votes = [(p, p), (u, n), (u, u), *5 * [(n, u)], (p, n), (n, u), (u, u)]
    rows = ["ID\ttext,image", *(f"{i}\t{','.join(pair)}" for i, pair in enumerate(votes))]
    (tmp_path / "labelResultAll.txt").write_text("\n".join(rows))
    (tmp_path / "data").mkdir()
    for i, content in enumerate([*texts, b"opposite", b"no image", b"no text"]):
        (tmp_path / f"data/{i}.txt").write_bytes(content)
        (tmp_path / f"data/{i}.jpg").touch()
    (tmp_path / "data/9.jpg").unlink()
    (tmp_path / "data/10.txt").unlink()
    posts, skipped = data.load_mvsa(tmp_path)
    labels = "positive", "negative", "neutral", *5 * ["negative"]
    assert posts == [data.Post("single", str(i), tmp_path / f"data/{i}.jpg", text, labels[i])
                     for i, text in enumerate(texts.values())]
    assert skipped == {"text and image of opposite polarity": 1, "text or image file missing": 2}


def test_find_mvsa_knows_both_sets_by_their_headers(toy, tmp_path, monkeypatch, capsys):
    folders = {"single": tmp_path / "b", "multi": tmp_path / "y/a"}
    for name, folder in zip(("MVSA_Single", "MVSA_Multiple"), folders.values()):
        shutil.copytree(toy / "mvsa" / name, folder)
    assert data.find_mvsa(tmp_path) == folders
    assert data.find_mvsa(tmp_path / "b") == {"single": tmp_path / "b"}
    with pytest.raises(UserError, match="MVSA not found"):
        data.find_mvsa(shutil.copytree(tmp_path / "b", tmp_path / "deep/1/2/3").parents[2])
    shutil.rmtree(tmp_path / "deep")
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    with pytest.raises(UserError, match="two folders hold MVSA-single"):
        data.find_mvsa(tmp_path)
    monkeypatch.setattr(os, "scandir", lambda path, scan=os.scandir: scan(
        __file__ if str(path).endswith("copy") else path))
    assert data.find_mvsa(tmp_path) == folders and f"directory: '{__file__}'" in capsys.readouterr().err


@pytest.mark.parametrize("name, off", [("stratified", 0.02), ("stratified_groups", 0.05), ("random", 0.1)])
def test_splits_are_8_1_1_of_all_posts_by_their_seed(name, off):
    labels, groups = np.random.default_rng(0).choice(3, 505, p=[0.6, 0.1, 0.3]), np.arange(505)
    groups[250:300] = np.repeat(np.arange(10), 5)  # and posts 0-9 with them
    split = data.random_split if name == "random" else lambda labels, seed: (
        data.stratified_split(labels, seed, groups[:len(labels)] if "groups" in name else None))
    parts, again, other = (split(labels, seed) for seed in (0, 0, 1))
    assert all(map(np.array_equal, parts, again)) and not any(map(np.array_equal, parts, other))
    once = [np.unique(part) for part in parts]
    assert sorted(np.concatenate(once)) == list(range(505))
    assert np.allclose([len(part) for part in once], [404, 50, 51], atol=2)
    shares = [np.bincount(labels[part]) / len(part) for part in once]
    assert np.allclose(shares, np.bincount(labels) / 505, atol=off)
    if "groups" in name:  # none is divided
        assert sum(len(set(groups[part])) for part in parts) == len(set(groups))
    if name == "random":  # training posts are repeated until the classes are equal
        assert list(np.bincount(labels[parts[0]])) == 3 * [np.bincount(labels[once[0]]).max()]
        assert np.bincount(parts[0]).max() < 30 and len(parts[1]) == len(parts[2]) == 50  # the rarest 6 times
    else:
        assert sum(map(len, parts)) == 505
        with pytest.raises(UserError, match="cannot split"):
            split(np.array([0, 0, 0, 1]), 0)


def write_split(folder, *parts):
    folder.mkdir(parents=True)
    for name, part in zip(("train", "dev", "test"), parts):
        content = [{"id": i, "text": "", "emotion_label": label} for i, label in part]
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_clmlf_split_reads_the_parts_and_counts_what_does_not_match(tmp_path):
    posts = [data.Post("single", str(i), Path(), "", data.LABELS[i % 3]) for i in range(30)]
    odd = [replace(post, label="positive") for post in posts[:3]] + posts[3:]  # 1 and 2 have other labels
    entries = [(str(i), i % 3) for i in range(28)] + [("999", 0)]
    root = tmp_path / "single and multiple"  # its own name is no hint
    write_split(root / "MVSA-Single/10-flod-1", entries[:20], entries[20:24], entries[24:])
    write_split(root / "MVSA-multiple/10-flod-1", entries[:20], [], entries[20:])
    for given, label in ((posts, 0), (odd[:2] + posts[2:], 1)):  # 1 of 28 is below 5 %
        parts, counts = data.clmlf_split(root, given)
        assert [part.tolist() for part in parts] == [list(range(20)), [20, 21, 22, 23], [24, 25, 26, 27]]
        assert counts == {"listed, but not among the posts": 1, "not listed, so not used": 2,
                          "labelled otherwise there": label, "listed twice": 0}
    linked = tmp_path / "linked"
    (linked / "a").mkdir(parents=True)
    for link, to in (("a/b", root), ("a/loop", linked), ("loop", linked)):
        (linked / link).symlink_to(to)
    assert [len(part) for part in data.clmlf_split(linked, given)[0]] == [20, 4, 4]
    shutil.rmtree(linked)
    write_split(tmp_path / "odd", [("0", 3), *entries[1:20]], entries[20:24], entries[24:])
    assert data.clmlf_split(tmp_path / "odd", posts)[1]["labelled otherwise there"] == 1
    shutil.rmtree(tmp_path / "odd")
    write_split(tmp_path / "deep/1/2/3/4/5/6", *3 * [entries[:2]])
    with pytest.raises(UserError, match="found 0"):
        data.clmlf_split(tmp_path / "deep", posts)
    shutil.rmtree(tmp_path / "deep")
    write_split(tmp_path / "twice", entries[:20], entries[20:24], entries[23:])
    write_split(tmp_path / "bad", entries[:20], [("1", None)], entries[20:])
    for folder, given, words in (
            (root, odd, "is not a split of MVSA-single"), (tmp_path / "twice", posts, "is not a split"),
            (root / "MVSA-multiple", posts, "is not a split"), (tmp_path / "bad", posts, "dev.json is no"),
            (tmp_path, posts, "looked for one train.json of MVSA-single,.* found 2")):
        with pytest.raises(UserError, match=words):
            data.clmlf_split(folder, given)


def test_duplicate_groups_join_posts_of_the_same_words_or_image(tmp_path):
    texts = ["first", "Good day! http://t.co/x", "RT @someone: good DAY", "@me good day", "something",
             "http://t.co/a", "@you http://t.co/b", "else", "good day"]
    posts = [data.Post("single", "", tmp_path / f"{i}.jpg", text, "") for i, text in enumerate(texts)]
    for post, image in zip(posts, [0, 1, 2, 3, 4, 5, 6, 4, 0]):
        post.image.write_bytes(b"image %d" % image)
    assert list(data.duplicate_groups(posts)) == [0, 0, 0, 0, 4, 5, 6, 4, 0]  # the last is a link
    assert data.repeats(posts, [0, 1, 4], [2, 5, 7], [8, 6]) == [
        [("words", 2), ("image", 7)], [("image", 8), ("words", 8)]]


def test_merge_labels_lets_neutral_give_way_and_drops_opposites():
    names = dict(zip("PUN", data.LABELS))
    for case, label in zip("PP UU NN PU UP NU UN PN NP".split(), "PUNPPNN--", strict=True):
        assert data.merge_labels(*map(names.get, case)) == names.get(label), case


@pytest.mark.parametrize("end, code", [("\n", "utf-8"), ("\r\n", "utf-8-sig"), ("\r", "utf-8")])
def test_read_labels_takes_what_two_of_three_say_and_refuses_damaged_lines(tmp_path, end, code):
    words, none = {"P": "positive", "U": " Neutral", "N": "NEGATIVE "}, "no majority"
    opposite = "text and image of opposite polarity"
    cases = {**dict.fromkeys(("PP PP NU", "PU UU PN", "UP UP PN"), "positive"), "UU UU PN": "neutral",
             **dict.fromkeys(("NN NU UN", "UN UN PP", "NU NU UP"), "negative"), "PU UU NU": none,
             "PP PN PU": none, "PN PN UU": opposite, "NP NP UU": opposite}
    rows = ["\t".join([case, *(f"{words[text]},{words[image]}" for text, image in case.split())])
            for case in cases]
    path, good = tmp_path / "labels", ["ID" + 3 * "\ttext,image", "", *rows, ""]
    path.write_bytes(end.join(good).encode(code))
    kind, labels, skipped = data.read_labels(path)
    assert kind == "multi" and {**labels, **skipped} == cases
    for line, bad in ((0, "ID\ttext"), (0, good[0] + "\ttext,image"), (3, good[2]), (12, good[11]),
                      (2, good[2] + "x"), (3, good[3][8:]), (3, "\x0b" + good[3].replace("positive", "none")),
                      (4, good[4].replace(",", ";")), (4, "caf\u00e9" + good[4]), (4, good[4][:-9])):
        path.write_bytes(end.join([*good[:line], bad, *good[line + 1:]]).encode(code))
        with pytest.raises(UserError, match=f"line {line + 1}:" if line else "the first line"):
            data.read_labels(path)


# ---- pretrain.py: what the loop is made of ----
def test_x_and_g_alone_get_gradients_and_their_biases_and_norms_are_not_decayed(net):
    net.train()(net.frozen_features(IMAGES, TEXTS), sample_masks(net.grid, 3, 0)).energy.mean().backward()
    decayed, plain = (set(group["params"]) for group in pretrain.build_optimizer(net).param_groups)
    for name, p in net.named_parameters():
        trained = name.startswith(("context_encoder", "predictor"))
        assert p.requires_grad == (p.grad is not None and bool(p.grad.any())) == trained, name
        small = bool(re.search(r"bias$|norm|_proj\.1", name))
        assert (p in decayed, p in plain) == (trained and not small, trained and small), name


def test_warmup_cosine_by_hand():
    rates = [pretrain.warmup_cosine(step, 9, 4, 0.2, 1.0, 0.1) for step in range(9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert [pretrain.cosine(*of, 2, 5) for of in ((0, 1), (1, 3), (2, 3))] == pytest.approx([2, 3.5, 5])


def test_retrieval_metrics_by_hand():
    energies = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 1.0], [0.5, 5.0, 5.0]])
    by_hand = {"auc": (2 + 1.5 + 0.5) / 6, "recall@1": 1 / 3, "recall@5": 1.0}
    assert pretrain.retrieval_metrics(energies) == pytest.approx(by_hand)
    ranked = pretrain.retrieval_metrics(torch.arange(8.0).expand(8, 8))  # an own caption at each rank
    assert ranked == pytest.approx({"auc": 0.5, "recall@1": 1 / 8, "recall@5": 5 / 8})
    constant = pretrain.retrieval_metrics(torch.ones(9, 9))  # it says nothing
    assert constant == {"auc": 0.5, "recall@1": 0, "recall@5": 0}
    with pytest.raises(FloatingPointError, match="an energy is not finite"):
        pretrain.retrieval_metrics(energies.where(energies != 0.5, np.inf))


def test_contrastive_similarity_is_that_of_two_layers_trained_by_info_nce():
    seed, rng, first = 1, np.random.default_rng(1), np.arange(0, 301, 2)
    latent = rng.normal(size=(150, 6))
    images = torch.tensor(latent @ rng.normal(size=(6, 20)) + rng.normal(0, 4, (150, 20))).float()
    texts = torch.tensor(latent.repeat(2, 0) @ rng.normal(size=(6, 30)) + rng.normal(0, 4, (300, 30))).float()
    cache = SimpleNamespace(first=first, means=lambda: (images, texts))
    train, held_out = np.arange(30, 150), np.arange(30)
    similarity = pretrain.contrastive_similarity(cache, train, held_out, seed)
    x, t = ((z - z[n:].mean(0)) / z[n:].std(0) for z, n in ((images, 30), (texts, 60)))  # by `train` alone
    info_nce = lambda z: -(z.log_softmax(0) + z.log_softmax(1)).diagonal().mean() / 2

    def fit(rows, epochs):
        torch.manual_seed(seed)
        a, b, scale = torch.nn.Linear(20, 192), torch.nn.Linear(30, 192), torch.tensor(-np.log(0.07)).float()
        parameters = [*a.parameters(), *b.parameters(), scale.requires_grad_()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        logits = lambda i, c: scale.exp() * torch.cosine_similarity(a(x[i])[:, None], b(t[c])[None], dim=2)
        for epoch in range(epochs):
            order, captions = data.epoch_order(cache, rows, seed, epoch)
            for n in range(0, len(rows), 100):
                optimizer.zero_grad()
                info_nce(logits(order[n:n + 100], captions[n:n + 100])).backward()
                optimizer.step()
            yield logits

    tenth, others = np.split(np.random.default_rng(seed).permutation(train), [12])
    losses = [info_nce(logits(tenth, first[tenth])).item() for logits in fit(others, 30)]
    *_, logits = fit(train, 1 + np.argmin(losses))
    assert torch.allclose(similarity, logits(held_out, first[held_out]), rtol=1e-3, atol=1e-3)
    assert not similarity.requires_grad and pretrain.retrieval_metrics(-similarity)["auc"] > 0.7


def test_held_out_metrics_by_hand(net):
    features = net.frozen_features(IMAGES, TEXTS)
    figures = pretrain.held_out_metrics(net, features)
    assert pretrain.held_out_metrics(net.train(), features) == figures and net.training  # the same each time
    matrix = pretrain.energy_matrix(net, features, draws=1)
    matched, mismatched = matrix.diagonal(), matrix[range(3), [2, 0, 1]]
    *_, target, prediction, _ = next(net.measure(features, [range(3)]))
    means = target.mean((1, 2)).double().numpy()
    share = np.linalg.svd(means - means.mean(0), compute_uv=False)[:2]  # two of three points
    share = share / share.sum()
    others = torch.stack([target[[j for j in range(3) if j != i]].mean(0) for i in range(3)])
    by_hand = {"energy_matched": matched, "energy_mismatched": mismatched,
               "pair_accuracy": (matched < mismatched).float(), "energy_position": (others - target).square(),
               "target_std": target.var(0).sqrt(), "prediction_std": prediction.var(0).sqrt(),
               "target_rank": torch.tensor(np.exp(-(share * np.log(share)).sum()))}
    by_hand = {name: values.mean().item() for name, values in by_hand.items()}
    assert figures == pytest.approx(by_hand, rel=1e-5)
    same = net.frozen_features(IMAGES, TEXTS[:1] * 3)
    assert pretrain.held_out_metrics(net, same)["pair_accuracy"] == 0.5  # ties
    net.dtype = torch.bfloat16
    *_, prediction, _ = next(net.measure(same, [range(3)]))
    assert pretrain.held_out_metrics(net, same)["prediction_std"] == pytest.approx(
        prediction.double().std(0).mean().item(), rel=1e-5)
    assert model.effective_rank(torch.ones(3, 4)) == 1


def test_energy_maps_average_the_masks_that_hid_each_patch(net):
    features = net.frozen_features(IMAGES, TEXTS)
    pairs = features.pair([0, 1, 0, 1], [0, 1, 1, 2])
    total, count, draw = torch.zeros(4, 36), torch.zeros(36), 0
    while count.min() < 8:
        masks = sample_masks(net.grid, 1, draw)
        energies = net(pairs, masks).patch_energy.detach()
        for patch, energy in zip(masks.target.flatten(), energies.flatten(1).T, strict=True):
            total[:, patch] += energy
            count[patch] += 1
        draw += 1
    maps = pretrain.energy_maps(net, features.pair([0, 1], [0, 1, 2]), [[0, 1], [1, 2]])
    assert torch.allclose(maps.transpose(0, 1).flatten(0, 1), total / count, atol=1e-6)


def test_bench_adds_up_a_step_of_its_parts_and_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain.bench, "__defaults__", (4, 60))  # rounds, seconds
    options = "--bench --batch_size 8 --accumulate 4 --epochs 3 --max_images 80 --held_out 8 --device cpu"
    lines = call(pretrain, *options.split()).out.splitlines()
    printed = {line[:44].strip(): float(line[44:]) for line in lines}
    *once_a_part, optimiser, ema = (printed[f"{part}, ms for 2 images"] for part in pretrain.PARTS)
    minutes = 27 * (4 * sum(once_a_part) + optimiser + ema) / 60e3  # 9 steps an epoch
    assert printed["minutes to pretrain, 27 steps"] == pytest.approx(minutes, rel=2e-3)
    assert not list(tmp_path.iterdir()) and min(printed.values()) > 0


def run_log(out):
    """The lines of a log, which must be strict JSON, without the fields that tell the time."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    lines = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # not NaN, not Infinity
    return [{name: value for name, value in line.items() if name not in SLOW} for line in lines]


def assert_same_run(*outs):
    """Weights, optimizer, GradScaler and log, bit for bit."""
    states = [torch.load(out / "checkpoint.pt", weights_only=True) | {"log": run_log(out)} for out in outs]
    parts = ("step", "running", "model", "optimizer", "scaler", "log")
    torch.testing.assert_close(*([state[part] for part in parts] for state in states), rtol=0, atol=0)


def train(run, out, *options, code=0):
    """pretrain.py with a run's options and these, which count more."""
    return call(pretrain, *run.options, *options, "--out", out, code=code)


def after(patch, owner, name, note):
    """From now on each call of this function is followed by note(result, *given)."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *given: (result := real(*given), note(result, *given))[0])


@pytest.fixture
def passes(monkeypatch):
    """The masks and the Output of each forward pass with gradients of this test's runs. Their toy preset is
    narrower: float16, which many CPUs only emulate, is ten times slower than float32."""
    config = replace(model.PRESETS["toy"], dim=48, predictor_dim=32, depth=1, predictor_depth=1)
    monkeypatch.setitem(model.PRESETS, "toy", config)
    passes = []
    after(monkeypatch, model.TIJEPA, "forward", lambda out, net, features, masks, *_: (
        out.prediction.requires_grad and passes.append((masks, out))))
    return passes


@pytest.fixture(scope="session")
def cut_off(pretrained, tmp_path_factory):
    """The folder of the run `pretrained`, stopped after its third step of four."""
    out = tmp_path_factory.mktemp("cut_off")
    with pytest.MonkeyPatch.context() as patch:
        after(patch, pretrain, "warmup_cosine", lambda _, step, *rest: (
            step == 2 and signal.raise_signal(signal.SIGTERM)))
        train(pretrained, out, code=143)
    return out


def test_pretrain_end_to_end(pretrained):
    log = run_log(pretrained.out)
    assert "read 40 images, skipped: 1 image not on disk, 1 unreadable image" in pretrained.done.out
    assert all(name in pretrain.__doc__ for name in {*log[0], *SLOW})
    assert [(line["step"], line["epoch"]) for line in log] == [(3, 1.5), (4, 2.0)]
    share = np.prod([0.994 + 0.006 * step / 3 for step in range(4)])
    assert log[-1]["start_share"] == pytest.approx(share)
    assert f"warning: {share:.0%} of X~ is still its random start" in pretrained.done.err
    for name in ("curves", "energies", "masks", "maps"):
        assert len(Image.open(pretrained.out / f"{name}.png").convert("RGB").getcolors(1 << 24)) > 20
    figures = json.loads((pretrained.out / "eval.json").read_text())
    same = figures.keys() & log[-1].keys()  # of the same weights
    assert len(same) == 8 and all(figures[name] == pytest.approx(log[-1][name], rel=1e-5) for name in same)
    assert figures["skipped"] == {"image not on disk": 1, "unreadable image": 1} and figures["images"] == 8


@pytest.mark.parametrize("parts, options", [
    (2, ""), (1, "--accumulate 1 --shuffle_captions --loss smooth_l1 --sigreg 0.5")])
def test_each_step_has_the_data_masks_and_rates_promised(
        pretrained, passes, tmp_path, monkeypatch, parts, options):
    seeds, reads, rates, momenta = [], [], [], []  # the last two with how many passes, or steps, were before
    after(monkeypatch, torch, "manual_seed", lambda _, seed: seeds.append(seed))
    after(monkeypatch, data.FeatureCache, "read", lambda _, *given: reads.append(given))
    after(monkeypatch, torch.optim.AdamW, "step", lambda _, optimizer: rates.append((len(passes), *(
        group[name] for name in ("lr", "weight_decay") for group in optimizer.param_groups))))
    after(monkeypatch, model.TIJEPA, "update_target", lambda _, net, m: momenta.append((len(rates), m)))
    train(pretrained, tmp_path, *"--epochs 5 --batch_size 8 --seed 3".split(), *options.split())
    (cache, held_out), *draws = reads
    images, held = data.hold_out(cache, 8)
    assert np.array_equal(held_out, (held, cache.first[held])) and len(rates) == len(momenta) == 20
    drawn, orders, losses = np.concatenate([draw for _, draw in draws], 1), [], []
    for epoch in range(5):
        order, captions = data.epoch_order(cache, images, 3, epoch)
        orders.append((order, np.roll(captions, 1) if options else captions))
    assert np.array_equal(drawn, np.concatenate(orders, 1)) and len(draws) == len(passes)
    for n in range(20):
        masks, outs = zip(*passes[parts * n:parts * (n + 1)])
        for batch, *split in zip(sample_masks((6, 6), 8, 3, n), *masks):
            assert torch.equal(batch, torch.cat(split)) and len(split[0]) == 8 // parts
        lr = 2e-4 + n * 4e-4 if n < 2 else 1e-6 + 0.999e-3 * (1 + np.cos(np.pi * (n - 2) / 17)) / 2
        wd = 0.4 - 0.36 * (1 + np.cos(np.pi * n / 19)) / 2
        assert rates[n] == pytest.approx((parts * (n + 1), lr, lr, wd, 0))
        assert momenta[n] == pytest.approx((n + 1, 0.994 + 0.006 * n / 19))
        energy = F.smooth_l1_loss if options else F.mse_loss
        loss = np.mean([energy(out.prediction, out.target).item() for out in outs])
        losses.append(loss + 0.5 * model.sigreg_term(outs[0].context, 3, n).item() * (parts == 1))
    for line in run_log(tmp_path):  # one each three steps, and at the end
        n, since = line["step"], (line["step"] - 1) // 3 * 3
        said = [line[name] for name in ("loss", "lr", "wd", "momentum")]
        assert said == pytest.approx([np.mean(losses[since:n]), *rates[n - 1][2:4], momenta[n - 1][1]])
    assert seeds[0] == 3  # of the weights


def test_gradients_are_clipped_and_accumulation_equals_the_large_batch(pretrained, tmp_path, monkeypatch):
    norms, logs = [], []
    after(monkeypatch, torch.optim.AdamW, "step", lambda _, optimizer: norms.append(torch.cat(
        [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm().item()))
    options = "--log_every 1 --target image --accumulate".split()
    for parts, clip in ((1, 0.05), (1, 1e6), (4, 1e6)):
        train(pretrained, tmp_path, *options, parts, "--clip", clip)
        logs.append(run_log(tmp_path))
        for norm, line in zip(norms[-4:], logs[-1], strict=True):
            assert line["grad_norm"] > 0.1 and norm == pytest.approx(min(clip, line["grad_norm"]), rel=1e-3)
    torch.testing.assert_close(logs[2], logs[1], rtol=2e-5, atol=0)  # the energies show the weights


def test_pretraining_is_repeatable_and_replaces_what_is_there(pretrained, tmp_path, monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)  # as other launchers do
    for seed in (1, 0):
        assert "1 process," in train(pretrained, tmp_path, "--seed", seed).out
    assert_same_run(tmp_path, pretrained.out)


def test_half_precision_steps_as_single_does(pretrained, passes, net, tmp_path):
    runs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        train(pretrained, tmp_path, *"--epochs 1 --log_every 1 --dtype".split(), str(dtype)[6:])
        for _, out in passes[-4:]:
            assert out.prediction.dtype == dtype and out.energy.dtype == out.target.dtype == torch.float32
        runs.append(np.array([[line[name] for line in run_log(tmp_path)] for name in ("loss", "grad_norm")]))
    single, *halves = runs
    for half in halves:
        assert (abs(half / single - 1) < [[0.02], [0.1]]).all() and (half != single).all()
    single = net.frozen_features(IMAGES, TEXTS)
    net.dtype = torch.bfloat16  # of the frozen encoders
    for half, exact in zip(net.frozen_features(IMAGES, TEXTS)[:2], single):
        assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), exact, atol=0.1)
        assert (half != exact.bfloat16()).float().mean() > 0.03  # not only rounded at the end


class Elsewhere(torch.utils._python_dispatch.TorchDispatchMode):
    """The device "meta" stands for a GPU: no operation has tensors on both, and what is read back is 0."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim or x.is_meta}  # a number may lie on the CPU
        assert len(devices) < 2 or function is aten.copy_.default, f"{function} with tensors on two devices"
        if devices == {"meta"} and function is aten._local_scalar_dense.default:
            return 0
        if devices == {"meta"} and function is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            return torch.zeros_like(args[0], device="cpu", dtype=kwargs.get("dtype"))
        return function(*args, **kwargs)


def test_a_run_leaves_no_tensor_on_the_cpu(pretrained, tmp_path, monkeypatch):
    encoders = torch.load(pretrained.checkpoint)["encoders"]
    before = "--mask before --target whitened".split()
    train(pretrained, tmp_path, *before)
    whiten = torch.load(tmp_path / "checkpoint.pt")["model"]["whiten"]["weight"]
    assert torch.allclose(whiten, whiten.T, atol=1e-5)  # it was fitted
    monkeypatch.setattr(model.TIJEPA, "fingerprint", lambda net: encoders)  # so that the cache is there
    monkeypatch.setattr(model, "pick_device", lambda name: torch.device("meta"))
    with Elsewhere():
        for options in ([], before):
            train(pretrained, tmp_path, "--epochs", 1, *options)
        net = model.TIJEPA.from_checkpoint(pretrained.checkpoint)[0].to("meta")
        features = net.frozen_features(IMAGES, TEXTS)
        assert all(tensor.is_meta for tensor in (*features, *net.encode(IMAGES, TEXTS)))
        assert pretrain.energy_matrix(net, features, draws=2).shape == (3, 3)


def test_eval_command_draws_two_captions_of_each_and_ranks_typed_ones(toy, pretrained, tmp_path, monkeypatch):
    names, ranked, real = torch.load(pretrained.checkpoint)["held_out"], torch.eye(8), pretrain.energy_matrix
    measured, yardstick, shown, hist, *rest = stand_ins = [Mock(return_value=ranked) for _ in range(6)]
    for name, stand_in in zip(("pretrain.energy_matrix", "pretrain.contrastive_similarity", "pretrain.show",
                               "matplotlib.axes.Axes.hist", "matplotlib.axes.Axes.legend",
                               "pretrain.plot_masks"), stand_ins):
        monkeypatch.setattr(name, stand_in)
    judge = "--eval", pretrained.checkpoint, "--out", tmp_path, "--cache", tmp_path, "--device", "cpu"
    call(pretrain, *judge, "--dtype", "bfloat16", "--eval_masks", 3)
    (net, _, masks), figures = measured.call_args.args, json.loads((tmp_path / "eval.json").read_text())
    cache, others, held_out, _ = yardstick.call_args.args
    assert sorted([*others, *held_out]) == list(cache.readable) and len(held_out) == 8
    assert net.dtype == torch.bfloat16 and masks == figures["masks"] == 3
    assert figures.items() >= {**pretrain.retrieval_metrics(ranked), "contrastive_auc": 1}.items()
    own, other = hist.call_args.args[0]
    assert own.tolist() == 8 * [1] and other.tolist() == 56 * [0]
    items = [item for item in data.load_coco(toy / "coco")[0] if item[0].name in names][:4]
    pictures = torch.stack([data.read_image(path, net.image_encoder) for path, _ in items])
    titles, panels = [captions[0] for _, captions in items], [drawn.args for drawn in shown.call_args_list]
    maps = pretrain.energy_maps(net, net.frozen_features(pictures, titles), [[0, 1, 2, 3], [3, 0, 1, 2]])
    for n, pair in enumerate(maps.view(4, 2, 6, 6)):
        pixels, headings = zip(*[panel[1:3] for panel in panels[4 * n:4 * n + 4]])
        assert headings == ("picture", titles[n], titles[n - 1], "second minus first")
        assert np.array_equal(pixels[0], pictures[n].permute(1, 2, 0))
        assert np.allclose(pixels[1:3], pair, rtol=0.1) and np.array_equal(pixels[3], pixels[2] - pixels[1])
    measured.side_effect, typed = real, ["red bars", "moss", "who"]
    lines = call(pretrain, *judge, "--image", items[0][0], "--captions", *typed).out.splitlines()
    scores = model.TIJEPA.from_checkpoint(pretrained.checkpoint)[0].score(pictures[[0] * 3], typed, draws=2)
    assert lines == [f"{score:.4f}  {typed[i]}" for score, i in zip(*map(torch.Tensor.tolist, scores.sort()))]
    assert [drawn.args[2] for drawn in shown.call_args_list[-3:-1]] == lines[::2]


@pytest.mark.parametrize("dtype, number", [
    ("bfloat16", signal.SIGINT), ("float16", signal.SIGTERM), ("overflow", signal.SIGINT),
    ("float32 --mask before --visible 0.3 --target whitened", signal.SIGTERM)])
def test_a_run_that_a_signal_stops_resumes_as_if_it_had_not(
        passes, pretrained, tmp_path, monkeypatch, dtype, number):
    """Between two log lines. Meanwhile a second run is refused, and a second Ctrl-C would end the process."""
    straight, cut, scaler = tmp_path / "straight", tmp_path / "cut", torch.amp.GradScaler
    options = [*SHORT, *"--accumulate 1 --epochs 3 --log_every 3 --resume --dtype".split(),
               *dtype.replace("overflow", "float16").split()]
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]

    def interrupt(_, step, *rest):
        if step == 4:
            before = tree(cut)
            assert f"another run writes to {cut}" in train(pretrained, cut, *options, code=2).err
            assert tree(cut) == before
            signal.raise_signal(number)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the system's: it kills

    with monkeypatch.context() as patch:
        if dtype == "overflow":  # begin with a scale at which float16 gradients overflow
            patch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0 ** 27, **k))
        train(pretrained, straight, *options)
        after(patch, pretrain, "warmup_cosine", interrupt)
        stopped = train(pretrained, cut, *options, code=128 + number)
    assert "stopped after step 5 of 12" in stopped.out and "Traceback" not in stopped.err
    assert handlers == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    assert "after step 5 of 12" in train(pretrained, cut, *options).out
    assert_same_run(cut, straight)
    skipped, norms = ([line[name] for line in run_log(cut)] for name in ("skipped_steps", "grad_norm"))
    overflow = dtype == "overflow"
    assert skipped[:2] == [3 * overflow, 6 * overflow] and skipped[-1] < 12 and (norms[0] is None) == overflow


def spoil(out, encoder):
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    checkpoint["model"][encoder]["blocks.0.mlp.2.weight"] *= -2
    torch.save(checkpoint, out / "checkpoint.pt")


HELD_OUT, OTHER_DATA, OTHER_WEIGHTS = "{held_out}", "data (then ", "f_I weights (then "
ACCIDENTS = {  # what happens: (how, words of --eval, words of --resume); no words: the command succeeds
    "the log is cut off": (lambda run: os.truncate(run.out / "log.jsonl", 200), "", ""),
    "an image trained on is lost": (lambda run: run.others[0].unlink(True), "", OTHER_DATA),
    "all held out are lost": (lambda run: [path.unlink(True) for path in run.held_out], HELD_OUT, OTHER_DATA),
    "other captions": (lambda run: run.captions.write_text(
        run.captions.read_text().replace('"caption": "', '"caption": "red ')), HELD_OUT, OTHER_DATA),
    "other weights": (lambda run: run.patch.setattr(
        model, "hash_weights", lambda module: "other"), OTHER_WEIGHTS, OTHER_WEIGHTS)}


@pytest.mark.parametrize("change, of_eval, of_resume", ACCIDENTS.values(), ids=ACCIDENTS)
def test_after_an_accident_a_run_ends_as_without_it_or_is_refused_and_left_as_it_was(
        toy, pretrained, cut_off, tmp_path, monkeypatch, change, of_eval, of_resume):
    """--eval of a finished run and --resume of one that was cut off, where the data are elsewhere now."""
    names, coco = torch.load(pretrained.checkpoint)["held_out"], tmp_path / "coco"
    images = sorted((shutil.copytree(toy / "coco", coco) / "train2017").iterdir())
    held_out, others = ([path for path in images if (path.name in names) == held] for held in (True, False))
    run = SimpleNamespace(captions=coco / CAPTIONS, held_out=held_out, others=others, patch=monkeypatch)
    for source, words in ((pretrained.out, of_eval), (cut_off, of_resume)):
        run.out = shutil.copytree(source, tmp_path / source.name)
        change(run)
        before, path, resume = tree(run.out), run.out / "checkpoint.pt", source == cut_off
        command = [*pretrained.options, "--resume"] if resume else ["--eval", path]
        places = ["--coco", coco, "--cache", tmp_path / "cache", "--device", "cpu", "--out", run.out]
        said = call(pretrain, *command, *places, code=2 if words else 0).err
        assert not words or str(path) in said and words.format(held_out=held_out[1].name) in said
        if resume and not words:
            assert_same_run(run.out, pretrained.out)
        elif change != ACCIDENTS["an image trained on is lost"][0]:  # the yardstick has one pair less
            assert tree(run.out) == before


def test_resume_names_every_option_that_decides_a_run_and_has_changed(pretrained, tmp_path):
    of_no_effect = {"out", "coco", "device", "cache", "accumulate", "resume", "bench", "eval", "eval_masks",
                    "image", "captions", "image_weights", "text_encoder"}
    others = {"loss": "smooth_l1", "target": "image", "max_images": 41, "mask": "before"}
    then = vars(pretrain.parse_args([str(option) for option in pretrained.options]))
    changed = ["--cache", tmp_path, "--accumulate", 1, "--dtype", "bfloat16", "--resume"]
    expected = ["--dtype (then torch.float32, now torch.bfloat16)"]
    for name in then.keys() - of_no_effect - {"dtype", "preset", "image_encoder"}:  # the latter need others
        value, flag = then[name], then[name] is False
        now = flag or others.get(name) or (value + 1 if type(value) is int else value / 2 or 0.5)
        changed += [f"--{name}", now][:2 - flag]
        expected.append(f"--{name} (then {value}, now {now})")
    out = shutil.copytree(pretrained.out, tmp_path / "out")
    said = train(pretrained, out, *changed, code=2).err
    assert [words for words in expected if words not in said] == [] and len(expected) > 10
    assert tree(out) == tree(pretrained.out)


def test_a_loss_that_is_not_finite_is_never_saved(pretrained, tmp_path):
    wild = "--lr 1e30 --clip 1e30 --epochs 1 --batch_size 32".split()  # one step, which would be saved
    old = shutil.copytree(pretrained.out, tmp_path / "old")
    for out in (tmp_path / "new", old):
        said = train(pretrained, out, *wild, "--accumulate", 1, code=1).err
        assert "--lr" in said and "not finite" in said
    assert not (tmp_path / "new" / "checkpoint.pt").exists() and tree(old) == tree(pretrained.out)


def test_kill_9_at_8_random_moments_loses_nothing_but_time(pretrained, tmp_path):
    steps, out, options = set(), tmp_path / "killed", [*SHORT, "--accumulate", 1, "--resume"]
    checkpoint = out / "checkpoint.pt"
    for kill in range(8):
        lines, end = len(run_log(out)), time.time() + 120
        process = forked(train, pretrained, out, *options)
        while kill % 4 < 3 and len(run_log(out)) == lines and process.is_alive():  # else at once
            assert time.time() < end, "no log line came"
            time.sleep(0.01)
        time.sleep(np.random.default_rng().uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)
        if checkpoint.exists():
            steps.add(step := model.TIJEPA.from_checkpoint(checkpoint)[1]["step"])
            if step == 40:
                checkpoint.unlink()  # once more from the start
    for folder in (out, out, tmp_path / "straight"):  # the second: of a run that is finished
        train(pretrained, folder, *options)
    assert len(steps) > 2
    assert_same_run(out, tmp_path / "straight")


def test_two_processes_have_the_losses_of_one(pretrained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "all_reduce", lambda value, op: value + (op == pretrain.dist.ReduceOp.MAX))
        assert "the processes see different files" in train(pretrained, tmp_path / "other", code=2).err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [*pretrained.options, *SHORT, "--epochs", 4, "--accumulate", 2, "--out"]
    done = execute(*torchrun, pretrain.__file__, *options, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    call(pretrain, *options, tmp_path / "one")
    two, one = ([line["loss"] for line in run_log(tmp_path / name)] for name in ("two", "one"))
    assert two == pytest.approx(one, abs=1e-5) and len(two) == 16
    assert "pretrain: 100%" in pretrained.done.err
    assert "2 processes" in done.stdout and done.stdout.count("pretrain: wrote") == 1


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(pretrained, cut_off, tmp_path, monkeypatch):
    out = shutil.copytree(cut_off, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=[None, OSError(errno.ENOSPC, "no room")]))
    said = train(pretrained, out, "--resume", code=2).err
    assert f"{out}/checkpoint.pt cannot be written or read: no room" in said
    assert {**tree(out), "log.jsonl": ""} == {**tree(cut_off), "log.jsonl": ""}


def test_the_terminal_shows_the_log_in_columns_and_the_minutes_left(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", Mock(side_effect=range(0, 10 ** 6, 100)))  # 100 s later at each look
    said = train(pretrained, tmp_path).out.splitlines()
    said, header = [line.split() for line in said if len(line) <= 80], [*pretrain.SHOWN, "min", "left"]
    assert said.count(header) == 1 and len(header) == 6
    for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
        [shown] = [words for words in said if words[:2] == ["step", str(line["step"])]]
        assert shown[2:6] == [f"{line[name]:.3f}" for name in header[:4]]
        left = (4 - line["step"]) * 16 / line["images_per_s"] / 60  # of 4 steps of 16 images
        assert float(shown[6]) == pytest.approx(left, abs=0.051) and (left > 1) == (line["step"] < 4)


def test_too_little_memory_names_what_to_lower_and_other_errors_are_raised(pretrained, tmp_path, monkeypatch):
    judge = "--eval", pretrained.checkpoint, "--device", "cpu", "--out", tmp_path, "--cache", tmp_path
    monkeypatch.setattr(model.TIJEPA, "forward", lambda *inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        call(pretrain, *judge)
    monkeypatch.setattr(model, "toy_vit", lambda: torch.empty(1 << 55))  # is no fault of the file
    assert "out of memory; lower --batch_size or --held_out" in call(pretrain, *judge, code=2).err


# ---- finetune_mvsa.py, and the commands ----
MVSA_CACHE = tempfile.mkdtemp()
ROWS, PROBES = sum(finetune_mvsa.ROWS.values(), ()), finetune_mvsa.ROWS["probe"]


def judge_mvsa(root, *options, code=0):
    places = ["--checkpoint", root / "checkpoint.pt", "--mvsa", root / "mvsa", "--out", root / "out"]
    short = ["--cache", MVSA_CACHE, "--device", "cpu", "--seeds", 0, 1, "--mode", "probe"]
    return call(finetune_mvsa, *places, *short, "--finetune_epochs", 1, *options, code=code)


@pytest.fixture(scope="module")
def single(toy, pretrained):
    net, _ = model.TIJEPA.from_checkpoint(pretrained.checkpoint)
    for p in net.target_encoder.parameters():  # X~ must not be X, or a mix-up of the two would pass
        p.add_(0.05 * torch.randn(p.shape, generator=generator_of(3)))
    posts = [replace(post, text=" ".join(post.text.split()[:8 - n % 7]))  # of other lengths: some is padded
             for n, post in enumerate(data.load_mvsa(toy / "mvsa" / "MVSA_Single")[0][::-1])]
    cache = data.FeatureCache(MVSA_CACHE, [(post.image, [post.text]) for post in posts], net)
    y = np.array([data.LABELS.index(posts[i].label) for i in cache.readable])
    features, split = finetune_mvsa.extract_features(net, cache, [0, 5]), data.stratified_split(y, 0)
    probe, _ = finetune_mvsa.fit_probe(features[PRETRAINED], y, 3, *split[:2])
    return SimpleNamespace(net=net, posts=posts, cache=cache, y=y, split=split, features=features,
                           start=(net, net.target_encoder, probe))


def test_each_row_has_the_features_that_it_is_named_after(single):
    net, X, target = single.net, single.net.context_encoder, single.net.target_encoder
    fresh = {seed: finetune_mvsa.untrained(net, seed) for seed in (0, 5)}
    torch.manual_seed(0)  # the start of a run of seed 0
    start = model.TIJEPA(net.config, (net.image_encoder, net.text_encoder)).context_encoder
    assert len(set(map(model.hash_weights, (*fresh.values(), start, X, target)))) == 5
    for n, post in enumerate(single.posts[1:]):  # the first one's picture is broken
        image = data.read_image(post.image, net.image_encoder)
        s_image, *text, _ = net.frozen_features(image[None], [post.text])
        tokens = {"text only": text[0], "image only": s_image, PRETRAINED: target(s_image, *text),
                  **{(UNTRAINED, seed): fresh[seed](s_image, *text) for seed in fresh},
                  ONLINE: X(s_image, *text)}
        by_hand = {row: states[0].mean(0).detach().numpy() for row, states in tokens.items()}
        both = np.hstack([by_hand["text only"], by_hand["image only"]])
        by_hand |= {CONCAT: both, f"{PRETRAINED} + concatenated": np.hstack([by_hand[PRETRAINED], both])}
        assert single.features.keys() == by_hand.keys()
        for row, expected in by_hand.items():  # the rows' differ by 1 and more, float16's by 0.003
            assert np.allclose(single.features[row][n], expected, atol=0.02), row


def test_each_row_is_learnt_from_its_own_features_and_encoder_and_no_test_label(single):
    net, cache, features, y = single.net, single.cache, single.features, single.y
    train = np.concatenate([np.flatnonzero(y == label)[:n] for label, n in enumerate((8, 10, 9))])
    validation, test = np.split(np.setdiff1d(np.arange(len(y)), train), [8])
    changed, probes, args = y.copy(), {}, finetune_mvsa.parse_args(["--finetune_epochs", "2"])
    changed[test] = (y[test] + 1) % 3  # also of these, which are all, 1 is the rarest label
    for seed in (0, 5):  # they share probes
        rows = finetune_mvsa.predict_rows(net, cache, features, changed, 3, (train, validation, test), seed,
                                          probes, args)
        assert tuple(rows["probabilities"]) == ROWS
        assert rows["probabilities"].pop("majority class") == len(test) * [[0, 1, 0]]
        encoders = {PRETRAINED: net.target_encoder, ONLINE: net.context_encoder,
                    UNTRAINED: finetune_mvsa.untrained(net, seed)}
        for row, probabilities in rows["probabilities"].items():
            start = row.removesuffix(", fine-tuned")
            x = features[(start, seed) if start == UNTRAINED else start]
            probe, choice = finetune_mvsa.fit_probe(x, y, 3, train, validation)
            expected = finetune_mvsa.probabilities_of(probe, x[test])
            if row != start:
                tuned, choice = finetune_mvsa.finetune(net, encoders[start], probe, choice, cache, y,
                                                       train, validation, 2, seed)
                expected = finetune_mvsa.predict(tuned, cache, test)
            assert probabilities == expected.tolist() and rows["choices"][row] == choice, row


def test_fit_probe_takes_the_c_of_the_best_validation_accuracy():
    rng, train, validation = np.random.default_rng(66), np.arange(100), np.arange(100, 200)
    x = rng.normal(size=(200, 20)) * rng.uniform(0.1, 5, 20) + rng.normal(size=20)
    y = (StandardScaler().fit_transform(x[:, :3]) + rng.gumbel(size=(200, 3)) + [1, 0, -1]).argmax(1)
    scaled = StandardScaler().fit(x[train]).transform(x)
    fits = [LogisticRegression(C=c, max_iter=1000).fit(scaled[train], y[train]) for c in (1e-3, 1e-2, 1e-1)]
    expected = np.array([fit.predict_proba(scaled[validation]) for fit in fits])  # [3, 100, 3]
    right = expected.argmax(2) == y[validation]
    loss = -np.log(expected[:, range(100), y[validation]]).mean(1)
    assert right.sum(1).argmax() == 1 and np.argmin(loss) == 2  # 6 posts more; by loss it were the third
    _, choice = finetune_mvsa.fit_probe(x, y, 3, train, validation)
    assert choice == {"C": 1e-2, "validation": right[1].mean(), "loss": pytest.approx(loss[1])}
    assert finetune_mvsa.fit_probe(x, y, 3, train, validation[right.all(0)])[1]["C"] == 1e-3  # of equals
    with pytest.raises(UserError, match="all training posts have the same label"):
        finetune_mvsa.fit_probe(x, y * 0, 3, train, validation)


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_a_probe_has_the_probabilities_of_scikit_learn_and_0_for_a_label_without_posts(single, missing):
    x, y, train = single.features[CONCAT], single.y, np.flatnonzero(single.y != missing)
    probe, choice = finetune_mvsa.fit_probe(x, y, 3, train, np.arange(9))
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=choice["C"], max_iter=1000))
    theirs.fit(x[train], y[train])
    probabilities = finetune_mvsa.probabilities_of(probe, x)
    assert np.allclose(probabilities[:, theirs.classes_], theirs.predict_proba(x), atol=1e-5)
    assert probabilities.shape == (60, 3) and np.allclose(probabilities.sum(1), 1)
    assert missing is None or np.allclose(probabilities[:, missing], 0, atol=1e-9)


def test_fine_tuning_starts_as_the_probe_and_trains_all_weights_in_16_bits_too(single, monkeypatch):
    net, cache, y, train, predictions = single.net, single.cache, single.y, single.split[0], []
    losses, scaler, before = iter(range(99, 0, -1)), Mock(wraps=torch.amp.GradScaler), model.hash_weights(net)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(finetune_mvsa, "validate", lambda *given: {"validation": 0, "loss": next(losses)})
    monkeypatch.setattr(finetune_mvsa, "LEARNING_RATES", (1e-3,))
    start = finetune_mvsa.Classifier(*single.start)
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(net, "dtype", dtype)
        tuned, _ = finetune_mvsa.finetune(*single.start, {"loss": 100}, cache, y, *single.split[:2], 6, 0)
        predictions += [finetune_mvsa.predict(one, cache, train) for one in (start, tuned)]
        for name, p in tuned.named_parameters():
            assert p.dtype == torch.float32 and not torch.equal(p, start.get_parameter(name))
    assert [made.kwargs["enabled"] for made in scaler.call_args_list] == [False, True]
    start, tuned, half_start, half_tuned = predictions  # [T, 3] each
    expected = finetune_mvsa.probabilities_of(single.start[2], single.features[PRETRAINED][train])
    assert np.allclose(start, expected, atol=1e-4) and not np.array_equal(start, half_start)
    assert (tuned - start)[range(len(train)), y[train]].mean() > 0.09  # of the true labels
    assert abs(half_tuned - tuned).mean() < 0.001
    assert model.hash_weights(net) == before  # the checkpoint's own weights are not trained


@pytest.mark.parametrize("losses, best", [
    ([1.0, 0.9, 0.8, 0.85, 0.95, 0.7, 0.6, 0.65], (5e-4, 3, 0.6)),  # each rate until its first worse epoch
    ([1.0, 0.7, 0.6, 0.5, 0.4, 0.9, 1.0], (1e-4, 4, 0.4)),  # the first rate's is the best of both
    ([1.0, 1.1, 1.2], (None, 0, 1.0))])  # both make it worse: the probe itself
def test_fine_tuning_takes_the_best_epoch_on_validation(single, monkeypatch, losses, best):
    train, validation, _ = single.split  # losses[0] is the probe's
    monkeypatch.setattr(finetune_mvsa, "BATCH", 99)  # an epoch is one step: 0.05 more in the head's bias
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda one: (
        one.param_groups[0]["params"][-1].data.add_(one.param_groups[0]["weight_decay"])))
    gather, validate = Mock(wraps=model.gather), Mock(side_effect=[
        {"validation": 0, "loss": loss} for loss in losses[1:]])
    monkeypatch.setattr(model, "gather", gather)
    monkeypatch.setattr(finetune_mvsa, "validate", validate)
    tuned, choice = finetune_mvsa.finetune(*single.start, {"loss": losses[0]}, single.cache, single.y,
                                           train, validation, 4, 0)
    assert (choice["lr"], choice["epoch"], choice["loss"]) == best
    assert validate.call_count == gather.call_count == len(losses) - 1
    assert all(np.array_equal(made.args[1], single.y[validation]) for made in validate.call_args_list)
    assert torch.allclose(tuned.head.bias, single.start[2].bias.float() + 0.05 * best[1])
    posts = single.cache.rows("image.float16", single.cache.readable[train])[:, 0, 0].tolist()
    orders, patches = zip(*((made.args[0][:, 0, 0].tolist(), made.args[1].tolist())
                            for made in gather.call_args_list))
    for order, drawn in zip(orders, patches):  # 9 of the 36 patches of each post
        assert sorted(order) == sorted(posts) and {len(set(one)) for one in drawn} == {9}
        assert len(set(map(tuple, drawn))) > 40
    assert len(set(map(str, orders))) == len(set(map(str, patches))) == (4 if best[0] else 1)  # each epoch's


def test_bootstrap_resamples_posts_by_hand():
    posts = np.tile(np.arange(200), 2)  # two seeds
    new, old = posts % 4 != 0, posts % 2 == 0
    difference, low, high = finetune_mvsa.bootstrap(new * 1.0 - old, posts)
    assert difference == pytest.approx(25)  # right in 150 against 100 of 200
    # gains of +1 (100 posts), 0 (50), -1 (50), the same in both seeds: the deviation of their mean
    deviation = 100 * (((100 * 0.75 ** 2 + 50 * 0.25 ** 2 + 50 * 1.25 ** 2) / 200) / 200) ** 0.5
    assert [low - 25, high - 25] == pytest.approx([-1.96 * deviation, 1.96 * deviation], abs=1.5)


def recompute(folder, ending=""):
    """-> results.json, predictions.csv's lines and results.md, all with the scores that sklearn computes."""
    results, table, lines = ((folder / name).read_text() for name in (
        f"results{ending}.json", f"results{ending}.md", f"predictions{ending}.csv"))
    results, lines, groups = json.loads(results), list(csv.DictReader(io.StringIO(lines))), {}
    for line in lines:
        pair = line["label"], line["prediction"]
        groups.setdefault((line["set"], line["row"], line["seed"]), []).append(pair)
        assert float(line[line["prediction"]]) == max(map(float, [*line.values()][6:]))
    names = ["accuracy", "weighted F1", "macro F1"]
    rows = [["features", *names]]
    for kind, result in results["sets"].items():
        labels = [*result["labels"]]
        for row, scores in result["scores"].items():
            confusion = 0
            for n, seed in enumerate(results["seeds"]):
                pair = list(zip(*groups.pop((kind, row, str(seed)))))
                report = classification_report(*pair, output_dict=True, zero_division=0)
                f1 = [report[f"{average} avg"]["f1-score"] for average in ("weighted", "macro")]
                assert [scores[name][n] / 100 for name in names] == pytest.approx([report["accuracy"], *f1])
                confusion += confusion_matrix(*pair, labels=labels)
            assert scores["confusion"] == confusion.tolist()
            rows.append([row, *(f"{np.mean(scores[name]):.2f} ± {np.std(scores[name], ddof=1):.2f}"
                                for name in names)])
        for pair, (gain, low, high) in result["differences"].items():
            new, old = (np.array(result["scores"][row]["confusion"]) for row in pair.split(" minus "))
            assert gain == pytest.approx(100 * np.trace(new - old) / new.sum())
            rows.append([pair, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}"])
    assert "; 0 " not in table and not groups and all(" | ".join(cells) in table for cells in rows)
    return results, lines, table


@pytest.mark.parametrize("protocol", ["standard", "grouped", "authors"])
def test_finetune_end_to_end(toy, pretrained, tmp_path, protocol):
    mvsa = shutil.copytree(toy / "mvsa", tmp_path / "mvsa")
    ending, mode = ("", ["probe", "finetune"]) if protocol == "standard" else (f"_{protocol}", ["probe"])
    posts, _ = data.load_mvsa(mvsa / "MVSA_Single")
    pairs = list(zip(posts[:40:2], posts[1:40:2]))
    for one, other in pairs:  # pictures that are there twice
        shutil.copy(one.image, other.image)
    options = ["--mvsa", mvsa, "--out", tmp_path, "--protocol", protocol, "--mode", *mode]
    done = judge_mvsa(pretrained.out, *options, "--text_encoder", "toy")
    results, lines, table = recompute(tmp_path, ending)
    assert results["model"]["text_encoder"] == "toy" and table in done.out and "not the paper's" in table
    assert re.findall("measured here (.*) –", table) == ["| 76.75 | 74.62 |", "| 77.55 | 75.02 |"]
    for (kind, result), count in zip(results["sets"].items(), (60, 120), strict=True):
        posts, skipped = data.load_mvsa(data.find_mvsa(mvsa)[kind])
        labels = {post.id: post.label for post in posts}
        assert all(line["label"] == labels[line["id"]] for line in lines if line["set"] == kind)
        assert result["posts"] == sum(result["labels"].values()) == count
        assert result["skipped"] == {**skipped, "unreadable image": 1}
        sizes = result["split_sizes"]  # the authors repeat posts of the pool until the classes are equal
        assert sizes[0] > 144 and sizes[1:] == [18, 18] if protocol == "authors" else sum(sizes) == count
        assert tuple(result["scores"]) == (ROWS if protocol == "standard" else PROBES)
        assert len(result["differences"]) == 1 + 2 * len(mode)
    splits = {one for result in results["sets"].values() for one in result["split_hash"].values()}
    assert len(splits) == (2 if protocol == "authors" else 4)  # of each seed; the authors pool both sets
    if protocol == "grouped":
        assert "40 posts in them" in table
        tested = {(line["seed"], line["id"]) for line in lines if line["set"] == "single"}
        assert all(((s, a.id) in tested) == ((s, b.id) in tested) for a, b in pairs for s in "01")


@pytest.fixture(scope="module")
def judged_once(toy, pretrained, tmp_path_factory):
    """A folder with the results of Single alone, of a published split. Three tested posts are repeats."""
    root = tmp_path_factory.mktemp("judged")
    shutil.copy(pretrained.checkpoint, root)
    shutil.copytree(toy / "mvsa" / "MVSA_Single", root / "mvsa")
    posts = data.load_mvsa(root / "mvsa")[0][:-1]  # the last one's picture is broken
    listed = [(post.id, data.LABELS.index(post.label)) for post in posts]
    write_split(root / "single", listed[:40], listed[40:50], listed[50:])
    for post in posts[50:53]:
        post.image.with_suffix(".txt").write_text(posts[7].text)
    shutil.copy(posts[3].image, posts[52].image)
    judge_mvsa(root, "--split", root / "single")
    return root


def test_a_published_split_is_used_and_scored_with_and_without_repeats(judged_once):
    results, lines, table = recompute(judged_once / "out")
    result, tested = results["sets"]["single"], lines[-10:]
    posts, _ = data.load_mvsa(judged_once / "mvsa")
    assert [line["id"] for line in tested] == [post.id for post in posts[50:-1]]
    for what in ("3 test posts with the words", "1 test posts with the image"):
        assert f"{what} of a training post" in table
    right = 100 * np.mean([line["label"] == line["prediction"] for line in tested[3:]])
    assert result["scores"][tested[0]["row"]]["accuracy without repeats"][1] == pytest.approx(right)


@pytest.mark.parametrize("protocol, split", [("standard", True), ("standard", False), ("authors", True)])
def test_other_posts_are_judged_as_mvsa_and_lines_of_no_use_are_named(toy, pretrained, tmp_path, protocol,
                                                                      split):
    folder, labels = tmp_path / "my posts", ["positive", "negative", "10", "so, so"]
    shutil.copytree(toy / "mvsa" / "MVSA_Single" / "data", folder / "a b")
    (folder / "a b" / "9.jpg").write_bytes(b"no image")
    posts = [[f"a b/{n}.jpg", f"navy\ntiles, {n % 38}", labels[n % 4], "", part][:4 + split]
             for n, part in enumerate(20 * ["train"] + 8 * ["validation"] + 12 * ["test"], start=1)]
    wrong = ["none.jpg", "", "10", "", "test"], ["a b/1.jpg", "", " ", "", "test"], ["a b/1.jpg", ""]
    with open(folder / "posts.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["image", "Text ", "label", "more", "split"][:4 + split], *posts,
                                    *(line[:4 + split] for line in wrong),
                                    *[["a b/1.jpg", "", "10", "", "dev"],
                                      ["a b/1.jpg", "", "rare", "", "test"],
                                      ["a b/1.jpg", "", "rare", "", "validation"]] * split])
    out = ["--posts", folder, "--out", tmp_path / "out", "--protocol", protocol]
    said = judge_mvsa(pretrained.out, *out).err
    results, lines, table = recompute(tmp_path / "out", "_my posts" + "_authors" * (protocol == "authors"))
    result = results["sets"]["posts"]
    counts = "10 positive, 9 negative, 10 10, " + "2 rare, " * split + "10 so, so"  # MVSA's come first
    assert f"## my posts\n\n{39 + 2 * split} posts ({counts}), skipped: " in table
    assert data.describe(result["labels"]) == counts and "TI-JEPA-Large" not in table
    for n, reason in enumerate(["no image file", "no label", "not as many fields"], start=82):
        assert f"posts.csv, line {n}: {reason}" in said
    assert ("posts.csv, line 85: split is not one of ('train'," in said) == split
    assert sum(result["skipped"].values()) == 4 + split  # and the unreadable image
    tested = {line["id"] for line in lines if line["seed"] == "0"}
    if split and protocol == "standard":
        assert result["split_sizes"] == [19, 9, 13] and tested == {str(n) for n in (*range(59, 82, 2), 86)}
        assert "accuracy without repeats" in table and "; 2 tests of a label that no" in table
        before = {path: path.read_text() for path in tmp_path.rglob("predictions/*.json")}
        posts = (folder / "posts.csv").read_text()
        (folder / "posts.csv").write_text(posts.replace(",10,", ",11,"))  # another label in the same place
        judge_mvsa(pretrained.out, *out)
        assert len(before) == 2 and all(path.read_text() != text for path, text in before.items())
    (folder / "posts.csv").write_text('image,text,label\na b/1.jpg,"not closed,10\na b/2.jpg,"",10\n')
    with pytest.raises(UserError, match="posts.csv, after line 1: "):
        data.load_posts(folder)
    for more, reason in (("\na b/1.jpg,so, so,10", "not as many"), (",split\na b/1.jpg,,1,", "split is not")):
        (folder / "posts.csv").write_text(f"image,text,label{more}\n")
        with pytest.raises(UserError, match=f"no post to use; skipped: 1 {reason}"):
            data.load_posts(folder)
    (folder / "posts.csv").write_text("image,text,label,split\na b/1.jpg,,1,train\na b/2.jpg,,2,test\n")
    assert "my posts: one of ('train', " in judge_mvsa(pretrained.out, *out, code=2).err


SEED = "out/predictions/standard-single-{}.json".format
BETWEEN = {  # what changes between two runs: (how, options of the second, seeds that they compute again)
    "epochs": (str, "--finetune_epochs 2", [0, 1]), "mode": (str, "--mode finetune", [0, 1]),
    "dtype": (str, "--dtype bfloat16", [0, 1]), "split": (str, "--split=", [0, 1]),
    "a tested label": (lambda root: execute("sed", "-i", r"s/^77\t.*/77\tpositive,positive/",
                                            root / "mvsa" / "labelResultAll.txt"), "", [0, 1]),
    "X": (lambda root: spoil(root, "context_encoder"), "", [0, 1]),
    "X~": (lambda root: spoil(root, "target_encoder"), "", [0, 1]),
    "one file is another seed's, one cut off": (lambda root: os.truncate(
        shutil.copy(root / SEED(1), root / SEED(0)) and root / SEED(1), 999), "", [0, 1]),
    "a file is a list": (lambda root: (root / SEED(0)).write_text("[]"), "", [0]),
    "Ctrl-C in the last of three": (lambda root: judge_mvsa(
        root, "--split", root / "single", "--seeds", 0, 1, 2, code=130), "--seeds 2 0 1", [2, 2]),
    "time and place": (lambda root: [os.utime(path) for path in root.rglob("*")], "", [])}


@pytest.mark.parametrize("change, options, again", BETWEEN.values(), ids=BETWEEN)
def test_predictions_are_reused_for_the_same_run(judged_once, tmp_path, monkeypatch, change, options, again):
    judged, asked = shutil.copytree(judged_once, tmp_path / "judged"), []
    after(monkeypatch, finetune_mvsa, "predict_rows", lambda _, *given: (
        asked.append(given[6]), asked == [2] and Mock(side_effect=KeyboardInterrupt)()))
    change(judged)
    judge_mvsa(judged, "--split", judged / "single", *options.split())
    assert asked == again
    if again != [0, 1]:
        judge_mvsa(judged, "--split", judged / "single", "--out", judged / "fresh", *options.split())
        assert recompute(judged / "out")[1] == recompute(judged / "fresh")[1]


def test_authors_protocol_refuses_a_set_of_which_no_post_is_tested(toy, pretrained, tmp_path):
    labels = shutil.copytree(toy / "mvsa", tmp_path / "mvsa") / "MVSA_Single" / "labelResultAll.txt"
    labels.write_text("".join(labels.read_text().splitlines(True)[:2]))
    out = "--mvsa", tmp_path / "mvsa", "--out", tmp_path / "out", "--protocol", "authors"
    assert "MVSA-single has too few posts" in judge_mvsa(pretrained.out, *out, code=2).err


def test_results_are_written_whole_or_not_at_all_in_a_folder_of_any_name(judged_once, tmp_path, monkeypatch):
    judged = shutil.copytree(judged_once, tmp_path / os.fsdecode(b"caf\xe9"))
    (judged / "out" / "results.md").unlink()
    judge_mvsa(judged, "--split", judged / "single")
    assert "caf\\udce9/checkpoint.pt" in (judged / "out" / "results.md").read_text()
    before = tree(judged / "out")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    judge_mvsa(judged, "--split", judged / "single", "--seeds", 0, code=2)
    assert tree(judged / "out") == before


def test_ablation_table_is_made_from_the_files_of_the_runs(tmp_path):
    for variant, seed, auc in (("plain", 0, 0.5), ("plain", 1, 0.7), ("image", 0, 1.0)):
        out = tmp_path / f"{variant}-{seed}"
        out.mkdir()
        (out / "log.jsonl").write_text('{"loss": 9}\n{"loss": 0.25}\n')
        (out / "eval.json").write_text(json.dumps(dict(
            energy_matched=0.1, energy_position=0.4, auc=auc, target_std=0.5, target_rank=7)))
        scores = {row: {"accuracy": [n + 10 * seed, n + 10 * seed + 2]} for n, row in enumerate(ROWS)}
        (out / "results.json").write_text(json.dumps({"sets": {"single": {"scores": scores}}}))
    said = call(finetune_mvsa, "--ablate", tmp_path).out
    assert (tmp_path / "results.md").read_text() in said
    header, _, *rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line]
    assert header[8:] == ["X, MVSA-Single", "X~ fine-tuned, MVSA-Single", "X~, MVSA-Single"]
    table = {name: cells for name, *cells in rows}
    assert table["plain"] == ["2", "0.250 ± 0.000", "0.100 ± 0.000", "0.400 ± 0.000", "0.600 ± 0.141",
                              "0.500 ± 0.000", "7.000 ± 0.000", "12.0 ± 7.1", "16.0 ± 7.1", "11.0 ± 7.1"]
    assert table["image"][:3] == ["1", "0.250", "0.100"]  # one run has no deviation
    for name, mean in (("*untrained*", 8.3), (f"*{CONCAT}*", 7.3)):  # the same in all runs
        assert table[name] == ["3", *8 * [""], f"{mean} ± 5.8"]


def test_the_readmes_code_runs_and_encodes_by_the_target_encoder(pretrained, toy, tmp_path, monkeypatch):
    pairs, own = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(pairs, {})
    files, captions = data.parse_captions(Path(CAPTIONS).read_bytes(), "")
    assert files == {0: "a.jpg", 1: "b.jpg"} and captions == {0: ["a red dog"], 1: ["two cats"]}
    own = own.replace("out/toy/checkpoint.pt", f"{pretrained.checkpoint}").replace("data/toy", f"{toy}")
    exec(own, names := {})
    net, tokens, s_image = names["net"], names["tokens"], names["net"].image_encoder(names["images"])
    assert torch.equal(tokens, net.target_encoder(s_image, *net.text_encoder(names["captions"])))
    assert torch.allclose(names["pooled"], tokens.sum(1) / 36, atol=1e-6)
    assert names["energies"].shape == (2,) and names["logits"].shape == (2, 10)


def make(words, **given):
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **given}  # and no other variable of a user
    return execute("make", *shlex.split(words), cwd=HERE, env=env)


def runs(text):
    commands = re.findall(r'python3"? (.*?)\b(pretrain|finetune_mvsa)\.py ([^>&|\n]*)', text)
    return [(by.split(), script, vars(sys.modules[script].parse_args(shlex.split(options))))
            for by, script, options in commands]


BOTH = "--device cpu --dtype bfloat16 --cache /f --image_weights /w --text_encoder /t"
JUDGE = f"python3 finetune_mvsa.py {BOTH} --checkpoint /o/checkpoint.pt --mvsa data/toy/mvsa --out /o"
TOY = "--device cpu --cache data/toy/cache"
MAKE = {  # what is asked of make: the commands that it would run
    "reproduce PRESET=tiny COCO=/c MVSA=/m": """
        python3 pretrain.py --preset tiny --coco /c --resume --out out/tiny
        python3 pretrain.py --eval out/tiny/checkpoint.pt --coco /c
        python3 finetune_mvsa.py --checkpoint out/tiny/checkpoint.pt --mvsa /m --out out/tiny""",
    "reproduce PRESET=toy OUT=/o DEVICE=cpu DTYPE=bfloat16 CACHE=/f IMAGE_WEIGHTS=/w TEXT_ENCODER=/t "
    "SPLIT=/s IMAGE_ENCODER=vit EPOCHS=7 TARGET=image SEED=3 ARGS=--lr=0.5 GPUS=2": f"""
        python3 -m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=2 \
            pretrain.py {BOTH} --coco data/toy/coco --out /o --resume --image_encoder vit --epochs 7 \
            --target image --seed 3 --lr 0.5
        python3 pretrain.py {BOTH} --coco data/toy/coco --eval /o/checkpoint.pt
        {JUDGE} --split /s && {JUDGE} --protocol grouped --mode probe
        {JUDGE} --protocol authors --mode probe""",
    "judge CHECKPOINT=/o/c.pt POSTS=/p DEVICE=cpu": f"""
        python3 finetune_mvsa.py {TOY} --checkpoint /o/c.pt --posts /p --protocol standard""",
    "bench PRESET=tiny DEVICE=cpu DTYPE=float32 IMAGES=70":
        "python3 pretrain.py --bench --preset tiny --device cpu --dtype float32 --max_images 70",
    # -B: as if no run were there. What is not the same for all is not taken over
    "-B ablate DEVICE=cpu TARGET=image SEED=9 EPOCHS=7 ARGS=--lr=1": "".join(f"""
        python3 pretrain.py {TOY} --coco data/toy/coco --out {out}-{seed} --resume {options} --seed {seed}
        python3 pretrain.py {TOY} --coco data/toy/coco --eval {out}-{seed}/checkpoint.pt
        python3 finetune_mvsa.py {TOY} --checkpoint {out}-{seed}/checkpoint.pt --out {out}-{seed} \
            --mvsa data/toy/mvsa --seeds 0 1 2 --mode probe
        """ for out, options in (
            ("out/ablate/plain", ""), ("out/ablate/image", "--target image"),
            ("out/ablate/sigreg", "--sigreg 0.005"),
            ("out/ablate/no_ema", "--momentum 0 --final_momentum 0"),
            ("out/ablate/shuffled", "--shuffle_captions"),
            ("out/ablate/image_shuffled", "--target image --shuffle_captions"),
            ("out/ablate/before", "--target image --mask before"),
            ("out/ablate/before_shuffled", "--target image --mask before --shuffle_captions"),
            ("out/ablate/recipe", "--target whitened --mask before --visible 0.3")) for seed in range(3))
    + "python3 finetune_mvsa.py --ablate out/ablate"}


@pytest.mark.parametrize("words", MAKE)
def test_make_passes_each_variable_on_to_the_commands_that_it_is_for(words):
    assert runs(make(f"-n VENV= {words}").stdout) == runs(MAKE[words])


def test_make_says_what_it_would_run_or_lacks_and_evaluates_a_checkpoint_once(tmp_path):
    for words, says in (
            ("check-preset DEVICE=cpu", "toy, data data/toy/coco and data/toy/mvsa, device cpu. To"),
            ("check-preset COCO=/ MVSA=/", "preset small"), ("check-preset MVSA=/no", "preset small"),
            ("-n pretrain COCO=/ MVSA=/no VENV=", "--preset small"),
            ("-n pretrain 'COCO=~/a b~~c~/d' VENV=", f'--coco "{Path.home()}/a b~~c~/d"'),
            ("-n coco VENV=", "--images 10000\n"), ("-n coco VENV= IMAGES=all", "--images 0\n"),
            ("-n reproduce VENV= PRESET=toy",
             '[ "out/toy/eval.json" -nt "out/toy/checkpoint.pt" ] || "python3" pretrain.py')):
        assert says in make(words).stdout
    assert "preset small" in make("check-preset", COCO="/no").stdout
    assert "cannot have a space" in make("-n test 'VENV=a b'").stderr
    assert '--posts "' + str(Path.home()) + '/p"' in make("-n judge VENV= CHECKPOINT=/c 'POSTS=~/p'").stdout
    assert "preset tiny, data /c" in make("check-preset", PRESET="tiny", COCO="/c").stdout
    assert "needs CHECKPOINT=FILE and POSTS" in make("-n judge POST=/p CHECKPOINT=/x/c.pt VENV=").stderr
    assert f"{Path.home()}/v/bin/python" in make("-n test VENV=~/v").stdout
    (tmp_path / "requirements.txt").write_text("numpy>=1\ntorch>=99\nno-such>=1\n")
    lacks = make(f"-C {tmp_path} -f '{HERE}/Makefile' packages VENV= 'PYTHON3={sys.executable}'")
    assert " lacks torch>=99, no-such>=1;" in lacks.stderr and lacks.returncode == 2


BAD = {  # a command: words of the message
    "{train} --lr nan": "argument --lr", "{train} --momentum 2": "argument --momentum",
    "{train} --batch_size 1.5": "argument --batch_size", "{train} --seed -1": "argument --seed",
    "{train} --batch_size 33 --accumulate 1": "--batch_size 33 32 images",
    "{train} --sigreg 1": "--sigreg needs the whole batch --accumulate 1",
    "{train} --accumulate 3": "--batch_size 16 --accumulate x processes",
    "{train} --held_out 1": "--held_out 1 at least 2",
    "{train} --image_weights none": "--image_encoder toy cannot be loaded from none: takes no weights",
    "{train} --bench --max_images 1": "--bench more images than --held_out",
    "{train} --captions red --eval out": "--image and --captions go together",
    "{judge} --device gpu": "--device gpu --device auto",
    "{judge} --protocol grouped --split x": "--split standard protocol",
    "{judge}/MVSA_Single --protocol authors": "pools both sets",
    "finetune_mvsa.py --ablate .": "--ablate . make ablate",
    "data.py check --coco none --mvsa none": "none/train2017 make coco",
    "data.py check --coco {coco} --mvsa none": "none/labelResultAll.txt mcrlab Kaggle"}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_a_sentence_and_code_2(command, toy, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = " ".join(map(str, ("pretrain.py", *pretrained.options, "--out out")))
    judge = f"finetune_mvsa.py --checkpoint {pretrained.checkpoint} --out out --cache cache --mvsa {toy}/mvsa"
    monkeypatch.setattr(sys, "argv", command.format(train=train, judge=judge, coco=toy / "coco").split())
    with pytest.raises(SystemExit, match="2"):  # as a user types it
        runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
    said = " ".join(capsys.readouterr().err.split())
    assert data.number(float, 0, 1)["type"]("1") == 1
    assert "error:" in said and "Errno" not in said and not Path("out", "checkpoint.pt").exists()
    assert all(word in said for word in BAD[command].split()), said
