"""The tests, by values: `make test`. CPU only, no network; every file they need they write themselves."""
import contextlib
import csv
import errno
import io
import itertools
import json
import multiprocessing
import os
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
from transformers import AutoConfig, AutoModel

import data
import finetune_mvsa
import model
import pretrain
from model import UserError, generator_of, sample_masks

# tqdm shares its lock with forks: one that is killed while it holds it would stop all the others
os.register_at_fork(after_in_child=lambda: data.tqdm.set_lock(multiprocessing.RLock()))

HERE = Path(__file__).parent
WORDS = "a red dog on blue grass under the sky with two cats".split()
CONFIG = replace(model.PRESETS["toy"], dim=32, predictor_dim=32, vocabulary=WORDS)
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


@pytest.fixture
def images():
    return torch.randint(256, (3, 3, 48, 48), generator=generator_of(1), dtype=torch.uint8)


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


def test_sample_masks_is_a_function_of_seed_and_step_and_draws_for_each_image():
    first = sample_masks((14, 14), 8, 3, 5)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, sample_masks((14, 14), 8, 3, 5)))
    images = {tuple(image.flatten().tolist()) for seed in (0, 1, 2 ** 31 - 1) for step in range(5)
              for image in sample_masks((14, 14), 8, seed, step).target}
    assert len(images) == 3 * 5 * 8


def plain_block(block, x, text=None, text_mask=None):
    """What a block outputs, with its weights in PyTorch's own attention."""
    ours, (first, _, second) = block.attention, block.mlp
    attention = torch.nn.MultiheadAttention(x.shape[-1], ours.heads, batch_first=True)
    attention.in_proj_weight.data = torch.cat([ours.q.weight, ours.kv.weight])
    attention.in_proj_bias.data = torch.cat([ours.q.bias, ours.kv.bias])
    attention.out_proj = ours.proj
    query, padding = block.norm_attention(x), None if text_mask is None else ~text_mask
    memory = query if text is None else text
    x = x + attention(query, memory, memory, padding, need_weights=False)[0]
    return x + second(F.gelu(first(block.norm_mlp(x))))


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
    X, (s_image, s_text, text_mask) = randomize(net.context_encoder), net.frozen_features(images, TEXTS)
    x, text = X.image_proj(s_image), X.text_proj(s_text)
    for block in X.blocks:
        x = plain_block(block, x, text, text_mask)
    assert torch.allclose(X(s_image, s_text, text_mask), X.norm(x), atol=1e-5)
    assert all([type(layer).__name__ for layer in proj] == ["Linear", "LayerNorm"]
               for proj in (X.image_proj, X.text_proj))


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


def test_predictor_positions_encode_row_and_column():
    angles = np.arange(7)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    expected = [np.concatenate([waves[row], waves[column]]) for row in range(5) for column in range(7)]
    assert np.allclose(model.sincos_2d((5, 7), 16), expected, atol=1e-6)


@pytest.mark.parametrize("loss, target", [("mse", "ema"), ("smooth_l1", "ema"), ("mse", "image")])
def test_forward_predictor_and_patch_energy_equal_a_plain_loop(images, loss, target):
    """Each pair unpadded, X~ of all patches, all tokens of g: what is skipped or shared changes nothing."""
    torch.manual_seed(0)
    net = model.TIJEPA(replace(CONFIG, loss=loss, target=target))
    randomize(net.target_encoder)  # X~ must not be X, or a mix-up of the two would pass
    masks, g = sample_masks(net.grid, 3, 0), net.predictor
    out = net(net.frozen_features(images, TEXTS), masks)
    for b in range(3):
        s_image, *text = net.frozen_features(images[b:b + 1], TEXTS[b:b + 1])
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


def test_gradients_reach_x_and_the_predictor_only(net, images):
    net.train()(net.frozen_features(images, TEXTS), sample_masks(net.grid, 3, 0)).energy.mean().backward()
    for name, p in net.named_parameters():
        trained = name.startswith(("context_encoder", "predictor"))
        assert p.requires_grad == (p.grad is not None and bool(p.grad.any())) == trained, name
    in_training = {name.split(".")[0] for name, part in net.named_modules() if name and part.training}
    assert in_training == {"context_encoder", "predictor"}


