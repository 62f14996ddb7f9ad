"""TI-JEPA (arXiv 2503.06380): the model, its masks, its energy. Reads weights, tokenizers, checkpoints.

Glossary (B batch, N patches, L text tokens, M target blocks, P patches of a block, C context patches)

    here                paper      shape             meaning
    images, texts       I, T       [B,3,H,W], list   pictures (uint8) and their captions
    image_encoder       f_I        -> [B, N, D_I]    frozen ViT, patch tokens only
    text_encoder        f_T        -> [B, L, D_T]    frozen text transformer, token states
    s_image, s_text     s_I, s_T   see above         the features that the frozen encoders output
    text_mask           -          [B, L] bool       True for a token of s_text, False for padding
    context_encoder     X (theta)  -> [B, C, D]      trained; reads the context patches and the caption
    target_encoder      X~ (xi)    -> [B, N, D]      EMA copy of X; training runs it on hidden patches only
    predictor           g (phi)    -> [B, M, P, D]   narrow ViT from context tokens to hidden patches
    masks.context       B_x        [B, C] int        indices of the visible patches
    masks.target        B_y(i)     [B, M, P] int     indices of the hidden patches, block by block
    energy              E(I, T)    [B]               prediction error on the hidden patches of a pair
    momentum            m          float             xi <- m xi + (1 - m) theta

Masks apply after f_I, as in the authors' code: the visible tokens of s_image have seen the hidden patches.
With mask="before" they have not. README, "Differences", lists what else departs from the paper or I-JEPA."""
import copy
import hashlib
import json
import math
import pickle
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


@dataclass
class Config:
    """All settings of the model. Each checkpoint stores them."""
    image_encoder: str  # a timm name, or "toy"
    text_encoder: str  # a Hugging Face name or a local folder, or "toy"
    dim: int  # D, width of X and X~
    depth: int  # blocks of X
    heads: int  # attention heads of X
    predictor_depth: int = 12
    predictor_dim: int = 384
    predictor_heads: int = 12
    image_weights: str = ""  # a weight file for image_encoder; empty: its pretrained weights from the hub
    loss: str = "mse"  # or "smooth_l1"
    target: str = "ema"  # predict X~'s tokens (the paper); "image": f_I's; "whitened": a linear map of f_I's
    mask: str = "after"  # mask after f_I (the authors' code): X's tokens have seen all patches; or "before"
    visible: float = 1.0  # share of the context patches that X gets
    vocabulary: list = field(default_factory=list)  # the words that the "toy" text encoder knows


JEPA_14, JEPA_16 = "vit_huge_patch14_gap_224.in1k_ijepa", "vit_huge_patch16_gap_448.in1k_ijepa"
ON_HUB = {JEPA_14: "facebook/ijepa_vith14_1k", JEPA_16: "facebook/ijepa_vith16_1k"}  # timm has 10 GB files
GTE_BASE, GTE_LARGE = (f"alibaba-nlp-community/gte-{size}-en-v1.5" for size in ("base", "large"))
MINI_LM = "sentence-transformers/all-MiniLM-L6-v2"
PRESETS = {
    # f_I, f_T, X's dim, depth, heads; then g's depth, dim, heads (of width 32, as in I-JEPA)
    "toy": Config("toy", "toy", 96, 2, 4, 2, 64, 2),
    "tiny": Config("vit_tiny_patch16_224", MINI_LM, 192, 2, 4, 4, 96, 3),
    "small": Config(JEPA_14, GTE_BASE, 768, 4, 8),
    "medium": Config(JEPA_14, GTE_BASE, 768, 6, 12),
    "large": Config(JEPA_16, GTE_LARGE, 1024, 8, 16),
}
TEXT_DIMS = {"toy": 96, MINI_LM: 384, GTE_BASE: 768, GTE_LARGE: 1024}  # D_T of each f_T


