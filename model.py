"""TI-JEPA (arXiv 2503.06380): the model, its masks and its energy. Tensors only; no file but pretrained weights.

Read it top to bottom in the order of the method: presets, frozen encoders f_I and f_T, the text-to-image encoder X
(and its EMA copy X~), the predictor g, the block masks, and `TIJEPA`, which puts them together.

Glossary (B batch, N patches, L text tokens, M target blocks, P patches of a block, C context patches)

    here                     paper        shape              meaning
    images, texts            I, T         [B,3,H,W], list    a preprocessed picture and its caption
    image_encoder            f_I          -> [B, N, D_I]     frozen ViT, patch tokens only
    text_encoder             f_T          -> [B, L, D_T]     frozen text transformer, token states
    s_image, s_text          s_I, s_T     see above          what the frozen encoders say
    text_mask                -            [B, L] bool        True where s_text is a token, False where it is padding
    context_encoder          X (theta)    -> [B, C, D]       trained; sees the context patches and the caption
    target_encoder           X~ (xi)      -> [B, N, D]       EMA copy of X; sees all patches and the caption
    predictor                g (phi)      -> [B, M, P, D]    narrow ViT from context tokens to hidden patches
    masks.context            B_x          [B, C] int         indices of the visible patches
    masks.target             B_y(i)       [B, M, P] int      indices of the hidden patches, block by block
    energy                   E(I, T)      [B]                error of the prediction, one number per pair
    momentum                 m            float              xi <- m xi + (1 - m) theta

With `target="image"` the target is s_image itself, layer-normalised, instead of X~'s tokens; X~ is still kept, as the
encoder that `TIJEPA.encode` uses.

Does NOT include: data, training loops, image augmentation, negatives or a contrastive term, text masking (captions are
always read whole), more than one context block, distributed training.

Differs from I-JEPA (github.com/facebookresearch/ijepa): the encoder below X is frozen; the mask sampler reaches the last
row and column, draws scale and aspect independently, never truncates in raster order, and ends on any grid.
Differs from the authors' code: squared error by default as in the paper (their scripts optimise smooth L1, here
`loss="smooth_l1"`), no dropout, a norm after each input projection; f_I is timm's copy of I-JEPA's `encoder` weights
(their scripts take `target_encoder` of the same file).
"""
import copy
import hashlib
import math
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

MAX_TEXT_TOKENS = 128  # a tweet of 140 characters or a COCO caption fits with room; longer texts are cut here


# What torch.load and timm's loader raise on a file that is not the checkpoint it is taken for
NOT_A_CHECKPOINT = (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError)


class ModelError(ValueError):
    """The model cannot be had as asked for, or not on this machine; the message names what mends it."""


@dataclass
class Config:
    """Everything that fixes the architecture. Saved with each checkpoint, so that a model can be built from it."""
    image_encoder: str  # a timm name, or "toy"
    text_encoder: str  # a Hugging Face name or a local folder, or "toy"
    dim: int  # D, width of X and X~
    depth: int  # blocks of X
    heads: int  # attention heads of X
    predictor_depth: int = 12
    predictor_dim: int = 384
    predictor_heads: int = 12
    image_weights: str = ""  # a weight file for image_encoder; empty: timm's own pretrained weights
    self_attention: bool = False  # self-attention among patches before each cross-attention
    loss: str = "mse"  # or "smooth_l1"
    target: str = "ema"  # what is predicted: X~'s tokens (the paper), or "image": f_I's own tokens
    vicreg: float = 0.0  # weight of the variance-covariance term on X's output
    vocabulary: list = field(default_factory=list)  # the words known to the "toy" text encoder


