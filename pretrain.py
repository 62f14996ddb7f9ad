"""Pretrain TI-JEPA on COCO captions: one hand-written loop. And measure whether its energy means anything.

    python pretrain.py --preset toy --coco data/toy/coco --out out/toy --resume
    torchrun --nproc_per_node=4 pretrain.py --preset small --coco /data/coco --out out/small --resume
    python pretrain.py --eval out/toy/checkpoint.pt --coco data/toy/coco
    python pretrain.py --eval out/toy/checkpoint.pt --image a.jpg --captions "red bars ..." "navy tiles ..."

The first writes OUT/checkpoint.pt (weights of X, X~ and g, the config they were trained by, and all else that going on
needs: --resume goes on from there, to the same weights and the same log as without the break) and OUT/log.jsonl, one line
of numbers per --log_every steps. Of the training:

    step, epoch      optimiser steps and passes over the images done
    loss             mean of the loss since the last line. Not evidence of learning: it also falls in a collapse
    lr, wd, momentum the three schedules at this step
    grad_norm        norm of all gradients before clipping, of this step (null: not finite)
    skipped_steps    steps so far that the loss scale of float16 was too large for: they change no weight, and lower it
    images_per_s     images trained on per second since the last line
    data_wait        share of that time spent waiting for data
    read, left_out   images and captions in use, and how many were left out so far, by reason

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
import resource
import signal
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

# What differs between presets in training; the paper's three follow the authors' script (10,000 images, batch 10 x 60).
PAPER = dict(epochs=300, batch_size=600, accumulate=10, max_images=10000, workers=8, log_every=10)
PRESETS = {
    "toy": dict(epochs=20, batch_size=32, accumulate=1, max_images=0, workers=1, log_every=50),
    "tiny": dict(epochs=5, batch_size=16, accumulate=1, max_images=0, workers=1, log_every=56),
    "small": PAPER, "medium": PAPER, "large": PAPER,
}
# Options that --resume may find changed: where things are and how fast, not what is computed
FREE = {"out", "coco", "device", "workers", "cache", "accumulate", "compile", "resume", "bench", "eval", "eval_masks", "image",
        "captions"}


def count(least):
    """An argparse type: a whole number of at least `least`."""
    def parse(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)
    return parse


def parse_args(argv=None):
    """Two passes, so that --help shows the defaults of the preset that is named."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="toy")
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=f"Defaults shown: preset {preset}.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
    add("--epochs", type=count(1), default=None, help="passes over the images")
    add("--max_images", type=count(0), default=None, help="use the first so many images (0: all)")
    add("--held_out", type=count(2), default=100, help="images of these that are not trained on but measured on")
    add("--batch_size", type=count(1), default=None, help="images per optimiser step")
    add("--accumulate", type=count(1), default=None, help="micro-batches a batch is split into; same result, less memory")
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
    add("--dtype", choices=model.PRECISIONS, default="auto", help="of matrix products; auto: bfloat16 or float16 on CUDA, "
        "else float32")
    add("--workers", type=count(0), default=None, help="processes that decode images or read the cache")
    add("--cache", default="data/cache", metavar="DIR|off", help="where what the frozen encoders say is kept; off: encode "
        "every image again each time it is drawn")
    add("--cache_dtype", choices=list(data.ON_DISK), default="float16", help="of the cached features")
    add("--compile", action="store_true", help="torch.compile the trained half (minutes at the start; for CUDA)")
    add("--log_every", type=count(1), default=None, help="steps between log lines; the first one after each epoch is "
        "also when the checkpoint is written")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt if it is there")
    add("--bench", action="store_true", help="do not train: measure speed, with and without the cache")
    add("--eval", default="", metavar="CHECKPOINT", help="do not train: measure this checkpoint's energies")
    add("--eval_masks", type=count(1), default=2, help="with --eval: masks each energy is averaged over")
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


def make_config(args, captions):
    """The model's Config by the arguments. `captions` give the toy text encoder its words; no other looks at them."""
    words = {word for caption in captions for word in caption.lower().split()} if args.text_encoder == "toy" else ()
    local = {name: str(Path(path).resolve()) if path not in ("", "toy") and Path(path).exists() else path  # from any folder
             for name, path in (("image_weights", args.image_weights), ("text_encoder", args.text_encoder))}
    return replace(model.PRESETS[args.preset], image_encoder=args.image_encoder, self_attention=args.self_attention,
                   loss=args.loss, target=args.target, vicreg=args.vicreg,
                   vocabulary=sorted(words), **local)


