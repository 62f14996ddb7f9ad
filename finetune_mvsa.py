"""Judge a pretrained TI-JEPA on MVSA: frozen or fine-tuned features -> linear head -> one table for each set.

    python finetune_mvsa.py --checkpoint out/toy/checkpoint.pt --mvsa data/toy/mvsa --out out/toy
    python finetune_mvsa.py --checkpoint out/toy/checkpoint.pt --mvsa data/toy/mvsa --protocol grouped --mode probe

Writes to OUT, with the protocol in the name unless it is `standard`:

    results.md       the table, the differences with their intervals, the confusion matrix
    results.json     every number, with config, versions, counts, split hashes, seeds and seconds
    predictions.csv  set, seed, row, id, label, prediction and probabilities of every test post: all scores come from here
    confusion.png    the confusion matrix of the last row, all seeds together

Protocols: `standard` splits each set alone 8:1:1, stratified by label (or by --split's published ids); `grouped` does so
with repeated images and texts kept on one side; `authors` pools both sets, splits them at random and upsamples the
training part. Modes: `probe` fits a linear head on frozen features; `finetune` trains X~ on from there, with the head.

All choices are made on validation: the head's regularisation and class weights by accuracy, the fine-tuning's start, learning
rate and epoch by cross-entropy. The test posts are scored once, with what was chosen. The figures, mean and standard
deviation over seeds:

    accuracy         share of test posts with the right label
    weighted F1      F1 of each class, averaged by its number of posts: the "F1" that MVSA papers print
    macro F1         F1 of each class, plain average: shows a class that is never found
"""
import argparse
import copy
import csv
import functools
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import sklearn
import timm
import torch
import torch.nn.functional as F
import transformers
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import data
import model

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

# The grids, each searched whole on validation: C of the logistic regression; learning rate of X~ and the head
REGULARISATION, CLASS_WEIGHTS, LEARNING_RATES = (1e-3, 1e-2, 1e-1), (None, "balanced"), (1e-4, 5e-4)
FINETUNE_BATCH = 32  # posts a step
METRICS = {"accuracy": accuracy_score,
           "weighted F1": lambda y, p: f1_score(y, p, average="weighted", zero_division=0),
           "macro F1": lambda y, p: f1_score(y, p, average="macro", zero_division=0)}
MAJORITY, TEXT, IMAGE, CONCAT = "majority class", "text only", "image only", "text + image concatenated"
UNTRAINED, PRETRAINED = "TI-JEPA, X~ untrained", "TI-JEPA, pretrained"
NO_IMAGE, NO_TEXT = "TI-JEPA, pretrained, text alone", "TI-JEPA, pretrained, image alone"
BOTH = "TI-JEPA, pretrained + concatenated"
TUNED_UNTRAINED, TUNED = "TI-JEPA, X~ untrained, fine-tuned", "TI-JEPA, pretrained, fine-tuned"
ROWS = {"probe": (MAJORITY, TEXT, IMAGE, CONCAT, UNTRAINED, PRETRAINED, NO_IMAGE, NO_TEXT, BOTH),
        "finetune": (TUNED_UNTRAINED, TUNED)}
COMPARED = ((PRETRAINED, UNTRAINED), (PRETRAINED, CONCAT), (TUNED, TUNED_UNTRAINED), (TUNED, CONCAT))
REPORTED = {"single": (76.75, 74.62), "multi": (77.55, 75.02)}  # TI-JEPA-Large, accuracy and weighted F1, in the paper
NAMES = {"single": "MVSA-Single", "multi": "MVSA-Multi"}
# Options that do not change an answer: where things are and how fast
FREE = {"checkpoint", "mvsa", "out", "ablate", "device", "workers", "cache", "seeds"}