def test_score_and_energy_matrix_are_the_energies_of_each_pair_wherever_it_stands(net, images):
    """Any leak from one pair to another would fake an AUC."""
    masks = [sample_masks(net.grid, 1, draw) for draw in range(3)]
    pairs = [net.frozen_features(images[i:i + 1], [text]) for i in range(3) for text in TEXTS]
    by_hand = [np.mean([net(pair, mask).energy.item() for mask in masks]) for pair in pairs]
    matrix = pretrain.energy_matrix(net, net.frozen_features(images, TEXTS), draws=3)
    assert matrix.flatten().tolist() == pytest.approx(by_hand, rel=1e-5) and matrix.shape == (3, 3)
    scores = net.score(images, TEXTS, draws=3)
    assert torch.allclose(scores, matrix.diagonal(), rtol=1e-5) and not scores.requires_grad


def test_encode_gives_the_target_encoders_tokens_and_their_mean(net, images):
    net.target_encoder.norm.weight.data.mul_(2)  # now X~ differs from X
    tokens, pooled = net.encode(images, TEXTS)
    assert torch.equal(tokens, net.target_encoder(net.image_encoder(images), *net.text_encoder(TEXTS)))
    assert tokens.shape == (3, 36, 32) and torch.allclose(pooled, tokens.sum(1) / 36, atol=1e-6)


def test_update_target_follows_the_ema_formula_from_a_copy_of_x(net):
    theta, xi = (list(part.parameters()) for part in (net.context_encoder, net.target_encoder))
    assert all(torch.equal(a, b) and a is not b for a, b in zip(theta, xi, strict=True))
    before = [p.clone() for p in xi]
    randomize(net.context_encoder)
    net.update_target(0.9)
    for new, old, p in zip(xi, before, theta):
        assert torch.allclose(new, 0.9 * old + 0.1 * p, atol=1e-7) and not torch.equal(new, old)


def test_sigreg_term_by_hand():
    context = torch.randn(5, 4, 3, generator=generator_of(0)) * 2
    directions = torch.randn(3, 256, generator=generator_of(7, 11)).double().numpy()
    t, directions = np.linspace(-3, 3, 33), directions / np.linalg.norm(directions, axis=0)
    shadows = context.mean(1).double().numpy() @ directions  # [B, 256]
    gaps = np.abs(np.exp(1j * shadows[:, :, None] * t).mean(0) - np.exp(-t * t / 2)) ** 2
    by_hand = 5 * np.trapezoid(gaps * np.exp(-t * t / 2), t).mean()
    assert model.sigreg_term(context, 7, 11).item() == pytest.approx(by_hand, rel=1e-4)
    assert model.sigreg_term(context.bfloat16(), 7, 11).item() == pytest.approx(by_hand, rel=0.05)


def save_text_encoder(folder, words=WORDS, file="config.json", **edit):
    """The toy's f_T as a folder from the hub, with an edit of one of its files."""
    tokenizer, bert = model.toy_bert(words)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModel.from_config(bert.config).save_pretrained(folder)  # with its pooler
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **edit}))


def test_unfit_input_and_encoders_are_refused_in_words(net, images, tmp_path):
    vit, cnn = (timm.create_model(name, num_classes=0).state_dict() for name in ("test_vit", "test_resnet"))
    del vit["blocks.1.attn.proj.weight"]

    def load_image_encoder(name, state):
        torch.save(state, tmp_path / "weights")
        model.ImageEncoder(name, str(tmp_path / "weights"))

    def load_text_encoder(**edit):
        save_text_encoder(tmp_path, **edit)
        model.TextEncoder(str(tmp_path))

    for attempt, words in (
            (lambda: net.encode(images, "red"), "with 'red': .* with a list of B strings"),
            (lambda: net.encode(images[:1], TEXTS), r"\[1, 3, 48, 48\] .* with \['a red dog', .* list of B"),
            (lambda: net.encode(images[:, :, 8:], TEXTS), r"\[3, 3, 40, 48\] .* toy takes .*\[3, 48, 48"),
            (lambda: net.frozen_features(images / 255, TEXTS), r"torch.float32 with .* of torch.uint8"),
            (lambda: sample_masks((9, 5), 2, 0), "9 x 5 patch grid is too small.*--image_encoder"),
            (lambda: load_image_encoder("test_vit", vit), "blocks.1.attn.proj.weight"),
            (lambda: load_image_encoder("test_resnet", cnn), "num_prefix_tokens.*fixed patch grid"),
            (lambda: load_text_encoder(num_hidden_layers=3), "lacks the weights .*encoder.layer.2"),
            (lambda: load_text_encoder(file="tokenizer_config.json", pad_token=None), "no padding token")):
        with pytest.raises(UserError, match=words):
            attempt()