def build_optimizer(net, device):
    """AdamW over X and g. Biases and norms (one-dimensional) are not decayed: group 1."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim <= 1]}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")


class Ranks:
    """The processes that torchrun started, one for each GPU; or this process alone.

    Each trains on its share of every batch, and DistributedDataParallel averages the gradients. What is exchanged beside
    them goes by gloo, from CPU to CPU, so that no process waits for its GPU.
    """

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.master = self.rank == 0  # the one that writes files and prints

    def start(self, name):
        """The device of this process by the option --device; joins the other processes, if there are any."""
        device = model.choose_device(name)
        if self.size > 1:
            if device.type == "cuda":
                device = model.choose_device(f"cuda:{os.environ['LOCAL_RANK']}")  # more processes than GPUs: said in words
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            if not self.master:
                sys.stdout = open(os.devnull, "w")
        return device

    def parts(self, accumulate):
        """Into how many micro-batches each process splits its share of a batch: together no fewer than `accumulate`."""
        return -(-accumulate // self.size)

    def gather(self, *numbers):
        """Whole numbers of this process -> those of all [size, numbers], in the order of the ranks."""
        every = [torch.tensor(numbers) for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(every, torch.tensor(numbers))
        return torch.stack(every)

    def sum(self, values):
        """A tensor on the CPU -> its sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def merge(self, left_out):
        """Add to `left_out` what the other processes have left out."""
        every = [left_out.reasons] * self.size
        if self.size > 1:
            dist.all_gather_object(every, left_out.reasons)
        for reasons in every:
            left_out.reasons = left_out.merge(data.LeftOut(reasons)).reasons


