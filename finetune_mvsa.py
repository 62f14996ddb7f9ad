"""Judge a pretrained TI-JEPA on MVSA or other posts: frozen or fine-tuned features -> linear head -> a table.

    python finetune_mvsa.py --checkpoint out/toy/checkpoint.pt --mvsa data/toy/mvsa

Writes to OUT: results.md (the table), results.json (all numbers), predictions.csv (the probabilities of each
test post; all scores come from them), confusion.png (of the last row), predictions/ (each finished seed, for
reuse). File names carry the name of --posts, and the protocol if not `standard`. Choices use validation only.
The "F1" of MVSA papers is the weighted F1; macro F1 is low if a class is never predicted.
"""
import argparse
import copy
import csv
import io
import json
import math
import os
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's backend may be missing
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import data
import model
from model import UserError

matplotlib.rcParams["text.parse_math"] = False  # a $ in a label is a $
REGULARISATION = (1e-3, 1e-2, 1e-1)  # C of the logistic regression, chosen on validation
LEARNING_RATES = (1e-4, 5e-4)  # of fine-tuning, chosen on validation
BATCH = 32  # posts at a time, in training and in prediction
MAJORITY, CONCAT = "majority class", "text + image concatenated"
TEXT, IMAGE = "text only", "image only"
UNTRAINED, PRETRAINED = "TI-JEPA, X~ untrained", "TI-JEPA, pretrained"
ONLINE = "TI-JEPA, X in place of X~"
BOTH = "TI-JEPA, pretrained + concatenated"
FINE_TUNED = ", fine-tuned"  # a row with this ending starts from the probe of the row without
TUNED, TUNED_UNTRAINED = PRETRAINED + FINE_TUNED, UNTRAINED + FINE_TUNED
ROWS = {"probe": (MAJORITY, TEXT, IMAGE, CONCAT, UNTRAINED, PRETRAINED, ONLINE, BOTH),
        "finetune": (TUNED_UNTRAINED, ONLINE + FINE_TUNED, TUNED)}
COMPARED = {PRETRAINED: (UNTRAINED, CONCAT, ONLINE), TUNED: (TUNED_UNTRAINED, CONCAT)}
NAMES = {"single": "MVSA-Single", "multi": "MVSA-Multi"}  # another set: its folder's name
REPORTED = {"single": (76.75, 74.62), "multi": (77.55, 75.02)}  # TI-JEPA-Large, by the paper


