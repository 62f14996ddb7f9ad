"""The tests, by values: `make test`. CPU only, no network; every file they need they write themselves."""
import contextlib
import csv
import errno
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shlex
import signal
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

# Before the imports. One thread: two on two busy cores are many times slower, and a fork of threads may hang.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
os.environ.update(HF_HOME=tempfile.mkdtemp(), TORCH_HOME=tempfile.mkdtemp())

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import data
import finetune_mvsa
import model
import pretrain
from model import UserError, generator_of, sample_masks

# tqdm shares its lock with forks: one that is killed while it holds it would stop all the others
os.register_at_fork(after_in_child=lambda: data.tqdm.set_lock(multiprocessing.RLock()))

HERE = Path(__file__).parent
WORDS = "a red dog on blue grass under the sky with two cats".split()
CONFIG = replace(model.PRESETS["toy"], dim=32, predictor_dim=32, target="ema", vocabulary=WORDS)
TEXTS = ["a red dog", "blue grass under the sky with two cats on a dog", "cats"]
SHORT = ["--epochs", 10, "--batch_size", 8, "--held_out", 8, "--log_every", 1, "--device", "cpu"]  # 40 steps
CAPTIONS = "annotations/captions_train2017.json"
SLOW = {"images_per_s", "data_wait"}  # the fields of a log line that tell the time


def fresh_rng():
    """A random generator whose seed is printed, so that a failure can be repeated."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def call(module, *options, code=0):
    """A command in this process, which must end with this exit code -> its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            found = module.run([str(option) for option in options])
        except SystemExit as stopped:  # argparse's own way
            found = stopped.code
    assert found == code, err.getvalue()
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


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48, generator=generator_of(1))


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


# ---- model.py ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(6, 6), (6, 9), (14, 14), (16, 16)])
def test_sample_masks_are_disjoint_in_range_and_reach_every_patch_alike(grid):
    N, half = grid[0] * grid[1], grid[0] // 2
    seen, hidden = torch.zeros(N), torch.zeros(N)
    for step in range(20):
        context, target = sample_masks(grid, 128, 0, step)
        assert len(context) == len(target) == 128 and target.shape[1] == 4
        for c, t in zip(context.tolist(), target.flatten(1).tolist()):
            assert len(set(c)) == len(c) >= N // 10 and not set(c) & set(t)
        seen += torch.bincount(context.flatten(), minlength=N)  # an error for an index out of range
        hidden += torch.bincount(target.flatten(), minlength=N)
    assert (seen > 0).all() and (hidden > 0).all()
    rows = seen.view(grid).sum(1)  # a large batch does not lose the bottom rows
    assert 0.95 < rows[half:].sum() / rows[:half].sum() < 1.05 and 0.9 < rows[-1] / rows[0] < 1.1


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
    left = [sample_masks((7, 7), 128, 0, step).context.shape[1] for step in range(300)]
    assert min(left) >= 7 * 7 // 10  # else the blocks are drawn again: 7 of these steps need that


def test_sample_masks_is_a_function_of_grid_batch_seed_and_step():
    first = sample_masks((14, 14), 8, 3, 5)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, sample_masks((14, 14), 8, 3, 5)))
    images = {tuple(image.flatten().tolist()) for seed in (0, 1, 2 ** 31 - 1) for step in range(5)
              for image in sample_masks((14, 14), 8, seed, step).target}
    assert len(images) == 3 * 5 * 8  # and drawn for each image


def normed(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)


def plain_block(block, x, text=None, text_mask=None):
    """What a block outputs, with its weights in PyTorch's own attention."""
    ours, (first, _, second) = block.attention, block.mlp
    attention = torch.nn.MultiheadAttention(x.shape[-1], ours.heads, batch_first=True)
    attention.in_proj_weight.data = torch.cat([ours.q.weight, ours.kv.weight])
    attention.in_proj_bias.data = torch.cat([ours.q.bias, ours.kv.bias])
    attention.out_proj = ours.proj
    memory = normed(x, block.norm_attention) if text is None else text
    padding = None if text_mask is None else ~text_mask
    x = x + attention(normed(x, block.norm_attention), memory, memory, padding, need_weights=False)[0]
    return x + second(F.gelu(first(normed(x, block.norm_mlp))))


def randomize(module):
    """All weights, biases and norms at random, so that none can stand for another."""
    for number, p in enumerate(module.parameters()):
        p.data.normal_(0, 0.3, generator=generator_of(5, number))
    return module


def test_block_equals_pytorchs_attention_with_the_same_weights():
    block, x = randomize(model.Block(32, 4)), torch.randn(3, 7, 32, generator=generator_of(0))
    text, lengths = torch.randn(3, 5, 32, generator=generator_of(1)), torch.tensor([[5], [2], [1]])
    for given in ((), (text,), (text, torch.arange(5) < lengths)):
        expected = plain_block(block, x, *given)
        assert torch.allclose(block(x, *given), expected, atol=1e-5)
        assert torch.allclose(block(x, *given, last=2), expected[:, -2:], atol=1e-5)


def test_fusion_encoder_projects_then_attends_to_the_caption_alone(net, images):
    X, (s_image, s_text, text_mask) = randomize(net.context_encoder), net.frozen(images, TEXTS)
    (a, norm_a), (b, norm_b) = X.image_proj, X.text_proj
    x, text = normed(a(s_image), norm_a), normed(b(s_text), norm_b)
    for block in X.blocks:
        x = plain_block(block, x, text, text_mask)
    assert torch.allclose(X(s_image, s_text, text_mask), normed(x, X.norm), atol=1e-5)


def test_predictor_and_fusion_encoder_start_from_xavier_g_with_i_jepas_rescaling(net):
    g = model.Predictor((6, 6), 64, 64, 4, 2, 64)
    layers = {p: layer for layer, block in enumerate(g.blocks, start=1)
              for p in (block.attention.proj.weight, block.mlp[2].weight)}
    for p in (*g.parameters(), *net.context_encoder.parameters()):
        if p.ndim == 2:  # a uniform distribution, of 1,000 values or more
            bound = (6 / sum(p.shape)) ** 0.5 / (2 * layers[p] if p in layers else 1) ** 0.5
            assert p.abs().max().item() == pytest.approx(bound, rel=0.03)
    assert not any(p.any() for name, p in g.named_parameters() if name.endswith("bias"))
    assert 0.01 < g.mask_token.std() < 0.04


@pytest.mark.parametrize("loss, target", [("mse", "ema"), ("smooth_l1", "ema"), ("mse", "image")])
def test_forward_predictor_and_patch_energy_equal_a_plain_loop(images, loss, target):
    """Each pair unpadded, X~ of all patches, all tokens of g: what is skipped or shared changes nothing."""
    torch.manual_seed(0)
    net = model.TIJEPA(replace(CONFIG, loss=loss, target=target))
    for p in net.target_encoder.parameters():  # X~ must not be X, or a mix-up of the two would pass
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator_of(3)))
    for block in (*net.context_encoder.blocks, *net.target_encoder.blocks):
        block.attention.proj.weight.data.mul_(100)  # untrained, they hardly listen to the text
    masks, g = sample_masks(net.grid, 3, 0), net.predictor
    out = net(*net.frozen(images, TEXTS), masks)
    for b in range(3):
        s_image, *text = net.frozen(images[b:b + 1], TEXTS[b:b + 1])
        tokens = s_image if target == "image" else net.target_encoder(s_image, *text)  # [1, N, D]
        context = net.context_encoder(s_image[:, masks.context[b]], *text)
        assert torch.allclose(out.context[b:b + 1], context, atol=1e-5)
        visible = g.embed(context) + g.positions[:, masks.context[b]]
        for m, patches in enumerate(masks.target[b]):
            x = torch.cat([visible, g.mask_token + g.positions[:, patches]], dim=1)
            for block in g.blocks:
                x = plain_block(block, x)
            predicted = g.proj(g.norm(x))[0, -len(patches):]
            assert torch.allclose(out.prediction[b, m], predicted, atol=1e-5)
            y = tokens[0, patches]
            y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            assert torch.allclose(out.target[b, m], y, atol=1e-5)
    d = (out.prediction - out.target).abs()
    errors = d ** 2 if loss == "mse" else torch.where(d < 1, 0.5 * d ** 2, d - 0.5)
    assert torch.allclose(out.patch_energy, errors.mean(-1), rtol=1e-5)
    assert torch.allclose(out.energy, errors.mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_vicreg_term_and_measures_of_collapse_by_hand():
    context = torch.randn(6, 5, 3, generator=generator_of(0)) * torch.tensor([0.3, 1.0, 3.0])
    covariance = np.cov(context.mean(1).double().numpy(), rowvar=False)
    variance = np.mean([max(0, 1 - np.sqrt(covariance[d, d] + 1e-4)) for d in range(3)])
    squares = sum(covariance[i, j] ** 2 for i in range(3) for j in range(3) if i != j)
    assert model.vicreg_term(context).item() == pytest.approx(variance + squares / 3 / 25, rel=1e-4)
    noise = torch.randn(2000, 4, 8, generator=generator_of(0))
    assert model.sample_std(noise[:1].expand(20, -1, -1)) < 1e-6  # the same for every image
    assert model.sample_std(noise) == pytest.approx(1, abs=0.02)
    assert model.effective_rank(noise[:50, 0, :1] * noise[50, :1] + 3) == pytest.approx(1, abs=0.01)
    assert model.effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(4, abs=1e-3)


def test_sigreg_term_equals_a_plain_loop_and_tells_normal_from_collapsed():
    context = torch.randn(5, 4, 3, generator=generator_of(0)) * 2
    z = context.mean(1).double().numpy()
    directions = torch.randn(3, 256, generator=generator_of(7, 11)).double().numpy()
    knots, total = np.arange(17) * 3 / 16, 0
    for a in directions.T:
        shadow = z @ a / np.linalg.norm(a)
        gaps = [abs(np.exp(1j * t * shadow).mean() - np.exp(-t * t / 2)) ** 2 for t in knots]
        weighted = gaps * np.exp(-knots ** 2 / 2)
        total += 2 * 5 * 3 / 16 * (sum(weighted) - (weighted[0] + weighted[-1]) / 2)  # t < 0, too
    assert model.sigreg_term(context, 7, 11).item() == pytest.approx(total / 256, rel=1e-4)
    assert model.sigreg_term(context, 7, 12) != model.sigreg_term(context, 7, 11)  # other directions
    normal = torch.randn(2000, 1, 16, generator=generator_of(1))
    terms = [model.sigreg_term(z, 0, 0).item() for z in (normal, normal.bfloat16(), 0 * normal, 3 * normal)]
    assert 0 < terms[0] < 2 and terms[1] == pytest.approx(terms[0], rel=0.05)  # of 2,000: about 1 by chance
    assert terms[2] > 300 and terms[3] > 300


def test_score_and_energy_matrix_are_the_energies_of_each_pair_wherever_it_stands(net, images):
    """Any leak from one pair to another would fake an AUC."""
    masks = [sample_masks(net.grid, 1, draw) for draw in range(3)]
    pairs = [net.frozen(images[i:i + 1], [text]) for i in range(3) for text in TEXTS]
    by_hand = [np.mean([net(*pair, mask).energy.item() for mask in masks]) for pair in pairs]
    matrix = pretrain.energy_matrix(net, net.frozen(images, TEXTS), draws=3)
    assert matrix.flatten().tolist() == pytest.approx(by_hand, rel=1e-5) and matrix.shape == (3, 3)
    scores = net.score(images, TEXTS, draws=3)
    assert torch.allclose(scores, matrix.diagonal(), rtol=1e-5) and not scores.requires_grad


def test_update_target_follows_the_ema_formula_from_a_copy_of_x(net):
    theta, xi = (list(part.parameters()) for part in (net.context_encoder, net.target_encoder))
    assert len(theta) == len(xi) and all(torch.equal(a, b) and a is not b for a, b in zip(theta, xi))
    for p in theta:
        p.data.add_(torch.randn(p.shape, generator=generator_of(2)))
    before = [p.clone() for p in xi]
    net.update_target(0.9)
    for new, old, p in zip(xi, before, theta):
        assert torch.allclose(new, 0.9 * old + 0.1 * p, atol=1e-7) and not torch.equal(new, old)


def test_gradients_reach_context_encoder_and_predictor_only(net, images):
    net.train()
    net(*net.frozen(images, TEXTS), sample_masks(net.grid, 3, 0)).energy.mean().backward()
    for name, p in net.named_parameters():
        if name.startswith(("context_encoder", "predictor")):
            assert p.grad is not None and p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None and not p.requires_grad, name
    trained = {name.split(".")[0] for name, part in net.named_modules() if name and part.training}
    assert trained == {"context_encoder", "predictor"}


def test_the_caption_reaches_the_prediction_before_any_training(images):
    """With I-JEPA's init of std 0.02 these widths took several times the steps to hear the caption."""
    torch.manual_seed(0)
    net = model.TIJEPA(replace(model.PRESETS["toy"], vocabulary=WORDS))
    masks = sample_masks(net.grid, 3, 0)
    said, other = (net(*net.frozen(images, texts), masks).prediction for texts in (TEXTS, TEXTS[::-1]))
    assert (said - other)[0].abs().mean() > 0.05 * said[0].std()  # 0.003 with std 0.02


def test_predictor_positions_tell_the_patches_apart():
    positions = model.sincos_2d((6, 6), 32)
    assert len({tuple(p.tolist()) for p in positions}) == 36
    assert torch.allclose(positions[7, :8], torch.sin(1.0 * 10000 ** (-torch.arange(8) / 8)))  # row 1
    assert torch.equal(positions[7, 16:], positions[31, 16:])  # the same column


def test_encode_gives_the_target_encoders_tokens_and_their_mean(net, images):
    net.target_encoder.norm.weight.data.mul_(2)  # now X~ differs from X
    tokens, pooled = net.encode(images, TEXTS)
    assert torch.equal(tokens, net.target_encoder(net.image_encoder(images), *net.text_encoder(TEXTS)))
    assert tokens.shape == (3, 36, 32) and torch.allclose(pooled, tokens.sum(1) / 36, atol=1e-6)
    empty, blank = (net.encode(images[:1], [text])[0] for text in ("", "  "))
    assert torch.equal(empty, blank) and empty.isfinite().all()


def test_what_cannot_be_is_refused_in_words(net, images, tmp_path):
    save_text_encoder(tmp_path, num_hidden_layers=3)
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    lacking = {key: value for key, value in state.items() if "blocks.1.attn.proj" not in key}
    cnn, fc1 = timm.create_model("test_efficientnet", num_classes=0).state_dict(), "blocks.0.mlp.fc1.weight"

    torn, maps = tmp_path / "torn.safetensors", model.TIJEPA(CONFIG)
    torn.write_bytes(bytes(9))
    maps.image_encoder.vit.forward_features = lambda images: torch.zeros(len(images), 6, 6, 96)
    maps.image_encoder.prefix = 0

    def load(name, state):
        torch.save(state, tmp_path / "weights")
        model.ImageEncoder(name, str(tmp_path / "weights"))

    for attempt, words in (
            (lambda: net.encode(images, "a red dog"), "with 'a red dog': .* with a list of B strings"),
            (lambda: net.encode(images[:1], TEXTS), r"\[1, 3, 48, 48\] with \['a red dog', .* list of B"),
            (lambda: net.encode(images[:, :, 8:], TEXTS), r"\[3, 3, 40, 48\] .* toy takes .*\[3, 48, 48"),
            (lambda: replace(CONFIG, heads=3), "heads=3 do not divide the width dim=32"),
            (lambda: replace(CONFIG, predictor_dim=6), "predictor_dim=6"),
            (lambda: replace(CONFIG, loss="l1"), '"mse" or "smooth_l1".*"l1"'),
            (lambda: replace(CONFIG, target="text"), 'target must be.*"text"'),
            (lambda: sample_masks((9, 5), 2, 0), "9 x 5 patch grid is too small.*--image_encoder"),
            (lambda: load("test_vit", lacking), "blocks.1.attn.proj.weight"),
            (lambda: load("test_vit", {**state, fc1: torch.zeros(3, 3)}), fc1),
            (lambda: load("test_vit", {**state, "extra.weight": torch.zeros(1)}), "extra.weight"),
            (lambda: load("test_efficientnet", cnn), "num_prefix_tokens.*ViT with a fixed patch grid"),
            (lambda: load("no_such_vit", state), "Unknown model"),
            (lambda: model.ImageEncoder("test_vit", str(torn)), "SafetensorError.*--image_weights FILE"),
            (lambda: maps.frozen_image(images), r"outputs \[3, 6, 6, 96\], not one for each of \(6, 6\)"),
            (lambda: model.TextEncoder(str(tmp_path)), "encoder.layer.2")):  # its config says 3 layers
        with pytest.raises(UserError, match=words):
            attempt()


def test_presets_are_the_papers():
    assert {c.target for c in model.PRESETS.values()} == {"ema"}
    for name, *sizes in (("small", 768, 4, 8), ("medium", 768, 6, 12), ("large", 1024, 8, 16)):
        c = model.PRESETS[name]
        assert [c.dim, c.depth, c.heads, c.predictor_depth, c.predictor_dim] == [*sizes, 12, 384]
        assert timm.is_model(c.image_encoder.split(".")[0])


@pytest.mark.parametrize("name, prefix", [("test_vit", 1), ("test_vit_relpos", 0)])
def test_patch_tokens_without_class_token(tmp_path, name, prefix):
    vit = timm.create_model(name, num_classes=7).eval()  # a classifier may be left over: f_I has none
    state = vit.state_dict()
    ijepa = {"encoder": {f"module.{key}": value for key, value in state.items()}, "predictor": {},
             "target_encoder": {f"module.{key}": value + 1 for key, value in state.items()}}
    torch.save(state, tmp_path / "vit")
    torch.save(ijepa if prefix else state, tmp_path / "ijepa")  # in the format of I-JEPA's own file
    timm.models.save_for_hf(vit, tmp_path / "hub")
    pictures = torch.randn(2, 3, 160, 160, generator=generator_of(0))
    expected = vit.forward_features(pictures)[:, prefix:]
    for source in ((name, f"{tmp_path}/vit"), (name, f"{tmp_path}/ijepa"), (f"local-dir:{tmp_path}/hub",)):
        encoder = model.ImageEncoder(*source)
        assert torch.allclose(encoder(pictures), expected, atol=1e-5) and expected.shape[1] == 100
        assert encoder.grid == (10, 10) and encoder.data_config["input_size"] == (3, 160, 160)


SMALL = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
KINDS = {"bert": {"max_position_embeddings": 12}, "gte": {"pad_token_id": 0}, "t5": {}}  # gte: the paper's


def save_text_encoder(folder, name="bert", words=WORDS, file="config.json", **edit):  # an edit of `file`
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    saved = AutoModel.from_config(AutoConfig.for_model(name, **SMALL, **KINDS[name])).eval()
    saved.save_pretrained(folder)
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **edit}))
    return saved


