"""Judge a pretrained TI-JEPA on MVSA: frozen or fine-tuned features -> linear head -> one table for each set.

    python finetune_mvsa.py --checkpoint out/toy/checkpoint.pt --mvsa data/toy/mvsa --out out/toy

Writes to OUT, with the protocol in the name unless it is `standard`: the table (results.md), every number
(results.json), each test post's probabilities by row and seed, from which all scores come (predictions.csv),
the last row's confusion matrix (confusion.png). predictions/ has those of each finished seed, to be reused.

All choices are made on validation; the test posts are scored once. README.md explains protocols and modes.
Weighted F1 is the "F1" of MVSA papers; macro F1, the mean over classes, shows one that is never found.
"""
import argparse
import copy
import csv
import json
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
LEARNING_RATES = (1e-4, 5e-4)  # of the encoder and the head
BATCH = 32  # posts at a time, in a training step and where nothing is trained
MAJORITY, CONCAT = "majority class", "text + image concatenated"
TEXT, IMAGE = "text only", "image only"
UNTRAINED, PRETRAINED = "TI-JEPA, X~ untrained", "TI-JEPA, pretrained"
ONLINE = "TI-JEPA, X in place of X~"
NO_IMAGE, NO_TEXT = "TI-JEPA, pretrained, text alone", "TI-JEPA, pretrained, image alone"
BOTH = "TI-JEPA, pretrained + concatenated"
FINE_TUNED = ", fine-tuned"  # such a row starts from the probe of the row that its name begins with
TUNED, TUNED_UNTRAINED = PRETRAINED + FINE_TUNED, UNTRAINED + FINE_TUNED
ROWS = {"probe": (MAJORITY, TEXT, IMAGE, CONCAT, UNTRAINED, PRETRAINED, ONLINE, NO_IMAGE, NO_TEXT, BOTH),
        "finetune": (TUNED_UNTRAINED, ONLINE + FINE_TUNED, TUNED)}
COMPARED = {PRETRAINED: (UNTRAINED, CONCAT, ONLINE), TUNED: (TUNED_UNTRAINED, CONCAT)}
MEASURES = ("precision", "recall", "F1")
NAMES = {"single": "MVSA-Single", "multi": "MVSA-Multi"}
REPORTED = {"single": (76.75, 74.62), "multi": (77.55, 75.02)}  # TI-JEPA-Large, by the paper


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


# ---- Posts -> features and splits --------------------------------------------------------------------------


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
    encoders |= {PRETRAINED: net.target_encoder, ONLINE: net.context_encoder}
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


def split_posts(posts, args):
    """Posts -> ({seed: (train, validation, test) indices}, notes on what was found, with --split the test
    posts that repeat a training post)."""
    labels, seeds = [post.label for post in posts], args.seeds
    if args.split:
        parts, notes = data.clmlf_split(args.split, posts)
        repeats = data.repeats(posts, *parts)
        for name, found in zip(("validation", "test"), repeats):
            notes.update(f"{name} posts with the {what} of a training post" for what, _ in found)
        return dict.fromkeys(seeds, parts), notes, [i for _, i in repeats[1]]
    if args.protocol == "standard":
        return {seed: data.stratified_split(labels, seed) for seed in seeds}, {}, []
    if args.protocol == "grouped":
        groups = data.duplicate_groups(posts)
        sizes = [size for size in np.bincount(groups).tolist() if size > 1]
        notes = {"groups of repeated posts": len(sizes), "posts in them": sum(sizes)}
        return {seed: data.stratified_split(labels, seed, groups) for seed in seeds}, notes, []
    return {seed: data.random_split(labels, seed) for seed in seeds}, {}, []


# ---- Features -> predictions. All labels are passed, but none of a test post is used -----------------------