JEPA_14, JEPA_16 = "vit_huge_patch14_gap_224.in1k_ijepa", "vit_huge_patch16_gap_448.in1k_ijepa"
GTE = "alibaba-nlp-community/gte-{}-en-v1.5"
PRESETS = {
    # The two small ones predict f_I's tokens: what the README's measurements favour. The paper's three keep its recipe.
    # All predictors have heads of 32, as I-JEPA's: a tenth faster than heads of 24 on a CPU.
    "toy": Config("toy", "toy", 96, 2, 4, 2, 64, 2, target="image"),
    "tiny": Config("vit_tiny_patch16_224", "sentence-transformers/all-MiniLM-L6-v2", 192, 2, 4, 4, 96, 3, target="image"),
    "small": Config(JEPA_14, GTE.format("base"), 768, 4, 8),
    "medium": Config(JEPA_14, GTE.format("base"), 768, 6, 12),
    "large": Config(JEPA_16, GTE.format("large"), 1024, 8, 16),
}


# ---------------------------------------------------------------------------------------------------------------------
# f_I and f_T: frozen, always in eval mode


class Frozen(nn.Module):
    """A module that stays in eval mode whatever `.train()` is called on."""

    def train(self, mode=True):
        return super().train(False)


class ImageEncoder(Frozen):
    """f_I: a timm ViT without its classifier. `weights` is a file that replaces timm's own pretrained weights."""

    def __init__(self, name, weights=""):
        super().__init__()
        self.vit = toy_vit() if name == "toy" else load_vit(name, weights)
        self.vit.requires_grad_(False).eval()
        if not hasattr(getattr(self.vit, "patch_embed", None), "grid_size"):
            raise ModelError(f"--image_encoder {name}: not a ViT with a fixed patch grid")
        self.grid = tuple(self.vit.patch_embed.grid_size)  # (rows, columns) of patches; N = rows * columns
        self.dim = self.vit.num_features
        config = timm.data.resolve_model_data_config(self.vit)
        self.data_config = {key: config[key] for key in ("interpolation", "mean", "std")}
        self.data_config["input_size"] = (3, *self.vit.patch_embed.img_size)

    @torch.no_grad()
    def forward(self, images):
        """images [B, 3, H, W] -> patch tokens [B, N, D_I]; class and register tokens are dropped."""
        tokens = self.vit.forward_features(images)  # [B, prefix + N, D_I]
        tokens = tokens[:, getattr(self.vit, "num_prefix_tokens", 0):]
        if tokens.ndim != 3 or tokens.shape[1] != self.grid[0] * self.grid[1]:  # a Swin has a patch grid, but merges it
            raise ModelError(f"--image_encoder gives {list(tokens.shape)}, not one token for each of {self.grid} patches")
        return tokens