@pytest.mark.parametrize("name, longest", [("bert", 12), ("gte", 128), ("t5", 128)])
def test_text_encoders_load_from_a_folder(tmp_path, name, longest):
    saved = save_text_encoder(tmp_path, name)
    encoder = model.TextEncoder(str(tmp_path))
    states, mask = encoder(TEXTS + [""])
    assert mask.tolist() == [[n < length for n in range(11)] for length in (3, 11, 1, 1)]
    assert encoder.dim == 16 and encoder(["dog " * 500])[0].shape[1] == longest
    ids = torch.tensor([[2 + WORDS.index(word) for word in TEXTS[0].split()]])
    expected = (saved.encoder if name == "t5" else saved)(input_ids=ids).last_hidden_state
    assert torch.allclose(states[0, :3], expected[0], atol=1e-5)


def test_encoders_are_known_by_all_that_decides_their_output(net, tmp_path):
    texts = []
    for changes in ({}, {"num_attention_heads": 4}, {"words": WORDS[::-1]},
                    {"file": "tokenizer.json", "normalizer": {"type": "Lowercase"}},
                    {"file": "tokenizer_config.json", "model_max_length": 7},
                    {"transformers_version": "4.0"}):  # the last is the first again
        save_text_encoder(tmp_path, **changes)
        texts.append(model.TextEncoder(str(tmp_path)).fingerprint())
    assert texts[0] == texts[-1] and all(model.differences(texts[0], other) for other in texts[1:-1])
    f_I, prints = net.image_encoder, [json.loads(json.dumps(net.fingerprint()))]
    for values, key in ((vars(f_I.vit.blocks[1].attn), "num_heads"), (f_I.data_config, "mean"),
                        (f_I.data_config, "std"), (f_I.vit.pretrained_cfg, "architecture")):
        values[key] = "other"
        prints.append(net.fingerprint())
    for p in (*f_I.parameters(), *net.text_encoder.parameters()):
        p.view(-1)[-1] += 1e-3
        prints.append(net.fingerprint())
    assert all(model.differences(then, now) for then, now in zip(prints, prints[1:]))
    assert model.differences({"a": 1, "old": 2}, {"new": 3, "a": 2}) == "a (then 1, now 2)"


def test_a_checkpoint_runs_no_code_and_is_refused_unless_whole(pretrained, tmp_path):
    whole, folder, files = torch.load(pretrained.checkpoint), tmp_path / "code was run", tmp_path / "files"
    makes_folder = type("MakesFolder", (), {"__reduce__": lambda self: (os.mkdir, (str(folder),))})()
    evil = {**whole, "config": makes_folder}
    contents = {f"lacks {key}": {k: v for k, v in whole.items() if k != key} for key in model.CHECKPOINT_KEYS}
    contents.update({"evil": evil, "list": [1, 2], "config": {**whole, "config": {"width": 3}}})
    files.mkdir()
    for name, content in contents.items():
        torch.save(content, files / name)
    (files / "pickle").write_bytes(pickle.dumps(evil, protocol=2))
    (files / "torn").write_bytes(pretrained.checkpoint.read_bytes()[:-1000])
    (files / "empty").write_bytes(b"")
    for path in (*files.iterdir(), files, tmp_path / "none.pt"):
        said = call(pretrain, "--eval", path, "--coco", "/nowhere", code=2).err
        assert f"{path} is not a whole checkpoint" in said
    assert not folder.exists()
    loaded = model.TIJEPA.from_checkpoint(pretrained.checkpoint)[0]
    for part, state in whole["model"].items():
        assert all(torch.equal(getattr(loaded, part).state_dict()[k], v) for k, v in state.items())


class Elsewhere(torch.utils._python_dispatch.TorchDispatchMode):
    """The device "meta" stands for a GPU: no operation has tensors on both, and what is read back is 0."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim or x.is_meta}  # a number may lie on the CPU
        assert len(devices) < 2, f"{function} with tensors on more than one device"
        if devices == {"meta"} and function is aten._local_scalar_dense.default:
            return 0
        if devices == {"meta"} and function is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            return torch.zeros_like(args[0], device="cpu", dtype=kwargs.get("dtype"))
        return function(*args, **kwargs)


def test_nothing_is_left_on_the_cpu(pretrained, toy, images, tmp_path, monkeypatch):
    encoders = torch.load(pretrained.checkpoint)["encoders"]
    monkeypatch.setattr(model.TIJEPA, "fingerprint", lambda net: encoders)  # so that the cache is found
    monkeypatch.setattr(model, "pick_device", lambda name: torch.device("meta"))
    with Elsewhere():
        call(pretrain, *pretrained.options, "--epochs", 1, "--out", tmp_path)
        net = model.TIJEPA.from_checkpoint(pretrained.checkpoint)[0].to("meta")
        features = net.frozen(images, TEXTS)
        assert all(tensor.is_meta for tensor in (*features, *net.encode(images, TEXTS)))
        assert pretrain.energy_matrix(net, features, draws=2).shape == (3, 3)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_for_the_forward_passes_only(net, images, name):
    dtype, masks, runs = getattr(torch, name), sample_masks(net.grid, 3, 0), []
    for net.dtype in (model.pick_dtype("auto", net.device), dtype):  # auto is float32 on a CPU
        features = net.frozen(images, TEXTS)
        out = net(*features, masks)
        runs.append([*features[:2], out.prediction, out.energy, out.target, *net.encode(images, TEXTS)])
    for i, (single, half) in enumerate(zip(*runs)):
        assert single.dtype == torch.float32 and half.dtype == (dtype if i < 3 else torch.float32)
        assert 0.01 < (half.float() - single).norm() / single.norm() / torch.finfo(dtype).eps < 4, i
        if i < 2:  # f_I and f_T themselves ran in half precision: their output is not just rounded
            assert (half != single.to(dtype)).float().mean() > 0.03


@pytest.mark.parametrize("name, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_gpu_that_is_asked_for_is_made_the_current_one(monkeypatch, name, index):
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)  # below torch's own checks
    assert model.pick_device(name) == torch.device("cuda", index)
    assert chosen in ([index, "high"], ["high"] * (index == 0))


def test_a_gpu_is_used_in_the_precision_it_has_and_never_replaced_in_silence(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float16)):  # torch counts slow ones as well
        supported = lambda including_emulation=True: fast or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert model.pick_dtype("auto", torch.device("cuda")) == dtype
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="470.57\n470.57\n"))
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    said = call(pretrain, "--coco", "/nowhere", code=2).err
    assert "driver 470.57)" in said and "--device cpu" in said
    assert model.pick_dtype("auto", model.pick_device("cpu")) == torch.float32


def test_a_checkpoint_finds_its_encoders_where_they_lie_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        torch.manual_seed(number)
        torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), f"vit{number}")
        save_text_encoder(Path(f"bert{number}"), layer_norm_eps=10.0 ** (-6 + number))
    net = model.TIJEPA(replace(CONFIG, image_encoder="test_vit", image_weights="vit0", text_encoder="bert0"))
    net.target_encoder.norm.bias.data.add_(1)  # X~ is not X, nor what a seed gives
    trained = {name: getattr(net, name).state_dict() for name in model.TRAINED}
    torch.save({**dict.fromkeys(model.CHECKPOINT_KEYS), "config": vars(net.config),
                "encoders": net.fingerprint(), "model": trained}, "checkpoint.pt")
    os.rename("vit0", "vit2")
    os.rename("bert0", "bert2")
    for weights, folder, words in (("vit2", "", "bert0"), ("vit1", "bert2", "other encoders: f_I weights"),
                                   ("vit2", "bert1", "other encoders: f_T layer_norm_eps")):
        with pytest.raises(UserError, match=words):
            model.TIJEPA.from_checkpoint("checkpoint.pt", weights, folder)
    loaded, _ = model.TIJEPA.from_checkpoint("checkpoint.pt", "vit2", "bert2")
    pictures = torch.randn(3, 3, 160, 160, generator=generator_of(0))
    assert torch.equal(loaded.encode(pictures, TEXTS)[0], net.encode(pictures, TEXTS)[0])


# ---- data.py: pictures, the toy world, COCO ----------------------------------------------------------------

SPECKLED = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
RAMP = Image.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16))
IMAGES = {  # name: (picture, format, what its first pixel is read as)
    "cmyk": (Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
    "16-bit": (RAMP, "PNG", (0, 0, 0)),
    "animated": (Image.new("RGB", (60, 40), "red"), "GIF", (255, 0, 0)),
    "transparent": (Image.new("RGBA", (60, 40), (9, 9, 9, 0)), "PNG", (255, 255, 255)),
    "20,000 x 1": (Image.new("RGB", (20000, 1), (0, 0, 254)), "PNG", (0, 0, 254)),
}
NO_IMAGES = {  # to read some of these would never end
    "truncated": lambda path: SPECKLED.save(path, "JPEG") or os.truncate(path, 1500),
    "a bomb": lambda path: Image.new("1", (20000, 20000)).save(path, "PNG"),
    "folder": os.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
}


def ends_well(process):
    """Whether it does within a minute; it is killed if it hangs."""
    process.join(60)
    process.kill()
    return process.exitcode == 0


@pytest.mark.filterwarnings("ignore")
def test_pictures_of_every_kind_are_read_or_counted(tmp_path, encoded):
    items = [(tmp_path / name, ["red bars"]) for name in [*IMAGES, *NO_IMAGES]]
    for name, (image, form, _) in IMAGES.items():
        image.save(tmp_path / name, form, save_all=form == "GIF", append_images=[SPECKLED])
    for name, make in NO_IMAGES.items():
        make(tmp_path / name)
    given = tmp_path / "cache", items, encoded.net, 2
    assert ends_well(forked(data.FeatureCache, *given))
    cache = data.FeatureCache(*given)
    assert list(cache.readable) == list(range(5)) and list(cache.unreadable) == list(range(5, 11))
    for name, (original, _, pixel) in IMAGES.items():
        image = data.read_image(tmp_path / name, (48, 48))
        assert image.size == original.size and image.mode == "RGB"
        assert np.allclose(image.getpixel((0, 0)), pixel, atol=2), name
    ramp = data.read_image(tmp_path / "16-bit")  # not clipped
    assert ramp.getpixel((59, 39)) == (255, 255, 255) and abs(ramp.getpixel((30, 20))[0] - 131) < 2


def test_an_error_that_is_not_the_pictures_skips_none(tmp_path, encoded, monkeypatch):
    items = 3 * [(tmp_path / "a.png", ["red bars"])]
    theirs = [OSError(errno.EINVAL, "of a JPEG 2000"), RuntimeError("of an AVIF: failed to decode frame 0")]
    monkeypatch.setattr(data, "read_image", Mock(side_effect=theirs))
    assert list(data.FeatureCache(tmp_path / "cache", items[:2], encoded.net, 1).unreadable) == [0, 1]
    monkeypatch.setattr(data, "read_image", Mock(side_effect=OSError(errno.EMFILE, "too many open files")))
    with pytest.raises(OSError, match="too many open files"):
        data.FeatureCache(tmp_path / "cache", items, encoded.net, 1)


def test_preprocessing_is_the_encoders():
    picture = Image.new("RGB", (100, 60))
    picture.paste("white", (90, 0, 100, 60))  # squashed, not cropped
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]])
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=mean.tolist(), std=std.tolist())
    tensor = data.image_transform(config)(picture)
    assert torch.allclose(tensor[:, 16, 0], -mean / std, atol=1e-5)  # the left edge
    assert torch.allclose(tensor[:, 16, 31], (1 - mean) / std, atol=1e-5)  # and the right


@pytest.mark.parametrize("form, width, longest", [("JPEG", 1200, 150),  # a large one is decoded smaller
                                                  ("JPEG", 90, 90), ("TIFF", 60, 60), ("PNG", 60, 60)])
def test_pictures_are_turned_upright_and_look_the_same(tmp_path, form, width, longest):
    y, x = np.mgrid[:2 * width // 3, :width] / width
    smooth = np.stack([x, 1.5 * y, np.sin(10.67 * x) / 2 + 0.5], axis=-1)  # each way to turn it gives another
    if form == "PNG":
        smooth = smooth.mean(axis=-1)
    plain = stored = Image.fromarray((255 * smooth).astype(np.uint8)).convert("RGB")
    if form == "PNG":  # of 16 bits
        stored = Image.fromarray((65535 * smooth).astype(np.uint16))
    for orientation in range(1, 9):
        plain.getexif()[0x0112] = orientation
        stored.save(tmp_path / "image", form, quality=95, exif=plain.getexif())
        found = data.read_image(tmp_path / "image", (48, 48))
        expected = ImageOps.exif_transpose(plain).resize(found.size)
        assert max(found.size) == longest
        assert np.abs(np.asarray(found).astype(float) - np.asarray(expected)).mean() < 3


def test_corrupt_exif_does_not_spoil_a_good_picture(tmp_path):
    rng, exif = fresh_rng(), Image.Exif()
    exif.update({0x0112: 6, 0x010F: "Canon", 0x011A: 72.0, 0x0128: 2, 0x0132: "2012:01:01 00:00:00"})
    exif.get_ifd(0x8769).update({0x829A: 0.5, 0x9000: b"0230", 0x927C: bytes(40), 0xA002: 30})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    upright = {SPECKLED.tobytes(), *(SPECKLED.transpose(way).tobytes() for way in Image.Transpose)}
    for _ in range(100):
        content = bytearray(exif.tobytes())
        for at in rng.integers(6, len(content), size=rng.integers(1, 4)):
            content[at] = rng.integers(256)
        SPECKLED.save(tmp_path / "image", "PNG", exif=bytes(content), compress_level=0)
        assert data.read_image(tmp_path / "image", (48, 48)).tobytes() in upright, content


def test_a_closed_pipe_a_missing_letter_or_no_stdout_ends_no_command():
    """`... | head -1`, where stdout can only ASCII; and `... >&- 2>&-`."""
    reader, writer = os.pipe()

    def command():
        print("\u56fe.jpg", flush=True)
        assert os.read(reader, 100) == b"?.jpg\n"
        os.close(reader)
        for _ in range(20000):
            print("red")
        return 3

    with open(writer, "w", encoding="ascii") as stdout, contextlib.redirect_stdout(stdout):
        assert data.run_command(command, "") == 3
    with contextlib.redirect_stdout(None):
        assert data.run_command(lambda: print("red") or 3, "") == 3


def tree(folder):
    """{name: bytes, of eval.json without its seconds} of all that is below a folder."""
    paths = folder.rglob("*")
    found = {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in paths}
    if "eval.json" in found:
        found["eval.json"] = re.sub(rb'"evaluate the energies": [^}]*', b"", found["eval.json"])
    return found


@pytest.mark.parametrize("cut", ["write_toy_coco", "merge_labels"])
def test_toy_data_are_completed_to_the_same_bytes_and_touch_nothing_else(tmp_path, monkeypatch, cut):
    toy, whole, other, mine, thesis = (tmp_path / name for name in "toy whole other mine toy.part".split())
    (mine / "coco").mkdir(parents=True)
    thesis.write_text("mine")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(data, cut, lambda *given: 1 / 0)
        data.write_toy(toy, 4, 5)
    before = tree(tmp_path)
    for folder, posts in ((toy, 6), (mine, 5), (thesis, 5)):
        said = "cannot be written" if folder == thesis else "exists, but not as toy data of"
        assert f"{folder} {said}" in call(data, "toy", folder, "--images", 4, "--posts", posts, code=2).err
    assert tree(tmp_path) == before
    for folder, seed in ((toy, 0), (whole, 0), (other, 1)):
        data.write_toy(folder, 4, 5, seed)
    assert tree(toy) == tree(whole) and thesis.read_text() == "mine"
    for name in ("mvsa/MVSA_Single/data/1.txt", "coco/train2017/000000000000.jpg"):
        assert tree(toy)[name] != tree(other)[name]


def test_coco_is_read_and_what_cannot_be_used_is_counted(toy, tmp_path):
    items, skipped = data.load_coco(toy / "coco")
    assert [path.name for path, _ in items] == [f"{i:012d}.jpg" for i in range(41)]
    assert all(len(captions) == 5 for _, captions in items) and skipped == {"image not on disk": 1}
    assert data.load_coco(toy / "coco", 7) == (items[:7], skipped)
    notes = json.loads((toy / "coco" / CAPTIONS).read_text())["annotations"]
    assert items[7][1] == [note["caption"] for note in notes if note["image_id"] == 7]
    coco = shutil.copytree(toy / "coco", tmp_path / "coco")
    content = json.loads((coco / CAPTIONS).read_text())
    del content["images"][0]
    content["annotations"] = [note for note in content["annotations"] if note["image_id"] != 1]
    (coco / CAPTIONS).write_text(json.dumps(content))
    found, skipped = data.load_coco(coco)
    assert skipped == {"captioned image not listed": 1, "image not on disk": 1, "image without caption": 1}
    assert [(path.name, texts) for path, texts in found] == [(path.name, texts) for path, texts in items[2:]]


class BadConnection(BaseHTTPRequestHandler):
    """Serves server.files slowly; its first answers about a path are what server.faults(path) lists."""
    log_message = Mock()

    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path, b"")
        nth = [path for path, _ in server.asked].count(self.path)
        fault = "".join(server.faults(self.path)[nth:nth + 1]) if body else "404"
        in_part = server.ranges and "Range" in self.headers
        if fault == "login":  # the page of a network that wants one
            body, in_part = b"Who are you?", False
        start = int(re.search(r"\d+", self.headers["Range"])[0]) if in_part else 0
        server.asked.append((self.path, start))
        if fault.isdigit() or in_part and start >= len(body):
            return self.send_error(int(fault or 416))
        self.send_response(206 if in_part else 200)
        self.send_header("Content-Type", "text/html" if fault == "login" else "image/jpeg")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if fault == "cut":
            body = body[:(start + len(body)) // 2]
        for at in range(start, len(body), 10000):
            time.sleep(0.002)
            self.wfile.write(body[at:at + 10000])


@pytest.fixture
def server(toy, tmp_path_factory, monkeypatch):
    """A server at 127.0.0.1, where data.py then looks for the toy's COCO."""
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 64)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), BadConnection) as server:
        server.asked, server.ranges = [], True
        server.files = {f"/{name}": held for name, held in tree(toy / "coco").items() if held}
        for folder, at in (("annotations", "annotations/annotations_trainval"), ("train2017", "zips/train")):
            path = shutil.make_archive(tmp_path_factory.mktemp("zip") / "coco", "zip", toy / "coco", folder)
            server.files[f"/{at}2017.zip"] = Path(path).read_bytes()
        server.faults = lambda path: ["500", "cut", "login"][:sum(path.encode()) % 4]
        monkeypatch.setattr(data, "PAUSES", (0, 0, 0))
        monkeypatch.setattr(data, "COCO_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield server
        server.shutdown()


def test_download_of_images_completes_over_a_bad_connection_and_is_not_done_again(toy, server, tmp_path):
    call(data, "coco", tmp_path, "--images", 30)
    assert len(server.asked) > len(set(server.asked)) > 30
    items, expected = data.load_coco(tmp_path)[0], data.load_coco(toy / "coco", 30)[0]
    assert [(path.name, texts) for path, texts in items] == [(path.name, texts) for path, texts in expected]
    server.asked.clear()
    call(data, "coco", tmp_path, "--images", 30)
    assert not server.asked
    said = call(data, "coco", tmp_path, "--images", 42, code=2).err  # the last one is listed, but nowhere
    assert "1 of 42" in said and "000000000041.jpg (HTTP Error 404" in said
    assert tree(toy / "coco").items() <= tree(tmp_path).items() and not list(tmp_path.rglob("*.tmp"))
    names = [f"train2017/{i // 2:012d}{'x' * (i % 2)}.jpg" for i in range(60)]  # each second one is not there
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="30 of 60 cannot be fetched"):
        data.fill(tmp_path / "half", names)
    assert len(list((tmp_path / "half" / "train2017").glob("*.jpg"))) == 30