def parse_args(argv=None):
    """Options of the command line; --help lists them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, data.number
    add("--checkpoint", default="out/toy/checkpoint.pt", help="written by pretrain.py")
    add("--mvsa", default="data/mvsa", help="folder with one or both MVSA sets")
    add("--posts", default="", metavar="FOLDER", help="judge on FOLDER/posts.csv in place of MVSA")
    add("--out", default="", help="folder for the results (empty: the checkpoint's)")
    add("--protocol", choices=("standard", "grouped", "authors"), default="standard", help="how to split")
    add("--mode", choices=list(ROWS), nargs="+", default=list(ROWS), help="linear probe, or fine-tuning")
    add("--split", default="", help="folder of CLMLF's train.json, dev.json, test.json (empty: by seed)")
    add("--seeds", **number(int, 0, 2 ** 31 - 1), nargs="+", default=[0, 1, 2, 3, 4],
        help="seeds of splits, untrained weights and fine-tuning")
    add("--finetune_epochs", **number(int, 1), default=4, help="passes over the training posts at most")
    add("--image_weights", default="", help="where f_I's weight file lies now (empty: as in training)")
    add("--text_encoder", default="", help="where f_T lies now (empty: as in training)")
    add("--ablate", default="", metavar="DIR", help="only make a table of the runs in DIR/<variant>-<seed>")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=model.DTYPES, default="auto", help="auto: 16 bits on CUDA, else float32")
    add("--cache", default="data/cache", help="folder for the features of the frozen encoders")
    args = parser.parse_args(argv)
    args.seeds = [*dict.fromkeys(args.seeds)]  # each seed once
    args.out = args.out or str(Path(args.checkpoint).parent)
    args.posts = args.posts and str(Path(args.posts).resolve())
    return args


# ---- Posts -> features and splits ----
def untrained(net, seed):
    """X~ of the same architecture with new random weights: the row that shows what pretraining adds."""
    torch.manual_seed(1000 + seed)  # not the seed that pretraining started from
    c = net.config
    fusion = model.FusionEncoder(net.image_encoder.dim, net.text_encoder.dim, c.dim, c.depth, c.heads)
    return fusion.requires_grad_(False).to(net.device)


def batches(cache, rows):
    """Yields Features of these items of a cache, BATCH at a time, each with its first text."""
    parts = np.split(rows, range(BATCH, len(rows), BATCH))
    return cache.batches((part, cache.first[part]) for part in parts)


@torch.no_grad()
def extract_features(net, cache, seeds):
    """The frozen features of all readable posts: {row: array [P, D]}. An untrained X~ has key (row, seed)."""
    encoders = {(UNTRAINED, seed): untrained(net, seed) for seed in seeds}
    encoders |= {PRETRAINED: net.target_encoder, ONLINE: net.context_encoder}
    parts = []
    for s_image, s_text, mask, _ in tqdm(batches(cache, cache.readable), desc="features"):
        with net.autocast():
            pooled = {row: encoder(s_image, s_text, mask).mean(1) for row, encoder in encoders.items()}
        pooled[TEXT] = s_text.float().sum(1) / mask.sum(1, keepdim=True)  # [B, D_T]; padding is 0
        pooled[IMAGE] = s_image.float().mean(1)  # [B, D_I]
        parts.append({row: value.float().cpu().numpy() for row, value in pooled.items()})
    features = {row: np.concatenate([part[row] for part in parts]) for row in parts[0]}
    features[CONCAT] = np.hstack([features[TEXT], features[IMAGE]])
    features[BOTH] = np.hstack([features[PRETRAINED], features[CONCAT]])
    return features


def split_posts(posts, labels, args):
    """Posts, labels [P] -> {seed: indices of train, validation, test}, notes {what: how many}, and the test
    posts that repeat a training post (of a published split only)."""
    groups, notes = None, Counter()
    if args.protocol == "standard" and (args.split or posts[0].part):
        parts = [np.flatnonzero([post.part == part for post in posts]) for part in data.PARTS]
        if args.split:
            parts, notes = data.clmlf_split(args.split, posts)
        repeats = data.repeats(posts, *parts)
        for name, repeated in zip(("validation", "test"), repeats):
            notes.update(f"{name} posts with the {what} of a training post" for what, _ in repeated)
        return dict.fromkeys(args.seeds, parts), notes, [i for _, i in repeats[1]]
    if args.protocol == "authors":
        return {seed: data.random_split(labels, seed) for seed in args.seeds}, notes, []
    if args.protocol == "grouped":
        groups = data.duplicate_groups(posts)
        sizes = [size for size in np.bincount(groups).tolist() if size > 1]
        notes.update({"groups of repeated posts": len(sizes), "posts in them": sum(sizes)})
    return {seed: data.stratified_split(labels, seed, groups) for seed in args.seeds}, notes, []


# ---- Features -> predictions. Functions get all labels, but never use a test post's ----
def fit_probe(x, y, classes, train, validation):
    """Features [P, D], labels [P] of K classes -> the linear probe (standardise, logistic regression) whose C
    is best on validation, as one Linear to K logits, and its choice {"C", "validation", "loss"}. Raises
    UserError for a single label."""
    if len(np.unique(y[train])) < 2:
        raise UserError("all training posts have the same label: a probe needs two")
    fitted = []
    for c in REGULARISATION:
        scaler, regression = StandardScaler(), LogisticRegression(C=c, max_iter=1000)
        regression.fit(scaler.fit_transform(x[train]), y[train])
        probe = as_linear(scaler, regression, classes)
        fitted.append((probe, {"C": c, **validate(probabilities_of(probe, x[validation]), y[validation])}))
    return max(fitted, key=lambda one: one[1]["validation"])  # the first of equals


def as_linear(scaler, regression, classes):
    """Both steps of a probe as one float64 Linear; -30 as the logit of a label that no training post has."""
    weight = regression.coef_ / scaler.scale_  # [K, D], without those labels
    bias = regression.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:  # for two labels scikit-learn has only the second's log odds
        weight, bias = np.vstack([0 * weight, weight]), np.hstack([0 * bias, bias])
    probe = torch.nn.Linear(weight.shape[1], classes, dtype=torch.float64).requires_grad_(False)
    probe.weight.zero_()
    probe.bias.fill_(-30.0)
    probe.weight[regression.classes_] = torch.from_numpy(weight).double()
    probe.bias[regression.classes_] = torch.from_numpy(bias).double()
    return probe


def probabilities_of(probe, x):
    """A probe, features [P, D] -> probabilities [P, K]"""
    return probe(torch.from_numpy(x).double()).softmax(-1).numpy()


def validate(probabilities, y):
    """Probabilities [V, K], labels [V] -> accuracy, mean cross-entropy: they decide the choices."""
    loss = -np.log(np.maximum(probabilities[np.arange(len(y)), y], 1e-7)).mean()
    return {"validation": metrics.accuracy_score(y, probabilities.argmax(1)), "loss": float(loss)}


class Classifier(torch.nn.Module):
    """An encoder (X~, X or untrained) and a linear head on its mean token. The head starts as the probe:
    a random head would spoil the features in the first steps (Kumar et al. 2022)."""

    def __init__(self, net, encoder, probe):
        super().__init__()
        self.autocast = net.autocast
        self.encoder, self.head = copy.deepcopy(encoder), copy.deepcopy(probe).float()
        self.requires_grad_(True).to(net.device)

    def forward(self, s_image, s_text, text_mask):
        with self.autocast():
            pooled = self.encoder(s_image, s_text, text_mask).mean(1)  # [B, D]
        return self.head(pooled.float())  # [B, K], in float32


def finetune(net, encoder, probe, choice, cache, y, train, validation, epochs, seed):
    """Train encoder and head, starting from the probe -> Classifier, its choice. A step takes a few random
    patches. X computes each token without the others, so the mean of a few is unbiased for the mean of all.

    Each learning rate stops at the first epoch that raises cross-entropy on validation (accuracy hardly
    tells two epochs apart). The epoch of lowest cross-entropy is kept; epoch 0 is the probe."""
    best = Classifier(net, encoder, probe).state_dict()
    probe_loss, choice = choice["loss"], {**choice, "lr": None, "epoch": 0}
    for lr in LEARNING_RATES:
        classifier = Classifier(net, encoder, probe)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
        scaler = torch.amp.GradScaler(net.device.type, enabled=net.dtype == torch.float16)
        rng, lowest = np.random.default_rng(seed), probe_loss
        for epoch in range(1, epochs + 1):
            order = rng.permutation(train)
            labels = torch.from_numpy(y[order]).to(net.device).split(BATCH)
            for y_batch, (s_image, *text, _) in zip(labels, batches(cache, cache.readable[order])):
                few = max(9, math.ceil(s_image.shape[1] / 16))  # with 5 of the toy's 36, learning often fails
                drawn = rng.random(s_image.shape[:2]).argsort(1)[:, :few]  # [B, few]
                s_image = model.gather(s_image, torch.from_numpy(drawn).to(net.device))
                loss = F.cross_entropy(classifier(s_image, *text), y_batch)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
            measured = validate(predict(classifier, cache, validation), y[validation])
            if measured["loss"] < choice["loss"]:
                best = copy.deepcopy(classifier.state_dict())
                choice = {**choice, "lr": lr, "epoch": epoch, **measured}
            if measured["loss"] > lowest:
                break
            lowest = measured["loss"]
    classifier.load_state_dict(best)
    return classifier, choice


@torch.no_grad()
def predict(classifier, cache, part):
    """Indices of posts -> probabilities [P, K]"""
    features = batches(cache, cache.readable[part])
    return torch.cat([classifier(*batch[:3]).softmax(-1).cpu() for batch in features]).double().numpy()


def predict_rows(net, cache, features, y, classes, split, seed, probes, args):
    """The test posts of a split -> {"probabilities": {row: [P, K]}, "choices": {row: choice}}. `probes`:
    those already fitted on this split. All seeds share them, except those on an untrained X~."""
    train, validation, test = split
    probabilities, choices = {}, {}
    for row in [row for mode in ROWS if mode in args.mode for row in ROWS[mode]]:
        if row == MAJORITY:
            probabilities[row] = np.eye(classes)[[np.bincount(y[train]).argmax()] * len(test)]
            continue
        start = row.removesuffix(FINE_TUNED)
        key = (start, seed) if start == UNTRAINED else start
        if key not in probes:
            probes[key] = fit_probe(features[key], y, classes, train, validation)
        probe, choices[row] = probes[key]
        if row == start:
            probabilities[row] = probabilities_of(probe, features[key][test])
        else:
            encoder = {PRETRAINED: net.target_encoder, ONLINE: net.context_encoder}.get(start)
            classifier, choices[row] = finetune(net, encoder or untrained(net, seed), probe, choices[row],
                                                cache, y, train, validation, args.finetune_epochs, seed)
            probabilities[row] = predict(classifier, cache, test)
    return {"probabilities": {row: p.tolist() for row, p in probabilities.items()}, "choices": choices}


# ---- Predictions -> scores. Up to here, test labels only stratify splits ----
def score(y, predicted, seeds):
    """Labels, predictions, seeds [T] -> {score: [% of each seed]}"""
    scores = defaultdict(list)
    for seed in dict.fromkeys(seeds):  # in their order
        pair = y[seeds == seed], predicted[seeds == seed]
        scores["accuracy"].append(100 * metrics.accuracy_score(*pair))
        for average in ("weighted", "macro"):
            scores[f"{average} F1"].append(100 * metrics.f1_score(*pair, average=average))
    return scores


def bootstrap(gains, posts, draws=2000):
    """Gains [T] of row a over row b (1: only a is right, -1: only b), posts [T] -> accuracy of a minus b, in
    points: [difference, low, high], a 95 % interval. Resamples posts, each with its tests of all seeds."""
    _, index, counts = np.unique(posts, return_inverse=True, return_counts=True)
    sums, P = np.bincount(index, gains), len(counts)
    times = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), size=draws)  # [draws, P]
    low, high = np.percentile(times @ sums / (times @ counts), (2.5, 97.5))
    return [100 * float(value) for value in (gains.mean(), low, high)]


def judge(net, loaded, names, results, lines, args):
    """Split, predict and score `loaded` {set: (posts, skipped)} as one pool. Fills `results` {set: its part
    of results.json} and the `lines` of predictions.csv. Reuses predictions made from the same inputs.
    `names`: the labels' names."""
    posts, classes = [post for of_set, _ in loaded.values() for post in of_set], len(names)
    cache = data.FeatureCache(args.cache, [(post.image, [post.text]) for post in posts], net)
    for i in cache.unreadable:
        loaded[posts[i].set][1]["unreadable image"] += 1
    if not len(cache.readable):
        raise UserError(f"no image in {posts[0].image.parent} can be read")
    posts = [posts[i] for i in cache.readable]  # from here on, indices are of these
    sets = np.array([post.set for post in posts])
    labels = np.array([names.index(post.label) for post in posts])
    splits, notes, repeated = split_posts(posts, labels, args)
    if not all(len(part) for split in splits.values() for part in split):
        raise UserError(f"{args.posts or args.mvsa}: one of {data.PARTS} has no readable post")
    tested = np.concatenate([test for _, _, test in splits.values()])  # [T]: the tests of all seeds
    seeds = np.repeat(list(splits), [len(test) for _, _, test in splits.values()])  # [T]
    if untested := loaded.keys() - set(sets[tested]):
        raise UserError(f"{args.mvsa}: MVSA-{min(untested)} has too few posts: none is tested")
    code = [Path(file).read_bytes() for file in (__file__, model.__file__, data.__file__)]
    made_of = [cache.key, names, labels.tolist(), sorted(set(args.mode)), args.finetune_epochs,
               net.config.heads, *map(model.hash_weights, (net.target_encoder, net.context_encoder))]
    features, probes, hashes, predictions = None, defaultdict(dict), {}, {}
    for seed, split in tqdm(splits.items(), desc="seeds"):
        unseen = ~np.isin(labels[split[2]], labels[split[0]])
        notes["tests of a label that no training post of their split has"] += int(unseen.sum())
        hashes[seed] = data.digest([[(posts[i].set, posts[i].id) for i in part] for part in split])[:16]
        made_from = data.digest(*code, [*made_of, seed, hashes[seed]])
        path = Path(args.out) / "predictions" / f"{args.protocol}-{'-'.join(loaded)}-{seed}.json"
        rows = {}
        with suppress(OSError, ValueError):  # not there, or damaged
            rows = json.loads(path.read_bytes())
        if not isinstance(rows, dict) or rows.get("made_from") != made_from:
            features = features or extract_features(net, cache, args.seeds)
            rows = predict_rows(net, cache, features, labels, classes, split, seed, probes[hashes[seed]],
                                args)
            data.write_json(path, {"made_from": made_from, **rows})
        predictions[seed] = rows
    for kind, (_, skipped) in loaded.items():
        of_set = np.flatnonzero(sets[tested] == kind)
        seed, post = seeds[of_set], tested[of_set]  # of each test
        y, new = labels[post], ~np.isin(post, repeated)
        scores, right = {}, {}
        for row in rows["probabilities"]:
            values = np.concatenate([one["probabilities"][row] for one in predictions.values()])[of_set]
            predicted = values.argmax(1)
            right[row] = (predicted == y).astype(float)
            scores[row] = score(y, predicted, seed)
            if repeated and new.any():
                scores[row]["accuracy without repeats"] = score(y[new], predicted[new], seed[new])["accuracy"]
            scores[row]["confusion"] = metrics.confusion_matrix(y, predicted, labels=range(classes)).tolist()
            for s, i, k, p in zip(seed, post, predicted, values.round(6)):
                lines.append((kind, s, row, posts[i].id, names[labels[i]], names[k], *p))
        counts = np.bincount(labels[sets == kind], minlength=classes).tolist()
        results[kind] = {
            "posts": sum(counts), "labels": dict(zip(names, counts)), "skipped": skipped,
            "choices": {row: {seed: one["choices"][row] for seed, one in predictions.items()}
                        for row in rows["choices"]},
            "split_hash": hashes, "split_notes": notes, "scores": scores,
            "split_sizes": [len(part) for part in splits[args.seeds[0]]],
            "differences": {f"{a} minus {b}": bootstrap(right[a] - right[b], post)
                            for a in COMPARED for b in COMPARED[a] if a in right and b in right}}