def test_presets_are_the_papers():
    for name, *sizes in (("small", 768, 4, 8), ("medium", 768, 6, 12), ("large", 1024, 8, 16)):
        c = model.PRESETS[name]
        assert [c.dim, c.depth, c.heads, c.predictor_depth, c.predictor_dim] == [*sizes, 12, 384]


@pytest.mark.parametrize("name, prefix, kind", [
    ("test_vit", 1, "ijepa"), ("test_vit_relpos", 0, "plain"), ("test_vit", 1, "hub")])
def test_image_encoder_gives_the_patch_tokens_of_pixels_normalised_by_timm(tmp_path, name, prefix, kind):
    vit = timm.create_model(name, num_classes=7).eval()  # a classifier may be left over: f_I has none
    plain, path = vit.state_dict(), tmp_path / "weights"
    own, other = ({f"module.{key}": value + n for key, value in plain.items()} for n in (0, 1))
    torch.save({"encoder": own, "target_encoder": other, "predictor": {}} if kind == "ijepa" else plain, path)
    vit.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.2, 0.4, 0.6))
    timm.models.save_for_hf(vit, tmp_path / "hub")
    encoder = model.ImageEncoder(*[f"local-dir:{tmp_path}/hub"] if kind == "hub" else [name, str(path)])
    config = {**timm.data.resolve_model_data_config(encoder.vit), "crop_pct": 1.0}
    transform = timm.data.create_transform(**config)
    images = torch.randint(256, (2, 3, 160, 160), generator=generator_of(0), dtype=torch.uint8)
    pixels = [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    assert config["mean"][0] == (0.1 if kind == "hub" else 0.5)
    assert torch.allclose(encoder(images), vit.forward_features(torch.stack(pixels))[:, prefix:], atol=1e-5)
    assert encoder.grid == (10, 10) and encoder.input_size == (160, 160)


@pytest.mark.parametrize("kind, longest", [("bert", 64), ("gte", 128)])  # gte: the paper's
def test_text_encoder_gives_the_states_of_a_model_from_the_hub(tmp_path, kind, longest):
    sizes = dict(vocab_size=20, hidden_size=16, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
                 num_hidden_layers=2, max_position_embeddings=longest if kind == "bert" else 8192)
    save_text_encoder(tmp_path)
    saved = AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    saved.save_pretrained(tmp_path)
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
    ways = {"empty": Path.touch, "folder": Path.mkdir, "torn": lambda path: path.write_bytes(content[:-999])}
    for name in (*contents, *ways):
        out, path = tmp_path / name, tmp_path / name / "checkpoint.pt"
        out.mkdir()
        (out / ".lock").touch()
        torch.save(contents[name], path) if name in contents else ways[name](path)
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
    config = replace(CONFIG, image_encoder="test_vit", image_weights="vit", text_encoder="bert")
    net = model.TIJEPA(config, encoders)
    randomize(net.context_encoder)  # now X~ differs from X
    parts = {name: getattr(net, name).state_dict() for name in model.TRAINED}
    contents = {"config": vars(config), "encoders": net.fingerprint(), "model": parts}
    torch.save(dict.fromkeys(model.CHECKPOINT_KEYS) | contents, "checkpoint.pt")
    for given, words in ((("vit0", ""), "bert cannot be"), (("vit1", "bert0"), "other encoders: f_I weights"),
                         (("vit0", "bert1"), "other encoders: f_T layer_norm_eps")):
        with pytest.raises(UserError, match=words):
            model.TIJEPA.from_checkpoint("checkpoint.pt", *given)
    loaded = model.TIJEPA.from_checkpoint("checkpoint.pt", "vit0", "bert0")[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())


def test_pick_device_makes_the_gpu_that_is_asked_for_the_current_one(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, setting in ((torch.cuda, "set_device"), (torch, "set_float32_matmul_precision"),
                            (torch.backends.cuda, "enable_cudnn_sdp")):
        monkeypatch.setattr(module, setting, calls.append)
    for name, device in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        assert model.pick_device(name) == torch.device(device)
        assert calls[-3:] == [torch.device(device), "high", False]


def test_pick_device_and_dtype_take_what_a_gpu_has_and_a_cpu_only_without_one(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float16)):  # torch counts emulation as well
        supported = lambda including_emulation=True: fast or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert model.pick_dtype("auto", torch.device("cuda")) == dtype
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "getoutput", lambda command: "sh: nvidia-smi: not found")
    assert model.pick_device() == torch.device("cpu")
    monkeypatch.setattr(subprocess, "getoutput", lambda command: "470.57\n470.57")
    with pytest.raises(UserError, match=r"driver 470.57\).*--device cpu"):
        model.pick_device()


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
    schedule = getattr(pretrain, name)
    assert {step: schedule(step, 101, *given) for step in expected} == pytest.approx(expected)
    only = schedule(0, 1, *[0 if value == 10 else value for value in given])  # a run of one step
    assert only == pytest.approx(1e-3 if name == "warmup_cosine" else given[0])


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
    constant = {"images": 9, "auc": 0.5, "auc_pooled": 0.5, "recall@1": 0, "recall@5": 0}  # it says nothing
    assert pretrain.retrieval_metrics(torch.ones(9, 9)) == constant
    for value in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="an energy is not finite"):
            pretrain.retrieval_metrics(torch.where(energies == 0.5, value, energies))