def test_download_of_the_zip_is_unpacked_once_and_names_what_it_lacks(toy, server, tmp_path):
    server.faults = lambda path: ["cut", "500", "cut"]
    said = call(data, "coco", tmp_path, "--images", 0, code=2).err
    assert "1 of 42" in said and "000000000041.jpg" in said
    assert all(path.endswith("2017.zip") for path, _ in server.asked)
    assert tree(toy / "coco").items() <= tree(tmp_path).items()
    (tmp_path / "train2017.zip").write_bytes(b"cut off")
    broken = f"{tmp_path}/train2017.zip is broken"
    assert broken in call(data, "coco", tmp_path, "--images", 0, code=2).err
    (tmp_path / "train2017/000000000041.jpg").touch()
    server.asked.clear()
    call(data, "coco", tmp_path, "--images", 0)
    assert not server.asked


@pytest.mark.parametrize("ranges", [True, False])
def test_download_of_weights_goes_on_where_it_broke_off(server, tmp_path, monkeypatch, ranges):
    content, path = os.urandom(1_000_000), tmp_path / "f_I.tar"
    server.files, server.ranges, options = {"/f_I.tar": content}, ranges, ["weights", tmp_path, "--preset"]
    server.faults = lambda path: ["500", "cut", "500", "500", "500"]
    config = SimpleNamespace(url=f"{data.COCO_URL}/f_I.tar", hf_hub_id=None)
    monkeypatch.setattr(data.timm, "get_pretrained_cfg", lambda name: config)
    said = call(data, *options, "small", code=2).err
    assert "HTTP Error 500" in said and f"{path}.part" in said
    for _ in range(2):
        call(data, *options, "medium")
        assert path.read_bytes() == content
    assert [start for _, start in server.asked] == [0, 0, *4 * [499_999 * ranges]]
    os.rename(path, f"{path}.part")  # killed just before the last step
    call(data, *options, "small")
    assert path.read_bytes() == content
    path.unlink()
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # 1 MB; the file takes a quarter more
    assert "0.00125 GB of memory; here: 0.001" in call(data, *options, "small", code=2).err
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=999_999))
    assert "0.001 GB of disk" in call(data, *options, "large", code=2).err and not path.exists()
    config.hf_hub_id = "timm/vit"
    assert "vit_tiny_patch16_224 cannot be loaded from the hub" in call(data, *options, "tiny", code=2).err
    monkeypatch.setattr(data, "ImageEncoder", lambda name: None)
    assert "timm/vit is in huggingface's own cache" in call(data, *options, "tiny").out


def test_epoch_order_has_every_image_once_with_one_of_its_captions():
    cache, train = SimpleNamespace(first=np.arange(0, 210, 5)), np.arange(1, 41)
    first, second, seed = (data.epoch_order(cache, train, *key) for key in ((0, 0), (0, 1), (1, 0)))
    assert np.array_equal(first, data.epoch_order(cache, train, 0, 0))
    for images, texts in (first, second, seed):
        assert sorted(images) == list(train) and np.array_equal(texts // 5, images)
    for other in (second, seed):
        assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])
    drawn = {draw for epoch in range(60) for draw in zip(*data.epoch_order(cache, train, 0, epoch))}
    assert len(drawn) == 40 * 5


def test_hold_out_trains_on_no_held_out_image_and_a_lost_image_moves_no_other():
    rng = fresh_rng()
    items = [(Path(f"{i:012d}.jpg"), ["red"]) for i in rng.choice(10 ** 6, 100, replace=False)]

    def hold_out(items, broken=()):
        cache = SimpleNamespace(items=items, readable=np.delete(np.arange(len(items)), list(broken)))
        parts = data.hold_out(cache, 40)
        assert sorted(np.concatenate(parts)) == list(cache.readable) and len(parts[1]) == 40
        return [{items[i][0].name for i in part} for part in parts]

    train, held = hold_out(items)
    for lost in range(100):
        name = items[lost][0].name
        rest = [items[i] for i in rng.permutation(100) if i != lost]
        for train_now, held_now in (hold_out(rest), hold_out(items, broken=[lost])):
            assert held - {name} <= held_now and train_now == train - held_now - {name}
    for images, count in ((300, 30), (5, 2), (2000, 100)):  # by default
        cache = SimpleNamespace(items=[(Path(str(i)), []) for i in range(images)], readable=np.arange(images))
        assert len(data.hold_out(cache, 0)[1]) == count


# ---- data.py: the feature cache ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def encoded(toy, tmp_path_factory):
    """A model, 71 items, their cache, and the folder of one that was cut off after 64 of them."""
    torch.manual_seed(0)
    words = sorted({word for _, words in data.COLOURS for word in words})
    net, (items, _) = model.TIJEPA(replace(CONFIG, vocabulary=words)), data.load_coco(toy / "coco")
    items = [items[0], items[-1], *items[1:-1]]  # the second is broken; the texts get different lengths
    items = [(path, [" ".join(text.split()[k:]) for k, text in enumerate(texts)]) for path, texts in items]
    items += items[2:32]
    root, frozen = tmp_path_factory.mktemp("encoded"), net.frozen_image
    cache = data.FeatureCache(root, items, net, 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(net, "frozen_image", lambda images: frozen(images) if len(images) > 7 else 1 / 0)
        data.FeatureCache(root / "cut", items, net, 2)
    return SimpleNamespace(net=net, items=items, cache=cache, cut=root / "cut" / cache.folder.name)


def test_cached_features_are_those_encoded_on_the_fly(encoded):
    cache, items, images = encoded.cache, encoded.items, np.arange(40, 1, -2)
    owners, numbers = (images + 3) % 41, images % 5
    s_image, s_text, mask = next(cache.batches([(images, cache.first[owners] + numbers)]))
    transform = data.image_transform(encoded.net.image_encoder.data_config)
    pictures = torch.stack([transform(data.read_image(items[i][0], (48, 48))) for i in images])
    texts = [items[owner][1][number] for owner, number in zip(owners, numbers)]
    expected, text, text_mask = encoded.net.frozen(pictures, texts)
    assert s_image.dtype == s_text.dtype == torch.float32 and torch.equal(mask, text_mask)
    assert torch.allclose(s_image, expected, atol=3e-3)
    assert torch.allclose(s_text[mask], text[mask], atol=3e-3)
    assert not mask.all() and (s_text[~mask] == 0).all()


def test_texts_that_are_cut_and_broken_images_are_counted(encoded, tmp_path, capsys):
    path, broken = encoded.items[0][0], encoded.items[1][0]
    data.FeatureCache(tmp_path, [(path, ["red", "red " * 63]), (broken, ["red " * 500])], encoded.net, 1)
    said = capsys.readouterr().out
    assert "2 images (1 unreadable), 3 texts; 2 have 64 tokens or more: f_T reads 64" in said
    data.FeatureCache(tmp_path, [(path, ["red " * 61])], encoded.net, 1)  # [CLS] and [SEP] count as well
    assert "tokens or more" not in capsys.readouterr().out


def test_a_copy_needs_no_new_cache_and_another_recipe_gets_one(encoded, tmp_path):
    net, config, root = encoded.net, encoded.net.config, tmp_path / "cache"
    items = [(shutil.copyfile(path, tmp_path / f"{9 - number}.jpeg"), texts)
             for number, (path, texts) in enumerate(encoded.items[2:6])]
    (one, texts), (two, others), *rest = items
    again, *nets = (model.TIJEPA(config) for _ in range(5))
    nets[0].image_encoder.vit.blocks[0].mlp.fc1.bias[0] += 1e-3
    nets[1].text_encoder.bert.encoder.layer[0].output.dense.bias += 1e-3
    nets[2].image_encoder.data_config["mean"] = (0.1, 0.2, 0.3)
    nets[3].dtype = torch.bfloat16
    nets.append(model.TIJEPA(replace(config, vocabulary=config.vocabulary[::-1])))
    recipes = [(encoded.items[2:6], net), (items, net), (items, again),  # the same; and what differs:
               *((items, other) for other in nets), (items[:3], net), (items[::-1], net),
               ([(one, ["red " + texts[0], *texts[1:]]), *items[1:]], net),
               ([(one, texts[:4]), (two, texts[4:] + others), *rest], net)]  # a caption is another picture's
    folders = [data.FeatureCache(root, *recipe, 1).folder for recipe in recipes]
    Image.open(one).rotate(90).save(one, "JPEG")  # another picture of the same name
    folders.append(data.FeatureCache(root, items, net, 1).folder)
    assert len(set(folders[:3])) == 1
    assert len(set(folders)) == len(list(root.iterdir())) == len(folders) - 2 == 11


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 2),
    "cut by a chunk": lambda path: os.truncate(path, path.stat().st_size * 40 // 71),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(2)),
    "last chunk torn": lambda path: path.write_bytes(path.read_bytes()[:-99] + bytes(99)),
}


@pytest.mark.parametrize("name", ["image.f16", "text.f16"])
@pytest.mark.parametrize("state, damage, chunks", [
    ("cache", "emptied", [31, 32, 7]), ("cache", "gone", [31, 32, 7]), ("cache", "cut short", [32, 7]),
    ("cache", "cut by a chunk", [31, 32, 7]), ("cache", "longer", [31, 32, 7]),
    ("cut", "emptied", [31, 32, 7]), ("cut", "cut short", [31, 32, 7]), ("cut", "longer", [32, 7]),
    ("cut", "last chunk torn", [32, 7])])
def test_a_cache_is_not_believed_because_it_is_there_and_is_completed(
        encoded, tmp_path, monkeypatch, name, state, damage, chunks):
    before = encoded.cut if state == "cut" else encoded.cache.folder
    net, folder, calls, frozen = encoded.net, tmp_path / before.name, [], encoded.net.frozen_image
    shutil.copytree(before, folder)
    DAMAGE[damage](folder / name)
    assert tree(folder) != tree(before)
    monkeypatch.setattr(net, "frozen_image", lambda images: calls.append(len(images)) or frozen(images))
    cache = data.FeatureCache(tmp_path, encoded.items, net, 1)
    assert list(cache.readable) == list(encoded.cache.readable) and calls == chunks
    assert tree(folder) == tree(encoded.cache.folder)  # the same bytes


