"""Judge a pretrained TI-JEPA on MVSA: frozen or fine-tuned features -> linear head -> one table for each set.

    python finetune_mvsa.py --checkpoint out/toy/checkpoint.pt --mvsa data/toy/mvsa --out out/toy

Writes to OUT, with the protocol in the name unless it is `standard`: the table (results.md), every number
(results.json), each test post's probabilities by row and seed, from which all scores come (predictions.csv),
the last row's confusion matrix (confusion.png). predictions/ has those of each finished seed, to be reused.

All choices are made on validation; the test posts are scored once. README.md explains protocols and modes.
The scores, mean and standard deviation over seeds:

    accuracy         share of test posts with the right label
    weighted F1      F1 of each class, averaged by its number of posts: the "F1" that MVSA papers print
    macro F1         F1 of each class, plain average: shows a class that is never found
"""
import argparse
import copy
import csv
import io
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn import metrics
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import data
import model
from model import UserError

# The grids, each searched whole on validation
REGULARISATION = (1e-3, 1e-2, 1e-1)  # C of the logistic regression, rising: each starts from the last
LEARNING_RATES = (1e-4, 5e-4)  # of X~ and the head
BATCH = 32  # posts at a time, in a training step and where nothing is trained
MAJORITY, CONCAT = "majority class", "text + image concatenated"
TEXT, IMAGE = "text only", "image only"
UNTRAINED, PRETRAINED = "TI-JEPA, X~ untrained", "TI-JEPA, pretrained"
ONLINE = "TI-JEPA, X in place of X~"
NO_IMAGE, NO_TEXT = "TI-JEPA, pretrained, text alone", "TI-JEPA, pretrained, image alone"
BOTH = "TI-JEPA, pretrained + concatenated"
FINETUNED = {f"{row}, fine-tuned": row for row in (UNTRAINED, ONLINE, PRETRAINED)}  # where each starts from
TUNED_UNTRAINED, _, TUNED = FINETUNED
ROWS = {"probe": (MAJORITY, TEXT, IMAGE, CONCAT, UNTRAINED, PRETRAINED, ONLINE, NO_IMAGE, NO_TEXT, BOTH),
        "finetune": tuple(FINETUNED)}
COMPARED = ((PRETRAINED, UNTRAINED), (PRETRAINED, CONCAT), (PRETRAINED, ONLINE), (TUNED, TUNED_UNTRAINED),
            (TUNED, CONCAT))
SCORES, MEASURES = ("accuracy", "weighted F1", "macro F1"), ("precision", "recall", "F1")
REPORTED = {"single": (76.75, 74.62), "multi": (77.55, 75.02)}  # TI-JEPA-Large, by the paper
WITHOUT_REPEATS = "accuracy without repeats"  # of training posts, in the published split
NAMES = {"single": "MVSA-Single", "multi": "MVSA-Multi"}