def test_held_out_metrics_by_hand(net, images):
    features = net.frozen_features(images, TEXTS)
    figures = pretrain.held_out_metrics(net, features)
    assert pretrain.held_out_metrics(net.train(), features) == figures and net.training  # the same each time
    matrix = pretrain.energy_matrix(net, features, draws=1)
    matched, mismatched = matrix.diagonal(), matrix[range(3), [2, 0, 1]]
    *_, target, prediction, _ = net.measure(features)
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


def test_energy_maps_average_the_masks_that_hid_each_patch_and_are_shown(net, images, tmp_path, monkeypatch):
    features = net.frozen_features(images[[0, 0, 1, 1]], [*TEXTS[:2], *TEXTS[1:]])
    total, count, draw = torch.zeros(4, 36), torch.zeros(36), 0
    while count.min() < 8:
        masks = sample_masks(net.grid, 1, draw)
        energies = net(features, masks).patch_energy.detach()
        for patch, energy in zip(masks.target.flatten(), energies.flatten(1).T, strict=True):
            total[:, patch] += energy
            count[patch] += 1
        draw += 1
    shown, (a, b, c, d) = Mock(), (total / count).view(4, 6, 6)
    monkeypatch.setattr(pretrain, "show", shown)
    pretrain.plot_maps(net, images[:2], features, ["a", "b", "c", "d"], tmp_path / "maps.png")
    first, second = images[:2].permute(0, 2, 3, 1)
    expected = (("picture", first), ("a", a), ("b", b), ("second minus first", b - a),
                ("picture", second), ("c", c), ("d", d), ("second minus first", d - c))
    for panel, (title, pixels) in zip(shown.call_args_list, expected, strict=True):
        assert panel.args[2] == title and np.allclose(panel.args[1], pixels, atol=1e-6)