def test_a_lock_holds_until_its_process_ends_and_two_encode_once(encoded, tmp_path, capfd):
    folder, held = tmp_path / encoded.cut.name, multiprocessing.get_context("fork").Event()

    def hold():
        with data.locked(folder):
            held.set()
            time.sleep(600)

    holder = forked(hold)
    assert held.wait(60)
    waiting = [forked(data.FeatureCache, tmp_path, encoded.items, encoded.net, 1) for _ in range(2)]
    time.sleep(0.5)
    assert all(process.is_alive() for process in waiting) and list(tree(folder)) == [".lock"]
    holder.kill()  # kill -9: nothing of its own can let go of the lock
    assert all(map(ends_well, waiting)) and tree(folder) == tree(encoded.cache.folder)
    assert capfd.readouterr().err.count("cannot be read") == 1


def test_a_full_disk_is_said_and_nothing_half_made_is_believed(encoded, tmp_path, monkeypatch, capsys):
    needed = sum(path.stat().st_size for path in encoded.cache.folder.iterdir())
    folder, disk = tmp_path / encoded.cut.name, SimpleNamespace(free=needed - 1)
    full = OSError(errno.ENOSPC, "no room")  # another process fills it meanwhile

    def build():
        data.FeatureCache(tmp_path, encoded.items, encoded.net, 1)

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(UserError, match=rf"takes .* GB in {tmp_path}.*--cache DIR"):
        build()
    assert not any(tree(folder).values())
    disk.free = needed
    monkeypatch.setattr(os, "fsync", Mock(side_effect=[full, None, None, None, full, *9 * [None]]))
    for _ in range(2):  # within the first chunk, and within the second
        assert data.run_command(build, "") == 2
        assert "cannot be written or read: no room" in capsys.readouterr().err
        assert not (folder / "finished").exists()
    build()
    assert tree(folder) == tree(encoded.cache.folder)


def test_features_that_float16_cannot_hold_are_refused(encoded, tmp_path, monkeypatch):
    frozen = encoded.net.frozen_image
    monkeypatch.setattr(encoded.net, "frozen_image", lambda images: frozen(images) * 1e6)
    with pytest.raises(UserError, match="do not fit float16"):
        data.FeatureCache(tmp_path, encoded.items, encoded.net, 1)


# ---- data.py: MVSA, its splits, and 20,000 damaged files ---------------------------------------------------

P, U, N = data.LABELS


def write_labels(folder, rows, columns):
    (folder / "data").mkdir(parents=True)
    text = "\r\n".join(["ID\t" + "\t".join(["text,image"] * columns), *rows, ""])
    (folder / "labelResultAll.txt").write_bytes(text.encode())
    return folder


def test_posts_of_any_encoding_are_read_and_dropped_for_each_reason(tmp_path):
    cafe, hello = "caf\u00e9", "\u4f60\u597d"
    contents = [(b"plain\r\n", "plain"), (b"\xef\xbb\xbfbom", "bom"), (b"", ""), (b"caf\xe9", cafe),
                (f"{cafe} {hello}".encode(), f"{cafe} {hello}"), (b"\xff\xff\xff", "\xff" * 3),
                (hello.encode("gb18030"), hello), (f"{hello} \u0416".encode("utf-16"), f"{hello} \u0416")]
    votes = [(P, P), (U, N), (U, U), *5 * [(N, U)], (P, N), (N, U), (U, U)]
    folder = write_labels(tmp_path, [f"{post}\t{','.join(pair)}" for post, pair in enumerate(votes)], 1)
    for post in range(len(votes)):
        (folder / f"data/{post}.txt").write_bytes(contents[post % 8][0])
        (folder / f"data/{post}.jpg").touch()
    for name in ("data/9.jpg", "data/10.txt"):
        (folder / name).unlink()
        (folder / name).mkdir()  # is there, but no file
    posts, skipped = data.load_mvsa(folder)
    assert [post.text for post in posts] == [text for _, text in contents]
    assert [post.label for post in posts] == [0, 2, 1, *5 * [2]]
    found = [(post.set, post.id, post.image) for post in posts]
    assert found == [("single", str(i), folder / f"data/{i}.jpg") for i in range(8)]
    assert skipped == {"text and image of opposite polarity": 1, "text or image file missing": 2}


@pytest.mark.parametrize("single, multi", [("MVSA_Single", "MVSA_Multiple"), ("b", "y/a")])
def test_both_sets_are_found_by_their_headers(toy, tmp_path, single, multi):
    write_labels(tmp_path / single, [], 1)
    write_labels(tmp_path / multi, [], 3)
    assert data.find_mvsa(tmp_path) == {"single": tmp_path / single, "multi": tmp_path / multi}
    assert data.find_mvsa(tmp_path / single) == {"single": tmp_path / single}
    write_labels(tmp_path / "copy", [], 1)
    with pytest.raises(UserError, match="two folders hold MVSA-single"):
        data.find_mvsa(tmp_path)
    posts = [post for folder in data.find_mvsa(toy / "mvsa").values() for post in data.load_mvsa(folder)[0]]
    assert len({p.id for p in posts}) < len(posts) == len({(p.set, p.id) for p in posts}) == 61 + 121


def test_read_labels_takes_what_two_of_three_say_of_the_text_and_of_the_image(tmp_path):
    words, none = dict(zip("PUN", data.LABELS)), "no majority"
    opposite = "text and image of opposite polarity"
    cases = {"PP PP NU": 0, "PU UU PN": 0, "UU UU PN": 1, "NN NU UN": 2,
             "PU UU NU": none, "PP PN PU": none, "PN PN UU": opposite}
    rows = ["\t".join([case, *(f"{words[text]},{words[image]}" for text, image in case.split())])
            for case in cases]
    kind, kept, skipped = data.read_labels(write_labels(tmp_path, rows, 3) / "labelResultAll.txt")
    assert kind == "multi" and {**kept, **skipped} == cases


def test_merge_labels_lets_neutral_give_way_and_drops_opposites():
    assert data.LABELS == ("positive", "neutral", "negative")  # 0, 1, 2 of CLMLF's files
    found = [[data.merge_labels(text, image) for image in (P, U, N)] for text in (P, U, N)]
    assert found == [[P, P, None], [P, U, N], [None, N, N]]


LABELLED = np.random.default_rng(0).choice(3, 505, p=[0.6, 0.1, 0.3])


def split_by_seed(split, *given, most=1.0):
    """The parts of seed 0, whose shares of classes are off by so much: each post is in one of them."""
    parts, again, other = (split(LABELLED, seed, *given) for seed in (0, 0, 1))
    assert sorted(np.concatenate([np.unique(part) for part in parts])) == list(range(505))
    assert all(map(np.array_equal, parts, again)) and not any(map(np.array_equal, parts, other))
    shares = [np.bincount(LABELLED[part]) / len(part) for part in parts]
    assert np.allclose(shares, np.bincount(LABELLED) / 505, atol=most)
    return parts


def test_stratified_split_is_8_1_1_with_the_classes_of_the_whole():
    parts = split_by_seed(data.stratified_split, most=0.02)
    assert [len(part) for part in parts] == [404, 50, 51]
    with pytest.raises(UserError, match="cannot split"):
        data.stratified_split(np.array([0, 0, 0, 1]), seed=0)


def test_grouped_split_keeps_groups_whole():
    groups = np.arange(505)
    groups[250:300] = np.repeat(np.arange(10), 5)  # and posts 0-9 with them
    parts = split_by_seed(data.stratified_split, groups, most=0.05)
    assert [round(len(part) / 50) for part in parts] == [8, 1, 1]
    assert sum(len(set(groups[part])) for part in parts) == len(set(groups))


def test_random_split_repeats_training_posts_until_the_classes_are_equal():
    train, *rest = split_by_seed(data.random_split)
    counts = np.bincount(LABELLED[np.unique(train)])
    assert counts.sum() == 405 and [len(part) for part in rest] == [50, 50]
    assert list(np.bincount(LABELLED[train])) == 3 * [counts.max()]
    assert np.bincount(train).max() < 30  # the rarest class comes six times, not one post of it 200 times


def write_split(folder, *parts):
    """CLMLF's files of lists of (id, label)."""
    folder.mkdir(parents=True)
    for name, part in zip(("train", "dev", "test"), parts):
        content = [{"id": i, "text": "", "emotion_label": label} for i, label in part]
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_clmlf_split_reads_the_parts_and_counts_what_does_not_match(tmp_path):
    posts = [data.Post("single", str(i), Path(), "", i % 3) for i in range(30)]
    entries = [(str(i), i % 3) for i in range(28)] + [("999", 0)]
    home, multi = (tmp_path / f"MVSA-{name}" / "10-flod-1" for name in ("single", "multiple"))
    write_split(home, entries[:20], entries[20:24], entries[24:])
    write_split(multi, [], [], [])
    for folder in (tmp_path, home.parent, home):
        parts, notes = data.clmlf_split(folder, posts)
        assert [part.tolist() for part in parts] == [list(range(20)), [20, 21, 22, 23], [24, 25, 26, 27]]
        assert +notes == {"listed, but not among the posts": 1, "not listed, so not used": 2}
    shutil.copytree(home, tmp_path / "multimodal-sentiment" / "split")  # the name above it is no hint
    assert [len(part) for part in data.clmlf_split(tmp_path / "multimodal-sentiment", posts)[0]] == [20, 4, 4]
    relabelled = [replace(post, label=(post.label + 1) % 3) for post in posts]
    write_split(tmp_path / "single again", entries[:20], entries[20:24], entries[18:22])  # posts in two parts
    for folder, strange in ((home, relabelled), (tmp_path / "single again", posts), (multi.parent, posts)):
        with pytest.raises(UserError, match="not a split of MVSA-single"):
            data.clmlf_split(folder, strange)


def test_duplicate_groups_join_posts_of_the_same_words_or_image(tmp_path):
    texts = ["Good day! http://t.co/x", "RT @someone: good DAY", "good night", "something", "http://t.co/a",
             "@you http://t.co/b", "a chain", "else", "one", "one", "two"]
    posts = []
    for i, (text, image) in enumerate(zip(texts, [0, 1, 2, 3, 4, 5, 6, 2, 8, 9, 9])):
        (tmp_path / f"{i}.jpg").write_bytes(b"image %d" % image)
        posts.append(data.Post("single", str(i), tmp_path / f"{i}.jpg", text, i % 3))
    groups = data.duplicate_groups(posts)
    assert groups[0] == groups[1] and groups[2] == groups[7]  # the same words; the same bytes
    assert groups[8] == groups[9] == groups[10]  # a chain of both
    assert len(set(groups)) == 7 and groups[4] != groups[5]  # no words at all are not the same words


CAPTION_FILE = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(3)],
                "annotations": [{"id": i, "image_id": i, "caption": "red bars"} for i in range(3)]}
PIECES = (b"", b"7", b"null", b"1e3", b"\\ud800", b"\xef\xbb\xbf", b"\x0b", b"\xc2\x85", b"\xff")
WORD = r"\s*(positive|neutral|negative)\s*"
LINE = {n: re.compile(rf"\s*(\S(?:[^\t]*\S)?)\s*" + rf"\t{WORD},{WORD}" * n, re.IGNORECASE) for n in (1, 3)}


def make_labels(rng):
    """A good file, with any line ends and byte order mark."""
    columns, newline = rng.choice([1, 3]), rng.choice(["\n", "\r\n", "\r"])
    lines = ["\t".join(["ID"] + ["text,image"] * columns), ""]
    for i in range(4):
        votes = [f"{data.LABELS[a]} ,{data.LABELS[b].title()}" for a, b in rng.integers(3, size=(columns, 2))]
        lines.append("\t".join([str(i), *votes]))
    return newline.join([*lines, ""]).encode(rng.choice(["utf-8", "utf-8-sig"]))


def check_labels(content):
    """By another way, a regular expression for each line; fails if the file should have been refused."""
    file = SimpleNamespace(is_file=lambda: True, read_bytes=lambda: content)  # without a disk
    kind, kept, skipped = data.read_labels(file)
    header, *lines = [line for line in re.split("\r\n|\r|\n", content.decode("utf-8-sig")) if line.strip()]
    columns, expected = {"single": 1, "multi": 3}[kind], {}
    for line in lines:
        post, *words = LINE[columns].fullmatch(line).groups()
        votes = [word.lower() for word in words]
        most = [Counter(side).most_common(1)[0] for side in (votes[::2], votes[1::2])]  # (word, how often)
        polar = {word for word, _ in most} - {U}
        agreed = all(count * 2 > columns for _, count in most) and len(polar) < 2
        expected[post.strip()] = data.LABELS.index(*polar or [U]) if agreed else None
    assert header.count("\t") == columns and len(expected) == len(lines)
    assert {**kept, **dict.fromkeys(skipped)} == expected and len(kept) + len(skipped) == len(expected)


def check_captions(content):
    files, captions = data.parse_captions(content, "captions.json")
    parsed = json.loads(content)
    images = sorted((image["id"], image["file_name"]) for image in parsed["images"])
    pairs = sorted((note["image_id"], note["caption"].strip()) for note in parsed["annotations"])
    assert sorted(files.items()) == images and len(set(files.values())) == len(images)
    assert sorted((i, text) for i, texts in captions.items() for text in texts) == pairs
    for _, text in images + pairs:
        text.encode()  # what cannot be encoded would fail much later, in the tokenizer


@pytest.mark.parametrize("make, check", [
    (make_labels, check_labels), (lambda rng: json.dumps(CAPTION_FILE).encode(), check_captions)])
def test_fuzzed_files_give_a_clean_error_or_what_they_say(make, check):
    rng, counts = fresh_rng(), {"read": 0, "refused": 0}
    for case in range(10000):
        tokens = re.findall(rb"[a-z]+|\d+|[^a-z\d]", make(rng))
        words = [i for i, token in enumerate(tokens) if token.isalnum()]
        if case % 2:  # a word or number for another
            at, other = rng.choice(words, 2)
            tokens[at] = tokens[other]
        elif case % 10:  # each tenth is left as it is
            for _ in range(rng.integers(1, 4)):
                at, other = rng.integers(len(tokens), size=2)
                piece = (*PIECES, tokens[other])[rng.integers(len(PIECES) + 1)]
                tokens[at:at + rng.integers(3)] = [piece]
        content = rng.bytes(rng.integers(60)) if case % 10 == 1 else b"".join(tokens)
        if case % 1000 == 999:  # deeper than Python's stack
            content = b'{"images":' * 30000 + b"[" * 30000
        try:
            check(content)
            counts["read"] += 1
        except UserError:
            counts["refused"] += 1
            assert case % 10, content
    assert min(counts.values()) > 1500, counts


# ---- pretrain.py: what the loop is made of -----------------------------------------------------------------


@pytest.mark.parametrize("name, given, expected", [
    ("linear", [0.996, 1.0], {0: 0.996, 50: 0.998, 100: 1.0}),
    ("cosine", [0.04, 0.4], {0: 0.04, 25: 0.0927208, 50: 0.22, 100: 0.4}),
    ("warmup_cosine", [10, 2e-4, 1e-3, 1e-6], {0: 2e-4, 5: 6e-4, 10: 1e-3, 55: 5.005e-4, 100: 1e-6})])
def test_schedule_passes_through_its_points(name, given, expected):
    found = {step: getattr(pretrain, name)(step, 101, *given) for step in expected}
    assert found == pytest.approx(expected)
    one = getattr(pretrain, name)(0, 1, *[0 if value == 10 else value for value in given])
    assert one == pytest.approx(1e-3 if name == "warmup_cosine" else given[0])  # a run of one step


def test_biases_and_norms_are_not_decayed(net):
    decayed, plain = (group["params"] for group in pretrain.build_optimizer(net).param_groups)
    names = {id(p): name for name, p in net.named_parameters()}
    assert all(re.search(r"bias$|norm|_proj\.1", names[id(p)]) for p in plain)
    assert all(names[id(p)].endswith(("weight", "mask_token")) for p in decayed)
    assert len(decayed) + len(plain) == sum(p.requires_grad for p in net.parameters())


RANKED = torch.arange(8.0).expand(8, 8)  # an image's own caption is the first, second, ... eighth
RANKED_FIGURES = {"images": 8, "auc": 0.5, "auc_pooled": 0.5, "recall@1": 1 / 8, "recall@5": 5 / 8}