def parse_args(argv=None):
    """Options of the command line; --help lists them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="out/toy/checkpoint.pt", help="what pretrain.py wrote")
    add("--mvsa", default="data/mvsa", help="folder with one or both MVSA sets")
    add("--out", default="out/toy", help="folder for the results")
    add("--protocol", choices=("standard", "grouped", "authors"), default="standard", help="how posts are split")
    add("--mode", choices=list(ROWS), nargs="+", default=list(ROWS), help="how features are used; both: all rows")
    add("--split", default="", help="folder with CLMLF's train.json, dev.json, test.json (empty: 8:1:1 by seed)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the splits, the untrained weights, fine-tuning")
    add("--finetune_epochs", type=int, default=4, help="at most so many passes over the training posts")
    add("--ablate", default="", metavar="DIR", help="only make a table of the runs in DIR/<variant>-<seed>, by make ablate")
    add("--batch_size", type=int, default=100, help="posts encoded at a time")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=model.PRECISIONS, default="auto", help="of matrix products; auto: bfloat16 or float16 on CUDA, "
        "else float32")
    add("--workers", type=int, default=2, help="processes that decode images or read the cache")
    add("--cache", default="data/cache", metavar="DIR|off", help="where what the frozen encoders say is kept, or off")
    add("--cache_dtype", choices=list(data.ON_DISK), default="float16", help="of the cached features")
    return parser.parse_args(argv)


def untrained(net, seed):
    """X~ of the same architecture with new random weights: what the row is compared with to see what pretraining adds."""
    torch.manual_seed(1000 + seed)  # not the seed that pretraining started from
    c = net.config
    fusion = model.FusionEncoder(net.image_encoder.dim, net.text_encoder.dim, c.dim, c.depth, c.heads, c.self_attention)
    return model.TargetEncoder(fusion).to(net.device)


# ---------------------------------------------------------------------------------------------------------------------
# Posts -> features


class Posts:
    """The posts of one or both sets whose image can be read, what f_I and f_T say of them, and their labels."""

    def __init__(self, net, posts, left_out, args):
        self.net, self.args = net, args
        items = [(post.image, [post.text]) for post in posts]
        self.source = data.open_source(args.cache, items, net, args.cache_dtype, args.workers)
        self.features, kept = self.pool(left_out)
        self.rows, self.posts = kept, [posts[i] for i in kept]  # index into the source, for fine-tuning
        self.labels = np.array([post.label for post in self.posts])
        self.sets = np.array([post.set for post in self.posts])

    def batches(self):
        """All of the source: (indices, features as X~ takes them), `batch_size` at a time."""
        rows = range(len(self.source.items))
        draws = [[(i, i, 0) for i in rows[start:start + self.args.batch_size]]
                 for start in range(0, len(rows), self.args.batch_size)]
        for part, batch in zip(draws, data.make_loader(self.source, draws, self.args.workers, self.net.device)):
            yield [i for i, _, _ in part], batch

    def inputs(self, rows):
        """Indices of the source -> what X~ takes."""
        return self.source[[(row, row, 0) for row in rows]].features(self.net)

    @torch.no_grad()
    def pool(self, left_out):
        """All frozen features in one pass: ({row: [P, D] array}, indices of the posts whose image can be read).

        The untrained X~ has one array for each seed, under (row, seed). An empty image is one of the mean colour.
        """
        net, features, kept = self.net, {}, []
        encoders = {PRETRAINED: net.target_encoder, **{(UNTRAINED, seed): untrained(net, seed) for seed in self.args.seeds}}
        nothing = net.frozen(torch.zeros(1, *net.image_encoder.data_config["input_size"]), [""])
        for indices, batch in tqdm(self.batches(), desc="features", total=-(-len(self.source.items) // self.args.batch_size)):
            left_out.add_broken(batch, self.source.items)
            if not batch.size:
                continue
            kept += [i for i in indices if i not in batch.left_out]
            s_image, s_text, mask = batch.features(net)  # [B, N, D_I], [B, L, D_T], [B, L]
            no_image, no_text, no_mask = (part.expand(batch.size, *part.shape[1:]) for part in nothing)
            with net.autocast():
                pooled = {name: encoder(s_image, s_text, mask).mean(1) for name, encoder in encoders.items()}  # [B, D]
                pooled[NO_IMAGE] = net.target_encoder(no_image, s_text, mask).mean(1)
                pooled[NO_TEXT] = net.target_encoder(s_image, no_text, no_mask).mean(1)
            pooled[TEXT], pooled[IMAGE] = pool_frozen(s_image, s_text, mask)
            for name, value in pooled.items():
                features.setdefault(name, []).append(value.float().cpu().numpy())
        if not kept:
            raise data.DataError(f"no image of the posts in {self.args.mvsa} can be read; left out: {left_out}")
        features = {name: np.concatenate(parts) for name, parts in features.items()}
        features[CONCAT] = np.hstack([features[TEXT], features[IMAGE]])
        features[BOTH] = np.hstack([features[PRETRAINED], features[CONCAT]])
        return features, kept


def split_posts(posts, protocol, split, seeds):
    """Posts -> ({seed: (train, validation, test) indices}, notes on what was found)."""
    labels = [post.label for post in posts]
    if protocol == "authors":  # one random split of the pool; the small classes of the training part are drawn again
        parts = {seed: data.random_split(labels, seed) for seed in seeds}
        return {seed: (data.upsample(train, labels, seed), *rest) for seed, (train, *rest) in parts.items()}, {}
    if protocol == "grouped":
        groups = data.duplicate_groups(posts)
        sizes = np.bincount(groups)
        notes = {"groups of repeated posts": int((sizes > 1).sum()), "posts in them": int(sizes[sizes > 1].sum())}
        return {seed: data.grouped_split(labels, groups, seed) for seed in seeds}, notes
    if split:
        parts, notes = data.published_split(split, posts)
        return {seed: parts for seed in seeds}, dict(notes)
    return {seed: data.stratified_split(labels, seed) for seed in seeds}, {}


# ---------------------------------------------------------------------------------------------------------------------
# Features -> predictions. Nothing here is given a test label


def fit_head(x, y, train, validation):
    """Features [P, D], labels [P], indices -> (head, its choice from the grid with its accuracy and cross-entropy on
    validation). Looks at no other post's label."""
    best = None
    for weights in CLASS_WEIGHTS:
        for c in REGULARISATION:
            head = make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight=weights, max_iter=5000))
            head.fit(x[train], y[train])
            accuracy = accuracy_score(y[validation], head.predict(x[validation]))
            if best is None or accuracy > best[1]["validation"]:  # a tie keeps the stronger regularisation, and no weights
                best = head, {"C": c, "class_weight": weights, "validation": accuracy}
    best[1]["loss"] = validation_loss(y, full(best[0], x[validation]), validation)
    return best