def test_bench_adds_up_a_step_of_its_parts_and_needs_no_data(tmp_path, monkeypatch):
    """Masks, forward and backward once a micro-batch, optimiser and EMA once a step, 9 steps an epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain.bench, "__defaults__", (4, 60))  # rounds, seconds
    monkeypatch.setattr(pretrain, "PEAK_TFLOPS", {"": 10})  # of a device without a name
    options = "--bench --batch_size 8 --accumulate 4 --epochs 3 --max_images 80 --held_out 8 --device cpu"
    lines = call(pretrain, *options.split()).out.splitlines()
    printed = {line[:44].strip(): float(line[44:]) for line in lines}
    *once_a_part, optimiser, ema = (printed[f"{part}, ms for 2 images"] for part in pretrain.PARTS)
    step = (4 * sum(once_a_part) + optimiser + ema) / 1000
    # f_I: 37 tokens of width 96, 2 blocks of 12 D^2 + 2 N D multiply-adds, 36 patches of 192 values
    by_hand = {"f_I, GFLOP per image": 2 * (2 * 37 * (12 * 96 ** 2 + 2 * 37 * 96) + 36 * 192 * 96) / 1e9,
               "step of 8 images, --accumulate 4, ms": 1000 * step, "training, images/s": 8 / step,
               "MFU on , %": 100 * 8 * printed["trained half, GFLOP per image"] / step / 10e3,
               "disk for the features, GB": 2e-9 * 80 * (36 * 96 + 5 * 24 * 96),
               "minutes to pretrain, 27 steps": 27 * step / 60}
    assert {name: printed[name] for name in by_hand} == pytest.approx(by_hand, rel=2e-3)
    assert not list(tmp_path.iterdir()) and min(printed.values()) > 0


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

    def record(net, features, masks):
        out = forward(net, features, masks)
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
def unbroken(pretrained, tmp_path_factory):
    """A run of 40 steps without a break: its options and its folder."""
    run = SimpleNamespace(options=[*pretrained.options, *SHORT, "--accumulate", 1])
    run.out = tmp_path_factory.mktemp("unbroken")
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
    assert all(name in pretrain.__doc__ for name in {*log[0], *SLOW})
    assert [(line["step"], line["epoch"]) for line in log] == [(3, 1.5), (4, 2.0)]
    share = np.prod([0.994 + 0.006 * step / 3 for step in range(4)])
    assert log[-1]["start_share"] == pytest.approx(share)
    assert f"warning: {share:.0%} of X~ is still its random start" in pretrained.done.err
    by_hash = sorted((f"{i:012d}.jpg" for i in range(40)), key=data.digest)
    assert sorted(torch.load(pretrained.checkpoint)["held_out"]) == sorted(by_hash[:8])


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
        for batch, *parts in zip(sample_masks((6, 6), 8, 3, n), forwards[2 * n][0], forwards[2 * n + 1][0]):
            assert torch.equal(batch, torch.cat(parts)) and len(parts[0]) == 4
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
    torch.manual_seed(3)  # of the weights, too
    fresh = model.TIJEPA(cache.net.config, (cache.net.image_encoder, cache.net.text_encoder))
    masks, out = forwards[0]
    first = fresh(next(cache.batches([draws[0][1]])), masks)
    assert torch.allclose(first.prediction, out.prediction, atol=1e-5)


def test_the_loss_is_the_one_that_is_named_with_sigreg_by_its_weight(narrow, pretrained, forwards, tmp_path):
    options = "--epochs 1 --accumulate 1 --log_every 1 --seed 3 --loss smooth_l1 --sigreg 0.5"
    train(pretrained, tmp_path, *options.split())
    for step, ((_, out), line) in enumerate(zip(forwards, run_log(tmp_path), strict=True)):
        d = (out.prediction - out.target).abs()
        energy = torch.where(d < 1, 0.5 * d ** 2, d - 0.5).mean()
        expected = energy + 0.5 * model.sigreg_term(out.context, 3, step)
        assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_are_clipped_and_accumulation_equals_the_large_batch(pretrained, tmp_path, monkeypatch):
    norms, logs, step = [], [], torch.optim.AdamW.step

    def record(optimizer, *inputs):
        grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack(grads).norm().item())
        return step(optimizer, *inputs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
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


def test_half_precision_steps_as_single_does(narrow, pretrained, forwards, tmp_path):
    runs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        train(pretrained, tmp_path, *"--epochs 1 --log_every 1 --dtype".split(), str(dtype)[6:])
        for _, out in forwards[-4:]:
            assert out.prediction.dtype == dtype and out.energy.dtype == out.target.dtype == torch.float32
        runs.append([line[name] for line in run_log(tmp_path) for name in ("loss", "grad_norm")])
    single, *halves = runs
    for half in halves:
        for n, (value, expected) in enumerate(zip(half, single, strict=True)):
            assert value == pytest.approx(expected, rel=(0.02, 0.1)[n % 2]) and value != expected


def test_eval_command_measures_as_the_log_and_draws_four_pictures(pretrained):
    for name, size in (("curves", (1600, 320)), ("energies", (500, 320)), ("masks", (800, 840)),
                       ("maps", (1000, 1080))):
        picture = Image.open(pretrained.out / f"{name}.png")
        assert picture.size == size and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    figures, logged = json.loads((pretrained.out / "eval.json").read_text()), run_log(pretrained.out)[-1]
    same = figures.keys() & logged.keys()  # of the same weights
    assert len(same) == 8 and all(figures[name] == pytest.approx(logged[name], rel=1e-5) for name in same)
    assert figures["skipped"] == {"image not on disk": 1, "unreadable image": 1} and figures["images"] == 8


def test_eval_command_ranks_typed_captions_by_their_energy(toy, pretrained, tmp_path, monkeypatch):
    typed, drawn = ["red bars blue tiles lime bands ink lines", "moss bars", "who are they"], Mock()
    monkeypatch.setattr(pretrain, "plot_maps", drawn)
    image = toy / "mvsa" / "MVSA_Single" / "data" / "1.jpg"
    lines = call(pretrain, "--eval", pretrained.checkpoint, "--device", "cpu", "--out", tmp_path, "--image",
                 image, "--captions", *typed).out.splitlines()
    energies, _, captions = zip(*(line.partition("  ") for line in lines))
    energies = [float(energy) for energy in energies]
    assert sorted(captions) == sorted(typed) and energies == sorted(energies) and len(set(energies)) == 3
    net, _, features, titles, path = drawn.call_args.args  # of the lowest and the highest
    assert titles == [lines[0], lines[2]] and path == tmp_path / "maps_1.png"
    assert net.mean_energy(features, 2).tolist() == pytest.approx([energies[0], energies[2]], abs=1e-4)


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
    _, pictures, features, titles, _ = pretrain.plot_maps.call_args.args
    for n, (path, captions) in enumerate(items):
        assert torch.equal(pictures[n], data.read_image(path, net.image_encoder))
        assert titles[2 * n] == captions[0] != titles[2 * n + 1]
    images = torch.stack(pictures).repeat_interleave(2, 0)  # two captions each, all of one length
    for drawn, encoded in zip(features, net.frozen_features(images, titles), strict=True):
        differ = (drawn.float() - encoded.float()).flatten(1).norm(dim=1)
        assert len(drawn) == 8 and (differ <= 0.05 * encoded.float().flatten(1).norm(dim=1)).all()


# ---- What one can rely on: silent accidents first ----------------------------------------------------------


@pytest.mark.parametrize("dtype, number", [("float32", signal.SIGTERM), ("bfloat16", signal.SIGINT),
                                           ("float16", signal.SIGTERM), ("overflow", signal.SIGINT)])
def test_a_run_that_a_signal_stops_resumes_as_if_it_had_not(
        narrow, unbroken, tmp_path, monkeypatch, dtype, number):
    """Between two log lines. Meanwhile a second run is refused, and a second Ctrl-C would end the process."""
    straight, cut, scaler = tmp_path / "straight", tmp_path / "cut", torch.amp.GradScaler
    options = ["--epochs", 3, "--log_every", 3, "--dtype", dtype.replace("overflow", "float16"), "--resume"]
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]

    def interrupt():
        before = tree(cut)
        assert f"another run writes to {cut}" in train(unbroken, cut, *options, code=2).err
        assert tree(cut) == before
        signal.raise_signal(number)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the system's: it kills

    with monkeypatch.context() as patch:
        if dtype == "overflow":  # begin with a scale at which float16 gradients overflow
            patch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0 ** 27, **k))
        train(unbroken, straight, *options)
        in_step(patch, 5, interrupt)
        stopped = train(unbroken, cut, *options, code=128 + number)
    assert "stopped after step 5 of 12" in stopped.out and "Traceback" not in stopped.err
    assert handlers == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    assert "after step 5 of 12" in train(unbroken, cut, *options).out
    assert_same_run(cut, straight)
    log = run_log(cut)
    skipped = [line["skipped_steps"] for line in log]
    if dtype == "overflow":
        assert skipped[:2] == [3, 6] and 6 <= skipped[-1] < 12 and log[0]["grad_norm"] is None
    else:
        assert skipped == [0] * 4 and all(line["grad_norm"] > 0 for line in log)


def spoil(out, change):
    """The checkpoint's content, changed."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, out / "checkpoint.pt")