def test_retrieval_metrics_by_hand():
    energies = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 0.5], [0.0, 0.0, 5.0]])
    by_hand = {"images": 3, "auc": (2 + 1 + 0) / 6, "recall@1": 1 / 3, "recall@5": 1.0,
               "auc_pooled": (3 + 3 + 0) / 18}  # 1, 1, 5 against 2, 3, 2, .5, 0, 0
    assert pretrain.retrieval_metrics(energies) == pytest.approx(by_hand)
    assert pretrain.retrieval_metrics(RANKED) == pytest.approx(RANKED_FIGURES)
    flat = pretrain.retrieval_metrics(torch.ones(10, 10))  # an energy that says nothing must not score
    assert [flat[name] for name in ("auc", "auc_pooled", "recall@1", "recall@5")] == [0.5, 0.5, 0, 0]


def test_held_out_metrics_by_hand(net, images):
    features = net.frozen(images, TEXTS)
    figures = pretrain.held_out_metrics(net, features)
    assert pretrain.held_out_metrics(net.train(), features) == figures and net.training  # the same each time
    matrix = pretrain.energy_matrix(net, features, draws=1)
    matched, mismatched = matrix.diagonal(), matrix[range(3), [2, 0, 1]]
    *_, target, prediction, _ = net.measure(*features)
    means = target.mean((1, 2)).double().numpy()
    share = np.linalg.svd(means - means.mean(0), compute_uv=False)[:2]  # two of three points
    share = share / share.sum()
    others = torch.stack([target[[j for j in range(3) if j != i]].mean(0) for i in range(3)])
    by_hand = {"energy_matched": matched, "energy_mismatched": mismatched,
               "pair_accuracy": (matched < mismatched).float(), "energy_position": (others - target).square(),
               "target_std": target.var(0).sqrt(), "prediction_std": prediction.var(0).sqrt(),
               "target_rank": torch.tensor(np.exp(-(share * np.log(share)).sum()))}
    for name, values in by_hand.items():
        assert figures[name] == pytest.approx(values.mean().item(), rel=1e-5), name
    assert set(figures) == set(by_hand)


def test_energy_maps_average_the_masks_that_hid_each_patch_and_are_shown(net, images, tmp_path, monkeypatch):
    features = net.frozen(images[[0, 0, 1, 1]], [*TEXTS[:2], *TEXTS[1:]])
    total, count, draw = torch.zeros(4, 36), torch.zeros(36), 0
    while count.min() < 8:
        masks = sample_masks(net.grid, 1, draw)
        energies = net(*features, masks).patch_energy.detach()
        for patch, energy in zip(masks.target.flatten(), energies.flatten(1).T, strict=True):
            total[:, patch] += energy
            count[patch] += 1
        draw += 1
    assert torch.allclose(pretrain.energy_maps(net, *features), total / count, atol=1e-6)
    shown, (a, b, c, d) = Mock(), (total / count).view(4, 6, 6)
    monkeypatch.setattr(pretrain, "show", shown)
    pretrain.plot_maps(net, [0, 1], features, ["a", "b", "c", "d"], tmp_path / "maps.png")
    _, pixels, titles, _ = zip(*(call.args for call in shown.call_args_list))
    assert titles == ("picture", "a", "b", "second minus first", "picture", "c", "d", "second minus first")
    for found, expected in zip(pixels, (0, a, b, b - a, 1, c, d, d - c), strict=True):
        assert np.allclose(found, expected, atol=1e-6)


def bench(*options):
    """--bench of the toy, 9 batches of 8 images an epoch without the held-out -> its figures by name."""
    sizes = ["--batch_size", 8, "--epochs", 3, "--max_images", 80, "--held_out", 8, "--posts", 70]
    done = call(pretrain, "--bench", "--accumulate", 2, *sizes, "--device", "cpu", *options)
    return {line[:44].strip(): float(line[44:]) for line in done.out.splitlines()}


def test_bench_adds_up_a_step_of_its_parts_by_hand(monkeypatch):
    """Masks, forward and backward once a micro-batch, optimiser and EMA once a step."""
    took = {"masks": 0.001, "forward": 0.002, "backward": 0.003, "optimiser": 0.004, "EMA": 0.005,
            **dict.fromkeys(("encode", "pool", "tune", "probe"), 0.032)}
    timed = Mock(return_value=(took, 2.0, 6.0))  # GFLOP of one image in f_I, and in the trained half
    monkeypatch.setattr(pretrain, "time_parts", timed)
    monkeypatch.setattr(pretrain, "PEAK_TFLOPS", {"": 10})  # of a device without a name
    for accumulate, B, step in ((1, 8, 0.015), (4, 2, 4 * 0.006 + 0.009)):
        figures = bench("--accumulate", accumulate)
        assert timed.call_args.args[2] == B
        by_hand = {**{f"{part}, ms for {B} images": 1000 * took[part] for part in pretrain.STEP},
                   f"step of 8 images, --accumulate {accumulate}, ms": 1000 * step,
                   "training, images/s": 8 / step, "encode by f_I, images/s": 1000,
                   "MFU on , %": 100 * (8 * 6e9 / step) / 10e12, "what the cache saves, by FLOPs": 8 / 6,
                   "minutes to pretrain, 27 steps": 27 * step / 60,
                   # f_T's 0.2 million weights, 24 tokens a caption, 5 captions, at f_I's 2 GFLOP in 1 ms
                   "minutes to encode 80 pairs": 80 * (0.001 + 5 * 0.001 * 2 * 0.2e6 * 24 / 2e9) / 60}
        assert {name: figures[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-3)


def test_bench_prints_its_figures_and_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain.time_parts, "__defaults__", (4, 60))  # rounds, seconds
    figures = bench()
    assert not list(tmp_path.iterdir()) and len(figures) == 22 and min(figures.values()) > 0
    step = "step of 8 images, --accumulate 2, ms"
    ms, rates = figures[step], figures["encode by f_I, images/s"]
    assert figures["minutes to pretrain, 27 steps"] == pytest.approx(27 * ms / 60000, rel=1e-2)  # 8 held out
    assert 70 / rates / 60 < figures["minutes to encode 70 posts"] < figures["minutes to encode 80 pairs"]
    features = 2e-9 * (150 * 36 * 96 + (5 * 80 + 70) * pretrain.TOKENS * 96)
    assert figures["disk for the features, GB"] == pytest.approx(features, rel=1e-2)
    assert figures["training, images/s"] * ms / 1000 == pytest.approx(8, rel=1e-3)
    # f_I by hand: 37 tokens of width 96, 2 blocks of 12 D^2 + 2 N D multiply-adds, 36 patches of 192 values
    by_hand = 2 * (2 * 37 * (12 * 96 ** 2 + 2 * 37 * 96) + 36 * 192 * 96) / 1e9
    frozen, trained = (figures[f"{half}, GFLOP per image"] for half in ("f_I", "trained half"))
    assert frozen == pytest.approx(by_hand, rel=1e-3)
    net = model.TIJEPA(replace(model.PRESETS["toy"], vocabulary=WORDS))
    X, g = (sum(p.numel() for p in part.parameters() if p.ndim == 2)
            for part in (net.context_encoder, net.predictor))
    draws = [sample_masks(net.grid, 8, 0, number) for number in range(10)]
    C, H = (np.mean([index[0].numel() for index in pair]) for pair in zip(*draws))
    # Two operations a weight and token, and twice that backward; attention and what is skipped is about 12 %
    assert trained == pytest.approx((6 * X * C + 2 * X * H + 6 * g * (4 * C + H)) / 1e9, rel=0.25)
    assert figures["what the cache saves, by FLOPs"] == pytest.approx((frozen + trained) / trained, rel=1e-3)


def test_bench_says_which_accumulate_fits_the_memory(monkeypatch):
    monkeypatch.setattr(pretrain.time_parts, "__defaults__", (1, 1))
    forward = model.TIJEPA.forward

    def limited(net, s_image, *rest):
        if len(s_image) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(net, s_image, *rest)

    monkeypatch.setattr(model.TIJEPA, "forward", limited)
    for fits, too_much, says in ((2, "1: 2:", "step of 6 images, --accumulate 3, ms"),
                                 (0, "1: 2: 3: 6:", "not even one image")):
        done = call(pretrain, "--bench", "--batch_size", 6, "--device", "cpu", code=0 if fits else 2)
        refused = [line.split()[1] for line in done.out.splitlines() if "do not fit" in line]
        assert " ".join(refused) == too_much and says in done.out + done.err


def run_log(out):
    """The lines of a log, which must be strict JSON, without the fields that tell the time."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # not NaN, not Infinity
    return [{name: value for name, value in line.items() if name not in SLOW} for line in lines]


def run_state(out):
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    parts = ("step", "running", "model", "optimizer", "scaler")
    return {"log": run_log(out), **{part: checkpoint[part] for part in parts}}


def assert_same_run(out, expected):
    """Weights, optimizer, GradScaler and log, bit for bit."""
    torch.testing.assert_close(run_state(out), run_state(expected), rtol=0, atol=0)


def train(run, out, *options, code=0):
    """pretrain.py with a run's options and these; of options given twice the later one counts."""
    return call(pretrain, *run.options, *options, "--out", out, code=code)


def in_step(patch, number, work, *given):
    """From now on, a run in this process does work(*given) within that step, once."""
    left = [work]

    def linear(step, *inputs, linear=pretrain.linear):
        if step == number - 1 and left:
            left.pop()(*given)
        return linear(step, *inputs)

    patch.setattr(pretrain, "linear", linear)


@pytest.fixture
def forwards(monkeypatch):
    """The masks and the Output of each forward pass with gradients of this test's runs."""
    passes, forward = [], model.TIJEPA.forward

    def record(net, s_image, s_text, text_mask, masks):
        out = forward(net, s_image, s_text, text_mask, masks)
        if torch.is_grad_enabled():
            passes.append((masks, out))
        return out

    monkeypatch.setattr(model.TIJEPA, "forward", record)
    return passes


@pytest.fixture
def narrow(monkeypatch):
    """A narrower toy preset: float16, which many CPUs only emulate, is ten times slower than float32."""
    config = replace(model.PRESETS["toy"], dim=48, predictor_dim=32, depth=1, predictor_depth=1)
    monkeypatch.setitem(model.PRESETS, "toy", config)


@pytest.fixture(scope="session")
def whole_run(pretrained, tmp_path_factory):
    """A run of 40 steps without a break: its options and its folder."""
    run = SimpleNamespace(options=[*pretrained.options, *SHORT, "--accumulate", 1])
    run.out = tmp_path_factory.mktemp("whole")
    train(run, run.out)
    return run


@pytest.fixture(scope="session")
def cut_off(pretrained, tmp_path_factory):
    """The folder of the run `pretrained`, stopped after its third step of four."""
    out = tmp_path_factory.mktemp("cut_off")
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 3, signal.raise_signal, signal.SIGTERM)
        train(pretrained, out, code=143)
    return out


def test_pretrain_end_to_end(pretrained):
    said, log = pretrained.done.out, run_log(pretrained.out)
    assert "pretrain: preset toy, 32 images" in said and "8 held out" in said
    assert "read 40 images, skipped: 1 image not on disk, 1 unreadable image" in said
    assert len(re.findall("cannot be read: .*/000000000040.jpg", pretrained.done.err)) == 1
    assert " ".join(log[0]) == ("step epoch loss lr wd momentum start_share grad_norm skipped_steps "
                                "energy_matched energy_mismatched pair_accuracy energy_position target_std "
                                "prediction_std target_rank")
    assert all(name in pretrain.__doc__ for name in {*log[0], *SLOW})
    assert [(line["step"], line["epoch"]) for line in log] == [(3, 1.5), (4, 2.0)]
    last = [log[-1][name] for name in ("lr", "wd", "momentum", "skipped_steps")]
    assert last == pytest.approx([1e-6, 0.4, 1.0, 0])
    assert 0.3 < log[1]["loss"] < log[0]["loss"] < 3
    checkpoint = torch.load(pretrained.checkpoint, weights_only=True)
    share = np.prod([0.994 + 0.006 * step / 3 for step in range(4)])
    assert checkpoint["start_share"] == pytest.approx(share) == log[-1]["start_share"]
    assert f"warning: {share:.0%} of X~ is still its random start" in pretrained.done.err
    assert set(checkpoint["seconds"]) == {"encode the pairs", "pretrain"}
    assert checkpoint["identity"]["--epochs"] == 2 and checkpoint["config"]["dim"] == 96
    assert checkpoint["skipped"] == {"image not on disk": 1, "unreadable image": 1}
    by_hash = sorted((f"{i:012d}.jpg" for i in range(40)), key=data.digest)
    assert checkpoint["step"] == 4 and sorted(checkpoint["held_out"]) == sorted(by_hash[:8])


