"""The tests, by values: `make test`. CPU only, no network; every file they need they write themselves."""
import contextlib
import csv
import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
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


def ends_well(process):
    """Whether it does within a minute; it is killed if it hangs."""
    process.join(60)
    process.kill()
    return process.exitcode == 0


def tree(folder):
    """{name: bytes} of all that is below a folder."""
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


SMOOTH = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3) ** 2).resize((240, 160))


@pytest.mark.parametrize("form, mode, width, method, decoded", [
    ("JPEG", "RGB", 1200, "bicubic", 150),  # a large one is decoded at an eighth
    ("JPEG", "CMYK", 90, "bicubic", 90), ("PNG", "L", 60, "bicubic", 60), ("PNG", "RGB", 60, "bilinear", 60)])
def test_read_image_is_upright_rgb_and_squashed_to_the_encoders_size(
        tmp_path, monkeypatch, form, mode, width, method, decoded):
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
    cut, bomb, folder, pipe, endless, missing = paths = [tmp_path / name for name in "abcdef"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    SMOOTH.save(bomb, "PNG")
    SMOOTH.save(cut, "JPEG")
    os.truncate(cut, 1500)
    folder.mkdir()
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    texts = ["red " * 62, "red " * 61, *198 * ["red"]]  # [CLS] and [SEP] count as well
    given = tmp_path / "cache", [(path, texts) for path in paths], encoded.net, 2
    assert ends_well(forked(data.FeatureCache, *given))
    assert list(data.FeatureCache(*given).unreadable) == list(range(6))
    said = "6 images (6 unreadable), 1200 texts; 6 have 64 tokens or more: f_T reads 64"
    assert said in capsys.readouterr().out
    for error in (SyntaxError, ValueError, EOFError, RuntimeError, KeyError, TypeError, data.struct.error):
        monkeypatch.setattr(Image, "open", Mock(side_effect=error("of a decoder")))
        with pytest.raises(UserError, match="a cannot be read as an image: .*of a decoder"):
            data.read_image(cut, encoded.net.image_encoder)
    for error, code in ((MemoryError, 2), (KeyboardInterrupt, 130)):  # are not the picture's fault
        monkeypatch.setattr(Image, "open", Mock(side_effect=error))
        assert data.run_command(lambda: data.read_image(cut, encoded.net.image_encoder), "--x") == code


def things_in(path):
    """The four (colour, pattern) that a toy picture shows; of green, blue and red the brightest channel."""
    squares = np.array(Image.open(path))[8:40, 8:40].reshape(2, 16, 2, 16, 3).swapaxes(1, 2)  # two above two
    squares = squares.reshape(4, 16, 16, 3)
    colours = squares.mean((1, 2)) @ [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    across, down = (squares.mean((axis, 3)).std(1) > 10 for axis in (1, 2))  # bars, stripes
    return list(zip(colours.argmax(1), np.where(across, 0, np.where(down, 1, 2))))


def test_toy_captions_name_what_pictures_show_and_a_post_has_two_moods(toy):
    colours = {word: i for i, (_, words) in enumerate(data.COLOURS) for word in words}
    patterns = {word: i for i, words in enumerate(data.PATTERNS) for word in words}
    for path, captions in data.load_coco(toy / "coco")[0][:-1]:  # the last one's picture is broken
        for words in map(str.split, set(captions)):
            assert [(colours[a], patterns[b]) for a, b in zip(words[::2], words[1::2])] == things_in(path)
        assert len(set(captions)) == 5
    folder, shares = toy / "mvsa" / "MVSA_Single", []
    for line in (folder / "labelResultAll.txt").read_text().splitlines()[1:-1]:
        post, text, image = re.split("[\t,]", line)
        first, *_ = (folder / f"data/{post}.txt").read_text("gb18030").split()
        assert data.LABELS[colours[first]] == text
        shares.append(np.mean([data.LABELS[c] == image for c, _ in things_in(folder / f"data/{post}.jpg")]))
    assert 0.8 < np.mean(shares) < 0.93  # 0.8, and a third of the others


def test_toy_data_are_the_same_bytes_for_a_seed_and_replace_nothing(tmp_path, monkeypatch):
    toy, again, other, mine = (tmp_path / name for name in ("toy", "a/b/again", "other", "mine"))
    (mine / "coco").mkdir(parents=True)
    for folder, seed in ((toy, 0), (again, 0), (other, 1)):
        data.write_toy(folder, 4, 5, seed)
    before, name = tree(tmp_path), "coco/train2017/000000000000.jpg"
    assert tree(toy) == tree(again) and tree(toy)[name] != tree(other)[name]
    for folder, posts in ((toy, 6), (mine, 5)):
        said = call(data, "toy", folder, "--images", 4, "--posts", posts, code=2).err
        assert f"{folder} exists, but not as toy data of" in said
    monkeypatch.setattr(data, "write_toy_mvsa", lambda *given: 1 / 0)
    data.write_toy(toy, 4, 5)  # is there
    with pytest.raises(ZeroDivisionError):
        data.write_toy(tmp_path / "interrupted", 4, 5)
    assert tree(tmp_path) == before


def caption_file(images, notes):
    """COCO's, of [(id, file name)] and [(id, caption)]."""
    content = {"images": [{"id": i, "file_name": name} for i, name in images],
               "annotations": [{"image_id": i, "caption": text} for i, text in notes]}
    return json.dumps(content).encode()


def test_coco_is_read_by_image_id_and_what_is_missing_is_counted(tmp_path):
    (tmp_path / CAPTIONS).parent.mkdir()
    (tmp_path / "train2017").mkdir()
    paths = [tmp_path / "train2017" / f"{i}.jpg" for i in range(5)]
    for path in paths[1:]:
        path.touch()
    notes = [(4, "d"), (1, " a "), (2, "c"), (1, "b"), (0, "not there"), (7, "not listed"), (8, "not listed")]
    (tmp_path / CAPTIONS).write_bytes(caption_file([(i, paths[i].name) for i in (4, 3, 2, 1, 0)], notes))
    items, skipped = data.load_coco(tmp_path)
    assert items == [(paths[1], ["a", "b"]), (paths[2], ["c"]), (paths[4], ["d"])]
    assert skipped == {"captioned image not listed": 2, "image not on disk": 1, "image without caption": 1}
    assert data.load_coco(tmp_path, 2) == (items[:2], skipped)


class BadConnection(BaseHTTPRequestHandler):
    """Of each file 500, then half of it, then the file; always 404 for what server.files lacks."""
    log_message = Mock()

    def do_GET(self):
        self.server.asked.append(self.path)
        body, tries = self.server.files.get(self.path, b""), self.server.asked.count(self.path)
        self.send_response(404 if not body else 500 if tries == 1 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if tries > 2 else body[:len(body) // 2])


def test_coco_is_fetched_over_a_bad_connection_and_not_fetched_again(tmp_path, monkeypatch):
    names = [*(f"{i}.jpg" for i in range(40)), "../a b#%41.jpg", "uncaptioned.jpg"]
    packed, at = io.BytesIO(), "/annotations/annotations_trainval2017.zip"
    with data.ZipFile(packed, "w") as file:
        file.writestr(CAPTIONS, caption_file([*enumerate(names)][::-1], [(i, "red") for i in range(41)]))
    photos = {f"/train2017/{i}.jpg": b"image %d" % i for i in range(39)}  # 39.jpg is nowhere
    files = {at: packed.getvalue(), **photos, "/train2017/a%20b%23%2541.jpg": b"odd"}
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 64)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BadConnection)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "COCO_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(data, "PAUSES", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def fetch(files, images, code):
        server.asked, server.files = [], files
        said = call(data, "coco", tmp_path, "--images", images, code=code).err
        return Counter(server.asked), said

    assert fetch(files, 30, 0)[0] == dict.fromkeys([at, *list(photos)[:30]], 3)
    assert not fetch(files, 30, 0)[0]
    asked, said = fetch(files, 0, 2)
    assert asked == dict.fromkeys([*list(files)[31:], "/train2017/39.jpg"], 3)
    assert "1 of 41 images are still missing" in said and "39.jpg cannot be fetched: HTTP Error 404" in said
    expected = {Path(at).name: body for at, body in photos.items()} | {"a b#%41.jpg": b"odd"}
    assert tree(tmp_path / "train2017") == expected
    (tmp_path / CAPTIONS).write_bytes(caption_file(*2 * [[(i, f"{i}.jpg") for i in range(999)]]))
    monkeypatch.setattr(data, "MOST_FAILURES", 3)
    asked, said = fetch({}, 0, 2)
    assert "960 of 999 images are still missing" in said and len(asked) < 500  # it is the network


def test_epoch_order_has_every_image_once_with_one_of_its_captions():
    cache, train = SimpleNamespace(first=np.arange(0, 210, 5)), np.arange(1, 41)
    first, again, *others = (data.epoch_order(cache, train, *key) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert np.array_equal(first, again)
    for images, texts in (first, *others):
        assert sorted(images) == list(train) and np.array_equal(texts // 5, images)
    for images, texts in others:
        assert not np.array_equal(images, first[0]) and not np.array_equal(texts % 5, first[1] % 5)
    drawn = {draw for epoch in range(60) for draw in zip(*data.epoch_order(cache, train, 0, epoch))}
    assert len(drawn) == 40 * 5


def test_hold_out_trains_on_no_held_out_image_and_a_lost_image_moves_no_other():
    cache = SimpleNamespace(items=[(Path(f"{i:012d}.jpg"), []) for i in range(100)])

    def hold_out(lost=None, count=40):
        cache.readable = np.array([i for i in range(100) if i != lost])
        train, held = data.hold_out(cache, count)
        assert sorted([*train, *held]) == list(cache.readable)
        return set(held)

    held = hold_out()
    assert len(held) == 40 and held != set(range(40))
    for lost in range(0, 100, 7):
        assert held - {lost} <= hold_out(lost) and len(hold_out(lost)) == 40
    cache.items.reverse()
    assert {99 - i for i in hold_out()} == held and len(hold_out(count=0)) == 10
    assert [data.default_held_out(images) for images in (2000, 300, 5)] == [100, 30, 2]


# ---- data.py: the feature cache ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def encoded(toy, tmp_path_factory):
    """A model, 71 items, and their cache."""
    torch.manual_seed(0)
    words = sorted({word for _, words in data.COLOURS for word in words})
    net, (items, _) = model.TIJEPA(replace(CONFIG, vocabulary=words)), data.load_coco(toy / "coco")
    items = [items[0], items[-1], *items[1:-1]]  # the second is broken; the texts get different lengths
    items = [(path, [" ".join(text.split()[k:]) for k, text in enumerate(texts)]) for path, texts in items]
    items += items[2:32]
    cache = data.FeatureCache(tmp_path_factory.mktemp("encoded"), items, net, 2)
    return SimpleNamespace(net=net, items=items, cache=cache, name=cache.folder.name)


def test_cached_features_are_those_encoded_on_the_fly(encoded, monkeypatch):
    cache, net, items, images = encoded.cache, encoded.net, encoded.items, np.arange(40, 1, -2)
    owners, numbers = (images + 3) % 41, images % 5
    draws = [(images, cache.first[owners] + numbers), (images[:3], cache.first[:3])]
    pictures = torch.stack([data.read_image(items[i][0], net.image_encoder) for i in images])
    texts = [items[owner][1][number] for owner, number in zip(owners, numbers)]
    expected = net.frozen_features(pictures, texts)
    on_device = {name: torch.tensor(cache.map(name)) for name in cache.shapes}  # as on a GPU with room
    for memory, dtype, atol in (({}, torch.float32, 3e-3), (on_device, torch.bfloat16, 0.03)):
        monkeypatch.setattr(cache, "on_device", memory)
        monkeypatch.setattr(net, "dtype", dtype)
        features, few = cache.batches(draws)
        mask = features.text_mask
        assert features.s_image.dtype == features.s_text.dtype == dtype and len(few.s_image) == 3
        assert torch.equal(mask, expected.text_mask) and not mask.all() and not features.s_text[~mask].any()
        assert torch.allclose(features.s_image.float(), expected.s_image, atol=atol)
        assert torch.allclose(features.s_text[mask].float(), expected.s_text[mask], atol=atol)
    assert list(cache.unreadable) == [1] and np.isnan(cache.map("image.f16")[1]).all()


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
    folders = [data.FeatureCache(root, *recipe, 1).folder for recipe in recipes]
    Image.open(one).rotate(90).save(one, "JPEG")  # another picture of the same name
    folders.append(data.FeatureCache(root, items, net, 1).folder)
    assert len(set(folders[:3])) == 1 and len(set(folders)) == len(list(root.iterdir())) == 8


@pytest.mark.parametrize("name, change", [("image.f16", -2), ("text.f16", 2), ("image.f16", None)])
def test_a_cache_of_a_wrong_size_is_encoded_anew_to_the_same_bytes(encoded, tmp_path, name, change):
    path = shutil.copytree(encoded.cache.folder, tmp_path / encoded.name) / name
    path.unlink() if change is None else os.truncate(path, path.stat().st_size + change)
    data.FeatureCache(tmp_path, encoded.items, encoded.net, 1)
    assert tree(tmp_path / encoded.name) == tree(encoded.cache.folder)


def test_a_disk_that_fails_is_named_and_no_picture_is_stored_as_unreadable(
        encoded, tmp_path, monkeypatch, capsys):
    given, folder = (tmp_path, encoded.items, encoded.net, 1), tmp_path / encoded.name
    picture, read = encoded.items[40][0], Path.read_bytes
    bad, full = OSError(errno.EIO, "bad sector"), OSError(errno.ENOSPC, "no room")
    for before in (0, 1, 2):  # when the picture is hashed, when it is decoded, and when all is written
        disk = Mock(side_effect=[read(picture)] * before + [bad])
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path: disk() if path == picture else read(path))
            patch.setattr(os, "fsync", Mock(side_effect=full))
            assert data.run_command(lambda: data.FeatureCache(*given), "") == 2
        where, why = (folder / "text.f16", full) if before == 2 else (picture, bad)
        assert f"error: {where} cannot be written or read: {why.strerror}" in capsys.readouterr().err
        assert set(tree(folder)) <= {".lock"}


def test_a_killed_cache_frees_its_lock_and_is_encoded_anew_once_to_the_same_bytes(
        encoded, tmp_path, monkeypatch, capfd):
    given, encode_images = (tmp_path, encoded.items, encoded.net, 1), encoded.net.encode_images
    folder, half = tmp_path / encoded.name, multiprocessing.get_context("fork").Event()
    with monkeypatch.context() as patch:  # for ever in the second chunk; the first has the broken picture
        patch.setattr(encoded.net, "encode_images", lambda images:
                      encode_images(images) if len(images) == 31 else half.set() or time.sleep(600))
        builder = forked(data.FeatureCache, *given)
    assert half.wait(60)
    waiting = [forked(data.FeatureCache, *given) for _ in range(2)]
    time.sleep(0.5)
    assert all(process.is_alive() for process in waiting)
    assert set(tree(folder)) == {".lock", "image.f16.tmp", "text.f16.tmp"}  # no half a file has its name
    builder.kill()  # kill -9: nothing of its own can free the lock
    assert all(map(ends_well, waiting)) and tree(folder) == tree(encoded.cache.folder)
    assert capfd.readouterr().err.count("cannot be read as an image") == 2  # the killed one's, and one more


@pytest.mark.parametrize("last_norm", [lambda net: net.image_encoder.vit.norm,
                                       lambda net: net.text_encoder.bert.encoder.layer[-1].output.LayerNorm])
def test_features_that_float16_cannot_hold_are_refused(encoded, tmp_path, last_norm):
    net = model.TIJEPA(encoded.net.config)
    last_norm(net).weight *= 1e6
    with pytest.raises(UserError, match="do not fit float16"):
        data.FeatureCache(tmp_path, encoded.items, net, 1)


# ---- data.py: MVSA, its splits, and 20,000 damaged files ---------------------------------------------------

P, U, N = data.LABELS


def write_labels(folder, rows, columns):
    (folder / "data").mkdir(parents=True)
    text = "\r\n".join(["ID\t" + "\t".join(["text,image"] * columns), *rows, ""])
    (folder / "labelResultAll.txt").write_bytes(text.encode())
    return folder


def test_posts_of_any_encoding_are_read_and_dropped_for_each_reason(tmp_path):
    texts = {b"plain\r\n": "plain", b"\xef\xbb\xbfbom": "bom", b"": "", b"caf\xe9": "caf\u00e9",
             "caf\u00e9 \u4f60".encode(): "caf\u00e9 \u4f60", b"\xff\xff\xff": "\xff" * 3,
             "\u4f60".encode("gb18030"): "\u4f60", "\u4f60 \u0416".encode("utf-16"): "\u4f60 \u0416"}
    votes = [(P, P), (U, N), (U, U), *5 * [(N, U)], (P, N), (N, U), (U, U)]
    folder = write_labels(tmp_path, [f"{i}\t{','.join(pair)}" for i, pair in enumerate(votes)], 1)
    for i, content in enumerate([*texts, b"opposite", b"no image", b"no text"]):
        (folder / f"data/{i}.txt").write_bytes(content)
        (folder / f"data/{i}.jpg").touch()
    for name in ("data/9.jpg", "data/10.txt"):
        (folder / name).unlink()
        (folder / name).mkdir()  # is there, but no file
    posts, skipped = data.load_mvsa(folder)
    assert posts == [data.Post("single", str(i), folder / f"data/{i}.jpg", text, [0, 2, 1, *5 * [2]][i])
                     for i, text in enumerate(texts.values())]
    assert skipped == {"text and image of opposite polarity": 1, "text or image file missing": 2}


def test_find_mvsa_knows_both_sets_by_their_headers(toy, tmp_path):
    single, multi = write_labels(tmp_path / "b", [], 1), write_labels(tmp_path / "y/a", [], 3)
    assert data.find_mvsa(tmp_path) == {"single": single, "multi": multi}
    assert data.find_mvsa(single) == {"single": single}
    write_labels(tmp_path / "copy", [], 1)
    with pytest.raises(UserError, match="two folders hold MVSA-single"):
        data.find_mvsa(tmp_path)
    posts = [post for folder in data.find_mvsa(toy / "mvsa").values() for post in data.load_mvsa(folder)[0]]
    assert len({p.id for p in posts}) < len(posts) == len({(p.set, p.id) for p in posts}) == 61 + 121


def test_read_labels_takes_what_two_of_three_say_of_the_text_and_of_the_image(tmp_path):
    words, none = dict(zip("PUN", data.LABELS)), "no majority"
    cases = {"PP PP NU": 0, "PU UU PN": 0, "UU UU PN": 1, "NN NU UN": 2, "PU UU NU": none, "PP PN PU": none,
             "PN PN UU": "text and image of opposite polarity"}
    rows = ["\t".join([case, *(f"{words[text]},{words[image]}" for text, image in case.split())])
            for case in cases]
    kind, labels, skipped = data.read_labels(write_labels(tmp_path, rows, 3) / "labelResultAll.txt")
    assert kind == "multi" and {**labels, **skipped} == cases


def test_merge_labels_lets_neutral_give_way_and_drops_opposites():
    assert data.LABELS == ("positive", "neutral", "negative")  # 0, 1, 2 of CLMLF's files
    merged = [[data.merge_labels(text, image) for image in (P, U, N)] for text in (P, U, N)]
    assert merged == [[P, P, None], [P, U, N], [None, N, N]]


LABELLED = np.random.default_rng(0).choice(3, 505, p=[0.6, 0.1, 0.3])


GROUPS = np.arange(505)
GROUPS[250:300] = np.repeat(np.arange(10), 5)  # and posts 0-9 with them
SPLITS = {"stratified_split": data.stratified_split, "random_split": data.random_split,
          "grouped_split": lambda labels, seed: data.stratified_split(labels, seed, GROUPS[:len(labels)])}


@pytest.mark.parametrize("name, off", [("stratified_split", 0.02), ("grouped_split", 0.05),
                                       ("random_split", 0.1)])
def test_splits_are_8_1_1_of_all_posts_by_their_seed(name, off):
    parts, again, other = (SPLITS[name](LABELLED, seed) for seed in (0, 0, 1))
    assert all(map(np.array_equal, parts, again)) and not any(map(np.array_equal, parts, other))
    once = [np.unique(part) for part in parts]
    assert sorted(np.concatenate(once)) == list(range(505))
    assert np.allclose([len(part) for part in once], [404, 50, 51], atol=2)
    shares = [np.bincount(LABELLED[part]) / len(part) for part in once]
    assert np.allclose(shares, np.bincount(LABELLED) / 505, atol=off)
    if name == "grouped_split":  # no group is divided
        assert sum(len(set(GROUPS[part])) for part in parts) == len(set(GROUPS))
    if name == "random_split":  # training posts are repeated until the classes are equal
        assert list(np.bincount(LABELLED[parts[0]])) == 3 * [np.bincount(LABELLED[once[0]]).max()]
        assert np.bincount(parts[0]).max() < 30 and len(parts[1]) == len(parts[2]) == 50  # the rarest 6 times
    else:
        assert sum(map(len, parts)) == 505
        with pytest.raises(UserError, match="cannot split"):
            SPLITS[name](np.array([0, 0, 0, 1]), 0)


def write_split(folder, *parts):
    """CLMLF's files of lists of (id, label)."""
    folder.mkdir(parents=True)
    for name, part in zip(("train", "dev", "test"), parts):
        content = [{"id": i, "text": "", "emotion_label": label} for i, label in part]
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_clmlf_split_reads_the_parts_and_counts_what_does_not_match(tmp_path):
    posts = [data.Post("single", str(i), Path(), "", i % 3) for i in range(30)]
    odd = [replace(post, label=0) for post in posts[:3]] + posts[3:]  # 1 and 2 have other labels
    entries = [(str(i), i % 3) for i in range(28)] + [("999", 0)]
    root = tmp_path / "single and multiple"  # its own name is no hint
    write_split(root / "MVSA-Single/10-flod-1", entries[:20], entries[20:24], entries[24:])
    write_split(root / "MVSA-multiple/10-flod-1", entries[:20], [], entries[20:])
    for given, label in ((posts, 0), (odd[:2] + posts[2:], 1)):  # 1 of 28 is below 5 %
        parts, counts = data.clmlf_split(root, given)
        assert [part.tolist() for part in parts] == [list(range(20)), [20, 21, 22, 23], [24, 25, 26, 27]]
        assert counts == {"listed, but not among the posts": 1, "not listed, so not used": 2,
                          "labelled otherwise there": label, "listed twice": 0}
    write_split(tmp_path / "twice", entries[:20], entries[20:24], entries[23:])
    for folder, given in ((root, odd), (tmp_path / "twice", posts), (root / "MVSA-multiple", posts)):
        with pytest.raises(UserError, match="is not a split of MVSA-single"):
            data.clmlf_split(folder, given)
    shutil.copytree(root / "MVSA-Single", root / "single too")
    with pytest.raises(UserError, match="looked for one train.json of MVSA-single,.* found 2"):
        data.clmlf_split(root, posts)


def test_duplicate_groups_join_posts_of_the_same_words_or_image(tmp_path):
    texts = ["first", "Good day! http://t.co/x", "RT @someone: good DAY", "@me good day", "something",
             "http://t.co/a", "@you http://t.co/b", "else", "good day"]
    posts = [data.Post("single", "", tmp_path / f"{i}.jpg", text, 0) for i, text in enumerate(texts)]
    for post, image in zip(posts, [0, 1, 2, 3, 4, 5, 6, 4, 0]):
        post.image.write_bytes(b"image %d" % image)
    assert list(data.duplicate_groups(posts)) == [0, 0, 0, 0, 4, 5, 6, 4, 0]  # the last is a link
    assert data.repeats(posts, [0, 1, 4], [2, 5, 7], [8, 6]) == [
        [("words", 2), ("image", 7)], [("image", 8), ("words", 8)]]


LABEL_ROWS = [("ID", "\ttext,image"), ("", ""), ("0", "\tnegative, positive"), ("1", "\tneutral,NEGATIVE"),
              ("2", "\tpositive ,Neutral"), ("", "")]
GOOD_LABELS = [newline.join(first + n * pair for first, pair in LABEL_ROWS).encode(code)
               for n in (1, 3) for newline in ("\n", "\r\n", "\r") for code in ("utf-8", "utf-8-sig")]
GOOD_CAPTIONS = [caption_file([(i, f"{i}.jpg") for i in range(3)], [(i, "red bars") for i in range(3)])]
PIECES = (b"", b"7", b"true", b"1e3", b"\xef\xbb\xbf", b"\x0b", b"\xc2\x85", b"\xff", b"[" * 9999)


def check_labels(content):
    """Fails if the file should have been refused, or a line of it is not in the result."""
    file = SimpleNamespace(is_file=lambda: True, read_bytes=lambda: content)  # without a disk
    kind, labels, skipped = data.read_labels(file)
    header, *lines = [line for line in re.split("\r\n|\r|\n", content.decode("utf-8-sig")) if line.strip()]
    columns, word = {"single": 1, "multi": 3}[kind], r"\s*(?:positive|neutral|negative)\s*"
    line = re.compile(rf"\s*(\S(?:[^\t]*\S)?)\s*" + rf"\t{word},{word}" * columns, re.IGNORECASE)
    assert header.count("\t") == columns
    assert sorted(line.fullmatch(each)[1] for each in lines) == sorted({*labels, *skipped})


def check_captions(content):
    files, captions = data.parse_captions(content, "captions.json")
    parsed = json.loads(content)
    assert len(set(files.values())) == len(parsed["images"]) and {*map(type, (*files, *captions))} <= {int}
    assert sorted(files.items()) == sorted((image["id"], image["file_name"]) for image in parsed["images"])
    pairs = sorted((note["image_id"], note["caption"].strip()) for note in parsed["annotations"])
    assert sorted((i, text) for i, texts in captions.items() for text in texts) == pairs


@pytest.mark.parametrize("good, check", [(GOOD_LABELS, check_labels), (GOOD_CAPTIONS, check_captions)])
def test_fuzzed_files_give_a_user_error_or_what_they_say(good, check):
    rng, refused = fresh_rng(), 0
    for case in range(10000):
        tokens = re.findall(rb"[a-z]+|\d+|[^a-z\d]", good[rng.integers(len(good))])
        words = [i for i, token in enumerate(tokens) if token.isalnum()]
        if case % 2:  # a word or number for another
            at, other = rng.choice(words, 2)
            tokens[at] = tokens[other]
        for at in rng.integers(len(tokens), size=case % 10 // 4):  # each fifth is left as it is
            tokens[at:at + rng.integers(3)] = [PIECES[rng.integers(len(PIECES))]]
        try:
            check(b"".join(tokens))
        except UserError:
            refused += 1
            assert case % 10 not in (0, 2), tokens
    assert 1500 < refused < 8500


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
PRETRAINED, CONCAT = "TI-JEPA, pretrained", "text + image concatenated"
ROWS = sum(finetune_mvsa.ROWS.values(), ())


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
    posts, _ = data.load_mvsa(toy / "mvsa" / "MVSA_Single")
    cache = data.FeatureCache(MVSA_CACHE, [(post.image, [post.text]) for post in posts], net, 1)
    features = finetune_mvsa.extract_features(net, cache, [0])
    y = np.array([posts[i].label for i in cache.readable])
    return SimpleNamespace(net=net, posts=posts, cache=cache, features=features, y=y,
                           split=data.stratified_split(y, 0))


def tune(single, epochs, split):
    """-> (the fine-tuned classifier, its choice, the classifier that it starts as, the probe)"""
    *parts, _ = split
    probe, choice = finetune_mvsa.fit_probe(single.features[PRETRAINED], single.y, *parts)
    given = single.net, single.net.target_encoder, probe
    tuned = finetune_mvsa.finetune(*given, choice, single.cache, single.y, *parts, epochs, 0)
    return *tuned, finetune_mvsa.Classifier(*given), probe


def test_nothing_that_is_chosen_or_trained_sees_a_test_label(single):
    train, validation, test = single.split
    args = finetune_mvsa.parse_args(["--finetune_epochs", "1"])

    def learn(changed):
        y = single.y.copy()
        y[changed] = (y[changed] + 1) % 3
        given = single.net, single.cache, single.features, y, single.split, 0, {}, Counter(), args
        return tuple(finetune_mvsa.predict_rows(*given).values())

    found, choices = learn(test[:0])
    assert tuple(found) == ROWS and learn(test) == (found, choices)
    others, _ = learn(train)  # but the labels that it is to learn from do matter
    assert all(others[row] != found[row] for row in ROWS)
    assert learn(validation)[1] != choices
    with pytest.raises(UserError, match="all training posts are positive: a head needs two labels"):
        finetune_mvsa.fit_probe(single.features[PRETRAINED], single.y * 0, train, validation)


@pytest.mark.parametrize("missing", [-1, 1])
def test_the_probe_is_scikit_learns_logistic_regression(monkeypatch, missing):
    rng, fits, grid = np.random.default_rng(15), [], finetune_mvsa.REGULARISATION
    x = (rng.normal(size=(300, 20)) * rng.uniform(0.1, 5, 20) + rng.normal(size=20)).astype(np.float32)
    standard = StandardScaler().fit_transform(x[:, :3])
    y = (standard + rng.gumbel(size=(300, 3)) + [1, 0, -1]).argmax(1)  # of 200, none of the three is missing
    x[:, 18] *= 1e-8  # a tiny feature is as good as another
    x[:, 19] = 0.3  # one that never changes
    train, validation = np.flatnonzero(y[:200] != missing), np.arange(200, 250)
    scaled = StandardScaler().fit(x[train]).transform(x).astype(float)
    for kind in (None, "balanced"):
        for c in grid:
            single_c = 2 * c if missing >= 0 else c  # of two classes scikit-learn has one vector of weights
            exact = LogisticRegression(C=single_c, class_weight=kind, tol=1e-8, max_iter=9999)
            exact.fit(scaled[train], y[train])
            expected = np.zeros((300, 3))
            expected[:, exact.classes_] = exact.predict_proba(scaled)
            accuracy = accuracy_score(y[validation], expected[validation].argmax(1))
            learnt = accuracy_score(y[train], expected[train].argmax(1))
            with monkeypatch.context() as patch:
                patch.setattr(finetune_mvsa, "REGULARISATION", (c,))
                patch.setattr(finetune_mvsa, "max", lambda heads, key: heads[bool(kind)], raising=False)
                head, choice = finetune_mvsa.fit_probe(x, y, train, validation)
            assert np.allclose(finetune_mvsa.probabilities_of(head, x), expected, atol=2e-3)
            loss = -np.log(expected[validation, y[validation]].clip(1e-7)).mean()
            fits.append((accuracy, -loss, learnt, c, bool(kind)))
            near = pytest.approx(accuracy, abs=0.021), pytest.approx(loss, abs=2e-2)
            assert choice == {"C": c, "balanced": bool(kind), "validation": near[0], "loss": near[1]}
    choice = finetune_mvsa.fit_probe(x, y, train, validation)[1]
    assert choice["validation"] == pytest.approx(max(fits)[0], abs=0.021)
    if missing < 0:  # of this seed's data the choice is the middle C, of 0.08 more; by others it is another
        assert (choice["C"], choice["balanced"]) == max(fits)[3:] == (1e-2, False)
        assert 1e-2 not in [max(fits, key=lambda one: one[rule])[3] for rule in (1, 2)]  # loss; training


@pytest.mark.parametrize("precision, missing", [("float32", -1), ("bfloat16", 0), ("float16", 2)])
def test_fine_tuning_starts_as_the_probe_and_trains_all(single, monkeypatch, precision, missing):
    """Also where no post to learn from has one of the labels: it stays impossible."""
    scaler, scaled, losses, found = torch.amp.GradScaler, [], iter(range(99, 0, -1)), []
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda device, enabled: scaled.append(enabled) or scaler(device, enabled=enabled))
    monkeypatch.setattr(finetune_mvsa, "validate", lambda *rest: {"validation": 0, "loss": next(losses)})
    monkeypatch.setattr(finetune_mvsa, "LEARNING_RATES", (1e-3,))
    before = model.hash_weights(single.net.target_encoder)
    split = [part[single.y[part] != missing] for part in single.split]
    for dtype in ("float32", precision):
        monkeypatch.setattr(single.net, "dtype", getattr(torch, dtype))
        tuned, _, start, probe = tune(single, 6, split)
        found += [finetune_mvsa.predict(one, single.cache, split[0]) for one in (start, tuned)]
        assert not any(torch.equal(p, start.get_parameter(name)) for name, p in tuned.named_parameters())
        assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert scaled == [False, precision == "float16"]
    expected = finetune_mvsa.probabilities_of(probe, single.features[PRETRAINED][split[0]])
    assert np.allclose(found[0], expected, atol=1e-4)
    said = [one[range(len(one)), single.y[split[0]]].mean() for one in found]  # of the true labels
    assert said[1] > said[0] + 0.09
    assert abs(found[1] - found[0]).mean() > 0.1  # what is learnt is much more than the precisions differ by
    assert abs(found[3] - found[1]).mean() < 0.01 and (precision == "float32") == np.array_equal(*found[::2])
    assert missing < 0 or max(one[:, missing].max() for one in (expected, *found)) < 1e-9
    assert model.hash_weights(single.net.target_encoder) == before  # the checkpoint's own is not trained


@pytest.mark.parametrize("losses, kept", [
    ([1.0, 0.9, 0.8, 0.85, 0.95, 0.7, 0.6, 0.65], (5e-4, 3, 0.6)),  # each rate until its first worse epoch
    ([1.0, 0.7, 0.6, 0.5, 0.4, 0.9, 1.0], (1e-4, 4, 0.4)),  # the first rate's is the best of both
    ([1.0, 1.1, 1.2], (None, 0, 1.0))])  # both make it worse: the probe itself
def test_the_best_epoch_on_validation_is_kept(single, monkeypatch, losses, kept):
    left = 6 * losses[:1] + losses[1:]  # the probe's is of one of the six in the grid
    monkeypatch.setattr(finetune_mvsa, "BATCH", 99)  # an epoch is one step, which adds 1 to the head's bias
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda one: one.param_groups[0]["params"][-1].data.add_(1))
    (train, validation, _), gather, steps = single.split, model.gather, []

    def validate(probabilities, y):
        assert len(probabilities) == len(y) and np.array_equal(y, single.y[validation])
        return {"validation": 0, "loss": left.pop(0)}

    def note(s_image, drawn):
        steps.append((s_image[:, 0, 0].tolist(), drawn.tolist()))
        return gather(s_image, drawn)

    monkeypatch.setattr(finetune_mvsa, "validate", validate)
    monkeypatch.setattr(model, "gather", note)
    tuned, choice, start, _ = tune(single, 4, single.split)
    assert (choice["lr"], choice["epoch"], choice["loss"]) == kept and not left
    assert torch.allclose(tuned.head.bias, start.head.bias + kept[1])
    posts = single.cache.rows("image.f16", single.cache.readable[train])[:, 0, 0].tolist()
    for order, drawn in steps:  # the posts to train on, each with 9 of its 36 patches
        assert sorted(order) == sorted(posts) and {len(set(patches)) for patches in drawn} == {9}
    if kept[1] > 1:  # of one learning rate, two epochs at least: others, in another order
        (order, drawn), (other, others) = steps[:2]
        assert order != other and len({tuple(patches) for patches in drawn + others}) > 90
        assert set(sum(drawn, [])) == set(range(36))


def test_each_row_has_the_features_that_it_is_named_after(single):
    net, transform = single.net, data.image_transform(single.net.image_encoder.data_config)
    posts = [replace(post, text=" ".join(post.text.split()[:length]))  # of other lengths: some is padded
             for post, length in zip(single.posts, (8, 1, 3))]
    cache = data.FeatureCache(MVSA_CACHE, [(post.image, [post.text]) for post in posts], net, 1)
    found = finetune_mvsa.extract_features(net, cache, [0, 5])
    fresh = {seed: finetune_mvsa.untrained(net, seed) for seed in (0, 5)}
    torch.manual_seed(0)  # the start of a run of seed 0
    start = model.TIJEPA(net.config, (net.image_encoder, net.text_encoder)).context_encoder
    weights = map(model.hash_weights, (*fresh.values(), start, net.context_encoder, net.target_encoder))
    assert len(set(weights)) == 5
    assert model.hash_weights(fresh[0]) == model.hash_weights(finetune_mvsa.untrained(net, 0))
    X, target = net.context_encoder, net.target_encoder
    no_image, *no_text = net.frozen(torch.zeros(1, 3, 48, 48), [""])  # the mean colour; no words
    for n, post in enumerate(posts):
        s_image, *text = net.frozen(transform(data.read_image(post.image))[None], [post.text])
        tokens = {"text only": text[0], "image only": s_image, PRETRAINED: target(s_image, *text),
                  **{("TI-JEPA, X~ untrained", seed): fresh[seed](s_image, *text) for seed in fresh},
                  "TI-JEPA, X in place of X~": X(s_image, *text),
                  "TI-JEPA, pretrained, text alone": target(no_image, *text),
                  "TI-JEPA, pretrained, image alone": target(s_image, *no_text)}
        by_hand = {row: states[0].mean(0).detach().numpy() for row, states in tokens.items()}
        both = np.hstack([by_hand["text only"], by_hand["image only"]])
        by_hand |= {CONCAT: both, f"{PRETRAINED} + concatenated": np.hstack([by_hand[PRETRAINED], both])}
        assert found.keys() == by_hand.keys()
        for row, features in by_hand.items():  # the rows' differ by 1 and more, float16's by 0.003
            assert np.allclose(found[row][n], features, atol=0.02), row


def test_each_row_is_learnt_from_its_own_features_and_encoder(single, monkeypatch):
    """A probe is here the name of the features that it was fitted on, and features are their row's name."""
    net, untrained, tuned = single.net, "TI-JEPA, X~ untrained", ", fine-tuned"
    names = {key: "{} {}".format(*key) if key[0] == untrained else key
             for key in (*single.features, (untrained, 5))}
    features = {key: np.array(60 * [name]) for key, name in names.items()}
    y = np.array(15 * [0] + 15 * [1] + 20 * [2] + 10 * [0])
    split = np.arange(15, 60), np.arange(5), np.arange(5, 15)
    fit = Mock(side_effect=lambda x, *rest: (x[0], {"probe": x[0]}))
    tune = Mock(side_effect=lambda net, encoder, head, choice, *rest: (
        f"{head}, then {model.hash_weights(encoder)}", choice))
    for name, stand_in in (("fit_probe", fit), ("finetune", tune),
                           ("probabilities_of", lambda head, x: np.append(x, head)),
                           ("predict", lambda classifier, cache, part: np.array([classifier, *part]))):
        monkeypatch.setattr(finetune_mvsa, name, stand_in)
    probes, args = {}, finetune_mvsa.parse_args(["--finetune_epochs", "7"])
    for seed in (0, 5):
        given = net, None, features, y, split, seed, probes, Counter(), args
        found = finetune_mvsa.predict_rows(*given)
        encoders = {PRETRAINED: net.target_encoder, "TI-JEPA, X in place of X~": net.context_encoder,
                    untrained: finetune_mvsa.untrained(net, seed)}
        expected = {"majority class": 10 * [[0, 0, 1]]}  # of the training posts; of all, it is positive
        for row in ROWS[1:]:
            start = row.removesuffix(tuned)
            name = f"{start} {seed}" if start == untrained else start
            expected[row] = 11 * [name] if row == start else [
                f"{name}, then {model.hash_weights(encoders[start])}", *map(str, range(5, 15))]
            assert found["choices"][row] == {"probe": name}
        assert found["probabilities"] == expected and tune.call_args.args[-2:] == (7, seed)
    assert fit.call_count == 10  # both seeds share the probes, but for the untrained encoder's
    for mode, rows in finetune_mvsa.ROWS.items():
        args.mode = [mode]
        assert tuple(finetune_mvsa.predict_rows(*given)["probabilities"]) == rows


def test_bootstrap_resamples_posts_by_hand():
    each = np.tile(np.arange(200), 2)  # two seeds
    new, old = each % 4 != 0, each % 2 == 0
    difference, low, high = finetune_mvsa.bootstrap(new * 1.0 - old, each)
    assert difference == pytest.approx(25)  # right in 150 against 100 of 200
    # gains of +1 (100 posts), 0 (50), -1 (50), the same in both seeds: the deviation of their mean
    deviation = 100 * (((100 * 0.75 ** 2 + 50 * 0.25 ** 2 + 50 * 1.25 ** 2) / 200) / 200) ** 0.5
    assert [low - 25, high - 25] == pytest.approx([-1.96 * deviation, 1.96 * deviation], abs=1.5)
    assert finetune_mvsa.bootstrap(new * 1.0 - new, each) == [0, 0, 0]


def recompute(folder, ending=""):
    """-> the sets of results.json, the lines of predictions.csv. Each score comes out of them by sklearn."""
    results, groups = json.loads((folder / f"results{ending}.json").read_text()), {}
    lines = list(csv.DictReader(io.StringIO((folder / f"predictions{ending}.csv").read_text())))
    for line in lines:
        groups.setdefault((line["set"], line["row"], line["seed"]), []).append(line)
        probabilities = [float(line[name]) for name in data.LABELS]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert probabilities[data.LABELS.index(line["prediction"])] == max(probabilities)
    for kind, found in results["sets"].items():
        for row, scores in found["scores"].items():
            confusion, sizes = 0, []
            for n, seed in enumerate(results["seeds"]):
                mine = groups.pop((kind, row, str(seed)))
                sizes.append(len({line["id"] for line in mine}))
                y, p = ([line[key] for line in mine] for key in ("label", "prediction"))
                expected = classification_report(y, p, output_dict=True, zero_division=0)
                assert scores["accuracy"][n] == pytest.approx(100 * expected["accuracy"])
                for average in ("weighted", "macro"):
                    f1 = 100 * expected[f"{average} avg"]["f1-score"]
                    assert scores[f"{average} F1"][n] == pytest.approx(f1)
                for name in data.LABELS:
                    by_hand = expected.get(name, Counter())  # Counter: 0 for a class that is not there
                    for key in ("precision", "recall", "f1-score"):
                        figures = scores["classes"][name][key.replace("f1-score", "F1")]
                        assert figures[n] == pytest.approx(100 * by_hand[key])
                confusion += confusion_matrix(y, p, labels=data.LABELS)
            assert scores["confusion"] == confusion.tolist() and confusion.sum() == sum(sizes) > 0
        for name, (difference, low, high) in found["differences"].items():
            new, old = (found["scores"][row]["accuracy"] for row in name.split(" minus "))
            assert difference == pytest.approx(np.average(np.subtract(new, old), weights=sizes))
            assert low <= difference <= high
    assert not groups  # nothing else is in there
    return results["sets"], lines


@pytest.mark.parametrize("protocol", ["standard", "grouped", "authors"])
def test_finetune_end_to_end(toy, pretrained, tmp_path, protocol):
    mvsa, ending = shutil.copytree(toy / "mvsa", tmp_path / "mvsa"), f"_{protocol}" * (protocol != "standard")
    posts, _ = data.load_mvsa(mvsa / "MVSA_Single")
    pairs = list(zip(posts[:40:2], posts[1:40:2]))
    for one, other in pairs:  # pictures that are there twice
        shutil.copy(one.image, other.image)
    modes = ["probe", "finetune"] if protocol == "standard" else ["probe"]
    options = ["--mvsa", mvsa, "--out", tmp_path, "--protocol", protocol, "--mode", *modes]
    done = judge_mvsa(pretrained.out, *options)
    sets, lines = recompute(tmp_path, ending)
    rows = [row for mode in modes for row in finetune_mvsa.ROWS[mode]]
    for (kind, found), count in zip(sets.items(), (60, 120)):
        posts, skipped = data.load_mvsa(data.find_mvsa(mvsa)[kind])
        labels = {post.id: data.LABELS[post.label] for post in posts}
        assert all(line["label"] == labels[line["id"]] for line in lines if line["set"] == kind)
        assert found["posts"] == sum(found["labels"].values()) == count
        assert found["skipped"] == {**skipped, "unreadable image": 1}
        sizes = found["split_sizes"]
        assert sizes[1:] == [18, 18] if protocol == "authors" else sum(sizes) == count
        assert list(found["scores"]) == rows and len(found["differences"]) == 1 + 2 * len(modes)
        assert len(set(found["split_hash"].values())) == 2
    assert (sets["single"]["split_hash"] == sets["multi"]["split_hash"]) == (protocol == "authors")
    if protocol == "grouped":
        assert "groups of repeated posts" in done.out and sets["single"]["split_notes"]["posts in them"] == 40
        tested = {(line["seed"], line["id"]) for line in lines if line["set"] == "single"}
        assert all(((s, a.id) in tested) == ((s, b.id) in tested) for a, b in pairs for s in "01")
    results = json.loads((tmp_path / f"results{ending}.json").read_text())
    table = (tmp_path / f"results{ending}.md").read_text()
    assert set(results["versions"]) == {"python", "torch", "timm", "transformers", "sklearn", "numpy"}
    assert len(results["code"].rstrip("+")) == 40 or results["code"] == "none"
    assert table in done.out and "not the paper's" in table and f"features: {MVSA_CACHE}/" in done.out
    parts = re.split("## MVSA-(?:Single|Multi)\n", table)[1:]
    for found, part, reported in zip(sets.values(), parts, ("76.75 | 74.62", "77.55 | 75.02"), strict=True):
        shown = [["features", "accuracy", "weighted F1", "macro F1"]]
        for row, scores in found["scores"].items():
            figures = [scores[name] for name in shown[0][1:]]
            shown.append([row, *(f"{np.mean(ones):.2f} ± {np.std(ones, ddof=1):.2f}" for ones in figures)])
        shown += [[name, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}"]
                  for name, (gain, low, high) in found["differences"].items()]
        measures = ["precision", "recall", "F1"]
        shown.append(["true \\ predicted", *data.LABELS, *measures])
        for label, counts in zip(data.LABELS, scores["confusion"]):  # of the last row
            means = [f"{np.mean(scores['classes'][label][name]):.1f}" for name in measures]
            shown.append([label, *map(str, counts), *means])
        assert all(part.count(f"| {' | '.join(cells)} |\n") == 1 for cells in shown)
        assert f"not measured here | {reported} | – |" in part
    assert Image.open(tmp_path / f"confusion{ending}.png").size == (800, 360)
    with data.locked(tmp_path):
        assert f"another run writes to {tmp_path}" in judge_mvsa(pretrained.out, *options, code=2).err


def test_scores_of_a_pool_are_those_of_each_sets_own_posts(toy, pretrained, tmp_path, monkeypatch):
    """One row is always right, the other never."""
    def predict(net, cache, features, y, split, *rest):
        right = np.eye(3)[y[split[2]]]
        assert len(set(np.bincount(y[split[0]]))) == 1  # the authors' way: classes are made equal
        rows = {PRETRAINED: right, CONCAT: np.roll(right, 1, axis=1)}
        return {"probabilities": {row: values.tolist() for row, values in rows.items()}, "choices": {}}

    monkeypatch.setattr(finetune_mvsa, "predict_rows", predict)
    monkeypatch.setattr(finetune_mvsa, "extract_features", lambda *given: {})
    judge_mvsa(pretrained.out, "--mvsa", toy / "mvsa", "--out", tmp_path, "--protocol", "authors")
    sets, lines = recompute(tmp_path, "_authors")
    for found in sets.values():
        assert [found["scores"][row]["accuracy"] for row in found["scores"]] == [[100, 100], [0, 0]]
        assert found["differences"] == {f"{PRETRAINED} minus {CONCAT}": [100, 100, 100]}
    assert len(lines) == 2 * 2 * 18 and {line["set"] for line in lines} == {"single", "multi"}


def test_the_encoders_and_the_device_are_those_that_the_options_name(toy, monkeypatch):
    asked = Mock(side_effect=UserError("not there"))
    monkeypatch.setattr(model.TIJEPA, "from_checkpoint", asked)
    options = ["--mvsa", toy / "mvsa", "--checkpoint", "a", "--image_weights", "b", "--text_encoder", "c"]
    call(finetune_mvsa, *options, code=2)
    asked.assert_called_once_with("a", "b", "c")
    assert "--device gpu cannot be had" in call(finetune_mvsa, *options, "--device", "gpu", code=2).err


@pytest.fixture(scope="module")
def judged_once(toy, pretrained, tmp_path_factory):
    root = tmp_path_factory.mktemp("judged")
    shutil.copy(pretrained.checkpoint, root)
    shutil.copytree(toy / "mvsa" / "MVSA_Single", root / "mvsa")
    posts = data.load_mvsa(root / "mvsa")[0][:-1]  # the last one's picture is broken
    listed = [(post.id, post.label) for post in posts]
    write_split(root / "single", listed[:40], listed[40:50], listed[50:])
    for post, words in zip(posts[50:53], ("RT @you {}!", "{} http://t.co/1", "#{}")):  # tested, and repeats
        post.image.with_suffix(".txt").write_text(words.format(posts[7].text))
    shutil.copy(posts[3].image, posts[52].image)
    judge_mvsa(root, "--split", root / "single")
    sets, lines = recompute(root / "out")
    found, table = sets["single"], (root / "out" / "results.md").read_text()
    assert list(sets) == ["single"] and found["split_sizes"] == [40, 10, 10]
    assert {line["id"] for line in lines} == {post.id for post in posts[50:]}
    assert found["split_notes"]["test posts with the words of a training post"] == 3
    assert found["split_notes"]["test posts with the image of a training post"] == 1
    new = {post.id for post in posts[53:]}
    right = [100 * np.mean([line["label"] == line["prediction"] for line in lines if line["id"] in new
                            and (line["row"], line["seed"]) == (PRETRAINED, seed)]) for seed in "01"]
    assert found["scores"][PRETRAINED]["accuracy without repeats"] == pytest.approx(right)
    assert "| accuracy without repeats |" in table and f"Not measured: no MVSA-Multi in {root}" in table
    return root


def relabel(root):
    path = root / "mvsa" / "labelResultAll.txt"
    path.write_text(re.sub("(?m)^77\t.*", "77\tpositive,positive", path.read_text()))


KEPT = "out/predictions/standard-single-{}.json".format
BETWEEN = {  # what changes between two runs: (how, options of the second, seeds that they compute again)
    "--finetune_epochs": (lambda root: None, "--finetune_epochs 2", [0, 1]),
    "--mode": (lambda root: None, "--mode finetune", [0, 1]),
    "--dtype": (lambda root: None, "--dtype bfloat16", [0, 1]),
    "a tested label": (relabel, "", [0, 1]),
    "the checkpoint": (lambda root: spoil(
        root, lambda c: c["model"]["target_encoder"]["blocks.0.mlp.2.weight"].mul_(-2)), "", [0, 1]),
    "the split": (lambda root: None, "--split=", [0, 1]),
    "a file is another's": (lambda root: shutil.copy(root / KEPT(1), root / KEPT(0)), "", [0]),
    "a file is cut off": (lambda root: os.truncate(root / KEPT(1), 999), "", [1]),
    "Ctrl-C in the last of three": (lambda root: judge_mvsa(
        root, "--split", root / "single", "--seeds", 0, 1, 2, code=130), "--seeds 2 0 1", [2, 2]),
    "time and place": (lambda root: [os.utime(path) for path in root.rglob("*")], "", [])}


@pytest.mark.parametrize("what", BETWEEN)
def test_kept_predictions_are_never_of_something_else(judged_once, tmp_path, monkeypatch, what):
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
        assert recompute(judged / "out") == recompute(judged / "fresh")


def test_ablation_table_is_made_from_the_runs_files(tmp_path):
    for variant, seed, auc in (("plain", 0, 0.5), ("plain", 1, 0.7), ("image", 0, 1.0)):
        out = tmp_path / f"{variant}-{seed}"
        out.mkdir()
        (out / "log.jsonl").write_text('{"loss": 9, "step": 3}\n{"loss": 0.25, "step": 6}\n')
        judged = dict(energy_matched=0.1, energy_position=0.4, auc=auc, target_std=0.5, target_rank=7, step=6)
        (out / "eval.json").write_text(json.dumps(judged))
        single, multi = ({"accuracy": [n + 10 * seed, n + 10 * seed + 2]} for n in (60, 70))
        sets = {"single": {"scores": dict.fromkeys(finetune_mvsa.ROWS["probe"], single)},
                "multi": {"scores": dict.fromkeys(ROWS, multi)}}
        (out / "results.json").write_text(json.dumps({"sets": sets, "step": 6}))
    done = call(finetune_mvsa, "--ablate", tmp_path)
    assert (tmp_path / "results.md").read_text() in done.out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines() if line]
    assert lines[0][8:] == ["X, MVSA-Multi", "X, MVSA-Single", "X~ fine-tuned, MVSA-Multi", "X~, MVSA-Multi",
                            "X~, MVSA-Single"]
    table = {name: cells for name, *cells in lines[2:]}
    assert table["plain"] == ["2", "0.250 ± 0.000", "0.100 ± 0.000", "0.400 ± 0.000", "0.600 ± 0.141",
                              "0.500 ± 0.000", "7.000 ± 0.000",
                              *(f"{mean}.0 ± 7.1" for mean in (76, 66, 76, 76, 66))]
    assert table["image"][:3] == ["1", "0.250", "0.100"]  # one run has no deviation
    assert table["*untrained*"] == ["3", *8 * [""], *("74.3 ± 5.8", "74.3 ± 5.8", "64.3 ± 5.8")]
    assert table["*text + image concatenated*"][-2:] == ["74.3 ± 5.8", "64.3 ± 5.8"]
    for file, text in (("results.json", "[]"), ("log.jsonl", '{"loss": 9, "step": 3}')):
        (out / file).write_text(text)
        assert f"{out} is no finished run" in call(finetune_mvsa, "--ablate", tmp_path, code=2).err


def test_the_readmes_blocks_run(pretrained, toy, tmp_path, monkeypatch):
    pairs, own = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(pairs, {})
    files, captions = data.parse_captions(Path(CAPTIONS).read_bytes(), "")
    assert files == {0: "a.jpg", 1: "b.jpg"} and captions == {0: ["a red dog"], 1: ["two cats"]}
    names = {}
    places = {"out/toy/checkpoint.pt": pretrained.checkpoint, "data/toy": toy}
    exec(re.sub("|".join(places), lambda found: str(places[found[0]]), own), names)
    words = {word for group in (*(names for _, names in data.COLOURS), *data.PATTERNS) for word in group}
    assert all(word in words for caption in names["captions"] for word in caption.split())  # the toy's own
    assert names["energies"].shape == (2,) and names["logits"].shape == (2, 10)
    names["logits"].sum().backward()
    assert names["net"].predictor.mask_token.grad is None


def test_make_names_the_packages_that_are_missing_and_installs_once(tmp_path):
    make = ["make", "-s", "-f", HERE / "Makefile", "packages"]
    for venv, text, says in (("", "numpy>=1\n", ""), ("a b", "numpy>=1\n", "VENV cannot have a space"),
                             ("", "torch>=99\nno-such>=1\n", "lacks torch>=99, no-such>=1;")):
        (tmp_path / "requirements.txt").write_text(text)
        done = execute(*make, f"VENV={venv}", f"PYTHON3={sys.executable}", cwd=tmp_path)
        assert says in done.stderr and done.returncode == (2 if says else 0)
    # A venv whose python only notes that it was asked to install
    (tmp_path / "python").write_text(f'''#!/bin/sh
        [ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"
        mkdir -p $3/bin; printf '#!/bin/sh\nsleep 1; echo "$*" >> {tmp_path}/log\n' > $3/bin/python
        chmod +x $3/bin/python''')
    (tmp_path / "python").chmod(0o755)
    both = [subprocess.Popen([*make, f"PYTHON3={tmp_path}/python"], cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "log").read_text().count("pip install") == 1


def make(words):
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # of make test
    return execute("make", *words.split(), cwd=HERE, env=env)


def planned(words):
    """The runs of both scripts that make would start -> [(what it is, python's options, the script's)]."""
    found = []
    for command in re.split(r" && | \|\| |\n", make(f"-n VENV= {words}").stdout):
        run = re.match(r'"python3" (.*?) ?\b(pretrain|finetune_mvsa)\.py ([^>]*)', command)
        if run:
            options = vars(sys.modules[run[2]].parse_args(shlex.split(run[3])))
            stage = next((name for name in ("bench", "eval", "protocol") if options.get(name)), "train")
            found.append((options["protocol"] if stage == "protocol" else stage, run[1], options))
    return found


EACH = "train.{0} eval.{0} standard.{0}".format
PASSED_ON = {  # a variable of make reproduce: all that it changes; to its value, where no other is said
    "DEVICE=cpu": EACH("device"), "DTYPE=bfloat16": EACH("dtype"), "CACHE=/x": EACH("cache"),
    "IMAGE_WEIGHTS=/x": EACH("image_weights"), "TEXT_ENCODER=/x": EACH("text_encoder"),
    "IMAGE_ENCODER=vit": "train.image_encoder", "EPOCHS=7": "train.epochs", "TARGET=image": "train.target",
    "SEED=3": "train.seed", "ARGS=--lr=0.5": "train.lr=0.5",
    "GPUS=2": "train.by=-mtorch.distributed.run--nproc_per_node=2",
    "SPLIT=/x": "standard.split", "COCO=/x": "train.coco eval.coco", "MVSA=/x": "standard.mvsa",
    "OUT=/x": EACH("out") + " eval.eval=/x/checkpoint.pt standard.checkpoint=/x/checkpoint.pt"}


def test_make_passes_each_variable_on_to_the_commands_that_it_is_for():
    def plan(words):
        return {f"{stage}.{name}": str(value) for stage, python, options in planned(f"reproduce {words}")
                for name, value in {**options, "by": python.replace(" ", "")}.items()}

    tiny = "PRESET=tiny COCO=/c MVSA=/m"
    (_, _, train), (_, _, judge), (_, _, standard) = planned(f"reproduce {tiny}")
    assert train == vars(pretrain.parse_args("--preset tiny --coco /c --resume --out out/tiny".split()))
    assert judge == vars(pretrain.parse_args("--eval out/tiny/checkpoint.pt --coco /c".split()))
    assert standard == vars(finetune_mvsa.parse_args(
        "--checkpoint out/tiny/checkpoint.pt --mvsa /m --out out/tiny".split()))
    before = plan(tiny)
    for variable, expected in PASSED_ON.items():
        changed = {key: value for key, value in plan(f"{tiny} {variable}").items() if value != before[key]}
        pairs = (pair.partition("=") for pair in expected.split())
        assert changed == {key: value or variable.partition("=")[2] for key, _, value in pairs}, variable
    toy = planned("reproduce PRESET=toy SPLIT=/x")
    assert [(stage, options.get("mode"), options.get("split")) for stage, _, options in toy] == [
        ("train", None, None), ("eval", None, None), ("standard", ["probe", "finetune"], "/x"),
        ("grouped", ["probe"], ""), ("authors", ["probe"], "")]
    assert {options["cache"] for _, _, options in toy} == {"data/toy/cache"}
    assert planned(f"reproduce {tiny} PROTOCOLS=grouped")[2][0] == "grouped"
    (_, _, found), = planned("bench PRESET=tiny DEVICE=cpu DTYPE=float32 IMAGES=70")
    assert found == vars(pretrain.parse_args(
        "--bench --preset tiny --device cpu --dtype float32 --max_images 70".split()))
    once = '[ "out/tiny/eval.json" -nt "out/tiny/checkpoint.pt" ] || "python3" pretrain.py'
    assert once in make(f"-n reproduce VENV= {tiny}").stdout


def test_make_ablate_runs_each_variant_with_three_seeds():
    variants = {"plain": "", "image": "--target image", "vicreg": "--vicreg 1", "sigreg": "--sigreg 0.005",
                "no_ema": "--momentum 0 --final_momentum 0", "shuffled": "--shuffle_captions",
                "image_shuffled": "--target image --shuffle_captions"}
    expected = []
    for variant, options in variants.items():
        for seed in range(3):
            out, places = f"out/ablate/{variant}-{seed}", "--cache data/toy/cache --device cpu"
            coco, checkpoint = f"--coco data/toy/coco {places}", f"{out}/checkpoint.pt"
            train = f"{options} --seed {seed} --resume --out {out} {coco}"
            judge = f"--eval {checkpoint} {coco}"
            score = f"--checkpoint {checkpoint} --mvsa data/toy/mvsa --out {out} --seeds 0 1 2 --mode probe"
            expected += [pretrain.parse_args(train.split()), pretrain.parse_args(judge.split()),
                         finetune_mvsa.parse_args(f"{score} {places}".split())]
    # -B: as if no run were there. What is not the same for all is not taken over
    *runs, (_, _, last) = planned("-B ablate DEVICE=cpu TARGET=image SEED=9 EPOCHS=7 ARGS=--lr=1")
    assert [options for _, _, options in runs] == list(map(vars, expected))
    assert last == vars(finetune_mvsa.parse_args(["--ablate", "out/ablate"]))


def test_make_says_what_it_would_run_and_does_not_do_again_what_is_done(tmp_path):
    listed = {line.split()[1] for line in make("").stdout.splitlines()}
    assert listed == set("help reproduce pretrain picture ablate bench test coco weights clean".split())
    first = make("check-preset DEVICE=cpu COCO=/nowhere MVSA=/nowhere").stdout
    assert first.startswith("reproduce: preset toy, data data/toy/coco") and "NOT the paper's" in first
    small = make("check-preset PRESET=small COCO=/a MVSA=/b").stdout
    assert "preset small, data /a and /b" in small and "NOT" not in small
    assert make("check-preset PRESET=huge").returncode == 2
    for images, limit in (("", "10000"), ("IMAGES=7", "7"), ("IMAGES=all", "0")):
        assert f"--images {limit}\n" in make(f"-n coco VENV= {images or 'DEVICE=cpu'}").stdout
    for preset in ("small", "medium", "large"):  # what `make weights` fetched is used
        fetched = tmp_path / Path(timm.get_pretrained_cfg(model.PRESETS[preset].image_encoder).url).name
        fetched.touch()
        words = f"-n pretrain VENV= WEIGHTS={tmp_path} PRESET={preset}"
        assert f'--image_weights "{fetched}"' in make(words).stdout
        assert "--image_weights" not in make(f"{words} IMAGE_ENCODER=another").stdout
    places = f"COCO={tmp_path} MVSA={tmp_path} OUT={tmp_path} PY={tmp_path}/python"
    assert "preset small" in make(f"check-preset {places}").stdout  # both there: the paper's run
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\ncase "$*" in *$FAIL*) exit 1;; esac\n')
    (tmp_path / "python").chmod(0o755)  # it only says what it is asked for, and fails at FAIL
    for preset, fail, touched, expected in (
            ("toy", "grouped", "checkpoint.pt", "--resume --eval standard grouped"),
            ("toy", "nothing", "eval.json", "--resume standard grouped authors"),
            ("toy", "nothing", "checkpoint.pt", "--resume --eval standard grouped authors"),
            ("tiny", "nothing", "eval.json", "--resume standard")):
        (tmp_path / touched).touch()
        done = make(f"reproduce VENV= PRESET={preset} FAIL={fail} {places}")
        assert re.findall("--resume|--eval|standard|grouped|authors", done.stdout) == expected.split()
        assert done.returncode == (2 if fail == "grouped" else 0)


BAD = {  # a command and, after <, what its data file holds: words of the message
    **{f"{{train}} {option}": f"argument {option.split()[0]}" for option in (
        "--lr -1", "--lr 0", "--lr inf", "--lr nan", "--momentum 2", "--momentum nan", "--clip 0",
        "--epochs many", "--batch_size 0", "--batch_size 1.5", "--accumulate 0", "--held_out -1", "--seed -1",
        "--workers 0", "--log_every 0", "--target text", "--dtype float64")},
    "{train} --batch_size 33 --accumulate 1": "--batch_size 33 32 images",
    "{train} --sigreg 1": "--vicreg and --sigreg need the whole batch --accumulate 1",
    "{train} --accumulate 3": "--batch_size 16 --accumulate x processes (3 x 1)",
    "{train} --held_out 1": "--held_out 1 at least 2",
    "{train} --held_out 40": "--held_out 40 of 40 readable images",
    "{train} --epoch 3": "unrecognized arguments: --epoch",
    "{train} --bench --max_images 1": "--bench more images than --held_out",
    "{train} --eval a --image b --captions caf\udce9": "--captions encoding",
    "{train} --device cuda": "--device cuda --device auto",
    "{train} --image_encoder vit_tiny_patch16_224": "vit_tiny_patch16_224 --image_weights",
    "{train} --text_encoder some/bert": "some/bert --text_encoder PATH",
    "{train} --image_encoder vit_tiny_patch16_224 --image_weights a.txt": "--image_weights /a.txt vit_tiny",
    "{train} --out a.txt": "--out a.txt",
    "{train} --out /proc/x/y": "/proc/x cannot be written --out",
    "{train} --cache a.txt/cache": "--cache a.txt/cache",
    "{train} --captions red --eval checkpoint.pt": "--image --captions",
    "{train} --captions red --eval checkpoint.pt --image a.txt": "--image a.txt",
    "pretrain.py --coco {x} < {": "{x}/annotations/captions_train2017.json not a COCO caption file",
    'pretrain.py --coco {x} < {"images": [], "annotations": []}': "{x}/train2017 no image has a caption",
    "finetune_mvsa.py --mvsa {x} < ID\ttext\n": "{x}/labelResultAll.txt first line",
    "finetune_mvsa.py --mvsa {x} < \udcff": "labelResultAll.txt not the label file",
    "{judge} --mvsa {x} < GOOD": "no image of MVSA-Single {x} can be read",
    "{judge} --mvsa {x} < ID\ttext,image\n2\tneutral,neutral": "{x} 1 text or image file missing",
    "{judge} --mvsa {x} < GOOD2\tgood,neutral": "line 3 positive neutral",
    "{judge} --mvsa {x} < GOOD1\tneutral,neutral": "line 3 id 1 second time",
    "{judge} --text_encoder {x}/none": "{x}/none",
    "{judge} --split {x}": "--split {x} train.json",
    "{judge} --protocol grouped --split x": "--split standard protocol",
    "{judge} --protocol authors --mvsa {toy}/mvsa/MVSA_Single": "pools both sets",
    "finetune_mvsa.py --seeds 0 0": "--seeds 0 0 twice",
    "finetune_mvsa.py --ablate {x}": "--ablate {x} make ablate",
    "data.py check --coco {x}/none --mvsa {x}/none": "{x}/none/train2017 make coco mcrlab kaggle"}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_a_sentence_and_exit_code_2(command, toy, pretrained, tmp_path, monkeypatch):
    command_line, _, content = command.partition(" < ")
    held = content.replace("GOOD", "ID\ttext,image\n1\tpositive,positive\n")
    for name in ("a.txt", "train2017/1.jpg", CAPTIONS, "labelResultAll.txt", "data/1.jpg", "data/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(held, errors="surrogateescape")
    (tmp_path / "checkpoint.pt").symlink_to(pretrained.checkpoint)
    monkeypatch.chdir(tmp_path)
    train = " ".join(map(str, ("pretrain.py", *pretrained.options, "--out out")))
    judge = f"finetune_mvsa.py --checkpoint checkpoint.pt --mvsa {toy}/mvsa --out out --cache cache"
    script, *options = command_line.format(x=tmp_path, toy=toy, train=train, judge=judge).split()
    said = call(sys.modules[script.removesuffix(".py")], *options, code=2).err
    said = " ".join(said.split()).lower()
    assert "error:" in said and not Path("out", "checkpoint.pt").exists()
    assert all(word in said for word in BAD[command].format(x=tmp_path).lower().split()), said


def test_a_script_says_what_is_missing_in_a_process_of_its_own(tmp_path):
    done = execute(sys.executable, HERE / "finetune_mvsa.py", "--mvsa", "/nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: MVSA not found: looked for /nowhere")