HELD_OUT, OTHER_DATA, OTHER_WEIGHTS = "{held_out}", "data (then ", "f_I weights (then "
ACCIDENTS = {  # what happens: (how, words of --eval, words of --resume); no words: the command succeeds
    "nothing": (lambda run: None, "", ""),
    "the log is cut off": (lambda run: os.truncate(run.out / "log.jsonl", 200), "", ""),
    "an image trained on is lost": (lambda run: run.others[0].unlink(True), "", OTHER_DATA),
    "all held out are lost": (lambda run: [path.unlink(True) for path in run.held_out], HELD_OUT, OTHER_DATA),
    "another picture": (lambda run: shutil.copy(*run.held_out[:2]), HELD_OUT, OTHER_DATA),
    "other captions": (lambda run: run.captions.write_text(
        run.captions.read_text().replace('"caption": "', '"caption": "red ')), HELD_OUT, OTHER_DATA),
    "other weights": (lambda run: run.patch.setattr(
        model, "hash_weights", lambda module: "other"), OTHER_WEIGHTS, OTHER_WEIGHTS)}


@pytest.mark.parametrize("what", ACCIDENTS)
def test_after_an_accident_a_run_ends_as_without_it_or_is_refused_and_left_as_it_was(
        toy, pretrained, cut_off, tmp_path, monkeypatch, what):
    """--eval of a finished run and --resume of one that was cut off, where the data are elsewhere now."""
    names, coco = torch.load(pretrained.checkpoint)["held_out"], tmp_path / "coco"
    images = sorted((shutil.copytree(toy / "coco", coco) / "train2017").iterdir())
    held_out, others = ([path for path in images if (path.name in names) == held] for held in (True, False))
    run = SimpleNamespace(captions=coco / CAPTIONS, held_out=held_out, others=others, patch=monkeypatch)
    change, *words_of = ACCIDENTS[what]
    for source, words in zip((pretrained.out, cut_off), words_of):
        run.out = shutil.copytree(source, tmp_path / source.name)
        change(run)
        before, path, resume = tree(run.out), run.out / "checkpoint.pt", source == cut_off
        command = [*pretrained.options, "--resume"] if resume else ["--eval", path]
        places = ["--coco", coco, "--cache", tmp_path / "cache", "--device", "cpu", "--out", run.out]
        said = call(pretrain, *command, *places, code=2 if words else 0).err
        if words:
            assert str(path) in said and words.format(held_out=held_out[1].name) in said
        if resume and not words:
            assert_same_run(run.out, pretrained.out)
        else:
            assert tree(run.out) == before