# ---- What is written ----
def mean_std(values, digits=2):
    """Numbers -> "mean ± standard deviation", with n - 1; "mean" for one number, "" for none."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def markdown(*rows):
    """Rows of cells, the first being the header -> a Markdown table."""
    header, *lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *lines])


def make_table(results, config, args, start_share):
    """The results -> Markdown: each set's scores and differences."""
    parts = [f"# TI-JEPA on {Path(args.posts).name or 'MVSA'}",
             f"f_I {config.image_encoder}, f_T {config.text_encoder}, checkpoint {args.checkpoint}, protocol "
             f"{args.protocol}. Mean ± standard deviation in % over {len(args.seeds)} seeds, which decide "
             "splits (unless published), untrained weights and fine-tuning; one pretrained checkpoint. "
             f"{start_share:.2%} of X~ is still its random start."]
    if config.image_encoder == "toy":
        parts.append("**Toy data and toy encoders: not the paper's numbers, and not comparable to them.**")
    for kind, result in results.items():
        pool = " of the pool, upsampled" if args.protocol == "authors" else ""
        notes = "".join(f"; {count} {what}" for what, count in result["split_notes"].items() if count)
        skipped = data.describe(result["skipped"])
        parts += [f"## {NAMES.get(kind) or Path(args.posts).name}",
                  f"{result['posts']} posts ({data.describe(result['labels'])}), skipped: {skipped}; "
                  f"train, validation, test {result['split_sizes']}{pool}{notes}"]
        *_, last = result["scores"].values()
        columns = [key for key in last if key != "confusion"]
        table = [(row, *(mean_std(one[key]) for key in columns)) for row, one in result["scores"].items()]
        if kind in REPORTED:
            reported = "TI-JEPA-Large, *reported* in the paper, not measured here", *REPORTED[kind]
            table.append((*reported, *["–"] * (len(columns) - 2)))
        parts.append(markdown(("features", *columns), *table))
        differences = [(pair, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}")
                       for pair, (gain, low, high) in result["differences"].items()]
        header = "difference in accuracy, same test posts", "points", "95 % interval over test posts"
        parts.append(markdown(header, *differences))
    return "\n\n".join(parts) + "\n"