def class_weights(labels):
    """Labels [n] -> [2, 3]: every class alike, and in inverse proportion to its number of posts."""
    counts = labels.bincount(minlength=len(data.LABELS))
    balanced = len(labels) / ((counts > 0).sum() * counts.clamp_min(1))
    return torch.stack([torch.ones(len(counts)), balanced])


def fit_probe(x, y, train, validation):
    """Logistic regression of labels [P] on standardised features [P, D] -> (a Linear on the features as they
    are, its choice from the grid). Raises UserError if the training posts all have one label.

    L-BFGS in the coordinates u = L^T w, L the Cholesky factor of a bound of the unweighted Hessian (Boehning
    1992), takes about 30 passes over the features for each C, in which it fits both class weightings."""
    standard, K, n, D = StandardScaler().fit(x[train]), len(data.LABELS), len(train), x.shape[1]
    labels = torch.from_numpy(y[train])
    there = torch.isin(torch.arange(K), labels)
    if there.sum() < 2:
        raise UserError(f"all training posts are {data.LABELS[labels[0]]}: a head needs two labels")
    never = torch.where(there, 0.0, -30.0)  # a label that no training post has stays impossible
    x_train = torch.from_numpy(standard.transform(x[train]))  # [n, D] in float32, as x is
    weights = class_weights(labels)[:, labels].T  # [n, 2]
    gram = x_train.T @ x_train / n  # [D, D]
    w, bias = torch.zeros(D, 2 * K), torch.zeros(2, K, requires_grad=True)
    fitted = []
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
        scaled = w.double() / torch.from_numpy(standard.scale_)[:, None]  # [D, 2 * 3], of raw features
        for k, of_raw in enumerate(scaled.split(K, dim=1)):
            head = torch.nn.Linear(D, K).requires_grad_(False)
            head.weight.copy_(of_raw.T)
            head.bias.copy_(bias.detach()[k] + never - torch.from_numpy(standard.mean_) @ of_raw)
            measured = validate(probabilities_of(head, x[validation]), y[validation])
            fitted.append((head, {"C": c, "balanced": bool(k), **measured}))
    # Of equals the first without class weights
    return max(fitted, key=lambda one: (one[1]["validation"], not one[1]["balanced"]))


def probabilities_of(head, x):
    """A head and features [P, D] -> [P, 3]"""
    return head(torch.from_numpy(x)).double().softmax(1).numpy()


def validate(probabilities, y):
    """Probabilities [V, 3] at labels [V] -> the two that choices go by: accuracy and mean cross-entropy."""
    loss = -np.log(np.maximum(probabilities[np.arange(len(y)), y], 1e-7)).mean()
    return {"validation": metrics.accuracy_score(y, probabilities.argmax(1)), "loss": float(loss)}


class Classifier(torch.nn.Module):
    """An encoder (X~, X or untrained) and a linear head on the mean of its tokens, starting as the probe,
    so that the first steps do not spoil the features for a head that knows nothing (Kumar et al. 2022)."""

    def __init__(self, net, encoder, probe):
        super().__init__()
        self.autocast, self.encoder, self.head = net.autocast, copy.deepcopy(encoder), copy.deepcopy(probe)
        self.requires_grad_(True).to(net.device)

    def forward(self, s_image, s_text, text_mask):
        with self.autocast():
            pooled = self.encoder(s_image, s_text, text_mask).mean(1)  # [B, D]
        return self.head(pooled.float())  # [B, 3], in float32


