"""Pretrain TI-JEPA on COCO captions, and measure what its energy means.

    python pretrain.py --preset toy --coco data/toy/coco --out out/toy --resume
    torchrun --nproc_per_node=4 pretrain.py --preset small --coco /data/coco --out out/small --resume
    python pretrain.py --eval out/toy/checkpoint.pt
    python pretrain.py --eval out/toy/checkpoint.pt --image a.jpg --captions "red bars ..." "navy tiles ..."

The first writes OUT/checkpoint.pt (all that an exact --resume needs), curves.png and log.jsonl. This log has
a line each --log_every steps, printed at once, written with checkpoints. Its columns on training:

    step, epoch        optimiser steps and passes over the images done
    loss               mean of the loss since the last line; no evidence: it also falls in a collapse
    lr, wd, momentum   learning rate, weight decay and EMA momentum of this step
    start_share        share of X~ that is still its random start: the product of all momenta
    grad_norm          norm of all gradients of this step before clipping; null if it is not finite
    skipped_steps      steps that the GradScaler skipped because gradients overflowed float16
    images_per_s, data_wait   speed, and share of time spent waiting for features

and on the held-out images, with the same masks each time (these are the evidence):

    energy_matched     mean energy of the images with their own captions
    energy_mismatched  the same with the caption of another image; the gap is what the caption brings
    pair_accuracy      share of images whose own caption has the lower energy of the two: 0.5 is chance
    energy_position    energy of a guess, the other images' mean target at each position: if energy_matched
                       is as high, neither visible patches nor caption help
    target_std, prediction_std   mean std of each over the images: at most about 1; 0 is collapse
    target_rank        effective rank of the images' mean targets: near 1 is dimensional collapse

With --target image or whitened, targets are fixed: a collapse shows in prediction_std and in the gap. --eval
writes energies.png, masks.png, maps.png (which patches the caption decides) and eval.json, which pairs every
held-out image with every held-out caption, over several masks. Figures not named here are as in the log:

    auc                chance that an image's own caption has a lower energy than another's, over all others
    recall@1, @5       share of images whose own caption has the lowest energy, or one of the five lowest
    contrastive_...    the same for the yardstick, two linear layers; see contrastive_similarity
"""
import argparse
import atexit
import io
import json
import math
import os
import resource
import signal
import sys
import textwrap
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's backend may be missing
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model
from model import UserError

# Learning rate and weight decay, as in I-JEPA's configs/in1k_vith14_ep300.yaml
START_LR, FINAL_LR, WARMUP = 2e-4, 1e-6, 0.1  # linear to --lr in this share of the steps, then a cosine
START_WD, FINAL_WD = 0.04, 0.4  # a cosine over all steps
# Training defaults of the presets; the paper's three follow the authors' script (batches of 10 x 60)
PAPER = dict(epochs=300, batch_size=600, accumulate=10, max_images=10000, log_every=10)
PRESETS = {
    # So long that less than 5 % of X~ is still its random start: exp(-(1 - momentum) * steps / 2)
    "toy": dict(epochs=40, batch_size=32, log_every=124, momentum=0.994),
    "tiny": dict(epochs=30, batch_size=16, log_every=168),
    "small": PAPER, "medium": PAPER, "large": PAPER,
}
SHOWN = "loss", "energy_matched", "energy_mismatched", "pair_accuracy"  # of a log line, on the terminal
# Options and parts of Config that may change before --resume: no effect, or compared by contents
FREE = {"out", "coco", "device", "cache", "accumulate", "resume", "bench", "eval", "eval_masks",
        "image", "captions", "image_weights", "text_encoder", "dtype", "vocabulary"}