def parse_args(argv=None):
    """Options of the command line; --help lists them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, data.number
    add("--checkpoint", default="out/toy/checkpoint.pt", help="written by pretrain.py")
    add("--mvsa", default="data/mvsa", help="folder with one or both MVSA sets")
    add("--out", default="out/toy", help="folder for the results")
    add("--protocol", choices=("standard", "grouped", "authors"), default="standard", help="how to split")
    add("--mode", choices=list(ROWS), nargs="+", default=list(ROWS), help="how to use the features")
    add("--split", default="", help="folder of CLMLF's train.json, dev.json, test.json (empty: by seed)")
    add("--seeds", **number(int, 0, 2 ** 31 - 1), nargs="+", default=[0, 1, 2, 3, 4],
        help="of splits, untrained weights and fine-tuning")
    add("--finetune_epochs", **number(int, 1), default=4, help="passes over the training posts at most")
    add("--image_weights", default="", help="where f_I's weight file lies now (empty: as in training)")
    add("--text_encoder", default="", help="where f_T lies now (empty: as in training)")
    add("--ablate", default="", metavar="DIR", help="only make a table of the runs in DIR/<variant>-<seed>")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=model.DTYPES, default="auto", help="auto: 16 bits on CUDA, else float32")
    add("--workers", **number(int, 1), default=2, help="threads that read and decode images")
    add("--cache", default="data/cache", help="folder for the features of the frozen encoders")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: a seed that is there twice is one")
    return args


# ------------------------------------------------------------------------------------------------------------
# Posts -> features


def untrained(net, seed):
    """X~ of the same architecture with new random weights: the row that shows what pretraining adds."""
    torch.manual_seed(1000 + seed)  # not the seed that pretraining started from
    c = net.config
    fusion = model.FusionEncoder(net.image_encoder.dim, net.text_encoder.dim, c.dim, c.depth, c.heads)
    return fusion.requires_grad_(False).to(net.device)


def batches(cache, rows):
    """The features of these items of a cache, each with its first text, BATCH at a time."""
    parts = np.split(rows, range(BATCH, len(rows), BATCH))
    return cache.batches((part, cache.first[part]) for part in parts)


@torch.no_grad()
def extract_features(net, cache, seeds):
    """The frozen features of all readable posts in one pass: {row: [P, D] array}; the untrained X~ of each
    seed under (row, seed). The empty picture is the mean colour, the empty text has no words."""
    encoders = {(UNTRAINED, seed): untrained(net, seed) for seed in seeds}
    encoders.update({PRETRAINED: net.target_encoder, ONLINE: net.context_encoder})
    empty = net.frozen(torch.zeros(1, *net.image_encoder.data_config["input_size"]), [""])
    parts = []
    for s_image, s_text, mask in tqdm(batches(cache, cache.readable), desc="features"):
        no_image, no_text, no_mask = (tensor.expand(len(s_image), *tensor.shape[1:]) for tensor in empty)
        with net.autocast():
            pooled = {row: encoder(s_image, s_text, mask).mean(1) for row, encoder in encoders.items()}
            pooled[NO_IMAGE] = net.target_encoder(no_image, s_text, mask).mean(1)
            pooled[NO_TEXT] = net.target_encoder(s_image, no_text, no_mask).mean(1)
        pooled[TEXT] = s_text.float().sum(1) / mask.sum(1, keepdim=True)  # [B, D_T]; padding is 0
        pooled[IMAGE] = s_image.float().mean(1)  # [B, D_I]
        parts.append({row: value.float().cpu().numpy() for row, value in pooled.items()})
    features = {row: np.concatenate([part[row] for part in parts]) for row in parts[0]}
    features[CONCAT] = np.hstack([features[TEXT], features[IMAGE]])
    features[BOTH] = np.hstack([features[PRETRAINED], features[CONCAT]])
    return features


def split_posts(posts, protocol, split, seeds):
    """Posts -> ({seed: (train, validation, test) indices}, notes on what was found, with `split` the test
    posts that repeat a training post)."""
    labels = [post.label for post in posts]
    if split:
        parts, notes = data.clmlf_split(split, posts)
        repeated = data.repeats(posts, *parts)
        for name, found in zip(("validation", "test"), repeated):
            notes.update(f"{name} posts with the {what} of a training post" for what, _ in found)
        return dict.fromkeys(seeds, parts), dict(notes), sorted({i for _, i in repeated[1]})
    if protocol == "standard":
        return {seed: data.stratified_split(labels, seed) for seed in seeds}, {}, []
    if protocol == "grouped":
        groups = data.duplicate_groups(posts)
        sizes = [size for size in np.bincount(groups).tolist() if size > 1]
        notes = {"groups of repeated posts": len(sizes), "posts in them": sum(sizes)}
        return {seed: data.stratified_split(labels, seed, groups) for seed in seeds}, notes, []
    return {seed: data.random_split(labels, seed) for seed in seeds}, {}, []


# ------------------------------------------------------------------------------------------------------------
# Features -> predictions. Nothing here is given a test label


def class_weights(labels):
    """Labels [n] -> [2, 3]: every class alike, and in inverse proportion to its number of posts."""
    counts = labels.bincount(minlength=len(data.LABELS))
    balanced = len(labels) / ((counts > 0).sum() * counts.clamp_min(1))
    return torch.stack([torch.ones(len(counts)), balanced])


def fit_probe(x, y, train, validation):
    """Logistic regression on standardised features [P, D] of labels [P] -> (a Linear on the features as they
    are, its choice from the grid with its validation accuracy). Both class weightings are fitted at once.
    Raises UserError if the training posts all have one label.

    In the coordinates u = L^T w, L the Cholesky factor of a bound of the unweighted Hessian (Boehning 1992),
    L-BFGS takes about 30 passes over the features for each C, and gives the same head as a slower solver."""
    scaler, K, n, D = StandardScaler().fit(x[train]), len(data.LABELS), len(train), x.shape[1]
    labels = torch.from_numpy(y[train])
    counts = labels.bincount(minlength=K)
    if (counts > 0).sum() < 2:
        raise UserError(f"all training posts are {data.LABELS[labels[0]]}: a head needs two labels")
    x_train = torch.from_numpy(scaler.transform(x[train]))  # [n, D] in float32, as x is
    weights = class_weights(labels)[:, labels].T  # [n, 2]
    never = torch.where(counts > 0, 0.0, -30.0)  # a label that no training post has stays impossible
    gram = x_train.T @ x_train / n  # [D, D]
    w, bias = torch.zeros(D, 2 * K), torch.zeros(2, K, requires_grad=True)
    fitted = [], []  # by class weighting
    for c in REGULARISATION:
        penalty = 1 / (c * n)
        L = torch.linalg.cholesky(gram / 2 + penalty * torch.eye(D))
        u = (L.T @ w).requires_grad_()
        optimizer = torch.optim.LBFGS([u, bias], max_iter=500, tolerance_grad=1e-5, tolerance_change=0,
                                      history_size=20, line_search_fn="strong_wolfe")

        def evaluate():
            optimizer.zero_grad()
            w = torch.linalg.solve_triangular(L.T, u, upper=True)  # [D, 2 * 3]
            logits = (x_train @ w).unflatten(1, (2, K)) + bias + never  # [n, 2, 3]
            errors = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(2), reduction="none")
            loss = (errors.view(n, 2) * weights).mean(0).sum() + penalty / 2 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(evaluate)
        w = torch.linalg.solve_triangular(L.T, u.detach(), upper=True)
        for k, found in enumerate(fitted):
            head = torch.nn.Linear(D, K).requires_grad_(False)
            std = torch.from_numpy(scaler.scale_)
            scaled = w.unflatten(1, (2, K))[:, k].double() / std[:, None]  # [D, 3]
            head.weight.copy_(scaled.T)
            head.bias.copy_(bias.detach()[k] + never - torch.from_numpy(scaler.mean_) @ scaled)
            probabilities = probabilities_of(head, x[validation])
            accuracy = metrics.accuracy_score(y[validation], probabilities.argmax(1))
            loss = validation_loss(probabilities, y[validation])
            found.append((head, {"C": c, "balanced": bool(k), "validation": accuracy, "loss": loss}))
    return max(fitted[0] + fitted[1], key=lambda one: one[1]["validation"])  # of equals the first


def probabilities_of(head, x):
    """A head and features [P, D] -> [P, 3]"""
    return head(torch.from_numpy(x)).double().softmax(1).numpy()


class Classifier(torch.nn.Module):
    """An encoder (X~, X or untrained) and a linear head on the mean of its tokens, starting as the probe,
    so that the first steps do not spoil the features for a head that knows nothing (Kumar et al. 2022)."""

    def __init__(self, net, encoder, probe):
        super().__init__()
        self.autocast = net.autocast
        self.encoder, self.head = (copy.deepcopy(part).requires_grad_(True) for part in (encoder, probe))
        self.to(net.device)

    def forward(self, s_image, s_text, text_mask):
        """As FusionEncoder -> logits [B, 3], in float32"""
        with self.autocast():
            pooled = self.encoder(s_image, s_text, text_mask).mean(1)  # [B, D]
        return self.head(pooled.float())


def finetune(net, encoder, probe, choice, cache, y, train, validation, epochs, seed):
    """Train X~ and the head from the probe on, with its class weights -> (Classifier, its choice).

    A learning rate is tried until the first epoch that is worse on validation by cross-entropy (of a few
    hundred posts, accuracy hardly tells two epochs apart). The best epoch of all is kept; 0 is the probe."""
    weights = class_weights(torch.from_numpy(y[train]))[int(choice["balanced"])].to(net.device)
    classifier = Classifier(net, encoder, probe)
    start = best = copy.deepcopy(classifier.state_dict())
    first, choice = choice["loss"], {**choice, "lr": None, "epoch": 0}
    for lr in LEARNING_RATES:
        classifier.load_state_dict(start)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
        scaler = torch.amp.GradScaler(net.device.type, enabled=net.dtype == torch.float16)
        rng, lowest = np.random.default_rng(seed), first
        for epoch in range(1, epochs + 1):
            train_epoch(classifier, optimizer, scaler, cache, y, rng.permutation(train), weights, rng)
            probabilities = predict(classifier, cache, validation)
            loss = validation_loss(probabilities, y[validation])
            if loss < choice["loss"]:
                best = copy.deepcopy(classifier.state_dict())
                accuracy = metrics.accuracy_score(y[validation], probabilities.argmax(1))
                choice = {**choice, "lr": lr, "epoch": epoch, "loss": loss, "validation": accuracy}
            if loss > lowest:
                break
            lowest = loss
    classifier.load_state_dict(best)
    return classifier, choice


def validation_loss(probabilities, y):
    """Mean cross-entropy of probabilities [V, 3] at labels [V]."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(y)), y], 1e-7)).mean())