def test_resume_names_every_option_that_decides_a_run_and_has_changed(pretrained, tmp_path, monkeypatch):
    """All at once: what may not change here, and so any new option, decides."""
    may_change = {"out", "coco", "device", "workers", "cache", "accumulate", "resume", "bench", "eval",
                  "eval_masks", "image", "captions", "image_weights", "text_encoder"}
    others = {"preset": "tiny", "image_encoder": "other", "loss": "smooth_l1", "target": "image",
              "max_images": 41}
    monkeypatch.setitem(model.PRESETS, "tiny", model.PRESETS["toy"])  # neither needs a download
    encoder = model.ImageEncoder("toy")
    monkeypatch.setattr(model, "ImageEncoder", lambda name, weights: encoder)
    then = vars(pretrain.parse_args([str(option) for option in pretrained.options]))
    changed = ["--accumulate", 1, "--dtype", "bfloat16"]
    expected = ["--dtype (then torch.float32, now torch.bfloat16)"]
    for name in then.keys() - may_change - {"dtype"}:
        value, flag = then[name], then[name] is False
        now = flag or others.get(name) or (value + 1 if type(value) is int else value / 2 or 0.5)
        changed += [f"--{name}"] if flag else [f"--{name}", now]
        expected.append(f"--{name} (then {value}, now {now})")
    out = shutil.copytree(pretrained.out, tmp_path / "out")
    said = train(pretrained, out, *changed, "--cache", tmp_path, "--resume", code=2).err
    assert [words for words in expected if words not in said] == [] and len(expected) > 10
    assert tree(out) == tree(pretrained.out)