def pool_frozen(s_image, s_text, text_mask):
    """-> f_T's tokens averaged without padding [B, D_T], f_I's patches averaged [B, D_I]"""
    weight = text_mask[:, :, None]  # [B, L, 1]
    return (s_text.float() * weight).sum(1) / weight.sum(1), s_image.float().mean(1)


class Classifier(torch.nn.Module):
    """X~ and a linear head on the mean of its tokens (`beside`: beside the pooled frozen features), starting as the probe:
    linear probing, then fine-tuning (Kumar et al. 2022), so that the first steps do not spoil the features for a head that
    knows nothing."""

    def __init__(self, encoder, probe, beside, autocast):
        super().__init__()
        self.encoder = copy.deepcopy(encoder.encoder).requires_grad_(True)  # X~ as a trainable FusionEncoder
        self.autocast = autocast  # TIJEPA.autocast, for X~; the head is small, and exact: it starts as the probe
        self.beside, (scaler, regression) = beside, probe
        tensors = [torch.from_numpy(v).float() for v in (scaler.mean_, scaler.scale_, regression.coef_, regression.intercept_)]
        mean, scale, weight, bias = (tensor.to(next(self.encoder.parameters()).device) for tensor in tensors)
        self.head = torch.nn.Linear(*reversed(weight.shape)).to(weight.device)
        self.head.weight.data = weight / scale  # the standardisation is part of the head
        self.head.bias.data = bias - (weight / scale) @ mean

    def forward(self, s_image, s_text, text_mask):
        """As FusionEncoder -> logits [B, 3]"""
        with self.autocast():
            pooled = self.encoder(s_image, s_text, text_mask).float().mean(1)  # [B, D]
        if self.beside:
            pooled = torch.cat([pooled, *pool_frozen(s_image, s_text, text_mask)], dim=1)  # [B, D + D_T + D_I]
        return self.head(pooled)