def train_epoch(classifier, optimizer, scaler, cache, y, order, weights, rng):
    """One pass over the posts `order`, in mixed precision with float32 weights, each step on a random 16th of
    the patches: a token does not depend on the others, so their mean is on average that of all."""
    labels = torch.from_numpy(y[order]).to(weights.device).split(BATCH)
    for y_batch, (s_image, *text) in zip(labels, batches(cache, cache.readable[order])):
        B, N = s_image.shape[:2]
        few = max(9, math.ceil(N / 16))  # with 5 of the toy's 36, one random start in five did not learn
        drawn = rng.random((B, N)).argsort(1)[:, :few]  # [B, few]
        s_image = model.gather(s_image, torch.from_numpy(drawn).to(s_image.device))
        loss = F.cross_entropy(classifier(s_image, *text), y_batch, weight=weights)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def predict(classifier, cache, part):
    """Indices of posts -> probabilities [P, 3]"""
    features = batches(cache, cache.readable[part])
    return torch.cat([classifier(*batch).softmax(-1).cpu() for batch in features]).double().numpy()


def predict_rows(net, cache, features, y, split, seed, probes, seconds, args):
    """Every row's probabilities for the test posts of one split: ({row: [P, 3]}, {row: choice}); counts
    `seconds`. `probes` keeps the fitted ones of a split: but for the untrained X~ all seeds share them."""
    train, validation, test = split
    found, choices = {}, {}
    for row in sum((ROWS[mode] for mode in ROWS if mode in args.mode), ()):
        if row == MAJORITY:
            found[row] = np.eye(len(data.LABELS))[[np.bincount(y[train]).argmax()] * len(test)]
            continue
        start = FINETUNED.get(row, row)
        key = (start, seed) if start == UNTRAINED else start
        if key not in probes:
            with data.timed(seconds, "probes"):
                probes[key] = fit_probe(features[key], y, train, validation)
        head, choices[row] = probes[key]
        if start == row:
            found[row] = probabilities_of(head, features[key][test])
            continue
        encoders = {PRETRAINED: net.target_encoder, ONLINE: net.context_encoder}
        encoder = encoders[start] if start in encoders else untrained(net, seed)
        with data.timed(seconds, "fine-tuning"):
            classifier, choices[row] = finetune(net, encoder, head, choices[row], cache, y, train, validation,
                                                args.finetune_epochs, seed)
            found[row] = predict(classifier, cache, test)
    return found, choices