# ---- X, X~ and g ----
class Attention(nn.Module):
    """Multi-head attention from `x` to `memory` (self-attention when they are the same)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, memory, mask=None):
        """x [B, N, D], memory [B, L, D], mask [B, L] bool or None (True: attended to) -> [B, N, D]"""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, D/heads]
        kv = self.kv(memory).unflatten(-1, (2, self.heads, -1))  # [B, L, 2, heads, D/heads]
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, heads, L, D/heads] each
        mask = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, L]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, heads, N, D/heads]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, N, D]


class Block(nn.Module):
    """Pre-LN attention and MLP. In g, tokens attend to each other. In X, patches attend to the caption alone:
    a patch's token does not depend on which other patches are there."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, text=None, text_mask=None, last=0):
        """x [B, N, D], text [B, L, D], text_mask [B, L] -> [B, N, D]; with `last`, the last [B, last, D]"""
        h = self.norm_attention(x)  # below, last=0 takes all: x[:, -0:] is x[:, 0:]
        x = x[:, -last:] + self.attention(h[:, -last:], h if text is None else text, text_mask)
        return x + self.mlp(self.norm_mlp(x))


def init_weights(module):
    """MAE's initialisation (models_mae.py). With I-JEPA's std of 0.02, narrow nets use the caption late."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class FusionEncoder(nn.Module):
    """X: image tokens are queries, text tokens keys and values (paper section 3, "text-to-image" encoder).
    X adds no attention between patches and no positions: f_I's tokens already carry both."""

    def __init__(self, image_dim, text_dim, dim, depth, heads):
        super().__init__()
        self.image_proj = nn.Sequential(nn.Linear(image_dim, dim), nn.LayerNorm(dim))
        self.text_proj = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.apply(init_weights)

    def forward(self, s_image, s_text, text_mask):
        """s_image [B, N, D_I] (any patches), s_text [B, L, D_T], text_mask [B, L] -> [B, N, D]"""
        x = self.image_proj(s_image)
        text = self.text_proj(s_text)
        for block in self.blocks:
            x = block(x, text, text_mask)
        return self.norm(x)


def sincos_2d(grid, dim):
    """I-JEPA's fixed positions (pos_embs.py) -> [N, dim]: half of `dim` encodes the row, half the column."""
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim / 4))
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))  # [N, 2]: row, column
    angles = places[:, :, None] * frequency  # [N, 2, dim/4]
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # [N, 2, 2, dim/4] -> [N, dim]


class Predictor(nn.Module):
    """g: I-JEPA's narrow ViT. Reads context tokens and a mask token per hidden patch, predicts the target."""

    def __init__(self, grid, dim, width, depth, heads, target_dim):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_2d(grid, width)[None], persistent=False)  # [1, N, width]
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, target_dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer, block in enumerate(self.blocks, start=1):  # I-JEPA's fix_init_weight
            block.attention.proj.weight.data.div_(math.sqrt(2 * layer))
            block.mlp[2].weight.data.div_(math.sqrt(2 * layer))

    def forward(self, context, masks):
        """context [B, C, D] at masks.context, masks.target [B, M, P] -> predictions [B, M, P, target_dim].
        Each block is predicted on its own: it sees the context, never another block's mask tokens."""
        B, M, P = len(context), *masks.target.shape[1:]
        visible = self.embed(context) + self.positions[0, masks.context]  # [B, C, width]
        visible = visible.repeat_interleave(M, dim=0)  # [B * M, C, width]
        hidden = self.mask_token + self.positions[0, masks.target.flatten(1)]  # [B or 1, M * P, width]
        hidden = hidden.expand(B, -1, -1).reshape(B * M, P, -1)
        x = torch.cat([visible, hidden], dim=1)  # [B * M, C + P, width]
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, last=P)  # [B * M, P, width]: the other tokens are not needed
        return self.proj(self.norm(x)).unflatten(0, (B, M))  # [B, M, P, target_dim]


# ---- Masks ----
class Masks(NamedTuple):
    """Patch indices in raster order. Context and targets never overlap. B = 1: one set for all images."""
    context: torch.Tensor  # [B, C]
    target: torch.Tensor  # [B, M, P]

    def to(self, device):
        return Masks(*(index.to(device, non_blocking=True) for index in self))