class Stop:
    """Inside this context Ctrl-C and SIGTERM only set `signal`, for the loop to see after its step; a second Ctrl-C ends
    the process at once."""

    def __enter__(self):
        self.signal, self.before = 0, {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def micro_batches(items, train, args, first, steps, ranks):
    """The draws of every micro-batch that this process trains on, from step `first` on, see data.epoch_batches.

    The batch is split into `accumulate` parts, or as many more as the processes can share evenly.
    """
    per_epoch, parts = len(train) // args.batch_size, ranks.parts(args.accumulate)
    for step in range(first, steps):
        epoch, number = divmod(step, per_epoch)
        if number == 0 or step == first:
            batches = data.epoch_batches(items, train, args.batch_size, args.seed, epoch)
        batch = np.array(batches[number])
        if args.shuffle_captions:
            batch = np.column_stack([batch[:, 0], np.roll(batch[:, 1:], -1, axis=0)])
        for part in np.array_split(batch, parts * ranks.size)[parts * ranks.rank:parts * (ranks.rank + 1)]:
            yield [tuple(draw) for draw in part.tolist()]


def make_loader(source, draws, workers, device):
    """The micro-batches of the `draws` from data.Pictures or data.FeatureCache, read ahead by the workers.

    On a CPU the cache is read in the loop: that is 1 % of a step there, and a worker would take 5 % from its cores.
    """
    return data.make_loader(source, draws, 0 if device.type == "cpu" and isinstance(source, data.FeatureCache) else workers,
                            device)


def train_step(net, trained_half, optimizer, scaler, micro, masks, clip, share=1.0):
    """One optimiser step on a list of micro-batches, with their masks. `trained_half` is net, net compiled, or that in
    DistributedDataParallel.

    Each micro-batch counts by its number of images, so the gradient is that of the whole batch at once. With several
    processes, `share` is the number of images here over its mean: the gradients are averaged over the processes. Returns
    the mean loss [] of the images here and the gradient norm [], both still on the device, so that nothing waits.
    """
    optimizer.zero_grad(set_to_none=True)
    images, start, loss = len(masks.context), 0, 0.0
    for part in micro:
        features = part.features(net)  # from the cache, or f_I and f_T run here
        part_masks = masks.part(start, start + part.size)
        if isinstance(trained_half, DistributedDataParallel):
            trained_half.require_backward_grad_sync = part is micro[-1]  # once a step (nanoGPT's way)
        out = trained_half(*features, part_masks)
        weighted = out.loss * part.size / images
        scaler.scale(weighted * share).backward()
        loss, start = loss + weighted.detach(), start + part.size
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    scaler.step(optimizer)
    scaler.update()
    return loss, norm


def next_batch(loader, items, left_out, parts):
    """The next `parts` micro-batches as a list, and their images; broken images are counted and left out."""
    micro = []
    for _ in range(parts):
        part = next(loader)
        left_out.add_broken(part, items)
        if part.size:
            micro.append(part)
    if not micro:
        raise data.DataError(f"a whole batch of images cannot be read; left out: {left_out}")
    return micro, sum(part.size for part in micro)


class Trainer:
    """Everything one optimiser step needs, so that train and bench run the same one."""

    def __init__(self, args, net, source, train, first, steps, left_out, ranks):
        self.args, self.net, self.steps, self.source, self.left_out = args, net, steps, source, left_out
        self.ranks = ranks
        self.optimizer = build_optimizer(net, net.device)
        self.scaler = torch.amp.GradScaler(net.device.type, enabled=net.dtype == torch.float16)
        self.skipped = torch.zeros((), dtype=torch.int64, device=net.device)  # steps that the scaler skipped
        # Masks and captions differ in length from batch to batch: compiled once for all sizes.
        self.trained_half = torch.compile(net, dynamic=True) if args.compile else net
        if ranks.size > 1:
            self.trained_half = DistributedDataParallel(self.trained_half, broadcast_buffers=False)
        self.loader = iter(make_loader(source, micro_batches(source.items, train, args, first, steps, ranks), args.workers,
                                       net.device))
        self.waited = 0.0  # seconds spent waiting for data

    def prepare(self, step, stop=0):
        """The micro-batches of step number `step`, their masks, the number of images in the whole batch, the schedules, and
        whether any process was asked to `stop`. Masks and schedules depend on the step alone."""
        args, steps = self.args, self.steps
        lr = warmup_cosine(step, steps, int(args.warmup * steps), args.start_lr, args.lr, args.final_lr)
        wd = cosine(step, steps, args.start_wd, args.final_wd)
        for group, decay in zip(self.optimizer.param_groups, (wd, 0.0)):
            group["lr"], group["weight_decay"] = lr, decay
        self.momentum = linear(step, steps, args.momentum, args.final_momentum)
        clock = time.perf_counter()
        micro, images = next_batch(self.loader, self.source.items, self.left_out,
                                   self.ranks.parts(args.accumulate))
        every, stops = self.ranks.gather(images, stop).T  # [size], [size]
        self.waited += time.perf_counter() - clock
        before, whole = int(every[:self.ranks.rank].sum()), int(every.sum())
        masks = step_masks(self.net, args.seed, step, whole).part(before, before + images)
        return micro, masks, whole, dict(lr=lr, wd=wd, momentum=self.momentum), int(stops.max())

    def update(self, micro, masks, images):
        """One optimiser step and one EMA step -> this process's part of the mean loss of the `images` of the batch [], and
        the gradient norm []."""
        share = len(masks.context) * self.ranks.size / images
        loss, norm = train_step(self.net, self.trained_half, self.optimizer, self.scaler, micro, masks, self.args.clip,
                                share)
        if self.scaler.is_enabled():  # it skips just the steps with such a norm; to ask it would wait for the device
            self.skipped += ~norm.isfinite()
        self.net.update_target(self.momentum)
        return loss * share / self.ranks.size, norm

    def save(self, path, step, identity, losses, images, log):
        """Write all that the rest of the run depends on after `step` steps, `losses` and `images` being those of the log
        line under way. Data, captions and masks are functions of the seed and the step: they need no more than these."""
        losses = whole_losses(self.ranks, losses, step)
        self.ranks.merge(self.left_out)
        if not self.ranks.master:
            return
        os.fsync(log.fileno())  # a checkpoint must not be newer than its log
        cuda = self.net.device.type == "cuda"
        with data.whole_file(path) as file:
            torch.save({"config": asdict(self.net.config), "args": vars(self.args), **identity, "step": step,
                        "model": self.net.trained_state(), "optimizer": self.optimizer.state_dict(),
                        "scaler": self.scaler.state_dict(), "skipped_steps": self.skipped.item(),
                        "losses": losses, "images": images, "log_bytes": log.tell(),
                        "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if cuda else []},
                        "left_out": {reason: sorted(names) for reason, names in self.left_out.reasons.items()}}, file)

    def load(self, checkpoint):
        """Go on from what `save` wrote -> (losses, images) of the log line under way."""
        self.net.load_trained_state(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty: the run began on a device whose dtype needs none
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.skipped.fill_(checkpoint["skipped_steps"])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if checkpoint["random"]["cuda"] and self.net.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"][0])
        before = data.LeftOut({reason: set(names) for reason, names in checkpoint["left_out"].items()})
        self.left_out.reasons = self.left_out.merge(before).reasons
        losses = checkpoint["losses"].to(self.net.device) * self.ranks.master  # they are of all processes
        return list(losses), checkpoint["images"]


def step_masks(net, seed, step, images):
    """The masks of one step, on the device: drawn from the seed and the step, so that they need no state of their own."""
    masks = model.sample_masks(net.grid, images, torch.Generator().manual_seed(seed * 2 ** 32 + step))
    return (masks.pin_memory() if net.device.type == "cuda" else masks).to(net.device)


def train(trainer, pairs, out_dir, dataset, identity, checkpoint, per_epoch):
    """The loop, from the start or from `checkpoint`. Returns 0 at its end, or the number of the signal that stopped it.
    Raises FloatingPointError on a loss that is not finite (looked at when a line is logged or a checkpoint written)."""
    args, net, ranks, steps = trainer.args, trainer.net, trainer.ranks, trainer.steps
    first, losses, images, log_bytes = 0, [], 0, 0
    if checkpoint:
        first, log_bytes = checkpoint["step"], checkpoint["log_bytes"]
        losses, images = trainer.load(checkpoint)
    saved_epoch, clock, images_before = first // per_epoch, time.time(), images
    net.train()
    with open_log(out_dir / "log.jsonl", log_bytes, ranks.master) as log, Stop() as stop:
        for step in tqdm(range(first, steps), initial=first, total=steps, desc="pretrain", disable=not ranks.master):
            micro, masks, batch, schedules, stopped = trainer.prepare(step, stop.signal)
            if stopped:
                trainer.save(out_dir / "checkpoint.pt", step, identity, losses, images, log)
                print(f"pretrain: stopped after step {step} of {steps}; the same command with --resume goes on from there")
                return stopped
            loss, norm = trainer.update(micro, masks, batch)
            losses, images, done = [*losses, loss], images + batch, step + 1
            if done % args.log_every and done < steps:
                continue
            loss, seconds = whole_losses(ranks, losses, done).mean().item(), time.time() - clock
            ranks.merge(trainer.left_out)
            if ranks.master:
                line = dict(step=done, epoch=done / per_epoch, loss=loss, **schedules, grad_norm=norm.item(),
                            skipped_steps=trainer.skipped.item(), images_per_s=(images - images_before) / seconds,
                            data_wait=trainer.waited / seconds, **monitor(net, pairs))
                tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in line.items()))
                line.update(read=dataset.read(), left_out=dataset.left_out.counts())
                log.write(log_line(line))
                log.flush()
            losses, images, images_before, trainer.waited, clock = [], 0, 0, 0.0, time.time()
            if done // per_epoch > saved_epoch:  # only here, where the losses are known to be finite
                saved_epoch = done // per_epoch
                trainer.save(out_dir / "checkpoint.pt", done, identity, losses, images, log)
    return 0


