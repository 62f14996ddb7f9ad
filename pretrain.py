"""Pretrain TI-JEPA on COCO captions: one hand-written loop. And measure whether its energy means anything.

    python pretrain.py --preset toy --coco data/toy/coco --out out/toy
    python pretrain.py --eval out/toy/checkpoint.pt --coco data/toy/coco
    python pretrain.py --eval out/toy/checkpoint.pt --image a.jpg --captions "red bars ..." "navy tiles ..."

The first writes OUT/checkpoint.pt (weights of X, X~ and g, with the config they were trained by) and OUT/log.jsonl, one
line of numbers per --log_every steps. Of the training:

    step, epoch      optimiser steps and passes over the images done
    loss             mean of the loss since the last line. Not evidence of learning: it also falls in a collapse
    lr, wd, momentum the three schedules at this step
    grad_norm        norm of all gradients before clipping, of this step
    images_per_s     images trained on per second since the last line

and of the held-out images, with the same masks each time (these are the evidence):

    energy           mean energy of the images with their own captions
    energy_wrong     the same with the caption of another image; the gap to `energy` is what the caption tells
    lower            share of images whose own caption has the lower energy of the two: 0.5 if the energy means nothing
    target_std       std of the targets over images, at each patch and dimension, averaged: about 1 at most, 0 is collapse
    prediction_std   the same of the predictions
    target_rank      effective rank of the images' mean targets: few directions left (1 at worst) is dimensional collapse

--eval writes `eval.json` beside the checkpoint: every held-out image with every held-out caption, over several masks:

    auc              chance that an image's own caption has a lower energy than another's, over all images and captions
    auc_pooled       the same across images: chance that a matched pair has a lower energy than a mismatched one
    recall@1, @5     share of images whose own caption is the one of lowest energy, or among the five lowest, of all
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
    "toy": dict(epochs=20, batch_size=32, accumulate=1, max_images=0, workers=1, log_every=50),
    "tiny": dict(epochs=5, batch_size=16, accumulate=1, max_images=0, workers=1, log_every=56),
    "small": PAPER, "medium": PAPER, "large": PAPER,
}


def parse_args(argv=None):
    """Two passes, so that --help shows the defaults of the preset that is named."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="toy")
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=f"Defaults shown: preset {preset}.", allow_abbrev=False,
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
    add("--target", choices=("ema", "image"), default=config.target, help="predict X~'s tokens (the paper) or f_I's own")
    add("--vicreg", type=float, default=config.vicreg, help="weight of VICReg's variance-covariance term on X's output, "
        "taken over each micro-batch")
    add("--shuffle_captions", action="store_true", help="control: give each image the caption of another while training")
    add("--epochs", type=int, default=None, help="passes over the images")
    add("--max_images", type=int, default=None, help="use the first so many images (0: all)")
    add("--held_out", type=int, default=100, help="images of these that are not trained on but measured on")
    add("--batch_size", type=int, default=None, help="images per optimiser step")
    add("--accumulate", type=int, default=None, help="micro-batches a batch is split into; same result, less memory")
    add("--start_lr", type=float, default=2e-4, help="learning rate at the start of the warm-up")
    add("--lr", type=float, default=1e-3, help="learning rate at its end")
    add("--final_lr", type=float, default=1e-6, help="learning rate at the last step")
    add("--warmup", type=float, default=0.1, help="warm-up's share of all steps")
    add("--start_wd", type=float, default=0.04, help="weight decay at the first step")
    add("--final_wd", type=float, default=0.4, help="weight decay at the last step")
    add("--momentum", type=float, default=0.996, help="EMA momentum at the first step")
    add("--final_momentum", type=float, default=1.0, help="EMA momentum at the last step (both 0: X~ is X)")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of the weights, the order, the captions and the masks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=int, default=None, help="processes that decode images")
    add("--log_every", type=int, default=None, help="steps between log lines")
    add("--eval", default="", metavar="CHECKPOINT", help="do not train: measure this checkpoint's energies")
    add("--eval_masks", type=int, default=2, help="with --eval: masks each energy is averaged over")
    add("--image", default="", help="with --eval and --captions: one image file")
    add("--captions", nargs="+", default=[], help="with --eval and --image: print their energies, lowest first")
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
                     loss=args.loss, target=args.target, vicreg=args.vicreg,
                     vocabulary=words if args.text_encoder == "toy" else [], **local)
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
    loss [] and the gradient norm [], both still on the device, so that nothing waits.
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
    return loss, norm


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