def finetune(net, encoder, probe, choice, cache, y, train, validation, epochs, seed):
    """Train encoder and head from the probe on, with its class weights -> (Classifier, its choice).

    A learning rate is tried until the first epoch that is worse on validation by cross-entropy (of a few
    hundred posts, accuracy hardly tells two epochs apart). The best epoch of all is kept; 0 is the probe.
    Steps take a random 16th of the patches: a token does not depend on others, so the mean is unbiased."""
    weights = class_weights(torch.from_numpy(y[train]))[int(choice["balanced"])].to(net.device)
    classifier = Classifier(net, encoder, probe)
    start = best = copy.deepcopy(classifier.state_dict())
    probe_loss, choice = choice["loss"], {**choice, "lr": None, "epoch": 0}
    for lr in LEARNING_RATES:
        classifier.load_state_dict(start)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
        scaler = torch.amp.GradScaler(net.device.type, enabled=net.dtype == torch.float16)
        rng, lowest = np.random.default_rng(seed), probe_loss
        for epoch in range(1, epochs + 1):
            order = rng.permutation(train)
            labels = torch.from_numpy(y[order]).to(net.device).split(BATCH)
            for y_batch, (s_image, *text) in zip(labels, batches(cache, cache.readable[order])):
                B, N = s_image.shape[:2]
                drawn = rng.random((B, N)).argsort(1)[:, :model.patches_to_tune(N)]  # [B, few]
                s_image = model.gather(s_image, torch.from_numpy(drawn).to(net.device))
                loss = F.cross_entropy(classifier(s_image, *text), y_batch, weight=weights)
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
    """Indices of posts -> probabilities [P, 3]"""
    features = batches(cache, cache.readable[part])
    return torch.cat([classifier(*batch).softmax(-1).cpu() for batch in features]).double().numpy()


def predict_rows(net, cache, features, y, split, seed, probes, seconds, args):
    """The test posts of a split -> {"probabilities": {row: [P, 3]}, "choices": {row: choice}}; counts
    `seconds`. `probes` keeps the fitted ones of a split: but for the untrained X~ all seeds share them."""
    train, validation, test = split
    found, choices = {}, {}
    for row in [row for mode in ROWS if mode in args.mode for row in ROWS[mode]]:
        if row == MAJORITY:
            found[row] = np.eye(len(data.LABELS))[[np.bincount(y[train]).argmax()] * len(test)]
            continue
        start = row.removesuffix(FINE_TUNED)
        key = (start, seed) if start == UNTRAINED else start
        if key not in probes:
            with data.timed(seconds, "probes"):
                probes[key] = fit_probe(features[key], y, train, validation)
        head, choices[row] = probes[key]
        if row == start:
            found[row] = probabilities_of(head, features[key][test])
            continue
        encoders = {PRETRAINED: net.target_encoder, ONLINE: net.context_encoder}
        encoder = encoders.get(start) or untrained(net, seed)
        with data.timed(seconds, "fine-tuning"):
            classifier, choices[row] = finetune(net, encoder, head, choices[row], cache, y, train, validation,
                                                args.finetune_epochs, seed)
            found[row] = predict(classifier, cache, test)
    return {"probabilities": {row: values.tolist() for row, values in found.items()}, "choices": choices}


# ---- Predictions -> scores. Before this, test labels only stratify splits ----------------------------------


def score(y, predicted, seeds):
    """Labels, predictions and seeds [T] -> {score: [% for each seed]}, "confusion" [3, 3] of all seeds, and
    "classes": {label: {measure: [% for each seed]}}."""
    every = range(len(data.LABELS))
    scores, measures = [], []
    for seed in dict.fromkeys(seeds):  # in their order
        pair = y[seeds == seed], predicted[seeds == seed]
        f1 = [metrics.f1_score(*pair, average=average) for average in ("weighted", "macro")]
        scores.append([metrics.accuracy_score(*pair), *f1])
        measures.append(metrics.precision_recall_fscore_support(*pair, labels=every, zero_division=0)[:3])
    found = dict(zip(("accuracy", "weighted F1", "macro F1"), (100 * np.transpose(scores)).tolist()))
    found["confusion"] = metrics.confusion_matrix(y, predicted, labels=every).tolist()
    by_label = (100 * np.transpose(measures, (2, 1, 0))).tolist()  # [label, measure, seed]
    found["classes"] = {label: dict(zip(MEASURES, values)) for label, values in zip(data.LABELS, by_label)}
    return found