def generator_of(*numbers):
    """A random generator seeded by all of these numbers >= 0: torch's own seed takes only 32 bits."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def gather(tokens, index):
    """tokens [B, N, D], index [B, K] or [1, K] -> [B, K, D]"""
    return tokens.gather(1, index[:, :, None].expand(len(tokens), -1, tokens.shape[-1]))


def sample_masks(grid, batch, seed, step=0, share=1.0, blocks=4, target_area=(0.15, 0.2),
                 target_aspect=(0.75, 1.5), context_area=(0.85, 1.0)):
    """I-JEPA's multi-block masks (paper section 3.2; masks/multiblock.py), a pure function of its arguments.
    Areas are shares of the grid, aspects relative to it. A batch has one block size. Its contexts are cut to
    `share` of the smallest context, at random: a cut in raster order would remove the bottom rows."""
    rows, columns = grid
    if min(grid) < 6:
        raise UserError(f"a {rows} x {columns} patch grid is too small: take another --image_encoder")
    N = rows * columns
    row, column = torch.arange(N) // columns, torch.arange(N) % columns  # [N] each
    generator = generator_of(seed, step)

    def place(count, height, width):
        """Place `count` blocks at random in each image -> the patches in each block: [B, count, N] bool"""
        top = torch.randint(rows - height + 1, (batch, count, 1), generator=generator)
        left = torch.randint(columns - width + 1, (batch, count, 1), generator=generator)
        return (top <= row) & (row < top + height) & (left <= column) & (column < left + width)

    target_size = block_size(grid, target_area, target_aspect, generator)
    context_size = block_size(grid, context_area, (1.0, 1.0), generator)
    hidden = place(blocks, *target_size)  # [B, M, N]
    window = place(1, *context_size)[:, 0]  # [B, N]
    while (too_few := (window & ~hidden.any(1)).sum(1) < N // 10).any():  # draw their blocks again
        hidden = torch.where(too_few[:, None, None], place(blocks, *target_size), hidden)
    visible = window & ~hidden.any(1)  # [B, N]
    order = torch.rand(batch, N, generator=generator).masked_fill(~visible, -1.0)
    smallest = int(visible.sum(1).min())
    context = order.topk(max(1, round(share * smallest)), dim=1).indices.sort(dim=1).values  # [B, C]
    target = hidden.nonzero()[:, 2].view(batch, blocks, -1)  # [B, M, P]: all blocks have P patches
    return Masks(context, target)


def block_size(grid, area, aspect, generator):
    """Height and width in patches; area (share of the grid) and aspect are uniform in their ranges."""
    u, v = torch.rand(2, generator=generator).tolist()
    scale = area[0] + u * (area[1] - area[0])
    ratio = aspect[0] + v * (aspect[1] - aspect[0])
    sides = math.sqrt(scale * ratio), math.sqrt(scale / ratio)
    return tuple(min(max(round(side * size), 1), size) for side, size in zip(sides, grid))


# ---- The model: one forward pass is the energy of a pair ----
class Features(NamedTuple):
    """What the frozen encoders output for B pairs of a picture and a caption."""
    s_image: torch.Tensor  # [B, N, D_I]
    s_text: torch.Tensor  # [B, L, D_T]
    text_mask: torch.Tensor  # [B, L] bool
    images: torch.Tensor | None = None  # [B, 3, H, W] uint8: with mask="before" f_I reads them again

    def pair(self, images, captions):
        """Two indices (lists [K] or slices) -> Features that pair these pictures with these captions."""
        pixels = None if self.images is None else self.images[images]
        return Features(self.s_image[images], self.s_text[captions], self.text_mask[captions], pixels)


class Output(NamedTuple):
    """One forward pass. D is the width of the targets: X~'s with target="ema", else f_I's."""
    energy: torch.Tensor  # [B]: of each pair; the loss is its mean
    patch_energy: torch.Tensor  # [B, M, P]: of each hidden patch
    target: torch.Tensor  # [B, M, P, D]: the normalised targets of the hidden patches
    prediction: torch.Tensor  # [B, M, P, D]
    context: torch.Tensor  # [B, C, config.dim]: X's output


class TIJEPA(nn.Module):
    """The energy-based model of a picture and its caption. Given `encoders` (f_I, f_T), it loads none."""

    def __init__(self, config, encoders=None):
        super().__init__()
        self.config = c = config
        self.dtype = torch.float32  # of the forward passes; see place
        f_I, f_T = encoders or (ImageEncoder(c.image_encoder, c.image_weights),
                                TextEncoder(c.text_encoder, c.vocabulary))
        self.image_encoder, self.text_encoder, self.grid = f_I, f_T, f_I.grid
        sample_masks(self.grid, 1, seed=0)  # refuse a grid too small before anything is encoded
        if c.mask == "before" and not isinstance(f_I.vit, timm.models.VisionTransformer):
            raise UserError(f"--mask before needs a plain ViT, not {type(f_I.vit).__name__}")
        self.context_encoder = FusionEncoder(f_I.dim, f_T.dim, c.dim, c.depth, c.heads)
        # X~ starts as a copy of X. Neither has dropout: train and eval mode compute the same.
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.whiten = nn.Linear(f_I.dim, f_I.dim) if c.target == "whitened" else nn.Identity()
        self.whiten.requires_grad_(False)
        width, target_dim = c.predictor_dim, c.dim if c.target == "ema" else f_I.dim
        self.predictor = Predictor(f_I.grid, c.dim, width, c.predictor_depth, c.predictor_heads, target_dim)

    def forward(self, features, masks, visible=None):
        """The trained half: Features of B pairs, and masks -> Output. Gradients reach X and g. Pass
        `visible` (see the method) to compute it once for several captions."""
        with self.autocast():
            visible = self.visible(features, masks) if visible is None else visible  # [B, C, D_I]
            context = self.context_encoder(visible, features.s_text, features.text_mask)  # X: [B, C, D]
            prediction = self.predictor(context, masks)  # g: [B, M, P, D]
            target = self.targets(features, masks)  # [B, M, P, D]
        patch_energy = self.patch_energy(prediction, target)  # [B, M, P]
        return Output(patch_energy.mean((1, 2)), patch_energy, target, prediction, context)

    def visible(self, features, masks):
        """X's image input: f_I's tokens of the context patches [B, C, D_I]."""
        if self.config.mask == "before":
            return self.encode_images(features.images, masks.context)
        return gather(features.s_image, masks.context)

    @torch.no_grad()
    def targets(self, features, masks):
        """The targets of g: X~'s or f_I's tokens of the hidden patches, normalised -> [B, M, P, D]"""
        target = gather(features.s_image, masks.target.flatten(1))  # f_I's: fixed, blind to the caption
        if self.config.target == "ema":  # X~ mixes no patches, so the hidden ones suffice
            target = self.target_encoder(target, features.s_text, features.text_mask)  # X~: [B, M * P, D]
        if self.config.target == "whitened":
            target = self.whiten(target.float()).float()
        else:
            target = F.layer_norm(target.float(), target.shape[-1:])  # without affine: I-JEPA's train.py
        return target.unflatten(1, masks.target.shape[1:])  # [B, M, P, D]

    def fit_whitening(self, tokens):
        """Fit the linear map of target="whitened" to f_I's tokens t [n, D_I]: (S + s I)^(-1/2) (t - mean).
        S is their covariance, s its mean eigenvalue. Directions of large variance count less afterwards."""
        S, mean = torch.cov(tokens.T).double(), tokens.mean(0).double()
        values, vectors = torch.linalg.eigh(S)
        weight = vectors / (values + values.mean()).sqrt() @ vectors.T
        self.whiten.weight.copy_(weight)
        self.whiten.bias.copy_(-weight @ mean)

    def draw_masks(self, batch, seed, step=0):
        """Masks for this model's grid and visible share (see sample_masks), pinned for a model on a GPU."""
        masks = sample_masks(self.grid, batch, seed, step, self.config.visible)
        return Masks(*(index.pin_memory() for index in masks)) if self.device.type == "cuda" else masks

    def patch_energy(self, prediction, target):
        """Two tensors [B, M, P, D] -> [B, M, P]: the mean squared (or smooth L1) error, in float32."""
        return LOSSES[self.config.loss](prediction.float(), target.float(), reduction="none").mean(-1)

    @torch.no_grad()
    def measure(self, features, captions, draw=0):
        """Features of I pictures and T captions, K lists [I] of captions -> yields K Outputs of I pairs.
        All share one pass of f_I and the masks of this draw: their energies are of the same patches."""
        masks = self.draw_masks(1, draw).to(self.device)
        visible = self.visible(features, masks)  # [I, C, D_I]
        for of_each in captions:
            yield self(features.pair(slice(None), of_each), masks, visible)

    def energies(self, features, captions, draws):
        """Arguments as of `measure` -> energies [I, K], each the mean over these draws of masks."""
        total = torch.zeros(len(features.s_image), len(captions), device=self.device)
        for draw in draws:
            for k, out in enumerate(self.measure(features, captions, draw)):
                total[:, k] += out.energy  # in place: keeping small tensors would fragment memory
        return total / len(draws)

    def score(self, images, texts, draws=8):
        """images [B, 3, H, W] uint8, B strings -> each pair's energy [B], the mean over `draws` masks.
        Lower is a better match."""
        return self.energies(self.frozen_features(images, texts), [range(len(texts))], range(draws))[:, 0]

    def encode(self, images, texts):
        """images [B, 3, H, W] uint8, B strings -> X~'s fused tokens [B, N, D] and their mean [B, D]."""
        features = self.frozen_features(images, texts)
        with self.autocast():
            tokens = self.target_encoder(*features[:3]).float()
        return tokens, tokens.mean(1)

    def frozen_features(self, images, texts):
        """images [B, 3, H, W] uint8, B strings -> Features. Raises UserError for other shapes or types."""
        shape = [len(texts), 3, *self.image_encoder.input_size]
        if list(images.shape) != shape or images.dtype != torch.uint8 or isinstance(texts, str):
            raise UserError(f"pictures {list(images.shape)} {images.dtype} with {texts!r:.60}: f_I and f_T "
                            f"take B x {shape[1:]} of torch.uint8 with a list of B strings")
        images = images.to(self.device)
        return Features(self.encode_images(images), *self.encode_texts(texts), images)

    def encode_images(self, images, index=None):
        """f_I: images [B, 3, H, W] uint8 -> s_image [B, N, D_I]; see ImageEncoder.forward"""
        with self.autocast():
            return self.image_encoder(images.to(self.device, non_blocking=True), index).to(self.dtype)

    def encode_texts(self, texts):
        """f_T: B strings -> s_text [B, L, D_T], text_mask [B, L]"""
        with self.autocast():
            states, mask = self.text_encoder(texts)
        return states.to(self.dtype), mask

    @torch.no_grad()
    def update_target(self, momentum):
        """xi <- m xi + (1 - m) theta, after each optimiser step."""
        xi = list(self.target_encoder.parameters())
        torch._foreach_mul_(xi, momentum)
        torch._foreach_add_(xi, list(self.context_encoder.parameters()), alpha=1 - momentum)

    def place(self, device, precision):
        """Move to a device; set the dtype of the forward passes ("auto" or a name) -> self."""
        self.dtype = pick_dtype(precision, device)
        return self.to(device)

    @property
    def device(self):
        return self.predictor.mask_token.device

    def autocast(self):
        """The context in which all forward passes run."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def fingerprint(self):
        """All that decides the features of the frozen encoders: {name: value}."""
        return {**self.image_encoder.fingerprint(), **self.text_encoder.fingerprint()}

    @classmethod
    def from_checkpoint(cls, path, image_weights="", text_encoder=""):
        """A checkpoint of pretrain.py -> (TIJEPA in eval mode, the file's contents). The arguments say where
        f_I and f_T lie now. Raises UserError if they are not those that X was trained on."""
        with open_checkpoint(path) as checkpoint:
            config = Config(**checkpoint["config"])
            config.image_weights = image_weights or config.image_weights
            config.text_encoder = text_encoder or config.text_encoder
            net = cls(config)
            if differs := differences(checkpoint["encoders"], net.fingerprint()):
                raise UserError(f"{path} was trained on other encoders: {differs}; name those with "
                                "--image_weights and --text_encoder; the toy's differ by timm's version")
            for part in TRAINED:
                getattr(net, part).load_state_dict(checkpoint["model"][part])
        return net.eval(), checkpoint


# ---- A regulariser, and a measure of collapse ----
def sigreg_term(context, seed, step, directions=256, knots=17):
    """SIGReg (LeJEPA, arXiv 2511.08544) of the mean patch of X's output [B, C, D] -> []: how far projections
    on random directions (new at each step) are from a standard normal, by Epps and Pulley: B times
    the integral of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2); phi is the empirical characteristic function."""
    z = context.float().mean(1)  # [B, D]
    a = F.normalize(torch.randn(z.shape[1], directions, generator=generator_of(seed, step)), dim=0)
    t = torch.linspace(0, 3, knots, device=z.device)
    angles = (z @ a.to(z.device))[:, :, None] * t  # [B, directions, knots]
    normal = torch.exp(-t.square() / 2)
    distance = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()  # [directions, knots]
    return 2 * len(z) * torch.trapezoid(distance * normal, t).mean()  # even: twice the half t > 0


def effective_rank(features):
    """features [B, D] -> []: exp of the entropy of the normalised singular values of the centred features
    (Roy and Vetterli 2007): 1 if all lie on a line (dimensional collapse), at most min(B - 1, D)."""
    if not features.isfinite().all():
        return features.new_tensor(math.nan)  # svdvals would raise
    values = torch.linalg.svdvals((features - features.mean(0)).float().cpu())  # MPS has no such routine
    return torch.special.entr(values / values.sum().clamp_min(1e-12)).sum().exp()


# ---- f_I and f_T: frozen ----
class ImageEncoder(nn.Module):
    """f_I: a timm ViT without its classifier. Its weights are the pretrained ones or those of `weights`:
    timm's file, I-JEPA's `.pth.tar`, or a file or folder of I-JEPA from the hub. Raises UserError if there
    is no such ViT, or if not all weights fit."""

    def __init__(self, name, weights="", pretrained=True):
        super().__init__()
        what = f"--image_encoder {name} cannot be loaded from {weights or 'the hub'}"
        with user_errors(what, "f_I is a ViT with a fixed patch grid, from the hub or --image_weights FILE"):
            if name == "toy":
                if weights:
                    raise ValueError("the toy's f_I takes no weights")
                self.vit = toy_vit()
            else:
                if pretrained and not weights and name in ON_HUB:
                    weights = hf_hub_download(ON_HUB[name], "model.safetensors")
                options = dict(pretrained=pretrained and not weights, num_classes=0)
                with torch.device("meta" if weights else "cpu"):  # meta takes no memory
                    self.vit = timm.create_model(name, **options)
                if weights:
                    if list(self.vit.buffers()):  # no file has them
                        self.vit = timm.create_model(name, **options)
                    load_weights(self.vit, Path(weights))
            self.prefix = self.vit.num_prefix_tokens  # class and register tokens; a Swin has no such number
            self.grid = tuple(self.vit.patch_embed.grid_size)  # (rows, columns); N = rows * columns
        self.vit.requires_grad_(False).eval()
        self.dim = self.vit.num_features
        config = timm.data.resolve_model_data_config(self.vit)
        self.input_size = tuple(self.vit.patch_embed.img_size)  # (height, width) in pixels
        self.interpolation = config["interpolation"]  # how pictures are resized to it
        for name in ("mean", "std"):  # of pixels from 0 to 1, [3, 1, 1]
            self.register_buffer(name, torch.tensor(config[name])[:, None, None], persistent=False)

    def fingerprint(self):
        """All that decides f_I's output: {name: value}."""
        pixels = [self.input_size, self.interpolation, *(x.flatten().tolist() for x in (self.mean, self.std))]
        return {"f_I weights": hash_weights(self.vit),
                "f_I heads": [part.num_heads for part in self.vit.modules() if hasattr(part, "num_heads")],
                "f_I input": str(pixels),
                "f_I architecture": self.vit.pretrained_cfg.get("architecture")}

    @torch.no_grad()
    def forward(self, images, index=None):
        """images [B, 3, H, W] uint8 -> patch tokens [B, N, D_I]. With index [B or 1, K], f_I sees only
        these patches -> [B, K, D_I] (as I-JEPA's VisionTransformer.forward with masks)."""
        vit = self.vit.eval() if self.vit.training else self.vit  # net.train() must not wake it
        pixels = (images / 255 - self.mean) / self.std
        if index is None:
            return vit.forward_features(pixels)[:, self.prefix:]
        prefix, patches = vit._pos_embed(vit.patch_embed(pixels)).tensor_split([self.prefix], dim=1)
        x = torch.cat([prefix, gather(patches, index)], dim=1)  # [B, prefix + K, D_I]
        return vit.norm(vit.blocks(vit.norm_pre(x)))[:, self.prefix:]