def train(args, dataset, pairs, net, device, out_dir):
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
            momentum = linear(step, steps, args.momentum, args.final_momentum)
            for group, decay in zip(optimizer.param_groups, (wd, 0.0)):
                group["lr"], group["weight_decay"] = lr, decay

            micro, batch = next_batch(loader, dataset, args.accumulate)
            if args.shuffle_captions:
                micro = [(pictures, captions[1:] + captions[:1]) for pictures, captions in micro]
            masks = model.sample_masks(net.grid, batch, generator)
            loss, norm = train_step(net, optimizer, scaler, micro, masks, args.clip, device)
            net.update_target(momentum)

            losses, images, done = [*losses, loss], images + batch, step + 1
            if done % args.log_every and done < steps:
                continue
            line = dict(step=done, epoch=done / steps_per_epoch, loss=mean_loss(losses, done), lr=lr, wd=wd,
                        momentum=momentum, grad_norm=norm.item(), images_per_s=images / (time.time() - clock),
                        **monitor(net, pairs))
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


# ---------------------------------------------------------------------------------------------------------------------
# Does the energy mean anything? Held-out pairs, matched and mismatched


class Pairs:
    """Held-out images and captions as f_I and f_T see them, encoded once: they are looked at many times."""

    def __init__(self, net, images, captions, device):
        with model.autocast(device):
            parts = [net.image_encoder(part.to(device)) for part in images.split(32)]
            self.s_image = torch.cat(parts)  # [I, N, D_I]
            self.s_text, self.text_mask = net.text_encoder(captions)  # [T, L, D_T], [T, L]
        self.device = device

    @torch.no_grad()
    def compare(self, net, captions, masks):
        """Each image with the caption of that index: captions [I], masks of one image -> Output."""
        same = model.Masks(*(index.expand(len(self.s_image), *index.shape[1:]) for index in masks)).to(self.device)
        with model.autocast(self.device):
            return net.compare(self.s_image, self.s_text[captions], self.text_mask[captions], same)


def held_out_pairs(net, held, device):
    """CocoCaptions of held-out images -> Pairs of each with its first caption."""
    images, captions, broken = data.collate([held[i, 0] for i in range(len(held))])
    for path in broken:
        held.left_out.add("broken image", path)
    if len(captions) < 2:
        raise data.DataError(f"{len(captions)} held-out images can be read; a mismatched caption needs 2 (--held_out)")
    return Pairs(net, images, captions, device)


def monitor(net, pairs):
    """The held-out part of a log line; see the top of this file. Masks are the same for all images, and each time: only
    then does a std over images compare like with like."""
    masks = model.sample_masks(net.grid, 1, torch.Generator().manual_seed(0))
    own = torch.arange(len(pairs.s_image))
    was_training = net.training
    net.eval()
    right, wrong = pairs.compare(net, own, masks), pairs.compare(net, own.roll(1), masks).energy
    net.train(was_training)
    return dict(energy=right.energy.mean().item(), energy_wrong=wrong.mean().item(),
                lower=(right.energy < wrong).float().mean().item(), target_std=model.sample_std(right.target),
                prediction_std=model.sample_std(right.prediction),
                target_rank=model.effective_rank(right.target.mean(1)))