def bootstrap(gains, posts, draws=2000):
    """Tests [T] of these posts, 1 where only one row is right, -1 where only another is, else 0 -> points of
    accuracy [difference, low, high], a 95 % interval over resampled posts, each with all seeds' tests."""
    _, index, counts = np.unique(posts, return_inverse=True, return_counts=True)
    sums, P = np.bincount(index, gains), len(counts)
    times = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), size=draws)  # [draws, P]
    low, high = np.percentile(times @ sums / (times @ counts), (2.5, 97.5))
    return [100 * float(value) for value in (gains.mean(), low, high)]


def read_json(path):
    """The object in a JSON file of ours, {} if it is not there, cut off or something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def judge(net, loaded, seconds, results, lines, args):
    """Split {set: (posts, skipped)} as one pool, predict, score: fills `seconds`, `results` {set: its part of
    results.json} and the `lines` of predictions.csv. A seed's predictions are read back from OUT/predictions
    if all that they depend on is the same."""
    posts = [post for found, _ in loaded.values() for post in found]
    items = [(post.image, [post.text]) for post in posts]
    with data.timed(seconds, "encode the posts"):
        cache = data.FeatureCache(args.cache, items, net, args.workers)
    for i in cache.unreadable:
        loaded[posts[i].set][1]["unreadable image"] += 1
    if not len(cache.readable):
        raise UserError(f"no image of {NAMES[posts[0].set]} in {posts[0].image.parent} can be read")
    posts = [posts[i] for i in cache.readable]  # from here on, indices are of these
    sets = np.array([post.set for post in posts])
    labels = np.array([post.label for post in posts])
    splits, notes, repeated = split_posts(posts, args)
    for kind in loaded:
        if not all(kind in sets[test] for _, _, test in splits.values()):
            raise UserError(f"a seed tests no post of {NAMES[kind]}: it has too few that can be read")
    code = [Path(file).read_bytes() for file in (__file__, model.__file__, data.__file__)]
    made_of = [cache.key, labels.tolist(), sorted(set(args.mode)), args.finetune_epochs, net.config.heads,
               *map(model.hash_weights, (net.target_encoder, net.context_encoder))]
    features, probes, hashes = None, defaultdict(dict), {}
    tests, probabilities, choices = [], defaultdict(list), defaultdict(dict)
    for seed, split in tqdm(splits.items(), desc="seeds"):
        hashes[seed] = data.digest([[(posts[i].set, posts[i].id) for i in part] for part in split])[:16]
        made_from = data.digest(*code, [*made_of, seed, hashes[seed]])
        path = Path(args.out) / "predictions" / f"{args.protocol}-{'-'.join(loaded)}-{seed}.json"
        kept = read_json(path)
        if kept.get("made_from") != made_from:
            took = Counter()
            with data.timed(took, "pool the features"):
                features = features or extract_features(net, cache, args.seeds)
            found = predict_rows(net, cache, features, labels, split, seed, probes[hashes[seed]], took, args)
            kept = {"made_from": made_from, **found, "seconds": took}
            path.parent.mkdir(exist_ok=True)
            data.write_json(path, kept)
        seconds.update(kept["seconds"])
        tests += [(seed, i) for i in split[2]]
        for row, values in kept["probabilities"].items():
            probabilities[row] += values
        for row, choice in kept["choices"].items():
            choices[row][seed] = choice
    by_seed, tested = np.transpose(tests)  # [T], the tests of all seeds
    for kind, (_, skipped) in loaded.items():
        mine = np.flatnonzero(sets[tested] == kind)
        seed, post = by_seed[mine], tested[mine]
        y, new = labels[post], ~np.isin(post, repeated)
        scores, right = {}, {}
        for row, values in probabilities.items():
            values = np.array(values)[mine]  # [T, 3]
            predicted = values.argmax(1)
            right[row] = (predicted == y).astype(float)
            scores[row] = score(y, predicted, seed)
            if args.split and new.any():
                scores[row]["accuracy without repeats"] = score(y[new], predicted[new], seed[new])["accuracy"]
            for s, i, k, one in zip(seed, post, predicted, values.round(6)):
                lines.append((kind, s, row, posts[i].id, data.LABELS[labels[i]], data.LABELS[k], *one))
        counts = np.bincount(labels[sets == kind], minlength=len(data.LABELS)).tolist()
        differences = {f"{a} minus {b}": bootstrap(right[a] - right[b], post)
                       for a in COMPARED for b in COMPARED[a] if a in right and b in right}
        results[kind] = {
            "posts": sum(counts), "labels": dict(zip(data.LABELS, counts)), "skipped": skipped,
            "choices": choices, "split_hash": hashes, "split_notes": notes, "scores": scores,
            "split_sizes": [len(part) for part in splits[args.seeds[0]]], "differences": differences}


# ---- What is written ---------------------------------------------------------------------------------------


def mean_std(values, digits=2):
    """Numbers -> "mean ± standard deviation", with n - 1; of a single one, which has none, the number."""
    if not values:
        return ""
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
        row, last = list(found["scores"].items())[-1]
        pool = " of the pool, upsampled" if args.protocol == "authors" else ""
        notes = "".join(f"; {count} {what}" for what, count in found["split_notes"].items())
        columns = [key for key in last if key not in ("confusion", "classes")]
        table = [(title, *(mean_std(scores[key]) for key in columns))
                 for title, scores in found["scores"].items()]
        reported = "TI-JEPA-Large, *reported* in the paper, not measured here", *REPORTED[kind]
        parts += [f"{name}: {found['posts']} posts, skipped: {data.describe(found['skipped'])}; train, "
                  f"validation, test {found['split_sizes']}{pool}{notes}",
                  markdown(("features", *columns), *table, (*reported, *["–"] * (len(columns) - 2)))]
        differences = [(pair, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}")
                       for pair, (gain, low, high) in found["differences"].items()]
        confusion = []
        for label, counts in zip(data.LABELS, last["confusion"]):
            means = [f"{np.mean(values):.1f}" for values in last["classes"][label].values()]
            confusion.append((label, *counts, *means))
        header = "difference in accuracy, same test posts", "points", "95 % interval over test posts"
        parts += [markdown(header, *differences), f"{row}, all seeds together:",
                  markdown(("true \\ predicted", *data.LABELS, *MEASURES), *confusion)]
    return "\n\n".join(parts) + "\n"


def ablation_table(folder):
    """The runs in `folder`/<variant>-<seed> -> Markdown: mean ± standard deviation over seeds of pretraining
    of what a variant ended with and of accuracies, each a mean over the same splits. UserError for none."""
    measured = "loss", "energy_matched", "energy_position", "auc", "target_std", "target_rank"
    # {row: (its variant, its column)}; what does not depend on pretraining is the same in all runs
    places = {PRETRAINED: ("", "X~"), ONLINE: ("", "X"), TUNED: ("", "X~ fine-tuned"),
              UNTRAINED: ("*untrained*", "X~"), TUNED_UNTRAINED: ("*untrained*", "X~ fine-tuned"),
              CONCAT: (f"*{CONCAT}*", "X~")}
    table = defaultdict(lambda: defaultdict(list))  # {variant: {column: [a figure of each run]}}
    for out in sorted(path.parent for path in folder.glob("*-*/results.json")):
        variant = out.name.rpartition("-")[0]
        try:
            last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
            ended, judged = (json.loads((out / file).read_text()) for file in ("eval.json", "results.json"))
            if not last["step"] == ended["step"] == judged["step"]:
                raise ValueError("its files are of different steps")
            ended["loss"] = last["loss"]
            for name in measured:
                table[variant][name].append(float(ended[name]))
            for kind, found in judged["sets"].items():
                for row in places.keys() & found["scores"]:
                    shared, column = places[row]
                    accuracy = np.mean(found["scores"][row]["accuracy"])
                    table[shared or variant][f"{column}, {NAMES[kind]}"].append(accuracy)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{out} is no finished run of this version: {error!r}") from error
    if not table:
        raise UserError(f"--ablate {folder}: no <variant>-<seed>/results.json there; run `make ablate`")
    accuracies = sorted({column for found in table.values() for column in found} - set(measured))
    rows = []
    for name, found in sorted(table.items()):
        cells = [mean_std(found[column], 3) for column in measured]
        cells += [mean_std(found[column], 1) for column in accuracies]
        rows.append((name, max(map(len, found.values())), *cells))
    return markdown(("variant", "runs", *measured, *accuracies), *rows) + "\n"


def main(args):
    """The command of the parsed arguments."""
    if args.ablate:
        table = ablation_table(Path(args.ablate))
        (Path(args.ablate) / "results.md").write_text(table, encoding="utf-8")
        return print(table)
    if args.split and args.protocol != "standard":
        raise UserError(f"--split is of the standard protocol, not of --protocol {args.protocol}")
    folders = data.find_mvsa(args.mvsa)  # before any model is loaded
    if args.protocol == "authors" and len(folders) < 2:
        raise UserError(f"--protocol authors pools both sets; {args.mvsa} has only {' '.join(folders)}")
    loaded = {kind: data.load_mvsa(folders[kind]) for kind in NAMES if kind in folders}
    pools = [loaded] if args.protocol == "authors" else [{kind: found} for kind, found in loaded.items()]
    device = model.pick_device(args.device)
    net, checkpoint = model.TIJEPA.from_checkpoint(args.checkpoint, args.image_weights, args.text_encoder)
    net.place(device, args.dtype)
    print(f"finetune_mvsa: {args.checkpoint}, {', '.join(map(str, folders.values()))}, {device}, {net.dtype}")
    with data.locked(args.out):
        evaluated = read_json(Path(args.checkpoint).parent / "eval.json")
        seconds = Counter(checkpoint["seconds"]) + Counter(evaluated.get("seconds"))
        results, lines = {}, [("set", "seed", "row", "id", "label", "prediction", *data.LABELS)]
        for pool in pools:
            judge(net, pool, seconds, results, lines, args)
        table = make_table(results, net.config, args, checkpoint["start_share"])
        ending = "" if args.protocol == "standard" else f"_{args.protocol}"
        path = Path(args.out) / f"results{ending}.json"
        path.with_suffix(".md").write_text(table, encoding="utf-8")
        with open(path.with_name(f"predictions{ending}.csv"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        figure = Figure((4 * len(results), 3.6), layout="tight")  # the last row's confusion matrices
        for axis, (kind, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
            row, scores = list(found["scores"].items())[-1]
            matrix = metrics.ConfusionMatrixDisplay(np.array(scores["confusion"]), display_labels=data.LABELS)
            matrix.plot(ax=axis, cmap="Blues", colorbar=False).ax_.set_title(NAMES[kind])
        figure.suptitle(f"{row}: posts, protocol {args.protocol}, {len(args.seeds)} seeds", fontsize=9)
        figure.savefig(path.with_name(f"confusion{ending}.png"), dpi=100)
        git = "git describe --always --exclude='*' --abbrev=40 --dirty=+ || echo none"  # +: changed since
        code = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
        tools = ("torch", "timm", "transformers", "sklearn", "numpy")
        versions = {name: sys.modules[name].__version__ for name in tools}
        data.write_json(path, {  # the last file: when it is there, all are
            "sets": results, "reported": REPORTED, "args": vars(args), "model": vars(net.config),
            "seeds": args.seeds, "code": code.stdout.strip(), "device": str(device), "dtype": str(net.dtype),
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