def ablation_table(folder):
    """The runs in `folder`/<variant>-<seed> -> Markdown: last figures, and accuracies as means over splits;
    each mean ± standard deviation over seeds of pretraining. Raises UserError if there is no run."""
    measured = "loss", "energy_matched", "energy_position", "auc", "target_std", "target_rank"
    # {row: (its line, its column)}; a *line* does not depend on pretraining: it is the same in all runs
    places = {PRETRAINED: ("", "X~"), ONLINE: ("", "X"), TUNED: ("", "X~ fine-tuned"),
              UNTRAINED: ("*untrained*", "X~"), CONCAT: (f"*{CONCAT}*", "X~")}
    table = defaultdict(lambda: defaultdict(list))  # {line: {column: [a figure of each run]}}
    for path in sorted(folder.glob("*-*/results.json")):
        out, variant = path.parent, path.parent.name.rpartition("-")[0]
        last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        evaluated, judged = (json.loads((out / name).read_text()) for name in ("eval.json", "results.json"))
        evaluated["loss"] = last["loss"]
        for name in measured:
            table[variant][name].append(evaluated[name])
        for kind, result in judged["sets"].items():
            for row in places.keys() & result["scores"]:
                shared, column = places[row]
                accuracy = np.mean(result["scores"][row]["accuracy"])
                table[shared or variant][f"{column}, {NAMES[kind]}"].append(accuracy)
    if not table:
        raise UserError(f"--ablate {folder}: no <variant>-<seed>/results.json there; run `make ablate`")
    accuracies = sorted({column for figures in table.values() for column in figures} - set(measured))
    digits = {**dict.fromkeys(measured, 3), **dict.fromkeys(accuracies, 1)}  # of each column
    rows = [(line, max(map(len, figures.values())), *(mean_std(figures[key], digits[key]) for key in digits))
            for line, figures in sorted(table.items())]
    return markdown(("variant", "runs", *digits), *rows) + "\n"