def toy_vit():
    """A seeded, untrained 2-layer ViT: 48 x 48 pixels, a 6 x 6 grid of 8-pixel patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=96, depth=2, num_heads=3,
                                 num_classes=0)


def load_vit(name, weights):
    """Build a timm ViT with its pretrained weights, or with those of the file `weights`.

    timm's own converter for the architecture reads the file, so I-JEPA's `.pth.tar` works too. Raises ModelError if
    the name is unknown, the hub cannot be reached, or a key is missing or left over (the classifier's excepted).
    """
    try:
        vit = timm.create_model(name, pretrained=not weights, num_classes=0)
    except OSError as error:  # the hub's and urllib's connection errors are OSErrors
        raise ModelError(f"--image_encoder {name}: its weights cannot be downloaded ({error}). "
                         "Give a local file with --image_weights FILE") from error
    except RuntimeError as error:  # timm: unknown model, or no pretrained weights exist for it
        raise ModelError(f"--image_encoder {name}: {error}") from error
    if not weights:
        return vit
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    try:
        keys = load_checkpoint(vit, weights, strict=False, filter_fn=convert)
    except NOT_A_CHECKPOINT as error:  # or of another architecture
        raise ModelError(f"--image_weights {weights} does not load into {name}: {error}") from error
    if keys is not None:  # None: timm's npz reader, which raises on what does not fit
        head = vit.pretrained_cfg.get("classifier") or ()  # f_I has none: its weights in the file may be left over
        head = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
        unexpected = [key for key in keys.unexpected_keys if not (head and key.startswith(head))]
        if keys.missing_keys or unexpected:
            raise ModelError(f"--image_weights {weights} does not fit {name}: missing keys {keys.missing_keys}, "
                             f"unexpected keys {unexpected}")
    return vit


class TextEncoder(Frozen):
    """f_T: any Hugging Face encoder and its tokenizer, by name or local folder."""

    def __init__(self, name, vocabulary=()):
        super().__init__()
        self.tokenizer, self.bert = toy_bert(vocabulary) if name == "toy" else load_text_encoder(name)
        self.bert.requires_grad_(False).eval()
        self.dim = self.bert.config.hidden_size
        self.tokenizer.padding_side = "right"  # so that the position of a token does not depend on its batch-mates
        limits = (self.tokenizer.model_max_length, getattr(self.bert.config, "max_position_embeddings", None))
        self.max_tokens = min(MAX_TEXT_TOKENS, *(limit for limit in limits if limit))

    def tokens(self, texts, **options):
        """B strings -> what the tokenizer makes of them, cut to `max_tokens`."""
        # A tokenizer without special tokens gives "" no token at all, and attention over nothing is NaN.
        texts = [text if text.strip() else self.tokenizer.unk_token or "." for text in texts]
        return self.tokenizer(texts, truncation=True, max_length=self.max_tokens, return_token_type_ids=False, **options)

    @torch.no_grad()
    def forward(self, texts):
        """B strings -> token states [B, L, D_T] and their mask [B, L] (True: token, False: padding)."""
        batch = self.tokens(texts, padding=True, return_tensors="pt").to(self.bert.device)
        states = self.bert(**batch).last_hidden_state
        return states, batch["attention_mask"].bool()


def toy_bert(vocabulary):
    """A seeded, untrained 2-layer BERT and a tokenizer with one token per word of `vocabulary`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # a dependency of transformers
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = BertModel(BertConfig(vocab_size=len(words), hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    intermediate_size=192, max_position_embeddings=64), add_pooling_layer=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
                                   cls_token="[CLS]", sep_token="[SEP]", model_max_length=64), bert


def load_text_encoder(name):
    """AutoTokenizer and AutoModel from a hub name or a folder. Raises ModelError if either cannot be had or a weight
    of the encoder is missing from the checkpoint (transformers would fill it at random with only a warning)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Some checkpoints are stored in half precision, which X's float32 weights could not be multiplied with.
        model, info = AutoModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:  # unreachable or no such folder; unknown architecture or files
        raise ModelError(f"--text_encoder {name} cannot be loaded: {error}\nGive the folder of a downloaded model "
                         "with --text_encoder PATH") from error
    # The pooler works on the class token after the last layer; s_T is the token states below it.
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing or info["mismatched_keys"]:
        raise ModelError(f"--text_encoder {name}: missing keys {missing}, keys of another shape "
                         f"{sorted(info['mismatched_keys'])}, unexpected keys {sorted(info['unexpected_keys'])}")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, model


# ---------------------------------------------------------------------------------------------------------------------
# X, X~ and g


class Attention(nn.Module):
    """Multi-head attention from `x` to `memory` (self-attention when they are the same)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ModelError(f"heads={heads} do not divide the width dim={dim}: change one of the two in the Config")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, memory, mask=None):
        """x [B, N, D], memory [B, L, D], mask [B, L] bool or None (True: may be attended to) -> [B, N, D]"""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, D/heads]
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x [B, heads, L, D/heads]
        mask = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, L]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, heads, N, D/heads]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, N, D]