@pytest.mark.parametrize("shuffled", [False, True])
def test_each_step_has_the_images_captions_masks_rates_and_momentum_that_are_promised(
        narrow, pretrained, forwards, tmp_path, monkeypatch, shuffled):
    """By the formulas of the paper: 20 steps, four an epoch, each of two micro-batches of four."""
    reads, rates, momenta = [], [], []  # the latter two with how many passes, or steps, were before
    read, step, update = data.FeatureCache.read, torch.optim.AdamW.step, model.TIJEPA.update_target

    def record_step(optimizer, *inputs):
        groups = optimizer.param_groups
        rates.append((len(forwards), *(group[name] for name in ("lr", "weight_decay") for group in groups)))
        return step(optimizer, *inputs)

    monkeypatch.setattr(data.FeatureCache, "read", lambda *given: reads.append(given) or read(*given))
    monkeypatch.setattr(torch.optim.AdamW, "step", record_step)
    monkeypatch.setattr(model.TIJEPA, "update_target",
                        lambda net, m: momenta.append((len(rates), m)) or update(net, m))
    options = "--epochs 5 --batch_size 8 --seed 3" + " --shuffle_captions" * shuffled
    train(pretrained, tmp_path, *options.split())
    (cache, held_out), *draws = reads
    images, held = data.hold_out(cache, 8)
    assert np.array_equal(held_out, (held, cache.first[held])) and len(draws) == len(forwards) == 40
    drawn, orders = np.concatenate([draw for _, draw in draws], 1), []
    for epoch in range(5):
        order, captions = data.epoch_order(cache, images, 3, epoch)
        orders.append((order, np.roll(captions, 1) if shuffled else captions))
    assert np.array_equal(drawn, np.concatenate(orders, 1))
    assert ((drawn[1] // 5 == drawn[0]) == (not shuffled)).all()  # five captions an image
    for n in range(20):
        for whole, *parts in zip(sample_masks((6, 6), 8, 3, n), forwards[2 * n][0], forwards[2 * n + 1][0]):
            assert torch.equal(whole, torch.cat(parts)) and len(parts[0]) == 4
        lr = 2e-4 + n * 4e-4 if n < 2 else 1e-6 + 0.999e-3 * (1 + np.cos(np.pi * (n - 2) / 17)) / 2
        wd = 0.4 - 0.36 * (1 + np.cos(np.pi * n / 19)) / 2
        assert rates[n] == pytest.approx((2 * n + 2, lr, lr, wd, 0))
        assert momenta[n] == pytest.approx((n + 1, 0.994 + 0.006 * n / 19))
    assert len(rates) == len(momenta) == 20
    losses = np.array([out.energy.mean().item() for _, out in forwards]).reshape(20, 2).mean(1)
    for line in run_log(tmp_path):  # one each three steps, and at the end
        n, since = line["step"], (line["step"] - 1) // 3 * 3
        said = [line[name] for name in ("loss", "lr", "wd", "momentum")]
        _, lr, _, wd, _ = rates[n - 1]
        assert said == pytest.approx([losses[since:n].mean(), lr, wd, momenta[n - 1][1]])


def test_the_loss_is_the_one_that_is_named_with_sigreg_by_its_weight(narrow, pretrained, forwards, tmp_path):
    options = "--epochs 1 --accumulate 1 --log_every 1 --seed 3 --loss smooth_l1 --sigreg 0.5"
    train(pretrained, tmp_path, *options.split())
    for step, ((_, out), line) in enumerate(zip(forwards, run_log(tmp_path), strict=True)):
        d = (out.prediction - out.target).abs()
        energy = torch.where(d < 1, 0.5 * d ** 2, d - 0.5).mean()
        expected = energy + 0.5 * model.sigreg_term(out.context, 3, step)
        assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_each_step_by_its_log_and_accumulation_equals_the_large_batch(pretrained, tmp_path, monkeypatch):
    steps, runs, step = [], [], torch.optim.AdamW.step

    def record(optimizer, *inputs):
        norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        steps.append(torch.stack(norms).norm().item())
        return step(optimizer, *inputs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    options = ["--log_every", 1, "--target", "image"]
    for parts, clip in ((1, 0.05), (1, 1e6), (4, 1e6)):
        train(pretrained, tmp_path, *options, "--accumulate", parts, "--clip", clip)
        runs.append(run_state(tmp_path))
        for norm, line in zip(steps[-4:], runs[-1]["log"], strict=True):
            assert line["grad_norm"] > 0.1 and norm == pytest.approx(min(clip, line["grad_norm"]), rel=1e-3)
    _, whole, parts = runs
    for state in (*whole["model"].values(), *parts["model"].values()):
        for name in filter(re.compile("kv.bias").search, state):
            state[name].chunk(2)[0].zero_()  # the keys' moves no softmax: its gradient is rounding
    for name, rtol, atol in (("log", 2e-5, 0), ("model", 1e-3, 3e-5), ("optimizer", 1e-3, 3e-5)):
        torch.testing.assert_close(parts[name], whole[name], rtol=rtol, atol=atol)


def test_pretraining_is_repeatable_and_replaces_what_was_there(pretrained, tmp_path, monkeypatch):
    """Another seed is another run; and without an EMA the target encoder is the context encoder."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)  # as other launchers do
    states = []
    for options in ("--momentum 0 --final_momentum 0", "--seed 1", ""):
        assert "1 process," in train(pretrained, tmp_path, *options.split()).out
        states.append(run_state(tmp_path)["model"])
        target = states[-1]["target_encoder"]
        same = [torch.equal(value, target[name]) for name, value in states[-1]["context_encoder"].items()]
        assert all(same) == ("momentum" in options)
    assert_same_run(tmp_path, pretrained.out)
    _, other, again = (state["predictor"] for state in states)
    assert not any(torch.equal(value, again[name]) for name, value in other.items())


def test_eval_command_measures_held_out_pairs_and_typed_captions(toy, pretrained, tmp_path, monkeypatch):
    assert f"eval {pretrained.checkpoint}" in pretrained.judged.out
    for name, size in (("curves", (1600, 320)), ("energies", (500, 320)), ("masks", (800, 840)),
                       ("maps", (1000, 1080))):
        picture = Image.open(pretrained.out / f"{name}.png")
        assert picture.size == size and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    figures = json.loads((pretrained.out / "eval.json").read_text())
    assert figures.pop("images") == 8 and figures.pop("masks") == 2 and figures["step"] == 4
    assert figures.pop("skipped") == {"image not on disk": 1, "unreadable image": 1}
    assert figures.pop("seconds")["evaluate the energies"] > 0
    assert 0.2 < figures["auc"] < 0.8  # 4 steps teach nothing
    assert all(name.replace("recall@5", "@5") in pretrain.__doc__ for name in figures)
    logged = run_log(pretrained.out)[-1]  # of the same weights
    for name in figures.keys() & logged.keys():
        assert figures[name] == pytest.approx(logged[name], rel=1e-5)
    options = ["--eval", pretrained.checkpoint, "--device", "cpu", "--out", tmp_path / "ranked"]
    image = toy / "mvsa" / "MVSA_Single" / "data" / "1.jpg"
    typed = ["red bars blue tiles lime bands ink lines", "moss bars", "who are they"]
    before = tree(pretrained.out)
    drawn = Mock(wraps=pretrain.plot_maps)
    monkeypatch.setattr(pretrain, "plot_maps", drawn)
    *lines, worth = call(pretrain, *options, "--image", image, "--captions", *typed).out.splitlines()
    energies, _, captions = zip(*(line.partition("  ") for line in lines))
    assert sorted(captions) == sorted([*typed[:2], "who are they  (f_T does not know most of its words)"])
    energies = [float(energy) for energy in energies]
    assert energies == sorted(energies) and len(set(energies)) == 3
    assert f"pair accuracy on the held-out images: {logged['pair_accuracy']:.2f}" in worth
    assert [path.name for path in (tmp_path / "ranked").glob("*.png")] == ["maps_1.png"]
    net, _, features, titles, _ = drawn.call_args.args  # of the lowest and the highest
    assert lines[0].startswith(titles[0]) and lines[2].startswith(titles[1])
    assert net.mean_energy(*features, 2).tolist() == pytest.approx([energies[0], energies[2]], abs=1e-4)
    assert tree(pretrained.out) == before


def test_eval_command_draws_own_and_other_captions_in_the_precision_that_is_asked_for(
        toy, pretrained, tmp_path, monkeypatch):
    names, measured, figure = torch.load(pretrained.checkpoint)["held_out"], Mock(return_value=RANKED), Mock()
    for name, stand_in in (("energy_matrix", measured), ("Figure", Mock(return_value=figure)),
                           ("plot_masks", Mock()), ("plot_maps", Mock())):
        monkeypatch.setattr(pretrain, name, stand_in)
    call(pretrain, "--eval", pretrained.checkpoint, "--out", tmp_path, "--cache", tmp_path, "--device", "cpu",
         "--dtype", "bfloat16", "--eval_masks", 3)
    (net, _, masks), figures = measured.call_args.args, json.loads((tmp_path / "eval.json").read_text())
    assert net.dtype == torch.bfloat16 and masks == 3
    assert {name: figures[name] for name in RANKED_FIGURES} == pytest.approx(RANKED_FIGURES)
    own, other = figure.subplots().hist.call_args.args[0]
    assert own.tolist() == list(range(8)) and sorted(other) == sorted(7 * list(range(8)))
    items = [item for item in data.load_coco(toy / "coco")[0] if item[0].name in names][:4]
    images, captions = [data.read_image(path) for path, _ in items], [texts[0] for _, texts in items]
    _, pictures, (s_image, s_text, text_mask), titles, _ = pretrain.plot_maps.call_args.args
    assert [*pictures] == images and pretrain.plot_masks.call_args.args[:2] == (pictures[:3], (*captions,))
    assert titles[::2] == captions and not any(map(str.__eq__, titles[1::2], captions))
    transform = data.image_transform(net.image_encoder.data_config)
    for n, title in enumerate(titles):
        for found, expected in ((s_image[n], net.frozen_image(transform(images[n // 2])[None])[0]),
                                (s_text[n][text_mask[n]], net.frozen_text([title])[0][0])):
            assert (found - expected).norm() < 0.05 * expected.norm()


def test_half_precision_steps_as_single_does(narrow, pretrained, forwards, tmp_path):
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        train(pretrained, tmp_path, *"--epochs 1 --log_every 1 --dtype".split(), str(dtype)[6:])
        assert {out.prediction.dtype for _, out in forwards[-4:]} == {dtype}
        found.append([line[name] for line in run_log(tmp_path) for name in ("loss", "grad_norm")])
    single, *halves = found
    for half in halves:
        for n, (value, expected) in enumerate(zip(half, single, strict=True)):
            assert value == pytest.approx(expected, rel=(0.02, 0.1)[n % 2]) and value != expected


# ---- What one can rely on: silent accidents first ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "overflow"])
def test_a_break_between_log_lines_changes_nothing(narrow, whole_run, tmp_path, monkeypatch, dtype):
    whole, cut, scaler = tmp_path / "whole", tmp_path / "cut", torch.amp.GradScaler
    options = ["--epochs", 3, "--log_every", 3, "--dtype", dtype.replace("overflow", "float16"), "--resume"]
    with monkeypatch.context() as patch:
        if dtype == "overflow":  # begin with a scale at which float16 gradients overflow
            patch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0 ** 27, **k))
        train(whole_run, whole, *options)
        in_step(patch, 5, signal.raise_signal, signal.SIGTERM)
        train(whole_run, cut, *options, code=143)
    assert "after step 5 of 12" in train(whole_run, cut, *options).out
    assert_same_run(cut, whole)
    found = run_state(cut)
    skipped = [line["skipped_steps"] for line in found["log"]]
    assert bool(found["scaler"]) == (dtype in ("float16", "overflow"))
    if dtype == "overflow":
        assert skipped[:2] == [3, 6] and 6 <= skipped[-1] < 12 and found["log"][0]["grad_norm"] is None
        assert found["scaler"]["scale"] == 2.0 ** (27 - skipped[-1])
        assert {state["step"].item() for state in found["optimizer"]["state"].values()} == {12 - skipped[-1]}
    else:
        assert skipped == [0] * 4 and all(line["grad_norm"] > 0 for line in found["log"])


def turn_captions(run):
    """The first two words of each in the other order."""
    path = run.coco / CAPTIONS
    path.write_text(re.sub(r'("caption": ")(\w+) (\w+)', r"\1\3 \2", path.read_text()))


def other_weights(run):
    """f_I's weights, a little changed."""
    vit = model.toy_vit()
    vit.patch_embed.proj.weight.data.mul_(1.01)
    run.patch.setattr(model, "toy_vit", lambda: vit)


def spoil(out, change):
    """The checkpoint's content, changed."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, out / "checkpoint.pt")


HELD_OUT, OTHER_DATA = ["{path}", "{held_out}"], ["{path}", "data (then "]
NOT_WHOLE, OTHER_WEIGHTS = ["{path} is not a whole checkpoint"], ["{path}", "f_I weights (then "]
ACCIDENTS = {  # what happens: (how, words of --eval, words of --resume); none: it goes on; None: not asked
    "nothing": (lambda run: None, [], []),
    "the log is cut off": (lambda run: os.truncate(run.out / "log.jsonl", 200), None, []),
    "most images trained on are lost": (lambda run: [path.unlink() for path in run.others[1:]], [], None),
    "captions": (turn_captions, HELD_OUT, OTHER_DATA),
    "a picture": (lambda run: shutil.copy(run.held_out[1], run.held_out[0]), HELD_OUT, OTHER_DATA),
    "a lost image": (lambda run: run.held_out[0].unlink(), HELD_OUT, OTHER_DATA),
    "all held out are lost": (lambda run: [path.unlink() for path in run.held_out], HELD_OUT, OTHER_DATA),
    "weights": (other_weights, OTHER_WEIGHTS, OTHER_WEIGHTS),
    "model": (lambda run: spoil(run.out, lambda c: c.update(model={"predictor": {}})), NOT_WHOLE, NOT_WHOLE),
    "running": (lambda run: spoil(run.out, lambda c: c.update(running=torch.zeros(0))), None, NOT_WHOLE),
    "log": (lambda run: spoil(run.out, lambda c: c.update(log=[{}])), None, NOT_WHOLE),
    "moments": (lambda run: spoil(
        run.out, lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1))), None, NOT_WHOLE),
    "torn": (lambda run: os.truncate(run.out / "checkpoint.pt", 3_000_000), NOT_WHOLE, NOT_WHOLE)}


@pytest.mark.parametrize("what, finished", [(what, finished) for what, (*_, refused) in ACCIDENTS.items()
                                            for finished in (True, False) if finished or refused == []])
def test_after_an_accident_a_run_ends_as_without_or_is_refused_and_kept(
        toy, pretrained, cut_off, tmp_path, monkeypatch, what, finished):
    """Also where the data lie elsewhere now."""
    change, eval_says, resume_says = ACCIDENTS[what]
    out = shutil.copytree(pretrained.out if finished else cut_off, tmp_path / "out")
    coco, path = shutil.copytree(toy / "coco", tmp_path / "coco"), out / "checkpoint.pt"
    names = torch.load(path, weights_only=True)["held_out"]
    images = sorted((coco / "train2017").iterdir())
    held_out, others = ([path for path in images if (path.name in names) == held] for held in (True, False))
    change(SimpleNamespace(out=out, coco=coco, held_out=held_out, others=others, patch=monkeypatch))
    before = tree(out)
    places = ["--coco", coco, "--cache", tmp_path / "cache", "--device", "cpu", "--out", out]
    resume = [*pretrained.options, "--workers", 1, "--resume"]
    for command, words in (["--eval", path], eval_says if finished else None), (resume, resume_says):
        if words is None:
            continue
        said = call(pretrain, *command, *places, code=2 if words else 0).err
        assert all(word.format(path=path, held_out=held_out[0].name) in said for word in words)
        assert said.count("(then") == sum("(then" in word for word in words)
        if words or command != resume:
            assert tree(out) == before
    if resume_says == []:
        assert_same_run(out, pretrained.out)


MAY_CHANGE = {"out", "coco", "device", "workers", "cache", "accumulate", "compile", "resume", "bench", "eval",
              "eval_masks", "posts", "image", "captions", "image_weights", "text_encoder"}


def test_resume_names_every_option_that_decides_a_run_and_has_changed(pretrained, tmp_path, monkeypatch):
    """All at once: what is not in MAY_CHANGE, and so any new option, decides."""
    monkeypatch.setitem(model.PRESETS, "tiny", model.PRESETS["toy"])  # neither needs a download
    encoder = model.ImageEncoder("toy")
    monkeypatch.setattr(model, "ImageEncoder", lambda name, weights: encoder)
    then = vars(pretrain.parse_args([str(option) for option in pretrained.options]))
    others = {"preset": "tiny", "image_encoder": "other", "loss": "smooth_l1", "target": "image",
              "dtype": "bfloat16", "max_images": 41}
    changed, expected = ["--accumulate", 1], []
    for name in then.keys() - MAY_CHANGE:
        value, flag = then[name], then[name] is False
        now = flag or others.get(name) or (value + 1 if type(value) is int else value / 2 or 0.5)
        changed += [f"--{name}"] if flag else [f"--{name}", now]
        expected.append(f"--{name} (then {value}, now {now})")
    expected = [words.replace("then auto, now ", "then torch.float32, now torch.") for words in expected]
    out = shutil.copytree(pretrained.out, tmp_path / "out")
    said = train(pretrained, out, *changed, "--cache", tmp_path, "--resume", code=2).err
    assert [words for words in expected if words not in said] == [] and len(expected) > 10
    assert tree(out) == tree(pretrained.out)


@pytest.mark.parametrize("batch", [16, 32])  # of two steps an epoch, or one: then each line is a checkpoint
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_files_before(pretrained, tmp_path, batch):
    wild = "--lr 1e30 --start_lr 1e30 --clip 1e30 --log_every 1 --batch_size".split()
    old = shutil.copytree(pretrained.out, tmp_path / "old")
    for out in (tmp_path / "new", old):
        said = train(pretrained, out, *wild, batch, code=1).err
        assert "--lr" in said and "not finite" in said
    assert not (tmp_path / "new" / "checkpoint.pt").exists() and tree(old) == tree(pretrained.out)


def test_ctrl_c_and_sigterm_save_and_resume_goes_on_exactly(whole_run, tmp_path, monkeypatch):
    """A second Ctrl-C ends the process at once, as the system does."""
    checkpoint, numbers = tmp_path / "checkpoint.pt", (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(one) for one in numbers]

    def interrupt(number):
        assert signal.getsignal(signal.SIGINT) != handlers[1]
        signal.raise_signal(number)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the system's: it kills

    for number, code, step in zip(numbers, (143, 130), (3, 11)):
        in_step(monkeypatch, step, interrupt, number)
        done = train(whole_run, tmp_path, "--resume", code=code)
        assert [signal.getsignal(one) for one in numbers] == handlers
        assert f"stopped after step {step} of 40" in done.out and "Traceback" not in done.err
        assert run_state(tmp_path)["step"] == len(run_log(tmp_path)) == step
    assert "after step 11 of 40" in train(whole_run, tmp_path, "--resume").out
    assert_same_run(tmp_path, whole_run.out)
    before = checkpoint.stat().st_mtime_ns
    assert "after step 40 of 40" in train(whole_run, tmp_path, "--resume").out
    assert checkpoint.stat().st_mtime_ns == before


def test_kill_9_at_8_random_moments_loses_nothing_but_time(whole_run, tmp_path):
    rng, steps, checkpoint = fresh_rng(), [], tmp_path / "checkpoint.pt"
    options = [str(option) for option in (*whole_run.options, "--resume", "--out", tmp_path)]
    for kill in range(8):
        trains = kill % 4 < 3  # else it is killed wherever it is: reading, checking, loading
        lines, end = len(run_log(tmp_path)), time.time() + 120
        process = forked(lambda: sys.exit(pretrain.run(options)))
        while trains and len(run_log(tmp_path)) == lines and process.is_alive():
            assert time.time() < end, "it never came"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)
        if checkpoint.exists():
            steps.append(model.TIJEPA.from_checkpoint(checkpoint)[1]["step"])
            if steps[-1] == 40:  # done, and more kills to come: once more from the start
                train(whole_run, tmp_path, "--resume")  # the log may lack its last line
                assert_same_run(tmp_path, whole_run.out)
                checkpoint.unlink()
    train(whole_run, tmp_path, "--resume")
    assert len(set(steps)) > 2
    assert_same_run(tmp_path, whole_run.out)


def test_a_second_run_into_a_folder_is_refused_and_the_first_goes_on(whole_run, tmp_path, monkeypatch):
    refused = []

    def run_again():
        before = tree(tmp_path)
        refused.append(train(whole_run, tmp_path, "--resume", code=2).err)
        assert f"another run writes to {tmp_path}" in refused[0] and tree(tmp_path) == before

    in_step(monkeypatch, 5, run_again)
    train(whole_run, tmp_path)
    assert_same_run(tmp_path, whole_run.out)
    assert refused


def test_two_processes_have_the_losses_of_one(pretrained, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [*pretrained.options, *SHORT, "--epochs", 4, "--accumulate", 2, "--out"]
    done = execute(*torchrun, pretrain.__file__, *options, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    call(pretrain, *options, tmp_path / "one")
    two, one = ([line["loss"] for line in run_log(tmp_path / name)] for name in ("two", "one"))
    assert two == pytest.approx(one, abs=1e-5) and len(two) == 16
    assert "2 processes" in done.stdout and done.stdout.count("pretrain: wrote") == 1
    assert "skipped: 1 image not on disk, 1 unreadable image" in done.stdout


def test_a_disk_that_fills_up_within_a_checkpoint_leaves_the_one_before(pretrained, cut_off, tmp_path):
    out, limit = shutil.copytree(cut_off, tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limit[1]))  # a checkpoint has 5 MB
        said = train(pretrained, out, "--resume", code=2).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"{out}/checkpoint.pt cannot be written" in said
    assert tree(out) == tree(cut_off)  # and nothing half-made
    train(pretrained, out, "--resume")
    assert_same_run(out, pretrained.out)


def test_too_little_memory_names_what_to_lower(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(model.TIJEPA, "forward", lambda *inputs: torch.empty(1 << 55))
    assert "out of memory; lower --batch_size or --held_out" in train(pretrained, tmp_path, code=2).err
    monkeypatch.setattr(model.TIJEPA, "forward", lambda *inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # any other error is a bug
        train(pretrained, tmp_path)
    monkeypatch.setattr(model, "toy_vit", lambda: torch.empty(1 << 55))  # no fault of the file
    judge = "--eval", pretrained.checkpoint, "--device", "cpu", "--out", tmp_path
    assert "out of memory; lower" in call(pretrain, *judge, code=2).err


# ---- finetune_mvsa.py, and the commands --------------------------------------------------------------------


MVSA_CACHE = tempfile.mkdtemp()
ROWS, PROBES = sum(finetune_mvsa.ROWS.values(), ()), finetune_mvsa.ROWS["probe"]
PRETRAINED, CONCAT = "TI-JEPA, pretrained", "text + image concatenated"
UNTRAINED, ONLINE = "TI-JEPA, X~ untrained", "TI-JEPA, X in place of X~"


def judge_mvsa(root, *options, code=0):
    """finetune_mvsa.py on a folder's checkpoint and posts; of options given twice the later one counts."""
    places = ["--checkpoint", root / "checkpoint.pt", "--mvsa", root / "mvsa", "--out", root / "out"]
    short = ["--cache", MVSA_CACHE, "--device", "cpu", "--seeds", 0, 1, "--mode", "probe"]
    return call(finetune_mvsa, *places, *short, "--finetune_epochs", 1, *options, code=code)


@pytest.fixture(scope="module")
def single(toy, pretrained):
    net, _ = model.TIJEPA.from_checkpoint(pretrained.checkpoint)
    for p in net.target_encoder.parameters():  # X~ must not be X, or a mix-up of the two would pass
        p.add_(0.05 * torch.randn(p.shape, generator=generator_of(3)))
    posts = [replace(post, text=" ".join(post.text.split()[:8 - n % 7]))  # of other lengths: some is padded
             for n, post in enumerate(data.load_mvsa(toy / "mvsa" / "MVSA_Single")[0])]
    cache = data.FeatureCache(MVSA_CACHE, [(post.image, [post.text]) for post in posts], net, 1)
    y = np.array([posts[i].label for i in cache.readable])
    features, split = finetune_mvsa.extract_features(net, cache, [0, 5]), data.stratified_split(y, 0)
    probe, _ = finetune_mvsa.fit_probe(features[PRETRAINED], y, *split[:2])
    return SimpleNamespace(net=net, posts=posts, cache=cache, y=y, split=split, features=features,
                           start=(net, net.target_encoder, probe))


def test_each_row_has_the_features_that_it_is_named_after(single):
    net, X, target = single.net, single.net.context_encoder, single.net.target_encoder
    fresh = {seed: finetune_mvsa.untrained(net, seed) for seed in (0, 5)}
    torch.manual_seed(0)  # the start of a run of seed 0
    start = model.TIJEPA(net.config, (net.image_encoder, net.text_encoder)).context_encoder
    assert len(set(map(model.hash_weights, (*fresh.values(), start, X, target)))) == 5
    mean_colour = (255 * net.image_encoder.mean).round().byte().expand(1, 3, 48, 48)
    no_image, *no_text = net.frozen_features(mean_colour, [""])
    for n, post in enumerate(single.posts[:-1]):  # the last one's picture is broken
        image = data.read_image(post.image, net.image_encoder)
        s_image, *text = net.frozen_features(image[None], [post.text])
        tokens = {"text only": text[0], "image only": s_image, PRETRAINED: target(s_image, *text),
                  **{(UNTRAINED, seed): fresh[seed](s_image, *text) for seed in fresh},
                  ONLINE: X(s_image, *text), "TI-JEPA, pretrained, text alone": target(no_image, *text),
                  "TI-JEPA, pretrained, image alone": target(s_image, *no_text)}
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
    for seed in (0, 5):
        given = net, cache, features, changed, (train, validation, test), seed, probes, args
        fitted, rows = probes.copy(), finetune_mvsa.predict_rows(*given)
        assert all(probes[key] is probe for key, probe in fitted.items())  # both seeds share them
        assert tuple(rows["probabilities"]) == ROWS
        assert rows["probabilities"].pop("majority class") == len(test) * [[0, 1, 0]]
        encoders = {PRETRAINED: net.target_encoder, ONLINE: net.context_encoder,
                    UNTRAINED: finetune_mvsa.untrained(net, seed)}
        for row, probabilities in rows["probabilities"].items():
            start = row.removesuffix(", fine-tuned")
            x = features[(start, seed) if start == UNTRAINED else start]
            probe, choice = finetune_mvsa.fit_probe(x, y, train, validation)
            expected = finetune_mvsa.probabilities_of(probe, x[test])
            if row != start:
                tuned, choice = finetune_mvsa.finetune(net, encoders[start], probe, choice, cache, y, train,
                                                       validation, 2, seed)
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
    loss = [-np.log(p[range(100), y[validation]]).mean() for p in expected]
    assert right.sum(1).argmax() == 1 and np.argmin(loss) == 2  # 6 posts more; by loss it were the third
    probe, choice = finetune_mvsa.fit_probe(x, y, train, validation)
    assert choice == {"C": 1e-2, "validation": right[1].mean(), "loss": pytest.approx(loss[1])}
    assert np.allclose(finetune_mvsa.probabilities_of(probe, x[validation]), expected[1])
    _, choice = finetune_mvsa.fit_probe(x, y, train, validation[right.all(0)])
    assert choice["C"] == 1e-3  # of equals the smallest
    with pytest.raises(UserError, match="all training posts are positive: a probe needs two labels"):
        finetune_mvsa.fit_probe(x, y * 0, train, validation)


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_head_of_gives_the_probabilities_of_the_probe_and_0_for_a_label_without_posts(single, missing):
    x, y = single.features[CONCAT], single.y
    probe, _ = finetune_mvsa.fit_probe(x, y, np.flatnonzero(y != missing), np.arange(9))
    probabilities = finetune_mvsa.probabilities_of(probe, x)
    assert np.array_equal(probabilities[:, np.unique(y[y != missing])], probe.predict_proba(x))
    assert probabilities.shape == (60, 3) and np.allclose(probabilities.sum(1), 1)
    logits = finetune_mvsa.head_of(probe)(torch.from_numpy(x))
    assert np.allclose(logits.softmax(1), probabilities, atol=1e-5)
    assert missing is None or (logits[:, missing] == -30).all()


def test_fine_tuning_starts_as_the_probe_and_trains_all_weights_in_16_bits_too(single, monkeypatch):
    net, cache, y, train, predictions = single.net, single.cache, single.y, single.split[0], []
    losses, scaler, before = iter(range(99, 0, -1)), Mock(wraps=torch.amp.GradScaler), model.hash_weights(net)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(finetune_mvsa, "validate", lambda *given: {"validation": 0, "loss": next(losses)})
    monkeypatch.setattr(finetune_mvsa, "LEARNING_RATES", (1e-3,))
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(net, "dtype", dtype)
        start = finetune_mvsa.Classifier(*single.start)
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
    monkeypatch.setattr(finetune_mvsa, "BATCH", 99)  # an epoch is one step, which adds 1 to the head's bias
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda one: one.param_groups[0]["params"][-1].data.add_(1))
    gather, adamw = Mock(wraps=model.gather), Mock(wraps=torch.optim.AdamW)
    monkeypatch.setattr(model, "gather", gather)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)

    validate = Mock(side_effect=[{"validation": 0, "loss": loss} for loss in losses[1:]])
    monkeypatch.setattr(finetune_mvsa, "validate", validate)
    tuned, choice = finetune_mvsa.finetune(*single.start, {"loss": losses[0]}, single.cache, single.y, train,
                                           validation, 4, 0)
    assert (choice["lr"], choice["epoch"], choice["loss"]) == best
    assert [made.kwargs for made in adamw.call_args_list] == [
        {"lr": lr, "weight_decay": 0.05} for lr in (1e-4, 5e-4)]
    assert [made.args[1].tolist() for made in validate.call_args_list] == (
        [single.y[validation].tolist()] * (len(losses) - 1))
    assert torch.allclose(tuned.head.bias, finetune_mvsa.head_of(single.start[2]).bias + best[1])
    posts = single.cache.rows("image.f16", single.cache.readable[train])[:, 0, 0].tolist()
    steps = [(made.args[0][:, 0, 0].tolist(), made.args[1].tolist()) for made in gather.call_args_list]
    for order, drawn in steps:  # the posts to train on, each with 9 of its 36 patches
        assert sorted(order) == sorted(posts) and {len(set(patches)) for patches in drawn} == {9}
    if best[1] > 1:  # of one learning rate, two epochs at least: others, in another order
        (order, drawn), (other, others) = steps[:2]
        assert order != other and len({tuple(patches) for patches in drawn + others}) > 90
        assert set(sum(drawn, [])) == set(range(36))


def test_bootstrap_resamples_posts_by_hand():
    posts = np.tile(np.arange(200), 2)  # two seeds
    new, old = posts % 4 != 0, posts % 2 == 0
    difference, low, high = finetune_mvsa.bootstrap(new * 1.0 - old, posts)
    assert difference == pytest.approx(25)  # right in 150 against 100 of 200
    # gains of +1 (100 posts), 0 (50), -1 (50), the same in both seeds: the deviation of their mean
    deviation = 100 * (((100 * 0.75 ** 2 + 50 * 0.25 ** 2 + 50 * 1.25 ** 2) / 200) / 200) ** 0.5
    assert [low - 25, high - 25] == pytest.approx([-1.96 * deviation, 1.96 * deviation], abs=1.5)


def recompute(folder, ending=""):
    """-> results.json, the lines of predictions.csv, results.md. All scores come out of the lines by sklearn,
    and the table has them."""
    results, table = (folder / f"results{ending}.{kind}" for kind in ("json", "md"))
    results, table, groups = json.loads(results.read_text()), table.read_text(), {}
    lines = list(csv.DictReader(io.StringIO((folder / f"predictions{ending}.csv").read_text())))
    for line in lines:
        groups.setdefault((line["set"], line["row"], line["seed"]), []).append(line)
        assert float(line[line["prediction"]]) == max(float(line[label]) for label in data.LABELS)
    names = ["accuracy", "weighted F1", "macro F1"]
    rows = [["features", *names], ["true \\ predicted", *data.LABELS]]
    for kind, result in results["sets"].items():
        for row, scores in result["scores"].items():
            confusion = 0
            for n, seed in enumerate(results["seeds"]):
                pairs = [(line["label"], line["prediction"]) for line in groups.pop((kind, row, str(seed)))]
                report = classification_report(*zip(*pairs), output_dict=True, zero_division=0)
                f1 = [report[f"{average} avg"]["f1-score"] for average in ("weighted", "macro")]
                assert [scores[name][n] / 100 for name in names] == pytest.approx([report["accuracy"], *f1])
                confusion += confusion_matrix(*zip(*pairs), labels=data.LABELS)
            assert scores["confusion"] == confusion.tolist()
            rows.append([row, *(f"{np.mean(scores[name]):.2f} ± {np.std(scores[name], ddof=1):.2f}"
                                for name in names)])
        rows += [[label, *map(str, counts)] for label, counts in zip(data.LABELS, scores["confusion"])]
        for pair, (gain, low, high) in result["differences"].items():
            new, old = (np.array(result["scores"][row]["confusion"]) for row in pair.split(" minus "))
            assert gain == pytest.approx(100 * np.trace(new - old) / new.sum())
            rows.append([pair, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}"])
    assert not groups and all(" | ".join(cells) in table for cells in rows)
    return results, lines, table


@pytest.mark.parametrize("protocol", ["standard", "grouped", "authors"])
def test_finetune_end_to_end(toy, pretrained, tmp_path, monkeypatch, protocol):
    mvsa = shutil.copytree(toy / "mvsa", tmp_path / "mvsa")
    ending, mode = ("", ["probe", "finetune"]) if protocol == "standard" else (f"_{protocol}", ["probe"])
    posts, _ = data.load_mvsa(mvsa / "MVSA_Single")
    pairs = list(zip(posts[:40:2], posts[1:40:2]))
    for one, other in pairs:  # pictures that are there twice
        shutil.copy(one.image, other.image)
    if protocol == "authors":  # every row is always right
        monkeypatch.setattr(finetune_mvsa, "predict_rows", lambda net, cache, features, y, split, *rest: {
            "probabilities": dict.fromkeys(PROBES, np.eye(3)[y[split[2]]].tolist()), "choices": {}})
    load = Mock(wraps=model.TIJEPA.from_checkpoint)
    monkeypatch.setattr(model.TIJEPA, "from_checkpoint", load)
    options = ["--mvsa", mvsa, "--out", tmp_path, "--protocol", protocol, "--mode", *mode]
    done = judge_mvsa(pretrained.out, *options, "--image_weights", "a", "--text_encoder", "toy")
    load.assert_called_once_with(str(pretrained.checkpoint), "a", "toy")
    results, lines, table = recompute(tmp_path, ending)
    assert set(results["versions"]) == {"python", "torch", "timm", "transformers", "sklearn", "numpy"}
    assert len(results["code"].rstrip("+")) == 40 or results["code"] == "none"
    assert table in done.out and "not the paper's" in table and f"features: {MVSA_CACHE}/" in done.out
    assert re.findall("measured here (.*) –", table) == ["| 76.75 | 74.62 |", "| 77.55 | 75.02 |"]
    for (kind, result), count in zip(results["sets"].items(), (60, 120), strict=True):
        posts, skipped = data.load_mvsa(data.find_mvsa(mvsa)[kind])
        labels = {post.id: data.LABELS[post.label] for post in posts}
        assert all(line["label"] == labels[line["id"]] for line in lines if line["set"] == kind)
        assert result["posts"] == sum(result["labels"].values()) == count
        assert result["skipped"] == {**skipped, "unreadable image": 1}
        sizes = result["split_sizes"]  # the authors repeat posts of the pool until the classes are equal
        assert sizes[0] > 144 and sizes[1:] == [18, 18] if protocol == "authors" else sum(sizes) == count
        assert tuple(result["scores"]) == (ROWS if protocol == "standard" else PROBES)
        assert len(result["differences"]) == 1 + 2 * len(mode)
        assert protocol != "authors" or result["scores"][PRETRAINED]["accuracy"] == [100, 100]
    splits = {one for result in results["sets"].values() for one in result["split_hash"].values()}
    assert len(splits) == (2 if protocol == "authors" else 4)  # of each seed; the authors pool both sets
    if protocol == "grouped":
        assert "groups of repeated posts" in table and "40 posts in them" in table
        tested = {(line["seed"], line["id"]) for line in lines if line["set"] == "single"}
        assert all(((s, a.id) in tested) == ((s, b.id) in tested) for a, b in pairs for s in "01")
    assert Image.open(tmp_path / f"confusion{ending}.png").size == (800, 360)
    with data.locked(tmp_path):
        assert f"another run writes to {tmp_path}" in judge_mvsa(pretrained.out, *options, code=2).err


@pytest.fixture(scope="module")
def judged_once(toy, pretrained, tmp_path_factory):
    """A folder with the results of Single alone, of a published split. Three tested posts are repeats."""
    root = tmp_path_factory.mktemp("judged")
    shutil.copy(pretrained.checkpoint, root)
    shutil.copytree(toy / "mvsa" / "MVSA_Single", root / "mvsa")
    posts = data.load_mvsa(root / "mvsa")[0][:-1]  # the last one's picture is broken
    listed = [(post.id, post.label) for post in posts]
    write_split(root / "single", listed[:40], listed[40:50], listed[50:])
    for post, words in zip(posts[50:53], ("RT @you {}!", "{} http://t.co/1", "#{}")):
        post.image.with_suffix(".txt").write_text(words.format(posts[7].text))
    shutil.copy(posts[3].image, posts[52].image)
    judge_mvsa(root, "--split", root / "single")
    return root


def test_a_published_split_is_used_and_scored_with_and_without_repeats(judged_once):
    results, lines, table = recompute(judged_once / "out")
    result, tested = results["sets"]["single"], lines[-10:]
    assert result["split_sizes"] == [40, 10, 10] and tuple(result["scores"]) == PROBES
    posts, _ = data.load_mvsa(judged_once / "mvsa")
    assert [line["id"] for line in tested] == [post.id for post in posts[50:-1]]
    for what, count in (("words", 3), ("image", 1)):
        assert f"{count} test posts with the {what} of a training post" in table
    right = 100 * np.mean([line["label"] == line["prediction"] for line in tested[3:]])
    assert result["scores"][tested[0]["row"]]["accuracy without repeats"][1] == pytest.approx(right)
    assert "| accuracy without repeats |" in table and "Not measured: no MVSA-Multi in" in table


SEED = "out/predictions/standard-single-{}.json".format
BETWEEN = {  # what changes between two runs: (how, options of the second, seeds that they compute again)
    "epochs": (str, "--finetune_epochs 2", [0, 1]), "mode": (str, "--mode finetune", [0, 1]),
    "dtype": (str, "--dtype bfloat16", [0, 1]), "split": (str, "--split=", [0, 1]),
    "a tested label": (lambda root: execute("sed", "-i", r"s/^77\t.*/77\tpositive,positive/",
                                            root / "mvsa" / "labelResultAll.txt"), "", [0, 1]),
    **{name: (lambda root, name=name: spoil(
        root, lambda c: c["model"][name]["blocks.0.mlp.2.weight"].mul_(-2)), "", [0, 1])
       for name in ("context_encoder", "target_encoder")},
    "another seed's file": (lambda root: shutil.copy(root / SEED(1), root / SEED(0)), "", [0]),
    "a file is cut off": (lambda root: os.truncate(root / SEED(1), 999), "", [1]),
    "Ctrl-C in the last of three": (lambda root: judge_mvsa(
        root, "--split", root / "single", "--seeds", 0, 1, 2, code=130), "--seeds 2 0 1", [2, 2]),
    "time and place": (lambda root: [os.utime(path) for path in root.rglob("*")], "", [])}


@pytest.mark.parametrize("what", BETWEEN)
def test_predictions_are_reused_only_for_the_same_run(judged_once, tmp_path, monkeypatch, what):
    change, options, again = BETWEEN[what]
    judged, real, asked = shutil.copytree(judged_once, tmp_path / "judged"), finetune_mvsa.predict_rows, []

    def predict(*given):
        asked.append(given[5])
        if asked == [2]:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(finetune_mvsa, "predict_rows", predict)
    change(judged)
    judge_mvsa(judged, "--split", judged / "single", *options.split())
    assert asked == again
    if again != [0, 1]:
        judge_mvsa(judged, "--split", judged / "single", "--out", judged / "fresh", *options.split())
        assert recompute(judged / "out")[1] == recompute(judged / "fresh")[1]


def test_ablation_table_is_made_from_the_files_of_the_runs(tmp_path):
    for variant, seed, auc in (("plain", 0, 0.5), ("plain", 1, 0.7), ("image", 0, 1.0)):
        out = tmp_path / f"{variant}-{seed}"
        out.mkdir()
        (out / "log.jsonl").write_text('{"loss": 9, "step": 3}\n{"loss": 0.25, "step": 6}\n')
        (out / "eval.json").write_text(json.dumps(dict(
            energy_matched=0.1, energy_position=0.4, auc=auc, target_std=0.5, target_rank=7, step=6)))
        single, multi = ({"accuracy": [n + 10 * seed, n + 10 * seed + 2]} for n in (60, 70))
        sets = {"single": {"scores": dict.fromkeys(PROBES, single)},
                "multi": {"scores": dict.fromkeys(ROWS, multi)}}
        (out / "results.json").write_text(json.dumps({"sets": sets, "step": 6}))
    done = call(finetune_mvsa, "--ablate", tmp_path)
    assert (tmp_path / "results.md").read_text() in done.out
    header, _, *rows = [line.strip("| ").split(" | ") for line in done.out.splitlines() if line]
    assert header[8:] == [f"{column}, MVSA-{kind}" for column, kind in (
        ("X", "Multi"), ("X", "Single"), ("X~ fine-tuned", "Multi"), ("X~", "Multi"), ("X~", "Single"))]
    table = {name: cells for name, *cells in rows}
    assert table["plain"] == [
        "2", "0.250 ± 0.000", "0.100 ± 0.000", "0.400 ± 0.000", "0.600 ± 0.141", "0.500 ± 0.000",
        "7.000 ± 0.000", *(f"{mean}.0 ± 7.1" for mean in (76, 66, 76, 76, 66))]
    assert table["image"][:3] == ["1", "0.250", "0.100"]  # one run has no deviation
    for name in ("*untrained*", f"*{CONCAT}*"):  # the same in all runs
        assert table[name] == ["3", *9 * [""], "74.3 ± 5.8", "64.3 ± 5.8"]
    (out / "log.jsonl").write_text('{"loss": 9, "step": 3}')
    said = call(finetune_mvsa, "--ablate", tmp_path, code=2).err
    assert f"the files of {out} are of different steps" in said


def test_the_code_in_the_readme_runs(pretrained, toy, tmp_path, monkeypatch):
    pairs, own = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(pairs, {})
    files, captions = data.parse_captions(Path(CAPTIONS).read_bytes(), "")
    assert files == {0: "a.jpg", 1: "b.jpg"} and captions == {0: ["a red dog"], 1: ["two cats"]}
    names = {}
    places = {"out/toy/checkpoint.pt": pretrained.checkpoint, "data/toy": toy}
    exec(re.sub("|".join(places), lambda place: str(places[place[0]]), own), names)
    words = {word for group in (*(names for _, names in data.COLOURS), *data.PATTERNS) for word in group}
    assert all(word in words for caption in names["captions"] for word in caption.split())  # the toy's own
    assert names["energies"].shape == (2,) and names["logits"].shape == (2, 10)
    names["logits"].sum().backward()
    assert names["net"].predictor.mask_token.grad is None


def test_make_names_the_packages_that_are_missing(tmp_path):
    for venv, text, says in (("", "numpy>=1\n", ""), ("a b", "numpy>=1\n", "VENV cannot have a space"),
                             ("", "torch>=99\nno-such>=1\n", "lacks torch>=99, no-such>=1;")):
        (tmp_path / "requirements.txt").write_text(text)
        options = "-f", HERE / "Makefile", f"VENV={venv}", f"PYTHON3={sys.executable}"
        done = execute("make", "packages", *options, cwd=tmp_path)
        assert says in done.stderr and done.returncode == (2 if says else 0)
def make(words):
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # of make test
    return execute("make", *words.split(), cwd=HERE, env=env)


def runs(text):
    """The runs of both scripts in a shell's lines -> [(python's options, script, {option: value})]"""
    commands = re.findall(r'python3"? (.*?)\b(pretrain|finetune_mvsa)\.py ([^>&|\n]*)', text)
    return [(by.split(), script, vars(sys.modules[script].parse_args(shlex.split(options))))
            for by, script, options in commands]


BOTH = "--device cpu --dtype bfloat16 --cache /f --image_weights /w --text_encoder /t"
JUDGE = f"python3 finetune_mvsa.py {BOTH} --checkpoint /o/checkpoint.pt --mvsa data/toy/mvsa --out /o"
TOY = "--device cpu --cache data/toy/cache"
VARIANTS = {
    "out/ablate/plain": "", "out/ablate/image": "--target image", "out/ablate/sigreg": "--sigreg 0.005",
    "out/ablate/no_ema": "--momentum 0 --final_momentum 0", "out/ablate/shuffled": "--shuffle_captions",
    "out/ablate/image_shuffled": "--target image --shuffle_captions"}
MAKE = {  # what is asked of make: the commands that it would run
    "reproduce PRESET=tiny COCO=/c MVSA=/m": """
        python3 pretrain.py --preset tiny --coco /c --resume --out out/tiny
        python3 pretrain.py --eval out/tiny/checkpoint.pt --coco /c
        python3 finetune_mvsa.py --checkpoint out/tiny/checkpoint.pt --mvsa /m --out out/tiny""",
    "reproduce PRESET=toy OUT=/o DEVICE=cpu DTYPE=bfloat16 CACHE=/f IMAGE_WEIGHTS=/w TEXT_ENCODER=/t "
    "SPLIT=/s IMAGE_ENCODER=vit EPOCHS=7 TARGET=image SEED=3 ARGS=--lr=0.5 GPUS=2": f"""
        python3 -m torch.distributed.run --nproc_per_node=2 pretrain.py {BOTH} --coco data/toy/coco --out /o \
            --resume --image_encoder vit --epochs 7 --target image --seed 3 --lr 0.5
        python3 pretrain.py {BOTH} --coco data/toy/coco --eval /o/checkpoint.pt
        {JUDGE} --split /s && {JUDGE} --protocol grouped --mode probe
        {JUDGE} --protocol authors --mode probe""",
    "bench PRESET=tiny DEVICE=cpu DTYPE=float32 IMAGES=70":
        "python3 pretrain.py --bench --preset tiny --device cpu --dtype float32 --max_images 70",
    # -B: as if no run were there. What is not the same for all is not taken over
    "-B ablate DEVICE=cpu TARGET=image SEED=9 EPOCHS=7 ARGS=--lr=1": "".join(f"""
        python3 pretrain.py {TOY} --coco data/toy/coco --out {out}-{seed} --resume {options} --seed {seed}
        python3 pretrain.py {TOY} --coco data/toy/coco --eval {out}-{seed}/checkpoint.pt
        python3 finetune_mvsa.py {TOY} --checkpoint {out}-{seed}/checkpoint.pt --out {out}-{seed} \
            --mvsa data/toy/mvsa --seeds 0 1 2 --mode probe
        """ for out, options in VARIANTS.items() for seed in range(3))
    + "python3 finetune_mvsa.py --ablate out/ablate"}


@pytest.mark.parametrize("words", MAKE)
def test_make_passes_each_variable_on_to_the_commands_that_it_is_for(words):
    assert runs(make(f"-n VENV= {words}").stdout) == runs(MAKE[words])


def test_make_says_what_it_would_run_and_evaluates_a_checkpoint_once():
    listed = {line.split()[1] for line in make("").stdout.splitlines()}
    assert listed == set("help reproduce pretrain picture ablate bench test coco clean".split())
    for options, says in (("COCO=/none", "preset toy, data data/toy/coco and data/toy/mvsa, device cpu. Toy"),
                          ("PRESET=small COCO=/a MVSA=/b", "preset small, data /a and /b, device cpu\n"),
                          ("COCO=/ MVSA=/", "preset small"), ("COCO=/ MVSA=/nowhere", "preset toy")):
        assert says in make(f"check-preset DEVICE=cpu {options}").stdout
    assert make("check-preset PRESET=huge").returncode == 2
    assert "--preset small" in make("-n pretrain COCO=/ MVSA=/nowhere VENV=").stdout
    for images, limit in (("DEVICE=cpu", "10000"), ("IMAGES=7", "7"), ("IMAGES=all", "0")):
        assert f"--images {limit}\n" in make(f"-n coco VENV= {images}").stdout
    commands = make("-n reproduce VENV= PRESET=toy").stdout
    assert '[ "out/toy/eval.json" -nt "out/toy/checkpoint.pt" ] || "python3" pretrain.py' in commands
    assert commands.count(" && ") == 3  # the first protocol that fails is the last


BAD = {  # a command: words of the message
    **{f"{{train}} {option}": f"argument {option.split()[0]}" for option in (
        "--lr 0", "--lr inf", "--lr nan", "--momentum 2", "--clip 0", "--epochs many", "--batch_size 0",
        "--batch_size 1.5", "--accumulate 0", "--held_out -1", "--seed -1", "--workers 0", "--log_every 0",
        "--target text", "--dtype float64")},
    "{train} --batch_size 33 --accumulate 1": "--batch_size 33 32 images",
    "{train} --sigreg 1": "--sigreg needs the whole batch --accumulate 1",
    "{train} --accumulate 3": "--batch_size 16 --accumulate x processes (3 x 1)",
    "{train} --held_out 1": "--held_out 1 at least 2",
    "{train} --bench --max_images 1": "--bench more images than --held_out",
    "{train} --image_encoder vit_tiny_patch16_224": "vit_tiny_patch16_224 --image_weights",
    "{train} --text_encoder some/bert": "--text_encoder some/bert f_T",
    "{train} --out a.txt": "a.txt cannot be written --out",
    "{train} --cache a.txt/cache": "a.txt cannot be written --cache",
    "{train} --captions red --eval checkpoint.pt --image a.txt": "a.txt cannot be read as an image",
    "{judge} --mvsa .": "no image of MVSA-Single in data can be read",
    "{judge} --device gpu": "--device gpu --device auto",
    "{judge} --split .": "--split . train.json",
    "{judge} --protocol grouped --split x": "--split standard protocol",
    "{judge} --protocol authors --mvsa .": "pools both sets",
    "finetune_mvsa.py --seeds 0 0": "--seeds 0 0 twice",
    "finetune_mvsa.py --ablate .": "--ablate . make ablate",
    "data.py check --coco none --mvsa none": "none/train2017 make coco mcrlab Kaggle"}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_a_sentence_and_exit_code_2(
        command, toy, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("a.txt", "data/1.jpg", "data/1.txt"):
        Path(name).touch()
    Path("labelResultAll.txt").write_text("ID\ttext,image\n1\tpositive,positive\n")
    Path("checkpoint.pt").symlink_to(pretrained.checkpoint)
    train = " ".join(map(str, ("pretrain.py", *pretrained.options, "--out out")))
    judge = f"finetune_mvsa.py --checkpoint checkpoint.pt --mvsa {toy}/mvsa --out out --cache cache"
    monkeypatch.setattr(sys, "argv", command.format(train=train, judge=judge).split())
    with pytest.raises(SystemExit, match="2"):  # as a user types it
        runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
    said = " ".join(capsys.readouterr().err.split())
    assert "error:" in said and not Path("out", "checkpoint.pt").exists()
    assert all(word in said for word in BAD[command].split()), said
