"""Pretrain TI-JEPA on COCO captions: one hand-written loop.

    python pretrain.py --preset toy --coco data/toy/coco --out out/toy

Writes OUT/checkpoint.pt (weights of X, X~ and g, with the config they were trained by) and OUT/log.jsonl, one line of
numbers per --log_every steps:

    step, epoch      optimiser steps done, and the epoch they are in
    loss             mean energy of the pairs since the last line. Not evidence of learning: it also falls in a collapse
    lr, wd, momentum the three schedules at this step
    grad_norm        norm of all gradients before clipping, of this step
    target_std       std of X~'s normalised targets over the images of a micro-batch, mean over positions and dimensions:
                     0 if all images have the same target (collapse), about 1 at most
    images_per_s     images trained on per second since the last line
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model

# What differs between presets in training; the paper's three follow the authors' script (10,000 images, batch 10 x 60).
PAPER = dict(epochs=300, batch_size=600, accumulate=10, max_images=10000, workers=8, log_every=10)
PRESETS = {
    "toy": dict(epochs=60, batch_size=64, accumulate=1, max_images=0, workers=1, log_every=100),
    "tiny": dict(epochs=10, batch_size=64, accumulate=1, max_images=0, workers=2, log_every=10),
    "small": PAPER, "medium": PAPER, "large": PAPER,
}


def parse_args(argv=None):
    """Two passes, so that --help shows the defaults of the preset that is named."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="toy")
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=f"Defaults shown: preset {preset}.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, config = parser.add_argument, model.PRESETS[preset]
    add("--preset", choices=PRESETS, default="toy", help="architecture and training defaults")
    add("--coco", default="data/coco", help="folder with train2017/ and annotations/captions_train2017.json")
    add("--out", default=f"out/{preset}", help="folder for checkpoint.pt and log.jsonl")
    add("--image_encoder", default=config.image_encoder, help="timm name of f_I")
    add("--image_weights", default="", help="local weight file for f_I (empty: timm's own)")
    add("--text_encoder", default=config.text_encoder, help="Hugging Face name or local folder of f_T")
    add("--self_attention", action="store_true", help="self-attention among patches in each block of X")
    add("--loss", choices=("mse", "smooth_l1"), default=config.loss, help="error that is the energy")
    add("--epochs", type=int, default=None, help="passes over the images")
    add("--max_images", type=int, default=None, help="use the first so many images (0: all)")
    add("--batch_size", type=int, default=None, help="images per optimiser step")
    add("--accumulate", type=int, default=None, help="micro-batches a batch is split into; same result, less memory")
    add("--start_lr", type=float, default=2e-4, help="learning rate at the start of the warm-up")
    add("--lr", type=float, default=1e-3, help="learning rate at its end")
    add("--final_lr", type=float, default=1e-6, help="learning rate at the last step")
    add("--warmup", type=float, default=0.1, help="warm-up's share of all steps")
    add("--start_wd", type=float, default=0.04, help="weight decay at the first step")
    add("--final_wd", type=float, default=0.4, help="weight decay at the last step")
    add("--momentum", type=float, default=0.996, help="EMA momentum at the first step; 1 at the last")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of the weights, the order, the captions and the masks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=int, default=None, help="processes that decode images")
    add("--log_every", type=int, default=None, help="steps between log lines")
    parser.set_defaults(**PRESETS[preset])
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: plain functions of the step, 0 .. total - 1


def linear(step, total, start, final):
    """From `start` at step 0 to `final` at the last step, in a straight line."""
    return start + (final - start) * step / max(1, total - 1)


def cosine(step, total, start, final):
    """From `start` at step 0 to `final` at the last step, on half a cosine."""
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * step / max(1, total - 1)))


def warmup_cosine(step, total, warmup, start, peak, final):
    """Linear from `start` to `peak` in `warmup` steps, then a cosine to `final` at the last step."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine(step - warmup, total - warmup, peak, final)


# ---------------------------------------------------------------------------------------------------------------------


def build_model(args, captions):
    """TIJEPA by the arguments. `captions` give the toy text encoder its words; no other encoder looks at them."""
    words = sorted({word for caption in captions for word in caption.lower().split()})
    local = {name: str(Path(path).resolve()) if path and Path(path).exists() else path  # valid from any folder later
             for name, path in (("image_weights", args.image_weights), ("text_encoder", args.text_encoder))}
    config = replace(model.PRESETS[args.preset], image_encoder=args.image_encoder, self_attention=args.self_attention,
                     loss=args.loss, vocabulary=words if args.text_encoder == "toy" else [], **local)
    torch.manual_seed(args.seed)
    return model.TIJEPA(config)


def build_optimizer(net, device):
    """AdamW over X and g. Biases and norms (one-dimensional) are not decayed: group 1."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim <= 1]}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")


def micro_batches(dataset, args, steps):
    """The (image, caption) draws of every micro-batch of the run: `accumulate` of them make a step."""
    epoch, done = 0, 0
    while done < steps:
        for batch in data.epoch_batches(dataset, args.batch_size, args.seed, epoch):
            for part in np.array_split(np.array(batch), args.accumulate):
                yield [tuple(draw) for draw in part.tolist()]
            done += 1
        epoch += 1