class Block(nn.Module):
    """Pre-LN transformer block: self-attention, cross-attention to the text, MLP of ratio 4; either attention may be
    absent. X uses cross (and with `self_attention` both), the predictor only self."""

    def __init__(self, dim, heads, self_attention, cross_attention):
        super().__init__()
        self.norm_self, self.self_attn = (nn.LayerNorm(dim), Attention(dim, heads)) if self_attention else (None, None)
        self.norm_cross, self.cross = (nn.LayerNorm(dim), Attention(dim, heads)) if cross_attention else (None, None)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, text=None, text_mask=None, start=0):
        """x [B, N, D], text [B, L, D], text_mask [B, L] -> [B, N, D]; of the tokens x[:, start:] only, if so asked: all
        are still attended to, but what nobody reads is not computed."""
        if self.self_attn is not None:
            h = self.norm_self(x)
            x = x[:, start:] + self.self_attn(h[:, start:], h)
        if self.cross is not None:
            x = x + self.cross(self.norm_cross(x), text, text_mask)
        return x + self.mlp(self.norm_mlp(x))


def init_weights(module):
    """MAE's initialisation (models_mae.py): Xavier uniform, zero biases.

    Not I-JEPA's truncated normal of std 0.02: at widths of 96 and 192 that is a fifth to a third of Xavier's, and the
    caption then hardly reaches the prediction for the first hundreds of steps (README, "Does the energy mean anything?").
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class FusionEncoder(nn.Module):
    """X: image tokens are queries, text tokens keys and values (paper section 3, the "text-to-image" encoder)."""

    def __init__(self, image_dim, text_dim, dim, depth, heads, self_attention=False):
        super().__init__()
        self.image_proj = nn.Sequential(nn.Linear(image_dim, dim), nn.LayerNorm(dim))
        self.text_proj = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.blocks = nn.ModuleList(Block(dim, heads, self_attention, True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.apply(init_weights)

    def forward(self, s_image, s_text, text_mask):
        """s_image [B, N, D_I] (any subset of the patches), s_text [B, L, D_T], text_mask [B, L] -> [B, N, D]"""
        x, text = self.image_proj(s_image), self.text_proj(s_text)
        for block in self.blocks:
            x = block(x, text, text_mask)
        return self.norm(x)


class TargetEncoder(Frozen):
    """X~: starts as an exact copy of X, has no gradients, is always in eval mode, and follows X by EMA."""

    def __init__(self, context_encoder):
        super().__init__()
        self.encoder = copy.deepcopy(context_encoder).requires_grad_(False).eval()

    def forward(self, s_image, s_text, text_mask):
        """As FusionEncoder: -> [B, N, D]"""
        return self.encoder(s_image, s_text, text_mask)


def sincos_2d(grid, dim):
    """Fixed 2-D sine-cosine positions (I-JEPA's pos_embs.py): half of `dim` tells the row, half the column.

    grid (rows, columns) -> [rows * columns, dim], raster order. Raises ModelError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ModelError(f"2-D sin-cos positions need a width that is a multiple of 4, not predictor_dim={dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (rows, columns)]  # 2 x [N, dim/4]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


class Predictor(nn.Module):
    """g: I-JEPA's narrow ViT. From the context tokens and a mask token at each hidden position, predict X~ there."""

    def __init__(self, grid, dim, width, depth, heads, target_dim):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_2d(grid, width)[None], persistent=False)  # [1, N, width]
        self.blocks = nn.ModuleList(Block(width, heads, True, False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, target_dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer, block in enumerate(self.blocks, start=1):  # I-JEPA's fix_init_weight: deeper layers start smaller
            block.self_attn.proj.weight.data.div_(math.sqrt(2 * layer))
            block.mlp[2].weight.data.div_(math.sqrt(2 * layer))

    def forward(self, context, masks):
        """context [B, C, D] at masks.context, masks.target [B, M, P] -> predictions [B, M, P, target_dim]

        Each target block is predicted on its own: it sees the context, never another block's mask tokens.
        """
        B, M, P = masks.target.shape
        positions = self.positions.expand(B, -1, -1)  # [B, N, width]
        visible = self.embed(context) + gather(positions, masks.context)  # [B, C, width]
        visible = visible.repeat_interleave(M, dim=0)  # [B * M, C, width]
        hidden = self.mask_token + gather(positions, masks.target.flatten(1))  # [B, M * P, width]
        hidden = hidden.reshape(B * M, P, -1)  # [B * M, P, width]
        x = torch.cat([visible, hidden.to(visible.dtype)], dim=1)  # [B * M, C + P, width]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = self.proj(self.norm(last(x, start=-P)))  # [B * M, P, target_dim]: the mask tokens only
        return x.unflatten(0, (B, M))  # [B, M, P, target_dim]


# ---------------------------------------------------------------------------------------------------------------------
# Masks


class Masks(NamedTuple):
    """Patch indices in raster order. No index of an image's context is in any of its target blocks."""
    context: torch.Tensor  # [B, C]
    target: torch.Tensor  # [B, M, P]

    def to(self, device):
        return Masks(*(index.to(device, non_blocking=True) for index in self))

    def part(self, start, stop):
        """The masks of images start .. stop - 1 of the batch."""
        return Masks(*(index[start:stop] for index in self))

    def pin_memory(self):
        return Masks(*(index.pin_memory() for index in self))


def gather(tokens, index):
    """tokens [B, N, D], index [B, K] -> [B, K, D]"""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


def sample_masks(grid, batch, generator, blocks=4, target_area=(0.15, 0.2), target_aspect=(0.75, 1.5),
                 context_area=(0.85, 1.0)):
    """I-JEPA's multi-block masks (paper section 3.2; I-JEPA's masks/multiblock.py), drawn for each image.

    The block sizes are drawn once per batch and the context is cut to the smallest of the batch, so that all tensors are
    rectangular. The cut drops patches at random: in raster order it would always be the bottom rows. Areas are shares
    of the grid, the aspect is height / width relative to the grid's. The same (grid, batch, generator state) gives the
    same masks. Raises ModelError for a grid with nothing left to see beside a target block.
    """
    rows, columns = grid
    N = rows * columns
    h, w = block_size(grid, target_area, target_aspect, generator)
    context_h, context_w = block_size(grid, context_area, (1.0, 1.0), generator)
    minimum = max(1, N // 10)  # fewer visible patches than this, and the image's masks are drawn again
    if N - h * w < minimum:
        raise ModelError(f"a {rows} x {columns} patch grid is too small for block masks: take an --image_encoder with more "
                         "patches")

    def corners(count, height, width):  # of blocks that may touch every edge: 2 x [batch, count]
        return (torch.randint(rows - height + 1, (batch, count), generator=generator),
                torch.randint(columns - width + 1, (batch, count), generator=generator))

    top, left = corners(blocks, h, w)
    context = inside(grid, *corners(1, context_h, context_w), context_h, context_w)[:, 0]  # [B, N]
    visible = context & ~inside(grid, top, left, h, w).any(1)  # [B, N]
    for _ in range(20):
        bad = visible.sum(1) < minimum  # [B]
        if not bad.any():
            break
        top, left = (torch.where(bad[:, None], new, old) for new, old in zip(corners(blocks, h, w), (top, left)))
        visible = context & ~inside(grid, top, left, h, w).any(1)
    else:  # a grid this coarse may never do it with distinct blocks: lay them on one another, and see all the rest
        bad = visible.sum(1) < minimum
        top, left = (torch.where(bad[:, None], corner[:, :1], corner) for corner in (top, left))
        visible = torch.where(bad[:, None], ~inside(grid, top, left, h, w).any(1), visible)

    order = torch.rand(batch, N, generator=generator).masked_fill(~visible, -1.0)
    context = order.topk(int(visible.sum(1).min()), dim=1).indices.sort(dim=1).values  # [B, C]
    block = (torch.arange(h)[:, None] * columns + torch.arange(w)).flatten()  # [P]: offsets from the corner
    return Masks(context, (top * columns + left)[:, :, None] + block)  # [B, C], [B, M, P]


def block_size(grid, area, aspect, generator):
    """Height and width in patches of a block whose area (share of the grid) and aspect are uniform in their ranges."""
    u, v = torch.rand(2, generator=generator).tolist()
    scale, ratio = area[0] + u * (area[1] - area[0]), aspect[0] + v * (aspect[1] - aspect[0])
    sides = math.sqrt(scale * ratio), math.sqrt(scale / ratio)
    return tuple(min(max(round(side * size), 1), size) for side, size in zip(sides, grid))


def inside(grid, top, left, h, w):
    """Which patches lie in the h x w blocks with these corners: top, left [B, M] -> [B, M, N] bool"""
    row = torch.arange(grid[0])[:, None] - top[:, :, None, None]  # [B, M, rows, 1]
    column = torch.arange(grid[1]) - left[:, :, None, None]  # [B, M, 1, columns]
    return ((row >= 0) & (row < h) & (column >= 0) & (column < w)).flatten(2)


# ---------------------------------------------------------------------------------------------------------------------
# The whole


class Output(NamedTuple):
    """What one forward pass gives. D is X~'s width, or f_I's with `target="image"`."""
    loss: torch.Tensor  # []: mean energy of the batch, plus the variance-covariance term if there is one
    energy: torch.Tensor  # [B]
    target: torch.Tensor  # [B, M, P, D]: the normalised targets of the hidden patches
    prediction: torch.Tensor  # [B, M, P, D]


def vicreg_term(context):
    """VICReg's variance and covariance terms (Bardes et al. 2022, sections 4.1 and 4.2, with its 25 : 1) on X's output.

    context [B, C, D] -> []: the mean over patches [B, D] should have a std of 1 in each dimension over the B pairs, and
    no two dimensions should correlate. 0 when both hold. Needs B > 1; a small B makes it noisy.
    """
    z = context.float().mean(1)  # [B, D]
    z = z - z.mean(0)
    covariance = z.T @ z / max(1, len(z) - 1)  # [D, D]
    variance = F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    return variance + off_diagonal.square().sum() / z.shape[1] / 25


def sample_std(tokens):
    """tokens [B, ..., D] -> []: std over the B samples at each place and dimension, then the mean of those.

    A target that tells only the position, not the picture, has 0 here: collapse.
    """
    return tokens.float().std(dim=0, correction=0).mean()


def effective_rank(features):
    """features [B, D] -> []: exp of the entropy of the normalised singular values of the centred features (Roy and
    Vetterli 2007): between 1 (all on a line: dimensional collapse) and min(B - 1, D)."""
    values = torch.linalg.svdvals((features - features.mean(0)).float().cpu()).to(features.device)  # MPS has no SVD
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())


class TIJEPA(nn.Module):
    """The energy-based model of a picture and its caption. `config` is one of PRESETS or your own Config."""

    def __init__(self, config):
        super().__init__()
        if config.loss not in ("mse", "smooth_l1"):
            raise ModelError(f'loss must be "mse" or "smooth_l1", not "{config.loss}"')
        if config.target not in ("ema", "image"):
            raise ModelError(f'target must be "ema" or "image", not "{config.target}"')
        self.config = config
        self.precision = "auto"  # the option --dtype, see amp_dtype
        self.image_encoder = ImageEncoder(config.image_encoder, config.image_weights)
        self.text_encoder = TextEncoder(config.text_encoder, config.vocabulary)
        self.grid = self.image_encoder.grid
        sample_masks(self.grid, 1, torch.Generator())  # a grid too small is refused here, before anything is encoded
        self.context_encoder = FusionEncoder(self.image_encoder.dim, self.text_encoder.dim, config.dim, config.depth,
                                             config.heads, config.self_attention)
        self.target_encoder = TargetEncoder(self.context_encoder)
        self.predictor = Predictor(self.grid, config.dim, config.predictor_dim, config.predictor_depth,
                                   config.predictor_heads, self.image_encoder.dim if config.target == "image" else config.dim)

    @property
    def device(self):
        return self.predictor.mask_token.device

    @property
    def dtype(self):
        """What matrix products are computed in (see amp_dtype), and the dtype of the features that X is given."""
        return amp_dtype(self.device, self.precision)

    def autocast(self):
        """The context of every forward pass. The methods below enter it themselves, so that no caller can forget it."""
        # Without a context in float32: not every device (meta) has an autocast.
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)

    def frozen(self, images, texts):
        """images [B, 3, H, W], B strings -> s_image [B, N, D_I], s_text [B, L, D_T], text_mask [B, L].

        The frozen half: the same for the same pair, always, which is why data.py can keep it on disk.
        """
        return self.frozen_image(images), *self.frozen_text(texts)

    @torch.no_grad()
    def frozen_image(self, images):
        """f_I: images [B, 3, H, W] -> s_image [B, N, D_I]; 64 at a time, so that a held-out set of any size fits. Raises
        ModelError if H and W are not the encoder's."""
        size = self.image_encoder.data_config["input_size"]
        if tuple(images.shape[1:]) != size:
            raise ModelError(f"images of {list(images.shape[1:])}, where {self.config.image_encoder} takes {list(size)}: "
                             "prepare them with data.image_transform(model.image_encoder.data_config)")
        with self.autocast():
            return torch.cat([self.image_encoder(part.to(self.device, non_blocking=True)) for part in images.split(64)])

    @torch.no_grad()
    def frozen_text(self, texts):
        """f_T: B strings -> s_text [B, L, D_T], text_mask [B, L]."""
        with self.autocast():
            return self.text_encoder(texts)

    def forward(self, s_image, s_text, text_mask, masks):
        """The trained half: what `frozen` gave, and masks (see sample_masks) -> Output. Gradients reach X and g only."""
        with self.autocast():
            context = self.context_encoder(gather(s_image, masks.context), s_text, text_mask)  # X: [B, C, D]
            target = self.target(s_image, s_text, text_mask, masks)  # X~: [B, M, P, D]
            prediction = self.predictor(context, masks)  # g: [B, M, P, D]
        energy = self.energy(prediction, target)  # [B]
        loss = energy.mean()
        if self.config.vicreg:
            loss = loss + self.config.vicreg * vicreg_term(context)
        return Output(loss, energy, target, prediction)

    @torch.no_grad()
    def target(self, s_image, s_text, text_mask, masks):
        """What is to be predicted: X~'s tokens at masks.target, layer-normalised without affine (I-JEPA's train.py).

        With `target="image"` f_I's own tokens instead: fixed, so they cannot collapse, and blind to the caption, so that
        a wrong caption can only make the prediction worse. -> [B, M, P, D]
        """
        hidden = masks.target.flatten(1)  # [B, M * P]
        if self.config.target == "image":
            tokens = gather(s_image, hidden)
        elif self.config.self_attention:  # X~ must see all patches
            tokens = gather(self.target_encoder(s_image, s_text, text_mask), hidden)
        else:  # each patch reads the caption on its own: only those that are asked for are computed
            tokens = self.target_encoder(gather(s_image, hidden), s_text, text_mask)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])  # [B, M * P, D]
        return tokens.unflatten(1, masks.target.shape[1:])  # [B, M, P, D]

    def energy(self, prediction, target):
        """Prediction and target [B, M, P, D] -> [B]: the mean over blocks, patches and dimensions of the squared error,
        or of smooth L1 if the config says so."""
        error = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[self.config.loss]
        return error(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))

    def encode(self, images, texts):
        """images [B, 3, H, W], B strings -> X~'s fused tokens [B, N, D] and their mean [B, D], in float32.

        For use in a model of your own. Preprocess with `data.image_transform(model.image_encoder.data_config)`.
        """
        with self.autocast():
            tokens = self.target_encoder(*self.frozen(images, texts)).float()
        return tokens, tokens.mean(1)

    @torch.no_grad()
    def update_target(self, momentum):
        """xi <- momentum * xi + (1 - momentum) * theta, after each optimiser step."""
        xi, theta = list(self.target_encoder.parameters()), list(self.context_encoder.parameters())
        torch._foreach_mul_(xi, momentum)
        torch._foreach_add_(xi, theta, alpha=1 - momentum)

    @classmethod
    def from_checkpoint(cls, path):
        """A file of pretrain.py -> (TIJEPA in eval mode, everything in the file). Raises ModelError if it is not one."""
        checkpoint = load_checkpoint_file(path)
        net = cls(Config(**checkpoint["config"]))
        net.load_trained_state(checkpoint["model"])
        return net.eval(), checkpoint

    def fingerprint(self):
        """A hash of the weights of f_I and f_T: the same for the same weights, wherever they were loaded from."""
        digest = hashlib.blake2b(digest_size=16)
        for encoder in (self.image_encoder, self.text_encoder):
            for name, value in encoder.state_dict().items():
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def trained_state(self):
        """State dicts of what training changes; the frozen encoders are rebuilt from the config instead."""
        return {name: getattr(self, name).state_dict() for name in ("context_encoder", "target_encoder", "predictor")}

    def load_trained_state(self, state):
        """Load what `trained_state` gave. Raises ModelError naming the keys if it is of another architecture."""
        try:
            for name in ("context_encoder", "target_encoder", "predictor"):
                getattr(self, name).load_state_dict(state[name])
        except (RuntimeError, KeyError) as error:
            raise ModelError(f"the checkpoint's weights are not of the architecture of its config: {error}") from error