def main(args):
    """Run the command that these arguments name."""
    if args.ablate:
        table = ablation_table(Path(args.ablate))
        data.atomic_write(Path(args.ablate) / "results.md", table.encode())
        return print(table)
    if args.split and (args.posts or args.protocol != "standard"):
        raise UserError("--split is for MVSA by the standard protocol")
    if args.posts:  # before any model is loaded
        loaded = {"posts": data.load_posts(args.posts)}
    else:
        folders = data.find_mvsa(args.mvsa)
        loaded = {kind: data.load_mvsa(folders[kind]) for kind in NAMES if kind in folders}
        if args.protocol == "authors" and len(folders) < 2:
            raise UserError(f"--protocol authors pools both sets; {args.mvsa} has only {' '.join(folders)}")
    used = {post.label for posts, _ in loaded.values() for post in posts}
    names = [*(label for label in data.LABELS if label in used), *sorted(used.difference(data.LABELS))]
    pools = [loaded] if args.protocol == "authors" else [{kind: pair} for kind, pair in loaded.items()]
    device = model.pick_device(args.device)
    net, checkpoint = model.TIJEPA.from_checkpoint(args.checkpoint, args.image_weights, args.text_encoder)
    net.place(device, args.dtype)
    print(f"finetune_mvsa: {args.checkpoint}, {args.posts or args.mvsa}, {device}, {net.dtype}")
    with data.locked(args.out):
        results, lines = {}, [("set", "seed", "row", "id", "label", "prediction", *names)]
        for pool in pools:
            judge(net, pool, names, results, lines, args)
        table = make_table(results, net.config, args, checkpoint["start_share"])
        words = Path(args.posts).name, args.protocol.replace("standard", "")
        ending = "".join(f"_{word}" for word in words if word)
        path = Path(args.out) / f"results{ending}.json"
        csv.writer(file := io.StringIO(newline="")).writerows(lines)
        for name, text in ("results{}.md", table), ("predictions{}.csv", file.getvalue()):
            data.atomic_write(path.with_name(name.format(ending)), text.encode(errors="backslashreplace"))
        figure = Figure((4 * len(results), 3.6), layout="tight")  # the last row's confusion matrices
        for axis, (kind, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
            row, scores = list(result["scores"].items())[-1]
            matrix = metrics.ConfusionMatrixDisplay(np.array(scores["confusion"]), display_labels=names)
            matrix.plot(ax=axis, cmap="Blues", colorbar=False)
            axis.set_title(NAMES.get(kind) or Path(args.posts).name)
        figure.suptitle(f"{row}: posts, protocol {args.protocol}, {len(args.seeds)} seeds", fontsize=9)
        data.save_figure(figure, path.with_name(f"confusion{ending}.png"))
        tools = "torch", "timm", "transformers", "sklearn", "numpy"
        data.write_json(path, {  # written last: when it is there, all are
            "sets": results, "args": vars(args), "seeds": args.seeds, "model": vars(net.config),
            "step": checkpoint["step"], "start_share": checkpoint["start_share"], "device": str(device),
            "dtype": str(net.dtype), "versions": {name: sys.modules[name].__version__ for name in tools}})
    print(f"\n{table}\nfinetune_mvsa: wrote {path.with_suffix('.md')} and the files beside it")


def run(argv=None):
    """The command line -> exit code."""
    return data.run_command(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run())