def toy_vit():
    """A seeded, untrained 2-layer ViT: 48 x 48 pixels, a 6 x 6 grid of 8-pixel patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=96, depth=2,
                                 num_heads=3, num_classes=0)


# transformers' names in an I-JEPA encoder -> timm's. The order matters: some are parts of earlier names
HUB_NAMES = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer": "blocks",
             "embeddings.position_embeddings": "pos_embed", "layernorm_before": "norm1",
             "layernorm_after": "norm2", "layernorm": "norm", "attention.attention.query": "attn.qkv",
             "attention.output.dense": "attn.proj", "output.dense": "mlp.fc2",
             "intermediate.dense": "mlp.fc1"}


def refuse_stand_ins(*paths):
    """Raises ValueError for a web page or git-lfs pointer that a download left in a file's place."""
    page = rb"(?i)(\xef\xbb\xbf)?\s*(<!|<html|<head|<\?xml|version https://git-lfs)"
    for path in paths:
        with open(path, "rb") as file:
            if re.match(page, file.read(300)):
                raise ValueError(f"{path} is a web page or a pointer of git-lfs, not the file itself")


def load_weights(vit, path):
    """Put the weights of a file, or of a folder's model.safetensors, into a ViT. Runs no code of the file."""
    path = path / "model.safetensors" if path.is_dir() else path
    refuse_stand_ins(path)
    state = timm.models.load_state_dict(str(path), weights_only=True)
    if "embeddings.position_embeddings" in state:
        for key in [key for key in state if ".query." in key]:
            parts = [state.pop(key.replace("query", part)) for part in ("query", "key", "value")]
            state[key] = torch.cat(parts)  # [3 * D_I, D_I] or [3 * D_I]
        for theirs, ours in HUB_NAMES.items():
            state = {key.replace(theirs, ours): value for key, value in state.items()}
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", lambda state, vit: state)
    state = {key: value.float() for key, value in convert(state, vit).items() if not key.startswith("head")}
    vit.load_state_dict(state, assign=True)