def load_checkpoint_file(path):
    """A file of pretrain.py -> the dict in it, on the CPU. Raises ModelError if it is not one. `weights_only`: loading
    cannot run code from the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        Config(**checkpoint["config"]), checkpoint["model"], checkpoint["args"]["held_out"], checkpoint["step"]
    except NOT_A_CHECKPOINT as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ModelError(f"{path} is not a whole checkpoint of pretrain.py: {reason}") from error
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Device and precision, the same for both scripts


def choose_device(name="auto"):
    """"auto" -> cuda, mps or cpu, the first there is; any other name is taken as torch takes it. Raises ModelError if this
    machine has no such device, and on "auto" if it has a GPU that torch cannot use. A CUDA device becomes the current one,
    and multiplies in TF32 what stays in float32."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu":
            refuse_unused_gpu()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ModelError(f"--device {name} cannot be had here ({str(error).splitlines()[0]}); --device auto takes what "
                         "there is") from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def refuse_unused_gpu():
    """Raise ModelError if the driver lists a GPU: a run that is meant for it would take weeks on the CPU."""
    def ask(*options):
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True).stdout.strip()

    if shutil.which("nvidia-smi") and "GPU " in ask("-L"):
        driver = ask("--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        mend = "a newer driver, or a torch for an older CUDA" if torch.version.cuda else "a torch with CUDA"
        raise ModelError(f"nvidia-smi lists a GPU (driver {driver[0] if driver else 'unknown'}), but torch "
                         f"{torch.__version__}, built {built}, cannot use it: install {mend} "
                         "(https://pytorch.org/get-started/locally), or go on without the GPU by --device cpu")


PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def amp_dtype(device, precision="auto"):
    """One of PRECISIONS -> the dtype of autocast. "auto": bfloat16 where CUDA has it, float16 where it does not (needs a
    GradScaler), float32 elsewhere."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if cuda_has_bfloat16() else torch.float16


@torch.compiler.assume_constant_result  # asked within the forward pass, where torch.compile would break its graph
def cuda_has_bfloat16():
    return torch.cuda.is_bf16_supported(including_emulation=False)