def energy_matrix(net, pairs, draws):
    """Energies of every image with every caption [I, T], each the mean over `draws` masks fixed by their seed."""
    images, captions = len(pairs.s_image), len(pairs.s_text)
    masks = [model.sample_masks(net.grid, 1, torch.Generator().manual_seed(draw)) for draw in range(draws)]
    columns = []
    for caption in tqdm(range(captions), desc="energies"):
        index = torch.full((images,), caption)
        columns.append(torch.stack([pairs.compare(net, index, mask).energy for mask in masks]).mean(0))
    return torch.stack(columns, dim=1).float().cpu()


def judge(energies):
    """Energies [I, I], the diagonal being the matched pairs -> the figures of --eval. A tie is half a win for the AUC and
    a loss for recall, so that a constant energy scores as what it is worth."""
    n = len(energies)
    own, other = energies.diagonal(), energies[~torch.eye(n, dtype=torch.bool)]  # [I], [I * (I - 1)]
    wins = (own[:, None] < energies).float() + 0.5 * (own[:, None] == energies).float()
    pooled = (own[:, None] < other).float() + 0.5 * (own[:, None] == other).float()
    rank = (energies <= own[:, None]).sum(1)  # 1: no other caption is as low
    return {"images": n, "auc": ((wins.sum(1) - 0.5) / (n - 1)).mean().item(), "auc_pooled": pooled.mean().item(),
            "recall@1": (rank <= 1).float().mean().item(), "recall@5": (rank <= 5).float().mean().item(),
            "energy": own.mean().item(), "energy_wrong": other.mean().item()}


def evaluate(args, device):
    """The --eval command: print, and for the held-out images also write, what the energies say."""
    if bool(args.image) != bool(args.captions):
        raise data.DataError("--image and --captions go together")
    net, checkpoint = model.TIJEPA.from_checkpoint(args.eval)
    net, trained = net.to(device), checkpoint["args"]
    transform = data.image_transform(net.image_encoder.data_config)
    if args.image:
        image = data.load_tensor(args.image, transform)
        if image is None:
            raise data.DataError(f"--image {args.image} cannot be read")
        pairs = Pairs(net, image[None], args.captions, device)
        for energy, caption in sorted(zip(energy_matrix(net, pairs, args.eval_masks)[0].tolist(), args.captions)):
            print(f"{energy:.4f}  {caption}")
        return
    held = data.CocoCaptions(args.coco, trained["max_images"]).hold_out(trained["held_out"])
    held.transform = transform
    pairs = held_out_pairs(net, held, device)
    figures = {**judge(energy_matrix(net, pairs, args.eval_masks)), "masks": args.eval_masks, **monitor(net, pairs)}
    Path(args.eval).with_name("eval.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(f"eval {args.eval}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def main(argv=None):
    """Returns the exit code: 0, 2 for what the user can mend, 1 for a loss that is not finite."""
    args = parse_args(argv)
    try:
        device, out_dir = model.choose_device(args.device), Path(args.out)
        if args.eval:
            evaluate(args, device)
            return 0
        dataset = data.CocoCaptions(args.coco, args.max_images)  # before any model: missing data must not cost a download
        held = dataset.hold_out(args.held_out)
        out_dir.mkdir(parents=True, exist_ok=True)
        print(f"pretrain: preset {args.preset}, {len(dataset)} images of {args.coco} to train on, {len(held)} held out "
              f"(left out: {dataset.left_out}), device {device}, {model.amp_dtype(device)}")
        net = build_model(args, [caption for _, captions in dataset.items + held.items for caption in captions]).to(device)
        dataset.transform = held.transform = data.image_transform(net.image_encoder.data_config)
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        frozen = sum(p.numel() for part in (net.image_encoder, net.text_encoder) for p in part.parameters())
        print(json.dumps({"args": vars(args), "model": asdict(replace(net.config, vocabulary=[])),
                          "patch_grid": net.grid, "parameters": {"trained": trained, "frozen": frozen}}, indent=1))
        train(args, dataset, held_out_pairs(net, held, device), net, device, out_dir)
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