def finetune(encoder, probes, posts, y, train, validation, args, seed):
    """Train X~ and the head on the training posts -> (Classifier, its choice). Looks at the labels of no other posts.

    `probes` are what fit_head gave on X~'s pooled features and on these beside the frozen ones. The start is the one with
    the lower cross-entropy on validation (of a few hundred posts, accuracy hardly tells two epochs apart), and its class
    weights are kept. For each learning rate training ends with the first epoch that is worse on validation; what is kept is
    the best epoch of all, the probe itself (epoch 0) included.
    """
    beside = probes[1][1]["loss"] < probes[0][1]["loss"]
    probe, choice = probes[beside]
    choice = {**choice, "beside the frozen features": bool(beside), "lr": None, "epoch": 0}
    counts = np.bincount(y[train], minlength=len(data.LABELS))
    balance = len(train) / (len(data.LABELS) * np.maximum(counts, 1))
    balance = balance if choice["class_weight"] else np.ones(len(data.LABELS))
    balance = torch.tensor(balance, dtype=torch.float32, device=posts.net.device)
    classifier = Classifier(encoder, probe, beside, posts.net.autocast)
    start = copy.deepcopy(classifier.state_dict())
    first = validation_loss(y, predict(classifier, posts, validation), validation)
    best = first, start
    for lr in LEARNING_RATES:
        classifier.load_state_dict(start)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
        scaler = torch.amp.GradScaler(posts.net.device.type, enabled=posts.net.dtype == torch.float16)
        rng, lowest = np.random.default_rng(seed), first
        for epoch in range(1, args.finetune_epochs + 1):
            train_epoch(classifier, optimizer, scaler, posts, y, rng.permutation(train), balance)
            probabilities = predict(classifier, posts, validation)
            loss = validation_loss(y, probabilities, validation)
            if loss < best[0]:
                best = loss, copy.deepcopy(classifier.state_dict())
                choice = {**choice, "lr": lr, "epoch": epoch, "loss": loss,
                          "validation": accuracy_score(y[validation], probabilities.argmax(1))}
            if loss > lowest:
                break
            lowest = loss
    classifier.load_state_dict(best[1])
    return classifier, choice


def validation_loss(y, probabilities, validation):
    """Mean cross-entropy of probabilities [V, 3] at the posts of those indices."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(validation)), y[validation]], 1e-7)).mean())


def train_epoch(classifier, optimizer, scaler, posts, y, order, balance):
    """One pass over the posts `order`."""
    classifier.train()
    for start in range(0, len(order), FINETUNE_BATCH):
        part = order[start:start + FINETUNE_BATCH]
        rows = [posts.rows[i] for i in part]
        labels = torch.from_numpy(y[part]).to(balance.device)
        loss = F.cross_entropy(classifier(*posts.inputs(rows)), labels, weight=balance)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


@torch.no_grad()
def predict(classifier, posts, part):
    """Indices of posts -> probabilities [P, 3]"""
    classifier.eval()
    rows, probabilities = [posts.rows[i] for i in part], []
    for start in range(0, len(rows), posts.args.batch_size):
        features = posts.inputs(rows[start:start + posts.args.batch_size])
        probabilities.append(classifier(*features).softmax(-1).cpu().numpy())
    return np.concatenate(probabilities)


def full(head, x):
    """A head's probabilities [P, 3], 0 for a class that its training posts did not have."""
    probabilities = np.zeros((len(x), len(data.LABELS)))
    probabilities[:, head.classes_] = head.predict_proba(x)
    return probabilities