def log_line(line):
    """What is logged of a step -> the bytes of a line of JSON, which has no infinity and no NaN: null stands for both."""
    line = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def open_log(path, size, master):
    """log.jsonl to append to after its first `size` bytes: what follows was logged after the checkpoint, and comes again."""
    if not master:
        return open(os.devnull, "ab")
    log = open(path, "ab")
    there = log.seek(0, os.SEEK_END)
    if there < size:
        print(f"pretrain: {path} is shorter than when the checkpoint was written: lines of it are lost")
    log.truncate(min(size, there))
    log.seek(0, os.SEEK_END)
    return log


def whole_losses(ranks, losses, done):
    """Each process's parts [] of the losses of the last steps, up to step `done` -> the losses [steps], on the CPU. Raises
    FloatingPointError if one is not finite."""
    values = ranks.sum(torch.tensor([]) if not losses else torch.stack(losses).float().cpu())  # the only wait for the device
    if not values.isfinite().all():
        bad = int((~values.isfinite()).nonzero()[0])
        raise FloatingPointError(f"the loss of step {done - len(losses) + 1 + bad} is {values[bad]}; lower --lr or --clip")
    return values


def find_checkpoint(path, args, config, identity):
    """What --resume goes on from, or None if there is nothing yet. Raises DataError naming what is not as it was then."""
    if not path.exists():
        return None
    checkpoint = model.load_checkpoint_file(path)
    compared = [(f"--{key}", checkpoint["args"].get(key), value) for key, value in vars(args).items() if key not in FREE]
    compared += [(key, checkpoint["config"].get(key), value) for key, value in asdict(config).items() if key not in vars(args)]
    compared += [(key, checkpoint.get(key), value) for key, value in identity.items()]
    differs = [f"{key} (then {str(old)[:60]}, now {str(new)[:60]})" for key, old, new in compared if old != new]
    if differs:
        raise data.DataError(f"--resume: {path} is of another run, it differs in {', '.join(differs)}; give the same, or "
                             "another --out, or remove it")
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Does the energy mean anything? Held-out pairs, matched and mismatched