class TextEncoder(nn.Module):
    """f_T: a BERT-like Hugging Face encoder and its tokenizer, by name or local folder. Raises UserError if
    it is not there or its weights are not its config's: transformers would fill in or drop some."""

    def __init__(self, name, vocabulary=()):
        super().__init__()
        advice = "f_T is a BERT-like encoder, by its name on the hub or its downloaded folder"
        with user_errors(f"--text_encoder {name} cannot be loaded", advice):
            if name == "toy":
                self.tokenizer, self.bert = toy_bert(vocabulary)
            else:
                weights = ".safetensors" if any(Path(name).glob("*.safetensors")) else ".bin"
                read = {".json", ".txt", ".model", weights}  # of a folder, not of a name on the hub
                refuse_stand_ins(*(path for path in Path(name).glob("*") if path.suffix in read))
                self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                # For a folder without tokenizer, transformers makes one of special tokens alone
                known = self.tokenizer.get_vocab().keys() - self.tokenizer.all_special_tokens
                words = self.tokenizer("a red dog", add_special_tokens=False)["input_ids"] if known else []
                if not 2 * words.count(self.tokenizer.unk_token_id) < len(words) < 7:  # 9: by letters
                    raise ValueError("its tokenizer is not there, or knows no English word")
                options = dict(dtype=torch.float32, output_loading_info=True)  # some are stored in 16 bits
                self.bert, info = AutoModel.from_pretrained(name, trust_remote_code=False, **options)
                self.bert.pooler = None  # above s_T; random if the folder has none
                wrong = [key for key in info["missing_keys"] if "pooler" not in key]
                wrong += [key for key in info["unexpected_keys"] if re.search(r"layers?\.\d", key)]
                if wrong:  # other unexpected ones are heads
                    raise ValueError(f"its weights are not those of its config: {wrong}")
            config = self.bert.config
            limits = self.tokenizer.model_max_length, config.max_position_embeddings
            if config.is_encoder_decoder or self.tokenizer.pad_token is None or min(limits) < 2:
                raise ValueError("it has a decoder, no padding token, or no limit of length")
            if max(self.tokenizer.get_vocab().values()) >= config.vocab_size:
                raise ValueError("its tokenizer has more tokens than its embedding: it is another encoder's")
            self.dim = config.hidden_size
            self.max_tokens = min(128, *limits)  # 128: a tweet of 140 characters or a COCO caption fits
        self.bert.requires_grad_(False).eval()

    def fingerprint(self):
        """All that decides f_T's output: {name: value}."""
        config = json.loads(self.bert.config.to_json_string(use_diff=False))
        of_no_effect = {"_name_or_path", "transformers_version", "architectures", "dtype"}
        words = sorted(self.tokenizer.get_vocab().items())
        # The vocabulary does not show how capitals, accents, other scripts and signs are treated.
        sample = ["Caf\u00e9, \u4f60\u597d: #Tag @user 3.14", *(word.upper() for word, _ in words[:200])]
        tokens = json.dumps([words, self.tokenize(sample)["input_ids"], self.max_tokens]).encode()
        return {"f_T weights": hash_weights(self.bert),
                "f_T tokenizer": hashlib.blake2b(tokens, digest_size=16).hexdigest(),
                **{f"f_T {name}": config[name] for name in config if name not in of_no_effect}}

    def tokenize(self, texts, **options):
        """B strings -> the tokenizer's output, cut to `max_tokens`."""
        # Without special tokens, "" would have no token, and attention over no token is NaN.
        texts = [text if text.strip() else self.tokenizer.unk_token or "." for text in texts]
        return self.tokenizer(texts, truncation=True, max_length=self.max_tokens, padding_side="right",
                              return_token_type_ids=False, **options)

    @torch.no_grad()
    def forward(self, texts):
        """B strings -> token states [B, L, D_T] and text_mask [B, L]"""
        batch = self.tokenize(texts, padding=True, return_tensors="pt").to(self.bert.device)
        return self.bert.eval()(**batch).last_hidden_state, batch["attention_mask"].bool()


