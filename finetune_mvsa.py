"""Judge a pretrained TI-JEPA on MVSA: frozen features -> linear head -> one table for MVSA-Single and MVSA-Multi.

    python finetune_mvsa.py --checkpoint out/toy/checkpoint.pt --mvsa data/toy/mvsa --out out/toy

Writes OUT/results.md (the table) and OUT/results.json (every number, with the config, counts and seconds).

Each set is taken alone and split 8:1:1, stratified by label; the split's seed is the run's seed. All rows are judged alike:
features are standardised, a logistic regression is fitted on train, its regularisation is chosen by accuracy on
validation, and the test posts are scored once with the chosen head. The figures, mean and standard deviation over seeds:

    accuracy         share of test posts with the right label
    weighted F1      F1 of each class, averaged by its number of posts: the "F1" that MVSA papers print
    macro F1         F1 of each class, plain average: shows a class that is never found
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model

REGULARISATION = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, chosen on validation
METRICS = {"accuracy": accuracy_score,
           "weighted F1": lambda y, p: f1_score(y, p, average="weighted", zero_division=0),
           "macro F1": lambda y, p: f1_score(y, p, average="macro", zero_division=0)}
ROWS = ("majority class", "text only", "image only", "text + image concatenated", "TI-JEPA, X~ untrained",
        "TI-JEPA, pretrained")
REPORTED = {"single": (76.75, 74.62), "multi": (77.55, 75.02)}  # TI-JEPA-Large, accuracy and weighted F1, in the paper
NAMES = {"single": "MVSA-Single", "multi": "MVSA-Multi"}


def parse_args(argv=None):
    """Options of the command line; --help lists them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="out/toy/checkpoint.pt", help="what pretrain.py wrote")
    add("--mvsa", default="data/mvsa", help="folder with one or both MVSA sets")
    add("--out", default="out/toy", help="folder for results.md and results.json")
    add("--split", default="", help="folder with CLMLF's train.json, dev.json, test.json (empty: 8:1:1 by seed)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the splits and of the untrained weights")
    add("--ablate", default="", metavar="DIR", help="only make a table of the runs in DIR/<variant>-<seed>, by make ablate")
    add("--batch_size", type=int, default=100, help="posts encoded at a time")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=int, default=2, help="processes that decode images or read the cache")
    add("--cache", default="data/cache", metavar="DIR|off", help="where what the frozen encoders say is kept, or off")
    add("--cache_dtype", choices=list(data.ON_DISK), default="float16", help="of the cached features")
    return parser.parse_args(argv)


def untrained(net, seed):
    """X~ of the same architecture with new random weights: what the row is compared with to see what pretraining adds."""
    torch.manual_seed(1000 + seed)  # not the seed that pretraining started from
    c = net.config
    fusion = model.FusionEncoder(net.image_encoder.dim, net.text_encoder.dim, c.dim, c.depth, c.heads, c.self_attention)
    return model.TargetEncoder(fusion).to(next(net.parameters()).device)


@torch.no_grad()
def encode_posts(net, posts, left_out, args):
    """All features of one set in one pass: ({row: [P, D] array}, posts whose image could be read).

    The untrained X~ has one array for each seed, under (row, seed).
    """
    encoders = {ROWS[5]: net.target_encoder, **{(ROWS[4], seed): untrained(net, seed) for seed in args.seeds}}
    items = [(post.image, [post.text]) for post in posts]
    source = (data.Pictures(items, net.image_encoder.data_config) if args.cache == "off" else
              data.feature_cache(args.cache, items, net, args.cache_dtype, args.workers))
    draws = [(i, i, 0) for i in range(len(posts))]
    batches = [draws[start:start + args.batch_size] for start in range(0, len(draws), args.batch_size)]
    loader = DataLoader(source, batch_size=None, sampler=batches, num_workers=args.workers,
                        pin_memory=net.device.type == "cuda")
    features, kept = {}, []
    for draws, batch in zip(batches, tqdm(loader, desc=f"features of {NAMES[posts[0].set]}")):
        for i in batch.left_out:
            left_out.add("broken image", str(posts[i].image))
        if not batch.size:
            continue
        kept += [posts[i] for i, _, _ in draws if i not in batch.left_out]
        s_image, s_text, mask = batch.features(net)  # [B, N, D_I], [B, L, D_T], [B, L]
        with model.autocast(net.device):
            pooled = {name: encoder(s_image, s_text, mask).mean(1) for name, encoder in encoders.items()}  # [B, D]
        weight = mask[:, :, None]  # [B, L, 1]
        pooled[ROWS[1]] = (s_text.float() * weight).sum(1) / weight.sum(1)  # [B, D_T]: mean over tokens, not padding
        pooled[ROWS[2]] = s_image.float().mean(1)  # [B, D_I]
        for name, value in pooled.items():
            features.setdefault(name, []).append(value.float().cpu().numpy())
    features = {name: np.concatenate(parts) for name, parts in features.items()}
    features[ROWS[3]] = np.hstack([features[ROWS[1]], features[ROWS[2]]])
    return features, kept


def fit_head(x, y, train, validation):
    """Features [P, D], labels [P], indices -> (head, its C). Sees no test post."""
    best = None
    for c in REGULARISATION:
        head = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
        head.fit(x[train], y[train])
        accuracy = accuracy_score(y[validation], head.predict(x[validation]))
        if best is None or accuracy > best[0]:  # a tie keeps the stronger regularisation
            best = accuracy, head, c
    return best[1:]