def train_step(net, optimizer, scaler, micro, masks, clip, device):
    """One optimiser step on a list of (images, captions) that together are the batch.

    Each micro-batch counts by its number of images, so the gradient is that of the whole batch at once. Returns the
    loss [], the gradient norm [] (both still on the device, so that nothing waits) and the last forward's Output.
    """
    optimizer.zero_grad(set_to_none=True)
    batch, start, loss = len(masks.context), 0, 0.0
    for images, captions in micro:
        part = model.Masks(*(index[start:start + len(captions)] for index in masks)).to(device)
        with model.autocast(device):
            out = net(images.to(device, non_blocking=True), captions, part)
        share = out.loss * len(captions) / batch
        scaler.scale(share).backward()
        loss, start = loss + share.detach(), start + len(captions)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    scaler.step(optimizer)
    scaler.update()
    return loss, norm, out


def save(path, content):
    """Write a checkpoint under a temporary name and rename it when whole."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def next_batch(loader, dataset, accumulate):
    """The next `accumulate` micro-batches as a list of (images, captions); broken images are counted and left out."""
    micro = []
    for _ in range(accumulate):
        images, captions, broken = next(loader)
        for path in broken:
            dataset.left_out.add("broken image", path)
        if captions:
            micro.append((images, captions))
    if not micro:
        raise data.DataError(f"a whole batch of images cannot be read; left out: {dataset.left_out}")
    return micro, sum(len(captions) for _, captions in micro)


def train(args, dataset, net, device, out_dir):
    """The loop. Raises FloatingPointError on a loss that is not finite (looked at when a line is logged)."""
    optimizer = build_optimizer(net, device)
    scaler = torch.amp.GradScaler(device.type, enabled=model.amp_dtype(device) == torch.float16)
    steps_per_epoch = len(data.epoch_batches(dataset, args.batch_size, args.seed, 0))
    steps, saved_epoch = args.epochs * steps_per_epoch, 0
    loader = iter(DataLoader(dataset, batch_sampler=micro_batches(dataset, args, steps), collate_fn=data.collate,
                             num_workers=args.workers, pin_memory=device.type == "cuda"))
    generator = torch.Generator().manual_seed(args.seed)  # of the masks
    net.train()
    losses, images, clock = [], 0, time.time()
    with open(out_dir / "log.jsonl", "w", encoding="utf-8") as log:
        for step in tqdm(range(steps), desc="pretrain"):
            lr = warmup_cosine(step, steps, int(args.warmup * steps), args.start_lr, args.lr, args.final_lr)
            wd = cosine(step, steps, args.start_wd, args.final_wd)
            momentum = linear(step, steps, args.momentum, 1.0)
            for group, decay in zip(optimizer.param_groups, (wd, 0.0)):
                group["lr"], group["weight_decay"] = lr, decay

            micro, batch = next_batch(loader, dataset, args.accumulate)
            masks = model.sample_masks(net.grid, batch, generator)
            loss, norm, out = train_step(net, optimizer, scaler, micro, masks, args.clip, device)
            net.update_target(momentum)

            losses, images, done = [*losses, loss], images + batch, step + 1
            if done % args.log_every and done < steps:
                continue
            line = dict(step=done, epoch=done / steps_per_epoch, loss=mean_loss(losses, done), lr=lr, wd=wd,
                        momentum=momentum, grad_norm=norm.item(), target_std=target_std(out.target),
                        images_per_s=images / (time.time() - clock))
            log.write(json.dumps(line) + "\n")
            log.flush()
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in line.items()))
            if done // steps_per_epoch > saved_epoch:  # only here, where the losses are known to be finite
                saved_epoch = done // steps_per_epoch
                save(out_dir / "checkpoint.pt", {"config": asdict(net.config), "args": vars(args), "step": done,
                                                 "model": net.trained_state(), "left_out": dataset.left_out.counts()})
            losses, images, clock = [], 0, time.time()


def mean_loss(losses, done):
    """Losses [] of the last steps up to step `done` -> their mean. Raises FloatingPointError if one is not finite."""
    values = torch.stack(losses).float().cpu()  # the only place where the host waits for the device
    if not values.isfinite().all():
        bad = int((~values.isfinite()).nonzero()[0])
        raise FloatingPointError(f"the loss of step {done - len(losses) + 1 + bad} is {values[bad]}; lower --lr or --clip")
    return values.mean().item()


def target_std(target):
    """target [B, N, D] -> std over the B images, mean over positions and dimensions (0.0 if B is 1)."""
    return target.std(dim=0, correction=0).mean().item()


def main(argv=None):
    args = parse_args(argv)
    try:
        dataset = data.CocoCaptions(args.coco, args.max_images)  # before any model: missing data must not cost a download
        device, out_dir = model.choose_device(args.device), Path(args.out)
        out_dir.mkdir(parents=True, exist_ok=True)
        print(f"pretrain: preset {args.preset}, {len(dataset)} images of {args.coco} (left out: {dataset.left_out}), "
              f"device {device}, {model.amp_dtype(device)}")
        net = build_model(args, [caption for _, captions in dataset.items for caption in captions]).to(device)
        dataset.transform = data.image_transform(net.image_encoder.data_config)
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        frozen = sum(p.numel() for part in (net.image_encoder, net.text_encoder) for p in part.parameters())
        print(json.dumps({"args": vars(args), "model": asdict(replace(net.config, vocabulary=[])),
                          "patch_grid": net.grid, "parameters": {"trained": trained, "frozen": frozen}}, indent=1))
        train(args, dataset, net, device, out_dir)
    except (data.DataError, model.EncoderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"pretrain: wrote {out_dir / 'checkpoint.pt'} and {out_dir / 'log.jsonl'}; left out: {dataset.left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