def parse_args(argv=None):
    """Two passes: the first finds the preset, so that --help shows its defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="toy", help="architecture, training defaults")
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(parents=[first], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = __doc__.split("\n\n")[0]
    parser.epilog = f"Defaults of preset {preset}; with --eval, what is empty is as in the checkpoint."
    add, config, number = parser.add_argument, model.PRESETS[preset], data.number
    add("--coco", default="", help="folder of COCO 2017 (empty: data/coco)")
    add("--out", default="", help=f"folder to write to (empty: out/{preset}, or the checkpoint's)")
    add("--image_encoder", default=config.image_encoder, help="timm name of f_I")
    add("--image_weights", default="", help="weight file of f_I (empty: from the hub)")
    add("--text_encoder", default="", help=f"f_T by name or folder (empty: {config.text_encoder})")
    add("--loss", choices=model.LOSSES, default=config.loss, help="error that is the energy")
    add("--target", choices=("ema", "image", "whitened"), default=config.target, help="X~'s tokens or f_I's")
    add("--mask", choices=("after", "before"), default=config.mask, help="mask after or before f_I")
    add("--visible", **number(float, 1e-6, 1), default=config.visible, help="share of a context that X gets")
    add("--sigreg", **number(float, 0), default=0.0, help="weight of LeJEPA's term on X's output")
    add("--shuffle_captions", action="store_true", help="control: train with other images' captions")
    add("--epochs", **number(int, 1), help="passes over the images")
    add("--max_images", **number(int, 0), default=0, help="use the first so many images (0: all)")
    add("--held_out", **number(int, 0), default=0, help="images to measure on (0: a tenth, at most 100)")
    add("--batch_size", **number(int, 1), help="images per optimiser step")
    add("--accumulate", **number(int, 1), default=1, help="micro-batches of each process: less memory")
    add("--lr", **number(float, 1e-12), default=1e-3, help="learning rate after the warm-up")
    add("--momentum", **number(float, 0, 1), default=0.996, help="EMA momentum at the first step")
    add("--final_momentum", **number(float, 0, 1), default=1.0, help="at the last step (both 0: X~ is X)")
    add("--clip", **number(float, 1e-12), default=1.0, help="largest gradient norm")
    add("--seed", **number(int, 0, 2 ** 31 - 1), default=0, help="of weights, order, captions and masks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=model.DTYPES, default="auto", help="auto: 16 bits on CUDA, else float32")
    add("--cache", default="data/cache", help="folder for the features of the frozen encoders")
    add("--log_every", **number(int, 1), help="steps between log lines; the first past an epoch saves")
    add("--resume", action="store_true", help="resume from OUT/checkpoint.pt if it is there")
    add("--bench", action="store_true", help="measure how long the preset takes; needs no data")
    add("--eval", default="", metavar="CHECKPOINT", help="measure the energies of this checkpoint")
    add("--eval_masks", **number(int, 1), default=2, help="with --eval: masks for each energy")
    add("--image", default="", help="with --eval and --captions: one image file")
    add("--captions", nargs="+", default=[], help="with --image: rank them by energy")
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.captions) or args.image and not args.eval:
        parser.error("--image and --captions go together, and with --eval")
    args.out = args.out or (str(Path(args.eval).parent) if args.eval else f"out/{preset}")
    return args


def cosine(step, total, start, final):
    """From `start` at step 0 to `final` at the last step, total - 1, on half a cosine."""
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * step / max(1, total - 1)))


def warmup_cosine(step, total, warmup, start, peak, final):
    """Linear from `start` to `peak` in `warmup` steps, then a cosine to `final` at the last step."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine(step - warmup, total - warmup, peak, final)