def predictions(net, cache, y, splits, hashes, name, seconds, args):
    """The predictions of all seeds: ({row: [seeds, P, 3], nan where a post is not tested}, {row: {seed:
    choice}}). Those of a seed are read back from OUT/predictions if all that they depend on is the same."""
    code = [Path(file).read_bytes() for file in (__file__, model.__file__, data.__file__)]
    encoder = [*map(model.hash_weights, (net.target_encoder, net.context_encoder)), net.config.heads]
    options = [sorted(set(args.mode)), args.finetune_epochs]
    features, probes, probabilities, choices = None, defaultdict(dict), {}, {}
    for s, (seed, split) in enumerate(tqdm(splits.items(), desc="seeds")):
        path = Path(args.out) / "predictions" / f"{args.protocol}-{name}-{seed}.json"
        made_from = data.digest(*code, [encoder, cache.key, y.tolist(), options, seed, hashes[seed]])
        try:
            kept = json.loads(path.read_text())
            valid = kept["made_from"] == made_from
        except (OSError, ValueError, KeyError, TypeError):  # not there, cut off, or something else
            valid = False
        if not valid:
            took = Counter()
            if not features:
                with data.timed(took, "pool the features"):
                    features = extract_features(net, cache, splits)
            found, chosen = predict_rows(net, cache, features, y, split, seed, probes[hashes[seed]], took,
                                         args)
            found = {row: values.tolist() for row, values in found.items()}
            kept = {"made_from": made_from, "choices": chosen, "probabilities": found, "seconds": took}
            path.parent.mkdir(exist_ok=True)
            data.write_json(path, kept)
        for row, values in kept["probabilities"].items():
            empty = np.full((len(splits), len(y), len(data.LABELS)), np.nan)
            probabilities.setdefault(row, empty)[s, split[2]] = values
        seconds.update(kept["seconds"])
        for row, choice in kept["choices"].items():
            choices.setdefault(row, {})[seed] = choice
    return probabilities, choices