def answers(posts, seed, split, args):
    """Every row's answer for every test post of one split: list of dicts, the lines of predictions.csv, and the choices
    made, by row."""
    (train, validation, test), lines, choices, y = split, [], {}, posts.labels
    encoders = {}
    if "finetune" in args.mode:  # row: (X~, its features, these beside the frozen ones)
        encoders = {TUNED: (posts.net.target_encoder, [PRETRAINED], [BOTH]),
                    TUNED_UNTRAINED: (untrained(posts.net, seed), [UNTRAINED], [UNTRAINED, CONCAT])}

    def pooled(names):
        return np.hstack([posts.features[name if name in posts.features else (name, seed)] for name in names])

    @functools.cache
    def probe(*names):
        return fit_head(pooled(names), y, train, validation)

    for row in (row for mode in args.mode for row in ROWS[mode]):
        if row == MAJORITY:
            head, choice = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train), 1)), y[train]), None
            probabilities = full(head, np.zeros((len(test), 1)))
        elif row in encoders:
            encoder, *inputs = encoders[row]
            probes = [probe(*names) for names in inputs]
            classifier, choice = finetune(encoder, probes, posts, y, train, validation, args, seed)
            probabilities = predict(classifier, posts, test)
        else:
            head, choice = probe(row)
            probabilities = full(head, pooled([row])[test])
        choices[row] = choice
        for i, p in zip(test, probabilities):
            lines.append({"set": str(posts.sets[i]), "seed": seed, "row": row, "id": posts.posts[i].id,
                          "label": data.LABELS[y[i]], "prediction": data.LABELS[int(p.argmax())],
                          **{name: round(float(value), 6) for name, value in zip(data.LABELS, p)}})
    return lines, choices


def predictions(posts, splits, args, name, checkpoint):
    """The answers of all seeds: (lines, {row: {seed: choice}}). Those of a seed are kept in OUT/partial until the results
    are written, so that a run that is cut off goes on at its seed; `checkpoint` is a hash of the weights."""
    lines, choices = [], {}
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, model.__file__, data.__file__))).hexdigest()
    same = {key: value for key, value in vars(args).items() if key not in FREE}
    for seed, split in tqdm(splits.items(), desc="heads"):
        made_from = json.dumps([same, checkpoint, code, [[(str(posts.sets[i]), posts.posts[i].id, int(posts.labels[i]))
                                                    for i in part] for part in split]])
        path = Path(args.out) / "partial" / f"{args.protocol}-{name}-{seed}.json"
        made_from = hashlib.sha256(made_from.encode()).hexdigest()
        kept = json.loads(path.read_text()) if path.is_file() else {}
        if kept.get("made_from") != made_from:
            answered, chosen = answers(posts, seed, split, args)
            kept = {"made_from": made_from, "lines": answered, "choices": chosen}
            data.make_folder(path.parent, "--out")
            with data.whole_file(path) as file:
                file.write(json.dumps(kept).encode())
        lines += kept["lines"]
        for row, choice in kept["choices"].items():
            choices.setdefault(row, {})[seed] = choice
    return lines, choices


# ---------------------------------------------------------------------------------------------------------------------
# Predictions -> scores. Only here are test labels looked at