def toy_bert(vocabulary):
    """A seeded, untrained 2-layer BERT and a tokenizer with one token for each word of `vocabulary`."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary])}
    tokenizer = BertTokenizer(words, strip_accents=False, tokenize_chinese_chars=False, mask_token=None)
    config = BertConfig(vocab_size=len(words), hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=192, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tokenizer, BertModel(config, add_pooling_layer=False)


def hash_weights(module):
    """A hash of the names, shapes and values of a module's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- Checkpoints ----

TRAINED = ("context_encoder", "target_encoder", "predictor", "whiten")  # weights that a checkpoint stores
CHECKPOINT_KEYS = ("config", "encoders", "identity", "coco", "held_out", "skipped", "step", "start_share",
                   "model", "optimizer", "scaler", "running", "log")


@contextmanager
def open_checkpoint(path):
    """A block that reads a checkpoint of pretrain.py. Gives it the entries, on the CPU; runs no code of the
    file. Errors in the block become a UserError that names the file."""
    with user_errors(f"{path} is not a complete checkpoint of this version", "give another file or folder"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        yield {key: checkpoint[key] for key in CHECKPOINT_KEYS}


def differences(then, now):
    """The entries of two dicts that differ, in words. Ignores keys of only one: library versions differ."""
    return ", ".join(f"{key} (then {str(then[key])[:60]}, now {str(now[key])[:60]})"
                     for key in now if key in then and then[key] != now[key])


# ---- Devices and errors ----

DTYPES = ("auto", "float32", "bfloat16", "float16")  # of the forward passes
# What torch, timm, transformers, safetensors, the hub and its HTTP library (httpx or a successor) raise
HTTP = sys.modules[hub_errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
LOADING_ERRORS = (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError,
                  AssertionError, ImportError, pickle.UnpicklingError, SafetensorError, HTTP.HTTPError,
                  HTTP.InvalidURL, hub_errors.StrictDataclassError)
OUT_OF_MEMORY = "out of memory|allocate memory|start new thread"  # the words of torch and of Python


def pick_device(name="auto"):
    """"auto" (the first there is of cuda, mps, cpu) or torch's name -> device. Raises UserError."""
    if name == "auto":  # torch warns of a GPU whose driver is too old
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with user_errors(f"--device {name} cannot be had", "try --device auto"):
        device = torch.device(name)
        torch.empty(0, device=device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # set_device takes no device without a number
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
        # cuDNN plans attention anew for each shape: five times as slow if shapes change each step
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_dtype(name, device):
    """"auto" -> bfloat16 where CUDA has it, else float16 on CUDA, float32 elsewhere; or the named dtype."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class UserError(Exception):
    """An error that the user can mend. Its message names the file or the option."""


@contextmanager
def user_errors(what, advice):
    """A block that loads a file: what loaders raise on a wrong file becomes a UserError."""
    try:
        yield
    except Exception as error:
        listed = isinstance(error, LOADING_ERRORS) or type(error) is Exception  # tokenizers raises just this
        if not listed or re.search(OUT_OF_MEMORY, str(error)):
            raise
        causes, cause = [], error
        while (cause := cause.__cause__ or cause.__context__) and cause not in causes:
            causes.append(cause)
        causes.sort(key=lambda one: getattr(one, "response", None) is None)  # a server's answer first
        reason = f"{type(error).__name__}: {error}" + (f" ({causes[0]})" if causes else "")
        reason = " ".join(reason.split())[:600]
        if "weights_only" in reason:  # torch and timm advise to run the file's code
            reason = "it is no file of weights, or one that runs code"
        raise UserError(f"{what}: {reason}; {advice}") from error