# ------------------------------------------------------------------------------------------------------------
# Predictions -> scores. Only here are test labels looked at


def score(probabilities, y):
    """[seeds, P, 3] of one row, nan where a post is not tested, and labels [P] -> {score: [% for each seed]},
    "confusion" [3, 3] summed over seeds, and "classes": {label: {measure: [% for each seed]}}."""
    every, confusion = range(len(data.LABELS)), 0
    scores, measures = [], []
    for one in probabilities:
        tested = ~np.isnan(one[:, 0])
        pair = y[tested], one[tested].argmax(1)
        f1 = [metrics.f1_score(*pair, average=average) for average in ("weighted", "macro")]
        scores.append([metrics.accuracy_score(*pair), *f1])
        measures.append(metrics.precision_recall_fscore_support(*pair, labels=every, zero_division=0)[:3])
        confusion += metrics.confusion_matrix(*pair, labels=every)
    scores = 100 * np.transpose(scores)  # [score, seed]
    measures = 100 * np.transpose(measures, (2, 1, 0))  # [label, measure, seed]
    classes = {label: dict(zip(MEASURES, found.tolist())) for label, found in zip(data.LABELS, measures)}
    return {**dict(zip(SCORES, scores.tolist())), "confusion": confusion.tolist(), "classes": classes}


def bootstrap(probabilities, other, y, draws=2000):
    """Accuracy of one row minus that of another on the same test posts, in points: [difference, low, high], a
    95 % interval over resampled posts. A post that several seeds test is drawn with all its predictions."""
    tested = ~np.isnan(probabilities[:, :, 0])  # [seeds, P]
    right, right_other = (np.nan_to_num(p).argmax(2) == y for p in (probabilities, other))
    gains = np.where(tested, right * 1.0 - right_other, 0)  # [seeds, P]
    posts = tested.any(0)
    sums, counts = gains.sum(0)[posts], tested.sum(0)[posts]
    equal = np.full(posts.sum(), 1 / posts.sum())
    times = np.random.default_rng(0).multinomial(posts.sum(), equal, size=draws)  # [draws, posts]
    low, high = np.percentile(times @ sums / (times @ counts), (2.5, 97.5))
    return [100 * float(value) for value in (gains.sum() / tested.sum(), low, high)]