def score(lines):
    """Lines of one set -> {row: {metric: [% for each seed], "confusion": [3, 3] summed over seeds, "classes": {...}}}."""
    scores, index = {}, {name: i for i, name in enumerate(data.LABELS)}
    for row in dict.fromkeys(line["row"] for line in lines):
        here, found = [line for line in lines if line["row"] == row], {}
        for seed in dict.fromkeys(line["seed"] for line in here):
            y, p = (np.array([index[line[key]] for line in here if line["seed"] == seed]) for key in ("label", "prediction"))
            for name, metric in METRICS.items():
                found.setdefault(name, []).append(100 * metric(y, p))
            found["confusion"] = found.get("confusion", 0) + confusion_matrix(y, p, labels=range(len(index)))
            parts = precision_recall_fscore_support(y, p, labels=range(len(index)), zero_division=0)
            for label, *values in zip(data.LABELS, *parts[:3]):
                for name, value in zip(("precision", "recall", "F1"), values):
                    found.setdefault("classes", {}).setdefault(label, {}).setdefault(name, []).append(100 * value)
        found["confusion"] = found["confusion"].tolist()
        scores[row] = found
    return scores


def bootstrap(lines, row, other, draws=2000):
    """Accuracy of `row` minus that of `other` on the same test posts, in points: (difference, low, high), a 95 % interval
    over resampled posts. A post that several seeds test is drawn as one, with all its answers."""
    right = {(line["seed"], line["id"], line["row"]): line["prediction"] == line["label"] for line in lines}
    pairs = [(seed, post) for seed, post, name in right if name == row]
    gains = np.array([float(right[seed, post, row]) - right[seed, post, other] for seed, post in pairs])
    posts, which = np.unique([post for _, post in pairs], return_inverse=True)
    sums, counts = (np.bincount(which, weights=weights) for weights in (gains, np.ones(len(gains))))  # by post
    equal = np.full(len(posts), 1 / len(posts))
    times = np.random.default_rng(0).multinomial(len(posts), equal, size=draws)  # [draws, posts]
    low, high = np.percentile(times @ sums / (times @ counts), (2.5, 97.5))
    return [100 * value for value in (gains.mean(), low, high)]