def test_a_loss_that_is_not_finite_is_never_saved(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "START_LR", 1e30)
    wild = "--lr 1e30 --clip 1e30 --log_every 1 --batch_size 32".split()  # else each step would be saved
    old = shutil.copytree(pretrained.out, tmp_path / "old")
    for out in (tmp_path / "new", old):
        said = train(pretrained, out, *wild, code=1).err
        assert "--lr" in said and "not finite" in said
    assert not (tmp_path / "new" / "checkpoint.pt").exists() and tree(old) == tree(pretrained.out)


def test_kill_9_at_8_random_moments_loses_nothing_but_time(unbroken, tmp_path):
    rng, steps, checkpoint = fresh_rng(), [], tmp_path / "checkpoint.pt"
    options = [str(option) for option in (*unbroken.options, "--resume", "--out", tmp_path)]
    for kill in range(8):
        lines, end = len(run_log(tmp_path)), time.time() + 120
        process = forked(lambda: sys.exit(pretrain.run(options)))
        while kill % 4 < 3 and len(run_log(tmp_path)) == lines and process.is_alive():  # else at once
            assert time.time() < end, "no log line came"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)
        if checkpoint.exists():
            steps.append(model.TIJEPA.from_checkpoint(checkpoint)[1]["step"])
            if steps[-1] == 40:
                checkpoint.unlink()  # once more from the start
    train(unbroken, tmp_path, "--resume")
    assert len(set(steps)) > 2
    train(unbroken, tmp_path, "--resume")  # of a run that is finished
    assert_same_run(tmp_path, unbroken.out)


def test_two_processes_have_the_losses_of_one(pretrained, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [*pretrained.options, *SHORT, "--epochs", 4, "--accumulate", 2, "--out"]
    done = execute(*torchrun, pretrain.__file__, *options, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    call(pretrain, *options, tmp_path / "one")
    two, one = ([line["loss"] for line in run_log(tmp_path / name)] for name in ("two", "one"))
    assert two == pytest.approx(one, abs=1e-5) and len(two) == 16
    assert "2 processes" in done.stdout and done.stdout.count("pretrain: wrote") == 1


def test_a_checkpoint_that_cannot_be_written_gets_a_sentence_and_leaves_the_one_before(
        pretrained, cut_off, tmp_path):
    out, limit = shutil.copytree(cut_off, tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limit[1]))  # a checkpoint has 5 MB
        said = train(pretrained, out, "--resume", code=2).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"{out}/checkpoint.pt cannot be written" in said and tree(out) == tree(cut_off)
    (tmp_path / "checkpoint.pt").mkdir()  # a folder in its place
    assert "Is a directory" in train(pretrained, tmp_path, code=2).err


def test_too_little_memory_names_what_to_lower_and_other_errors_are_raised(pretrained, tmp_path, monkeypatch):
    judge = "--eval", pretrained.checkpoint, "--device", "cpu", "--out", tmp_path
    monkeypatch.setattr(model.TIJEPA, "forward", lambda *inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        call(pretrain, *judge, "--cache", tmp_path)
    for owner, name in ((model.TIJEPA, "forward"), (model, "toy_vit")):  # the latter is no fault of the file
        monkeypatch.setattr(owner, name, lambda *inputs: torch.empty(1 << 55))
        said = call(pretrain, *judge, "--cache", tmp_path, code=2).err
        assert "out of memory; lower --batch_size or --held_out" in said


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