class Pairs:
    """Held-out images and captions as f_I and f_T see them, encoded once: they are looked at many times."""

    def __init__(self, net, batch):
        self.s_image, self.s_text, self.text_mask = batch.features(net)  # [I, N, D_I], [T, L, D_T], [T, L]

    @torch.no_grad()
    def compare(self, net, captions, masks):
        """Each image with the caption of that index: captions [I], masks of one image -> Output."""
        same = model.Masks(*(index.expand(len(self.s_image), *index.shape[1:]) for index in masks)).to(net.device)
        return net(self.s_image, self.s_text[captions], self.text_mask[captions], same)


def held_out_pairs(net, source, held, left_out):
    """The held-out indices of data.Pictures or data.FeatureCache -> Pairs of each image with its first caption."""
    batch = source[[(int(i), int(i), 0) for i in held]]
    left_out.add_broken(batch, source.items)
    if batch.size < 2:
        raise data.DataError(f"{batch.size} held-out images can be read; a mismatched caption needs 2 (--held_out)")
    return Pairs(net, batch)


def monitor(net, pairs):
    """The held-out part of a log line, as numbers."""
    figures = held_out_figures(net, pairs)
    return dict(zip(figures, torch.stack(list(figures.values())).tolist()))


def held_out_figures(net, pairs):
    """The held-out part of a log line, as tensors [] on the device; see the top of this file. Masks are the same for all
    images, and each time: only then does a std over images compare like with like."""
    masks = model.sample_masks(net.grid, 1, torch.Generator().manual_seed(0))
    own = torch.arange(len(pairs.s_image), device=net.device)
    was_training = net.training
    net.eval()
    right, wrong = pairs.compare(net, own, masks), pairs.compare(net, own.roll(1), masks).energy
    net.train(was_training)
    return dict(energy=right.energy.mean(), energy_wrong=wrong.mean(), lower=(right.energy < wrong).float().mean(),
                target_std=model.sample_std(right.target), prediction_std=model.sample_std(right.prediction),
                target_rank=model.effective_rank(right.target.mean((1, 2))))