def judge(net, folders, args):
    """Folders {set: path} -> ({set: everything results.json says of it}, lines of predictions.csv). Prints the counts."""
    loaded = {kind: data.load_mvsa(folder) for kind, folder in sorted(folders.items(), reverse=True)}
    if args.protocol == "authors":
        if len(loaded) < 2:
            raise data.DataError(f"--protocol authors pools both sets; only {NAMES[next(iter(loaded))]} is in {args.mvsa}")
        loaded = {"pooled": (loaded["single"][0] + loaded["multi"][0], loaded["single"][1].merge(loaded["multi"][1]))}
    results, every = {}, []
    for name, (posts, left_out) in loaded.items():
        posts = Posts(net, posts, left_out, args)
        splits, notes = split_posts(posts.posts, args.protocol, args.split, args.seeds)
        sizes = [len(part) for part in splits[args.seeds[0]]]
        print(f"{NAMES.get(name, name)}: {len(posts.labels)} posts, left out: {left_out}; train, validation, test {sizes}"
              + (f"; {notes}" if notes else ""))
        weights = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
        lines, choices = predictions(posts, splits, args, name, weights)
        hashes = {seed: hashlib.sha256(json.dumps([[f"{posts.sets[i]} {posts.posts[i].id}" for i in part] for part in parts]
                                                  ).encode()).hexdigest()[:16] for seed, parts in splits.items()}
        for kind in dict.fromkeys(posts.sets):
            mine = [line for line in lines if line["set"] == kind]
            labels = posts.labels[posts.sets == kind]
            rows = {line["row"] for line in mine}
            results[str(kind)] = {
                "posts": len(labels), "labels": {label: int((labels == i).sum()) for i, label in enumerate(data.LABELS)},
                "read": {"posts": len(labels)}, "left_out": left_out.counts(),
                "split_sizes": sizes, "split_notes": notes, "split_hash": hashes,
                "scores": score(mine), "choices": choices,
                "differences": {f"{a} minus {b}": bootstrap(mine, a, b) for a, b in COMPARED if {a, b} <= rows}}
        every += lines
    return results, every


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def table(results, config, args):
    """The results -> Markdown: for each set the scores, the differences and a confusion matrix, or why there are none."""
    lines = ["# TI-JEPA on MVSA", "", f"f_I {config.image_encoder}, f_T {config.text_encoder}, checkpoint {args.checkpoint}, "
             f"protocol {args.protocol}. Mean ± standard deviation in % over {len(args.seeds)} seeds, "
             + ("of the untrained weights; the split is the published one." if args.split
                else "of the split and of the untrained weights; one pretrained checkpoint."), ""]
    if config.image_encoder == "toy":
        lines += ["**Toy data and untrained toy encoders: these numbers are not the paper's and not comparable to it.**", ""]
    rows = [row for mode in args.mode for row in ROWS[mode]]
    for kind, name in NAMES.items():
        lines += [f"## {name}", ""]
        found = results.get(kind)
        if found:
            lines += [f"{found['posts']} posts, train / validation / test " + " / ".join(map(str, found["split_sizes"]))
                      + (" of the pool, upsampled" if args.protocol == "authors" else ""), ""]
        lines += ["| features | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
        for row in rows:
            cells = ([f"{np.mean(found['scores'][row][m]):.2f} ± {np.std(found['scores'][row][m]):.2f}" for m in METRICS]
                     if found else [f"not measured: no {name} in {args.mvsa}"] + ["–"] * (len(METRICS) - 1))
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        accuracy, f1 = REPORTED[kind]
        lines += [f"| TI-JEPA-Large, *reported* in the paper, not measured here | {accuracy} | {f1} | not reported |", ""]
        if not found:
            continue
        if found["differences"]:
            lines += ["| difference in accuracy, same test posts | points | 95 % interval |", "|---|---|---|"]
            lines += [f"| {name} | {d:+.2f} | {low:+.2f} to {high:+.2f} |" for name, (d, low, high)
                      in found["differences"].items()] + [""]
        scores = found["scores"][rows[-1]]
        lines += [f"{rows[-1]}, all seeds together:", "", "| true \\ predicted | " + " | ".join(data.LABELS)
                  + " | precision | recall | F1 |", "|---|" + "---|" * 6]
        for label, counts in zip(data.LABELS, scores["confusion"]):
            values = [f"{np.mean(scores['classes'][label][m]):.1f}" for m in ("precision", "recall", "F1")]
            lines.append(f"| {label} | " + " | ".join([*map(str, counts), *values]) + " |")
        lines.append("")
    return "\n".join(lines)


def draw_confusion(results, row, path):
    """The confusion matrices of one row, a picture for each set, as shares of the true class."""
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.6), squeeze=False)
    for axis, (kind, found) in zip(axes[0], results.items()):
        counts = np.array(found["scores"][row]["confusion"])
        axis.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), vmin=0, vmax=1, cmap="Blues")
        for (i, j), count in np.ndenumerate(counts):
            axis.text(j, i, count, ha="center", va="center")
        axis.set(title=NAMES[kind], xlabel="predicted", ylabel="true", xticks=range(3), yticks=range(3),
                 xticklabels=data.LABELS, yticklabels=data.LABELS)
    figure.suptitle(row)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def code_version():
    """The git commit of this file's folder, with "+" if files were changed since, or "none"."""
    def git(*words):
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
    try:
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "-uno").stdout)
        return commit.stdout.strip() + "+" * changed if not commit.returncode else "none"
    except FileNotFoundError:  # no git on this machine
        return "none"