def evaluate(features, labels, splits):
    """{row: {metric: [score in % for each seed]}} of one set. `splits` is {seed: (train, validation, test)}."""
    scores = {}
    for seed, (train, validation, test) in tqdm(splits.items(), desc="heads"):
        for row in ROWS:
            if row == ROWS[0]:
                head, c = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train), 1)), labels[train]), None
                predicted = head.predict(np.zeros((len(test), 1)))
            else:
                x = features[row if row in features else (row, seed)]
                head, c = fit_head(x, labels, train, validation)
                predicted = head.predict(x[test])
            for name, metric in METRICS.items():
                scores.setdefault(row, {}).setdefault(name, []).append(100 * metric(labels[test], predicted))
            scores[row].setdefault("C", []).append(c)
    return scores


def judge_set(net, folder, args):
    """One MVSA folder -> everything that results.json says of it. Prints the counts."""
    posts, left_out = data.load_mvsa(folder)
    features, posts = encode_posts(net, posts, left_out, args)
    labels = np.array([post.label for post in posts])
    if args.split:
        split, notes = data.published_split(args.split, posts)
        splits = {seed: split for seed in args.seeds}
    else:
        splits, notes = {seed: data.stratified_split(labels, seed) for seed in args.seeds}, {}
    counts = {name: int((labels == i).sum()) for i, name in enumerate(data.LABELS)}
    sizes = [len(part) for part in splits[args.seeds[0]]]
    print(f"{NAMES[posts[0].set]}: {len(posts)} posts {counts}, left out: {left_out}; train, validation, test {sizes}"
          + (f"; split: {dict(notes)}" if notes else ""))
    return {"posts": len(posts), "labels": counts, "left_out": left_out.counts(), "split_sizes": sizes,
            "split_notes": dict(notes), "scores": evaluate(features, labels, splits)}


def table(results, config, args):
    """The results -> Markdown: one table for each set, or a line that says why there is none."""
    lines = ["# TI-JEPA on MVSA", "", f"f_I {config.image_encoder}, f_T {config.text_encoder}, checkpoint "
             f"{args.checkpoint}. Mean ± standard deviation in % over {len(args.seeds)} seeds, "
             + ("of the untrained weights; the split is the published one." if args.split
                else "of the split and of the untrained weights; one pretrained checkpoint."), ""]
    if config.image_encoder == "toy":
        lines += ["**Toy data and untrained toy encoders: these numbers are not the paper's and not comparable to it.**", ""]
    for kind, name in NAMES.items():
        lines += [f"## {name}", ""]
        found = results.get(kind)
        if found:
            lines += [f"{found['posts']} posts, train / validation / test " + " / ".join(map(str, found["split_sizes"])), ""]
        lines += ["| features | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
        for row in ROWS:
            cells = ([f"{np.mean(found['scores'][row][m]):.2f} ± {np.std(found['scores'][row][m]):.2f}" for m in METRICS]
                     if found else [f"not measured: no {name} in {args.mvsa}"] + ["–"] * (len(METRICS) - 1))
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        accuracy, f1 = REPORTED[kind]
        lines += [f"| TI-JEPA-Large, *reported* in the paper, not measured here | {accuracy} | {f1} | not reported |", ""]
    return "\n".join(lines)


def ablation_table(folder):
    """The runs of `make ablate` in `folder`/<variant>-<seed> -> Markdown: a row for each variant, in order of age, with
    mean ± standard deviation over its seeds. Raises DataError if there are none."""
    runs, baselines = {}, {}
    for path in sorted(folder.glob("*-*/results.json"), key=lambda path: path.stat().st_mtime):
        scores = {kind: found["scores"] for kind, found in json.loads(path.read_text())["sets"].items()}
        judged = json.loads((path.parent / "eval.json").read_text())
        loss = json.loads((path.parent / "log.jsonl").read_text().splitlines()[-1])["loss"]
        probe = {row: [np.mean(scores[kind][row]["accuracy"]) for kind in NAMES] for row in ROWS}
        figures = [loss, judged["target_std"], judged["target_rank"], judged["auc"], *probe[ROWS[5]]]
        runs.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(figures)
        for row in (ROWS[4], ROWS[3]):
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


def main(argv=None):
    """Returns the exit code: 0, or 2 for what the user can mend."""
    args, start = parse_args(argv), time.time()
    try:
        if args.ablate:
            text = ablation_table(Path(args.ablate))
            (Path(args.ablate) / "results.md").write_text(text, encoding="utf-8")
            print(text)
            return 0
        folders = data.find_mvsa(args.mvsa)  # before any model is loaded
        device, out_dir = model.choose_device(args.device), Path(args.out)
        out_dir.mkdir(parents=True, exist_ok=True)
        net = model.TIJEPA.from_checkpoint(args.checkpoint)[0].to(device)
        print(f"finetune_mvsa: {args.checkpoint}, {', '.join(str(f) for f in folders.values())}, device {device}")
        results = {kind: judge_set(net, folder, args) for kind, folder in sorted(folders.items(), reverse=True)}
    except (data.DataError, model.EncoderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(results, net.config, args)
    (out_dir / "results.md").write_text(text, encoding="utf-8")
    versions = {module.__name__: module.__version__ for module in (torch, np)}
    config = {key: value for key, value in vars(net.config).items() if key != "vocabulary"}
    (out_dir / "results.json").write_text(json.dumps({
        "sets": results, "reported": REPORTED, "args": vars(args), "model": config, "versions": versions,
        "device": str(device), "seconds": round(time.time() - start, 1)}, indent=1), encoding="utf-8")
    print(f"\n{text}\nfinetune_mvsa: wrote {out_dir / 'results.md'} and {out_dir / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