def energy_matrix(net, pairs, draws):
    """Energies of every image with every caption [I, T], each the mean over `draws` masks fixed by their seed."""
    images, captions = len(pairs.s_image), len(pairs.s_text)
    masks = [model.sample_masks(net.grid, 1, torch.Generator().manual_seed(draw)) for draw in range(draws)]
    columns = []
    for caption in tqdm(range(captions), desc="energies"):
        index = torch.full((images,), caption, device=net.device)
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
    net.precision = args.dtype
    if args.image:
        batch = data.Pictures([(Path(args.image), args.captions)], net.image_encoder.data_config)[[(0, 0, 0)]]
        if not batch.size:
            raise data.DataError(f"--image {args.image} cannot be read")
        pairs = Pairs(net, batch._replace(texts=args.captions))
        for energy, caption in sorted(zip(energy_matrix(net, pairs, args.eval_masks)[0].tolist(), args.captions)):
            print(f"{energy:.4f}  {caption}")
        return
    dataset = data.CocoCaptions(args.coco, trained["max_images"])
    held, pictures = dataset.hold_out(trained["held_out"])[1], data.Pictures(dataset.items, net.image_encoder.data_config)
    pairs = held_out_pairs(net, pictures, held, dataset.left_out)
    energies = energy_matrix(net, pairs, args.eval_masks)
    figures = {**judge(energies), "masks": args.eval_masks, **monitor(net, pairs)}
    counts = {"read": {"images": len(pairs.s_image), "captions": len(pairs.s_text)}, "left_out": dataset.left_out.counts()}
    draw_energies(energies, Path(args.eval).with_name("energies.png"))
    broken = dataset.left_out.reasons.get("broken image", ())
    shown = next(path for path in (dataset.items[i][0] for i in held) if str(path) not in broken)
    draw_masks(data.read_image(shown), net.grid, step_masks(net, 0, 0, 1), Path(args.eval).with_name("masks.png"))
    Path(args.eval).with_name("eval.json").write_text(json.dumps({**figures, **counts}, indent=1), encoding="utf-8")
    print(f"eval {args.eval}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print(f"eval: read {data.describe(counts['read'])}; left out: {dataset.left_out}")


# ---------------------------------------------------------------------------------------------------------------------
# --bench: where the time goes

BENCH_STEPS, BENCH_REPEATS = 20, 5
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, by data sheet


def bench(args, dataset, train_index, net):
    """Print what the README's section on speed explains: medians of 5 windows of 20 steps, each kind in turn."""
    steps = BENCH_STEPS + 1  # the first of a window is not timed: workers start, the optimiser gets its state

    def window(source):
        """-> [seconds, seconds waited for data, images] of 20 steps of the loop that `train` runs."""
        trainer, images = Trainer(args, net, source, train_index, 0, steps, dataset.left_out, Ranks()), 0
        for step in range(steps):
            micro, masks, batch, *_ = trainer.prepare(step)
            trainer.update(micro, masks, batch)
            if step:
                images += batch
            else:
                trainer.waited, clock = 0.0, now(net.device)
        return now(net.device) - clock, trainer.waited, images

    def resident_window():
        """Each step of the loop, and then once more with its batch and masks already on the device: forward, backward and
        the optimiser only. -> seconds of the two kinds. In turn, so that a machine that slows down slows both."""
        trainer, loop, resident = Trainer(args, net, cached, train_index, 0, steps, dataset.left_out, Ranks()), 0.0, 0.0
        for step in range(steps):
            clock = now(net.device)
            micro, masks, batch, *_ = trainer.prepare(step)
            trainer.update(micro, masks, batch)
            middle = now(net.device)
            micro = [data.FeatureBatch(*part.features(net), part.left_out) for part in micro]
            again = now(net.device)
            train_step(net, trainer.trained_half, trainer.optimizer, trainer.scaler, micro, masks, args.clip)
            if step:
                loop, resident = loop + middle - clock, resident + now(net.device) - again
        return loop, resident

    with tempfile.TemporaryDirectory(dir=data.make_folder("." if args.cache == "off" else args.cache, "--cache")) as folder:
        clock = now(net.device)
        cached = data.feature_cache(folder, dataset.items, net, args.cache_dtype, args.workers)
        encode = now(net.device) - clock
        raw = data.Pictures(dataset.items, net.image_encoder.data_config)
        net.train()
        runs, before = [], window(cached)
        for _ in tqdm(range(BENCH_REPEATS), desc="bench"):
            uncached, after = window(raw), window(cached)
            # Against the mean of the cached windows before and after it: a machine that drifts in speed drifts in both.
            ratio = uncached[0] / uncached[2] / np.mean([before[0] / before[2], after[0] / after[2]])
            runs.append((*after, *uncached, ratio, *resident_window()))
            before = after
        outside = np.median([1 - resident / loop for *_, loop, resident in runs])
        seconds, waited, images, raw_seconds, raw_waited, raw_images, ratio, _, _ = np.median(runs, axis=0)
        frozen, trained = count_flops(net, raw, cached, next(micro_batches(dataset.items, train_index, args, 0, 1, Ranks())),
                                      args.seed)
    speed, raw_speed = images / seconds, raw_images / raw_seconds
    report = {
        "encode, images/s": len(dataset.items) / encode,
        "cached, images/s": speed, "cached, ms per step": 1000 * seconds / BENCH_STEPS,
        "cached, waiting for data, %": 100 * waited / seconds,
        "cached, outside forward, backward and optimiser, %": 100 * outside,
        "uncached, images/s": raw_speed, "uncached, ms per step": 1000 * raw_seconds / BENCH_STEPS,
        "uncached, waiting for data, %": 100 * raw_waited / raw_seconds,
        "ratio cached / uncached": ratio, "ratio that the FLOPs promise": (frozen + trained) / trained,
        "frozen, GFLOP per image": frozen / 1e9, "trained, GFLOP per image": trained / 1e9,
        "parameters trained, million": sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6,
        "peak memory, GB": peak_memory(net.device) / 1e9}
    if net.device.type == "cuda":
        name = torch.cuda.get_device_name(net.device)
        peak = [flops for part, flops in PEAK_FLOPS.items() if part in name]
        report[f"cached, MFU on {name}, %"] = 100 * speed * trained / peak[0] if peak else float("nan")
    for name, value in report.items():
        print(f"{name:52}{value:10.4g}")


def now(device):
    """The clock, in seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def count_flops(net, raw, cached, draws, seed):
    """FLOPs per image (2 for a multiply and add, matrix products only) of f_I and f_T, and of forward and backward of what
    is trained: the mean over the masks of 20 steps."""
    raw, cached = raw[draws], cached[draws]
    with FlopCounterMode(display=False) as counter:
        raw.features(net)
    frozen, features = counter.get_total_flops() / raw.size, cached.features(net)
    with FlopCounterMode(display=False) as counter:
        for step in range(BENCH_STEPS):
            net(*features, step_masks(net, seed, step, cached.size)).loss.backward()
    return frozen, counter.get_total_flops() / cached.size / BENCH_STEPS


def peak_memory(device):
    """Bytes: of the device on CUDA, of this process elsewhere (ru_maxrss is in KiB, on macOS in bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Something to look at


def draw_curves(log, path):
    """OUT/log.jsonl -> a picture of what was logged against the step."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    panels = (("loss", "energy", "energy_wrong"), ("lower",), ("target_std", "prediction_std"), ("target_rank",))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axis, names in zip(axes, panels):
        for name in names:
            values = np.array([line[name] for line in lines], float)  # a null becomes a NaN, which is not drawn
            axis.plot([line["step"] for line in lines], values, label=name, marker=".")
        axis.set(xlabel="step")
        axis.legend()
    axes[1].axhline(0.5, color="grey", linewidth=0.8)  # chance
    finish(figure, path)


def draw_energies(energies, path):
    """Energies [I, I] with the matched pairs on the diagonal -> histograms of matched and mismatched pairs."""
    figure, axis = plt.subplots(figsize=(5, 3.2))
    mismatched = energies[~torch.eye(len(energies), dtype=torch.bool)]
    bins = np.histogram_bin_edges(energies.numpy(), 40)
    for name, values in (("matched", energies.diagonal()), ("mismatched", mismatched)):
        axis.hist(values.numpy(), bins, density=True, alpha=0.6, label=f"{name} ({len(values)})")
    axis.set(xlabel="energy", ylabel="density")
    axis.legend()
    finish(figure, path)


def draw_masks(image, grid, masks, path):
    """A PIL image and masks of a batch of one -> the picture, what X sees of it, and the target blocks."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    pixels = np.asarray(image.resize((16 * grid[1], 16 * grid[0]))) / 255
    hidden = np.zeros((2, grid[0] * grid[1]), bool)  # what each of the two masked pictures shows
    context, targets = (index[0].cpu().numpy() for index in masks)  # [C], [M, P]
    hidden[0, context], hidden[1, targets.flatten()] = True, True
    for axis, title, shown in zip(axes, ("image", "context", "target blocks"), (None, *hidden)):
        shade = 1 if shown is None else 0.15 + 0.85 * shown.reshape(grid).repeat(16, 0).repeat(16, 1)[:, :, None]
        axis.imshow(pixels * shade)
        axis.set(title=title, xticks=[], yticks=[])
    for block in targets:
        (top, left), (bottom, right) = (divmod(int(patch), grid[1]) for patch in (block[0], block[-1]))
        axes[2].add_patch(plt.Rectangle((16 * left, 16 * top), 16 * (right + 1 - left), 16 * (bottom + 1 - top),
                                        fill=False, edgecolor="red"))
    finish(figure, path)


def finish(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def run(args):
    """The command of the parsed arguments -> exit code: 0, or 128 and the number of the signal that stopped the training."""
    ranks = Ranks()
    device = ranks.start(args.device)
    if args.eval:
        evaluate(args, device)
        return 0
    dataset = data.CocoCaptions(args.coco, args.max_images)  # before any model: missing data must not cost a download
    train_index, held = dataset.hold_out(args.held_out)
    parts = ranks.parts(args.accumulate) * ranks.size
    if not parts <= args.batch_size <= len(train_index):
        raise data.DataError(f"--batch_size {args.batch_size} must be at most the {len(train_index)} images to train on, and "
                             f"at least the {parts} parts that --accumulate and the processes split it into")
    out_dir = data.make_folder(args.out, "--out")
    per_epoch = len(train_index) // args.batch_size
    steps = args.epochs * per_epoch
    config = make_config(args, [caption for _, captions in dataset.items for caption in captions])
    identity = {"data": dataset.fingerprint()}
    checkpoint = find_checkpoint(out_dir / "checkpoint.pt", args, config, identity) if args.resume else None
    if not args.resume and not args.bench and (out_dir / "checkpoint.pt").exists():
        print(f"pretrain: begins anew and will replace {out_dir / 'checkpoint.pt'}; --resume would go on from it")
    if checkpoint and checkpoint["step"] == steps:
        if not (out_dir / "curves.png").exists():  # killed between the last checkpoint and this
            draw_curves(out_dir / "log.jsonl", out_dir / "curves.png")
        print(f"pretrain: {out_dir / 'checkpoint.pt'} has all its {steps} steps, nothing is left to do")
        return 0
    print(f"pretrain: preset {args.preset}, {len(train_index)} images of {args.coco} to train on, {len(held)} held out (left "
          f"out: {dataset.left_out}), device {device}, {model.amp_dtype(device, args.dtype)}, {ranks.size} "
          f"process{'es' * (ranks.size > 1)}"
          + (f", going on after step {checkpoint['step']}" if checkpoint else ""))
    torch.manual_seed(args.seed)
    net = model.TIJEPA(config).to(device)
    net.precision = args.dtype
    identity["encoder_weights"] = net.fingerprint()
    if checkpoint and checkpoint["encoder_weights"] != identity["encoder_weights"]:
        raise data.DataError(f"--resume: {out_dir / 'checkpoint.pt'} was trained on other weights of f_I or f_T; give the "
                             "same, or another --out")
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for part in (net.image_encoder, net.text_encoder) for p in part.parameters())
    print(json.dumps({"args": vars(args), "model": asdict(replace(net.config, vocabulary=[])),
                      "patch_grid": net.grid, "parameters": {"trained": trained, "frozen": frozen}}, indent=1))
    if args.bench:
        if ranks.size > 1:
            raise data.DataError("--bench measures one process: run it without torchrun")
        bench(args, dataset, train_index, net)
        return 0
    source = data.open_source(args.cache, dataset.items, net, args.cache_dtype, args.workers)
    pairs = held_out_pairs(net, source, held, dataset.left_out) if ranks.master else None
    first = checkpoint["step"] if checkpoint else 0
    trainer = Trainer(args, net, source, train_index, first, steps, dataset.left_out, ranks)
    stopped = train(trainer, pairs, out_dir, dataset, identity, checkpoint, per_epoch)
    if ranks.master and not stopped:
        draw_curves(out_dir / "log.jsonl", out_dir / "curves.png")
    print(f"pretrain: wrote {out_dir / 'checkpoint.pt'} and {out_dir / 'log.jsonl'}; read {data.describe(dataset.read())}; left "
          f"out: {dataset.left_out}")
    if ranks.size > 1:
        dist.destroy_process_group()
    return 128 + stopped if stopped else 0


def main(argv=None):
    """Returns the exit code; see data.exit_code for those of failures."""
    args = parse_args(argv)
    memory = "--batch_size or --held_out, or raise --accumulate, which gives the same result"
    return data.exit_code(lambda: run(args), (data.DataError, model.ModelError), memory)


if __name__ == "__main__":
    sys.exit(main())