def judge(net, folders, seconds, args):
    """Folders {set: path} -> ({set: its part of results.json}, rows of predictions.csv); counts `seconds`."""
    loaded = {kind: data.load_mvsa(folders[kind]) for kind in NAMES if kind in folders}
    pools = {kind: [kind] for kind in loaded}
    if args.protocol == "authors":
        if len(loaded) < 2:
            raise UserError(f"--protocol authors pools both sets; {args.mvsa} has only {' '.join(loaded)}")
        pools = {"pooled": list(loaded)}
    results, lines = {}, []
    for name, kinds in pools.items():
        posts = [post for kind in kinds for post in loaded[kind][0]]
        items = [(post.image, [post.text]) for post in posts]
        with data.timed(seconds, "encode the posts"):
            cache = data.FeatureCache(args.cache, items, net, args.workers)
        for i in cache.unreadable:
            loaded[posts[i].set][1]["unreadable image"] += 1
        posts = [posts[i] for i in cache.readable]
        sets = np.array([post.set for post in posts])
        labels = np.array([post.label for post in posts])
        for kind in set(kinds) - set(sets):
            raise UserError(f"no image of the posts of {NAMES[kind]} in {folders[kind]} can be read")
        splits, notes, repeated = split_posts(posts, args.protocol, args.split, args.seeds)
        for seed, (_, _, test) in splits.items():
            for kind in set(kinds) - set(sets[test]):
                raise UserError(f"seed {seed} tests no post of {NAMES[kind]}: it has too few")
        hashes = {seed: data.digest([[(posts[i].set, posts[i].id) for i in part] for part in parts])[:16]
                  for seed, parts in splits.items()}
        probabilities, choices = predictions(net, cache, labels, splits, hashes, name, seconds, args)
        for kind in kinds:
            mine = np.flatnonzero(sets == kind)
            y = labels[mine]
            rows = {row: values[:, mine] for row, values in probabilities.items()}
            results[kind] = {
                "posts": len(y), "labels": dict(zip(data.LABELS, np.bincount(y, minlength=3).tolist())),
                "skipped": dict(loaded[kind][1]), "choices": choices, "split_hash": hashes,
                "split_sizes": [len(part) for part in splits[args.seeds[0]]], "split_notes": notes,
                "scores": {row: score(values, y) for row, values in rows.items()},
                "differences": {f"{a} minus {b}": bootstrap(rows[a], rows[b], y) for a, b in COMPARED
                                if a in rows and b in rows}}
            others = np.setdiff1d(splits[args.seeds[0]][2], repeated)  # with --split all seeds test the same
            for row, values in rows.items():
                if args.split and len(others):
                    right = values[:, others].argmax(2) == y[others]  # [seeds, posts]
                    results[kind]["scores"][row][WITHOUT_REPEATS] = (100 * right.mean(1)).tolist()
                for s, p in np.argwhere(~np.isnan(values[:, :, 0])):
                    one = values[s, p]
                    lines.append((kind, args.seeds[s], row, posts[mine[p]].id, data.LABELS[y[p]],
                                  data.LABELS[one.argmax()], *one.round(6)))
    return results, lines


# ------------------------------------------------------------------------------------------------------------
# What is written