def ablation_table(folder):
    """The runs of `make ablate` in `folder`/<variant>-<seed> -> Markdown: a row for each variant, in order of age, with
    mean ± standard deviation over its seeds. Raises DataError if there are none."""
    runs, baselines = {}, {}
    for path in sorted(folder.glob("*-*/results.json"), key=lambda path: path.stat().st_mtime):
        scores = {kind: found["scores"] for kind, found in json.loads(path.read_text())["sets"].items()}
        judged = json.loads((path.parent / "eval.json").read_text())
        loss = json.loads((path.parent / "log.jsonl").read_text().splitlines()[-1])["loss"]
        probe = {row: [np.mean(scores[kind][row]["accuracy"]) for kind in NAMES] for row in (PRETRAINED, UNTRAINED, CONCAT)}
        figures = [loss, judged["target_std"], judged["target_rank"], judged["auc"], *probe[PRETRAINED]]
        runs.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(figures)
        for row in (UNTRAINED, CONCAT):
            baselines.setdefault(row, []).append(probe[row])
    if not runs:
        raise data.DataError(f"--ablate {folder}: no <variant>-<seed>/results.json there; run `make ablate`")
    digits = (3, 3, 1, 3, 1, 1)
    cell = lambda values, n: f"{np.mean(values):.{n}f} ± {np.std(values):.{n}f}"
    lines = ["| variant | seeds | loss | target std | effective rank | energy AUC | probe, Single | probe, Multi |",
             "|---|---|---|---|---|---|---|---|"]
    for name, figures in runs.items():
        lines.append(f"| {name} | {len(figures)} | " + " | ".join(map(cell, zip(*figures), digits)) + " |")
    for name, accuracies in baselines.items():
        lines.append(f"| *{name}* | | | | | | " + " | ".join(map(cell, zip(*accuracies), (1, 1))) + " |")
    return "\n".join([*lines, ""])


def run(args):
    """The command of the parsed arguments -> exit code 0."""
    start = time.time()
    if args.ablate:
        text = ablation_table(Path(args.ablate))
        (Path(args.ablate) / "results.md").write_text(text, encoding="utf-8")
        print(text)
        return 0
    if args.split and args.protocol != "standard":
        raise data.DataError(f"--split is of the standard protocol; it cannot be had with --protocol {args.protocol}")
    folders = data.find_mvsa(args.mvsa)  # before any model is loaded
    device, out_dir = model.choose_device(args.device), data.make_folder(args.out, "--out")
    net = model.TIJEPA.from_checkpoint(args.checkpoint)[0].to(device)
    net.precision = args.dtype
    print(f"finetune_mvsa: {args.checkpoint}, {', '.join(str(f) for f in folders.values())}, device {device}, "
          f"{net.dtype}")
    results, lines = judge(net, folders, args)
    ending = "" if args.protocol == "standard" else f"_{args.protocol}"
    text = table(results, net.config, args)
    (out_dir / f"results{ending}.md").write_text(text, encoding="utf-8")
    with open(out_dir / f"predictions{ending}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    draw_confusion(results, lines[-1]["row"], out_dir / f"confusion{ending}.png")
    versions = {module.__name__: module.__version__ for module in (torch, timm, transformers, sklearn, np)}
    config = {key: value for key, value in vars(net.config).items() if key != "vocabulary"}
    with data.whole_file(out_dir / f"results{ending}.json") as file:  # the last: when it is there, all is
        file.write(json.dumps({
            "sets": results, "reported": REPORTED, "args": vars(args), "model": config, "code": code_version(),
            "versions": {"python": sys.version.split()[0], **versions}, "device": str(device), "seeds": args.seeds,
            "seconds": round(time.time() - start, 1)}, indent=1).encode())
    for path in (out_dir / "partial").glob(f"{args.protocol}-*.json"):
        path.unlink()
    print(f"\n{text}\nfinetune_mvsa: wrote results{ending}.md, results{ending}.json, predictions{ending}.csv and "
          f"confusion{ending}.png in {out_dir}")
    for kind, found in results.items():
        print(f"{NAMES[kind]}: read {data.describe(found['read'])}; left out: {data.describe(found['left_out'])}")
    return 0


def main(argv=None):
    """Returns the exit code; see data.exit_code for those of failures."""
    args = parse_args(argv)
    return data.exit_code(lambda: run(args), (data.DataError, model.ModelError), "--batch_size or --workers")


if __name__ == "__main__":
    sys.exit(main())