def main(args):
    """Pretrain -> exit code: 0, or 128 + the number of the signal that stopped it."""
    # -- processes: with torchrun, this one trains on its share of each batch
    rank, world_size, device = join_processes(args)
    micro_batches = split_batch(args, rank, world_size)

    # -- the model, and its data: the features of every readable picture and caption, from the cache
    path, coco = Path(args.out) / "checkpoint.pt", args.coco or "data/coco"
    items, skipped = data.load_coco(coco, args.max_images)  # before the encoders: they may be a long download
    torch.manual_seed(args.seed)
    net = model.TIJEPA(make_config(args, items)).place(device, args.dtype)
    cache = data.FeatureCache(args.cache, items, net, pixels=args.mask == "before")
    train_images, held_out = data.hold_out(cache, args.held_out)
    skipped["unreadable image"] = len(cache.unreadable)
    if args.target == "whitened":
        tokens = torch.from_numpy(cache.map("image.float16")[train_images[:256]]).float()  # [256, N, D_I]
        net.fit_whitening(tokens.flatten(0, 1))
    steps_per_epoch = len(train_images) // args.batch_size  # drops the last, incomplete batch
    steps = args.epochs * steps_per_epoch
    if not steps:
        raise UserError(f"--batch_size {args.batch_size} is above the {len(train_images)} images to train on")

    # -- optimiser, and the identity of the run
    optimizer = build_optimizer(net)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=net.dtype == torch.float16)
    forward = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) if world_size > 1 else net
    constant = {"config": asdict(net.config), "encoders": cache.encoders, "skipped": dict(+skipped),
                "identity": run_identity(args, net, items, cache), "coco": str(Path(coco).resolve()),
                "held_out": {items[i][0].name: cache.digests[i] for i in held_out}}
    print(f"pretrain: preset {args.preset}, {len(train_images)} images of {coco} to train on, "
          f"{len(held_out)} held out (skipped: {data.describe(skipped)}), {device}, {net.dtype}, "
          f"{world_size} process{'es' * (world_size > 1)}, {sum(map(torch.numel, trained)):,} weights")
    held_features = next(cache.batches([(held_out, cache.first[held_out])]))  # each with its first caption

    # -- the state of the run: from the start, or from its checkpoint
    first_step, log, start_share = 0, [], 1.0  # start_share: share of X~ that is its random start
    running = torch.zeros(2)  # loss since the last log line, skipped steps so far
    if args.resume and data.is_file(path):
        with model.open_checkpoint(path) as saved:
            if differs := model.differences(saved["identity"], constant["identity"]):
                raise UserError(f"{path} is of another run: {differs}; give the same, or another --out")
            for part in model.TRAINED:
                getattr(net, part).load_state_dict(saved["model"][part])
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
        first_step, log, start_share, running = (saved[k] for k in ("step", "log", "start_share", "running"))
        print(f"pretrain: resumes {path} after step {first_step} of {steps}")
    elif path.exists():
        print(f"pretrain: starts anew and will replace {path}; --resume would continue it")
    seen = torch.tensor(int(data.digest(first_step, constant["identity"])[:15], 16))
    if all_reduce(seen, dist.ReduceOp.MIN) < all_reduce(seen, dist.ReduceOp.MAX):  # one would wait for ever
        raise UserError("the processes see different files: --coco and --out must be shared folders")
    running = running.to(device) / world_size  # each process has a share; all_reduce sums them

    def draws():
        """Indices (images, captions) of each micro-batch: functions of the step, so resuming is exact."""
        for step in range(first_step, steps):
            images, captions = data.epoch_order(cache, train_images, args.seed, step // steps_per_epoch)
            if args.shuffle_captions:
                captions = np.roll(captions, 1)
            first = step % steps_per_epoch * args.batch_size
            yield from ((images[first:][part], captions[first:][part]) for part in micro_batches)

    # Lazy: threads make the next features and masks during the current step
    all_masks = data.read_ahead(lambda step: net.draw_masks(args.batch_size, args.seed, step),
                                range(first_step, steps))
    batches = cache.batches(draws())
    line_time, waited = time.time(), 0.0  # time of the last log line; seconds spent waiting since then
    bar = tqdm(range(first_step, steps), "pretrain", steps, initial=first_step, disable=rank > 0)
    with catch_signals() as signals:
        for step, masks in zip(bar, all_masks):
            # -- masks and schedules of this step
            masks = masks.to(device)
            lr = warmup_cosine(step, steps, int(WARMUP * steps), START_LR, args.lr, FINAL_LR)
            wd = cosine(step, steps, START_WD, FINAL_WD)
            momentum = args.momentum + (args.final_momentum - args.momentum) * step / max(1, steps - 1)
            for group, decay in zip(optimizer.param_groups, (wd, 0.0)):
                group["lr"], group["weight_decay"] = lr, decay

            # -- forward and backward, micro-batch by micro-batch
            for part in micro_batches:
                start = time.time()
                features = next(batches)  # of B pairs, one micro-batch
                waited += time.time() - start
                forward.require_backward_grad_sync = part == micro_batches[-1]  # DDP: averages once a step
                out = forward(features, model.Masks(*(index[part] for index in masks)))
                loss = out.energy.mean()
                if args.sigreg:
                    loss = loss + args.sigreg * model.sigreg_term(out.context, args.seed, step)
                scaler.scale(loss / args.accumulate).backward()
                running[0] += loss.detach() / args.accumulate / world_size

            # -- optimiser, then X~ <- m X~ + (1 - m) X
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
            scaler.step(optimizer)  # in float16, skipped if a gradient has overflowed
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            net.update_target(momentum)
            start_share *= momentum
            if scaler.is_enabled():
                running[1] += (~grad_norm.isfinite()) / world_size  # the same norm in all processes

            # -- a log line when due; a checkpoint with the first past an epoch's end, and when stopped
            done = step + 1
            stop = all_reduce(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX).item()
            log_now = done % args.log_every == 0 or done == steps
            if not log_now and not stop:
                continue
            loss_sum, overflows = all_reduce(running).tolist()  # since the last line; waits for the device
            elapsed = time.time() - line_time
            metrics = held_out_metrics(net, held_features)
            if not math.isfinite(loss_sum + metrics["energy_matched"]):  # never saved
                raise FloatingPointError(f"the loss is not finite by step {done}; lower --lr or --clip")
            last = log[-1]["step"] if log else 0
            if log_now:
                here = done - max(last, first_step)  # steps of this process: it may begin between two lines
                line = dict(step=done, epoch=done / steps_per_epoch, loss=loss_sum / (done - last), lr=lr,
                            wd=wd, momentum=momentum, start_share=start_share, grad_norm=grad_norm.item(),
                            skipped_steps=round(overflows), images_per_s=here * args.batch_size / elapsed,
                            data_wait=waited / elapsed, **metrics)
                log.append({name: value if math.isfinite(value) else None for name, value in line.items()})
                if last <= first_step or len(log) % 20 == 1:  # this process's first line, then now and then
                    tqdm.write(f"{'':11}{''.join('  ' + name for name in SHOWN)}  min left")
                columns = "".join(f"{line[name]:{len(name) + 2}.3f}" for name in SHOWN)
                tqdm.write(f"step {done:<6}{columns}{(steps - done) * elapsed / here / 60:10.1f}")
                running[0] = 0
                line_time, waited = time.time(), 0.0
            if stop or done // steps_per_epoch > last // steps_per_epoch:
                # All that later steps depend on: pairs, schedules and masks are functions of the step
                state = {**constant, "step": done, "start_share": start_share, "running": all_reduce(running),
                         "model": {name: getattr(net, name).state_dict() for name in model.TRAINED},
                         "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "log": log}
                if rank == 0:  # the log first: a run that is killed between the two writes both again
                    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in log)
                    data.atomic_write(path.with_name("log.jsonl"), text.encode())
                    torch.save(state, file := io.BytesIO())  # to a file it would hide that a disk is full
                    data.atomic_write(path, file.getbuffer())
            if stop and done < steps:
                tqdm.write(f"pretrain: stopped after step {done} of {steps}; --resume continues from there")
                return 128 + stop
    if rank == 0:
        plot_curves(log, path.with_name("curves.png"))
        print(f"pretrain: wrote {path}; read {len(cache.readable)} images, skipped: {data.describe(skipped)}")
        if start_share > 0.05:
            print(f"warning: {start_share:.0%} of X~ is still its random start: raise --epochs or lower "
                  "--momentum", file=sys.stderr)
    return 0


# ---- Does the energy mean anything? Held-out pairs, matched and mismatched ----
def held_out_metrics(net, features):
    """The held-out part of a log line; see the top of this file."""
    own = np.arange(n := len(features.s_image))
    (energy, _, target, prediction, _), (mismatched, *_) = net.measure(features, [own, own - 1])
    # All images share the masks: [:, m, p] is one patch. The mean leaves out the image's own target.
    others = (target.sum(0) - target) / (n - 1)
    won = torch.heaviside(mismatched - energy, energy.new_tensor(0.5))  # a tie is half
    metrics = dict(energy_matched=energy.mean(), energy_mismatched=mismatched.mean(),
                   pair_accuracy=won.mean(), energy_position=net.patch_energy(others, target).mean(),
                   target_std=target.std(dim=0).mean(), prediction_std=prediction.float().std(dim=0).mean(),
                   target_rank=model.effective_rank(target.mean((1, 2))))
    return {name: value.item() for name, value in metrics.items()}


def energy_matrix(net, features, draws):
    """Energies of every image with every caption [I, T], each the mean over the same `draws` masks."""
    captions = [[caption] * len(features.s_image) for caption in range(len(features.s_text))]
    return net.energies(features, captions, tqdm(range(draws), "energies", unit=" masks")).float().cpu()


def energy_maps(net, features, captions, least=8):
    """Features of I pictures, K lists [I] of captions -> each patch's energy [I, K, N]: the mean over the
    target blocks that hide it, `least` or more."""
    I, N = features.s_image.shape[:2]
    total, count, draw = torch.zeros(I, len(captions), N), torch.zeros(N), 0
    while count.min() < least:
        hidden = net.draw_masks(1, draw).target.flatten()  # [M * P]: its patches
        patches = [out.patch_energy.flatten(1) for out in net.measure(features, captions, draw)]
        total.index_add_(2, hidden, torch.stack(patches, dim=1).float().cpu())  # [I, K, M * P]
        count += torch.bincount(hidden, minlength=N)
        draw += 1
    return total / count


def retrieval_metrics(energies):
    """Energies [I, I], the matched pairs on the diagonal -> the figures of --eval. A tie is half a win for
    the AUC and a loss for recall: a constant energy gets the AUC of chance and no recall."""
    if not energies.isfinite().all():
        raise FloatingPointError("an energy is not finite: try --dtype float32, or train again")
    n = len(energies)
    own = energies.diagonal()  # [I]
    won = torch.heaviside(energies - own[:, None], own.new_tensor(0.5)).sum(1) - 0.5  # less its own tie
    rank = (energies <= own[:, None]).sum(1)  # 1: no other caption is as low
    figures = {"auc": won / (n - 1), "recall@1": (rank <= 1).float(), "recall@5": (rank <= 5).float()}
    return {name: value.mean().item() for name, value in figures.items()}


def contrastive_similarity(cache, train, held_out, seed):
    """The yardstick: the usual alternative to the energy. Two linear layers on the standardised mean
    tokens of f_I and f_T, trained by InfoNCE (CLIP's loss) on the pairs `train` -> the similarities of the
    held-out pictures and captions [I, I]. The number of epochs is the best for a tenth of `train`."""
    images, texts = cache.means()
    captions = np.concatenate([np.arange(cache.first[i], cache.first[i + 1]) for i in train])
    images, texts = ((x - x[rows].mean(0)) / x[rows].std(0).clamp_min(1e-6)
                     for x, rows in ((images, train), (texts, captions)))

    def logits(layers, pairs):
        a, b = (layer(x[index]) for layer, x, index in zip(layers, (images, texts), pairs))
        return layers.scale.exp() * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T

    def info_nce(*of):
        similarity = logits(*of)
        label = torch.arange(len(similarity))
        return (F.cross_entropy(similarity, label) + F.cross_entropy(similarity.T, label)) / 2

    def fit(rows, epochs):
        torch.manual_seed(seed)
        layers = nn.ModuleList(nn.Linear(x.shape[1], 192) for x in (images, texts))
        layers.scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
        for epoch in range(epochs):
            pairs = data.epoch_order(cache, rows, seed, epoch)
            for n in range(0, len(rows), 100):
                info_nce(layers, [index[n:n + 100] for index in pairs]).backward()
                optimizer.step()
                optimizer.zero_grad()
            yield layers

    tenth, others = np.split(np.random.default_rng(seed).permutation(train), [max(2, len(train) // 10)])
    losses = [info_nce(layers, (tenth, cache.first[tenth])).item() for layers in fit(others, 30)]
    *_, layers = fit(train, 1 + int(np.argmin(losses)))
    return logits(layers, (held_out, cache.first[held_out])).detach()


def evaluate(args):
    """The --eval command: measure the images that the checkpoint held out."""
    net, checkpoint = model.TIJEPA.from_checkpoint(args.eval, args.image_weights, args.text_encoder)
    net.place(model.pick_device(args.device), args.dtype)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)  # no lock: a run may be evaluated while it trains
    if args.image:
        return rank_captions(args, net)
    names, coco = checkpoint["held_out"], args.coco or checkpoint["coco"]  # {file name of an image: its hash}
    items, _ = data.load_coco(coco, checkpoint["identity"]["--max_images"])
    cache = data.FeatureCache(args.cache, items, net, pixels=net.config.mask == "before")
    digests = {path.name: digest for (path, _), digest in zip(items, cache.digests)}
    if differs := [name for name in names if digests.get(name) != names[name]]:
        raise UserError(f"--eval {args.eval}: {len(differs)} of its {len(names)} held-out images are not in "
                        f"{coco}, or not what they were in training: {', '.join(differs[:5])}")
    held_out = np.array([i for i in cache.readable if items[i][0].name in names])
    features = next(cache.batches([(held_out, cache.first[held_out])]))
    energies = energy_matrix(net, features, args.eval_masks)
    others, seed = np.setdiff1d(cache.readable, held_out), checkpoint["identity"]["--seed"]
    similarity = contrastive_similarity(cache, others, held_out, seed)
    figures = {"images": len(held_out), "masks": args.eval_masks, "step": checkpoint["step"],
               **retrieval_metrics(energies), **held_out_metrics(net, features),
               **{f"contrastive_{name}": value for name, value in retrieval_metrics(-similarity).items()}}
    plot_energies(energies, "AUC {auc:.3f}; two linear layers {contrastive_auc:.3f}".format(**figures),
                  folder / "energies.png")
    first = [items[i] for i in held_out[:4]]
    pictures = [data.read_image(path, net.image_encoder) for path, _ in first]
    captions = [texts[0] for _, texts in first]
    plot_masks(pictures[:3], captions, net, folder / "masks.png")
    own = np.arange(len(first))
    plot_maps(net, pictures, features.pair(own, own), [own, own - 1], captions, folder / "maps.png")
    # Written last: when it is there, all files are
    data.write_json(folder / "eval.json", {**figures, "skipped": checkpoint["skipped"]})
    print(f"eval {args.eval}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def rank_captions(args, net):
    """--eval with a picture and captions: print their energies; draw maps_<image>.png."""
    picture = data.read_image(args.image, net.image_encoder)
    images = picture[None].to(net.device)
    features = model.Features(net.encode_images(images), *net.encode_texts(args.captions), images)
    energies = energy_matrix(net, features, args.eval_masks)[0]
    lines = [f"{energy:.4f}  {caption}" for energy, caption in zip(energies.tolist(), args.captions)]
    order = energies.argsort().tolist()
    print("\n".join(lines[i] for i in order))
    ends, path = [[order[0]], [order[-1]]], Path(args.out) / f"maps_{Path(args.image).stem}.png"
    plot_maps(net, [picture], features, ends, lines, path)


# ---- A run: its model, its identity, its processes, its end ----
def make_config(args, items):
    """Arguments, items -> the model's Config. Only the toy text encoder needs the captions' words."""
    preset, words = model.PRESETS[args.preset], set()
    f_T = args.text_encoder or preset.text_encoder
    if f_T == "toy":
        words.update(word for _, captions in items for text in captions for word in text.lower().split())
    elif os.path.isdir(f_T):
        f_T = os.path.realpath(f_T)  # the checkpoint may be used from another folder
    weights = args.image_weights and os.path.realpath(args.image_weights)
    return replace(preset, image_encoder=args.image_encoder, image_weights=weights, text_encoder=f_T,
                   loss=args.loss, target=args.target, mask=args.mask, visible=args.visible,
                   vocabulary=sorted(words))


def build_optimizer(net):
    """AdamW over X and g. Groups: weights (decayed), then biases and norms. The loop sets lr and wd."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim <= 1]}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=net.device.type == "cuda")


def run_identity(args, net, items, cache):
    """All that decides the result of a run: {name: value}."""
    options = {f"--{name}": value for name, value in vars(args).items() if name not in FREE}
    config = {name: value for name, value in asdict(net.config).items() if name not in {*FREE, *vars(args)}}
    pairs = [(path.name, digest) for (path, _), digest in zip(items, cache.digests)]  # with captions
    return {**config, **options, "--dtype": str(net.dtype), **cache.encoders, "data": data.digest(pairs)}


def join_processes(args):
    """-> (rank, world size, device). Each process has its own GPU, or all share --device."""
    if not dist.is_torchelastic_launched():  # not by torchrun, whatever variables other launchers set
        return 0, 1, model.pick_device(args.device)
    own_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
    device = model.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo")
    atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # one process prints
    return dist.get_rank(), dist.get_world_size(), device


def all_reduce(value, op=dist.ReduceOp.SUM):
    """The sum (or another `op`) of a tensor over all processes, on the CPU."""
    value = value.cpu().clone()  # all_reduce changes a CPU tensor in place
    if dist.is_initialized():
        dist.all_reduce(value, op)
    return value


def split_batch(args, rank, world_size):
    """This process's equal slices of a batch, one for each forward pass. Raises UserError."""
    micro, remainder = divmod(args.batch_size, args.accumulate * world_size)
    if remainder:
        raise UserError(f"--batch_size {args.batch_size} is no multiple of --accumulate x processes")
    if args.sigreg and micro < args.batch_size:  # each would see a part
        raise UserError("--sigreg needs the whole batch: one process and --accumulate 1")
    first = rank * args.accumulate
    return [slice(n * micro, (n + 1) * micro) for n in range(first, first + args.accumulate)]


@contextmanager
def catch_signals():
    """Inside, Ctrl-C and SIGTERM only add to a list. After the first, Ctrl-C ends the process."""
    signals = []

    def note(number, frame):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, note))  # restores the old
        yield signals


# ---- --bench: how long will it take here? ----

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "4090": 165}  # dense bf16, by data sheet
TOKENS = 24  # of a caption, padded to the longest of its batch
PARTS = ("masks", "forward", "backward", "optimiser", "EMA")  # of a step


def bench(args, rounds=50, limit=20):
    """The --bench command: time `rounds` steps or `limit` seconds on random data; print what a run takes."""
    split_batch(args, 0, 1)  # raises what training would
    pairs = args.max_images or (1100 if args.preset == "toy" else 118287)  # all of COCO
    held_out = args.held_out or data.default_held_out(pairs)
    steps = args.epochs * ((pairs - held_out) // args.batch_size)
    if steps < 1 or args.text_encoder:
        raise UserError("--bench takes the preset's f_T, and more images than --held_out and a --batch_size")
    device, config = model.pick_device(args.device), make_config(args, [])
    f_I, f_T = model.ImageEncoder(config.image_encoder, pretrained=False), torch.nn.Module()
    f_T.dim = model.TEXT_DIMS[model.PRESETS[args.preset].text_encoder]  # only its width is used
    net = model.TIJEPA(config, (f_I, f_T)).place(device, args.dtype)
    optimizer = build_optimizer(net)
    B, N = args.batch_size // args.accumulate, math.prod(net.grid)
    images = torch.zeros(data.ENCODE_BATCH, 3, *f_I.input_size, dtype=torch.uint8)
    s_image = torch.randn(B, N, f_I.dim).to(device, net.dtype)
    s_text = torch.randn(B, TOKENS, f_T.dim).to(device, net.dtype)
    features = model.Features(s_image, s_text, torch.ones(s_text.shape[:2], device=device).bool(),
                              images[:1].expand(B, -1, -1, -1) if args.mask == "before" else None)

    def now():
        getattr(torch, device.type).synchronize()
        return time.perf_counter()

    rows, start = [], now()  # a row for each round: the time before its parts and after each
    while len(rows) <= rounds and (len(rows) < 2 or now() - start < limit):
        row = [now()]
        masks = net.draw_masks(B, args.seed, len(rows)).to(device)  # new sizes each time
        row.append(now())
        loss = net(features, masks).energy.mean()
        row.append(now())
        loss.backward()
        row.append(now())
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        optimizer.step()
        row.append(now())
        net.update_target(0.996)
        row.append(now())
        net.encode_images(images)
        row.append(now())
        optimizer.zero_grad(set_to_none=True)
        rows.append(row)
    seconds = np.median(np.diff(rows[1:]), axis=0)  # of PARTS and of encoding; the first round warms up
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counted on any device
        net.encode_images(images[:1])
        frozen = counter.get_total_flops() / 1e9
        net(features.pair([0], [0]), net.draw_masks(1, args.seed).to(device)).energy.mean().backward()
    trained = counter.get_total_flops() / 1e9 - frozen
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated(device) if card else resident
    step = args.accumulate * seconds[:3].sum() + seconds[3:5].sum()
    image = seconds[5] / data.ENCODE_BATCH  # to encode one
    report = {
        **{f"{part}, ms for {B} images": 1000 * value for part, value in zip(PARTS, seconds)},
        f"step of {args.batch_size} images, --accumulate {args.accumulate}, ms": 1000 * step,
        "training, images/s": args.batch_size / step,
        "encode by f_I, images/s": 1 / image,
        "f_I, GFLOP per image": frozen,
        "training, GFLOP per image": trained,
        **{f"MFU on {card}, %": 0.1 * trained * args.batch_size / step / peak
           for name, peak in PEAK_TFLOPS.items() if name in card},
        "trained weights, million": sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6,
        "peak memory, GB": memory / 1e9,
        "disk for the features, GB": 1e-9 * pairs * (2 * N * f_I.dim + 2 * 5 * TOKENS * f_T.dim
                                                     + (args.mask == "before") * images[0].numel()),
        f"minutes to encode {pairs} pictures": pairs * image / 60,
        f"minutes to pretrain, {steps} steps": steps * step / 60}
    for what, value in report.items():
        print(f"{what:44}{value:10.4g}")


# ---- Something to look at ----
def plot_curves(log, path):
    """Log lines -> a figure of the numbers against the step; null is a gap."""
    panels = {"training loss, held-out energies": "loss energy_matched energy_mismatched energy_position",
              "pair accuracy (chance: 0.5)": "pair_accuracy",
              "std over held-out images": "target_std prediction_std",
              "effective rank of the targets": "target_rank"}
    figure = Figure((16, 3.2), layout="tight")
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name in names.split():
            axis.plot([line["step"] for line in log], [line[name] for line in log], marker=".", label=name)
        axis.set(xlabel="optimiser step", title=title)
        axis.legend()
    data.save_figure(figure, path)


def plot_energies(energies, title, path):
    """Energies [I, I], the matched pairs on the diagonal -> histograms of matched and mismatched pairs."""
    figure = Figure((5, 3.2), layout="tight")
    axis = figure.subplots()
    own, other = energies.diagonal(), energies[~torch.eye(len(energies), dtype=torch.bool)]
    axis.hist((own.numpy(), other.numpy()), 40, density=True, histtype="stepfilled", alpha=0.6,
              label=("matched", "mismatched"))
    axis.set(xlabel="energy", ylabel="density of pairs", title=title)
    axis.legend()
    data.save_figure(figure, path)


def show(axis, pixels, title, grid, **scale):
    """Draw a picture, or with a colour scale a map of patches; in units of patches, title of two lines."""
    shown = axis.imshow(pixels, extent=(0, grid[1], grid[0], 0), **scale)
    if scale:
        axis.figure.colorbar(shown, ax=axis, shrink=0.8)
    axis.set(xticks=[], yticks=[])
    axis.set_title("\n".join(textwrap.wrap(title, 32)[:2]), fontsize=8, parse_math=False)


def plot_masks(pictures, captions, net, path):
    """Pixels [3, H, W] and captions -> rows of a picture, the patches that X sees, its target blocks."""
    figure = Figure((8, round(2.8 * len(pictures), 1)), layout="constrained")  # 840 pixels, not 839
    rows = figure.subplots(len(pictures), 3, squeeze=False)
    titles = "context: what X sees", "target blocks: what is predicted (brighter: by several)"
    for draw, (picture, caption, axes) in enumerate(zip(pictures, captions, rows)):
        pixels = picture.permute(1, 2, 0).numpy()  # [H, W, 3]
        show(axes[0], pixels, caption, net.grid)
        for axis, title, index in zip(axes[1:], titles, net.draw_masks(1, draw)):
            show(axis, pixels, title, net.grid)
            blocks = np.bincount(index.flatten(), minlength=math.prod(net.grid)).reshape(net.grid)
            axis.imshow(blocks, "gray", alpha=0.75, extent=(0, net.grid[1], net.grid[0], 0))
    data.save_figure(figure, path)


def plot_maps(net, pictures, features, captions, titles, path):
    """Pixels [3, H, W], Features, two lists of captions, the captions' titles -> rows of a picture, each
    patch's energy with the first and with the second caption, and the difference."""
    maps = energy_maps(net, features, captions).unflatten(-1, net.grid).numpy()  # [I, 2, rows, columns]
    figure = Figure((10, 2.7 * len(pictures)), layout="constrained")
    rows = figure.subplots(len(pictures), 4, squeeze=False)
    for axes, picture, pair, two in zip(rows, pictures, maps, np.transpose(captions)):
        show(axes[0], picture.permute(1, 2, 0).numpy(), "picture", net.grid)
        for axis, energies, caption in zip(axes[1:], pair, two):
            show(axis, energies, titles[caption], net.grid, vmin=0, vmax=pair.max())
        gap = pair[1] - pair[0]
        most = abs(gap).max()
        show(axes[3], gap, "second minus first", net.grid, cmap="coolwarm", vmin=-most, vmax=most)
    figure.suptitle("energy of each patch, given the caption above it")
    data.save_figure(figure, path)


def run(argv=None):
    """The command line -> exit code."""
    args = parse_args(argv)
    command = evaluate if args.eval else bench if args.bench else main
    if command is main and (not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"):
        command = data.locked(args.out)(main)  # main inside the lock of OUT: one process writes
    to_lower = "--batch_size or --held_out, or raise --accumulate, which gives the same result"
    return data.run_command(lambda: command(args), to_lower)


if __name__ == "__main__":
    sys.exit(run())