def mean_std(values, digits=2):
    """Numbers -> "mean ± standard deviation", with n - 1; of a single one, which has none, the number."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def markdown(*rows):
    """Rows of cells, the first being the header -> a Markdown table."""
    header, *lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *lines])


def make_table(results, config, args, start_share):
    """The results -> Markdown: each set's scores, differences and confusion matrix, or why there are none."""
    over = "untrained weights; published split" if args.split else "split and untrained weights"
    parts = ["# TI-JEPA on MVSA",
             f"f_I {config.image_encoder}, f_T {config.text_encoder}, checkpoint {args.checkpoint}, protocol "
             f"{args.protocol}. Mean ± standard deviation in % over {len(args.seeds)} seeds, which decide "
             f"{over}; one pretrained checkpoint. {start_share:.2%} of X~ is still its random start."]
    if config.image_encoder == "toy":
        parts.append("**Toy data and toy encoders: not the paper's numbers, and not comparable to them.**")
    for kind, name in NAMES.items():
        parts.append(f"## {name}")
        if kind not in results:
            parts.append(f"Not measured: no {name} in {args.mvsa}.")
            continue
        found = results[kind]
        pool = " of the pool, upsampled" if args.protocol == "authors" else ""
        notes = "".join(f"; {count} {what}" for what, count in found["split_notes"].items())
        parts.append(f"{name}: {found['posts']} posts, skipped: {data.describe(found['skipped'])}; train, "
                     f"validation, test {found['split_sizes']}{pool}{notes}")
        columns = [key for key in (*SCORES, WITHOUT_REPEATS) if key in next(iter(found["scores"].values()))]
        rows = [(row, *(mean_std(scores[key]) for key in columns)) for row, scores in found["scores"].items()]
        reported = "TI-JEPA-Large, *reported* in the paper, not measured here", *REPORTED[kind]
        parts.append(markdown(("features", *columns), *rows, (*reported, *["–"] * (len(columns) - 2))))
        rows = [(pair, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}")
                for pair, (gain, low, high) in found["differences"].items()]
        if rows:
            header = "difference in accuracy, same test posts", "points", "95 % interval over test posts"
            parts.append(markdown(header, *rows))
        row, scores = list(found["scores"].items())[-1]
        rows = []
        for label, counts in zip(data.LABELS, scores["confusion"]):
            means = [f"{np.mean(values):.1f}" for values in scores["classes"][label].values()]
            rows.append((label, *counts, *means))
        parts.append(f"{row}, all seeds together:")
        parts.append(markdown(("true \\ predicted", *data.LABELS, *MEASURES), *rows))
    return "\n\n".join(parts) + "\n"


def plot_confusion(results, path, args):
    """The confusion matrices of the last row, a picture for each set, posts of all seeds together."""
    figure = Figure((4 * len(results), 3.6), layout="tight")
    for axis, (kind, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        row, scores = list(found["scores"].items())[-1]
        matrix = metrics.ConfusionMatrixDisplay(np.array(scores["confusion"]), display_labels=data.LABELS)
        matrix.plot(ax=axis, cmap="Blues", colorbar=False).ax_.set_title(NAMES[kind])
    figure.suptitle(f"{row}: posts, protocol {args.protocol}, {len(args.seeds)} seeds", fontsize=9)
    figure.savefig(path, dpi=100)


def code_version():
    """The git commit of this file's folder, with "+" if files were changed since, or "none"."""
    command = "git describe --always --exclude='*' --abbrev=40 --dirty=+ || echo none"
    folder = Path(__file__).parent
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True).stdout.strip()


def ablation_table(folder):
    """The runs of `make ablate` in `folder`/<variant>-<seed> -> Markdown: mean ± standard deviation, over the
    seeds of pretraining, of what each variant ended with and of accuracies, each a mean over splits that are
    the same for all runs. Raises UserError if there are none."""
    measured = "loss", "energy_matched", "energy_position", "auc", "target_std", "target_rank"
    table = defaultdict(lambda: defaultdict(list))  # {variant: {column: [a figure of each run]}}
    for path in sorted(folder.glob("*-*/results.json")):
        variant = path.parent.name.rpartition("-")[0]
        # What does not depend on pretraining is the same in all runs.
        places = {PRETRAINED: (variant, "X~"), ONLINE: (variant, "X"), TUNED: (variant, "X~ fine-tuned"),
                  UNTRAINED: ("*untrained*", "X~"), TUNED_UNTRAINED: ("*untrained*", "X~ fine-tuned"),
                  CONCAT: ("*text + image concatenated*", "X~")}
        try:
            last = (path.parent / "log.jsonl").read_text().splitlines()[-1]
            eval_json = (path.parent / "eval.json").read_text()
            last, ended, judged = map(json.loads, (last, eval_json, path.read_text()))
            if not last["step"] == ended["step"] == judged["step"]:
                raise ValueError("its files are of different steps")
            for name in measured:
                table[variant][name].append(float((last if name == "loss" else ended)[name]))
            for kind, found in judged["sets"].items():
                for row in filter(places.get, found["scores"]):
                    name, column = places[row]
                    accuracy = np.mean(found["scores"][row]["accuracy"])
                    table[name][f"{column}, {NAMES[kind]}"].append(accuracy)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path.parent} is no finished run of this version: {error!r}") from error
    if not table:
        raise UserError(f"--ablate {folder}: no <variant>-<seed>/results.json there; run `make ablate`")
    accuracies = sorted({column for found in table.values() for column in found} - set(measured))
    rows = []
    for name, found in sorted(table.items()):
        cells = [mean_std(found[column], 3) if column in found else "" for column in measured]
        cells += [mean_std(found[column], 1) if column in found else "" for column in accuracies]
        rows.append((name, max(map(len, found.values())), *cells))
    return markdown(("variant", "runs", *measured, *accuracies), *rows) + "\n"


def seconds_of_eval(checkpoint):
    """What `pretrain.py --eval` took, by its eval.json beside the checkpoint: a Counter, empty if none."""
    try:
        seconds = json.loads((Path(checkpoint).parent / "eval.json").read_text())["seconds"]
        return Counter({stage: float(value) for stage, value in seconds.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Counter()


def main(args):
    """The command of the parsed arguments."""
    if args.ablate:
        table = ablation_table(Path(args.ablate))
        (Path(args.ablate) / "results.md").write_text(table, encoding="utf-8")
        return print(table)
    if args.split and args.protocol != "standard":
        raise UserError(f"--split is of the standard protocol, not of --protocol {args.protocol}")
    folders = data.find_mvsa(args.mvsa)  # before any model is loaded
    device = model.pick_device(args.device)
    net, checkpoint = model.TIJEPA.from_checkpoint(args.checkpoint, args.image_weights, args.text_encoder)
    net.place(device, args.dtype)
    print(f"finetune_mvsa: {args.checkpoint}, {', '.join(map(str, folders.values()))}, {device}, {net.dtype}")
    with data.locked(args.out):
        seconds = Counter(checkpoint["seconds"]) + seconds_of_eval(args.checkpoint)
        results, lines = judge(net, folders, seconds, args)
        table = make_table(results, net.config, args, checkpoint["start_share"])
        ending = "" if args.protocol == "standard" else f"_{args.protocol}"
        path = Path(args.out) / f"results{ending}.json"
        path.with_suffix(".md").write_text(table, encoding="utf-8")
        header = ("set", "seed", "row", "id", "label", "prediction", *data.LABELS)
        table_of_posts = io.StringIO()
        csv.writer(table_of_posts).writerows([header, *lines])
        data.atomic_write(path.with_name(f"predictions{ending}.csv"), table_of_posts.getvalue().encode())
        plot_confusion(results, path.with_name(f"confusion{ending}.png"), args)
        tools = ("torch", "timm", "transformers", "sklearn", "numpy")
        versions = {name: sys.modules[name].__version__ for name in tools}
        data.write_json(path, {  # the last file: when it is there, all are
            "sets": results, "reported": REPORTED, "args": vars(args), "model": vars(net.config),
            "seeds": args.seeds, "code": code_version(), "device": str(device), "dtype": str(net.dtype),
            "versions": {"python": sys.version.split()[0], **versions}, "step": checkpoint["step"],
            "start_share": checkpoint["start_share"], "seconds": seconds})
    print(f"\n{table}\nfinetune_mvsa: wrote {path.with_suffix('.md')} and the files beside it")
    print("seconds of each stage:", ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()))


def run(argv=None):
    """The command line -> exit code, see data.run_command."""
    args = parse_args(argv)
    return data.run_command(lambda: main(args), "the number of --workers")


if __name__ == "__main__":
    sys.exit(run())
